"""Crops of scikit-learn's two photographs as a prepared data set (data/README.md has the layout).

    python data/photos/prepare.py [--out DIR]

4,840 colour images of 32 x 32 pixels, no download. A class is a photograph: china (a pavilion at a
lake) and flower (a dahlia). At patch size 2 an image is 256 tokens, as many as the paper's latents
have. Takes a second.

Each photograph, 427 x 640, is cut into upright strips, 64 pixels wide; every fourth is held out. A
crop lies within neighbouring strips of one kind, so no held-out crop shares a pixel with a training
crop, and both kinds see sky, leaves, pavilion and petals. Crops begin every 9 pixels. This gives
some thousands of them, of which neighbours share 72 %; and as 9 is odd, neither the 8 x 8 blocks of
the JPEG nor the patches lie alike in all crops.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).parent.parent))
from prepared import command, shuffle, write

SIDE, STRIDE, STRIP, SEED = 32, 9, 64, 0


def strips(width, held_out):
    """Ranges of columns: of the strips 0 1 2 | 3 | 4 5 6 | 7 | ... every fourth is held out."""
    if held_out:
        starts = range(3 * STRIP, width, 4 * STRIP)
        return [range(x, min(x + STRIP, width)) for x in starts]
    starts = range(0, width, 4 * STRIP)
    return [range(x, min(x + 3 * STRIP, width)) for x in starts]


def corners(height, width, held_out):
    """The first row and column of every crop, (N, 2)."""
    rows = range(0, height - SIDE + 1, STRIDE)
    columns = []
    for strip in strips(width, held_out):
        columns += strip[: len(strip) - SIDE + 1 : STRIDE]
    return np.array([(y, x) for y in rows for x in columns])


def crops(photograph, held_out):
    """Photograph (H, W, 3) -> its training or held-out crops (N, 3, 32, 32)."""
    found = corners(*photograph.shape[:2], held_out)
    return np.stack([photograph[y : y + SIDE, x : x + SIDE].transpose(2, 0, 1) for y, x in found])


def prepare(out):
    """Write the set into the folder `out`, over an earlier one. ValueError if it holds another."""
    photographs = load_sample_images().images
    images, labels = [], []
    for held_out in (False, True):  # each part is shuffled by itself; the held-out rows come last
        x = [crops(photograph, held_out) for photograph in photographs]
        y = np.repeat(np.arange(len(x)), [len(part) for part in x])
        order = shuffle(len(y), SEED)
        images.append(np.concatenate(x)[order])
        labels.append(y[order])
    meta = {
        "name": "photos",
        "classes": ["china", "flower"],
        "flip": True,
        "held_out": len(labels[1]),
        "levels": 255,
    }
    write(out, np.concatenate(images), np.concatenate(labels).astype(np.int64), meta)


def main():
    command(prepare, Path(__file__).parent, "crops of scikit-learn's two photographs")


if __name__ == "__main__":
    main()
