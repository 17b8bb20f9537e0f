"""Writing a prepared set into its folder (README.md has the layout); every prepare.py uses it.

A set that fits into memory needs `shuffled`, `write` and `command` alone. Imports numpy.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

NAMES = ["images.npy", "labels.npy", "meta.json"]


def shuffle(n, seed=0):
    """The numbers 0 .. n - 1 (int64, n) in an order that the seed decides.

    It sorts raw words of PCG64, which give the same order in every release of NumPy;
    permutation() does not promise that.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def held_out_of_each_class(counts, held_out):
    """How many images of each class to hold out, (C,): its share, as nearly as integers allow.

    counts (C,): images of each class. Shares are rounded down, then the class furthest behind its
    share gives one more, and so on. A class gives its last training image only if no other can.
    """
    total = counts.sum()
    quota, owed = np.divmod(counts * held_out, total)
    for _ in range(held_out - quota.sum()):
        left = counts - quota
        c = np.lexsort((-np.arange(len(owed)), owed, np.minimum(left, 2)))[-1]
        quota[c] += 1
        owed[c] -= total
    return quota


def shuffled(labels, held_out, seed=0):
    """Row order (int64, N) for int labels (N): all shuffled, the last held_out rows stratified.

    held_out is less than N.
    """
    order, counts = shuffle(len(labels), seed), np.bincount(labels)
    drawn = labels[order]
    rank = np.empty(len(labels), np.int64)  # of a row within its class, in the order drawn
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank[np.argsort(drawn, kind="stable")] = np.arange(len(labels)) - first
    held = rank < held_out_of_each_class(counts, held_out)[drawn]
    return np.concatenate([order[~held], order[held]])


def write(out, images, labels, meta):
    """Write a set into the folder `out`, over an earlier set of the same name.

    images (N, C, H, W) uint8, labels (N) int64, meta a dict. ValueError if `out` holds another
    set. An error leaves the earlier set whole, or nothing.
    """
    out = Path(out)
    meta_file = out / "meta.json"
    if meta_file.exists() and json.loads(meta_file.read_text()).get("name") != meta["name"]:
        raise ValueError(f"{out} holds another prepared set; delete it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    temps = [out / f"tmp.{name}" for name in NAMES]
    try:
        np.save(temps[0], images)
        np.save(temps[1], labels)
        temps[2].write_text(json.dumps(meta, indent=1) + "\n")
        meta_file.unlink(missing_ok=True)  # the folder must not look complete during the exchange
        for temp, name in zip(temps, NAMES):  # meta.json last: it says that the rest is there
            os.replace(temp, out / name)
    except BaseException:  # Ctrl-C too
        whole = meta_file.exists()
        for file in temps + ([] if whole else [out / name for name in NAMES]):
            file.unlink(missing_ok=True)
        raise
    print(summary(out, images, meta))


def summary(out, images, meta):
    """The line that a command prints about its new set."""
    size = sum((out / name).stat().st_size for name in NAMES)
    return (
        f"{out}: {meta['name']}, images {images.shape} {images.dtype}, "
        f"{len(meta['classes'])} classes, {meta['held_out']} held out, {size / 1e6:.2f} MB"
    )


def command(prepare, folder, what):
    """The command line of a set: prepare(--out), by default into `folder`. An error is one line."""
    parser = argparse.ArgumentParser(description=f"prepare {what}")
    parser.add_argument("--out", default=folder, help="folder to write (default: this script's)")
    args = parser.parse_args()
    try:
        prepare(args.out)
    except (ValueError, OSError) as e:
        parser.error(str(e))
