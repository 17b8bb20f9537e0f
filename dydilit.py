"""DyDi-LiT in one file: Dynamic Differential Linear Attention (arXiv 2601.13683), from the
equations to the training loop. Read it top to bottom; NOTES.md says where the paper is silent.

    here                 shape        in the paper                      where
    x                    (B, N, D)    X: N tokens of width d = D        Sec. 3.1
    q, k, v              (B, N, D)    Q, K, V = X W_0                   Sec. 3.1
    q_prime, k_prime     (B, N, D)    Q', K', the redundancy in Q, K    (1) (2)
    q_projectors, k_..   (n_P, D, D)  W_i^Q, W_i^K for i = 1 .. n_P     (2)
    .._projector_router  (D, n_P)     R_P^Q, R_P^K                      (1)
    gamma                (n_F,)       factors gamma_1 .. gamma_{n_F}    (5) (6)
    kernel_routers       (4, D, n_F)  R_F for Q, K, Q', K'              (6)
    q_t, k_t, qp_t, kp_t (B, N, D)    Q~, K~, Q~', K~': after phi       (6)
    lam                  (n_D,)       factors lambda_1 .. lambda_{n_D}  (7)
    difference_routers   (2, 2D, n_D) R_D for Q and K                   (7)
    dq, dk               (B, N, D)    Q~ - lambda^Q Q~', the same of K  (8)
    DWC                               re-parameterised 3x3 convolution  (9)

B images. One head of width D: the paper's GFLOPs allow no other number (NOTES.md).
The skeleton keeps DiT's names (Peebles & Xie 2023), the new parts the paper's letters.
"""

import functools
import itertools
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__version__ = "0.2.0"

@dataclass(frozen=True)
class Config:
    """The model. The comment behind a field is its help line on the command line."""
    input_size: int = 32  # side of the square input: latents (image / 8) or pixels
    patch_size: int = 2  # side of a patch; (input_size / patch_size)^2 = N tokens
    in_channels: int = 4  # 4 for Stable Diffusion latents, 1 or 3 for pixels
    hidden_size: int = 384  # D, the token width; a multiple of 4
    depth: int = 9  # L, the number of blocks
    n_projectors: int = 3  # n_P, routed projectors for Q' and for K' (Eq. 2)
    n_kernels: int = 9  # n_F, kernel factors gamma (Eq. 6)
    n_lambdas: int = 9  # n_D, differential factors lambda (Eq. 7)
    num_classes: int = 1000  # labels are 0 .. num_classes - 1; num_classes means "no label"
    normalize: bool = True  # divide by the guarded denominator of Eq. 4; off: Eq. 8 as printed
    router_grad: bool = True  # gradient for the routers; off: they stay as drawn
    label_std: float = 0.02  # of label embeddings at the start; larger ones are learned sooner

    def __post_init__(self):
        check_fields(self, at_least_one=[f.name for f in fields(Config) if f.type is int])
        if self.hidden_size % 4:  # for the 2-D sin-cos positions
            raise ValueError(f"hidden_size must be a multiple of 4, got {self.hidden_size}")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide the side {self.input_size}")

    def build(self) -> "DyDiLiT":
        return DyDiLiT(self)

def check_fields(config, at_least_one=(), fractions=()):
    """ValueError unless all have their types and are >= 0, >= 1 or, of `fractions`, <= 1."""
    for field in fields(config):
        value = getattr(config, field.name)
        name = f"{type(config).__name__}.{field.name}"
        if type(value) is not field.type and (field.type, type(value)) != (float, int):
            raise ValueError(f"{name} must be {field.type.__name__}, got {value!r}")
        low, high = int(field.name in at_least_one), 1 if field.name in fractions else math.inf
        if field.type in (int, float) and not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {value}")

# S, B, L: Sec. 4.1 (at 512 pixels input_size=64). The others are ours, for pixels.
PRESETS = {
    "S/2":      Config(hidden_size=384, n_projectors=3, n_kernels=9, n_lambdas=9),
    "B/2":      Config(hidden_size=512, n_projectors=5, n_kernels=15, n_lambdas=15),
    "L/2":      Config(hidden_size=768, n_projectors=7, n_kernels=21, n_lambdas=21),
    "pixels32": Config(in_channels=3, hidden_size=256, depth=6, num_classes=10, label_std=1.0),
    "photos":   Config(in_channels=3, hidden_size=64, depth=4, num_classes=2, label_std=1.0),
    "digits":   Config(input_size=8, in_channels=1, hidden_size=96, depth=4, num_classes=10,
                       label_std=1.0),
    "mnist":    Config(input_size=28, in_channels=1, hidden_size=64, depth=4, num_classes=10,
                       label_std=1.0),
}

# ----------------------------
# The equations: pure functions, float32 or float64 inside; they specify the fused op.

def at_least_float32(x: Tensor) -> Tensor:
    """16-bit x becomes float32: powers, logits, norms and divisions need it."""
    return x if x.dtype == torch.float64 else x.float()

