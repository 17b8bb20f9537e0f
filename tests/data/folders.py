"""What the tests of imagefolder share: folders of images, good and bad, and the command line."""

import io
import os
import subprocess
import sys

import numpy as np
from PIL import Image
from runs import ROOT


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_root(root, counts, size=8):
    """A class folder for each entry of counts; an image is one flat colour, (class, number, 7)."""
    for label, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (size, size), (label, i, 7)).save(root / name / f"{i:03d}.png")
    return root


def spoil(root):
    """Put three unreadable files into the classes a and b, and return their names."""
    good = noise(64, 64, 3)
    (root / "a" / "empty.png").write_bytes(b"")
    for name, kind in (("cut.jpg", "JPEG"), ("cut.png", "PNG")):
        im = io.BytesIO()
        Image.fromarray(good).save(im, kind)
        (root / "b" / name).write_bytes(im.getvalue()[: len(im.getvalue()) // 2])
    return ["empty.png", "cut.jpg", "cut.png"]


def run_prepare(name, *args):
    """python data/NAME/prepare.py with these arguments, finished."""
    command = [sys.executable, ROOT / "data" / name / "prepare.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def fail_at(monkeypatch, call, error):
    """Make the call-th os.replace() raise `error`. Returns the list of calls."""
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    return calls
