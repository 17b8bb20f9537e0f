"""Writing a prepared set into its folder (README.md has the layout); every prepare.py uses it.

A set that fits into memory needs `shuffled`, `write` and `command` alone. Imports numpy and
support/lock.py.
"""

import argparse
import filecmp
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # these scripts start in other folders
from support.lock import one_writer

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
    set. An error leaves the earlier set whole, or nothing. A second process waits for the first,
    and leaves files that are the same already.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with one_writer(out, wait=True):
        refuse_another_set(out / "meta.json", meta["name"])
        temps = [out / f"{name}.{os.getpid()}.tmp" for name in NAMES]
        try:
            for temp, array in zip(temps, (images, labels)):
                with open(temp, "wb") as f:  # given a name, np.save would add .npy to it
                    np.save(f, array)
            temps[2].write_text(json.dumps(meta, indent=1) + "\n")
            exchange(out, temps)
        finally:
            for temp in temps:
                temp.unlink(missing_ok=True)
    print(summary(out, images, meta))


def exchange(out, temps):
    """Give the files `temps` their names. An error leaves the earlier set whole, or nothing."""
    files = [out / name for name in NAMES]
    if all(f.exists() and filecmp.cmp(f, temp, False) for f, temp in zip(files, temps)):
        return
    try:
        files[2].unlink(missing_ok=True)  # the folder must not look complete during the exchange
        for temp, file in zip(temps, files):  # meta.json last: it says that the rest is there
            os.replace(temp, file)
    except BaseException:  # Ctrl-C too
        if not files[2].exists():
            for file in files:
                file.unlink(missing_ok=True)
        raise


def refuse_another_set(meta_file, name):
    if not meta_file.exists():
        return
    try:
        meta = json.loads(meta_file.read_text())
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or meta.get("name") != name:
        raise ValueError(
            f"{meta_file.parent} holds another prepared set; delete it or choose another --out"
        )


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
    print_anything()
    try:
        prepare(args.out)
    except (ValueError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: error: interrupted\n")


def print_anything():
    """A path that the terminal cannot show is written out; it costs no finished set its success."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
