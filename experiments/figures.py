"""The paper's figures of finished runs of ablate.py, as PNGs.

    curves.png       held-out loss against steps: mean over the seeds, band from smallest to largest
    routes.png       Fig. 5: the most used projector of each class and block; usage while training
    attention.png    Fig. 6: what one query token attends to, after each component of the ladder
    lambdas.png      Fig. 7: mean lambda against depth
    smoothness.png   oversmoothing: entropy and variance of the attention's rows in every block
    resolutions.png  Fig. 1: time and memory of one sampling step
    tsne.png         Fig. 11: the features of the samples, by class

`draw` makes the figures whose runs are finished. probe.py, costs.py and classifier.py measure what
they show. Imports dydilit.py and this folder.
"""

import json
import math
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from dydilit import Data, Diffusion
from experiments import classifier, pretrained
from experiments.probe import noisy, usage, watched
from experiments.tables import spread

RUNGS = {  # models of the ladder: their labels
    "ladder-0-sana": "Sana, DiT's start",  # of the feed-forward
    "ladder-1-focused": "+ focused kernel",
    "ladder-2-measure": "+ dynamic measure",
    "ladder-3-projection": "+ dynamic projection",
    "ladder-4-difference": "+ token difference",
    "DyDi-LiT": "DyDi-LiT",
}
LOOKS = {  # colour, line style
    "ladder-0-sana": ("#9ecae1", "-"),
    "ladder-1-focused": ("#4292c6", "-"),
    "ladder-2-measure": ("#084594", "-"),
    "ladder-3-projection": ("#fdae6b", "-"),
    "ladder-4-difference": ("#f16913", "-"),
    "DyDi-LiT": ("#b30000", "-"),
    "DiT": ("black", "--"),
    "DiT-glumbconv": ("black", ":"),
    "Sana": ("#9ecae1", "--"),
    "MHLA": ("#e6ab02", "--"),
    "map-wise": ("#238b45", "-."),
    "rising-lambda": ("#74c476", ":"),
    "no-normalize": ("#6a51a3", "--"),
    "no-router-grad": ("#df65b0", "-."),
    "router-score": ("#df65b0", ":"),
    "router-dense": ("#df65b0", "--"),
    "batch-norm": ("#737373", ":"),
}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
ROUTER_COLOURS = {"projector": "#1b9e77", "kernel": "#7570b3", "difference": "#d95f02"}


def canvas(rows, columns, height, **options):
    """A figure 8 inches wide (1200 pixels, shown at some 800), and its axes (rows, columns)."""
    plt.rcParams.update(STYLE)
    return plt.subplots(
        rows, columns, figsize=(8, height), layout="constrained", squeeze=False, **options
    )


def save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path.name


