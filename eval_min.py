"""How good samples are: FID, sFID, KID, sKID, IS, precision, recall; of small images, by pixels.

For whoever compares models, and for the end of train_min.py. Imports evaluation/ and support/.

    python eval_min.py samples.npz VIRTUAL_imagenet256_labeled.npz   against a reference of ADM's
    python eval_min.py data/NAME --make-reference reference.npz      such a file of your own images
    python eval_min.py out/digits/samples.npz data/digits            small images, by their pixels

It prints a Markdown table, a row of figures with every setting of the samples beside them.

Samples are an .npz with arr_0, uint8 N x H x W x C, and optionally labels, int64 N, and settings, a
JSON object in a 0-d string array that says how they were made. A reference is any .npz with arr_0,
with mu, sigma, mu_s and sigma_s, or with both; or a prepared folder (data/README.md), held-out rows
included. The figures are defined as in ADM's evaluator and in torch-fidelity; sKID, which has no
public definition, is the KID of the features that sFID uses (evaluation/README.md).
"""

import support

if __name__ == "__main__":
    support.begin()

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.images import (
    MAX_REAL,
    Images,
    from_array,
    make_reference,
    open_images,
    read_set,
)
from evaluation.metrics import (
    KINDS,
    MAX_FIT,
    chosen,
    class_accuracy,
    extract,
    figures,
    inception,
    pixels,
    statistics,
)
from support.lock import one_writer
from support.terminal import run

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "skid": "sKID (KID of sFID's features)",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
}
ON_PIXELS = {
    "fid": "Frechet distance, pixels",
    "kid": "KID, pixels",
    "precision": "precision",
    "recall": "recall",
}
# Columns of the table behind the figures; "-" where the samples' file does not say.
SETTINGS = ("model", "step", "cfg", "cfg_channels", "steps", "sampler", "seed", "vae", "dtype")
MAX_PIXELS = 4096  # H W C; for more, a covariance of pixels is too large and says too little


# --------------------------------------------------------------------------------------------------
# Samples against a reference.


@dataclass
class Comparison:
    """What `assess` finds: {metric: float}, and what the figures are figures of."""

    fake: Images
    real: Images
    pixelwise: bool
    pca: int | None  # principal components of the pixels, if asked for
    figures: dict  # of the samples
    halves: dict  # by pixels: of one half of the real images against the other
    subset: int  # images in a subset of KID
    kept: int  # real images whose features were kept, for KID, precision and recall
    stored: list  # metrics from statistics that the reference has
    missing: dict  # {metric: why it was not computed}


def check(fake, real, pixelwise, pca):
    """ValueError if samples and reference do not fit together, or not these features."""
    size = fake.shape[1:]
    expected = (*real.shape[1:3], int(real.more.get("channels", real.shape[3])))
    if any(real.shape) and size != expected:
        wanted, got = (" x ".join(map(str, s)) for s in (expected, size))
        raise ValueError(f"expected samples of {wanted}, as in {real.name}; got {got}")
    if fake.shape[0] < 2:
        raise ValueError(f"expected at least 2 samples, got {fake.shape[0]}")
    if not pixelwise:
        return
    if real.shape[0] < 4:
        raise ValueError(f"expected at least 4 real images, {real.name} has {real.shape[0]}")
    if np.prod(size) > MAX_PIXELS and not pca:
        raise ValueError(
            f"without --pca pixels are for small images, H*W*C at most {MAX_PIXELS}; "
            f"got {np.prod(size)}"
        )
    if fake.more.get("labels") is not None and real.more.get("classes"):
        check_labels(fake, real)


def check_labels(fake, real):
    n, labels, classes = fake.shape[0], fake.more["labels"], real.more["classes"]
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected {n} integer labels; got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"expected labels in 0..{len(classes) - 1}, the classes of {real.name}; "
            f"got {labels.min()}..{labels.max()}"
        )


def least(metric, subset):
    """How many images a metric needs of each set."""
    return {"kid": subset, "skid": subset, "precision": 4, "recall": 4}.get(metric, 2)


