"""A folder of images as a prepared data set (data/README.md has the layout): pixels or latents.

    python data/imagefolder/prepare.py ROOT --size 64 --out data/NAME
    python data/imagefolder/prepare.py ROOT --size 256 --out data/NAME --vae
    torchrun --nproc_per_node=8 data/imagefolder/prepare.py ROOT --size 256 --out data/NAME --vae

ROOT/<class>/**/*.png, or any other format that Pillow reads; the folder names, sorted, are the
classes. What is skipped is counted and said. Of an animation the first frame is taken. Each image
becomes an upright 8-bit RGB (or grey) square by the crop of ADM
(arXiv 2105.05233): it is halved with a box filter while that leaves it large enough, resized by
bicubic interpolation to the exact short side, and cut to the centre. With --vae the square and its
mirror image are encoded (latents.py), and a run that was killed continues (rows.py).
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import stat
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))  # where this file is imported, not started
from prepared import NAMES, one_writer, print_anything, shuffled, summary
from rows import DONE, PLAN, ROWS, Rows, begin, check_room, count_animated, fill, give_up, torchrun

SEED = 0
# Pillow knows these formats by name; it cannot decode them, or has another program do it.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
TEMPS = ["tmp.kept.npy", *(f"tmp.{name}" for name in NAMES), DONE, f"{PLAN}.new", PLAN]
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"

ORIENTATION = 0x0112  # the tag of EXIF
TURN = Image.Transpose
TURNS = {
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}

# ----------------------------------------------------------------------------------------------
# One image.


def upright(im):
    """PIL image -> turned as its EXIF says; as it is if the EXIF cannot be read.

    ImageOps.exif_transpose fails at tags that Pillow can read and not write: it writes the EXIF
    again.
    """
    im.load()
    try:
        how = TURNS.get(im.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF says nothing of the pixels
        how = None
    return im if how is None else im.transpose(how)


def to_rgb(im):
    """PIL image of any mode -> 8-bit "RGB" or "L", upright; transparent parts become white.

    ValueError for mode F.
    """
    im = upright(im)
    if im.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips it at 255. (It scales 16-bit colour to 8 bits.)
        x = np.asarray(im).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((x + 128) // 257).astype(np.uint8))  # round(x / 257)
    if im.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if im.has_transparency_data:  # an alpha channel, or a transparent colour of a palette or PNG
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")


LONGEST = 16  # of an image that is enlarged, in short sides


def without_ends(im):
    """The middle of a very long image: enlarged as a whole, 30000 x 1 pixels take gigabytes."""
    most = LONGEST * min(im.size)
    # an even number of pixels goes, so that the centre stays where it is
    x, y = (max(0, (side - most) // 2) for side in im.size)
    return im.crop((x, y, im.width - x, im.height - y))


def centre_crop(im, size):
    """PIL image -> the central size x size square of it, once its short side is `size`."""
    while min(im.size) >= 2 * size:
        im = im.resize((im.width // 2, im.height // 2), Image.Resampling.BOX)
    if min(im.size) < size and max(im.size) > LONGEST * min(im.size):
        im = without_ends(im)
    scale = size / min(im.size)
    w, h = (max(size, round(s * scale)) for s in im.size)
    im = im.resize((w, h), Image.Resampling.BICUBIC)
    x, y = (w - size) // 2, (h - size) // 2
    return im.crop((x, y, x + size, y + size))


def load_image(file, size, gray=False):
    """Image file -> uint8, C x size x size, of its first frame. It raises what Pillow raises."""
    return load(file, size, gray)[0]


def load(file, size, gray):
    """Image file -> (uint8, C x size x size, of its first frame; whether it has more frames)."""
    with Image.open(file) as im:
        square = centre_crop(to_rgb(im), size).convert("L" if gray else "RGB")
        try:
            animated = bool(getattr(im, "is_animated", False))
        except Exception:  # damage behind the first frame
            animated = True
    return np.atleast_3d(np.asarray(square)).transpose(2, 0, 1), animated


def read(file, size, gray):
    """Image file -> (array, size of the file in bytes, whether it is animated, None).

    (zeros, 0, False, the reason) if it cannot be read; (zeros, 0, False, None) if `file` is None.
    """
    why = None
    try:
        if file:
            image, animated = load(file, size, gray)
            return image, os.path.getsize(file), animated, None
    except Exception as e:  # a broken file can make a decoder raise nearly anything
        why = f"{type(e).__name__}: {e}"
    return np.zeros((1 if gray else 3, size, size), np.uint8), 0, False, why


# ----------------------------------------------------------------------------------------------
# The images of a folder.


@functools.cache
def suffixes():
    """The ends of file names that Pillow reads, with their dots."""
    found = Image.registered_extensions().items()
    readable = {"MPO", *Image.OPEN} - NOT_DECODED
    return {suffix for suffix, kind in found if kind in readable}


def refuse(error):
    raise error  # os.walk goes on by itself without a folder that it cannot list


def normal(name):
    """A name as text that every file system shares.

    macOS may split an accented letter in two; bytes that are no UTF-8 are written out.
    """
    return unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


def find_class(folder, skipped):
    """The image files of a class folder, at any depth, sorted: a file system has its own order.

    Adds what it leaves out to the Counter `skipped`, {reason: number}. ValueError if parts of a
    data set, such as train and test, lie in it.
    """
    found = []
    for parent, subfolders, leaves in os.walk(folder, onerror=refuse):
        parts = sorted(filter(is_split, subfolders))
        if len(parts) > 1:
            part = min(parts, key=lambda name: not name.casefold().startswith("train"))
            link = os.path.abspath(os.path.join(parent, part)), f"NEW/{folder.name}"
            raise ValueError(
                f"{parent} has parts of a data set in it ({', '.join(parts)}), a class would mix "
                f"them; link one part of each class into a new folder: ln -s {shlex.join(link)}"
            )
        for name in subfolders:
            if name.startswith("."):
                skipped["names with a dot in front"] += 1
            elif os.path.islink(os.path.join(parent, name)):
                skipped["links to folders"] += 1
        subfolders[:] = [d for d in subfolders if not d.startswith(".")]
        for name in leaves:
            reason = reason_to_skip(parent, name)
            if reason:
                skipped[reason] += 1
            else:
                found.append(Path(parent, name))
    return list(map(str, sorted(found, key=lambda file: (Path(normal(str(file))), file))))


def reason_to_skip(parent, name):
    """Why a file is no image of a class; None if it is one."""
    if name.startswith("."):
        return "names with a dot in front"
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in suffixes():
        return f"files *{suffix}, which Pillow does not read" if suffix else "files without suffix"
    with suppress(OSError):  # a broken link: it cannot be read, and will be listed
        if not stat.S_ISREG(os.stat(os.path.join(parent, name)).st_mode):
            return "pipes, sockets or devices"
    return None


def class_folders(root, skipped):
    """The class folders of `root`, {name: folder}, sorted by name."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    folders = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            skipped["names with a dot in front"] += 1
        elif entry.is_dir():
            folders.append(entry)
        else:
            skipped[f"files in {root} itself, outside the class folders"] += 1
    refuse_equal_names(root, folders)
    return {normal(d.name): d for d in sorted(folders, key=lambda d: normal(d.name))}


