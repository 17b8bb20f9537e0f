"""Checks a prepared data set (data/README.md) before a run reads it; imports dydilit.py, numpy."""

import json
from pathlib import Path

import numpy as np

from dydilit import Config


def check_set(path: str | Path, config: Config):
    """FileNotFoundError, with the command that makes it, if there is no prepared set at path;
    ValueError, one line, if it is damaged or does not fit the model of `config`."""
    path = Path(path)
    if not (path / "meta.json").exists():
        raise FileNotFoundError(f"no prepared data set in {path}; make it: "
                                f"{command_that_makes(path, config)}")
    meta = json.loads((path / "meta.json").read_text())
    try:
        images = np.load(path / "images.npy", mmap_mode="r")
        labels = np.load(path / "labels.npy")
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged (cut short?), prepare it again: {e}") from e

    dtype, shape = layout(meta, config)
    if images.dtype != dtype or images.shape[1:] != shape:
        raise ValueError(f"{path}: {images.dtype} {images.shape[1:]}, but the model reads {dtype} "
                         f"{shape}")
    n_train = len(images) - meta["held_out"]
    if len(labels) != len(images) or n_train < 1:
        raise ValueError(f"{path}: {len(images)} images, {len(labels)} labels, {n_train} to train")
    if labels.min() < 0 or labels.max() >= config.num_classes:
        raise ValueError(f"{path} has labels {labels.min()} .. {labels.max()}, the model "
                         f"{config.num_classes} classes")


def command_that_makes(path: Path, config: Config) -> str:
    if path.name in ("digits", "photos"):
        return f"python data/{path.name}/prepare.py --out {path}"
    size = config.input_size
    what = f"{8 * size} --vae" if config.in_channels == 4 else size
    return f"python data/imagefolder/prepare.py ROOT --size {what} --out {path}"


def layout(meta: dict, config: Config) -> tuple[str, tuple]:
    """dtype and shape of one row of images.npy, as the model of `config` reads it."""
    C, side = config.in_channels, config.input_size
    if meta.get("scaling"):  # latents: means and standard deviations; the image and its mirror
        return "float16", (1 + meta["flip"], 2 * C, side, side)
    return "uint8", (C, side, side)
