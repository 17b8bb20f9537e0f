"""Pictures of a run: a grid of images, the same grid coming out of noise, the curve of the loss.

For train_min.py and sample_min.py. Imports Pillow and matplotlib, each inside the function that
draws with it.
"""

import json

import numpy as np


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
    picture_of(images, columns, side=48).save(path)


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
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def plot_loss(log_path, path):
    """The losses of a log.jsonl against the step, on training and on held-out images, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label_some(value, _):
    """A tick of a logarithmic axis is labelled if it begins with 1, 2, 3 or 5: no overlap."""
    return f"{value:g}" if f"{value:e}"[0] in "1235" else ""
