"""A .npy file that may be damaged or claim anything: its header is compared with its size first.

For support/prepared.py, support/shards.py and evaluation/images.py. Imports numpy only.
"""

import math
import os

import numpy as np


def read_header(f, size):
    """(shape, whether in Fortran order, dtype) of a .npy of `size` bytes in the open file f.

    f then stands at the first value. ValueError, a predicate such as "is shorter than its header
    says", unless the bytes that follow are the values that the header claims; nothing is allocated
    for them.
    """
    read = np.lib.format.read_array_header_1_0
    try:
        if np.lib.format.read_magic(f) != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(f)
    except Exception as e:  # numpy evaluates the header as Python: errors of many types
        reason = " ".join(str(e).split())
        raise ValueError(f"is no .npy array, or a damaged one ({reason:.100})") from e
    if dtype.hasobject:
        raise ValueError("holds Python objects, expected numbers")
    if any(n < 0 for n in shape):
        raise ValueError(f"has the shape {shape}")
    found, expected = size - f.tell(), math.prod(shape) * dtype.itemsize
    if found != expected:
        than = "shorter" if found < expected else "longer"
        raise ValueError(f"is {than} than its header says: {found} bytes, expected {expected}")
    return shape, fortran, dtype


def open_npy(file):
    """The array of a .npy file, memory-mapped. ValueError, which names the file; OSError."""
    with open(file, "rb") as f:
        try:
            shape, fortran, dtype = read_header(f, os.fstat(f.fileno()).st_size)
        except ValueError as e:
            raise ValueError(f"{file} {e}") from e
        offset = f.tell()
    return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")