def norm(x: Tensor) -> Tensor:
    """Euclidean length over the last axis: (..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

def power_kernel(z: Tensor, gamma: Tensor | float) -> Tensor:
    """phi (Eq. 5): raise relu(z) to the power gamma, which bends its direction; keep its norm.
    z (..., D), gamma broadcasts over (..., 1); returns (..., D), at least float32. A row without a
    positive entry gives 0 and zero gradients."""
    r = at_least_float32(z).relu()
    # Divided by its largest entry, r lies in [0, 1], and so does its power. The scale m cancels
    # and carries no gradient.
    m = r.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
    t = r / m
    # The gradient of 0^gamma can be NaN: entries that are 0 become 1 before the power, 0 after it.
    alive = r > 0
    p = torch.where(alive, torch.where(alive, t, 1) ** gamma, 0)
    norm_r, norm_p = m * norm(t), norm(p)
    return p / torch.where(norm_p > 0, norm_p, 1) * norm_r

def route(z: Tensor, router: Tensor, router_grad: bool = True) -> tuple[Tensor, Tensor]:
    """The arg max of Eqs. 1, 6 and 7, which chooses one of n for every token.
    z (..., D), router (D, n); returns
      index (...) int64: the winner; of equal logits the lowest index;
      gate (..., 1): p / p.detach() with p = softmax(logits)[index]: exactly 1, the paper's value,
        with the gradient of log p (here the paper is silent). router_grad=False: constant 1."""
    with no_autocast(z):
        logits = at_least_float32(z) @ at_least_float32(router)
        index = logits.argmax(-1)
        if not router_grad:
            return index, torch.ones_like(logits[..., :1])
        p = logits.softmax(-1).gather(-1, index.unsqueeze(-1))
        return index, p / p.detach()

def routed_projection(x: Tensor, projectors: Tensor, router: Tensor,
                      router_grad: bool = True) -> Tensor:
    """Q' or K' (Eqs. 1 and 2): each token through the projector that it is routed to.
    x (B, N, D), projectors (n_P, D, D), router (D, n_P); returns (B, N, D)."""
    rows = x.flatten(0, 1)  # (B N, D)
    index, gate = route(rows, router, router_grad)  # Eq. 1
    projected = project(rows, projectors, index)  # Eq. 2
    return (projected * gate.to(projected.dtype)).view_as(x)

def project_by_index(rows: Tensor, projectors: Tensor, index: Tensor) -> Tensor:
    """rows (M, D): row i times projectors[index[i]]. `project`, at the end, computes the same."""
    out = rows.new_empty(rows.shape)
    for i, projector in enumerate(projectors):
        mine = (index == i).nonzero().squeeze(1)
        out.index_copy_(0, mine, rows.index_select(0, mine) @ projector)
    return out

def measure(z: Tensor, gamma: Tensor, router: Tensor, router_grad: bool = True) -> Tensor:
    """The dynamic measure kernel (Eq. 6): phi(z) with the gamma that each token is routed to.
    z (B, N, D), gamma (n_F,), router (D, n_F); returns (B, N, D)."""
    index, gate = route(z, router, router_grad)
    return power_kernel(z, at_least_float32(gamma)[index].unsqueeze(-1) * gate)

def difference(z_t: Tensor, zp_t: Tensor, lam: Tensor, router: Tensor,
               router_grad: bool = True) -> Tensor:
    """The token difference (Eqs. 7 and 8): z~ - lambda z~', with a lambda routed from both.
    z_t, zp_t (B, N, D), lam (n_D,), router (2D, n_D); returns (B, N, D)."""
    index, gate = route(torch.cat([z_t, zp_t], dim=-1), router, router_grad)
    return z_t - at_least_float32(lam)[index].unsqueeze(-1) * gate * zp_t

def linear_attention(q: Tensor, k: Tensor, v: Tensor, normalize: bool = True, eps: float = 1e-6,
                     tokens_first: bool | None = None) -> Tensor:
    """Eq. 4, or with normalize=False its numerator alone, which is Eq. 8.
    q, k, v (B, N, D); returns (B, N, D). (q k^T) v and q (k^T v) are the same sum, with 2 N^2 D and
    2 N D^2 multiply-adds: the cheaper order is taken unless tokens_first chooses. Differences can
    make the denominator of Eq. 4 vanish or turn negative. It is kept above 1e-3 of its
    Cauchy-Schwarz bound: free of scale, and |output| <= 1000 max |v|."""
    N, D = q.shape[-2:]
    if tokens_first is None:
        tokens_first = N <= D
    out = (q @ k.mT) @ v if tokens_first else q @ (k.mT @ v)
    if not normalize:
        return out
    den = q @ k.sum(-2, keepdim=True).mT  # (B, N, 1)
    floor = 1e-3 * norm(q) * norm(k).sum(-2, keepdim=True)  # (B, N, 1)
    return out / (torch.maximum(den, floor) + eps)

def dydila_reference(q: Tensor, k: Tensor, q_prime: Tensor, k_prime: Tensor, v: Tensor,
                     gamma: Tensor, lam: Tensor, kernel_routers: Tensor,
                     difference_routers: Tensor, *, normalize: bool = True,
                     router_grad: bool = True, eps: float = 1e-6) -> Tensor:
    """DyDiLA between projections and convolution, Eqs. 5 to 8: (B, N, D) in v's dtype.
    dydila_attention, at the end of this file, computes the same faster.

    q, k, q_prime, k_prime, v (B, N, D); gamma (n_F,); lam (n_D,); kernel_routers (4, D, n_F) for
    Q, K, Q', K' in this order; difference_routers (2, 2D, n_D) for Q, K."""
    # float32 inside: sums of products overflow in float16 and cancel in bfloat16
    with no_autocast(q):
        q_t = measure(q, gamma, kernel_routers[0], router_grad)              # Eqs. 5, 6
        k_t = measure(k, gamma, kernel_routers[1], router_grad)
        qp_t = measure(q_prime, gamma, kernel_routers[2], router_grad)
        kp_t = measure(k_prime, gamma, kernel_routers[3], router_grad)
        dq = difference(q_t, qp_t, lam, difference_routers[0], router_grad)  # Eqs. 7, 8
        dk = difference(k_t, kp_t, lam, difference_routers[1], router_grad)
        o = linear_attention(dq, dk, at_least_float32(v), normalize, eps)    # Eqs. 4, 8
        return o.to(v.dtype)

# ----------------------------
# The module.

def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, H W, D) seen as an image (B, D, H, W), channels-last."""
    return x.mT.unflatten(-1, grid)

def to_tokens(x: Tensor) -> Tensor:
    """The inverse of to_image: (B, D, H, W) -> (B, H W, D)."""
    return x.flatten(2).mT