def reasons_against(metrics, fake, real, kept, pixelwise, stored, subset):
    """{metric: why it cannot be computed}"""
    missing = {}
    for metric in metrics:
        need = least(metric, subset)
        have = {fake.name: fake.shape[0]}
        if metric != "is" and metric not in stored:
            have[f"reference {real.name}"] = kept
        few = [f"{name} has {number:,}" for name, number in have.items() if number < need]
        if pixelwise and metric not in ON_PIXELS:
            missing[metric] = f"there is no {NAMES[metric]} of pixels"
        elif few:
            missing[metric] = f"{NAMES[metric]} needs at least {need:,} images; {', '.join(few)}"
    return missing


def assess(
    fake: Images,
    real: Images,
    pixelwise,
    metrics=None,
    pca=None,
    weights=None,
    subset=None,
    most=None,
    batch=64,
    strict=True,
) -> Comparison:
    """Samples against a reference.

    metrics: names of NAMES, all by default. weights: a file of Inception's. subset: images in a
    subset of KID. most: real images whose features are kept. strict: a metric that cannot be
    computed is a ValueError; otherwise it is left out and stands in `missing`.
    """
    check(fake, real, pixelwise, pca)
    n, m = fake.shape[0], real.shape[0]
    if most is None:
        most = MAX_REAL if "classes" in real.more else m
    keep = chosen(m, most)
    kept = int(keep.sum())
    if subset is None:
        subset = min(1000, n, kept // 2) if pixelwise else 1000
    stored = []
    for mu, sigma, frechet, _ in KINDS:
        if mu in real.more and sigma in real.more and not pixelwise:
            stored.append(frechet)
    metrics = list(metrics or (ON_PIXELS if pixelwise else NAMES))
    missing = reasons_against(metrics, fake, real, kept, pixelwise, stored, subset)
    if strict and missing:
        raise ValueError(f"{'; '.join(missing.values())} (see --metrics, --kid-subset-size)")
    metrics = [metric for metric in metrics if metric not in missing]

    network = pixels(real, pca) if pixelwise else inception(weights)
    x, moments = extract(fake, network, batch, quiet=pixelwise)
    y = real_moments = [None, None]
    if not {"is", *stored}.issuperset(metrics):
        y, real_moments = extract(real, network, batch, keep, quiet=pixelwise)

    def stats(i):
        mu, sigma, frechet, _ = KINDS[i]
        if frechet in stored:
            return *moments[i].result(), real.more[mu], real.more[sigma]
        return *moments[i].result(), *real_moments[i].result()

    found, halves = figures(metrics, x, y, stats, subset), {}
    if pixelwise:
        halves = figures_of_halves(metrics, y[0], subset)
        accuracy = accuracy_of(fake, x[0], real, y[0], keep)
        if accuracy is not None:
            found["class_accuracy"] = accuracy
    return Comparison(fake, real, pixelwise, pca, found, halves, subset, kept, stored, missing)


def figures_of_halves(metrics, features, subset):
    """The same metrics between two random halves of the real images, where these are enough."""
    order = np.random.default_rng(0).permutation(len(features))
    a, b = (features[half] for half in np.array_split(order, 2))
    metrics = [metric for metric in metrics if least(metric, subset) <= len(b)]
    return figures(metrics, [a], [b], lambda _: (*statistics(a), *statistics(b)), subset)


def accuracy_of(fake, x, real, y, keep):
    """class_accuracy, or None without labels or with a single class."""
    labels = fake.more.get("labels")
    if labels is None or "classes" not in real.more:
        return None
    real_labels = real.more["labels"][keep]
    if len(np.unique(real_labels[:MAX_FIT])) < 2:
        return None
    return class_accuracy(x, labels, y, real_labels)


def evaluate(samples, labels, data_dir, **options) -> dict:
    """Samples (uint8, N H W C) and labels (int, N, or None) against the pixels of a prepared set.

    Returns frechet_distance, kid, kid_std, precision, recall; with _halves (frechet_halves, ...)
    the same between two random halves of the real images, which is what chance alone costs a
    perfect generator at that number of images; class_accuracy; n; levels; kid_subset_size. A
    figure is None for want of images, labels or a second class. ValueError if the samples do not
    fit the set. options: those of `assess`.
    """
    fake = from_array("samples", samples, labels=labels)
    real = read_set(data_dir)
    found = assess(fake, real, True, strict=False, **options)
    result = {
        "frechet_distance": found.figures.get("fid"),
        "frechet_halves": found.halves.get("fid"),
        "n": len(samples),
        "levels": real.more["levels"],
        "kid_subset_size": found.subset,
    }
    for key in ("kid", "kid_std", "precision", "recall"):
        result[key] = found.figures.get(key)
        result[f"{key}_halves"] = found.halves.get(key)
    result["class_accuracy"] = found.figures.get("class_accuracy")
    return result


def compare(samples, reference, pixelwise=True, pca=None, strict=False, **options) -> Comparison:
    """`assess` for two paths; of large images, unless strict, up to 256 principal components."""
    fake, real = open_images(samples), open_images(reference)
    if not strict and np.prod(fake.shape[1:]) > MAX_PIXELS:
        pca = min(256, real.shape[0])
    return assess(fake, real, pixelwise, pca=pca, strict=strict, **options)


# --------------------------------------------------------------------------------------------------
# What is printed.


def report(samples, reference, pixelwise=True, pca=None, strict=False, **options) -> str:
    """`compare` as Markdown: a row of figures with all settings, and one of real halves."""
    return markdown(compare(samples, reference, pixelwise, pca, strict, **options))


def summary(samples, data_dir) -> str:
    """`compare` of small images in a few lines of at most 80 columns, for a newcomer."""
    return in_short(compare(samples, data_dir))


def in_short(found: Comparison) -> str:
    """The two figures of a Comparison by pixels that say most, and how to read them."""
    rows = [("", "samples", "real halves", "")]
    if "fid" in found.figures:
        half = f"{found.halves['fid']:.2f}" if "fid" in found.halves else ""
        rows.append(("Frechet distance", f"{found.figures['fid']:.2f}", half, "lower is better"))
    if "class_accuracy" in found.figures:
        share = f"{found.figures['class_accuracy']:.1%}".replace("%", " %")
        rows.append(("class accuracy", share, "", "samples recognised as their class"))
    lines = [f"{found.fake.shape[0]:,} samples against {found.real.shape[0]:,} real images:", ""]
    for name, value, half, note in rows:
        lines.append(f"  {name:<16} {value:>9} {half:>13}   {note}".rstrip())
    return "\n".join([*lines, "", "  real halves: half of the real images against the other half"])


def markdown(found: Comparison) -> str:
    """A Comparison as a Markdown table, a line above it, and lines on what was not computed."""
    fake, real = found.fake, found.real
    names = ON_PIXELS | {"class_accuracy": "class accuracy"} if found.pixelwise else NAMES
    names = {key: name for key, name in names.items() if key in found.figures}
    for key in ("kid", "skid"):
        if key in names:
            names[key] += f", subsets of {found.subset:,}"
    settings = dict.fromkeys(SETTINGS, "-") | fake.more.get("settings", {})
    rows = [
        ["samples", *names.values(), "n", *settings],
        ["---", *["---:"] * (len(names) + 1), *["---"] * len(settings)],
        [fake.name, *cells(found.figures, names), f"{fake.shape[0]:,}", *settings.values()],
    ]
    if found.halves:
        number = f"{found.kept // 2:,}"
        rows.append(["real halves", *cells(found.halves, names), number, *[""] * len(settings)])
    lines = [f"{fake.shape[0]:,} samples against {real.name} ({reference_of(found)})\n"]
    for row in rows:
        lines.append(f"| {' | '.join(as_cell(x) for x in row)} |")
    for reason in found.missing.values():
        lines.append(f"\nNot computed: {reason}.")
    if found.pixelwise and "class_accuracy" not in found.figures:
        lines.append("\nNo class accuracy: it needs labels with the samples, and two classes.")
    return "\n".join(lines)


def reference_of(found):
    """What the samples were compared with, in words."""
    number = found.real.shape[0]
    words = [f"{number:,} real images"]
    if found.kept < number:
        words.append(f"{found.kept:,} of them for KID, precision and recall")
    if found.pixelwise:
        if found.pca:
            words.append(f"{found.pca} principal components")
        words.append(f"pixels in 0..{found.real.more.get('levels', 255)}")
    if found.stored:
        words.append(f"{' and '.join(NAMES[key] for key in found.stored)} from stored statistics")
    return ", ".join(words)


def cells(values, names):
    """The figures in the order of names, as text; "" for one that is not there."""
    texts = []
    for key in names:
        text = ""
        if key in values:
            text = f"{round(values[key], 8):.5g}"  # rounded first, so that 3e-13 is 0
        if f"{key}_std" in values:
            text += f" ± {values[f'{key}_std']:.2g}"
        texts.append(text)
    return texts


def as_cell(x):
    return "-" if x is None else " ".join(str(x).replace("|", "/").split())


# --------------------------------------------------------------------------------------------------
# The command line.


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("samples", help=".npz with arr_0 (uint8, N x H x W x C), or a prepared folder")
    option(
        "reference",
        nargs="?",
        help=".npz with arr_0, or with mu, sigma, mu_s, sigma_s, or a prepared folder",
    )
    option(
        "--make-reference",
        metavar="FILE",
        help="write a reference file of the first argument's images",
    )
    option(
        "--features",
        choices=("inception", "pixels"),
        help="default: pixels against a folder of small images, otherwise inception",
    )
    option(
        "--metrics",
        nargs="+",
        choices=NAMES,
        help=f"default: all; for pixels {', '.join(ON_PIXELS)}",
    )
    option(
        "--pca",
        type=int,
        metavar="N",
        help="with pixels: compare N principal components of them",
    )
    option(
        "--inception",
        metavar="FILE",
        help="torch-fidelity's weights; default: from its cache, or downloaded",
    )
    option(
        "--kid-subset-size",
        type=int,
        metavar="N",
        help="images in a subset of KID; default: 1000, for pixels of small sets fewer",
    )
    option(
        "--pr-reference",
        type=int,
        metavar="N",
        help="real images for KID, precision and recall; "
        f"default: at most {MAX_REAL} of a folder, all of a file",
    )
    option(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="images at a time (default %(default)s)",
    )
    return parser


def by_pixels(args):
    """Whether to compare pixels: as --features says, or where the reference has small images."""
    if args.features:
        return args.features == "pixels"
    if args.pca:
        return True
    if args.inception or not Path(args.reference).is_dir():
        return False
    return np.prod(open_images(args.reference).shape[1:]) <= MAX_PIXELS


def command(args):
    numbers = (args.batch, args.pca, args.pr_reference, args.kid_subset_size)
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError("--batch, --pca, --pr-reference and --kid-subset-size must be at least 1")
    if args.make_reference:
        with one_writer(args.make_reference):
            images, network = open_images(args.samples), inception(args.inception)
            make_reference(images, args.make_reference, network, args.batch)
        return
    if not args.reference:
        raise ValueError("the reference, a second argument, is missing (or --make-reference)")
    pixelwise = by_pixels(args)
    if args.pca and not pixelwise:
        raise ValueError("--pca is for --features pixels")
    text = report(
        args.samples,
        args.reference,
        pixelwise,
        args.pca,
        strict=True,
        metrics=args.metrics,
        batch=args.batch,
        weights=args.inception,
        subset=args.kid_subset_size,
        most=args.pr_reference,
    )
    print(text)


def main(argv=None):
    args = command_line().parse_args(argv)
    try:
        command(args)
    except (ValueError, OSError) as e:
        print(f"eval_min.py: error: {' '.join(str(e).splitlines())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
