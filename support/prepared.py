"""Reads a prepared data set (data/README.md) and checks all of it that a run relies on.

For every script that takes a data set. Imports dydilit.py, numpy and support/npy.py. Every error
is one line that names the file, the field, what was found and what was expected.
"""

import json
import shlex
import sys
from pathlib import Path

import numpy as np

from dydilit import Config
from support.npy import open_npy


def is_text(value):
    """Whether it is a string that can be printed; JSON also knows halves of characters."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def is_texts(value):
    return isinstance(value, list) and value != [] and all(map(is_text, value))


def is_bool(value):
    return isinstance(value, bool)


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value):
    return is_integer(value) and value >= 0


def is_positive_integer(value):
    return is_integer(value) and value > 0


def is_positive(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


# The table of data/README.md: of each field the check, and its type in words.
FIELDS = {
    "name": (is_text, "a string"),
    "classes": (is_texts, "a list of strings, at least one"),
    "flip": (is_bool, "true or false"),
    "held_out": (is_count, "an integer, at least 0"),
    "levels": (is_positive, "a number above 0"),
}
FIELDS_OF_LATENTS = {
    "vae": (is_text, "a string"),
    "scaling": (is_positive, "a number above 0"),
    "pixels": (is_positive_integer, "an integer, at least 1"),
}
OPTIONAL = {"class_seed": (is_integer, "an integer")}


def read_meta(path: str | Path) -> dict:
    """meta.json of the prepared set in the folder `path`, with every field of its type.

    FileNotFoundError if there is none, ValueError if it is damaged or not as in the table.
    """
    file = Path(path, "meta.json")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is no JSON in UTF-8: {e}") from e
    if not isinstance(meta, dict):
        raise ValueError(f"{file} is {meta!r:.60}, expected an object with the fields of a set")
    required = FIELDS | (FIELDS_OF_LATENTS if "scaling" in meta else {})
    for field, (check, expected) in (required | FIELDS_OF_LATENTS | OPTIONAL).items():
        if field not in meta and field in required:
            raise ValueError(f"{file} has no field {field}, expected {expected}")
        if field in meta and not check(meta[field]):
            raise ValueError(f"{file}: {field} is {meta[field]!r:.60}, expected {expected}")
    return meta


def read_set(path: str | Path) -> tuple[dict, np.memmap, np.ndarray]:
    """meta, images (memory-mapped), labels (int64, N) of the prepared set in the folder `path`.

    FileNotFoundError if a file is missing, ValueError if one is damaged or not as data/README.md
    describes it.
    """
    path = Path(path)
    meta = read_meta(path)
    images = open_npy(path / "images.npy")
    dtype, layout, fits = "uint8", "(N, C, H, W) with C 1 or 3", images.ndim == 4
    if "scaling" in meta:
        dtype, layout = "float16", f"(N, {1 + meta['flip']}, 2C, h, w)"
        fits = images.ndim == 5 and images.shape[1] == 1 + meta["flip"] and images.shape[2] % 2 == 0
    elif fits:
        fits = images.shape[1] in (1, 3)
    if images.dtype != dtype or not fits or 0 in images.shape:
        raise ValueError(
            f"{path}/images.npy is {images.dtype} {images.shape}, expected {dtype} {layout}, "
            f"since meta.json has {'a' if dtype == 'float16' else 'no'} field scaling"
        )
    n = len(images)
    if meta["held_out"] >= n:
        raise ValueError(
            f"{path}/meta.json: held_out is {meta['held_out']}, expected less than the {n} images"
        )
    return meta, images, read_labels(path / "labels.npy", n, len(meta["classes"]))


def read_labels(file, n, n_classes):
    labels = np.array(open_npy(file))
    if labels.dtype != np.int64 or labels.shape != (n,):
        raise ValueError(
            f"{file} is {labels.dtype} {labels.shape}, expected int64 ({n},), one label per image"
        )
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"{file} has labels {labels.min()} .. {labels.max()}, expected 0 .. {n_classes - 1}, "
            "the indices of classes in meta.json"
        )
    return labels


def check_set(path: str | Path, config: Config):
    """FileNotFoundError, with the command that makes it, if there is no prepared set at path;
    ValueError, one line, if it is damaged or does not fit the model of `config`."""
    path = Path(path)
    if not (path / "meta.json").exists():
        raise FileNotFoundError(
            f"no prepared data set in {path}; make it: {command_that_makes(path, config)}"
        )
    meta, images, labels = read_set(path)
    dtype, shape = layout(meta, config)
    if images.dtype != dtype or images.shape[1:] != shape:
        raise ValueError(
            f"{path}/images.npy is {images.dtype} {images.shape[1:]}, but the model reads {dtype} "
            f"{shape}"
        )
    if labels.max() >= config.num_classes:
        raise ValueError(
            f"{path}/labels.npy has labels {labels.min()} .. {labels.max()}, the model "
            f"{config.num_classes} classes"
        )


def command_that_makes(path: Path, config: Config) -> str:
    out = shlex.quote(str(path))
    if path.name in ("digits", "mnist", "photos"):
        return f"python data/{path.name}/prepare.py --out {out}"
    size = config.input_size
    what = f"{8 * size} --vae" if config.in_channels == 4 else size
    return f"python data/imagefolder/prepare.py ROOT --size {what} --out {out}"


def layout(meta: dict, config: Config) -> tuple[str, tuple]:
    """dtype and shape of one row of images.npy, as the model of `config` reads it."""
    C, side = config.in_channels, config.input_size
    if "scaling" in meta:  # latents: means and standard deviations; the image and its mirror
        return "float16", (1 + meta["flip"], 2 * C, side, side)
    return "uint8", (C, side, side)