class DWC(nn.Module):
    """Depthwise 3x3 convolution from parallel 3x3, 1x3 and 3x1 branches (Eq. 9; ACNet, Ding et al.
    2019): v (B, N, D), grid (H, W) -> (B, N, D).

    No batch norm: it would mix images of different noise levels. So the kernels add up to one, the
    same function at a third of the cost; the branches only change the optimiser's path. `merge_`
    leaves one plain 3x3."""
    def __init__(self, dim: int):
        super().__init__()
        def branch(*size):  # channels-last like its gradient, since DDP wants them alike
            return nn.Parameter(torch.empty(dim, 1, *size, memory_format=torch.channels_last))
        self.square = branch(3, 3)
        self.horizontal = branch(1, 3)
        self.vertical = branch(3, 1)
        self.bias = nn.Parameter(torch.empty(dim))

    def kernel(self) -> Tensor:
        if self.horizontal is None:
            return self.square
        horizontal = F.pad(self.horizontal, (0, 0, 1, 1))
        vertical = F.pad(self.vertical, (1, 1, 0, 0))
        return self.square + horizontal + vertical

    @torch.no_grad()
    def merge_(self):
        """Fold the branches into `square`, exactly; for inference, after save_pretrained."""
        self.square.copy_(self.kernel())
        self.horizontal = self.vertical = None

    def forward(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        image, D = to_image(v, grid), v.shape[-1]
        return to_tokens(F.conv2d(image, self.kernel(), self.bias, padding=1, groups=D))

class DyDiLA(nn.Module):
    """Dynamic differential linear attention (Fig. 2b): x (B, N, D), grid (H, W) with H W = N
    -> (B, N, D). ValueError if the grid does not hold the tokens."""
    def __init__(self, config: Config):
        super().__init__()
        D, n_P = config.hidden_size, config.n_projectors
        n_F, n_D = config.n_kernels, config.n_lambdas
        self.normalize, self.router_grad = config.normalize, config.router_grad
        self.backend = "auto"  # "auto", "reference" or "fused": see dydila_attention
        self.dtype = None  # cast q .. v to this for the attention; None: leave them
        def router(*shape):
            return nn.Parameter(torch.empty(shape), requires_grad=self.router_grad)
        self.qkv = nn.Linear(D, 3 * D, bias=False)  # W_0
        self.q_projectors = nn.Parameter(torch.empty(n_P, D, D))  # W_i^Q
        self.k_projectors = nn.Parameter(torch.empty(n_P, D, D))  # W_i^K
        self.q_projector_router = router(D, n_P)  # R_P^Q
        self.k_projector_router = router(D, n_P)  # R_P^K
        self.gamma = nn.Parameter(torch.empty(n_F))
        self.kernel_routers = router(4, D, n_F)  # R_F
        self.lam = nn.Parameter(torch.empty(n_D))
        self.difference_routers = router(2, 2 * D, n_D)  # R_D
        self.dwc = DWC(D)
        self.proj = nn.Linear(D, D)
        initialize(self)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {x.shape[1]} tokens")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q_prime = routed_projection(x, self.q_projectors, self.q_projector_router, self.router_grad)
        k_prime = routed_projection(x, self.k_projectors, self.k_projector_router, self.router_grad)
        o = dydila_attention(
            *(z.to(self.dtype or z.dtype) for z in (q, k, q_prime, k_prime, v)),
            self.gamma, self.lam, self.kernel_routers, self.difference_routers,
            normalize=self.normalize, router_grad=self.router_grad, backend=self.backend)
        return self.proj(o + self.dwc(v, grid))  # Eq. 9

class GLUMBConv(nn.Module):
    """The feed-forward of Sana (Xie et al. 2025): 1x1 to 8D, SiLU, depthwise 3x3, gate to 4D, 1x1
    back to D. x (B, N, D), grid (H, W) -> (B, N, D)."""
    def __init__(self, dim: int):
        super().__init__()
        self.inverted_conv = nn.Linear(dim, 8 * dim)
        self.depth_conv = nn.Conv2d(8 * dim, 8 * dim, 3, padding=1, groups=8 * dim)
        self.depth_conv.to(memory_format=torch.channels_last)
        self.point_conv = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = F.silu(self.inverted_conv(x))  # (B, N, 8D)
        x = to_tokens(self.depth_conv(to_image(x, grid)))
        x, gate = x.chunk(2, dim=-1)  # (B, N, 4D) each
        return self.point_conv(x * F.silu(gate))  # (B, N, D)

# ----------------------------
# The network: DiT's skeleton around them.

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

def angles(position: Tensor, n: int) -> Tensor:
    """position (M,) -> (M, n) float64: times n frequencies, from 1 down towards 1 / 10000."""
    i = torch.arange(n, dtype=torch.float64, device=position.device)
    return position.double().unsqueeze(1) * torch.exp(-math.log(10000) * i / n)

def position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sin-cos positions (H W, dim), as in DiT: the column first."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    x = angles(columns.flatten(), dim // 4)
    y = angles(rows.flatten(), dim // 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()

class PatchEmbed(nn.Module):
    """x (B, C, H, W) -> one token per patch, (B, N, D)."""
    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size,
                              stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.proj(x))

class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, dim)."""
    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        a = angles(t, self.frequencies // 2)
        return self.mlp(torch.cat([a.cos(), a.sin()], dim=1).to(self.mlp[0].weight.dtype))

class LabelEmbedder(nn.Module):
    """y (B,) -> (B, dim); y = num_classes means "no label", for guidance."""
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)

class Block(nn.Module):
    """adaLN-Zero (Peebles & Xie 2023): c (B, D) shifts, scales and gates each branch."""
    def __init__(self, config: Config, attn: nn.Module | None = None, mlp: nn.Module | None = None):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = attn or DyDiLA(config)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp or GLUMBConv(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        h = modulate(self.norm1(x), shift_msa, scale_msa)
        x = x + gate_msa.unsqueeze(1) * self.attn(h, grid)
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp.unsqueeze(1) * self.mlp(h, grid)

class FinalLayer(nn.Module):
    """x (B, N, D), c (B, D) -> (B, N, p p 2C)."""
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, config.patch_size**2 * 2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class DyDiLiT(nn.Module):
    """The network (Fig. 2a): model(x (B, C, H, W), t (B,), y (B,)) -> (B, 2C, H, W), the noise and
    the weight v of the variance. ValueError if x is not of the config's size."""
    def __init__(self, config: Config, blocks: list[nn.Module] | None = None):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.grid = (config.input_size // config.patch_size,) * 2
        self.meta, self.step = {}, None  # of its training: meta.json, steps done
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        self.register_buffer("pos_embed", position_embedding(self.grid, D).unsqueeze(0))
        self.blocks = nn.ModuleList(blocks or [Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        initialize(self)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p p 2C) -> (B, 2C, H, W)."""
        p = self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, self.grid)  # (B, h, w, p, p, 2C)
        x = torch.einsum("nhwpqc->nchpwq", x)  # (B, 2C, h, p, w, p)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        C, side = self.config.in_channels, self.config.input_size
        if x.shape[1:] != (C, side, side):
            raise ValueError(f"x is {tuple(x.shape)}; this model takes (B, {C}, {side}, {side})")
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c, self.grid)  # (B, N, D)
        x = self.final_layer(x, c)  # (B, N, p p 2C)
        return self.unpatchify(x)  # (B, 2C, H, W)

    @staticmethod
    def from_pretrained(path: str | Path, kinds: tuple[type, ...] = (Config,)) -> "DyDiLiT":
        """A model ready for sampling: the averaged weights of a checkpoint, or a folder of
        save_pretrained. `kinds`: configurations that may be built. FileNotFoundError, or
        ValueError if path holds no such model."""
        saved = (read_folder if Path(path).is_dir() else load_checkpoint)(path)
        known = {kind.__name__: kind for kind in kinds}
        with naming(path, "holds no model of this version"):
            if saved["kind"] not in known:
                raise ValueError(f"kind {saved['kind']!r}, others by experiments/pretrained.py")
            model = known[saved["kind"]](**saved["config"]).build()
            model.load_state_dict(saved["ema"])
            model.meta, model.step = saved["meta"], saved["step"]
        return model.eval()

    def save_pretrained(self, folder: str | Path):
        """Write model.safetensors, whose header describes the model, and config.json, a copy of
        it. A kill or a full disk leaves the old model or the new."""
        from safetensors.torch import save
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: z.contiguous() for name, z in self.state_dict().items()}
        blob = save(weights)
        crc32 = zlib.crc32(blob[8 + int.from_bytes(blob[:8], "little") :])  # behind the header
        about = {"kind": type(self.config).__name__, "config": asdict(self.config),
                 "meta": self.meta, "step": self.step, "crc32": crc32}
        text = json.dumps(about, indent=1) + "\n"
        write_whole(Path(folder, "model.safetensors"), save(weights, {"about": text}))
        write_whole(Path(folder, "config.json"), text.encode())

@torch.no_grad()
def initialize(model: nn.Module):
    """Every initial value, in one place; drawn from torch's global generator."""
    for module in model.modules():  # first by kind
        if isinstance(module, nn.Linear):  # DiT's rule
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # PyTorch's default
            module.reset_parameters()
    for module in model.modules():  # then by role
        if isinstance(module, DyDiLA):
            for projector in (*module.q_projectors, *module.k_projectors):
                nn.init.xavier_uniform_(projector)
            for name, parameter in module.named_parameters(recurse=False):
                if "router" in name:  # not zero: all would take index 0
                    nn.init.normal_(parameter, std=0.02)
            nn.init.constant_(module.gamma, 3.0)  # Sec. 4.1
            nn.init.constant_(module.lam, 0.01)  # Sec. 4.1
        elif isinstance(module, DWC):  # each branch as a Conv2d of its size
            for branch in (module.square, module.horizontal, module.vertical):
                bound = branch[0].numel() ** -0.5
                nn.init.uniform_(branch, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):  # as the linear map that it is
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=model.config.label_std)
        elif isinstance(module, TimestepEmbedder):
            for layer in (module.mlp[0], module.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, Block | FinalLayer):  # adaLN-Zero: a block starts as the identity
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
            if isinstance(module, FinalLayer):  # and the output as 0
                nn.init.zeros_(module.linear.weight)

# ----------------------------
# Randomness by address: a random number depends on (seed, what it is for), never on what was drawn
# before. So a training step can be repeated, resumed, or shared among processes.

ORDER, STEP, HELD_OUT, SAMPLE = range(4)  # what random numbers are for

def generator(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Generator:
    """The generator (Philox) of one address, such as (seed, STEP, step, image)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, a, b]))

# ----------------------------
# Diffusion, as in DiT: Ho et al. 2020, with Nichol & Dhariwal's learned variance (2021).

def respace(T: int, steps: int) -> list[int]:
    """`steps` of the timesteps 0 .. T - 1, evenly spaced, both ends kept: respace(1000, 250) is
    [0, 4, 8, ..., 995, 999]. ValueError unless 2 <= steps <= T."""
    if not 2 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be between 2 and {T}, got {steps}")
    stride = (T - 1) / (steps - 1)
    # added up, as in DiT: the rounding of the sum decides where a tie such as 499.5 goes
    return [round(t) for t in itertools.accumulate([0.0] + [stride] * (steps - 1))]

def with_guidance(model: Callable, scale: float, channels: int) -> Callable:
    """Classifier-free guidance (Ho & Salimans 2022) of the first `channels` channels' noise (DiT
    guides three of four); scale 1 is none. Returns a function of (x, t, y) like the model."""
    if scale == 1.0:
        return model
    def guided(x, t, y):
        no_label = torch.full_like(y, model.config.num_classes)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, no_label]))
        labelled, free = both.chunk(2)
        eps = free + scale * (labelled - free)
        return torch.cat([eps[:, :channels], labelled[:, channels:]], dim=1)
    return guided

class Diffusion:
    """Forward process q, loss and samplers, over all T timesteps or `steps` of them. t (B,) counts
    those in use, between which alpha_t, beta_t are taken; the model is told self.timesteps[t]."""
    def __init__(self, steps: int | None = None, T: int = 1000):
        self.timesteps = torch.tensor(respace(T, T if steps is None else steps))
        betas = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)
        abar = torch.cumprod(1 - betas, 0)[self.timesteps]
        previous = torch.cat([abar.new_ones(1), abar[:-1]])  # abar_{t-1}
        alpha = abar / previous
        beta = 1 - alpha
        variance = beta * (1 - previous) / (1 - abar)  # beta~_t: 0 at t = 0
        clipped = torch.cat([variance[1:2], variance[1:]])  # its log is finite
        self.tables = {
            "sqrt_abar": abar.sqrt(), "sqrt_1m_abar": (1 - abar).sqrt(),
            "sqrt_previous": previous.sqrt(), "sqrt_1m_previous": (1 - previous).sqrt(),
            "log_beta": beta.log(), "log_variance": clipped.log(),
            "mean_x0": previous.sqrt() * beta / (1 - abar),
            "mean_xt": (1 - previous) * alpha.sqrt() / (1 - abar),
        }

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """The table at t (B,), float64 until here, shaped to multiply x (B, C, H, W)."""
        self.tables[name] = self.tables[name].to(t.device)  # copies once
        return self.tables[name][t].to(x.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw from q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)."""
        return self.at("sqrt_abar", t, x0) * x0 + self.at("sqrt_1m_abar", t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self.at("mean_x0", t, x_t) * x0 + self.at("mean_xt", t, x_t) * x_t
        return mean, self.at("log_variance", t, x_t)

    def predict_x0(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - self.at("sqrt_1m_abar", t, x_t) * eps) / self.at("sqrt_abar", t, x_t)

    def p_mean_variance(self, eps: Tensor, v: Tensor, x_t: Tensor, t: Tensor,
                        clip: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t): v in [-1, 1] goes from beta~_t to beta_t."""
        x0 = self.predict_x0(eps, x_t, t)
        mean, low = self.q_posterior(x0.clamp(-1, 1) if clip else x0, x_t, t)
        high = self.at("log_beta", t, x_t)
        weight = (v + 1) / 2
        return mean, weight * high + (1 - weight) * low

    def variational_term(self, x0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor,
                         log_variance: Tensor) -> Tensor:
        """KL(q || p), at t = 0 the negative log likelihood of x_0; bits per dimension, (B,)."""
        true_mean, true_log_variance = self.q_posterior(x0, x_t, t)
        kl = 0.5 * (log_variance - true_log_variance - 1
                    + (true_log_variance - log_variance).exp()
                    + (true_mean - mean).square() * (-log_variance).exp())
        nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def loss(self, model: Callable, x0: Tensor, y: Tensor, t: Tensor,
             noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noise's square error and the variational term, (B,) each; this trains v alone."""
        x_t = self.q_sample(x0, t, noise)
        out = model(x_t, self.timesteps.to(t.device)[t], y)
        eps, v = out.to(x0.dtype).chunk(2, dim=1)
        mse = (noise - eps).square().flatten(1).mean(1)
        mean, log_variance = self.p_mean_variance(eps.detach(), v, x_t, t)
        return mse, self.variational_term(x0, x_t, t, mean, log_variance)

    @torch.no_grad()
    def sample(self, model: nn.Module, y: Tensor, index: range | list[int], *, seed: int,
               cfg: float = 1.0, cfg_channels: int | None = None, sampler: str = "ddpm",
               clip: bool = False, on_step: Callable | None = None) -> Tensor:
        """Images of the labels y (B,): (B, C, H, W) float32. `index` numbers them in the whole set:
        image i depends on (seed, i) alone. cfg: guidance scale; cfg_channels None guides all
        channels. sampler: "ddpm" (ancestral, learned variance) or "ddim" (eta = 0; Song et al.
        2021). clip keeps x_0 in [-1, 1], for pixels. on_step(x) is called after every step."""
        config = model.config
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler must be 'ddpm' or 'ddim', got {sampler!r}")
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < config.num_classes:
            raise ValueError(f"labels must be in 0 .. {config.num_classes - 1}, got "
                             f"{int(y.min())} .. {int(y.max())}")
        shape = (config.in_channels, config.input_size, config.input_size)
        generators = [generator(seed, SAMPLE, i) for i in index]
        def draw():
            noise = [g.standard_normal(shape, np.float32) for g in generators]
            return torch.from_numpy(np.stack(noise))
        guided = with_guidance(model, cfg, cfg_channels or config.in_channels)
        with ThreadPoolExecutor(1) as pool:  # draws the next noise meanwhile
            x = draw().to(y.device)
            upcoming = pool.submit(draw)
            for s in reversed(range(len(self.timesteps))):
                t = torch.full_like(y, s)
                out = guided(x, self.timesteps.to(y.device)[t], y)
                eps, v = out.to(x.dtype).chunk(2, dim=1)
                if sampler == "ddim":
                    x = self.ddim_step(eps, x, t, clip)
                else:
                    x, log_variance = self.p_mean_variance(eps, v, x, t, clip)
                    if s > 0:
                        x = x + (0.5 * log_variance).exp() * upcoming.result().to(y.device)
                        upcoming = pool.submit(draw)
                if on_step:
                    on_step(x)
        return x

    def ddim_step(self, eps: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """x_{t-1} on the deterministic path of DDIM."""
        x0 = self.predict_x0(eps, x_t, t)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - self.at("sqrt_abar", t, x_t) * x0) / self.at("sqrt_1m_abar", t, x_t)
        return self.at("sqrt_previous", t, x_t) * x0 + self.at("sqrt_1m_previous", t, x_t) * eps

def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log mass of N(mean, exp(log_scale)^2) in the 1/127.5-wide bin of x; end bins are open."""
    def cdf(z):  # of the standard normal, by its tanh approximation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    upper = cdf((x - mean + 1 / 255) * (-log_scale).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_scale).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()

# ----------------------------
# Training.

@dataclass(frozen=True)
class Training:
    """The run. The comment behind a field is its help line on the command line."""
    data: str = "data/imagenet256"  # prepared folder (data/README.md)
    out: str = "out/imagenet256"  # where ckpt.pt and log.jsonl go
    steps: int = 400_000  # optimiser steps in all
    batch_size: int = 256  # images per step, over all processes
    micro_batch: int = 0  # images per forward pass of a process; 0: its whole share
    lr: float = 1e-4  # AdamW's learning rate; betas 0.9 and 0.999, no weight decay
    warmup: int = 0  # steps in which the learning rate rises to lr
    decay: float = 0.0  # last part of the run, in which it falls to 0; 0: constant
    ema_decay: float = 0.9999  # of the averaged weights, which are sampled from
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    label_dropout: float = 0.1  # share of images that lose their label, for guidance
    bf16: bool = False  # bfloat16 autocast; kernels, logits and norms stay in float32
    tf32: bool = False  # float32 products on a GPU in TF32, as DiT trains; not in evaluations
    seed: int = 0  # of weights, order, flips, timesteps, noise and dropped labels
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 5_000  # steps between losses on the held-out images
    ckpt_every: int = 10_000  # steps between checkpoints

    def __post_init__(self):
        check_fields(
            self, at_least_one=("steps", "batch_size", "log_every", "eval_every", "ckpt_every"),
            fractions=("decay", "ema_decay", "label_dropout"))

class Data:
    """A prepared set (data/README.md), checked by support/prepared.py."""
    def __init__(self, path: str | Path, config: Config):
        self.meta = json.loads(Path(path, "meta.json").read_text())
        self.images = np.load(Path(path, "images.npy"), mmap_mode="r")
        self.labels = np.load(Path(path, "labels.npy"))
        self.meta["images"] = len(self.images)
        some = self.images[:: 1 if self.images.nbytes < 2**28 else 1 + len(self.images) // 512]
        self.meta["crc32"] = zlib.crc32(np.ascontiguousarray(some), zlib.crc32(self.labels))
        self.n_train = len(self.images) - self.meta["held_out"]
        self.null = config.num_classes  # the label "no label"
        self.scaling = self.meta.get("scaling")  # of latents; None for pixels
        self.orders = {}

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of an epoch's training rows, by (seed, epoch)."""
        if (seed, epoch) not in self.orders:
            self.orders = {(seed, epoch): generator(seed, ORDER, epoch).permutation(self.n_train)}
        return self.orders[seed, epoch]

    def item(self, row: int, g: np.random.Generator, flip: bool, dropout: float) -> tuple:
        """Image (C, H, W) or a draw of its latents, label, timestep and noise, by g."""
        x = self.images[row]
        flip = flip and self.meta["flip"] and g.random() < 0.5
        if self.scaling:
            mean, std = np.split(x[int(flip)].astype(np.float32), 2)
            x = (mean + std * g.standard_normal(mean.shape, np.float32)) * self.scaling
        else:
            x = (x[..., ::-1] if flip else x).astype(np.float32) / 127.5 - 1
        y = self.null if g.random() < dropout else self.labels[row]
        return x, y, g.integers(1000), g.standard_normal(x.shape, np.float32)

    def batch(self, seed: int, step: int, batch_size: int, share: range,
              dropout: float) -> list[Tensor]:
        """x, y, t, noise of one process: the images `share` of a step's batch."""
        items = []
        for j in share:
            epoch, k = divmod(step * batch_size + j, self.n_train)
            row = self.order(seed, epoch)[k]
            items.append(self.item(row, generator(seed, STEP, step, j), True, dropout))
        return stack(items)

    def held_out(self, most: int = 512) -> list[Tensor]:
        """x, y, t, noise of the first held-out images, always with the same draws; or []."""
        rows = range(self.n_train, min(self.n_train + most, len(self.images)))
        return stack([self.item(row, generator(0, HELD_OUT, row), False, 0.0) for row in rows])

def stack(items: list[tuple]) -> list[Tensor]:
    return [torch.from_numpy(np.stack(part)) for part in zip(*items)]

def learning_rate(training: Training, step: int) -> float:
    factor = min(1, (step + 1) / max(1, training.warmup))
    if training.decay:
        factor = min(factor, (training.steps - step) / (training.decay * training.steps))
    return training.lr * factor

def train(config: Config, training: Training, resume: bool = False,
          on_step: Callable | None = None, on_eval: Callable | None = None,
          compiled: bool = False, mfu: float = 0.0) -> int:
    """Train, and leave ckpt.pt and log.jsonl in training.out. Returns the steps done, fewer than
    training.steps after SIGINT, SIGTERM or SIGHUP.
    resume: from ckpt.pt, which support/runs.py has checked. on_step(step, loss): after every step.
    on_eval(averaged model, batch): its dict joins the log; batch is held out, or the step's.
    compiled: by torch.compile. mfu: the share of the peak that one image a second takes.
    FileExistsError if `out` holds a run and resume is off; ValueError for a batch that does not
    divide; FloatingPointError if a loss is not finite."""
    rank, world, device = distributed()
    torch.manual_seed(training.seed)
    share = training.batch_size // world  # images of a step for this process
    micro = training.micro_batch or share  # images of a forward pass
    if training.batch_size % world or share % micro:
        raise ValueError(f"batch_size {training.batch_size} for {world} processes: not divisible, "
                         f"or not by {micro=}")
    data, diffusion = Data(training.data, config), Diffusion()
    model = config.build().to(device)
    ema = config.build().to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=training.lr, weight_decay=0.0, fused=True)
    state = {"model": model, "ema": ema, "optimizer": optimizer}
    about = {"kind": type(config).__name__, "config": asdict(config),
             "training": asdict(training), "meta": data.meta}
    step = start_run(state, training.out, resume)
    if compiled:
        model.compile(fullgraph=True)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=training.bf16)
    held_out = [z.to(device) for z in data.held_out()]
    mine = range(rank * share, (rank + 1) * share)  # of each batch
    began, logged = time.time(), step

    def fetch(step):
        batch = data.batch(training.seed, step, training.batch_size, mine, training.label_dropout)
        return [z.pin_memory() for z in batch] if device.type == "cuda" else batch

    with stop_signals() as signals, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(fetch, step)  # the next batch is read during this step
        while step < training.steps:
            batch = [z.to(device, non_blocking=True) for z in upcoming.result()]
            upcoming = reader.submit(fetch, step + 1)
            lr = learning_rate(training, step)
            optimizer.param_groups[0]["lr"] = lr
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
            sums = torch.zeros(3, device=device)  # mse, variational term, signals to stop
            for first in range(0, share, micro):
                part = [z[first : first + micro] for z in batch]
                last = first + micro == share  # exchange gradients once a step
                with nullcontext() if last or world == 1 else net.no_sync():
                    with autocast:
                        mse, vb = diffusion.loss(net, *part)
                    ((mse + vb).sum() / share).backward()
                losses = torch.stack([mse.detach().sum(), vb.detach().sum()])
                sums[:2] += losses / training.batch_size
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            sums[2] = len(signals)
            if world > 1:
                dist.all_reduce(sums)
            grad_norm = nn.utils.clip_grad_norm_(params, training.grad_clip or math.inf)
            mse, vb, stop, grad_norm = [*sums.tolist(), grad_norm.item()]  # waits for the device
            if not math.isfinite(mse + vb + grad_norm):
                raise FloatingPointError(f"step {step}: loss {mse + vb}, gradient norm {grad_norm}"
                                         f"; {training.out} keeps its last checkpoint, if any")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():  # the average would otherwise keep the graph of every step
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                     1 - training.ema_decay)
            step += 1
            if on_step:
                on_step(step, mse + vb)
            end = step == training.steps
            evaluate = (end or step % training.eval_every == 0) and bool(held_out or on_eval)
            if rank == 0 and (evaluate or end or step % training.log_every == 0):
                speed = (step - logged) * training.batch_size / max(time.time() - began, 1e-9)
                line = {"step": step, "loss": mse + vb, "mse": mse, "vb": vb, "lr": lr,
                        "grad_norm": grad_norm, "images_per_s": round(speed, 1)}
                line |= {"mfu": round(speed * mfu, 4)} if mfu else {}
                if evaluate and held_out:
                    with autocast:
                        line |= held_out_loss(diffusion, ema, held_out, micro)
                if evaluate and on_eval:
                    line |= on_eval(ema, held_out or batch)
                with open(Path(training.out, "log.jsonl"), "a") as f:
                    f.write(json.dumps(line) + "\n")
                began, logged = time.time(), step
            if rank == 0 and (stop or end or step % training.ckpt_every == 0):
                parts = {name: part.state_dict() for name, part in state.items()}
                save_checkpoint(Path(training.out, "ckpt.pt"), parts | {"step": step} | about)
            if stop:
                break
    if world > 1:
        dist.barrier()  # ckpt.pt is there when train returns, on every process
    return step

