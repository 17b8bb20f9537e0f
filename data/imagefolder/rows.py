"""Filling a .npy file row by row, each row made from one file; worker processes read ahead.

A run that was killed goes on where it stopped, with any number of processes, to the bytes of a run
that was not. The folder of the set holds three files until the end: the plan, which has all that
decides the bytes; the rows; and a mark for each row, written once the row is on the disk. What a
run reads back it compares with the plan and with the checksums in the marks.
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
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from support.npy import open_npy

PLAN, ROWS, DONE = "tmp.plan.json", "tmp.images.npy", "tmp.done.npy"

# The mark of a row. All zeros: it is still to be done.
MARK = np.dtype(
    [
        ("size", "<i8"),  # of the image file, so that a file that was replaced is noticed
        ("animated", "<u4"),  # 1 if the file has more images than the one that was taken
        ("checksum", "<u4"),  # of the row and of the two numbers above
    ]
)


def marked(row, size, animated):
    """The mark of a finished row, an array, made of a file of so many bytes."""
    checksum = zlib.crc32(row.tobytes(), zlib.crc32(f"{size} {animated}".encode()))
    return np.array((size, animated, checksum), MARK)


class Rows:
    """A .npy file to write into. Ordinary writes raise on a full disk; a memory map would crash."""

    def __init__(self, file):
        x = np.load(file, mmap_mode="r")
        self.offset = x.offset
        self.size = x[:1].nbytes
        self.file = open(file, "r+b")

    def put(self, row, x):
        """Write x, one row or several from `row` on, of the file's own dtype."""
        self.file.seek(self.offset + row * self.size)
        self.file.write(x.tobytes())
        self.file.flush()

    def sync(self):
        os.fsync(self.file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def check_room(folder, n, dtype, shape):
    """ValueError if the disk has no room for n rows of `shape` in `folder`, which may not exist."""
    need = int(n) * math.prod(shape) * np.dtype(dtype).itemsize
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        left = f"its disk has {free / 1e9:.1f} GB left"
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB, and {left}")


def torchrun():
    """(rank, number of ranks, a store of keys and values that all share); alone (0, 1, None)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, None
    import torch.distributed as dist

    store = next(dist.rendezvous("env://"))[0]
    store.set_timeout(timedelta(days=1))  # rank 0 may need a while to find a million files
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # after a restart torchrun's store still holds the keys of the killed processes: each start
        # takes a prefix of its own
        several_machines = int(os.environ["GROUP_WORLD_SIZE"]) > 1
        if several_machines and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
            raise ValueError(
                "several machines restart only with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
            )
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return rank, world, store


def give_up():
    """Tell ranks that wait for the plan of rank 0 that there will be none."""
    rank, world, store = torchrun()
    if rank == 0 and world > 1:
        store.set("plan", "null")


def begin(out, plan, files, dtype, shape, team):
    """Lay out a run in the folder `out`, or take up the one that stopped there.

    plan: a dict, for JSON, of what decides the bytes. files: one for each row. shape: that of a
    row. team: the result of `torchrun`. All ranks return once the files lie there. ValueError if
    the folder holds part of another set, naming what differs, or if the disk has no room.
    """
    rank, world, store = team
    if rank > 0:
        first = json.loads(store.get("plan"))
        if first is None:
            raise ValueError("rank 0 could not begin")
        if first != plan:
            raise ValueError(f"rank {rank} finds other files or settings than rank 0")
        return
    then, n_done = None, 0
    if (out / PLAN).exists():
        try:
            then, marks = take_up(out, plan, dtype, (len(files), *shape))
        except (ValueError, RecursionError, FileNotFoundError) as e:
            raise ValueError(f"{out} cannot be continued, delete it first: {e}") from e
        n_done = np.count_nonzero(marks["size"])
    if n_done:  # before the first row is done, other settings lose nothing
        check_same_set(out, then, plan, files, marks)
    check_room(out, len(files) - n_done, dtype, shape)
    if then != plan:
        lay_out(out, plan, dtype, (len(files), *shape))
    if world > 1:
        store.set("plan", json.dumps(plan))


def take_up(out, plan, dtype, shape):
    """The plan and the marks of the run that stopped in `out`. ValueError if a file is damaged."""
    try:
        then = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{out / PLAN} is no JSON: {e}") from e
    if not isinstance(then, dict):
        raise ValueError(f"{out / PLAN} is {then!r:.60}, expected an object")
    if not (out / ROWS).exists() and (out / "images.npy").exists():
        os.replace(out / "images.npy", out / ROWS)  # killed between two files of the set
    marks = open_npy(out / DONE)
    if marks.dtype != MARK or marks.ndim != 1:
        raise ValueError(f"{out / DONE} is {marks.dtype} {marks.shape}, expected marks")
    if then == plan:
        expect(out / DONE, MARK, shape[:1])
        expect(out / ROWS, dtype, shape)
    return then, np.array(marks)


def expect(file, dtype, shape):
    x = open_npy(file)
    if x.dtype != dtype or x.shape != shape or not x.flags.c_contiguous:
        raise ValueError(f"{file} is {x.dtype} {x.shape}, expected {np.dtype(dtype)} {shape}")


def damaged(out, marks, block):
    """Which rows of a block are marked as done and are not as they were written: their numbers."""
    rows = open_npy(out / ROWS)
    done = block.start + np.flatnonzero(marks["size"][block])
    return [i for i in done if marked(rows[i], *marks[i].item()[:2]) != marks[i]]


def check_same_set(out, then, plan, files, marks):
    """ValueError unless the plan is the earlier one, and each done file has its earlier size."""
    changed = [k for k in then | plan if then.get(k) != plan.get(k)]
    differing = [f"{k} {then.get(k)!r} (now {plan.get(k)!r})" for k in changed]
    if not differing:
        done = np.flatnonzero(marks["size"])
        rows = [i for i in done if os.path.getsize(files[i]) != marks["size"][i]]
        rows = [i for i in rows if not damaged(out, marks, slice(i, i + 1))]  # else it is the mark
        differing = [f"size of {files[i]}" for i in rows]
    if differing:
        listed = ", ".join(differing[:5])
        raise ValueError(
            f"{out} holds part of another set; delete it first, or mend what differs: {listed}"
        )


def lay_out(out, plan, dtype, shape):
    """Make the three files anew, the plan last: it says that the others are there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PLAN).unlink(missing_ok=True)
    np.lib.format.open_memmap(out / ROWS, "w+", dtype, shape)  # zeros take no room on the disk
    np.save(out / DONE, np.zeros(shape[0], MARK))
    (out / f"{PLAN}.new").write_text(json.dumps(plan))
    os.replace(out / f"{PLAN}.new", out / PLAN)


