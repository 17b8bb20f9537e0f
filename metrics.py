"""From images to features to figures: what eval_min.py computes. Nothing here reads or writes images.

Definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py) and of torch-fidelity 0.4;
where they leave a choice, the docstring says which was made. Features are float32, N or M rows of D, one row an image.
A network is a function: uint8 (n, H, W, C) -> a tuple of float32 arrays (n, D), one for each kind of features.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

MAX_FIT = 10_000  # real images that the classifier and the PCA are fitted to; the cost of the first is quadratic
KINDS = (("mu", "sigma", "fid", "kid"), ("mu_s", "sigma_s", "sfid", "skid"))  # of features: pool_3 or pixels; spatial
BLOCK = 4096  # rows at a time, so that memory does not grow with the square of N
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------------------------------------------------------------
# Features.


def inception(weights=None):
    """torch-fidelity's port of the 2015 Inception that ADM uses, as a network with three kinds of features:

    pool_3 (2048); the first 7 of 192 channels of the 1x1 branch of Mixed_6d, 17 x 17, flattened height, width, channel
    (2023), which is the order of a reference file's mu_s and sigma_s; and the logits without bias (1008).
    The network itself resizes images of any size; grey ones are repeated. ValueError without torch-fidelity or weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(f"Inception needs torch-fidelity, the extra [eval]; --features pixels does not ({e})") from e
    try:
        net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights and str(weights))
    except Exception as e:  # whatever torch.load makes of a file, or a download of the network
        what = (str(e) or repr(e)).splitlines()[0]
        if weights: raise ValueError(f"{weights} does not hold torch-fidelity's Inception weights: {what}") from e
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        raise ValueError(f"no Inception weights ({what}): get {URL_INCEPTION_V3} and put it at {cache}, "
                         "or say where it is with --inception FILE") from e
    torch.backends.cudnn.allow_tf32 = False  # convolutions would keep 10 bits, which moves an FID
    net, spatial = net.to(DEVICE), []
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, out: spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1)))  # H, W, C

    @torch.inference_mode()
    def network(x):
        if x.shape[3] not in (1, 3): raise ValueError(f"Inception takes one channel or three, not {x.shape[3]}")
        x = torch.tensor(x, device=DEVICE).permute(0, 3, 1, 2)
        pool, logits = net(x.expand(-1, 3, -1, -1))
        return tuple(z.cpu().numpy() for z in (pool, spatial.pop(), logits))

    return network


def chosen(n, most):
    """A fixed choice of at most `most` of n images, as a mask."""
    mask = np.zeros(n, bool)
    mask[np.random.default_rng(0).permutation(n)[:most]] = True
    return mask