@torch.no_grad()
def held_out_loss(diffusion: Diffusion, model: nn.Module, batch: list, micro: int) -> dict:
    """Both terms of the loss, for the log; `micro` images at a time."""
    parts = zip(*(z.split(micro) for z in batch))
    losses = [diffusion.loss(model, *part) for part in parts]
    mse, vb = (torch.cat(term).mean().item() for term in zip(*losses))
    return {"held_out_mse": mse, "held_out_loss": mse + vb}

# ----------------------------
# The bookkeeping of a run: processes, signals, the log, checkpoints. No more of the paper.

def distributed() -> tuple[int, int, torch.device]:
    """(rank, processes, device), by torchrun's environment; joins the group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device

@contextmanager
def stop_signals() -> Iterator:
    """A list that SIGINT, SIGTERM and SIGHUP join instead of acting; empty in other threads."""
    received, before = [], {}
    stopping = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    try:
        with suppress(ValueError):  # "signal only works in main thread"
            for s in stopping:
                if signal.getsignal(s) != signal.SIG_IGN:  # as nohup sets SIGHUP
                    before[s] = signal.signal(s, lambda number, _: received.append(number))
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def start_run(state: dict, out: str, resume: bool) -> int:
    """The step to go on from: 0, or that of ckpt.pt, loaded into `state`."""
    path = Path(out, "ckpt.pt")
    if resume and path.exists():
        ckpt = load_checkpoint(path)
        for name, part in state.items():
            part.load_state_dict(ckpt[name])
        return ckpt["step"]
    if not resume and (path.exists() or Path(out, "log.jsonl").exists()):
        raise FileExistsError(f"{out} holds a run; --resume continues it, --out takes another")
    path.parent.mkdir(parents=True, exist_ok=True)
    return 0

def write_whole(path: str | Path, contents: bytes | Callable):
    """Write beside, then rename: a full disk or a kill leaves what was there."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as f:
            contents(f) if callable(contents) else f.write(contents)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except RuntimeError as e:  # torch's name for a full disk
        raise OSError(f"cannot write {beside}: {e}".partition("\n")[0]) from e
    finally:
        beside.unlink(missing_ok=True)