def fill(out, files, batch, read, encode, workers, team):
    """Do the rows that are still to be done. Returns {row: why its file cannot be read}.

    read(file or None) -> (array, size of the file or 0, whether it is animated, None or the reason
        that it cannot be read), in a worker process.
    encode(arrays (batch, ...), {index: file}) -> rows (batch, ...).

    The unit of work is a block of `batch` rows, and block b is the work of rank b % world. A block
    is encoded whole, with zeros for rows that are done or cannot be read: the bytes of a row then
    do not depend on the order of the work. On rank 0 the result is that of all ranks.

    Rows that are not as they were written are done again.
    """
    rank, world, store = team
    marks, bad, finished = np.array(open_npy(out / DONE)), {}, 0
    starts = range(rank * batch, len(files), world * batch)
    blocks = [slice(i, min(i + batch, len(files))) for i in starts]
    again = [i for block in blocks for i in damaged(out, marks, block)]
    if again:
        marks[again] = np.zeros((), MARK)
        print(f"{out}: {len(again)} finished rows were damaged and are made anew", file=sys.stderr)
    blocks = [block for block in blocks if not marks["size"][block].all()]
    jobs = ((read, remaining(files[block], marks[block])) for block in blocks)
    show = progress(int((marks["size"] == 0).sum()), quiet=rank > 0)
    if blocks:
        with readers(workers) as run, Rows(out / ROWS) as rows, Rows(out / DONE) as flags:
            for block, (x, sizes, animated, whys) in zip(blocks, run(read_block, jobs)):
                readable = np.flatnonzero(sizes)
                y = encode(x, {i: files[block.start + i] for i in readable})
                for i in readable:
                    rows.put(block.start + i, y[i])
                    marks[block.start + i] = marked(y[i], sizes[i], animated[i])
                rows.sync()
                flags.put(block.start, marks[block])
                bad |= {block.start + i: why for i, why in enumerate(whys) if why}
                n = sum(1 for size, why in zip(sizes, whys) if size or why)
                finished += n
                show(store.add("finished", n) if world > 1 else finished)
    return bad if world == 1 else gather(bad, team, show)


def remaining(files, marks):
    """The files of a block, None for a row that is done."""
    return [None if size else file for file, size in zip(files, marks["size"])]


def count_animated(out):
    return int(open_npy(out / DONE)["animated"].sum())


def gather(bad, team, show):
    """On rank 0 the unreadable rows of all ranks, once all have finished; elsewhere `bad`."""
    rank, world, store = team
    store.set(f"bad {rank}", json.dumps(list(bad.items())))
    if rank > 0:
        return bad
    while not store.check([f"bad {r}" for r in range(world)]):
        time.sleep(0.1)
        show(store.add("finished", 0))
    return {i: why for r in range(world) for i, why in json.loads(store.get(f"bad {r}"))}


def read_block(job):
    read, files = job
    arrays, sizes, animated, whys = zip(*map(read, files))
    return np.stack(arrays), np.array(sizes, np.int64), np.array(animated, np.uint32), whys


@contextmanager
def readers(workers):
    """A function like map() whose results that many processes compute ahead, in order.

    One worker is this process itself.
    """
    if workers == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # the same on every system
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker)

    def run(fn, jobs):
        ahead = deque()  # short: its results wait in memory
        for job in jobs:
            ahead.append(pool.submit(fn, job))
            if len(ahead) > workers + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Leave Ctrl-C to the parent, which stops its workers; end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def progress(total, quiet=False):
    """A function show(finished): a bar on stderr, with rate and time left."""
    tty, start = sys.stderr.isatty(), time.monotonic()
    interval = 0.2 if tty else 10  # seconds between two lines
    last = start

    def show(finished):
        nonlocal last
        now, end = time.monotonic(), finished >= total
        due = now - last > interval or (tty and end)
        if quiet or not due:
            return
        last = now
        rate = max(finished, 1) / max(now - start, 1e-9)
        m, s = divmod(round((total - finished) / rate), 60)
        bar = "#" * (24 * finished // total)
        line = f"[{bar:.<24}] {finished:,}/{total:,} images, {rate:,.1f} per second, "
        line += f"{m}:{s:02d} left"
        if tty:
            print(f"\r{line:<80}", end="\n" if end else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return show
