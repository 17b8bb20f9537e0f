"""What the tests of the compared models share: attentions with random weights, loops over tokens.

Nothing above "Models" calls experiments/: the loops are written to be checked by eye.
"""

import math
from dataclasses import replace

import numpy as np
from util import arrays, assert_close, choose, normal, randomized

from dydilit import Config
from experiments.baselines import ATTENTIONS, Baseline, Ladder, variant

GRID = (3, 5)
D = 12  # the width of one attention
TINY = Config(
    input_size=8,
    in_channels=2,
    hidden_size=16,
    depth=2,
    n_projectors=2,
    n_kernels=3,
    n_lambdas=3,
    num_classes=4,
)


def projected(x, s):
    """q, k, v (N, D) of the tokens x (N, D) by one fused layer; s: {parameter's name: array}."""
    return np.split(x @ s["qkv.weight"].T + s.get("qkv.bias", 0), 3, axis=1)


def routed(x, s):
    """Eq. 2: the routed projections of x (N, D) for Q and for K."""
    both = []
    for z in "qk":
        projectors, router = s[f"{z}_projectors"], s[f"{z}_projector_router"]
        both.append(np.stack([token @ projectors[choose(token, router)] for token in x]))
    return both


def heads_of(x, n):
    return np.split(x, n, axis=1)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def softmax_attend(q, k, v):
    """One head, query by query."""
    out = []
    for q_i in q:
        p = softmax(k @ q_i / math.sqrt(len(q_i)))
        out.append(sum(p_j * v_j for p_j, v_j in zip(p, v)))
    return np.stack(out)


def relu(z):
    return np.maximum(z, 0)


# --------------------------------------------------------------------------------------------------
# Models.


def attention(kind, i=0, seed=0, **changes):
    """One attention in float64 with weights that are nowhere special."""
    usual = {"hidden_size": D, "heads": 2, "depth": 3}
    banks = {"n_projectors": 2, "n_kernels": 3, "n_lambdas": 3}
    config = Baseline(**(usual | banks | {"attention": kind} | changes))
    return randomized(ATTENTIONS[kind](config, i), seed)


def rung(name, **changes):
    """The attention of a variant of the ladder, with weights that are nowhere special."""
    base = Config(hidden_size=D, n_projectors=2, n_kernels=3, n_lambdas=3, depth=4)
    return randomized(Ladder(replace(variant(name, base), **changes)))


def compare(name, attn, loop, grid=GRID, **options):
    """attn(x) and loop(tokens of one image, grid, arrays) on two images, in float64."""
    x = normal(2, math.prod(grid), D)
    want = np.stack([loop(tokens, grid, arrays(attn), **options) for tokens in x.numpy()])
    assert_close(name, attn(x, grid), want, atol=1e-10, rtol=1e-10)
