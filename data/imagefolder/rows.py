"""Filling a .npy file row by row, each row made from one file, which worker processes read ahead.

A run that was killed goes on where it stopped, with any number of processes, and the bytes are those of a run that was
not. Three files in the folder of the set: the plan (all that decides the bytes), the rows, and for each row the size of
the file it was made from, written once the row is on the disk; 0 says that the row is still to be done.
"""
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import numpy as np

PLAN, ROWS, DONE = "tmp.plan.json", "tmp.images.npy", "tmp.done.npy"


class Rows:
    """A .npy file to write into; by ordinary writes, which raise on a full disk. Under a memory map it is fatal."""
    def __init__(self, file):
        x = np.load(file, mmap_mode="r")
        self.offset, self.size, self.file = x.offset, x[:1].nbytes, open(file, "r+b")

    def put(self, row, x):
        """x: one row, or several from `row` on, of the file's own dtype."""
        self.file.seek(self.offset + row * self.size)
        self.file.write(x.tobytes())
        self.file.flush()

    def sync(self): os.fsync(self.file.fileno())
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()


def check_room(folder, n, dtype, shape):
    """ValueError if the disk that the folder lies on, or will lie on, has no room for n rows of `shape`."""
    need = int(n) * math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(next(f for f in (folder, *folder.absolute().parents) if f.exists())).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left")


def torchrun():
    """(rank, number of ranks, a store of keys and values that all of them see); alone (0, 1, None)."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world == 1:
        return 0, 1, None
    import torch.distributed as dist
    store = next(dist.rendezvous("env://"))[0]
    store.set_timeout(timedelta(days=1))                    # to find a million files can take rank 0 a while
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":    # a restart finds the keys of the dead in it
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
            raise ValueError("several machines restart only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun")
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return rank, world, store


def begin(out, plan, files, dtype, shape, team):
    """Lay out a run in the folder `out`, or take up the one that stopped there. All ranks return once it lies there.

    plan: a dict of what decides the bytes, for JSON; files: one for each row; shape: of a row; team: what `torchrun`
    gave. ValueError if the folder holds part of something else, naming what differs, or if the disk has no room.
    """
    rank, world, store = team
    if rank > 0:
        if json.loads(store.get("plan")) != plan:
            raise ValueError(f"rank {rank} finds other files or settings than rank 0")
        return
    then, done = None, np.zeros(len(files), np.int64)
    if (out / PLAN).exists():
        then, done = json.loads((out / PLAN).read_text()), np.load(out / DONE)
    if done.any():                                          # if not, other settings lose nothing
        differing = [f"{k} {then.get(k)!r} (now {plan.get(k)!r})" for k in then | plan if then.get(k) != plan.get(k)]
        if not differing:
            differing = [f"size of {files[i]}" for i in np.flatnonzero(done) if os.path.getsize(files[i]) != done[i]]
        if differing:
            raise ValueError(f"{out} holds part of another set; delete it first, or mend what differs: "
                             f"{', '.join(differing[:5])}")
    check_room(out, len(files) - np.count_nonzero(done), dtype, shape)
    if then != plan:
        out.mkdir(parents=True, exist_ok=True)
        (out / PLAN).unlink(missing_ok=True)
        np.lib.format.open_memmap(out / ROWS, "w+", dtype, (len(files), *shape))    # of zeros, which take no room yet
        np.save(out / DONE, np.zeros(len(files), np.int64))
        (out / f"{PLAN}.new").write_text(json.dumps(plan))
        os.replace(out / f"{PLAN}.new", out / PLAN)         # last: it says that the rest is there
    if world > 1: store.set("plan", json.dumps(plan))


def fill(out, files, batch, read, encode, workers, team):
    """Do what is still to be done -> {row: why its file cannot be read}; on rank 0 that of all ranks.

    read(file or None) -> (array, size of the file or 0, None or why it cannot be read), in a worker process;
    encode(arrays (batch, ...), {index: file}) -> rows (batch, ...). The unit of work is a block of `batch` rows, and
    block b is rank b % world's. It is encoded whole, with zeros for rows that are done or cannot be read, so that the
    bytes of a row do not depend on what was done when.
    """
    rank, world, store = team
    done, bad, finished = np.load(out / DONE), {}, 0
    blocks = [slice(i, min(i + batch, len(files))) for i in range(rank * batch, len(files), world * batch)]
    blocks = [block for block in blocks if not done[block].all()]
    jobs = ((read, [None if size else file for file, size in zip(files[block], done[block])]) for block in blocks)
    show = progress(int((done == 0).sum()), quiet=rank > 0)
    if blocks:                                              # if not, the rows may have been put in place already
        with readers(workers) as run, Rows(out / ROWS) as rows, Rows(out / DONE) as flags:
            for block, (x, sizes, whys) in zip(blocks, run(read_block, jobs)):
                there = np.flatnonzero(sizes)
                y = encode(x, {i: files[block.start + i] for i in there})
                for i in there: rows.put(block.start + i, y[i])
                rows.sync()
                flags.put(block.start, done[block] + sizes)
                bad |= {block.start + i: why for i, why in enumerate(whys) if why}
                finished += (n := sum(1 for size, why in zip(sizes, whys) if size or why))
                show(store.add("finished", n) if world > 1 else finished)
    if world > 1:
        store.set(f"bad {rank}", json.dumps(list(bad.items())))
        while rank == 0 and not store.check([f"bad {r}" for r in range(world)]):
            time.sleep(0.1)
            show(store.add("finished", 0))
        if rank == 0: bad = {i: why for r in range(world) for i, why in json.loads(store.get(f"bad {r}"))}
    return bad


def read_block(job):
    read, files = job
    arrays, sizes, whys = zip(*map(read, files))
    return np.stack(arrays), np.array(sizes, np.int64), whys


@contextmanager
def readers(workers):
    """A map() with its results in order, computed ahead by so many processes; in this one if there is one."""
    if workers == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")            # the same on every system
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker)
    def run(fn, jobs):
        ahead = deque()                                     # short: what is read waits in memory
        for job in jobs:
            ahead.append(pool.submit(fn, job))
            if len(ahead) > workers + 1: yield ahead.popleft().result()
        while ahead: yield ahead.popleft().result()
    try: yield run
    finally: pool.shutdown(cancel_futures=True)


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the parent, which then stops its workers
    def follow():                                           # a parent that is killed cannot
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def progress(total, quiet=False):
    """A function show(finished): a bar on stderr, with rate and time left."""
    tty, start = sys.stderr.isatty(), time.monotonic()
    last = start
    def show(finished):
        nonlocal last
        now, end = time.monotonic(), finished >= total
        if quiet or not (now - last > (0.2 if tty else 10) or (tty and end)): return
        last, rate = now, max(finished, 1) / max(now - start, 1e-9)
        m, s = divmod(round((total - finished) / rate), 60)
        line = (f"[{'#' * (24 * finished // total):.<24}] {finished:,}/{total:,} images, {rate:,.1f} per second, "
                f"{m}:{s:02d} left")
        print(f"\r{line:<80}" if tty else line, end="" if tty and not end else "\n", file=sys.stderr, flush=True)
    return show
