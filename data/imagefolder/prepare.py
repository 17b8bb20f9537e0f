"""A folder of images as a prepared data set (data/README.md has the layout).

    python data/imagefolder/prepare.py ROOT --size 64 --out data/NAME

ROOT/<class>/**/*.{png,jpg,jpeg,webp}; the folder names, sorted, are the classes. Names that start with a dot are not
looked at. Each image becomes an upright 8-bit RGB (or grey) square: halved with a box filter while that leaves it large
enough, then bicubic to the exact short side, then the centre of it (the crop of ADM, arXiv 2105.05233).
"""
import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SEED = 0
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
NAMES = ["images.npy", "labels.npy", "meta.json"]

# -----------------------------------------------------------------------------
# one image

def to_rgb(im):
    """PIL image of any mode -> 8-bit "RGB" or "L", upright; what is transparent becomes white. ValueError: mode F."""
    im = ImageOps.exif_transpose(im)
    if im.mode.startswith("I"):                 # 16-bit grey; Pillow's own conversion would clip it at 255 (it gives
                                                # 16-bit colour as 8 bits, rightly scaled)
        x = np.asarray(im).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((x + 128) // 257).astype(np.uint8))    # round(x / 257): 65535 is 255
    if im.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if im.has_transparency_data:                # an alpha channel, or a palette or PNG with a transparent colour
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")


def centre_crop(im, size):
    """PIL image -> the central size x size square of it, once its short side is `size`."""
    while min(im.size) >= 2 * size:
        im = im.resize((im.width // 2, im.height // 2), Image.Resampling.BOX)
    scale = size / min(im.size)
    w, h = (max(size, round(s * scale)) for s in im.size)
    im = im.resize((w, h), Image.Resampling.BICUBIC)
    x, y = (w - size) // 2, (h - size) // 2
    return im.crop((x, y, x + size, y + size))


def load_image(file, size, gray=False):
    """Image file -> uint8, C x size x size. Whatever Pillow raises if it cannot be read."""
    with Image.open(file) as im:
        im = centre_crop(to_rgb(im), size).convert("L" if gray else "RGB")
    return np.atleast_3d(np.asarray(im)).transpose(2, 0, 1)

# -----------------------------------------------------------------------------
# all images: each worker writes its rows straight into the one memory-mapped file, so nothing large travels

ROWS = None                                     # the memory map, in each worker

def open_rows(file, ignore_sigint=True):
    global ROWS
    if ignore_sigint: signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the parent, which cleans up
    ROWS = np.lib.format.open_memmap(file, mode="r+")


def write_row(job):
    """(row, file) -> None, or why the file could not be read."""
    row, file = job
    try:
        ROWS[row] = load_image(file, ROWS.shape[-1], gray=ROWS.shape[1] == 1)
    except Exception as e:                      # a broken file can make a decoder raise nearly anything
        return f"{type(e).__name__}: {e}"


@contextmanager
def decoder(file, workers):
    """A map() over jobs that fills the .npy `file`; in this process if there is one worker."""
    global ROWS
    if workers == 1:
        open_rows(file, ignore_sigint=False)
        try: yield map
        finally: ROWS = None
        return
    spawn = multiprocessing.get_context("spawn")                       # the same on every system
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=open_rows, initargs=(file,))
    try: yield lambda fn, jobs: pool.map(fn, jobs, chunksize=16)
    finally: pool.shutdown(cancel_futures=True)


def progress(results, total):
    """Pass results on, with a line on stderr: rate and time left."""
    tty = sys.stderr.isatty()
    start = last = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > (0.2 if tty else 10) or (tty and done == total):
            last, rate = now, done / max(now - start, 1e-9)
            m, s = divmod(round((total - done) / rate), 60)
            line = f"{done:,}/{total:,} images, {rate:,.0f} per second, {m}:{s:02d} left"
            print(f"\r{line:<60}" if tty else line, end="" if tty and done < total else "\n",
                  file=sys.stderr, flush=True)

# -----------------------------------------------------------------------------
# the data set

def find(root):
    """Folder -> (class names, files, int64 labels of the files). ValueError if there is nothing to prepare."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no class folders; expected {root}/<class>/*.png, .jpg, .jpeg or .webp")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for folder, subfolders, leaves in os.walk(root / name):
            subfolders[:] = [d for d in subfolders if not d.startswith(".")]
            found += [Path(folder, f) for f in leaves
                      if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
        if not found:
            raise ValueError(f"class {name!r} has no images in {root / name}")
        files += map(str, sorted(found))        # sorted: the order of a file system must not decide the shuffle
        labels += [label] * len(found)
    return classes, files, np.array(labels, np.int64)


def shuffled(labels, held_out, seed=SEED):
    """Row order (int64, N) for int labels (N): all shuffled, the last held_out rows stratified."""
    # Sorting raw words of PCG64 is a shuffle that no NumPy release changes; permutation() comes without that promise.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    counts = np.bincount(labels)
    quota, rest = np.divmod(counts * held_out, len(labels))
    rest[counts - quota <= 1] = -1              # a class gives its last training image only if no other class can give
    quota[np.argsort(-rest, kind="stable")[:held_out - quota.sum()]] += 1
    held = np.zeros(len(labels), bool)
    for c, k in enumerate(quota):
        held[np.flatnonzero(labels[order] == c)[:k]] = True
    return np.concatenate([order[~held], order[held]])


def prepare(root, size, out, held_out=0.05, flip=True, gray=False, on_error="refuse", workers=1):
    """Write the images of the folder `root`, cropped to size x size, as a prepared set into the folder `out`.

    held_out is a share, in [0, 1). More than one worker needs this file to be importable by its name, as it is when it
    runs as a script. ValueError for a wrong argument or unreadable images; then, as after any error, nothing is left.
    """
    out = Path(out)
    if size < 1: raise ValueError(f"size must be at least 1, got {size}")
    if workers < 1: raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 <= held_out < 1: raise ValueError(f"the held-out share must lie in [0, 1), got {held_out}")
    if on_error not in ("refuse", "skip"): raise ValueError(f"on_error must be refuse or skip, got {on_error!r}")
    if any((out / name).exists() for name in NAMES):
        raise ValueError(f"{out} already holds a prepared set (or part of one); delete it first")
    classes, files, labels = find(root)

    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temps = [out / f"tmp.{name}" for name in NAMES]
    spare = out / "tmp.all.npy"
    try:
        order, bad = write_images(files, labels, held_out, size, gray, temps[0], workers)
        if bad:
            listing = "".join(f"\n  {files[i]}: {why}" for i, why in sorted(bad.items()))
            if on_error == "refuse":
                raise ValueError(f"unreadable images: {len(bad)} of {len(files)}; nothing was written "
                                 f"(--on-error skip leaves them out):{listing}")
            print(f"left out {len(bad)} unreadable images of {len(files)}:{listing}", file=sys.stderr)
            # Shuffle what is left as if the bad files had never been there, and copy the rows to where they now belong.
            good = np.setdiff1d(np.arange(len(files)), list(bad))
            lost = set(range(len(classes))) - set(labels[good].tolist())
            if lost:
                raise ValueError(f"class {classes[min(lost)]!r} has no readable images")
            labels, row = labels[good], np.argsort(order)[good]         # row: where each good image lies now
            order = shuffled(labels, n_held_out(held_out, len(labels)))
            rows = np.load(temps[0], mmap_mode="r")
            kept = np.lib.format.open_memmap(spare, "w+", np.uint8, (len(good), *rows.shape[1:]))
            for i in range(0, len(good), 256):
                kept[i:i + 256] = rows[row[order[i:i + 256]]]
            del rows, kept                      # written out; and some systems do not rename a file that is mapped
            os.replace(spare, temps[0])
        np.save(temps[1], labels[order])
        meta = {"name": out.resolve().name, "classes": classes, "flip": flip,
                "held_out": n_held_out(held_out, len(labels)), "levels": 255}
        temps[2].write_text(json.dumps(meta, indent=1) + "\n")
        for temp, name in zip(temps, NAMES):    # meta.json last: it says that the rest is there
            os.replace(temp, out / name)
    except BaseException:                       # Ctrl-C too
        for file in [*temps, spare, *(out / name for name in NAMES)]:
            file.unlink(missing_ok=True)
        if made and not any(out.iterdir()): out.rmdir()
        raise
    total = sum((out / name).stat().st_size for name in NAMES)
    shape = (len(labels), 1 if gray else 3, size, size)
    print(f"{out}: {meta['name']}, images {shape} uint8, {len(classes)} classes, "
          f"{meta['held_out']} held out, {total / 1e6:.2f} MB")


def n_held_out(share, n):
    return min(round(share * n), n - 1)         # something to train on, always


def write_images(files, labels, held_out, size, gray, target, workers):
    """Decode the files into the new .npy `target`, N C H W -> (row order, {index of an unreadable file: why})."""
    order = shuffled(labels, n_held_out(held_out, len(files)))
    shape = (len(files), 1 if gray else 3, size, size)
    need, free = math.prod(shape), shutil.disk_usage(target.parent).free
    if need > free:                             # a full disk under a memory map kills the process without a word
        raise ValueError(f"{target.parent} needs {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left")
    np.lib.format.open_memmap(target, "w+", np.uint8, shape)      # its header, and room for all; the workers fill it
    jobs = [(row, files[i]) for row, i in enumerate(order)]
    with decoder(target, workers) as run:
        bad = {order[row]: why for row, why in enumerate(progress(run(write_row, jobs), len(jobs))) if why}
    return order, bad


def main():
    parser = argparse.ArgumentParser(description="prepare a folder of images, ROOT/<class>/*.{png,jpg,jpeg,webp}")
    parser.add_argument("root", metavar="ROOT", help="folder with a folder of images for each class")
    parser.add_argument("--size", type=int, required=True, help="height and width of the prepared images")
    parser.add_argument("--out", required=True, help="folder to write; its name becomes the name of the set")
    parser.add_argument("--held-out", type=float, default=0.05, help="share never trained on (default: 0.05)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="whether training may mirror the images (default: yes)")
    parser.add_argument("--gray", action="store_true", help="one channel in place of three")
    parser.add_argument("--on-error", choices=["refuse", "skip"], default="refuse", help="for unreadable images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    args = parser.parse_args()
    try:
        prepare(**vars(args))
    except (ValueError, OSError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
