"""A folder of images as a prepared data set (data/README.md has the layout): pixels, or latents of an autoencoder.

    python data/imagefolder/prepare.py ROOT --size 64 --out data/NAME
    python data/imagefolder/prepare.py ROOT --size 256 --out data/NAME --vae
    torchrun --nproc_per_node=8 data/imagefolder/prepare.py ROOT --size 256 --out data/NAME --vae

ROOT/<class>/**/*.{png,jpg,jpeg,webp}; the folder names, sorted, are the classes. Names that start with a dot are not
looked at. Each image becomes an upright 8-bit RGB (or grey) square: halved with a box filter while that leaves it large
enough, then bicubic to the exact short side, then the centre of it (the crop of ADM, arXiv 2105.05233). With --vae the
square and its mirror image are encoded (latents.py), and a run that was killed goes on where it stopped (rows.py).
"""
import argparse
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))  # for whoever does not start this file as a script
from prepared import shuffled
from rows import DONE, PLAN, ROWS, Rows, begin, check_room, fill, torchrun

SEED = 0
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
NAMES = ["images.npy", "labels.npy", "meta.json"]
TEMPS = ["tmp.kept.npy", *(f"tmp.{name}" for name in NAMES), DONE, f"{PLAN}.new", PLAN]

TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
         7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}    # by EXIF's orientation

# -----------------------------------------------------------------------------
# one image

def upright(im):
    """PIL image -> turned as its EXIF says, if that can be read. ImageOps.exif_transpose also writes the EXIF anew, and
    fails at tags that Pillow can read and not write."""
    im.load()
    try: how = TURNS.get(im.getexif().get(0x0112))
    except Exception: how = None                # what is no EXIF says nothing of the pixels
    return im if how is None else im.transpose(how)


def to_rgb(im):
    """PIL image of any mode -> 8-bit "RGB" or "L", upright; what is transparent becomes white. ValueError: mode F."""
    im = upright(im)
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


def read(file, size, gray):
    """Image file -> (what load_image gives, size of the file in bytes, None), or (zeros, 0, why it cannot be read).

    Without a file (None): (zeros, 0, None).
    """
    why = None
    try:
        if file: return load_image(file, size, gray), os.path.getsize(file), None
    except Exception as e:                      # a broken file can make a decoder raise nearly anything
        why = f"{type(e).__name__}: {e}"
    return np.zeros((1 if gray else 3, size, size), np.uint8), 0, why

# -----------------------------------------------------------------------------
# the data set

def refuse(error): raise error                   # os.walk would go on without what it cannot list


