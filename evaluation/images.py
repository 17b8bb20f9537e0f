"""Images that are judged or compared with: from an array, an .npz, or a prepared folder.

For eval_min.py. Imports numpy, evaluation/metrics.py, and of support/ the lock and the readers of
prepared sets. All readers give blocks of images, so that a file is never in memory as a whole, and
raise a ValueError of one line that names the file.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.metrics import KINDS, chosen, extract
from support import prepared
from support.lock import one_writer
from support.npy import open_npy, read_header

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
        if open_npy(folder / "images.npy").dtype == np.float16:
            raise ValueError("these are latents, the metrics are of images")
        meta, images, labels = prepared.read_set(folder)
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{e}; {folder} is not a prepared data set as data/README.md describes it"
        ) from e
    images = images.transpose(0, 2, 3, 1)
    return from_array(
        meta["name"], images, labels=labels, classes=meta["classes"], levels=meta["levels"]
    )


# --------------------------------------------------------------------------------------------------
# An .npz.


@contextmanager
def reading(file):
    """Turn every error that the bytes of a file can cause into a ValueError that names the file."""
    try:
        yield
    except Exception as e:  # zipfile, zlib and numpy raise nearly anything on damaged bytes
        raise ValueError(f"{file}: {' '.join(str(e).split()) or type(e).__name__}") from e


@contextmanager
def open_array(file, name="arr_0"):
    """An array of an .npz: yields its shape, whether it is in Fortran order, its dtype, and the
    file positioned at its first value. The sizes that the file claims are compared with its own."""
    with zipfile.ZipFile(file) as z:
        info = z.getinfo(f"{name}.npy")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that numpy does not write")
        if info.compress_size > os.path.getsize(file) or info.file_size > most_bytes(info):
            raise ValueError(f"{name} is said to have {info.file_size} bytes; the file has fewer")
        with z.open(info) as f:
            try:
                shape, fortran, dtype = read_header(f, info.file_size)
            except ValueError as e:
                raise ValueError(f"{name} {e}") from e
            yield shape, fortran, dtype, f


def most_bytes(info):
    """How many bytes a member of a zip can have at most; DEFLATE makes 258 of two bits."""
    if info.compress_type == zipfile.ZIP_STORED:
        return info.compress_size
    return 1032 * info.compress_size


def read_array(file, name):
    """A small array of an .npz. Reading it to its end compares it with its CRC."""
    with open_array(file, name) as (shape, fortran, dtype, f):
        return np.frombuffer(f.read(), dtype).reshape(shape, order="F" if fortran else "C")


def stream(file, n):
    """Blocks of n images of an .npz."""
    with reading(file), open_array(file) as (shape, _, _, f):
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
        with open_array(file) as (shape, fortran, dtype, f):
            if dtype.kind == "f" and has_nan(f, dtype):
                raise ValueError("arr_0 has NaN")
            expect_images(dtype, shape)
            if fortran:
                raise ValueError("arr_0 is in Fortran order")
    return Images(Path(file).name, shape, lambda n: stream(file, n), more)


def names_in(file):
    """The names of all arrays of an .npz. ValueError if its directory does not have them all."""
    with zipfile.ZipFile(file) as z, open(file, "rb") as f:
        f.seek(-len(z.comment) - 22, os.SEEK_END)  # the last record of a zip
        (number,) = struct.unpack_from("<H", f.read(22), 10)
        if number not in (len(z.namelist()), 0xFFFF):  # the latter stands for more
            raise ValueError(f"it has {number} arrays, and {len(z.namelist())} in its directory")
        for member in z.infolist():
            z.open(member).close()  # which compares its name with the one before its bytes
        return [name.removesuffix(".npy") for name in z.namelist()]


def has_nan(f, dtype):
    while block := f.read(2**16 * dtype.itemsize):
        if np.isnan(np.frombuffer(block, dtype)).any():
            return True
    return False


def read_extras(file):
    """All but arr_0 of an .npz, checked: {name: array or settings}, and the names in the file."""
    if not Path(file).is_file():
        raise ValueError("no such file")
    if not zipfile.is_zipfile(file):
        raise ValueError("not an .npz file, or a truncated one")
    wanted = {"labels", "settings", "channels", *KINDS[0], *KINDS[1]}
    found = names_in(file)
    more = {name: read_array(file, name) for name in wanted.intersection(found)}
    settings = more.get("settings", np.array("{}"))
    if settings.shape != () or settings.dtype.kind != "U":
        raise ValueError(f"settings is {settings.dtype} {settings.shape}, expected one string")
    more["settings"] = json.loads(str(settings))
    if not isinstance(more["settings"], dict):
        raise ValueError("settings is not a JSON object")
    channels = more.get("channels", np.array(3))
    if channels.shape != () or channels.dtype.kind not in "iu" or channels not in (1, 3):
        raise ValueError(f"channels is {channels!r:.60}, expected 1 or 3")
    for mu, sigma, *_ in KINDS:
        if mu in more and sigma in more:
            expect_statistics(mu, more[mu], sigma, more[sigma])
    if not {"arr_0", "mu", "mu_s"}.intersection(found):
        raise ValueError(f"expected an array arr_0, found {', '.join(found) or 'nothing'}")
    return more, found


def expect_statistics(mu, mean, sigma, covariance):
    """ValueError now rather than after the features, which can take hours."""
    fits = mean.ndim == 1 and covariance.shape == mean.shape * 2
    fits = fits and mean.dtype.kind == covariance.dtype.kind == "f"
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
    BlockedError, an OSError, while another process writes the file.
    """
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder; a reference is a file")
    with one_writer(file):
        write_reference(images, file, network, batch)


def write_reference(images, file, network, batch):
    keep = chosen(images.shape[0], MAX_REAL)
    if len(keep) < 2:
        raise ValueError(f"a reference needs at least 2 images; {images.name} has {len(keep)}")
    beside = Path(f"{file}.{os.getpid()}.tmp")

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