def save_checkpoint(path: str | Path, state: dict):
    write_whole(path, lambda file: torch.save(state, file))

@contextmanager
def naming(path: str | Path, what: str) -> Iterator:
    """Any error becomes a ValueError of one line that names the path."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path} {what}: {' '.join(str(e).split())[:200]}") from e

def load_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """What `train` saved: model, ema, optimizer, step, kind (config's class), config, training,
    meta (of the data). FileNotFoundError, or ValueError if it cannot be read or has changed."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `torchrun train_min.py` makes one")
    with naming(path, "is not a readable checkpoint (cut short?)"):
        with zipfile.ZipFile(path) as file:  # torch.load does not compare its CRCs
            if damaged := file.testzip():
                raise ValueError(f"{damaged} has changed since it was written")
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)

def read_folder(folder: str | Path) -> dict:
    """What save_pretrained wrote, like a checkpoint whose only weights are `ema`."""
    from safetensors import safe_open
    with naming(folder, "holds no model.safetensors and config.json of save_pretrained"):
        about = json.loads(Path(folder, "config.json").read_text())
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            own = json.loads((file.metadata() or {}).get("about", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
        if own and own["crc32"] != about.get("crc32", own["crc32"]):  # a kill came in between
            about = own
        return {name: about[name] for name in ("kind", "config", "meta", "step")} | {"ema": weights}

# ----------------------------
# The fused op. A reader of the paper may stop here: dydila_attention computes dydila_reference by
# the extension of csrc/ where it is built, forward and backward.

BUILD = {}  # build_info() of the extension; empty without it
FUSED_DEVICES = ()  # types of devices that it has kernels for
NO_OP = ""  # why the extension that is there cannot be used
try:
    import dydilit_C
    BUILD = dydilit_C.build_info()
    if BUILD["torch"] != torch.__version__.split("+")[0]:
        raise ImportError(f"dydilit_C is for torch {BUILD['torch']}, this is {torch.__version__}")
    FUSED_DEVICES = ("cpu", "cuda") if BUILD["cuda_archs"] else ("cpu",)
except ModuleNotFoundError:  # not built, or not for this Python
    for path in Path(__file__).parent.glob("dydilit_C*.so"):
        NO_OP = f"{path.name} is for another Python"
except ImportError as e:
    NO_OP = str(e)
if NO_OP:
    print(f"dydilit: no fused op, the Python path instead ({NO_OP}); "
          "python setup.py build_ext --inplace", file=sys.stderr)

def dydila_attention(q: Tensor, k: Tensor, q_prime: Tensor, k_prime: Tensor, v: Tensor,
                     gamma: Tensor, lam: Tensor, kernel_routers: Tensor,
                     difference_routers: Tensor, *, normalize: bool = True,
                     router_grad: bool = True, eps: float = 1e-6,
                     backend: str = "auto") -> Tensor:
    """dydila_reference (shapes there), by the extension where that is possible.
    backend: "auto", "reference" or "fused" (RuntimeError without the extension)."""
    inputs = (q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers)
    check_shapes(*inputs)
    if backend not in ("auto", "reference", "fused"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'fused', got {backend!r}")
    built = q.device.type in FUSED_DEVICES and not in_transform()
    if backend == "fused" and not built:
        raise RuntimeError(f"no extension for {q.device.type} or for jvp and torch.func is here; "
                           "python setup.py build_ext --inplace")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs[:5]))
    fits = dtype.is_floating_point and dtype.itemsize > 1  # no float8
    if q.is_cuda:  # the limits of the CUDA kernels
        fits &= torch.cuda.get_device_capability(q.device) >= (8, 0) and dtype != torch.float64
        fits &= q.shape[-1] <= BUILD["max_width"]
        fits &= max(len(gamma), len(lam)) <= BUILD["max_choices"]
    if backend == "reference" or not built or not (fits or backend == "fused"):
        return dydila_reference(*inputs, normalize=normalize, router_grad=router_grad, eps=eps)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [x.to(dtype) for x in inputs[:5]] + [x.to(wide) for x in inputs[5:]]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out = torch.ops.dydilit.attention_fwd(*tensors, normalize, router_grad, eps)[0]
    else:  # keeps nothing for a backward
        out = torch.ops.dydilit.attention(*tensors, normalize, router_grad, eps)
    return out.to(v.dtype)

def in_transform() -> bool:
    """Whether torch.func or forward mode is at work, for which the op has no rules."""
    return (torch._C._are_functorch_transforms_active()  # private: there is no other way
            or torch.autograd.forward_ad._current_level >= 0)

def no_autocast(x: Tensor):
    """Within it no autocast acts on x's device. The meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)

def check_shapes(q, *rest):
    """ValueError unless the nine tensors of dydila_attention fit together."""
    if q.dim() != 3:
        raise ValueError(f"q must be (B, N, D), got {tuple(q.shape)}")
    D, n_F, n_D = q.shape[-1], rest[4].numel(), rest[5].numel()
    shapes = {"k": q.shape, "q_prime": q.shape, "k_prime": q.shape, "v": q.shape, "gamma": (n_F,),
              "lam": (n_D,), "kernel_routers": (4, D, n_F), "difference_routers": (2, 2 * D, n_D)}
    for (name, shape), x in zip(shapes.items(), rest):
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")

def fake_forward(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers,
                 normalize, router_grad, eps):
    """What attention_fwd returns (csrc/ops.cpp). Where q is bfloat16 on CUDA, so are dq, dk and
    attn; else they have gamma's dtype."""
    B, N, D = q.shape
    n, b = min(N, D), B if normalize else 0
    core = q if q.is_cuda and q.dtype == torch.bfloat16 else gamma
    return (q.new_empty(B, N, D), core.new_empty(B, N, D), core.new_empty(B, N, D),
            core.new_empty(B, n, n), gamma.new_empty(4, B, N, len(gamma)),
            gamma.new_empty(2, B, N, len(lam)), gamma.new_empty(b, D + 1), gamma.new_empty(b, N))

def save_for_backward(ctx, inputs, output):
    *tensors, ctx.normalize, ctx.router_grad, ctx.eps = inputs
    _out, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)

