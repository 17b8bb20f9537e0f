"""From images to features to figures: FID, KID, precision, recall and so on.

For eval_min.py; nothing here reads or writes images. Imports numpy and torch; scikit-learn and
torch-fidelity inside the functions that need them. Definitions: evaluation/README.md.

The definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py)
and of torch-fidelity 0.4; where they leave a choice, the docstring says which one was made.
Features are float32, N or M rows of D, one row per image. A network is a function from uint8
(n, H, W, C) to a tuple of float32 arrays (n, D), one for each kind of features.
"""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

# Of each kind of features the names of: mean, covariance, Frechet distance, kernel distance.
KINDS = (
    ("mu", "sigma", "fid", "kid"),  # pool_3 of Inception, or pixels
    ("mu_s", "sigma_s", "sfid", "skid"),  # spatial features of Inception
)
MAX_FIT = 10_000  # real images that the classifier (of quadratic cost) and the PCA are fitted to
BLOCK = 4096  # rows at a time, so that memory does not grow with the square of N
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------
# Features.


def inception(weights=None):
    """torch-fidelity's port of the 2015 Inception that ADM uses: a network with three kinds.

    - pool_3 (2048);
    - the first 7 of 192 channels of the 1x1 branch of Mixed_6d, 17 x 17, flattened in the order
      height, width, channel (2023), which is the order of a reference file's mu_s and sigma_s;
    - the logits without bias (1008).
    The network resizes images of any size itself; grey images are repeated to three channels.
    ValueError without torch-fidelity or without its weights.
    """
    net = load_inception(weights).to(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # TF32 convolutions keep 10 bits, which moves an FID
    spatial = []

    def keep_spatial(module, inputs, out):
        spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1))  # height, width, channel

    net.Mixed_6d.branch1x1.register_forward_hook(keep_spatial)

    @torch.inference_mode()
    def network(x):
        if x.shape[3] not in (1, 3):
            raise ValueError(f"Inception takes one channel or three, not {x.shape[3]}")
        x = torch.tensor(x, device=DEVICE).permute(0, 3, 1, 2)
        pool, logits = net(x.expand(-1, 3, -1, -1))
        return tuple(z.cpu().numpy() for z in (pool, spatial.pop(), logits))

    return network


def load_inception(weights):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(
            f"Inception needs torch-fidelity, the extra [eval]; --features pixels does not ({e})"
        ) from e
    features = ["2048", "logits_unbiased"]
    try:
        return FeatureExtractorInceptionV3("inception", features, weights and str(weights))
    except Exception as e:  # torch.load and a download raise many types
        reason = (str(e) or repr(e)).splitlines()[0]
        if weights:
            raise ValueError(
                f"{weights} does not hold torch-fidelity's Inception weights: {reason}"
            ) from e
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        raise ValueError(
            f"no Inception weights ({reason}): get {URL_INCEPTION_V3} and put it at {cache}, "
            "or say where it is with --inception FILE"
        ) from e


def chosen(n, most):
    """A fixed choice of at most `most` of n images, as a mask."""
    mask = np.zeros(n, bool)
    mask[np.random.default_rng(0).permutation(n)[:most]] = True
    return mask