def pixels(real, n=None):
    """A network with one kind of features: pixels in 0..levels (H*W*C), or, with n, their n principal components,
    fitted to the real Images, at most MAX_FIT of them or 1 GiB."""
    scale, D = np.float32(real.more.get("levels", 255) / 255), int(np.prod(real.shape[1:]))
    if not n: return lambda x: (x.reshape(-1, D) * scale,)
    mask, examples, seen = chosen(real.shape[0], min(MAX_FIT, 2**28 // D)), [], 0
    if n > min(D, mask.sum()):
        raise ValueError(f"{n} principal components need as many real images and pixels, not {mask.sum()} of {D}")
    for x in real.rows(1024):
        examples.append(x[mask[seen : seen + len(x)]].reshape(-1, D) * scale)
        seen += len(x)
    pca = PCA(n, random_state=0).fit(np.concatenate(examples))
    return lambda x: (pca.transform(x.reshape(-1, D) * scale).astype(np.float32),)


def extract(images, network, batch=64, keep=None, quiet=False):
    """Images through a network -> for each kind of its features those of the images in the mask `keep` (all by default)
    as one array, and the Moments of all images."""
    total, began, told = images.shape[0], time.time(), 0.0
    keep = np.ones(total, bool) if keep is None else keep
    kept, moments, waiting, done, seen = [], [], [], 0, 0
    for x in images.rows(batch):
        waiting.append(network(x))
        seen += len(x)
        live = sys.stderr.isatty()
        if not quiet and (seen == total or time.time() - told > (0.5 if live else 30)):
            told = time.time()
            print(f"{images.name}: {seen:,} of {total:,} images, {seen / (told - began + 1e-9):.1f}/s",
                  end="\r" if live and seen < total else "\n", file=sys.stderr, flush=True)
        if seen < total and seen - done < BLOCK: continue  # a covariance is cheap only for many rows at once
        blocks, waiting = [np.concatenate(kind) for kind in zip(*waiting)], []
        if not kept:
            kept = [np.empty((keep.sum(), block.shape[1]), np.float32) for block in blocks]
            moments = [Moments() for _ in blocks]
        for store, moment, block in zip(kept, moments, blocks):
            store[keep[:done].sum() : keep[:seen].sum()] = block[keep[done:seen]]
            moment.add(block)
        done = seen
    return kept, moments


# ---------------------------------------------------------------------------------------------------------------------
# Figures.


class Moments:
    """Mean (D) and unbiased covariance (D x D) in float64 of features (n x D) that arrive in blocks. ValueError if
    there are fewer than two, or not all are finite."""

    n = 0

    def add(self, x):
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all(): raise ValueError("the features are not finite")
        if not self.n:  # sums are taken about the first block's mean, so that they do not cancel
            self.shift, self.total, self.square = x.mean(0), 0.0, 0.0
        x = x - self.shift
        self.n, self.total, self.square = self.n + len(x), self.total + x.sum(0), self.square + x.T @ x

    def result(self):
        if self.n < 2: raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        mean = self.total / self.n
        return self.shift + mean, (self.square - self.n * np.outer(mean, mean)) / (self.n - 1)


def statistics(features):
    """Features (N x D), N >= 2 -> mean (D) and unbiased covariance (D x D), both float64. ValueError if not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected N x D features with N >= 2, got shape {features.shape}")
    moments = Moments()
    for i in range(0, len(features), BLOCK):  # only this much of a large set is ever float64
        moments.add(features[i : i + BLOCK])
    return moments.result()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: mu (D), sigma (D x D, may be singular) -> float. ValueError if not
    finite or of unlike shapes.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2). With S = R R^T the last trace is the sum of the singular values
    of R1^T R2. Their squares, the eigenvalues of S1 S2, would turn a rounding error of 1e-16 into one of 1e-8.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError("expected means (D) and covariances (D x D), got shapes "
                         f"{mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the means or covariances are not finite")
    roots = []
    for sigma in (sigma1, sigma2):
        w, v = np.linalg.eigh(sigma)
        large = w > len(w) * np.finfo(w.dtype).eps * w[-1]  # the others are noise about 0
        roots.append(v[:, large] * np.sqrt(w[large]))
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)  # equal Gaussians may come out at -1e-10


def kid(fake, real, subset_size=1000, subsets=100, seed=2020):
    """Kernel Inception distance of features (N x D), (M x D) -> mean and standard deviation over random subsets.

    torch-fidelity's: the unbiased MMD^2 with kernel (x.y / D + 1)^3 between `subset_size` rows of each set, drawn as it
    draws them, without replacement; but in float64, since a KID is a small difference of large sums. A little below 0
    is a valid value. ValueError if a set has fewer rows than a subset.
    """
    m = subset_size
    if not 2 <= m <= min(len(fake), len(real)):
        raise ValueError(f"KID with subsets of {m} needs at least {max(m, 2)} images in each set, "
                         f"got {len(fake)} and {len(real)}")
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (z[rng.choice(len(z), m, replace=False)] / np.float64(z.shape[1]) ** 0.5 for z in (fake, real))
        xx, yy, xy = (a @ b.T + 1 for a, b in ((x, x), (y, y), (x, y)))
        sums = [np.vdot(z * z, z) for z in (xx, yy, xy)]  # of z^3; `z**3` takes longer than the products
        diagonals = (xx.diagonal() ** 3).sum() + (yy.diagonal() ** 3).sum()
        values.append((sums[0] + sums[1] - diagonals) / (m * (m - 1)) - 2 * sums[2] / m**2)
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits, block=5000):
    """Logits without bias (N x classes) -> exp of the mean of KL(p(y|x) || p(y)), averaged over consecutive blocks.

    ADM's. torch-fidelity's differs: it shuffles the images (seed 2020) and always makes ten parts, whatever N is.
    """
    scores = []
    for part in torch.as_tensor(logits).split(block):
        log_p = part.to(DEVICE, torch.float64).log_softmax(1)
        log_q = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def squared_distances(x, y):
    """Rows of x (n x D), rows of y (m x D) -> n x m, in their dtype; see `rounding` for how far off."""
    return torch.addmm(torch.linalg.vector_norm(y, dim=1) ** 2, x, y.T, alpha=-2).add_(
        torch.linalg.vector_norm(x, dim=1)[:, None] ** 2)


def rounding(D, largest, dtype):
    """More than `squared_distances` is off by: its sums of D products of size `largest`, the largest |row|^2, round
    like a random walk. The errors seen are below a tenth of this."""
    return 8 * (1 + D**0.5) * torch.finfo(dtype).eps * largest


class Balls:
    """Around each row of x (N x D, float32) the ball that reaches to its k-th nearest other row; and which of n points
    lie in one of them, the surface included. `largest` is the largest |row|^2 of x and the points, less the center.

    Distances are multiplied out in float32, at twice the speed of float64. That leaves open the points that are nearer
    to a surface than float32 rounds, and in no other ball; these few are settled in float64 in the end.
    """

    def __init__(self, x, k, n, largest):
        self.k, self.slack = k, 2 * rounding(x.shape[1], largest, torch.float32)
        near = torch.full((k + 1, len(x)), torch.inf, device=x.device)  # the nearest is the row itself
        for i in range(0, len(x), BLOCK):
            for j in range(i, len(x), BLOCK):  # the matrix of distances is symmetric: half of it will do
                d = squared_distances(x[i : i + BLOCK], x[j : j + BLOCK])
                for at, part in ((i, d.T), (j, d))[: 1 + (i < j)]:
                    near[:, at : at + BLOCK] = self.smallest([near[:, at : at + BLOCK], part])
        self.radius = near[k]  # squared, like every distance here
        self.inside, self.open = (torch.zeros(n, dtype=torch.bool, device=x.device) for _ in range(2))
        self.touched = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # balls that open points may lie in

    def smallest(self, parts):
        """The k + 1 smallest of each column of the parts (each n_i x m) -> (k + 1) x m, in ascending order."""
        parts = [p.topk(min(self.k + 1, len(p)), 0, largest=False).values for p in parts]
        return torch.cat(parts).topk(self.k + 1, 0, largest=False).values

    def look(self, points, balls, d):
        """d: float32 distances of a slice of the points to a slice of the balls."""
        gap = d - self.radius[balls]
        least = gap.amin(1)
        unclear = least.abs() <= self.slack
        self.inside[points] |= least < -self.slack
        self.open[points] |= unclear
        self.touched[balls] |= (gap[unclear] <= self.slack).any(0)

    def share(self, points, x):
        """The share of the points (n x D) that are inside, once all pairs have been looked at. points, x: not centered,
        for that was rounded."""
        rows = (self.open & ~self.inside).nonzero()[:, 0]
        for balls in self.touched.nonzero()[:, 0].split(BLOCK // 8) if len(rows) else ():
            center = x[balls].double()
            radius = self.smallest([squared_distances(y.double(), center) for y in x.split(BLOCK)])[self.k]
            for r in rows.split(BLOCK):
                p = points[r].double()
                largest = max(z.square().sum(1).max().item() for z in (p, center))
                tie = 2 * rounding(x.shape[1], largest, torch.float64)
                self.inside[r] |= (squared_distances(p, center) <= radius + tie).any(1)
        return self.inside.double().mean().item()


def precision_recall(real, fake, k=3):
    """Features (N x D), (M x D) -> improved precision and recall (Kynkaanniemi et al. 2019), as ADM computes them.

    Precision: the share of fake rows that lie in the ball of some real row; its radius is the distance to the k-th
    nearest other real row. Recall: the reverse. ValueError if a set has k rows or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need at least {k + 1} images in each set; "
                         f"got {len(fake)} and {len(real)}")
    real, fake = (torch.as_tensor(x, dtype=torch.float32, device=DEVICE) for x in (real, fake))
    r, f = real - real.mean(0), fake - real.mean(0)  # distances do not depend on it, the rounding of the products does
    largest = torch.stack([x.square().sum(1).max() for x in (r, f)]).max().item()  # NaN if there is one
    if not np.isfinite(largest): raise ValueError("the features are not finite")
    real_balls, fake_balls = Balls(r, k, len(f), largest), Balls(f, k, len(r), largest)
    for i in range(0, len(f), BLOCK):
        for j in range(0, len(r), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            d = squared_distances(f[rows], r[columns])
            real_balls.look(rows, columns, d)
            fake_balls.look(columns, rows, d.T)
    return real_balls.share(fake, real), fake_balls.share(real, fake)


def class_accuracy(samples, sample_labels, real, real_labels):
    """Share of samples (N x ...) that a classifier of the real images (M x ..., the same scale) gives their label.

    An RBF support vector machine on pixels. gamma = 2 / (D var) does not depend on the scale of the pixels; on digits
    in 0..16 it is 0.00086, where ten-fold cross-validation gives 99.0%.
    """
    real, real_labels = real[:MAX_FIT].reshape(len(real[:MAX_FIT]), -1), real_labels[:MAX_FIT]
    model = SVC(gamma=2 / (real.shape[1] * real.var()))
    return float(model.fit(real, real_labels).score(samples.reshape(len(samples), -1), sample_labels))


def figures(metrics, fake, real, stats, subset):
    """Features of each kind, fake and real, and stats(kind), both means and covariances -> {metric: float}; kid_std is
    the standard deviation of kid."""
    out = {}
    for i, (_, _, frechet, kernel) in enumerate(KINDS):
        if frechet in metrics: out[frechet] = frechet_distance(*stats(i))
        if kernel in metrics: out[kernel], out[f"{kernel}_std"] = kid(fake[i], real[i], subset)
    if "is" in metrics: out["is"] = inception_score(fake[2])
    if {"precision", "recall"} & {*metrics}:
        out["precision"], out["recall"] = precision_recall(real[0], fake[0])
    return out