def refuse_equal_names(folder, paths):
    """ValueError if two names in a folder differ in the encoding of a letter alone."""
    seen = {}
    for path in paths:
        other = seen.setdefault(normal(str(path)), path)
        if other is not path:
            names = " and ".join(ascii(os.path.relpath(p, folder)) for p in (other, path))
            raise ValueError(
                f"{folder} has one name in two Unicode forms, {names}; rename or delete one"
            )


def find(root, n_classes=None, class_seed=0):
    """Folder -> (class names, files, int64 labels of the files, what was skipped).

    n_classes: how many of the classes to draw, with class_seed; None takes all. The last is a
    Counter, {reason: number}. ValueError if there is nothing to prepare.
    """
    root, skipped = Path(root), Counter()
    folders = class_folders(root, skipped)
    classes = list(folders)
    if not classes:
        raise ValueError(f"{root} has no class folders; expected {root}/<class>/*.png and the like")
    if n_classes is not None:
        if not 1 <= n_classes <= len(classes):
            raise ValueError(f"{n_classes} classes are asked for, {root} has {len(classes)}")
        drawn = shuffled(np.zeros(len(classes), np.int64), 0, class_seed)[:n_classes]
        classes = [classes[i] for i in sorted(drawn)]
    files, labels = [], []
    for label, name in enumerate(classes):
        before = skipped.copy()
        found = find_class(folders[name], skipped)
        if not found:
            others = listed(skipped - before)
            raise ValueError(
                f"class {name!r} has no images in {folders[name]}" + (others and f", only {others}")
            )
        refuse_equal_names(root, found)
        files += found
        labels += [label] * len(found)
    return classes, files, np.array(labels, np.int64), skipped


