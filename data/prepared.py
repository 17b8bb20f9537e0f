"""Putting a small prepared set into its folder (README.md beside this has the layout); digits and photos share it."""
import argparse
import json
import os
from pathlib import Path

import numpy as np

NAMES = ["images.npy", "labels.npy", "meta.json"]


def shuffle(n, seed=0):
    """The numbers 0 .. n - 1 (int64, n) in an order of the seed's."""
    # Sorting raw words of PCG64 is a shuffle that no NumPy release changes; permutation() comes without that promise.
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def shuffled(labels, held_out, seed=0):
    """Row order (int64, N) for int labels (N): all shuffled, the last held_out rows (fewer than N) stratified.

    A class gives its share, rounded up where most is left over, but its last training image only if no other can give.
    """
    order, counts = shuffle(len(labels), seed), np.bincount(labels)
    quota, owed = np.divmod(counts * held_out, len(labels))
    for _ in range(held_out - quota.sum()):     # one more, of the class that is furthest behind its share
        left = counts - quota
        c = np.lexsort((-np.arange(len(owed)), owed, np.minimum(left, 2)))[-1]
        quota[c] += 1
        owed[c] -= len(labels)
    drawn, rank = labels[order], np.empty(len(labels), np.int64)    # rank: within its class, in the order drawn
    rank[np.argsort(drawn, kind="stable")] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = rank < quota[drawn]
    return np.concatenate([order[~held], order[held]])


def write(out, images, labels, meta):
    """Write a set into the folder `out`, over an earlier one of its name. ValueError if `out` holds some other set.

    images (N, C, H, W) uint8, labels (N) int64, meta a dict. An error leaves the earlier set whole, or nothing.
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
        meta_file.unlink(missing_ok=True)       # while the arrays change hands the folder must not look complete
        for temp, name in zip(temps, NAMES):    # meta.json last: it says that the rest is there
            os.replace(temp, out / name)
    except BaseException:                       # Ctrl-C too
        for file in temps + ([] if meta_file.exists() else [out / name for name in NAMES]):
            file.unlink(missing_ok=True)
        raise
    size = sum((out / name).stat().st_size for name in NAMES)
    print(f"{out}: {meta['name']}, images {images.shape} {images.dtype}, {len(meta['classes'])} classes, "
          f"{meta['held_out']} held out, {size / 1e6:.2f} MB")


def command(prepare, folder, what):
    """The command line of a set: prepare(--out), by default into `folder`. An error is one line."""
    parser = argparse.ArgumentParser(description=f"prepare {what}")
    parser.add_argument("--out", default=folder, help="folder to write (default: this script's)")
    args = parser.parse_args()
    try:
        prepare(args.out)
    except (ValueError, OSError) as e:
        parser.error(str(e))
