"""How good samples are: FID, sFID, KID, sKID, IS, precision, recall, as ADM's evaluator and torch-fidelity define them.

    python eval_min.py samples.npz VIRTUAL_imagenet256_labeled.npz      against a reference file of ADM
    python eval_min.py data/NAME --make-reference reference.npz         such a file, from a prepared folder or an .npz
    python eval_min.py out/digits/samples.npz data/digits               small images: what can be had from pixels alone

Samples are an .npz with arr_0, uint8 N x H x W x C, and optionally labels, int64 N, and settings, a JSON object in a
0-d string array that says how they were made. A reference is any .npz with arr_0, with mu, sigma, mu_s and sigma_s, or
with both; or a prepared folder (data/README.md), held-out rows included. sKID has no public definition: it is the KID
of the features that sFID uses. The formulas are in metrics.py.
"""

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metrics import KINDS, MAX_FIT, chosen, class_accuracy, extract, figures, inception, pixels, statistics

NAMES = {"fid": "FID", "sfid": "sFID", "kid": "KID", "skid": "sKID (KID of sFID's features)", "is": "IS",
         "precision": "precision", "recall": "recall"}
ON_PIXELS = {"fid": "Frechet distance, pixels", "kid": "KID, pixels", "precision": "precision", "recall": "recall"}
SETTINGS = ("model", "step", "cfg", "cfg_channels", "steps", "sampler", "seed", "vae", "dtype")  # "-" if not known
MAX_PIXELS = 4096  # H*W*C beyond which a covariance of pixels is too large, and says too little, to be of use
MAX_REAL = 10_000  # real images whose features are kept, or that a reference stores: as many as in ADM's files

# ---------------------------------------------------------------------------------------------------------------------
# Images, in blocks from the first to the last.


@dataclass
class Images:
    """An array, a file or a folder: rows(n) yields its images in blocks of n, uint8 (n, H, W, C)."""

    name: str
    shape: tuple  # N, H, W, C; all 0 for a reference of statistics alone
    rows: Callable
    more: dict  # what else there is: labels, settings, mu, sigma, mu_s, sigma_s, channels; classes, levels of a folder


def expect_images(dtype, shape):
    if dtype != np.uint8 or len(shape) != 4:
        raise ValueError(f"expected samples of uint8, N x H x W x C; got {dtype} of shape {shape}")


def from_array(name, x, **more):
    expect_images(x.dtype, x.shape)
    return Images(name, x.shape, lambda n: (x[i : i + n] for i in range(0, len(x), n)), more)


