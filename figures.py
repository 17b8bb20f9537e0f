"""The paper's figures, of finished runs of ablate.py, as PNGs made for the 800 pixels that a page gives them.

    curves.png       held-out loss against steps: mean over the seeds, and the band from the smallest to the largest
    routes.png       Fig. 5: the projector that most tokens take, for each class and block; usage entropy while training
    attention.png    Fig. 6: what one query token attends to, after each component of the ladder
    lambdas.png      Fig. 7: mean lambda against depth
    smoothness.png   oversmoothing: entropy and variance of the attention's rows in every block
    resolutions.png  Fig. 1: time and memory of one sampling step

`draw` makes those whose runs are there. What they show is measured in probe.py and costs.py.
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
from load import load_model
from probe import noisy, usage, watched

RUNGS = {"ladder-0-sana": "Sana", "ladder-1-focused": "+ focused kernel", "ladder-2-measure": "+ dynamic measure",
         "ladder-3-projection": "+ dynamic projection", "ladder-4-difference": "+ token difference",
         "DyDi-LiT": "DyDi-LiT"}
LOOKS = {model: (colour, "-") for model, colour in zip(
    RUNGS, ("#9ecae1", "#4292c6", "#084594", "#fdae6b", "#f16913", "#b30000"))} | {
    "DiT": ("black", "--"), "Sana": ("#9ecae1", "-"), "map-wise": ("#238b45", "-."), "rising-lambda": ("#74c476", ":"),
    "no-normalize": ("#6a51a3", "--"), "no-router-grad": ("#df65b0", "-."), "batch-norm": ("#737373", ":")}


def canvas(rows, columns, height, **how):
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(8, height), layout="constrained", squeeze=False, **how)


def save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path.name


def band(axes, x, rows, model, **how):
    """Of rows (seeds, len(x)) the mean as a line, and the band between the smallest and the largest."""
    rows, (colour, dash), label = np.array(rows, float), LOOKS.get(model, (None, "-")), RUNGS.get(model, model)
    line, = axes.plot(x, rows.mean(0), label=label, linewidth=1.4, color=colour, linestyle=dash, **how)
    axes.fill_between(x, rows.min(0), rows.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def few(x, _):
    """The ticks of a logarithmic axis that get a number: 1, 2 and 5 times a power of ten."""
    return f"{x:g}" if f"{x:e}"[0] in "125" else ""


def panels(models):
    """Two lists: the rungs of the ladder, and the rest with DyDi-LiT; one if either would have less than two."""
    rungs, rest = [m for m in RUNGS if m in models], [m for m in models if m not in RUNGS or m == "DyDi-LiT"]
    return [rungs, rest] if min(len(rungs), len(rest)) > 1 else [list(models)]


def image_of(x):
    """x (C, H, W) in [-1, 1], or latents, -> what imshow takes: RGB, or grey where there are not three channels."""
    x = (x.numpy().transpose(1, 2, 0) / max(1, x.abs().max().item()) + 1) / 2
    return x if x.shape[-1] == 3 else x[..., :1].repeat(3, -1)


# ---------------------------------------------------------------------------------------------------------------------


def curves(path, logs):
    """The first two fifths of the run are left out: they would flatten the rest. logs: {model: [each seed's lines]}."""
    held = {m: [[(x["step"], x["held_out_loss"]) for x in log if "held_out_loss" in x] for log in seeds]
            for m, seeds in logs.items()}
    if not all(log for seeds in held.values() for log in seeds): return None
    figure, axes = canvas(1, len(panels(held)), 3.4, sharey=True)
    for axis, models in zip(axes[0], panels(held)):
        for model in models:
            steps, losses = np.moveaxis(np.array(held[model]), -1, 0)
            shown = steps[0] >= 0.4 * steps[0][-1]
            band(axis, steps[0][shown], losses[:, shown], model)
        axis.set(xlabel="step")
        axis.grid(True, alpha=0.25)
        axis.legend(frameon=False)
    axes[0, 0].set_ylabel("loss on held-out images, averaged weights")
    return save(figure, path)


def routes(path, model, meta, logs):
    """Fig. 5: 8 images of each class are sampled in 25 steps without guidance, the routes of all their tokens counted
    at all steps. Beside it what the log says of the routers, if it does: the mean over the blocks, then the seeds."""
    depth, n, classes, clip = model.config.depth, model.config.n_projectors, meta["classes"][:20], "scaling" not in meta
    shares = torch.zeros(2, len(classes), depth, n)
    for c in range(len(classes)):
        with watched(model) as seen: Diffusion(25).sample(model, torch.full((8,), c), range(8), seed=0, clip=clip)
        for b, part in enumerate(seen):
            for which, name in enumerate(("q_projector", "k_projector")):
                shares[which, c, b] = usage(torch.cat(part["routes"][name]), n)
    evaluated = [[x for x in log if "usage_entropy" in x] for log in logs]  # an older log may have none
    widths = [1, 1, 1.5] if all(evaluated) else [1, 1]
    figure, axes = canvas(1, len(widths), 1.2 + 0.22 * max(8, len(classes)), width_ratios=widths)
    for which, axis in enumerate(axes[0][:2]):
        share, chosen = shares[which].max(-1)[0].numpy(), shares[which].argmax(-1).numpy()
        axis.imshow(chosen, cmap="Set2", vmin=-0.5, vmax=7.5, aspect="auto")
        for c in range(len(classes)):
            for b in range(depth):
                axis.text(b, c, f"{chosen[c, b] + 1}: {share[c, b]:.0%}", ha="center", va="center", fontsize=7)
        axis.set(xlabel="block", xticks=range(depth), xticklabels=range(1, depth + 1), yticks=range(len(classes)),
                 yticklabels=classes, title=f"{'QK'[which]}': most used projector, its share")
    axes[0, 0].set_ylabel("class")
    if not all(evaluated): return save(figure, path)
    steps = [x["step"] for x in evaluated[0]]
    colours = dict(zip(("projector", "kernel", "difference"), ("#1b9e77", "#7570b3", "#d95f02")))
    for name in evaluated[0][0]["usage_entropy"]:
        rows = [[np.mean(x["usage_entropy"][name]) for x in log] for log in evaluated]
        dash = {"q_p": "-", "k_p": "--"}.get(name[:3], "-" if name[0] == "q" else "--")
        kind = name.rpartition("_")[2]
        axes[0, 2].plot(steps, np.mean(rows, 0), label=name.replace("_", " "), color=colours[kind], linestyle=dash,
                        linewidth=0.9 if "prime" in name else 1.6)
    axes[0, 2].set(xlabel="step", title="usage entropy / log n: 1 even, 0 collapsed", ylim=(0, 1.02))
    axes[0, 2].grid(alpha=0.25)
    axes[0, 2].legend(frameon=False, fontsize=7, ncols=2)
    return save(figure, path)


def attention(path, models, held_out, t=200, rows=3):
    """Fig. 6, of {title: model}: one query token (red), the middle block; every map has its own colours, low to high.

    The images are those held out with the most contrast, noised to timestep t, the query is the patch with the most.
    """
    x, y, _, noise = held_out
    first = x.flatten(1).std(1).argsort(descending=True)[:rows]
    batch = (x[first], y[first], torch.full_like(first, t), noise[first])
    figure, axes = canvas(rows, 1 + len(models), 0.25 + rows * 7.2 / (1 + len(models)))
    for column, (title, model) in enumerate(models.items()):
        with torch.no_grad(), watched(model, matrices=True) as seen: model(*noisy(model, batch))
        block, (h, w), p = model.config.depth // 2, model.grid, model.config.patch_size
        weights = seen[block]["attention"][0][0].mean(1)                                # (rows, N, M), over the heads
        contrast = x[first].unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).std(-1)
        for row, query in enumerate(contrast.flatten(1).argmax(1).tolist()):
            keys = weights[row, query].view(math.isqrt(weights.shape[-1]), -1).numpy()  # square; PixArt has fewer
            axes[row, 1 + column].imshow(keys, cmap="turbo", extent=(0, w, h, 0), interpolation="nearest")
            if column == 0: axes[row, 0].imshow(image_of(x[first[row]]), extent=(0, w, h, 0), interpolation="nearest")
            for axis in axes[row, : 2 + column : 1 + column]:
                axis.add_patch(plt.Rectangle((query % w, query // w), 1, 1, fill=False, color="red", linewidth=1.5))
        axes[0, 1 + column].set_title(textwrap.fill(title, 90 // (1 + len(models))), fontsize=7.5)
    axes[0, 0].set_title("image, query", fontsize=7.5)
    for axis in axes.flat: axis.set(xticks=[], yticks=[])
    return save(figure, path)


def lambdas(path, of):
    """Fig. 7, of {model: [mean lambda of each block] of each seed}: token- or map-wise; started alike or not."""
    figure, axes = canvas(1, 2, 2.8)
    for axis, other, title in zip(axes[0], ("map-wise", "rising-lambda"), (
            "(a) token-wise and map-wise", "(b) started at 0.01, or at 0.2 to 0.8")):
        for model in ("ladder-4-difference", other):
            if model in of: band(axis, range(1, 1 + len(of[model][0])), of[model], model, marker="o", markersize=3)
        axis.set(xlabel="block", title=title, xticks=range(1, 1 + len(next(iter(of.values()))[0])))
        axis.set_ylabel("mean lambda of the tokens")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return save(figure, path)


def smoothness(path, of):
    """Of {model: [(entropy, variance) of each block] of each seed}, as probe.row_statistics defines them."""
    figure, axes = canvas(1, 2, 3.4)
    for model, seeds in of.items():
        for i, axis in enumerate(axes[0]):
            depth = 1 + np.arange(len(seeds[0]))
            band(axis, (depth - 0.5) / len(depth), np.array(seeds)[..., i], model, marker="o", markersize=2.5)
    axes[0, 0].set(title="row entropy / log N: 1 is uniform, oversmoothed", xlabel="depth (block / blocks)")
    axes[0, 1].set(title="row variance times N squared: 0 is uniform", xlabel="depth (block / blocks)", yscale="log")
    axes[0, 1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for part in (axes[0, 1].yaxis.set_major_formatter, axes[0, 1].yaxis.set_minor_formatter): part(few)
    for axis in axes[0]: axis.grid(which="both", alpha=0.25)
    return save(figure, path)


def resolutions(path, points, where):
    """Fig. 1, of {model: [[pixels, seconds, MiB]]}; None where there is no point, and no panel without any."""
    rows = {model: np.array(triples, float) for model, triples in points.items()}  # None becomes nan
    known = [i for i in (1, 2) if any(np.isfinite(row[:, i]).any() for row in rows.values())]
    if not known: return None
    figure, axes = canvas(1, len(known), 2.9)
    pixels = next(iter(rows.values()))[:, 0]
    for axis, i in zip(axes[0], known):
        for model, row in rows.items():
            axis.plot(pixels, row[:, i], "o", label=model, color=LOOKS[model][0], linestyle=LOOKS[model][1],
                      markersize=3)
        label = ("seconds", "MiB beyond the weights")[i - 1]
        axis.set(xlabel="pixels, height = width", ylabel=label, xscale="log", yscale="log", xticks=pixels)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{p:.0f}" for p in pixels])
        for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter): part(few)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"one sampling step of one image, size S/2; {where}", fontsize=8)
    return save(figure, path)


def draw(out, of, folders, data_dir, points, where):
    """Every figure that {model: {seed: result}} and {(model, seed): folder} allow, into `out`: their names."""
    def load(model): return load_model(folders[model, min(s for m, s in folders if m == model)] / "ckpt.pt")

    done = {m: [r for seed, r in runs.items() if (m, seed) in folders] for m, runs in of.items()}
    logs = {m: [[json.loads(x) for x in (folders[m, seed] / "log.jsonl").read_text().splitlines()]
                for seed in runs if (m, seed) in folders] for m, runs in of.items()}
    logs = {m: seeds for m, seeds in logs.items() if seeds}
    def kept(key): return {m: [r[key] for r in runs] for m, runs in done.items() if runs and key in runs[0]}

    names = [curves(out / "curves.png", logs)] if logs else []
    if "DyDi-LiT" in logs:
        model, ckpt = load("DyDi-LiT")
        names.append(routes(out / "routes.png", model, ckpt["meta"], logs["DyDi-LiT"]))
    if kept("smoothness"):
        names.append(smoothness(out / "smoothness.png", kept("smoothness")))
        shown = {RUNGS.get(m, m): load(m)[0] for m in [*(["DiT"] if "DiT" in logs else []), *RUNGS] if m in logs}
        held_out = Data(data_dir, next(iter(shown.values())).config).held_out() if shown else None
        if shown: names.append(attention(out / "attention.png", shown, held_out))
    if {"ladder-4-difference", "map-wise", "rising-lambda"} <= kept("lambda").keys():
        names.append(lambdas(out / "lambdas.png", kept("lambda")))
    if points: names.append(resolutions(out / "resolutions.png", points, where))
    return [name for name in names if name]
