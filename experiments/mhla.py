"""Linear attention over blocks of tokens: the functions of MHLA (Zhang et al., ICLR 2026).

For readers of baselines.py, whose class MHLA has the projections around them. Imports torch only.
Written from facts of MHLA's public code (DAGroup-PKU/MHLA, mhla_dit); no code was copied.
"""

import torch


def blocks_per_side(side):
    """Into how many blocks a side of `side` tokens is divided: the most with M^2 <= N.

    M blocks of an image of N tokens cost M^2 mixtures, so up to there the whole stays linear in N.
    It gives MHLA's own numbers: 4 for 16 tokens, 2 for 14. A side without a divisor that small has
    one block, and the attention is plain linear attention.
    """
    return max(n for n in range(1, side + 1) if side % n == 0 and n**2 <= side)


def to_blocks(x, grid, width):
    """Tokens (..., H W, d) -> blocks of width x width tokens (..., M, width^2, d), row by row."""
    H, W = grid
    x = x.unflatten(-2, (H // width, width, W // width, width))
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def from_blocks(x, grid, width):
    """The inverse of to_blocks."""
    H, W = grid
    x = x.unflatten(-3, (H // width, W // width)).unflatten(-2, (width, width))
    return x.transpose(-4, -3).flatten(-5, -2)


def block_attention(q, k, v, mixture, grid, width, normalize=True, eps=1e-6):
    """q, k >= 0 (..., N, d), v (..., N, e), mixture (M, M) -> (..., N, e).

    Block m has the summary S_m = sum_j k_j^T v_j over its own keys. A query of block m, at place w
    within it, reads its own mixture of all summaries:

        o_mw = q_mw sum_n mixture_mn S_n / (sum_n mixture_mn q_nw z_n + eps)      z_n = sum_j k_j

    The denominator is that of MHLA's code: each term takes the query at place w of block n, not the
    query that is answered. normalize=False leaves it out.
    """
    q, k, v = (to_blocks(z, grid, width) for z in (q, k, v))  # (..., M, w, d)
    summaries = k.mT @ v  # (..., M, d, e)
    d, e = summaries.shape[-2:]
    mixed = (mixture @ summaries.flatten(-2)).unflatten(-1, (d, e))
    out = q @ mixed  # (..., M, w, e)
    if normalize:
        own = (q @ k.sum(-2).unsqueeze(-1)).squeeze(-1)  # (..., M, w): q_nw z_n
        out = out / ((mixture @ own).unsqueeze(-1) + eps)
    return from_blocks(out, grid, width)


def first_mixture(rows, columns):
    """The mixture that MHLA starts with, (M, M) for a grid of blocks.

    1 - distance / largest distance, between the centres of two blocks, over the sum of the column.
    """
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack([i.flatten(), j.flatten()], dim=1).double()  # (M, 2)
    distance = torch.linalg.vector_norm(centres.unsqueeze(1) - centres, dim=-1)
    near = 1 - distance / distance.max().clamp_min(1)  # one block: 1
    return (near / near.sum(0)).float()
