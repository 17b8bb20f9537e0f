"""Images that are judged or compared with: from an array, an .npz, or a prepared folder.

For eval_min.py. Imports numpy and evaluation/metrics.py. All readers give blocks of images, so that
a file is never in memory as a whole, and raise a ValueError of one line that names the file.
"""

import json
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.metrics import KINDS, chosen, extract

MAX_REAL = 10_000  # real images whose features are kept, or that a reference stores; ADM's number


@dataclass
class Images:
    """An array, a file or a folder: rows(n) yields its images in blocks of n, uint8 (n, H, W, C).

    `more` has what else there is: labels, settings, mu, sigma, mu_s, sigma_s, channels of an .npz;
    labels, classes, levels of a folder.
    """

    name: str
    shape: tuple  # N, H, W, C; all 0 for a reference of statistics alone
    rows: Callable
    more: dict


def expect_images(dtype, shape):
    if dtype != np.uint8 or len(shape) != 4:
        raise ValueError(f"expected samples of uint8, N x H x W x C; got {dtype} of shape {shape}")


def from_array(name, x, **more) -> Images:
    """The array x, uint8 (N, H, W, C), as Images."""
    expect_images(x.dtype, x.shape)
    return Images(name, x.shape, lambda n: (x[i : i + n] for i in range(0, len(x), n)), more)


# --------------------------------------------------------------------------------------------------
# A prepared folder.


def read_set(data_dir) -> Images:
    """A prepared data set (data/README.md), held-out rows included. ValueError if it is not one."""
    folder = Path(data_dir)
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} is not a prepared data set (no meta.json); see data/README.md")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r")
        expect_set(images, labels, meta)
    except (OSError, EOFError, ValueError) as e:
        raise ValueError(
            f"{folder} is not a prepared data set as data/README.md describes it: {e}"
        ) from e
    images = images.transpose(0, 2, 3, 1)
    return from_array(
        meta["name"], images, labels=labels, classes=meta["classes"], levels=meta["levels"]
    )


def expect_set(images, labels, meta):
    if images.dtype == np.float16:
        raise ValueError("these are latents, the metrics are of images")
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
        )
    if not isinstance(meta, dict) or not {"name", "classes", "levels"} <= meta.keys():
        raise ValueError("meta.json lacks a field")


# --------------------------------------------------------------------------------------------------
# An .npz.


@contextmanager
def reading(file):
    """Turn every error that the bytes of a file can cause into a ValueError that names the file."""
    try:
        yield
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise ValueError(f"{file}: {e}") from e


@contextmanager
def open_array(file):
    """arr_0 of an .npz: yields its shape, its dtype, and the file positioned at its first value."""
    with zipfile.ZipFile(file) as z, z.open("arr_0.npy") as f:
        if np.lib.format.read_magic(f) == (1, 0):
            header = np.lib.format.read_array_header_1_0(f)
        else:
            header = np.lib.format.read_array_header_2_0(f)
        shape, fortran, dtype = header
        if fortran:
            raise ValueError("arr_0 is in Fortran order")
        size = z.getinfo("arr_0.npy").file_size - f.tell()
        if size != np.prod(shape, dtype=int) * dtype.itemsize:
            raise ValueError("arr_0 is shorter than its header says")
        yield shape, dtype, f


def stream(file, n):
    """Blocks of n images of an .npz."""
    with reading(file), open_array(file) as (shape, _, f):
        for i in range(0, shape[0], n):
            block = (min(n, shape[0] - i), *shape[1:])
            yield np.frombuffer(f.read(int(np.prod(block))), np.uint8).reshape(block)


def read_npz(file) -> Images:
    """An .npz of samples or of a reference.

    ValueError if it is damaged, or has neither images nor statistics.
    """
    with reading(file):
        more, found = read_extras(file)
        if "arr_0" not in found:
            return Images(Path(file).name, (0, 0, 0, 0), lambda n: iter(()), more)
        with open_array(file) as (shape, dtype, f):
            if dtype.kind == "f" and np.isnan(np.frombuffer(f.read(), dtype)).any():
                raise ValueError("arr_0 has NaN")
            expect_images(dtype, shape)
    return Images(Path(file).name, shape, lambda n: stream(file, n), more)


def read_extras(file):
    """All but arr_0 of an .npz, checked: {name: array or settings}, and the names in the file."""
    if not Path(file).is_file():
        raise ValueError("no such file")
    if not zipfile.is_zipfile(file):
        raise ValueError("not an .npz file, or a truncated one")
    wanted = {"labels", "settings", "channels", *KINDS[0], *KINDS[1]}
    with np.load(file) as npz:  # it reads an array only when asked for it
        found = list(npz.files)
        more = {key: npz[key] for key in wanted.intersection(found)}
    more["settings"] = json.loads(str(more.get("settings", "{}")))
    if not isinstance(more["settings"], dict):
        raise ValueError("settings is not a JSON object")
    for mu, sigma, *_ in KINDS:
        if mu in more and sigma in more:
            expect_statistics(mu, more[mu], sigma, more[sigma])
    if not {"arr_0", "mu", "mu_s"}.intersection(found):
        raise ValueError(f"expected an array arr_0, found {', '.join(found) or 'nothing'}")
    return more, found


def expect_statistics(mu, mean, sigma, covariance):
    """ValueError now rather than after the features, which can take hours."""
    fits = covariance.shape == mean.shape * 2
    if not fits or not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise ValueError(f"{mu} and {sigma} are no mean (D) and covariance (D x D), all finite")


def open_images(path) -> Images:
    """A prepared folder or an .npz."""
    return read_set(path) if Path(path).is_dir() else read_npz(path)


# --------------------------------------------------------------------------------------------------
# A reference file.


def make_reference(images, file, network, batch=64):
    """Write the features' statistics of all images, and MAX_REAL of the images, as ADM's files.

    The file has mu, sigma, mu_s, sigma_s, and arr_0. arr_0 has three channels, since ADM's
    evaluator takes no others; `channels`, which ADM's evaluator ignores, is the true number.
    """
    keep = chosen(images.shape[0], MAX_REAL)
    if len(keep) < 2:
        raise ValueError(f"a reference needs at least 2 images; {images.name} has {len(keep)}")
    beside = Path(f"{file}.tmp")

    def storing(n):
        """The blocks of images.rows(n); writes the chosen images to the file f on the way."""
        seen = 0
        for x in images.rows(n):
            stored = x[keep[seen : seen + len(x)]]
            f.write(np.broadcast_to(stored, (*stored.shape[:3], 3)).tobytes())
            seen += len(x)
            yield x

    try:
        with zipfile.ZipFile(beside, "w") as z:
            # ZipInfo has no date: the same images give the same bytes
            with z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
                shape = (int(keep.sum()), *images.shape[1:3], 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(f, header)
                no_features = np.zeros_like(keep)
                _, moments = extract(replace(images, rows=storing), network, batch, no_features)
            arrays = {"channels": np.array(images.shape[3])}
            for (mu, sigma, *_), moment in zip(KINDS, moments):
                arrays[mu], arrays[sigma] = moment.result()
            for name, array in arrays.items():
                with z.open(zipfile.ZipInfo(f"{name}.npy"), "w") as f:
                    np.lib.format.write_array(f, array)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
