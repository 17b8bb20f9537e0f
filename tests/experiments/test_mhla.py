"""MHLA against loops over blocks and tokens, and its special cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from loops import TINY, attention, compare, heads_of, projected
from torch.autograd import gradcheck
from util import assert_close, depthwise, linear, normal

from dydilit import PRESETS, linear_attention
from experiments.baselines import preset, variant
from experiments.mhla import block_attention, blocks_per_side, first_mixture, from_blocks, to_blocks


def mhla(side, **changes):
    """An attention of side x side tokens, with a mixture as training keeps it: from 0 to 1."""
    attn = attention("mhla", input_size=2 * side, **changes)
    with torch.no_grad():
        attn.mixture.copy_(normal(*attn.mixture.shape, seed=7).sigmoid())
    return attn


def block_numbers(grid, width):
    """[[numbers of the tokens of a block, row by row] for every block, row by row]."""
    H, W = grid
    blocks = []
    for a, b in np.ndindex(H // width, W // width):
        inside = np.ndindex(width, width)
        blocks.append([(a * width + i) * W + b * width + j for i, j in inside])
    return blocks


def block_loop(q, k, v, mixture, grid, width, normalize):
    """One head of one image, token by token."""
    blocks = block_numbers(grid, width)
    out = np.zeros_like(v)
    for m, mine in enumerate(blocks):
        for w, i in enumerate(mine):
            numerator, denominator = 0.0, 1e-6
            for n, theirs in enumerate(blocks):
                for j in theirs:
                    numerator = numerator + mixture[m, n] * (q[i] @ k[j]) * v[j]
                    denominator += mixture[m, n] * (q[theirs[w]] @ k[j])
            out[i] = numerator / denominator if normalize else numerator
    return out


def mhla_loop(x, grid, s, width, normalize=True):
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * s["norm.weight"] + s["norm.bias"]
    q, k, v = projected(x, s)
    q, k = np.maximum(q, 0) + 1e-6, np.maximum(k, 0) + 1e-6
    parts = zip(heads_of(q, 2), heads_of(k, 2), heads_of(v, 2))
    heads = [block_loop(*z, s["mixture"], grid, width, normalize) for z in parts]
    local = depthwise(v, grid, s["conv.weight"]) + s["conv.bias"]
    return linear(np.concatenate(heads, axis=1) + local, s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("side", "width"), [(4, 2), (6, 3), (3, 3)])
def test_mhla_is_a_loop_over_blocks(side, width, normalize):
    attn = mhla(side, normalize=normalize)
    assert attn.width == width and len(attn.mixture) == (side // width) ** 2
    options = dict(width=width, normalize=normalize)
    compare("mhla", attn, mhla_loop, (side, side), **options)


def test_one_block_is_linear_attention():
    q, k, v = (normal(2, 3, 9, 4, seed=seed).exp() for seed in range(3))
    one = torch.ones(1, 1, dtype=torch.float64)
    got = block_attention(q, k, v, one, (3, 3), 3)
    assert_close("o", got, linear_attention(q, k, v), atol=1e-12)


def test_an_even_mixture_without_denominator_is_linear_attention():
    q, k, v = (normal(2, 3, 24, 4, seed=seed) for seed in range(3))
    even = torch.ones(6, 6, dtype=torch.float64)
    got = block_attention(q, k, v, even, (4, 6), 2, normalize=False)
    assert_close("o", got, linear_attention(q, k, v, normalize=False), atol=1e-12)


def test_a_mixture_of_the_own_block_alone_is_attention_within_blocks():
    q, k, v = (normal(1, 1, 16, 4, seed=seed).exp() for seed in range(3))
    got = block_attention(q, k, v, torch.eye(4, dtype=torch.float64), (4, 4), 2)
    for mine in block_numbers((4, 4), 2):
        want = linear_attention(q[..., mine, :], k[..., mine, :], v[..., mine, :])
        assert_close("block", got[..., mine, :], want, atol=1e-12)


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 2), ((6, 4), 2), ((3, 9), 3), ((2, 2), 1)])
def test_blocks_are_squares_of_neighbours(grid, width):
    x = torch.arange(math.prod(grid)).view(1, 1, -1, 1)
    blocks = to_blocks(x, grid, width)
    assert blocks[0, 0, ..., 0].tolist() == block_numbers(grid, width)
    assert torch.equal(from_blocks(blocks, grid, width), x)


def test_gradcheck_of_block_attention():
    q, k, v = (normal(1, 1, 16, 2, seed=seed).exp().requires_grad_() for seed in range(3))
    mixture = normal(4, 4, seed=3).sigmoid().requires_grad_()
    assert gradcheck(lambda *z: block_attention(*z, (4, 4), 2), (q, k, v, mixture))


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 3)])
def test_the_first_mixture_prefers_near_blocks(rows, columns):
    places = list(np.ndindex(rows, columns))
    near = np.array([[math.dist(a, b) for b in places] for a in places])
    near = 1 - near / near.max()
    assert_close("mixture", first_mixture(rows, columns), near / near.sum(0), atol=1e-7)


def test_the_first_mixture_of_one_block_is_1():
    assert first_mixture(1, 1).tolist() == [[1.0]]


def test_blocks_are_as_many_as_stay_linear():
    """4 blocks a side of 16 tokens and 2 of 14 are MHLA's own: 16 of 16 tokens, 4 of 49."""
    sides = {1: 1, 2: 1, 4: 2, 5: 1, 6: 2, 14: 2, 16: 4, 32: 4, 64: 8}
    assert {side: blocks_per_side(side) for side in sides} == sides


def test_mhla_starts_as_in_its_code():
    attn = replace(variant("MHLA", TINY), depth=1).build().blocks[0].attn
    assert torch.equal(attn.mixture, first_mixture(2, 2))
    v = torch.randn(2, 16, 16)
    assert torch.equal(attn.local(v, (4, 4)), v), "the convolution is the identity"
    assert (attn.norm.weight == 1).all() and not attn.qkv.bias.any()


def test_training_keeps_the_mixture_between_0_and_1():
    attn, x = mhla(4), normal(1, 16, 12)
    with torch.no_grad():
        attn.mixture[0] = torch.tensor([-1.0, 0.5, 2.0, 0.0])
    outside = attn.eval()(x, (4, 4))
    assert attn.mixture[0].tolist() == [-1.0, 0.5, 2.0, 0.0]
    attn.train()(x, (4, 4))
    assert attn.mixture[0].tolist() == [0.0, 0.5, 1.0, 0.0]
    assert torch.equal(attn.eval()(x, (4, 4)), outside)
    attn(x, (4, 4)).sum().backward()
    assert attn.mixture.grad[0].all(), "a weight at the edge can come back"


@pytest.mark.parametrize(("size", "heads"), [("S/2", 6), ("B/2", 8), ("L/2", 12)])
def test_mhla_at_the_papers_sizes(size, heads):
    config = preset(f"MHLA-{size}")
    assert (config.heads, config.feed_forward) == (heads, "mlp")
    assert config.hidden_size == PRESETS[size].hidden_size
    with torch.device("meta"):
        attn = replace(config, depth=1).build().blocks[0].attn
    assert attn.mixture.shape == (16, 16) and attn.width == 4