def listed(skipped):
    return "; ".join(f"{reason} ({n})" for reason, n in sorted(skipped.items()))


def refuse_splits(root, options):
    """ValueError, with the command that is meant, if the class folders are train, val and so on.

    A class may have such a name: two of them are needed, or a single one with folders in it.
    """
    folders = class_folders(Path(root), Counter())
    while len(folders) == 1 and not any(map(is_split, folders)):  # an archive in a folder
        folders = class_folders(*folders.values(), Counter())
    splits = [folder for name, folder in folders.items() if is_split(name)]
    nested = [folder for folder in splits if any(d.is_dir() for d in folder.iterdir())]
    alone = len(splits) == len(folders)
    if (len(splits) > 1 and (alone or nested)) or (alone and nested):
        training = [folder for folder in splits if folder.name.casefold().startswith("train")]
        meant = shlex.join(map(str, [(training or nested or splits)[0], *options]))
        names = ", ".join(folder.name for folder in splits)
        raise ValueError(
            f"the folders in {splits[0].parent} are parts of a data set, not classes ({names}); "
            f"prepare one: python data/imagefolder/prepare.py {meant}"
        )


def is_split(name):
    """Whether a folder is named as a part of a data set: train, val2017, test_1."""
    return name.casefold().rstrip("_-0123456789") in SPLITS


def fingerprint(root, files):
    """Number and digest of the files' names below `root`, which may move between two runs."""
    names = [normal(file.removeprefix(str(Path(root))).lstrip(os.sep)) for file in files]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    return f"{len(files)}, sha256 {digest}"


def n_held_out(share, n):
    return min(round(share * n), n - 1)  # at least one image to train on


# ----------------------------------------------------------------------------------------------
# The data set.


def one_at_a_time(prepare):
    """`prepare` as the only writer in its folder. The folder goes again if it is left empty.

    Of several ranks the first makes and holds it for all.
    """

    @functools.wraps(prepare)
    def alone(root, size, out, *arguments, **options):
        if os.environ.get("RANK", "0") != "0":
            prepare(root, size, out, *arguments, **options)
            return
        made = not os.path.exists(out)
        os.makedirs(out, exist_ok=True)
        try:
            with one_writer(out):
                prepare(root, size, out, *arguments, **options)
        finally:
            if made:
                with suppress(OSError):  # it holds something
                    os.rmdir(out)

    return alone


