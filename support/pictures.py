"""Pictures of a run: a grid of images, the same grid coming out of noise, the curve of the loss.

For train_min.py and sample_min.py. Imports Pillow and matplotlib, each inside the function that
draws with it.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def written_whole(path):
    """A name beside `path` to write to. At the end of the block it takes the place of `path`, so a
    kill or a full disk leaves the old file, or none, and never a half."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def arrange(images, columns):
    """(n, H, W, C) uint8 -> one image (H', W', C), row by row, with a white line between two."""
    n, H, W, C = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, H + 1, W + 1, C), 255, np.uint8)
    sheet[:n, :H, :W] = images
    sheet = sheet.reshape(rows, columns, H + 1, W + 1, C).swapaxes(1, 2)
    return sheet.reshape(rows * (H + 1), columns * (W + 1), C)


def picture_of(images, columns, side):
    """The grid as a Pillow image, enlarged so that an image has at least about `side` pixels."""
    from PIL import Image

    sheet = arrange(images, columns)
    grey = sheet.shape[2] == 1
    picture = Image.fromarray(sheet[..., 0] if grey else sheet[..., :3])
    scale = max(1, side // images.shape[1])
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


def save_grid(path, images, columns):
    """(n, H, W, C) uint8 as one PNG; of more than three channels it shows the first three."""
    with written_whole(path) as beside:
        picture_of(images, columns, side=48).save(beside, format="PNG")


def with_greys(picture, levels=16):
    """A grey Pillow image with a palette of so many levels, which a GIF stores in few bytes."""
    values = np.linspace(0, 255, levels).round().astype(np.uint8)
    indices = picture.point(lambda value: round(value * (levels - 1) / 255))
    indices.putpalette(values.repeat(3).tobytes())  # the same red, green and blue
    return indices


def save_animation(path, frames, columns, seconds=3.0, hold=2.0):
    """Arrays (n, H, W, C) uint8 as one GIF of their grids: `seconds` in all, then the last `hold`.

    To keep the file small it has 16 greys, or 64 colours per frame.
    """
    pictures = [picture_of(images, columns, side=32) for images in frames]
    if pictures[0].mode == "L":
        pictures = [with_greys(picture) for picture in pictures]
    else:
        pictures = [picture.quantize(64) for picture in pictures]
    each = round(1000 * seconds / len(pictures))
    durations = [each] * (len(pictures) - 1) + [round(1000 * hold)]  # milliseconds
    how = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    with written_whole(path) as beside:
        pictures[0].save(beside, format="GIF", **how)


def read_losses(log_path):
    """The lines of a log.jsonl that have a step and a loss; others, such as torn ones, are left
    out. ValueError if there is none."""
    found = []
    for text in Path(log_path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            numbers = line["step"], line["loss"], line.get("held_out_loss", 0)
            if all(map(math.isfinite, numbers)):
                found.append(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            continue
    if not found:
        raise ValueError(f"{log_path} has no line with a step and a loss")
    return found


def plot_loss(log_path, path):
    """The losses of a log.jsonl against the step, on training and on held-out images, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_losses(log_path)
    held_out = [line for line in lines if "held_out_loss" in line]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(
        [line["step"] for line in lines],
        [line["loss"] for line in lines],
        linewidth=1,
        label="training",
    )
    axes.plot(
        [line["step"] for line in held_out],
        [line["held_out_loss"] for line in held_out],
        "o-",
        markersize=3,
        label="held out, averaged weights",
    )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.yaxis.set_major_formatter(label_some)
    axes.yaxis.set_minor_formatter(label_some)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
    plt.close(figure)


def label_some(value, _):
    """A tick of a logarithmic axis is labelled if it begins with 1, 2, 3 or 5: no overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "1235" else ""
