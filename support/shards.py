"""An .npz of any size, made in chunks by any number of processes, that goes on after a kill.

For sample_min.py. Imports dydilit.py, numpy, support/npy.py and support/processes.py.

While it is made, a folder OUT.partial lies beside the file:
    settings.json   what decides the images; another run with other settings is refused
    images.npy      uint8 (n, H, W, C), zeros at first
    done            five bytes per chunk: 1 once the chunk is on the disk, and its CRC-32
    whole.npz       the file itself, until it is complete and takes its place
"""

import json
import math
import os
import shutil
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dydilit import distributed
from support.npy import open_npy
from support.processes import by_rank_0

MARK = np.dtype([("done", "u1"), ("crc32", "<u4")])  # of a chunk


def folder_of(out):
    return Path(f"{out}.partial")


class UnreadableError(ValueError):
    """A file of OUT.partial is not as it was written."""


class OtherSettingsError(ValueError):
    """OUT.partial was begun with other settings."""


def begin(out, settings, n, shape, batch, anew=False):
    """Make the folder of `out`, or take up the one that is there: `checked`, `unfinished`."""
    folder = folder_of(out)
    if (folder / "settings.json").exists():
        try:
            checked(folder, settings, n, shape, batch)
            return
        except UnreadableError as e:
            why = e
        except OtherSettingsError as e:
            if not anew:
                raise ValueError(f"{folder} was begun with {e}; delete it or choose another --out"
                                 ) from e
            why = e
        print(f"{folder} is begun anew: {why}", file=sys.stderr, flush=True)
        (folder / "settings.json").unlink()
    folder.mkdir(parents=True, exist_ok=True)
    need_room(out, 2 * n * math.prod(shape))  # images.npy, and the .npz that it becomes
    np.zeros(-(-n // batch), MARK).tofile(folder / "done")
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, *shape))  # a sparse file
    # last: without it the folder is begun anew
    (folder / "settings.json").write_text(json.dumps(settings))


def checked(folder, settings, n, shape, batch):
    """Take the marks off chunks whose bytes are not those of their checksums.

    OtherSettingsError if the folder was begun with others, UnreadableError if nothing of it can be
    used.
    """
    try:
        then = json.loads((folder / "settings.json").read_text())
    except (ValueError, RecursionError):
        then = None
    if not isinstance(then, dict):
        raise UnreadableError("settings.json is damaged")
    refuse_other_settings(then, settings)
    marks, chunks = read_marks(folder), -(-n // batch)
    if len(marks) != chunks:
        raise UnreadableError(f"done has {len(marks)} marks, expected {chunks}")
    images = open_images(folder, n, shape)
    bad = 0
    for i in np.flatnonzero(marks["done"]):
        chunk = images[i * batch : (i + 1) * batch]
        if marks["done"][i] != 1 or zlib.crc32(chunk) != marks["crc32"][i]:
            marks[i] = 0
            bad += 1
    if bad:
        marks.tofile(folder / "done")
        print(
            f"{folder}: {bad} of {chunks} chunks are not as they were written and are made again",
            file=sys.stderr,
            flush=True,
        )


def read_marks(folder):
    """One MARK for each chunk; none if the file has another length than whole marks."""
    try:
        data = (folder / "done").read_bytes()
    except FileNotFoundError:
        return np.zeros(0, MARK)
    return np.frombuffer(data, MARK).copy() if len(data) % MARK.itemsize == 0 else np.zeros(0, MARK)


def open_images(folder, n, shape):
    try:
        images = open_npy(folder / "images.npy")
    except (OSError, ValueError) as e:
        raise UnreadableError(f"images.npy is damaged ({e})") from e
    if images.dtype != np.uint8 or images.shape != (n, *shape) or not images.flags.c_contiguous:
        raise UnreadableError(f"images.npy is {images.dtype} {images.shape}")
    return images


def need_room(path, need):
    """OSError if the disk of `path`, a folder or a file in one, has less than `need` bytes left."""
    path = Path(path)
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if need > free:
        raise OSError(
            f"{path} needs {in_words(need)}, its disk has {in_words(free)} left, "
            f"{in_words(need - free)} too few"
        )


def in_words(size):
    """A number of bytes in a unit that fits: 831 bytes, 8.4 kB, 12.0 GB."""
    if size < 1000:
        return f"{size} byte{'s' * (size != 1)}"
    units = {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "kB"}
    unit = next(unit for unit in units if size >= 0.99995 * unit)  # never 1000.0 kB
    return f"{size / unit:,.1f} {units[unit]}"


def refuse_other_settings(then, now):
    if then == now:
        return
    differing = ", ".join(
        f"{key} {then.get(key)!r} (now {now.get(key)!r})"
        for key in then | now
        if then.get(key) != now.get(key)
    )
    raise OtherSettingsError(f"other settings: {differing}")


@contextmanager
def unfinished(out, settings, n, shape, batch, anew=False):
    """Open OUT.partial for n images of `shape`, in chunks of `batch`. Every process calls it.

    Yields the numbers of the chunks that are missing, and put(chunk, images), which stores one.
    ValueError if it was begun with other settings, unless `anew` throws such a one away; OSError
    if the disk has no room.
    """
    folder = folder_of(out)
    by_rank_0(lambda: begin(out, settings, n, shape, batch, anew))
    done = read_marks(folder)["done"]
    if distributed()[1] > 1:
        dist.barrier()  # no process marks a chunk before all have read which ones are missing
    with open(folder / "images.npy", "r+b") as images, open(folder / "done", "r+b") as flags:
        header = np.load(folder / "images.npy", mmap_mode="r").offset
        chunk_bytes = batch * math.prod(shape)

        def put(chunk, x):
            # ordinary writes, since they raise on a full disk; a memory map would crash the process
            images.seek(header + chunk * chunk_bytes)
            images.write(x.tobytes())
            images.flush()
            os.fsync(images.fileno())
            flags.seek(chunk * MARK.itemsize)
            flags.write(np.array((1, zlib.crc32(x.tobytes())), MARK).tobytes())
            flags.flush()

        yield np.flatnonzero(done == 0), put


def finish(out, **arrays):
    """Wait until all chunks are there; write them as arr_0, and `arrays`, to the .npz `out`."""
    folder = folder_of(out)
    while 0 in read_marks(folder)["done"]:
        time.sleep(0.5)  # not a barrier, which would time out: other processes may need hours
    whole = folder / "whole.npz"
    try:
        with open(whole, "wb") as f:
            images = np.load(folder / "images.npy", mmap_mode="r")
            np.savez(f, arr_0=images, **arrays)  # which copies the images piece by piece
            f.flush()
            os.fsync(f.fileno())
        os.replace(whole, out)
    finally:
        whole.unlink(missing_ok=True)
    shutil.rmtree(folder)


def is_whole(npz):
    """Whether every byte of an .npz is as it was written, by the CRC-32 of its members. It may
    raise whatever a damaged file makes zipfile and zlib raise, of many types."""
    with zipfile.ZipFile(npz) as z:
        return z.testzip() is None
