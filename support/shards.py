"""An .npz of any size, made in chunks by any number of processes, that goes on after a kill.

For sample_min.py. Imports dydilit.py and numpy.

While it is made, a folder OUT.partial lies beside the file:
    settings.json   what decides the images; another run with other settings is refused
    images.npy      uint8 (n, H, W, C), zeros at first
    done            one byte per chunk, 1 once the chunk is on the disk
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dydilit import distributed


def folder_of(out):
    return Path(f"{out}.partial")


def begin(out, settings, n, shape, batch):
    """Make the folder of `out`, or check that it was begun with the same settings."""
    folder = folder_of(out)
    file = folder / "settings.json"
    if file.exists():
        refuse_other_settings(folder, json.loads(file.read_text()), settings)
        return
    folder.mkdir(parents=True, exist_ok=True)
    need = 2 * n * math.prod(shape)  # images.npy, and the .npz that it becomes
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{out} needs {need / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
    chunks = -(-n // batch)
    (folder / "done").write_bytes(bytes(chunks))
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, *shape))  # a sparse file
    file.write_text(json.dumps(settings))  # last: without it the folder is begun anew


def refuse_other_settings(folder, then, now):
    if then == now:
        return
    differing = ", ".join(
        f"{key} {then.get(key)!r} (now {now.get(key)!r})"
        for key in then | now
        if then.get(key) != now.get(key)
    )
    raise ValueError(
        f"{folder} was begun with other settings: {differing}; delete it or choose another --out"
    )


@contextmanager
def unfinished(out, settings, n, shape, batch):
    """Open OUT.partial for n images of `shape`, in chunks of `batch`. Every process calls it.

    Yields the numbers of the chunks that are missing, and put(chunk, images), which stores one.
    ValueError if it was begun with other settings; OSError if the disk has no room.
    """
    rank, world, _ = distributed()
    folder = folder_of(out)
    error = [None]
    if rank == 0:
        try:
            begin(out, settings, n, shape, batch)
        except (OSError, ValueError) as e:
            error = [e]
    if world > 1:
        dist.broadcast_object_list(error)
    if error[0]:
        raise error[0]
    done = np.frombuffer((folder / "done").read_bytes(), np.uint8)
    if world > 1:
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
            flags.seek(chunk)
            flags.write(b"\1")
            flags.flush()

        yield np.flatnonzero(done == 0), put


def finish(out, **arrays):
    """Wait until all chunks are there; write them as arr_0, and `arrays`, to the .npz `out`."""
    folder = folder_of(out)
    while 0 in (folder / "done").read_bytes():
        time.sleep(0.5)  # not a barrier, which would time out: other processes may need hours
    beside = Path(f"{out}.tmp.npz")
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")  # savez copies it piece by piece
        np.savez(beside, arr_0=images, **arrays)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    shutil.rmtree(folder)