@one_at_a_time
def prepare(
    root, size, out, held_out=0.05, flip=True, gray=False, on_error="refuse", workers=1,
    vae=None, batch=32, classes=None, class_seed=0,
):  # fmt: skip
    """Write the images of the folder `root`, cropped to size x size, as a set into `out`.

    held_out: share, in [0, 1). flip: whether training may mirror the images. on_error: "refuse" or
    "skip" unreadable images. workers: processes that read; with more than one, this file must be
    importable by its name, as it is when it runs as a script. vae: hub id or folder of an
    autoencoder; None keeps pixels. batch: images encoded at once. classes: how many to draw with
    class_seed; None takes all.

    ValueError for a wrong argument or unreadable images; BlockedError, an OSError, while another
    process prepares a set into `out`. An error leaves nothing; with a VAE it leaves all that was
    encoded, and the next run goes on there.
    """
    out = Path(out)
    check_arguments(size, held_out, gray, on_error, workers, vae, batch)
    rank, world, _ = team = torchrun()
    if world > 1 and not vae:
        raise ValueError("torchrun is for --vae; --workers share out pixels")
    refuse_splits(root, [f"--size={size}", "--out", out, *(["--vae", vae] if vae else [])])
    if rank == 0:
        check_free(out)
    if vae:
        from latents import Encoder  # torch and diffusers

        encode = Encoder(vae, size, flip)
        dtype, shape = np.float16, encode.shape
        about, plan = encode.about, {"weights": encode.weights}
    else:
        encode = keep_pixels
        dtype, shape = np.uint8, (1 if gray else 3, size, size)
        about, plan = {}, {}
    if classes is not None:
        about["class_seed"] = class_seed
    names, files, labels, skipped = find(root, classes, class_seed)
    if skipped and rank == 0:
        print(f"left out: {listed(skipped)}", file=sys.stderr, flush=True)
    plan |= about | {
        "size": size,
        "gray": gray,
        "flip": flip,
        "held_out": held_out,
        "batch": batch,
        "classes": classes,
        "files": fingerprint(root, files),
    }
    order = shuffled(labels, n_held_out(held_out, len(files)), SEED)
    ordered = [files[i] for i in order]

    began = False
    try:
        begin(out, plan, ordered, dtype, shape, team)
        began = True
        read_one = functools.partial(read, size=size, gray=gray)
        bad = fill(out, ordered, batch, read_one, encode, workers, team)
        if rank > 0:
            return
        filled = out / ROWS
        if bad:
            report_unreadable(ordered, bad, on_error, kept=bool(vae))
            filled, labels, order = leave_out(out, bad, names, labels, order, held_out)
        meta = {
            "name": normal(out.resolve().name),
            "classes": names,
            "flip": flip,
            "held_out": n_held_out(held_out, len(labels)),
            "levels": 255,
            **about,
        }
        if vae:
            meta["pixels"] = size
        put_in_place(out, filled, labels[order], meta)
    except BaseException as e:  # Ctrl-C too
        if vae and began:
            e.add_note(f"{out} keeps what is done: the same command goes on from there")
        elif rank == 0 and (began or not (out / PLAN).exists()):  # else it is part of another set
            remove(out, TEMPS + NAMES)
        raise
    if animated := count_animated(out):
        print(f"of several frames the first was taken, in files: {animated}", file=sys.stderr)
    remove(out, TEMPS)
    print(summary(out, np.load(out / "images.npy", mmap_mode="r"), meta))


def keep_pixels(images, files):
    """The encoder of a set of pixels."""
    return images