def read_set(data_dir):
    """Prepared data set (data/README.md) -> Images. ValueError if it is not one."""
    data_dir = Path(data_dir)
    if not (data_dir / "meta.json").is_file():
        raise ValueError(f"{data_dir} is not a prepared data set (no meta.json); see data/README.md")
    try:
        meta = json.loads((data_dir / "meta.json").read_text())
        images, labels = (np.load(data_dir / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
        if images.dtype == np.float16: raise ValueError("these are latents, the metrics are of images")
        if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(f"images are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}")
        if not isinstance(meta, dict) or not {"name", "classes", "levels"} <= meta.keys():
            raise ValueError("meta.json lacks a field")
    except (OSError, EOFError, ValueError) as e:
        raise ValueError(f"{data_dir} is not a prepared data set as data/README.md describes it: {e}") from e
    x = images.transpose(0, 2, 3, 1)
    return from_array(meta["name"], x, labels=labels, classes=meta["classes"], levels=meta["levels"])


@contextmanager
def reading(file):
    """Whatever is wrong with the bytes of a file becomes a ValueError that names it."""
    try: yield
    except (OSError, EOFError, ValueError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{file}: {e}") from e


@contextmanager
def open_array(file):
    """arr_0 of an .npz -> its shape, its dtype, and the file at its first value."""
    with zipfile.ZipFile(file) as z, z.open("arr_0.npy") as f:
        old = np.lib.format.read_magic(f) == (1, 0)
        shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(f)
        if fortran: raise ValueError("arr_0 is in Fortran order")
        size = z.getinfo("arr_0.npy").file_size - f.tell()
        if size != np.prod(shape, dtype=int) * dtype.itemsize: raise ValueError("arr_0 is shorter than its header says")
        yield shape, dtype, f


def stream(file, n):
    """Blocks of n images of an .npz, which is never in memory as a whole."""
    with reading(file), open_array(file) as (shape, _, f):
        for i in range(0, shape[0], n):
            block = (min(n, shape[0] - i), *shape[1:])
            yield np.frombuffer(f.read(int(np.prod(block))), np.uint8).reshape(block)


def read_npz(file):
    """An .npz of samples or of a reference -> Images. ValueError if damaged, or with neither images nor statistics."""
    with reading(file):
        if not Path(file).is_file(): raise ValueError("no such file")
        if not zipfile.is_zipfile(file): raise ValueError("not an .npz file, or a truncated one")
        with np.load(file) as npz:  # reads what is asked for and nothing else
            found = {*npz.files}
            more = {key: npz[key] for key in found & {"labels", "settings", "channels", *KINDS[0], *KINDS[1]}}
        more["settings"] = json.loads(str(more.get("settings", "{}")))
        if not isinstance(more["settings"], dict): raise ValueError("settings is not a JSON object")
        for mu, sigma, *_ in KINDS:
            pair = [more[key] for key in (mu, sigma) if {mu, sigma} <= found]  # checked now: features can take hours
            if pair and (pair[1].shape != pair[0].shape * 2 or not all(np.isfinite(z).all() for z in pair)):
                raise ValueError(f"{mu} and {sigma} are no mean (D) and covariance (D x D), all finite")
        if not found & {"arr_0", "mu", "mu_s"}:
            raise ValueError(f"expected an array arr_0, found {', '.join(npz.files) or 'nothing'}")
        if "arr_0" not in found: return Images(Path(file).name, (0, 0, 0, 0), lambda n: iter(()), more)
        with open_array(file) as (shape, dtype, f):
            if dtype.kind == "f" and np.isnan(np.frombuffer(f.read(), dtype)).any(): raise ValueError("arr_0 has NaN")
            expect_images(dtype, shape)
    return Images(Path(file).name, shape, lambda n: stream(file, n), more)


def open_images(path):
    """A prepared folder or an .npz -> Images."""
    return read_set(path) if Path(path).is_dir() else read_npz(path)


def make_reference(images, file, network, batch=64):
    """Write mu, sigma, mu_s, sigma_s of all images and arr_0, at most MAX_REAL of them, in the layout of ADM's files.

    arr_0 has three channels, since ADM's evaluator takes no others; `channels`, which it ignores, is the true number.
    """
    keep, unfinished = chosen(images.shape[0], MAX_REAL), Path(f"{file}.tmp")
    if len(keep) < 2: raise ValueError(f"a reference needs at least 2 images; {images.name} has {len(keep)}")

    def copied(n):
        seen = 0
        for x in images.rows(n):
            stored = x[keep[seen : seen + len(x)]]
            f.write(np.broadcast_to(stored, (*stored.shape[:3], 3)).tobytes())
            seen += len(x)
            yield x

    try:
        with zipfile.ZipFile(unfinished, "w") as z:
            with z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:  # ZipInfo: undated
                shape = (int(keep.sum()), *images.shape[1:3], 3)
                np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
                _, moments = extract(replace(images, rows=copied), network, batch, np.zeros_like(keep))
            arrays = {"channels": np.array(images.shape[3])}
            for (mu, sigma, *_), moment in zip(KINDS, moments): arrays[mu], arrays[sigma] = moment.result()
            for name, array in arrays.items():
                with z.open(zipfile.ZipInfo(f"{name}.npy"), "w") as f: np.lib.format.write_array(f, array)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Samples against a reference.


def check(fake, real, pixelwise, pca):
    """ValueError, one line, if samples and reference are not images of one kind, or not fit for these features."""
    labels, classes = fake.more.get("labels"), real.more.get("classes")
    size, expected = fake.shape[1:], (*real.shape[1:3], int(real.more.get("channels", real.shape[3])))
    if any(real.shape) and size != expected:
        wanted, got = (" x ".join(map(str, s)) for s in (expected, size))
        raise ValueError(f"expected samples of {wanted}, as in {real.name}; got {got}")
    if fake.shape[0] < 2: raise ValueError(f"expected at least 2 samples, got {fake.shape[0]}")
    if pixelwise and real.shape[0] < 4:
        raise ValueError(f"expected at least 4 real images, {real.name} has {real.shape[0]}")
    if pixelwise and np.prod(size) > MAX_PIXELS and not pca:
        raise ValueError(f"without --pca pixels are for small images, H*W*C at most {MAX_PIXELS}; got {np.prod(size)}")
    if pixelwise and labels is not None and classes:
        if labels.shape != fake.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"expected {fake.shape[0]} integer labels; got {labels.dtype} of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"expected labels in 0..{len(classes) - 1}, the classes of {real.name}; "
                             f"got {labels.min()}..{labels.max()}")


def assess(fake, real, pixelwise, metrics=None, pca=None, weights=None, subset=None, most=None, batch=64, strict=True):
    """Samples against a reference, both Images -> figures of the samples; on pixels, figures of one half of the real
    images against the other; {subset, kept: sizes, stored: metrics from stored statistics, missing: {metric: why}}, the
    last a ValueError if strict."""
    check(fake, real, pixelwise, pca)
    n, m = fake.shape[0], real.shape[0]
    keep = chosen(m, most or (MAX_REAL if "classes" in real.more else m))
    metrics, kept = metrics or (ON_PIXELS if pixelwise else NAMES), int(keep.sum())
    subset = subset or (min(1000, n, kept // 2) if pixelwise else 1000)
    stored = [kind[2] for kind in KINDS if {*kind[:2]} <= real.more.keys() and not pixelwise]
    least, missing = {"kid": subset, "skid": subset, "precision": 4, "recall": 4}, {}
    for metric in metrics:
        have = {fake.name: n} | ({} if metric in ("is", *stored) else {f"reference {real.name}": kept})
        few = [f"{name} has {number:,}" for name, number in have.items() if number < least.get(metric, 2)]
        if pixelwise and metric not in ON_PIXELS: missing[metric] = f"there is no {NAMES[metric]} of pixels"
        elif few: missing[metric] = f"{NAMES[metric]} needs at least {least.get(metric, 2):,} images; {', '.join(few)}"
    if strict and missing: raise ValueError(f"{'; '.join(missing.values())} (see --metrics, --kid-subset-size)")
    metrics = [metric for metric in metrics if metric not in missing]

    network = pixels(real, pca) if pixelwise else inception(weights)
    x, moments = extract(fake, network, batch, quiet=pixelwise)
    y = real_moments = [None, None]
    if not {*metrics} <= {"is", *stored}: y, real_moments = extract(real, network, batch, keep, quiet=pixelwise)

    def stats(i):
        mu, sigma, frechet, _ = KINDS[i]
        of_real = (real.more[mu], real.more[sigma]) if frechet in stored else real_moments[i].result()
        return *moments[i].result(), *of_real

    out, halves = figures(metrics, x, y, stats, subset), {}
    if pixelwise:
        a, b = (y[0][half] for half in np.array_split(np.random.default_rng(0).permutation(kept), 2))
        metrics = [metric for metric in metrics if len(b) >= least.get(metric, 2)]
        halves = figures(metrics, [a], [b], lambda i: (*statistics(a), *statistics(b)), subset)
        labels, real_labels = fake.more.get("labels"), real.more.get("labels")
        if "classes" in real.more and labels is not None and len(np.unique(real_labels[keep][:MAX_FIT])) > 1:
            out["class_accuracy"] = class_accuracy(x[0], labels, y[0], real_labels[keep])
    return out, halves, {"subset": subset, "kept": kept, "stored": stored, "missing": missing}


def evaluate(samples, labels, data_dir, **options):
    """Samples (uint8, N H W C) and labels (int, N, or None) against the pixels of a prepared set -> dict.

    frechet_distance, kid, kid_std, precision, recall; with _halves (frechet_halves, ...) the same between two random
    halves of the real images: what chance alone costs a perfect generator at that number of images; class_accuracy; n;
    levels; kid_subset_size. None for want of images, labels or a second class. ValueError if they do not fit the set.
    """
    real = read_set(data_dir)
    out, halves, about = assess(from_array("samples", samples, labels=labels), real, True, strict=False, **options)
    found = {"frechet_distance": out.get("fid"), "frechet_halves": halves.get("fid"), "n": len(samples),
             "levels": real.more["levels"], "kid_subset_size": about["subset"]}
    for key in ("kid", "kid_std", "precision", "recall"):
        found |= {key: out.get(key), f"{key}_halves": halves.get(key)}
    return found | {"class_accuracy": out.get("class_accuracy")}


def report(samples, reference, pixelwise=True, pca=None, strict=False, **options):
    """`assess` for two paths, as Markdown: a row of figures with every setting beside them, and one of real halves."""
    fake, real = open_images(samples), open_images(reference)
    if not strict and np.prod(fake.shape[1:]) > MAX_PIXELS: pca = min(256, real.shape[0])  # no error after training
    out, halves, about = assess(fake, real, pixelwise, pca=pca, strict=strict, **options)
    what = f"{real.shape[0]:,} real images"
    if about["kept"] < real.shape[0]: what += f", {about['kept']:,} of them for KID, precision and recall"
    if pixelwise: what += f", {pca} principal components" * bool(pca) + f", pixels in 0..{real.more.get('levels', 255)}"
    if about["stored"]: what += f", {' and '.join(NAMES[key] for key in about['stored'])} from stored statistics"
    names = ON_PIXELS | {"class_accuracy": "class accuracy"} if pixelwise else NAMES
    names = {k: name + f", subsets of {about['subset']:,}" * ("kid" in k) for k, name in names.items() if k in out}
    settings = dict.fromkeys(SETTINGS, "-") | fake.more.get("settings", {})

    def cells(found):  # rounded first, so that 3e-13 is 0
        return [f"{round(found[key], 8):.5g}" + (f" ± {found[std]:.2g}" if (std := f"{key}_std") in found else "")
                if key in found else "" for key in names]

    rows = [["samples", *names.values(), "n", *settings],
            ["---", *["---:"] * (len(names) + 1), *["---"] * len(settings)],
            [fake.name, *cells(out), f"{fake.shape[0]:,}", *settings.values()]]
    if halves: rows.append(["real halves", *cells(halves), f"{about['kept'] // 2:,}", *[""] * len(settings)])
    clean = [["-" if x is None else " ".join(str(x).replace("|", "/").split()) for x in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in clean]
    lines += [f"\nNot computed: {reason}." for reason in about["missing"].values()]
    if pixelwise and "class_accuracy" not in out:
        lines.append("\nNo class accuracy: it needs labels with the samples, and at least two classes.")
    return "\n".join([f"{fake.shape[0]:,} samples against {real.name} ({what})\n", *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("samples", help=".npz with arr_0 (uint8, N x H x W x C), or a prepared folder")
    option("reference", nargs="?", help=".npz with arr_0, or with mu, sigma, mu_s, sigma_s, or a prepared folder")
    option("--make-reference", metavar="FILE", help="write a reference file of the first argument's images")
    option("--features", choices=("inception", "pixels"), help="default: pixels against a folder of small images")
    option("--metrics", nargs="+", choices=NAMES, help=f"default: all; for pixels {', '.join(ON_PIXELS)}")
    option("--pca", type=int, metavar="N", help="with pixels: compare N principal components of them")
    option("--inception", metavar="FILE", help="torch-fidelity's weights; default: from its cache, or downloaded")
    option("--kid-subset-size", type=int, metavar="N", help="default: 1000; of pixels, fewer for small sets")
    option("--pr-reference", type=int, metavar="N", help=f"real images kept; default: {MAX_REAL} of a folder, else all")
    option("--batch", type=int, default=64, metavar="N", help="images at a time (default %(default)s)")
    args = parser.parse_args()
    try:
        if any(x is not None and x < 1 for x in (args.batch, args.pca, args.pr_reference, args.kid_subset_size)):
            raise ValueError("--batch, --pca, --pr-reference and --kid-subset-size must be at least 1")
        if file := args.make_reference:
            return make_reference(open_images(args.samples), file, inception(args.inception), args.batch)
        if not args.reference: raise ValueError("the reference, a second argument, is missing (or --make-reference)")
        small = Path(args.reference).is_dir() and np.prod(open_images(args.reference).shape[1:]) <= MAX_PIXELS
        pixelwise = args.features == "pixels" if args.features else bool(args.pca) or (small and not args.inception)
        if args.pca and not pixelwise: raise ValueError("--pca is for --features pixels")
        print(report(args.samples, args.reference, pixelwise, args.pca, True, metrics=args.metrics, batch=args.batch,
                     weights=args.inception, subset=args.kid_subset_size, most=args.pr_reference))
    except (ValueError, OSError) as e:
        print(f"eval_min.py: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