def pixels(real, n=None):
    """A network with one kind of features, the pixels in 0..levels; or n principal components.

    The components are fitted to the real Images: at most MAX_FIT of them, or 1 GiB.
    """
    scale = np.float32(real.more.get("levels", 255) / 255)
    D = int(np.prod(real.shape[1:]))
    if not n:
        return lambda x: (x.reshape(-1, D) * scale,)
    mask = chosen(real.shape[0], min(MAX_FIT, 2**28 // D))
    if n > min(D, mask.sum()):
        raise ValueError(
            f"{n} principal components need as many real images and pixels, not {mask.sum()} of {D}"
        )
    examples = []
    seen = 0
    for x in real.rows(1024):
        examples.append(x[mask[seen : seen + len(x)]].reshape(-1, D) * scale)
        seen += len(x)
    PCA = from_sklearn("decomposition", "PCA")
    pca = PCA(n, random_state=0).fit(np.concatenate(examples))
    return lambda x: (pca.transform(x.reshape(-1, D) * scale).astype(np.float32),)


def from_sklearn(module, name):
    """sklearn.MODULE.NAME. ValueError, one line, where scikit-learn is not installed."""
    try:
        return getattr(importlib.import_module(f"sklearn.{module}"), name)
    except ImportError as e:
        raise ValueError(
            f"comparing pixels needs scikit-learn: pip install scikit-learn ({e})"
        ) from e


def extract(images, network, batch=64, keep=None, quiet=False):
    """Images through a network -> two lists, with an entry for each kind of its features.

    First the features of the images in the mask `keep` (all of them by default) as an array;
    second the Moments of all images.
    """
    total = images.shape[0]
    keep = np.ones(total, bool) if keep is None else keep
    progress = Speed(images.name, total, quiet)
    kept, moments = [], []
    waiting = []  # outputs of the network since the last block
    done = seen = 0
    for x in images.rows(batch):
        waiting.append(network(x))
        seen += len(x)
        progress(seen)
        if seen < total and seen - done < BLOCK:
            continue  # a covariance is cheap only for many rows at once
        blocks = [np.concatenate(kind) for kind in zip(*waiting)]
        waiting = []
        if not kept:
            kept = [np.empty((keep.sum(), block.shape[1]), np.float32) for block in blocks]
            moments = [Moments() for _ in blocks]
        first, last = keep[:done].sum(), keep[:seen].sum()
        for store, moment, block in zip(kept, moments, blocks):
            store[first:last] = block[keep[done:seen]]
            moment.add(block)
        done = seen
    return kept, moments


class Speed:
    """A line on stderr that says how many images have gone through a network."""

    def __init__(self, name, total, quiet):
        self.name = name
        self.total = total
        self.quiet = quiet
        self.began = time.time()
        self.told = 0.0

    def __call__(self, seen):
        live = sys.stderr.isatty()
        finished = seen == self.total
        now = time.time()
        if self.quiet or (not finished and now - self.told <= (0.5 if live else 30)):
            return
        self.told = now
        print(
            f"{self.name}: {seen:,} of {self.total:,} images, "
            f"{seen / (now - self.began + 1e-9):.1f}/s",
            end="\r" if live and not finished else "\n",
            file=sys.stderr,
            flush=True,
        )


# --------------------------------------------------------------------------------------------------
# Figures.


class Moments:
    """Mean (D) and unbiased covariance (D, D) in float64 of features (n, D) that arrive in blocks.

    ValueError for fewer than two rows, or a feature that is not finite.
    """

    def __init__(self):
        self.n = 0

    def add(self, x):
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all():
            raise ValueError("the features are not finite")
        if self.n == 0:
            self.shift = x.mean(0)  # sums about the first mean do not cancel
            self.total = 0.0
            self.square = 0.0
        x = x - self.shift
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.square = self.square + x.T @ x

    def result(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        mean = self.total / self.n
        covariance = (self.square - self.n * np.outer(mean, mean)) / (self.n - 1)
        return self.shift + mean, covariance


def statistics(features):
    """Features (N, D), N >= 2 -> mean (D) and unbiased covariance (D, D), both float64.

    ValueError for another shape, or a feature that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected N x D features with N >= 2, got shape {features.shape}")
    moments = Moments()
    for i in range(0, len(features), BLOCK):  # so that only one block of a large set is float64
        moments.add(features[i : i + BLOCK])
    return moments.result()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: mu (D), sigma (D, D, may be singular) -> float.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2). With S = R R^T the last trace is the sum of
    the singular values of R1^T R2. Taking the root of the eigenvalues of S1 S2, which are their
    squares, would turn a rounding error of 1e-16 into one of 1e-8.
    ValueError for unlike shapes, or a value that is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError(
            "expected means (D) and covariances (D x D), got shapes "
            f"{mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the means or covariances are not finite")
    cross = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)  # rounding takes equal Gaussians to -1e-10


def root(sigma):
    """R (D, r) with R R^T = sigma (D, D), r the numerical rank."""
    w, v = np.linalg.eigh(sigma)
    large = w > len(w) * np.finfo(w.dtype).eps * w[-1]  # the others are rounding errors about 0
    return v[:, large] * np.sqrt(w[large])


def kid(fake, real, subset_size=1000, subsets=100, seed=2020):
    """Kernel Inception distance of features (N, D), (M, D) -> mean and standard deviation.

    torch-fidelity's: the unbiased MMD^2 with kernel (x.y / D + 1)^3 between `subset_size` rows of
    each set, drawn as torch-fidelity draws them, without replacement. Computed in float64, since a
    KID is a small difference of large sums. A value a little below 0 is valid. ValueError if a set
    has fewer rows than a subset.
    """
    m = subset_size
    if not 2 <= m <= min(len(fake), len(real)):
        raise ValueError(
            f"KID with subsets of {m} needs at least {max(m, 2)} images in each set, "
            f"got {len(fake)} and {len(real)}"
        )
    rng = np.random.RandomState(seed)
    scale = np.float64(real.shape[1]) ** 0.5
    values = []
    for _ in range(subsets):
        x = fake[rng.choice(len(fake), m, replace=False)] / scale
        y = real[rng.choice(len(real), m, replace=False)] / scale
        xx, yy, xy = (a @ b.T + 1 for a, b in ((x, x), (y, y), (x, y)))
        # sums of cubes; `z**3` would take longer than the products
        sum_xx, sum_yy, sum_xy = (np.vdot(z * z, z) for z in (xx, yy, xy))
        diagonals = (xx.diagonal() ** 3).sum() + (yy.diagonal() ** 3).sum()
        values.append((sum_xx + sum_yy - diagonals) / (m * (m - 1)) - 2 * sum_xy / m**2)
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits, block=5000):
    """Logits without bias (N, classes) -> exp of the mean of KL(p(y|x) || p(y)).

    Averaged over consecutive blocks, as in ADM. torch-fidelity differs: it shuffles the images
    (seed 2020) and makes ten parts whatever N is.
    """
    scores = []
    for part in torch.as_tensor(logits).split(block):
        log_p = part.to(DEVICE, torch.float64).log_softmax(1)
        log_q = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores))


# --------------------------------------------------------------------------------------------------
# Precision and recall.


def squared_distances(x, y):
    """Rows of x (n, D), rows of y (m, D) -> (n, m), in their dtype; `rounding` bounds its error."""
    xx = torch.linalg.vector_norm(x, dim=1) ** 2
    yy = torch.linalg.vector_norm(y, dim=1) ** 2
    return torch.addmm(yy, x, y.T, alpha=-2).add_(xx[:, None])


def rounding(D, largest, dtype):
    """A bound of the error of `squared_distances`, where `largest` is the largest |row|^2.

    Sums of D products of that size round like a random walk. The errors that were seen are below a
    tenth of this.
    """
    return 8 * (1 + D**0.5) * torch.finfo(dtype).eps * largest


class Balls:
    """A ball around each row of x (N, D; float32) that reaches to its k-th nearest other row.

    `look` and `share` find which of n points lie in one of the balls, the surface included.
    `largest` is the largest |row|^2 of x and of the points, less the center.

    Distances are multiplied out in float32, at twice the speed of float64. This leaves points
    undecided that are nearer to a surface than float32 rounds and lie in no other ball; `share`
    decides these few in float64. Radii and distances are squared.
    """

    def __init__(self, x, k, n, largest):
        N, D = x.shape
        self.k = k
        self.slack = 2 * rounding(D, largest, torch.float32)
        near = torch.full((k + 1, N), torch.inf, device=x.device)  # the nearest is the row itself
        for i in range(0, N, BLOCK):
            for j in range(i, N, BLOCK):  # the matrix of distances is symmetric: half is enough
                d = squared_distances(x[i : i + BLOCK], x[j : j + BLOCK])
                rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
                near[:, rows] = self.smallest([near[:, rows], d.T])
                if i < j:
                    near[:, columns] = self.smallest([near[:, columns], d])
        self.radius = near[k]
        self.inside = torch.zeros(n, dtype=torch.bool, device=x.device)
        self.open = torch.zeros(n, dtype=torch.bool, device=x.device)  # undecided points
        self.touched = torch.zeros(N, dtype=torch.bool, device=x.device)  # balls that may hold them

    def smallest(self, parts):
        """The k + 1 smallest of each column of the parts (n_i, m) -> (k + 1, m), ascending."""
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
        """The share of the points (n, D) that are inside, after `look` has seen all pairs.

        points, x: as they were before the center was subtracted, which rounded them.
        """
        rows = (self.open & ~self.inside).nonzero()[:, 0]
        if len(rows):
            for balls in self.touched.nonzero()[:, 0].split(BLOCK // 8):
                self.decide(rows, points, balls, x)
        return self.inside.double().mean().item()

    def decide(self, rows, points, balls, x):
        """Whether the given rows of the points lie in one of the given balls, in float64."""
        center = x[balls].double()
        distances = [squared_distances(y.double(), center) for y in x.split(BLOCK)]
        radius = self.smallest(distances)[self.k]
        for some in rows.split(BLOCK):
            p = points[some].double()
            largest = max(z.square().sum(1).max().item() for z in (p, center))
            tie = 2 * rounding(x.shape[1], largest, torch.float64)
            self.inside[some] |= (squared_distances(p, center) <= radius + tie).any(1)


def precision_recall(real, fake, k=3):
    """Features (N, D), (M, D) -> improved precision and recall (Kynkaanniemi et al. 2019), as ADM.

    Precision is the share of fake rows that lie in the ball of some real row; its radius is the
    distance to the k-th nearest other real row. Recall is the reverse. ValueError if a set has k
    rows or fewer, or a feature is not finite.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall need at least {k + 1} images in each set; "
            f"got {len(fake)} and {len(real)}"
        )
    real, fake = (torch.as_tensor(x, dtype=torch.float32, device=DEVICE) for x in (real, fake))
    # a common shift leaves the distances as they are, and makes the products round less
    center = real.mean(0)
    r, f = real - center, fake - center
    largest = torch.stack([x.square().sum(1).max() for x in (r, f)]).max().item()  # NaN passes
    if not np.isfinite(largest):
        raise ValueError("the features are not finite")
    real_balls = Balls(r, k, len(f), largest)
    fake_balls = Balls(f, k, len(r), largest)
    for i in range(0, len(f), BLOCK):
        for j in range(0, len(r), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            d = squared_distances(f[rows], r[columns])
            real_balls.look(rows, columns, d)
            fake_balls.look(columns, rows, d.T)
    return real_balls.share(fake, real), fake_balls.share(real, fake)


# --------------------------------------------------------------------------------------------------
# The classifier, and everything together.


def class_accuracy(samples, sample_labels, real, real_labels):
    """The share of samples (N, ...) that a classifier of real images (M, ...) gives their label.

    An RBF support vector machine on pixels, of the same scale in both. gamma = 2 / (D var) does not
    depend on that scale; on digits in 0..16 it is 0.00086, where ten-fold cross-validation gives
    99.0 %.
    """
    real, real_labels = real[:MAX_FIT], real_labels[:MAX_FIT]
    real = real.reshape(len(real), -1)
    SVC = from_sklearn("svm", "SVC")
    model = SVC(gamma=2 / (real.shape[1] * real.var())).fit(real, real_labels)
    return float(model.score(samples.reshape(len(samples), -1), sample_labels))


def figures(metrics, fake, real, stats, subset):
    """{metric: float} of features, a list of arrays for `fake` and for `real`, one for each kind.

    stats(kind) -> mean and covariance of the fake, mean and covariance of the real ones. subset:
    images in a subset of KID; kid_std is the standard deviation over the subsets.
    """
    out = {}
    for i, (_, _, frechet, kernel) in enumerate(KINDS):
        if frechet in metrics:
            out[frechet] = frechet_distance(*stats(i))
        if kernel in metrics:
            out[kernel], out[f"{kernel}_std"] = kid(fake[i], real[i], subset)
    if "is" in metrics:
        out["is"] = inception_score(fake[2])
    if "precision" in metrics or "recall" in metrics:
        out["precision"], out["recall"] = precision_recall(real[0], fake[0])
    return out