def attention_backward(ctx, grad_out, *_):
    """Gradients of the nine tensors, and None for the three options."""
    *inputs, dq, dk, attn, kernel_logits, difference_logits, k_sum, den = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: second derivatives, which the op has not
        leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        out = dydila_reference(*leaves, normalize=ctx.normalize, router_grad=ctx.router_grad,
                               eps=ctx.eps)
        grads = torch.autograd.grad(out, leaves, grad_out, create_graph=True, allow_unused=True)
    else:
        grads = torch.ops.dydilit.attention_bwd(
            grad_out, *inputs, ctx.normalize, ctx.router_grad, ctx.eps,
            dq, dk, attn, kernel_logits, difference_logits, k_sum, den)
    if not ctx.router_grad:
        grads = (*grads[:7], None, None)
    return *grads, None, None, None

def flops(q, *rest, backward=False, **_):
    """What FlopCounterMode counts on the Python path, from the arguments' shapes."""
    (B, N, D), (n_F,), (n_D,), normalize, router_grad = q, *rest[4:6], *rest[8:10]
    routers = 8 * B * N * D * (n_F + n_D)
    products = 2 * B * N * D * (2 * min(N, D) + normalize)
    return 2 * (products + router_grad * routers) if backward else products + routers

if FUSED_DEVICES:
    lib, ops = torch.library, torch.ops.dydilit
    lib.register_fake("dydilit::attention", lambda q, *_: q.new_empty(q.shape))
    lib.register_fake("dydilit::attention_fwd", fake_forward)
    lib.register_fake("dydilit::attention_bwd",
                      lambda grad_out, *x: tuple(z.new_empty(z.shape) for z in x[:9]))
    lib.register_autograd("dydilit::attention_fwd", attention_backward,
                          setup_context=save_for_backward)
    register_flop_formula([ops.attention, ops.attention_fwd])(flops)
    register_flop_formula(ops.attention_bwd)(lambda grad_out, *x, **_: flops(*x, backward=True))

