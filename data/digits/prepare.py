"""scikit-learn's handwritten digits as a prepared data set (data/README.md has the layout).

    python data/digits/prepare.py [--out DIR]

1,797 grey images of 8 x 8 pixels, ten classes, no download. Takes a second.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HELD_OUT = 180
SEED = 0


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


def prepare(out):
    """Write the set into the folder `out`, over an earlier one. ValueError if `out` holds some other set."""
    out = Path(out)
    meta_file = out / "meta.json"
    if meta_file.exists() and json.loads(meta_file.read_text()).get("name") != "digits":
        raise ValueError(f"{out} holds another prepared set; delete it or choose another --out")

    digits = load_digits()
    order = shuffled(digits.target, HELD_OUT)
    images = np.rint(digits.images[order, None] * 255 / 16).astype(np.uint8)    # N 1 8 8; 0..16 becomes 0..255
    labels = digits.target[order].astype(np.int64)
    meta = {"name": "digits", "classes": list("0123456789"), "flip": False, "held_out": HELD_OUT, "levels": 16}

    out.mkdir(parents=True, exist_ok=True)
    names = ["images.npy", "labels.npy", "meta.json"]
    temps = [out / f"tmp.{name}" for name in names]
    try:
        np.save(temps[0], images)
        np.save(temps[1], labels)
        temps[2].write_text(json.dumps(meta, indent=1) + "\n")
        meta_file.unlink(missing_ok=True)       # while the arrays change hands the folder must not look complete
        for temp, name in zip(temps, names):    # meta.json last: it says that the rest is there
            os.replace(temp, out / name)
    except BaseException:                       # Ctrl-C too: leave the earlier set whole, or nothing
        for file in temps + ([] if meta_file.exists() else [out / name for name in names]):
            file.unlink(missing_ok=True)
        raise
    size = sum((out / name).stat().st_size for name in names)
    print(f"{out}: digits, images {images.shape} {images.dtype}, {len(meta['classes'])} classes, "
          f"{HELD_OUT} held out, {size / 1e6:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description="prepare scikit-learn's digits")
    parser.add_argument("--out", default=Path(__file__).parent, help="folder to write (default: this script's)")
    args = parser.parse_args()
    try:
        prepare(args.out)
    except (ValueError, OSError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