def band(axes, x, rows, model, **options):
    """The mean of rows (seeds, len(x)) as a line, and the band between smallest and largest."""
    rows = np.array(rows, float)
    colour, dash = LOOKS.get(model, (None, "-"))
    label = RUNGS.get(model, model)
    (line,) = axes.plot(
        x, rows.mean(0), label=label, linewidth=1.4, color=colour, linestyle=dash, **options
    )
    axes.fill_between(x, rows.min(0), rows.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def number_some_ticks(axis):
    """Numbers for 1, 2 and 5 times a power of ten on a logarithmic axis, and for no other tick."""

    def text(x, _):
        return f"{x:g}" if f"{x:e}"[0] in "125" else ""

    axis.set_major_formatter(text)
    axis.set_minor_formatter(text)


def panels(models):
    """Two lists: the models of the ladder, and the others with DyDi-LiT.

    One list of all if either would have fewer than two.
    """
    rungs = [m for m in RUNGS if m in models]
    rest = [m for m in models if m not in RUNGS or m == "DyDi-LiT"]
    return [rungs, rest] if min(len(rungs), len(rest)) > 1 else [list(models)]


def image_of(x):
    """x (C, H, W) in [-1, 1], or latents, -> (H, W, 3): RGB, or the first channel as grey."""
    x = x.numpy().transpose(1, 2, 0) / max(1, x.abs().max().item())
    x = (x + 1) / 2
    return x if x.shape[-1] == 3 else x[..., :1].repeat(3, -1)


# --------------------------------------------------------------------------------------------------
# Figures. Each takes the path of its PNG and returns the file's name.


def curves(path, logs):
    """Held-out loss of {model: [each seed's lines]}; None if a run has no held-out loss.

    The first two fifths of the run are left out, because their range would flatten the rest.
    """
    held = {}  # {model: [[(step, loss)] of each seed]}
    for model, seeds in logs.items():
        held[model] = [held_out_losses(log) for log in seeds]
        if not all(held[model]):
            return None
    figure, axes = canvas(1, len(panels(held)), 4.2)
    for axis, models in zip(axes[0], panels(held)):
        for model in models:
            steps, losses = np.moveaxis(np.array(held[model]), -1, 0)
            shown = steps[0] >= 0.4 * steps[0][-1]
            band(axis, steps[0][shown], losses[:, shown], model)
        axis.set(xlabel="step")
        axis.grid(True, alpha=0.25)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
        axis.legend(frameon=False, fontsize=7, ncols=2, **below)
    axes[0, 0].set_ylabel("loss on held-out images, averaged weights")
    return save(figure, path)


def held_out_losses(log):
    return [(line["step"], line["held_out_loss"]) for line in log if "held_out_loss" in line]


def routes(path, models, meta, logs):
    """Fig. 5: the most used projector of Q' and of K' for each class and block, and its share, in
    the first of the models, which are those of several seeds.

    Eight images of each class are sampled in 25 steps without guidance; the routes of all their
    tokens count, at all steps. Below each panel: how much the class tells about the route
    (`told_by_class`), and how much a random division of the same images into classes does, over the
    seeds. A third panel shows usage entropy while training, the mean over the blocks and the seeds,
    if every log has it.
    """
    classes = meta["classes"][:20]
    by_image = [image_shares(model, len(classes), clip="scaling" not in meta) for model in models]
    shares = by_image[0].mean(2)  # (2, classes, depth, n_P)
    depth = shares.shape[2]
    evaluated = [[line for line in log if "usage_entropy" in line] for log in logs]
    widths = [1, 1, 1.5] if all(evaluated) else [1, 1]
    height = 1.2 + 0.22 * max(8, len(classes))
    figure, axes = canvas(1, len(widths), height, width_ratios=widths)
    for which, axis in enumerate(axes[0][:2]):
        share, chosen = shares[which].max(-1)  # (classes, depth)
        told, by_chance = zip(*(told_by_class(seed[which]) for seed in by_image))
        axis.imshow(chosen.numpy(), cmap="Set2", vmin=-0.5, vmax=7.5, aspect="auto")
        for c in range(len(classes)):
            for b in range(depth):
                text = f"{chosen[c, b] + 1}: {share[c, b]:.0%}"
                axis.text(b, c, text, ha="center", va="center", fontsize=7)
        axis.set(
            xlabel=f"block\ntold by class: {spread(told, True)}\nchance: {spread(by_chance, True)}",
            xticks=range(depth),
            xticklabels=range(1, depth + 1),
            yticks=range(len(classes)),
            yticklabels=classes,
            title=f"{'QK'[which]}': most used projector, its share",
        )
    axes[0, 0].set_ylabel("class")
    if all(evaluated):
        usage_panel(axes[0, 2], evaluated)
    return save(figure, path)


def image_shares(model, classes, clip, images=8):
    """(2, classes, images, depth, n_P): the share of the tokens of each generated image that each
    projector of Q' and of K' gets."""
    shares = torch.zeros(2, classes, images, model.config.depth, model.config.n_projectors)
    for c in range(classes):
        labels = torch.full((images,), c)
        with watched(model) as seen:
            Diffusion(25).sample(model, labels, range(images), seed=0, clip=clip)
        for b, part in enumerate(seen):
            for which, name in enumerate(("q_projector", "k_projector")):
                routes = torch.cat(part["routes"][name], dim=1)  # (images, tokens at all steps)
                for i, index in enumerate(routes):
                    shares[which, c, i, b] = usage(index, model.config.n_projectors)
    return shares


def told_by_class(shares):
    """shares (classes, images, depth, n_P) -> the part of the routes' entropy that the class takes
    away (0: the class tells nothing, 1: it tells the route), and the same for classes that are
    drawn at random from the same images. Over all blocks; the mean of 100 random divisions."""

    def part(shares):
        entropy = torch.special.entr(shares.mean((0, 1))).sum(-1)  # (depth,)
        left = torch.special.entr(shares.mean(1)).sum(-1).mean(0)
        return ((entropy - left).sum() / entropy.sum().clamp(min=1e-12)).item()

    generator = torch.Generator().manual_seed(0)
    images = shares.flatten(0, 1)
    by_chance = 0
    for _ in range(100):
        order = torch.randperm(len(images), generator=generator)
        by_chance += part(images[order].view(shares.shape)) / 100
    return part(shares), by_chance


def usage_panel(axis, logs):
    """Usage entropy against steps, a line for each router: the mean over blocks and seeds."""
    steps = [line["step"] for line in logs[0]]
    for name in logs[0][0]["usage_entropy"]:
        rows = [[np.mean(line["usage_entropy"][name]) for line in log] for log in logs]
        axis.plot(
            steps,
            np.mean(rows, 0),
            label=name.replace("_", " "),
            color=ROUTER_COLOURS[name.rpartition("_")[2]],
            linestyle="-" if name.startswith("q") else "--",
            linewidth=0.9 if "prime" in name else 1.6,
        )
    axis.set(xlabel="step", title="usage entropy / log n: 1 even, 0 collapsed", ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7, ncols=2)


def attention(path, models, held_out, t=200, rows=3):
    """Fig. 6 of {title: model}: what one query token (red) attends to in the middle block.

    Every map has its own colour scale. The images are those of the held-out images with the most
    contrast, noised to timestep t; the query is the patch with the most contrast.
    """
    x, y, _, noise = held_out
    first = x.flatten(1).std(1).argsort(descending=True)[:rows]
    batch = (x[first], y[first], torch.full_like(first, t), noise[first])
    columns = 1 + len(models)
    figure, axes = canvas(rows, columns, 0.25 + rows * 7.2 / columns)
    for column, (title, model) in enumerate(models.items(), start=1):
        weights = middle_attention(model, batch)  # (rows, N, M)
        h, w = model.grid
        frame = {"extent": (0, w, h, 0), "interpolation": "nearest"}
        queries = busiest_patch(x[first], model).tolist()
        for row, query in enumerate(queries):
            side = math.isqrt(weights.shape[-1])  # of the keys' grid: PixArt has fewer keys
            keys = weights[row, query].view(side, -1).numpy()
            axes[row, column].imshow(keys, cmap="turbo", **frame)
            mark_query(axes[row, column], query, w)
            if column == 1:
                axes[row, 0].imshow(image_of(x[first[row]]), **frame)
                mark_query(axes[row, 0], query, w)
        axes[0, column].set_title(textwrap.fill(title, 90 // columns), fontsize=7.5)
    axes[0, 0].set_title("image, query", fontsize=7.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return save(figure, path)


@torch.no_grad()
def middle_attention(model, batch):
    """The middle block's attention matrix (B, N, M), the mean over its heads."""
    with watched(model, matrices=True) as seen:
        model(*noisy(model, batch))
    matrix, _ = seen[model.config.depth // 2]["attention"][0]
    return matrix.mean(1)


def busiest_patch(images, model):
    """images (B, C, H, W) -> the number (B,) of the patch with the largest standard deviation."""
    h, w = model.grid
    p = model.config.patch_size
    patches = images.unflatten(2, (h, p)).unflatten(4, (w, p))  # (B, C, h, p, w, p)
    contrast = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).std(-1)  # (B, h, w)
    return contrast.flatten(1).argmax(1)


def mark_query(axis, query, w):
    """A red frame around token number `query` of a grid with w columns."""
    corner = (query % w, query // w)
    axis.add_patch(plt.Rectangle(corner, 1, 1, fill=False, color="red", linewidth=1.5))


def lambdas(path, by_model):
    """Fig. 7 of {model: [mean lambda of each block] of each seed}.

    Left: token-wise and map-wise. Right: lambda started alike in all blocks, or rising with depth.
    """
    figure, axes = canvas(1, 2, 2.8)
    depth = len(next(iter(by_model.values()))[0])
    blocks = range(1, 1 + depth)
    titles = {
        "map-wise": "(a) token-wise and map-wise",
        "rising-lambda": "(b) started at 0.01, or at 0.2 to 0.8",
    }
    for axis, (other, title) in zip(axes[0], titles.items()):
        for model in ("ladder-4-difference", other):
            if model in by_model:
                band(axis, blocks, by_model[model], model, marker="o", markersize=3)
        axis.set(xlabel="block", title=title, xticks=blocks, ylabel="mean lambda of the tokens")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return save(figure, path)


def smoothness(path, by_model):
    """Of {model: [(entropy, variance) of each block] of each seed}, from probe.row_statistics."""
    figure, axes = canvas(1, 2, 3.4)
    for model, seeds in by_model.items():
        values = np.array(seeds)  # (seeds, depth, 2)
        depth = values.shape[1]
        x = (np.arange(depth) + 0.5) / depth
        for i, axis in enumerate(axes[0]):
            band(axis, x, values[..., i], model, marker="o", markersize=2.5)
    entropy, variance = axes[0]
    label = "depth (block / blocks)"
    entropy.set(title="row entropy / log N: 1 is uniform, oversmoothed", xlabel=label)
    variance.set(title="row variance times N squared: 0 is uniform", xlabel=label, yscale="log")
    variance.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    number_some_ticks(variance.yaxis)
    for axis in axes[0]:
        axis.grid(which="both", alpha=0.25)
    return save(figure, path)


def resolutions(path, points, where):
    """Fig. 1 of {model: [[pixels, seconds, MiB]]}, a panel for the time and one for the memory.

    A panel without any point is left out; None if both are.
    """
    rows = {model: np.array(triples, float) for model, triples in points.items()}  # None -> nan
    labels = {1: "seconds", 2: "MiB beyond the weights"}  # by column
    known = [i for i in labels if any(np.isfinite(row[:, i]).any() for row in rows.values())]
    if not known:
        return None
    figure, axes = canvas(1, len(known), 2.9)
    pixels = next(iter(rows.values()))[:, 0]
    for axis, i in zip(axes[0], known):
        for model, row in rows.items():
            colour, dash = LOOKS[model]
            axis.plot(
                pixels, row[:, i], "o", label=model, color=colour, linestyle=dash, markersize=3
            )
        axis.set(xlabel="pixels, height = width", ylabel=labels[i], xscale="log", yscale="log")
        axis.set_xticks(pixels)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{p:.0f}" for p in pixels])
        number_some_ticks(axis.yaxis)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"one sampling step of one image, size S/2; {where}", fontsize=8)
    return save(figure, path)


def tsne(path, made, data_dir):
    """Fig. 11: samples {title: [(images, labels) of each seed]}, the first seed's as t-SNE places
    their features (classifier.py).

    Above all classes, below the three that are hardest to tell apart; the real images come first.
    The number is the mean silhouette of the features before t-SNE, 1 if the classes are far apart
    and 0 if they are mixed; with several seeds its mean ± standard deviation. None if there are
    fewer than ten samples of a class.
    """
    from sklearn.manifold import TSNE

    images, labels, meta = classifier.read(data_dir)
    sets = [one for seeds in made.values() for one in seeds]
    if any(np.bincount(y, minlength=len(meta["classes"])).min() < 10 for _, y in sets):
        return None
    model = classifier.fitted(str(data_dir))
    most = max(len(y) for _, y in sets)
    some = np.random.default_rng(0).permutation(len(images))[:most]
    alike = classifier.look_alikes(model.features(images), labels)
    columns = {"real images": [(images[some], labels[some])]} | made
    figure, axes = canvas(2, len(columns), 0.5 + 14 / len(columns))
    for column, (title, seeds) in enumerate(columns.items()):
        seeds = [(model.features(x), y) for x, y in seeds]
        for row, classes in enumerate((np.unique(labels), alike)):
            chosen = []
            for features, y in seeds:
                here = np.isin(y, classes)
                chosen.append((features[here], y[here]))
            features, kinds = chosen[0]
            points = TSNE(init="pca", random_state=0).fit_transform(features)
            axis = axes[row, column]
            axis.scatter(*points.T, c=kinds % 10, cmap="tab10", vmin=0, vmax=9, s=3)
            apart = silhouettes(chosen)
            axis.set_title(f"{title}\n{apart}" if row == 0 else apart)
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("all classes")
    axes[1, 0].set_ylabel(", ".join(meta["classes"][c] for c in alike))
    return save(figure, path)


def silhouettes(seeds):
    """[(features, labels) of each seed] -> "mean ± standard deviation" of their silhouettes."""
    from sklearn.metrics import silhouette_score

    return spread([silhouette_score(features, kinds) for features, kinds in seeds], digits=2)


def draw(out, by_model, folders, data_dir, points, where):
    """Draw into `out` every figure whose runs are there; their names.

    by_model: {model: {seed: result}}; folders: {(model, seed): folder}, without the runs that
    diverged; points, where: what costs.sampling_costs returns.
    """
    logs = {}  # {model: [the lines of each seed]}
    results = {}  # {model: [the result of each seed]}
    for model, runs in by_model.items():
        seeds = [seed for seed in runs if (model, seed) in folders]
        if seeds:
            logs[model] = [read_log(folders[model, seed]) for seed in seeds]
            results[model] = [runs[seed] for seed in seeds]

    def load(model):
        """The models of all seeds."""
        seeds = sorted(seed for name, seed in folders if name == model)
        return [pretrained.load(folders[model, seed] / "ckpt.pt") for seed in seeds]

    def figures_of(key):
        """{model: [result[key] of each seed]} of the models that have it."""
        return {m: [r[key] for r in runs] for m, runs in results.items() if key in runs[0]}

    names = []
    if logs:
        names.append(curves(out / "curves.png", logs))
    if "DyDi-LiT" in logs:
        models = load("DyDi-LiT")
        names.append(routes(out / "routes.png", models, models[0].meta, logs["DyDi-LiT"]))
    if smooth := figures_of("smoothness"):
        names.append(smoothness(out / "smoothness.png", smooth))
        shown = {RUNGS.get(m, m): load(m)[0] for m in ("DiT", *RUNGS) if m in logs}
        if shown:
            some = next(iter(shown.values()))
            held_out = Data(data_dir, some.config).held_out()
            names.append(attention(out / "attention.png", shown, held_out))
    learned = figures_of("lambda")
    if {"ladder-4-difference", "map-wise", "rising-lambda"} <= learned.keys():
        names.append(lambdas(out / "lambdas.png", learned))
    made = samples_of(folders, ("DiT", "ladder-0-sana", "Sana", "MHLA", "DyDi-LiT"))
    if made and "feature_distance" in next(iter(results.values()))[0]:
        names.append(tsne(out / "tsne.png", made, data_dir))
    if points:
        names.append(resolutions(out / "resolutions.png", points, where))
    return [name for name in names if name]


def samples_of(folders, models):
    """{title: [(images, labels) of each seed]} of the models whose samples are there."""
    made = {}
    for model in models:
        for name, seed in sorted(folders):
            npz = folders[name, seed] / "samples.npz"
            if name == model and npz.exists():
                with np.load(npz) as file:
                    one = file["arr_0"], file["labels"]
                made.setdefault(RUNGS.get(model, model), []).append(one)
    return made


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