def project(rows: Tensor, projectors: Tensor, index: Tensor) -> Tensor:
    """project_by_index, for torch.compile as one operator: the sizes of its products depend on the
    routes. By tiles no GPU waits to learn them, and torch.func has all rules."""
    dtype = (rows[:0] @ rows[:0].mT).dtype  # autocast may decide it
    way = project_by_tiles if rows.is_cuda or in_transform() else project_op
    return way(rows.to(dtype), projectors.to(dtype), index)

def project_by_tiles(rows, projectors, index):
    """A projector's rows fill tiles of T, the last with zeros. (F.grouped_mm: csrc/README.md)"""
    M, n = len(rows), len(projectors)
    T = 16 * math.ceil(max(M, 1) / n / 128)  # 8 n tiles, and at most n more
    numbers = torch.arange(M // T + n, device=index.device).unsqueeze(1)
    mine = index == numbers[:n]  # (n, M)
    count = mine.sum(1)  # the rows of each projector
    order = mine.flatten().cumsum(0).view_as(mine).gather(0, index.unsqueeze(0)).squeeze(0)
    tiles = (count + T - 1) // T  # of each projector
    ends = tiles.cumsum(0)
    place = order + (T * (ends - tiles) + count - count.cumsum(0) - 1)[index]  # of each row
    owner = (ends <= numbers).sum(1).clamp(max=n - 1)  # the projector of each tile
    filled = rows.new_zeros(len(owner) * T, rows.shape[1]).index_copy(0, place, rows)
    return (filled.unflatten(0, (-1, T)) @ projectors[owner]).flatten(0, 1).index_select(0, place)

project_op = torch.library.custom_op("dydilit::project", project_by_index, mutates_args=())

@torch.library.custom_op("dydilit::project_weights", mutates_args=())
def project_weights(rows: Tensor, cotangents: Tensor, index: Tensor, n: int) -> Tensor:
    """The gradient of the n projectors (n, D, D)."""
    parts = ((index == i).nonzero().squeeze(1) for i in range(n))
    return torch.stack([rows.index_select(0, i).mT @ cotangents.index_select(0, i) for i in parts])

def project_backward(ctx, grad):
    rows, projectors, index = ctx.saved_tensors
    grad_projectors = project_weights(rows, grad, index, len(projectors))
    return project_op(grad, projectors.mT, index), grad_projectors, None

def project_weights_backward(ctx, grad):
    rows, cotangents, index = ctx.saved_tensors
    return project_op(cotangents, grad.mT, index), project_op(rows, grad, index), None, None

def save_tensors(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])

project_op.register_fake(lambda rows, *_: rows.new_empty(rows.shape))
project_op.register_autograd(project_backward, setup_context=save_tensors)
project_weights.register_fake(lambda rows, _, __, n: rows.new_empty(n, *2 * rows.shape[1:]))
project_weights.register_autograd(project_weights_backward, setup_context=save_tensors)
register_flop_formula([torch.ops.dydilit.project, torch.ops.dydilit.project_weights])(
    lambda rows, other, *_, **__: 2 * math.prod(rows) * other[-1])

if __name__ == "__main__":  # python -m dydilit: which path runs here, and is it right?
    sys.modules["dydilit"] = sys.modules["__main__"]
    try:
        from support.fused import main
    except ModuleNotFoundError:  # where pip has installed it
        from dydilit_fused import main
    main()
