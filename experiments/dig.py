"""The recurrence of DiG (Zhu et al., CVPR 2025), and the order in which its blocks scan the tokens.

For readers of baselines.py, whose class GatedLinear has the projections around them. Imports torch
only.
"""

import math

import torch
import torch.nn.functional as F


def gated_scan(q, k, v, log_a, chunk=8):
    """Gated linear attention (Yang et al. 2024), a recurrence over the tokens:

        S_t = diag(a_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   S_0 = 0

    q, k, log_a (..., N, K), log_a <= 0; v (..., N, V); returns (..., N, V). Tokens are taken in
    chunks: all pairs at once within a chunk, and a state S (K, V) from chunk to chunk. Every
    exponent is <= 0, so no value overflows.
    """
    N = q.shape[-2]
    padding = -N % chunk

    def chunks(z):
        """(..., N, K) -> (..., chunks, chunk, K); zeros fill the last chunk."""
        return F.pad(z, (0, 0, 0, padding)).unflatten(-2, (-1, chunk))

    q, k, v, log_a = chunks(q), chunks(k), chunks(v), chunks(log_a)
    b = log_a.cumsum(-2)  # (..., chunk, K): the log of the decay since the chunk began

    # Within a chunk: o_t = sum over s <= t of (q_t k_s exp(b_t - b_s)) v_s.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    decay = (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(later, -math.inf).exp()
    inside = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1) @ v

    # From chunk to chunk: S <- diag(exp(end)) S + sum over s of (k_s exp(end - b_s))^T v_s.
    end = b[..., -1:, :]  # (..., 1, K): the log of the whole chunk's decay
    added = (k * (end - b).exp()).mT @ v  # (..., K, V)
    kept = end.exp().mT  # (..., K, 1)
    states = [torch.zeros_like(added[..., 0, :, :])]  # S at the beginning of each chunk
    for i in range(added.shape[-3] - 1):
        states.append(kept[..., i, :, :] * states[-1] + added[..., i, :, :])
    before = (q * b.exp()) @ torch.stack(states, -3)
    return (inside + before).flatten(-3, -2)[..., :N, :]


def scan_order(grid, i):
    """Token numbers (N,) in the order in which block i scans them.

    Blocks take turns: rows, rows backwards, columns, columns backwards. DiG reaches the same orders
    by flipping the sequence after each block and transposing it after every second block.
    """
    order = torch.arange(math.prod(grid)).view(grid)
    order = (order.mT if i % 4 >= 2 else order).flatten()
    return order.flip(0) if i % 2 else order
