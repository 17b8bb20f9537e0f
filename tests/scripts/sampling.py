"""What the tests of sampling share: eleven images in three chunks."""

import json

import numpy as np

FLAGS = ("--steps=3", "--images=11", "--batch=4")


def read(npz):
    """images, labels and settings of a file of samples."""
    with np.load(npz) as made:
        return made["arr_0"], made["labels"], json.loads(str(made["settings"]))


def differ(a, b):
    """The largest and the mean difference of two arrays of bytes."""
    difference = abs(a.astype(int) - b.astype(int))
    return difference.max(), difference.mean()