def check_arguments(size, held_out, gray, on_error, workers, vae, batch):
    for name, value in {"size": size, "workers": workers, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= held_out < 1:
        raise ValueError(f"the held-out share must lie in [0, 1), got {held_out}")
    if on_error not in ("refuse", "skip"):
        raise ValueError(f"on_error must be refuse or skip, got {on_error!r}")
    if vae and gray:
        raise ValueError("an autoencoder takes colours: --vae and --gray exclude each other")


def check_free(out):
    """ValueError if `out` holds a set, or files of one that no plan explains."""
    begun = (out / PLAN).exists()
    parts = any((out / name).exists() for name in NAMES)
    if (out / "meta.json").exists() or (parts and not begun):
        raise ValueError(f"{out} already holds a prepared set (or part of one); delete it first")


def report_unreadable(files, bad, on_error, kept):
    """List the unreadable images, {row: why}: as an error, or on stderr if they are skipped.

    kept: whether the rows of the others stay on the disk after the error.
    """
    pairs = sorted((files[i], why) for i, why in bad.items())
    listing = "".join(f"\n  {file}: {why}" for file, why in pairs)
    if on_error == "refuse":
        others = "the others are done" if kept else "nothing was written"
        raise ValueError(
            f"unreadable images: {len(bad)} of {len(files)}; {others} "
            f"(--on-error skip leaves them out):{listing}"
        )
    print(f"left out {len(bad)} unreadable images of {len(files)}:{listing}", file=sys.stderr)


def leave_out(out, bad, names, labels, order, held_out):
    """The set without the rows `bad`, as if their files had never been there.

    The other images are shuffled again, and their rows copied to the new places. Returns the file
    of rows, the labels and the order. ValueError if a class loses all its images.
    """
    good = np.setdiff1d(np.arange(len(labels)), order[list(bad)])
    lost = set(range(len(names))) - set(labels[good].tolist())
    if lost:
        raise ValueError(f"class {names[min(lost)]!r} has no readable images")
    row = np.argsort(order)[good]  # where each good image lies now
    labels = labels[good]
    order = shuffled(labels, n_held_out(held_out, len(labels)), SEED)
    return copy_rows(out, row[order]), labels, order


def copy_rows(out, which):
    """The filled rows `which` (int, n), in this order, as another .npy file; returns its path."""
    rows, target = np.load(out / ROWS, mmap_mode="r"), out / "tmp.kept.npy"
    check_room(out, len(which), rows.dtype, rows.shape[1:])
    np.lib.format.open_memmap(target, "w+", rows.dtype, (len(which), *rows.shape[1:]))
    with Rows(target) as kept:
        for i in range(0, len(which), 256):
            kept.put(i, rows[which[i : i + 256]])
        kept.sync()
    return target


def put_in_place(out, filled, labels, meta):
    """Give the three files their names, meta.json last: it says that the others are there."""
    np.save(out / "tmp.labels.npy", labels)
    (out / "tmp.meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(filled, out / "images.npy")
    for name in NAMES[1:]:
        os.replace(out / f"tmp.{name}", out / name)


def remove(out, names):
    for name in names:
        (out / name).unlink(missing_ok=True)


def parser():
    p = argparse.ArgumentParser(
        description="prepare a folder of images, ROOT/<class>/*.png and whatever Pillow reads"
    )
    add = p.add_argument
    add("root", metavar="ROOT", help="folder with a folder of images for each class")
    add("--size", type=int, required=True, help="height and width of the prepared images")
    add("--out", required=True, help="folder to write; its name becomes the name of the set")
    add(
        "--vae",
        nargs="?",
        const=DEFAULT_VAE,
        metavar="ID_OR_FOLDER",
        help="latents of this autoencoder in place of pixels (alone: %(const)s)",
    )
    add("--batch", type=int, default=32, help="images encoded at once (default: 32)")
    add("--held-out", type=float, default=0.05, help="share never trained on (default: 0.05)")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether training may mirror the images (default: yes)",
    )
    add("--classes", type=int, help="draw this many of the classes at random (default: all)")
    add("--class-seed", type=int, default=0, help="seed of that draw (default: 0)")
    add("--gray", action="store_true", help="one channel in place of three")
    on_error = {"choices": ["refuse", "skip"], "default": "refuse"}
    add("--on-error", **on_error, help="what to do about unreadable images (default: refuse)")
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--workers", type=int, default=cores, help="processes that read (default: one per core)")
    return p


def main():
    p = parser()
    print_anything()
    try:
        prepare(**vars(p.parse_args()))
    except (ValueError, OSError, KeyboardInterrupt) as e:
        message = "\n".join([str(e) or "interrupted", *getattr(e, "__notes__", [])])
        status = 130 if isinstance(e, KeyboardInterrupt) else 2
        p.exit(status, f"{p.prog}: error: {message}\n")


def one_of_several():
    """`main` under torchrun, where one process prints an error for all."""
    from support.terminal import first_speaks, leave_group  # torch

    p = parser()
    print_anything()
    try:
        with first_speaks():
            args = p.parse_args()
        prepare(**vars(args))
    except (ValueError, OSError, KeyboardInterrupt) as e:
        give_up()
        message = "\n".join([str(e) or "interrupted", *getattr(e, "__notes__", [])])
        leave_group(f"{p.prog}: error: {message}")
    except SystemExit as e:
        leave_group(e.code)


if __name__ == "__main__":
    one_of_several() if "TORCHELASTIC_RUN_ID" in os.environ else main()