def find(root, n_classes=None, class_seed=0):
    """Folder -> (class names, files, int64 labels of the files). ValueError if there is nothing to prepare.

    n_classes: how many of the classes to draw, with class_seed; None takes all.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no class folders; expected {root}/<class>/*.png, .jpg, .jpeg or .webp")
    if n_classes is not None:
        if not 1 <= n_classes <= len(classes):
            raise ValueError(f"{n_classes} classes are asked for, {root} has {len(classes)}")
        drawn = shuffled(np.zeros(len(classes), np.int64), 0, class_seed)[:n_classes]
        classes = [classes[i] for i in sorted(drawn)]
    files, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for folder, subfolders, leaves in os.walk(root / name, onerror=refuse):
            subfolders[:] = [d for d in subfolders if not d.startswith(".")]
            found += [Path(folder, f) for f in leaves
                      if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
        if not found:
            raise ValueError(f"class {name!r} has no images in {root / name}")
        files += map(str, sorted(found))        # sorted: the order of a file system must not decide the shuffle
        labels += [label] * len(found)
    return classes, files, np.array(labels, np.int64)


def n_held_out(share, n):
    return min(round(share * n), n - 1)         # something to train on, always


def prepare(root, size, out, held_out=0.05, flip=True, gray=False, on_error="refuse", workers=1, vae=None, batch=32,
            classes=None, class_seed=0):
    """Write the images of the folder `root`, cropped to size x size, as a prepared set into the folder `out`.

    held_out is a share, in [0, 1); flip, whether training may mirror the images; vae, a hub id or a folder; batch, how
    many images are encoded at once; classes, how many to draw with class_seed (None: all). More than one worker needs
    this file to be importable by its name, as it is when it runs as a script. ValueError for a wrong argument or
    unreadable images. After any error nothing is left; with a VAE all that was encoded, and the next run goes on there.
    """
    out = Path(out)
    if size < 1: raise ValueError(f"size must be at least 1, got {size}")
    if workers < 1: raise ValueError(f"workers must be at least 1, got {workers}")
    if batch < 1: raise ValueError(f"batch must be at least 1, got {batch}")
    if not 0 <= held_out < 1: raise ValueError(f"the held-out share must lie in [0, 1), got {held_out}")
    if on_error not in ("refuse", "skip"): raise ValueError(f"on_error must be refuse or skip, got {on_error!r}")
    if vae and gray: raise ValueError("an autoencoder takes colours: --vae and --gray exclude each other")
    rank, world, _ = team = torchrun()
    if world > 1 and not vae: raise ValueError("torchrun is for --vae; --workers share out pixels")
    taken = (out / "meta.json").exists() or (not (out / PLAN).exists() and any((out / name).exists() for name in NAMES))
    if rank == 0 and taken:
        raise ValueError(f"{out} already holds a prepared set (or part of one); delete it first")

    dtype, shape, encode, about, plan = np.uint8, (1 if gray else 3, size, size), lambda x, files: x, {}, {}
    if vae:
        from latents import Encoder
        encode = Encoder(vae, size, flip)
        dtype, shape, about, plan = np.float16, encode.shape, encode.about, {"weights": encode.weights}
    if classes is not None: about["class_seed"] = class_seed
    names, files, labels = find(root, classes, class_seed)
    listed = "\0".join(file.removeprefix(str(Path(root))).lstrip(os.sep) for file in files)
    plan |= about | {"size": size, "gray": gray, "flip": flip, "held_out": held_out, "batch": batch, "classes": classes,
                     "files": f"{len(files)}, sha256 {hashlib.sha256(os.fsencode(listed)).hexdigest()[:16]}"}
    order = shuffled(labels, n_held_out(held_out, len(files)), SEED)

    made, began, rows = not out.exists(), False, [files[i] for i in order]
    try:
        begin(out, plan, rows, dtype, shape, team)
        began = True
        bad = fill(out, rows, batch, functools.partial(read, size=size, gray=gray), encode, workers, team)
        if rank > 0: return
        filled = out / ROWS
        if bad:
            listing = "".join(f"\n  {file}: {why}" for file, why in sorted((rows[i], why) for i, why in bad.items()))
            if on_error == "refuse":
                kept = "the others are done" if vae else "nothing was written"
                raise ValueError(f"unreadable images: {len(bad)} of {len(files)}; {kept} (--on-error skip leaves them "
                                 f"out):{listing}")
            print(f"left out {len(bad)} unreadable images of {len(files)}:{listing}", file=sys.stderr)
            # Shuffle what is left as if the bad files had never been there, and copy the rows to where they now belong.
            good = np.setdiff1d(np.arange(len(files)), order[list(bad)])
            lost = set(range(len(names))) - set(labels[good].tolist())
            if lost:
                raise ValueError(f"class {names[min(lost)]!r} has no readable images")
            labels, row = labels[good], np.argsort(order)[good]         # row: where each good image lies now
            order = shuffled(labels, n_held_out(held_out, len(labels)), SEED)
            filled = copy_rows(out, row[order])
        meta = {"name": out.resolve().name, "classes": names, "flip": flip,
                "held_out": n_held_out(held_out, len(labels)), "levels": 255, **about}
        if vae: meta["pixels"] = size
        np.save(out / "tmp.labels.npy", labels[order])
        (out / "tmp.meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if filled.exists(): os.replace(filled, out / "images.npy")      # an earlier run may have been killed right here
        for name in NAMES[1:]:                  # meta.json last: it says that the rest is there
            os.replace(out / f"tmp.{name}", out / name)
    except BaseException as e:                  # Ctrl-C too
        if vae and began:
            e.add_note(f"{out} keeps what is done: the same command goes on from there")
        elif rank == 0 and (began or not (out / PLAN).exists()):        # or else it is part of another set
            for name in TEMPS + NAMES: (out / name).unlink(missing_ok=True)
            if made and out.exists() and not any(out.iterdir()): out.rmdir()
        raise
    for name in TEMPS: (out / name).unlink(missing_ok=True)
    images, total = np.load(out / "images.npy", mmap_mode="r"), sum((out / name).stat().st_size for name in NAMES)
    print(f"{out}: {meta['name']}, images {images.shape} {images.dtype}, {len(names)} classes, "
          f"{meta['held_out']} held out, {total / 1e6:.2f} MB")


def copy_rows(out, which):
    """The rows `which` (int, n) of what was filled, in this order, as another .npy file: its path."""
    rows, target = np.load(out / ROWS, mmap_mode="r"), out / "tmp.kept.npy"
    check_room(out, len(which), rows.dtype, rows.shape[1:])
    np.lib.format.open_memmap(target, "w+", rows.dtype, (len(which), *rows.shape[1:]))
    with Rows(target) as kept:
        for i in range(0, len(which), 256): kept.put(i, rows[which[i:i + 256]])
        kept.sync()
    return target


def main():
    parser = argparse.ArgumentParser(description="prepare a folder of images, ROOT/<class>/*.{png,jpg,jpeg,webp}")
    parser.add_argument("root", metavar="ROOT", help="folder with a folder of images for each class")
    parser.add_argument("--size", type=int, required=True, help="height and width of the prepared images")
    parser.add_argument("--out", required=True, help="folder to write; its name becomes the name of the set")
    parser.add_argument("--vae", nargs="?", const="stabilityai/sd-vae-ft-ema", metavar="ID_OR_FOLDER",
                        help="latents of this autoencoder in place of pixels (alone: %(const)s)")
    parser.add_argument("--batch", type=int, default=32, help="images that the autoencoder takes at once (default: 32)")
    parser.add_argument("--held-out", type=float, default=0.05, help="share never trained on (default: 0.05)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="whether training may mirror the images (default: yes)")
    parser.add_argument("--classes", type=int, help="take this many of the classes, drawn at random (default: all)")
    parser.add_argument("--class-seed", type=int, default=0, help="draws the classes (default: 0)")
    parser.add_argument("--gray", action="store_true", help="one channel in place of three")
    parser.add_argument("--on-error", choices=["refuse", "skip"], default="refuse", help="for unreadable images")
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parser.add_argument("--workers", type=int, default=cores, help="processes that read (default: one per core)")
    args = parser.parse_args()
    try:
        prepare(**vars(args))
    except (ValueError, OSError, KeyboardInterrupt) as e:
        message = "\n".join([str(e) or "interrupted", *getattr(e, "__notes__", [])])
        parser.exit(130 if isinstance(e, KeyboardInterrupt) else 2, f"{parser.prog}: error: {message}\n")


if __name__ == "__main__":
    main()
