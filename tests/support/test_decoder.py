"""support/decoder.py: from the numbers of a model to pixels. test_npz.py has its autoencoder."""

import math

import torch
from util import normal

from support.decoder import to_uint8


def rounded(value):
    """DiT's pixel: 127.5 x + 128, rounded down, between 0 and 255."""
    return min(max(math.floor(127.5 * value + 128), 0), 255)


def test_to_uint8_rounds_like_dit():
    values = [-2.0, -1.0, -0.999, 0.0, 0.003, 0.5, 0.99, 1.0, 1.5]
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, 3, 3)
    assert to_uint8(x).dtype == torch.uint8
    assert to_uint8(x).flatten().tolist() == [rounded(v) for v in values]


def test_every_grey_level_survives():
    levels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    assert to_uint8(levels).flatten().tolist() == list(range(256))


def test_to_uint8_puts_the_channels_last():
    x = normal(2, 3, 4, 5)
    out = to_uint8(x)
    assert out.shape == (2, 4, 5, 3) and out.is_contiguous()
    assert out[1, 2, 3, 0] == rounded(x[1, 0, 2, 3].item())
