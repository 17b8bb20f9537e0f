"""scikit-learn's handwritten digits as a prepared data set (data/README.md has the layout).

    python data/digits/prepare.py [--out DIR]

1,797 grey images of 8 x 8 pixels, ten classes, no download. Takes a second.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent.parent))
from prepared import command, shuffled, write

HELD_OUT, SEED = 180, 0


def prepare(out):
    """Write the set into the folder `out`, over an earlier one. ValueError if it holds another."""
    digits = load_digits()
    order = shuffled(digits.target, HELD_OUT, SEED)
    grey = np.rint(digits.images[order] * 255 / 16).astype(np.uint8)  # 0 .. 16 becomes 0 .. 255
    meta = {
        "name": "digits",
        "classes": list("0123456789"),
        "flip": False,
        "held_out": HELD_OUT,
        "levels": 16,
    }
    write(out, grey[:, None], digits.target[order].astype(np.int64), meta)


def main():
    command(prepare, Path(__file__).parent, "scikit-learn's handwritten digits")


if __name__ == "__main__":
    main()
