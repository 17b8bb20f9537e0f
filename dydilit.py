"""DyDi-LiT in one file: Dynamic Differential Linear Attention (arXiv 2601.13683), model, diffusion and training.

Read it top to bottom. `torchrun train_min.py` trains it; NOTES.md says where the paper is silent and what was done.

    here                 shape            paper                                                               where
    x                    (B, N, D)        X, the N tokens of width d = D of each image                        Sec. 3.1
    q, k, v              (B, N, D)        Q, K, V = X W_0: the projections that all tokens share              Sec. 3.1
    q_prime, k_prime     (B, N, D)        Q', K': redundancy, each token through the projector it is routed to   (1) (2)
    q_projectors, k_...  (n_P, D, D)      W_i^Q, W_i^K, i = 1 .. n_P                                          (2)
    *_projector_router   (D, n_P)         R_P^Q, R_P^K                                                        (1)
    gamma                (n_F,)           the kernel factors gamma_1 .. gamma_{n_F}                           (5) (6)
    kernel_routers       (4, D, n_F)      R_F for Q, K, Q', K'                                                (6)
    q_t, k_t, qp_t, kp_t (B, N, D)        Q~, K~, Q~', K~': tokens after the kernel phi                       (6)
    lam                  (n_D,)           the differential factors lambda_1 .. lambda_{n_D}                   (7)
    difference_routers   (2, 2D, n_D)     R_D for Q and K                                                     (7)
    dq, dk               (B, N, D)        Q~ - lambda^Q Q~', K~ - lambda^K K~'                                (8)
    DWC                                   re-parameterised 3x3 depthwise convolution                          (9)

One head of width D everywhere, every norm over the whole token: the paper's GFLOPs admit nothing else (NOTES.md).
The skeleton keeps DiT's names (Peebles & Xie 2023), the new parts the paper's letters.
"""

import functools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

def check_fields(config, positive=(), fractions=()):
    """ValueError unless every field has its type and no number is negative, or worse for those that are named here."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if type(value) is not field.type and not (field.type is float and type(value) is int):
            raise ValueError(f"{type(config).__name__}.{name} must be {field.type.__name__}, got {value!r}")
        low, high = int(name in positive), 1 if name in fractions else math.inf
        if field.type in (int, float) and not low <= value <= high:
            raise ValueError(f"{type(config).__name__}.{name} must be between {low} and {high}, got {value}")

@dataclass(frozen=True)
class Config:
    """The model. The comment behind each field is also its help line on the command line."""
    input_size: int = 32  # side of the square input: latents (image / 8) or pixels
    patch_size: int = 2  # side of a patch; (input_size / patch_size)^2 = N tokens
    in_channels: int = 4  # 4 for Stable Diffusion latents, 1 or 3 for pixels
    hidden_size: int = 384  # D, the token width; a multiple of 4
    depth: int = 9  # L, the number of blocks
    n_projectors: int = 3  # n_P, routed projectors for Q' and for K' (Eq. 2)
    n_kernels: int = 9  # n_F, kernel factors gamma (Eq. 6)
    n_lambdas: int = 9  # n_D, differential factors lambda (Eq. 7)
    num_classes: int = 1000  # labels are 0 .. num_classes - 1; num_classes itself means "no label"
    normalize: bool = True  # divide by the guarded denominator of Eq. 4; off is Eq. 8 as printed
    router_grad: bool = True  # straight-through gradient for the routers; off leaves them at their initial values

    def __post_init__(self):
        check_fields(self, positive=[field.name for field in fields(Config)])
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide input_size {self.input_size}")

    def build(self): return DyDiLiT(self)  # baselines.py has configurations that build another network

# S, B, L: Sec. 4.1 of the paper; at 512 pixels L/2 takes input_size=64. The others are ours, for pixels.
PRESETS = {
    "S/2":      Config(hidden_size=384, n_projectors=3, n_kernels=9, n_lambdas=9),
    "B/2":      Config(hidden_size=512, n_projectors=5, n_kernels=15, n_lambdas=15),
    "L/2":      Config(hidden_size=768, n_projectors=7, n_kernels=21, n_lambdas=21),
    "pixels32": Config(input_size=32, patch_size=2, in_channels=3, hidden_size=256, depth=6, num_classes=10),
    "photos":   Config(input_size=32, patch_size=2, in_channels=3, hidden_size=64, depth=4, num_classes=2),
    "digits":   Config(input_size=8, patch_size=2, in_channels=1, hidden_size=96, depth=4, num_classes=10),
}

# ---------------------------------------------------------------------------------------------------------------------
# The equations: pure functions, float32 inside (float64 inputs stay float64), and the specification of the fused op.

def wide(x):
    """x in float32, or in float64 if it is: kernels, routers, sums and the division are not left to 16 bits."""
    return x if x.dtype == torch.float64 else x.float()

def power_kernel(z, gamma):
    """phi (Eq. 5): bend the direction of relu(z) by an element-wise power, keep its norm over the last axis.

    z (..., D), gamma broadcast over (..., 1); returns (..., D). A row without a positive entry gives 0 and 0 gradients.
    """
    r = wide(z).relu()
    alive = r > 0
    m = r.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
    t = r / m  # t and, for gamma >= 0, t^gamma lie in [0, 1] whatever z is; m cancels, so it carries no gradient
    p = torch.where(alive, torch.where(alive, t, 1) ** gamma, 0)
    s, n = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (t, p))
    return p / torch.where(n > 0, n, 1) * (m * s)

def route(z, router, router_grad=True):
    """The arg max of Eqs. 1, 6 and 7; the lowest index wins a tie.

    z (..., D), router (D, n); returns index (...) int64 and gate (..., 1). The gate is exactly 1. It multiplies what
    was selected and, being p / stop_gradient(p) of the choice's softmax probability p, brings the router a gradient
    (straight-through; the paper does not say how its routers learn). router_grad=False: none.
    """
    with torch.autocast(z.device.type, enabled=False):
        logits = wide(z) @ wide(router)
        index = logits.argmax(-1)
        if not router_grad: return index, logits.new_ones(*index.shape, 1)
        p = logits.softmax(-1).gather(-1, index.unsqueeze(-1))
        return index, p / p.detach()

def grouped_mm_has_a_kernel(x):
    """On Hopper F.grouped_mm is one kernel, waits for nothing, and an unchosen projector's gradient is 0."""
    if not x.is_cuda or x.shape[-1] % 8: return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == 9

def routed_projection(x, projectors, router, router_grad=True):
    """Q' or K' (Eqs. 1 and 2): every token through the one projector that it is routed to.

    x (B, N, D), projectors (n_P, D, D), router (D, n_P); returns (B, N, D). Tokens are grouped by route, so that each
    costs one D x D product and nothing of size (B, N, n_P, D) is ever made.
    """
    tokens, n_P = x.flatten(0, 1), len(projectors)
    index, gate = route(tokens, router, router_grad)
    order = index.to(torch.uint8 if n_P < 256 else index.dtype).argsort(stable=True)  # few bits sort fast on a GPU
    groups = tokens.index_select(0, order)
    ends = (index <= torch.arange(n_P, device=x.device).unsqueeze(1)).sum(1)  # where each route's group ends
    if grouped_mm_has_a_kernel(tokens):
        projected = F.grouped_mm(groups.bfloat16(), projectors.bfloat16(), offs=ends.int())
    else:  # a projector that nobody chose: 0 rows
        projected = torch.cat([group @ w for group, w in zip(groups.tensor_split(ends[:-1].tolist()), projectors)])
    return (torch.empty_like(projected).index_copy(0, order, projected) * gate.to(projected.dtype)).view_as(x)

def measure(z, gamma, router, router_grad=True):
    """The dynamic measure kernel (Eq. 6): z~ = phi(z) with the gamma that each token is routed to. z (B, N, D)."""
    index, gate = route(z, router, router_grad)
    return power_kernel(z, wide(gamma)[index].unsqueeze(-1) * gate)

def difference(z_t, zp_t, lam, router, router_grad=True):
    """The token difference (Eqs. 7 and 8): z~ - lambda z~', lambda chosen from both. z_t, zp_t (B, N, D)."""
    index, gate = route(torch.cat([z_t, zp_t], dim=-1), router, router_grad)
    return z_t - wide(lam)[index].unsqueeze(-1) * gate * zp_t

def linear_attention(q, k, v, normalize=True, eps=1e-6, tokens_first=None):
    """Eq. 4 (normalize=True) or its numerator alone, which is Eq. 8. q, k, v (B, N, D); returns (B, N, D).

    (q k^T) v and q (k^T v) are the same sum in two orders, with 2 N^2 D and 2 N D^2 multiply-adds: the cheaper is taken
    unless tokens_first says which. A difference of tokens can make the denominator of Eq. 4 vanish or turn negative, so
    it is kept above 1e-3 of its Cauchy-Schwarz bound: scale-free, and |output| never exceeds 1000 max |v|.
    """
    if tokens_first is None: tokens_first = q.shape[-2] <= q.shape[-1]
    out = (q @ k.mT) @ v if tokens_first else q @ (k.mT @ v)
    if not normalize: return out
    den = q @ k.sum(-2, keepdim=True).mT  # (B, N, 1)
    norm_q, norm_k = (torch.linalg.vector_norm(z, dim=-1, keepdim=True) for z in (q, k))
    return out / (torch.maximum(den, 1e-3 * norm_q * norm_k.sum(-2, keepdim=True)) + eps)

def dydila_attention(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers,
                     *, normalize=True, router_grad=True, eps=1e-6, backend="auto"):
    """Everything of DyDiLA between the projections and the convolution: Eqs. 5 to 8.

    q, k, q_prime, k_prime, v (B, N, D); gamma (n_F,); lam (n_D,); kernel_routers (4, D, n_F) for Q, K, Q', K' in this
    order; difference_routers (2, 2D, n_D) for Q, K. Returns (B, N, D) in v's dtype.
    backend: "auto", "reference" (this code) or "fused" (the extension; RuntimeError where it is not built).
    """
    check_shapes(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers)
    if backend not in ("auto", "reference", "fused"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'fused', got {backend!r}")
    fused = q.device.type in FUSED_DEVICES and torch.autograd.forward_ad._current_level < 0  # no jvp
    if backend == "fused" and not fused:
        raise RuntimeError(f"no extension for {q.device.type} or for jvp is here; python setup.py build_ext --inplace")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, q_prime, k_prime, v)))
    if backend == "auto" and q.is_cuda:  # what the CUDA kernels are made for
        fused = fused and torch.cuda.get_device_capability(q.device) >= (8, 0) and dtype != torch.float64
        fused = fused and q.shape[-1] <= 1536 and max(len(gamma), len(lam)) <= 256
    if fused and backend != "reference":
        core = wide(q.new_empty(0, dtype=dtype)).dtype
        tensors = [x.to(dtype) for x in (q, k, q_prime, k_prime, v)]
        tensors += [x.to(core) for x in (gamma, lam, kernel_routers, difference_routers)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return torch.ops.dydilit.attention_fwd(*tensors, normalize, router_grad, eps)[0].to(v.dtype)
        return torch.ops.dydilit.attention(*tensors, normalize, eps).to(v.dtype)  # which keeps nothing for a backward
    with torch.autocast(q.device.type, enabled=False):  # in 16 bits every linear attention so far has met NaN
        q_t, k_t, qp_t, kp_t = (measure(z, gamma, router, router_grad)
                                for z, router in zip((q, k, q_prime, k_prime), kernel_routers))
        dq = difference(q_t, qp_t, lam, difference_routers[0], router_grad)
        dk = difference(k_t, kp_t, lam, difference_routers[1], router_grad)
        return linear_attention(dq, dk, wide(v), normalize, eps).to(v.dtype)

def check_shapes(q, *rest):
    """ValueError unless the nine tensors of dydila_attention fit together, naming the one that does not."""
    if q.dim() != 3: raise ValueError(f"q must be (B, N, D), got {tuple(q.shape)}")
    D, n_F, n_D = q.shape[-1], rest[4].numel(), rest[5].numel()
    names = ("k", "q_prime", "k_prime", "v", "gamma", "lam", "kernel_routers", "difference_routers")
    for name, x, shape in zip(names, rest, [q.shape] * 4 + [(n_F,), (n_D,), (4, D, n_F), (2, 2 * D, n_D)]):
        if x.shape != shape: raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")

# The same function fused, forward and backward: csrc/. Without it, or with one for another torch, the code above runs.
FUSED_DEVICES = ()
try:
    import dydilit_C
    built = dydilit_C.build_info()
    if built["torch"] != torch.__version__.split("+")[0]:
        raise ImportError(f"dydilit_C was built for torch {built['torch']}, this is {torch.__version__}")
    FUSED_DEVICES = ("cpu", "cuda") if built["cuda_archs"] else ("cpu",)
except ModuleNotFoundError: pass  # never built
except ImportError as e:
    print(f"dydilit: no fused op, the Python path instead ({e}); python setup.py build_ext --inplace", file=sys.stderr)

def fused_fake(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers, normalize, router_grad, eps):
    (B, N, D), new = q.shape, gamma.new_empty
    n, b = min(N, D), B if normalize else 0
    core = q.new_empty if q.is_cuda and q.dtype == torch.bfloat16 else new  # CUDA keeps Dq, Dk and their product narrow
    return (q.new_empty(B, N, D), core(B, N, D), core(B, N, D), core(B, n, n), new(4, B, N, len(gamma)),
            new(2, B, N, len(lam)), new(b, D + 1), new(b, N))

def fused_setup(ctx, inputs, output):
    ctx.options = inputs[9:]  # normalize, router_grad, eps
    ctx.mark_non_differentiable(*output[1:])  # what the backward needs again
    ctx.save_for_backward(*inputs[:9], *output[1:])

def fused_backward(ctx, dout, *_):
    grads = torch.ops.dydilit.attention_bwd(dout, *(kept := ctx.saved_tensors)[:9], *ctx.options, *kept[9:])
    return *(grads if ctx.options[1] else grads[:7] + (None, None)), None, None, None

def fused_twice(ctx, *_): raise RuntimeError("the fused op has no second derivatives; backend='reference' has")

if FUSED_DEVICES:
    torch.library.register_fake("dydilit::attention", lambda q, *_: q.new_empty(q.shape))
    torch.library.register_fake("dydilit::attention_fwd", fused_fake)
    torch.library.register_fake("dydilit::attention_bwd", lambda dout, *x: tuple(z.new_empty(z.shape) for z in x[:9]))
    torch.library.register_autograd("dydilit::attention_fwd", fused_backward, setup_context=fused_setup)
    torch.library.register_autograd("dydilit::attention_bwd", fused_twice)

# ---------------------------------------------------------------------------------------------------------------------
# The module.

class DWC(nn.Module):
    """Depthwise 3x3 convolution with parallel 3x3, 1x3 and 3x1 branches (Eq. 9; ACNet, Ding et al. 2019).

    No batch norm inside the branches: it would mix images of different noise levels and tie an image to its batch. The
    branches are then linear, so their kernels are added before the one convolution: the same function, a third of the
    work. What they change is the optimiser's path, and `merge_` leaves one plain 3x3.
    """
    def __init__(self, dim):
        super().__init__()
        def branch(*size):  # channels-last, as its gradient will be: DDP wants them alike
            return nn.Parameter(torch.empty(dim, 1, *size, memory_format=torch.channels_last))
        self.square, self.horizontal, self.vertical = branch(3, 3), branch(1, 3), branch(3, 1)
        self.bias = nn.Parameter(torch.empty(dim))

    def kernel(self):
        if self.horizontal is None: return self.square
        return self.square + F.pad(self.horizontal, (0, 0, 1, 1)) + F.pad(self.vertical, (1, 1, 0, 0))

    @torch.no_grad()
    def merge_(self):
        """Fold the branches into `square` for inference, exactly."""
        self.square.copy_(self.kernel())
        self.horizontal = self.vertical = None

    def forward(self, v, grid):
        return tokens(F.conv2d(image(v, grid), self.kernel(), self.bias, padding=1, groups=len(self.bias)))

def image(x, grid):
    """Tokens (B, H W, D) seen as an image (B, D, H, W): no copy, the memory becomes channels-last."""
    return x.mT.unflatten(-1, grid)

def tokens(x):
    """The inverse of `image`: (B, D, H, W) -> (B, H W, D)."""
    return x.flatten(2).mT

class DyDiLA(nn.Module):
    """Dynamic differential linear attention (Fig. 2b): x (B, N, D), grid (H, W) with H W = N -> (B, N, D).

    Reads hidden_size, n_projectors, n_kernels, n_lambdas, normalize and router_grad of its config, nothing else, and
    can stand alone in another model.
    """
    def __init__(self, config):
        super().__init__()
        D, n_P, n_F, n_D = config.hidden_size, config.n_projectors, config.n_kernels, config.n_lambdas
        self.normalize, self.router_grad = config.normalize, config.router_grad
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_projectors = nn.Parameter(torch.empty(n_P, D, D))
        self.k_projectors = nn.Parameter(torch.empty(n_P, D, D))
        self.q_projector_router = nn.Parameter(torch.empty(D, n_P), requires_grad=self.router_grad)
        self.k_projector_router = nn.Parameter(torch.empty(D, n_P), requires_grad=self.router_grad)
        self.gamma = nn.Parameter(torch.empty(n_F))
        self.kernel_routers = nn.Parameter(torch.empty(4, D, n_F), requires_grad=self.router_grad)
        self.lam = nn.Parameter(torch.empty(n_D))
        self.difference_routers = nn.Parameter(torch.empty(2, 2 * D, n_D), requires_grad=self.router_grad)
        self.dwc = DWC(D)
        self.proj = nn.Linear(D, D)
        self.backend, self.dtype = "auto", None  # dtype: of what the attention reads; None: as the projections give it
        initialize(self)

    def forward(self, x, grid):
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {x.shape[1]} tokens")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q_prime = routed_projection(x, self.q_projectors, self.q_projector_router, self.router_grad)
        k_prime = routed_projection(x, self.k_projectors, self.k_projector_router, self.router_grad)
        o = dydila_attention(*(z.to(self.dtype or z.dtype) for z in (q, k, q_prime, k_prime, v)), self.gamma, self.lam,
                             self.kernel_routers, self.difference_routers,
                             normalize=self.normalize, router_grad=self.router_grad, backend=self.backend)
        return self.proj(o + self.dwc(v, grid))  # Eq. 9

class GLUMBConv(nn.Module):
    """The feed-forward of Sana (Xie et al. 2025): 1x1 to 8D, SiLU, depthwise 3x3, gate to 4D, 1x1 back to D."""
    def __init__(self, dim):
        super().__init__()
        self.inverted_conv = nn.Linear(dim, 8 * dim)
        self.depth_conv = nn.Conv2d(8 * dim, 8 * dim, 3, 1, 1, groups=8 * dim).to(memory_format=torch.channels_last)
        self.point_conv = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x, grid):
        x = F.silu(self.inverted_conv(x))                              # (B, N, 8D)
        x, gate = tokens(self.depth_conv(image(x, grid))).chunk(2, -1)  # (B, N, 4D) each
        return self.point_conv(x * F.silu(gate))                       # (B, N, D)

# ---------------------------------------------------------------------------------------------------------------------
# The network: DiT's skeleton around them.

def modulate(x, shift, scale): return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

def angles(position, n):
    """position (M,) -> (M, n) float64: the position times n frequencies, from 1 down towards 1 / 10000."""
    i = torch.arange(n, dtype=torch.float64, device=position.device)
    return position.double().unsqueeze(1) * torch.exp(-math.log(10000) * i / n)

def position_embedding(grid, dim):
    """Fixed 2-D sin-cos positions (H W, dim); the first half of the width encodes the column, as in DiT."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angle = [angles(p.flatten(), dim // 4) for p in (columns, rows)]
    return torch.cat([f(a) for a in angle for f in (torch.sin, torch.cos)], dim=1).float()

class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x): return tokens(self.proj(x))

class TimestepEmbedder(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        a = angles(t, self.frequencies // 2)
        return self.mlp(torch.cat([a.cos(), a.sin()], dim=1).to(self.mlp[0].weight.dtype))

class LabelEmbedder(nn.Module):
    """Labels 0 .. num_classes - 1, and num_classes for "no label" (classifier-free guidance, Ho & Salimans 2022)."""
    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y): return self.embedding_table(y)

class Block(nn.Module):
    """adaLN-Zero (Peebles & Xie 2023): each branch is shifted, scaled and gated by the condition c (B, D)."""
    def __init__(self, config, attn=None, mlp=None):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = attn or DyDiLA(config)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp or GLUMBConv(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, grid):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), grid)

class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, config.patch_size**2 * 2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class DyDiLiT(nn.Module):
    """The network: model(x (B, C, H, W), t (B,), y (B,)) -> (B, 2C, H, W), the noise and the variance's weight v."""
    def __init__(self, config, blocks=None):
        super().__init__()
        self.config = config
        self.grid = (config.input_size // config.patch_size,) * 2
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.register_buffer("pos_embed", position_embedding(self.grid, config.hidden_size).unsqueeze(0))
        self.blocks = nn.ModuleList(blocks or [Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        initialize(self)

    def unpatchify(self, x):
        """(B, N, p p 2C) -> (B, 2C, H, W)."""
        (h, w), p = self.grid, self.config.patch_size
        return x.unflatten(2, (p, p, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x, t, y):
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.shape[1:] != shape: raise ValueError(f"x is {tuple(x.shape)}; this model takes (B, {str(shape)[1:]}")
        x = self.x_embedder(x) + self.pos_embed          # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)      # (B, D)
        for block in self.blocks:
            x = block(x, c, self.grid)                   # (B, N, D)
        return self.unpatchify(self.final_layer(x, c))   # (B, 2C, H, W)

@torch.no_grad()
def initialize(model):
    """Every initial value, in one place; from torch's global generator."""
    for module in model.modules():  # first by kind
        if isinstance(module, nn.Linear):  # DiT's rule
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None: nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # PyTorch's default, as in Sana: uniform with bound 1 / sqrt(fan_in)
            module.reset_parameters()
    for module in model.modules():  # then by role
        if isinstance(module, DyDiLA):
            for weight in (*module.q_projectors, *module.k_projectors): nn.init.xavier_uniform_(weight)
            for name, router in module.named_parameters(recurse=False):
                if "router" in name: nn.init.normal_(router, std=0.02)  # not zero: every token would take index 0
            nn.init.constant_(module.gamma, 3.0)  # Sec. 4.1
            nn.init.constant_(module.lam, 0.01)  # Sec. 4.1
        elif isinstance(module, DWC):  # as a Conv2d of each branch's size would
            for weight in (module.square, module.horizontal, module.vertical):
                nn.init.uniform_(weight, -weight[0].numel() ** -0.5, weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):  # as the linear map that it is
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, TimestepEmbedder):
            for layer in (module.mlp[0], module.mlp[2]): nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, (Block, FinalLayer)):  # adaLN-Zero: each block starts as the identity, the output as 0
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
            if isinstance(module, FinalLayer): nn.init.zeros_(module.linear.weight)

# ---------------------------------------------------------------------------------------------------------------------
# Randomness by address: every random number is a function of (seed, what it is for), never of a generator's history. So
# a step can be repeated, resumed, or shared among any number of processes, and image i is the same in any batch.

ORDER, STEP, HELD_OUT, SAMPLE = range(4)

def generator(seed, purpose, a=0, b=0):
    """The counter-based generator (Philox) of one address, e.g. (seed, STEP, step, index in the global batch)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, a, b]))

# ---------------------------------------------------------------------------------------------------------------------
# Diffusion, as in DiT: linear betas, noise prediction, learned variance (Ho et al. 2020; Nichol & Dhariwal 2021).

def respace(T, steps):
    """`steps` of the T timesteps, evenly spaced, both ends kept: respace(1000, 250) = [0, 4, 8, ..., 995, 999]."""
    if not 2 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be between 2 and {T}, got {steps}")
    return [round(i * (T - 1) / (steps - 1)) for i in range(steps)]

def with_guidance(model, scale, channels):
    """Classifier-free guidance (Ho & Salimans 2022) on the noise of the first `channels` channels; 1.0 is no guidance.

    DiT guides three of the four latent channels, which its authors kept for reproducibility; the paper keeps DiT's
    settings. The rest, the variance too, is the conditional one. Returns a function of (x, t, y) like the model.
    """
    def guided(x, t, y):
        no_label = torch.full_like(y, model.config.num_classes)
        out, free = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, no_label])).chunk(2)
        return torch.cat([(free + scale * (out - free))[:, :channels], out[:, channels:]], dim=1)
    return model if scale == 1.0 else guided

class Diffusion:
    """q, the loss and the samplers, over all T timesteps or over `steps` of them. t (B,) indexes `self.timesteps`."""
    def __init__(self, steps=None, T=1000):
        self.timesteps = torch.tensor(respace(T, T if steps is None else steps))  # what the model is told
        abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, T, dtype=torch.float64), 0)[self.timesteps]
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        alpha, beta = abar / previous, 1 - abar / previous
        variance = beta * (1 - previous) / (1 - abar)  # beta~_t, 0 at t = 0
        self.tables = {
            "sqrt_abar": abar.sqrt(), "sqrt_1m_abar": (1 - abar).sqrt(), "sqrt_previous": previous.sqrt(),
            "sqrt_1m_previous": (1 - previous).sqrt(), "log_beta": beta.log(),
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),  # clipped at t = 0, where it would be -inf
            "mean_x0": previous.sqrt() * beta / (1 - abar), "mean_xt": (1 - previous) * alpha.sqrt() / (1 - abar)}

    def at(self, name, t, x):
        """The table's values at t (B,), float64 until here, shaped to multiply x (B, C, H, W)."""
        self.tables[name] = self.tables[name].to(t.device)  # once
        return self.tables[name][t].to(x.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """A draw from q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)."""
        return self.at("sqrt_abar", t, x0) * x0 + self.at("sqrt_1m_abar", t, x0) * noise

    def q_posterior(self, x0, x_t, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        return self.at("mean_x0", t, x_t) * x0 + self.at("mean_xt", t, x_t) * x_t, self.at("log_variance", t, x_t)

    def predict_x0(self, eps, x_t, t):
        return (x_t - self.at("sqrt_1m_abar", t, x_t) * eps) / self.at("sqrt_abar", t, x_t)

    def p_mean_variance(self, eps, v, x_t, t, clip=False):
        """Mean and log variance of p(x_{t-1} | x_t); v in [-1, 1] moves the log variance from beta~_t to beta_t."""
        x0 = self.predict_x0(eps, x_t, t)
        mean, low = self.q_posterior(x0.clamp(-1, 1) if clip else x0, x_t, t)
        weight = (v + 1) / 2
        return mean, weight * self.at("log_beta", t, x_t) + (1 - weight) * low

    def variational_term(self, x0, x_t, t, mean, log_variance):
        """KL(q || p), or at t = 0 the negative log likelihood of x_0; bits per dimension, (B,)."""
        true_mean, true_log_variance = self.q_posterior(x0, x_t, t)
        kl = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                    + (true_mean - mean).square() * (-log_variance).exp())
        nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).flatten(1).mean(1) / math.log(2)

    def loss(self, model, x0, y, t, noise):
        """Mean square error of the noise plus the variational term; the latter trains the variance only. (B,) each."""
        x_t = self.q_sample(x0, t, noise)
        eps, v = model(x_t, self.timesteps.to(t.device)[t], y).to(x0.dtype).chunk(2, dim=1)
        mse = (noise - eps).square().flatten(1).mean(1)
        mean, log_variance = self.p_mean_variance(eps.detach(), v, x_t, t)
        return mse, self.variational_term(x0, x_t, t, mean, log_variance)

    @torch.no_grad()
    def sample(self, model, y, index, *, seed, cfg=1.0, cfg_channels=None, sampler="ddpm", clip=False, on_step=None):
        """Images for the labels y (B,), whose numbers in the whole set are `index`: image i depends on (seed, i) alone.

        sampler "ddpm" (ancestral, learned variance) or "ddim" (eta = 0); clip keeps x_0 in [-1, 1], for pixels.
        cfg_channels None guides all channels. Returns (B, C, H, W) float32; calls on_step() after every step.
        """
        config, device = model.config, y.device
        if sampler not in ("ddpm", "ddim"): raise ValueError(f"sampler must be 'ddpm' or 'ddim', got {sampler!r}")
        if y.numel() and not (0 <= int(y.min()) and int(y.max()) < config.num_classes):
            raise ValueError(f"labels must be in 0 .. {config.num_classes - 1}, got {int(y.min())} .. {int(y.max())}")
        generators = [generator(seed, SAMPLE, i) for i in index]
        shape = (config.in_channels, config.input_size, config.input_size)
        def draw(): return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))
        guided = with_guidance(model, cfg, cfg_channels or config.in_channels)
        with ThreadPoolExecutor(1) as pool:  # draws the next step's noise during this one
            x, noise = draw().to(device), pool.submit(draw)
            for s in reversed(range(len(self.timesteps))):
                t = torch.full_like(y, s)
                eps, v = guided(x, self.timesteps.to(device)[t], y).to(x.dtype).chunk(2, dim=1)
                if sampler == "ddpm":
                    x, log_variance = self.p_mean_variance(eps, v, x, t, clip)
                    if s: x, noise = x + (0.5 * log_variance).exp() * noise.result().to(device), pool.submit(draw)
                else:  # the deterministic path of Song et al. 2021
                    x0 = self.predict_x0(eps, x, t)
                    if clip:
                        x0 = x0.clamp(-1, 1)
                        eps = (x - self.at("sqrt_abar", t, x) * x0) / self.at("sqrt_1m_abar", t, x)
                    x = self.at("sqrt_previous", t, x) * x0 + self.at("sqrt_1m_previous", t, x) * eps
                if on_step: on_step()
        return x

def discretized_log_likelihood(x, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) gives the 1/127.5-wide bin around x; the end bins are open."""
    def cdf(z):  # of the standard normal, by its tanh approximation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    upper, lower = (cdf((x - mean + side / 255) * (-log_scale).exp()) for side in (1, -1))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()

# ---------------------------------------------------------------------------------------------------------------------
# Training.

@dataclass(frozen=True)
class Training:
    """The run. The comment behind each field is also its help line on the command line."""
    data: str = "data/imagenet256"  # prepared folder: images.npy, labels.npy, meta.json (data/README.md)
    out: str = "out/imagenet256"  # where ckpt.pt and log.jsonl go
    steps: int = 400_000  # optimiser steps in all
    batch_size: int = 256  # images per step, over all processes
    micro_batch: int = 0  # images per forward pass of one process, to save memory; 0 is its whole share
    lr: float = 1e-4  # AdamW's learning rate; betas 0.9 and 0.999, no weight decay
    warmup: int = 0  # steps in which the learning rate rises to lr
    decay: float = 0.0  # last part of the run in which it falls linearly to 0; 0 keeps it constant
    ema_decay: float = 0.9999  # of the averaged weights that are sampled from
    grad_clip: float = 0.0  # largest gradient norm; 0 does not clip
    label_dropout: float = 0.1  # share of images that lose their label, for guidance
    bf16: bool = False  # bfloat16 autocast; kernels, logits and norms stay in float32
    seed: int = 0  # of weights, order, flips, timesteps, noise and dropped labels
    log_every: int = 100  # steps between lines of log.jsonl
    eval_every: int = 5_000  # steps between losses on the held-out images
    ckpt_every: int = 10_000  # steps between checkpoints

    def __post_init__(self):
        check_fields(self, positive=("steps", "batch_size", "log_every", "eval_every", "ckpt_every"),
                     fractions=("decay", "ema_decay", "label_dropout"))

# What may differ between a run and its continuation, since it does not change what a step computes (steps: but for
# decay). The rest may not, nor what meta.json says of the data.
RESUMABLE = ("data", "vae", "out", "steps", "micro_batch", "log_every", "eval_every", "ckpt_every")

class Data:
    """One prepared data set (data/README.md), memory-mapped and checked against the model that will read it."""
    def __init__(self, path, config):
        path, channels, side = Path(path), config.in_channels, config.input_size
        if not (path / "meta.json").exists():
            command = f"imagefolder/prepare.py ROOT --size {f'{8 * side} --vae' if channels == 4 else side}"
            if path.name in ("digits", "photos"): command = f"{path.name}/prepare.py"
            raise FileNotFoundError(f"no prepared data set in {path}; make it: python data/{command} --out {path}")
        self.meta = json.loads((path / "meta.json").read_text())
        try:
            self.images, self.labels = np.load(path / "images.npy", mmap_mode="r"), np.load(path / "labels.npy")
        except (ValueError, EOFError) as e:
            raise ValueError(f"{path} is damaged (cut short?), prepare it again: {e}") from e
        self.n_train, self.null = len(self.images) - self.meta["held_out"], config.num_classes
        self.meta["images"] = len(self.images)
        self.order = functools.lru_cache(1)(lambda seed, e: generator(seed, ORDER, e).permutation(self.n_train))
        self.scaling, kind, shape = self.meta.get("scaling"), "uint8", (channels, side, side)
        if self.scaling:  # latents: means, then standard deviations; of the image, then of its mirror image
            kind, shape = "float16", (1 + self.meta["flip"], 2 * channels, side, side)
        if self.images.dtype != kind or self.images.shape[1:] != shape:
            raise ValueError(f"{path}: {self.images.dtype} {self.images.shape[1:]}, but the model reads {kind} {shape}")
        if len(self.labels) != len(self.images) or self.n_train < 1:
            raise ValueError(f"{path}: {len(self.images)} images, {len(self.labels)} labels, {self.n_train} to train")
        if (low := self.labels.min()) < 0 or self.labels.max() >= self.null:
            raise ValueError(f"{path} has labels {low} .. {self.labels.max()}, the model {self.null} classes")

    def item(self, row, g, flip, dropout):
        """Image, label, timestep and noise, the random ones from g; of a latent, a draw from its posterior."""
        x, flip = self.images[row], flip and self.meta["flip"] and g.random() < 0.5
        if self.scaling:
            mean, std = np.split(x[int(flip)].astype(np.float32), 2)
            x = (mean + std * g.standard_normal(mean.shape, np.float32)) * self.scaling
        else:
            x = (x[..., ::-1] if flip else x).astype(np.float32) / 127.5 - 1
        y = self.null if g.random() < dropout else self.labels[row]
        return x, y, g.integers(1000), g.standard_normal(x.shape, np.float32)

    def batch(self, seed, step, batch_size, share, dropout):
        """x, y, t, noise of the images `share` (a range) of a step's batch; epoch e goes in the order of (seed, e)."""
        rows = [self.item(self.order(seed, e)[k], generator(seed, STEP, step, j), True, dropout)
                for j in share for e, k in [divmod(step * batch_size + j, self.n_train)]]
        return [torch.from_numpy(np.stack(z)) for z in zip(*rows)]

    def held_out(self, most=512):
        """The same of the first held-out images, with random parts that never change; [] without any."""
        numbers = range(self.n_train, min(self.n_train + most, len(self.images)))
        rows = [self.item(row, generator(0, HELD_OUT, row), False, 0.0) for row in numbers]
        return [torch.from_numpy(np.stack(z)) for z in zip(*rows)]

def distributed():
    """(rank, world size, device), from torchrun's environment if there is one; joins the process group once."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda": torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # a restart finds the keys of the dead in it
            if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
                raise ValueError("several machines restart only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun")
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device

def save_checkpoint(path, state):
    """Write beside, then rename: a full disk or a kill leaves the previous checkpoint as it was."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except RuntimeError as e: raise OSError(f"cannot write {beside}: {e}") from e  # torch's name for a full disk
    finally: beside.unlink(missing_ok=True)

def load_checkpoint(path):
    """What save_checkpoint wrote: a dict of model, ema, optimizer, step, config, training, meta (of the data)."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `torchrun train_min.py` makes one")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        return {k: ckpt[k] for k in ("model", "ema", "optimizer", "step", "config", "training", "meta")}
    except Exception as e:  # torch raises many kinds on a damaged file, with long texts
        raise ValueError(f"{path} is not a readable checkpoint (cut short?): {str(e).partition(chr(10))[0]}") from e

def learning_rate(training, step):
    tail = training.decay * training.steps
    return training.lr * min(1, (step + 1) / max(1, training.warmup), (training.steps - step) / tail if tail else 1)

def train(config, training, resume=False, on_step=None, on_eval=None):
    """Train, and leave ckpt.pt and log.jsonl in training.out. Returns the steps done, fewer if interrupted.

    resume continues from ckpt.pt if there is one; on_step(step, loss) is called after every step, on_eval(averaged
    model, held-out batch; without one that of the step) at every evaluation, and its dict joins the log.
    FileExistsError when `out` holds a run and resume is off; ValueError for a checkpoint of another configuration or a
    batch that cannot be divided; FloatingPointError at the first non-finite loss or gradient, the last checkpoint kept.
    """
    rank, world, device = distributed()
    torch.manual_seed(training.seed)
    data, diffusion = Data(training.data, config), Diffusion()
    share = training.batch_size // world  # of each batch, for this process
    micro = training.micro_batch or share
    if training.batch_size % world or share % micro:
        raise ValueError(f"batch_size {training.batch_size} for {world} processes: not divisible, or not by {micro=}")
    model, ema = config.build().to(device), config.build().to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=training.lr, weight_decay=0.0, fused=True)

    step, ckpt_path, log_path = 0, Path(training.out, "ckpt.pt"), Path(training.out, "log.jsonl")
    if not resume and (ckpt_path.exists() or log_path.exists()):
        raise FileExistsError(f"{training.out} holds another run; --resume continues it, --out names another folder")
    if resume and ckpt_path.exists():
        ckpt = load_checkpoint(ckpt_path)
        now, then = asdict(config) | asdict(training) | data.meta, ckpt["config"] | ckpt["training"] | ckpt["meta"]
        if differing := [k for k in then | now if k not in RESUMABLE and now.get(k) != then.get(k)]:
            listed = ", ".join(f"{k} {then.get(k)!r:.60} (now {now.get(k)!r:.60})" for k in differing)
            raise ValueError(f"{ckpt_path} belongs to another configuration: {listed}")
        for part, state in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")): part.load_state_dict(ckpt[state])
        step = ckpt["step"]
    if world > 1:  # this is also where everybody waits: nobody writes before all have looked
        steps = [None] * world
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the processes find checkpoints of steps {steps}: all machines must share {training.out}")
    if rank == 0:  # the log is cut back to the checkpoint
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "a+") as f:
            f.seek(0)
            f.truncate(sum(len(x) for x in f.readlines() if x.endswith("\n") and json.loads(x)["step"] <= step))

    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=training.bf16)
    held_out, stopped = data.held_out(), []
    handlers = {s: signal.signal(s, lambda signum, _: stopped.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    mine = range(rank * share, (rank + 1) * share)
    def fetch(step): return data.batch(training.seed, step, training.batch_size, mine, training.label_dropout)

    try:
        reader = ThreadPoolExecutor(1)  # reads the next step's images during this one
        upcoming, began, first_step = reader.submit(fetch, step), time.time(), step
        while step < training.steps:
            batch = [z.to(device, non_blocking=True) for z in upcoming.result()]
            upcoming = reader.submit(fetch, step + 1)
            optimizer.param_groups[0]["lr"] = lr = learning_rate(training, step)
            sums = torch.zeros(3, device=device)  # mse, variational term, processes asked to stop
            for first in range(0, share, micro):
                last = first + micro == share  # gradients travel between processes once a step
                with nullcontext() if world == 1 or last else net.no_sync():
                    with autocast:
                        mse, vb = diffusion.loss(net, *(z[first : first + micro] for z in batch))
                    ((mse + vb).sum() / share).backward()
                sums[:2] += torch.stack([mse.detach().sum(), vb.detach().sum()]) / training.batch_size
            sums[2] = len(stopped)
            if world > 1: dist.all_reduce(sums)
            norm = nn.utils.clip_grad_norm_(params, training.grad_clip or math.inf)
            mse, vb, stop, norm = [*sums.tolist(), norm.item()]  # the one place where the host waits for the device
            if not math.isfinite(mse + vb + norm):
                kept = f"its last checkpoint is {ckpt_path}" if ckpt_path.exists() else "there is none yet"
                raise FloatingPointError(f"step {step}: loss {mse + vb}, gradient norm {norm}; {kept}")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():  # or every average would keep the graph of all the earlier ones
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - training.ema_decay)
            step += 1
            if on_step: on_step(step, mse + vb)

            end, due = step == training.steps, (held_out or on_eval) and step % training.eval_every == 0
            if rank == 0 and (step % training.log_every == 0 or due or end):
                speed = round((step - first_step) * training.batch_size / (time.time() - began), 1)
                line = dict(step=step, loss=mse + vb, mse=mse, vb=vb, lr=lr, grad_norm=norm, images_per_s=speed)
                if held_out and (due or end):
                    parts = zip(*(z.to(device).split(micro) for z in held_out))  # in no more memory than training takes
                    with torch.no_grad(), autocast:
                        mse, vb = (torch.cat(z).mean().item() for z in zip(*(diffusion.loss(ema, *x) for x in parts)))
                    line |= {"held_out_mse": mse, "held_out_loss": mse + vb}
                if on_eval and (due or end): line |= on_eval(ema, held_out or batch)
                with open(log_path, "a") as f: f.write(json.dumps(line) + "\n")
                began, first_step = time.time(), step
            if rank == 0 and (step % training.ckpt_every == 0 or end or stop):
                save_checkpoint(ckpt_path, {
                    "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "config": asdict(config), "training": asdict(training), "meta": data.meta})
            if stop: break
        if world > 1: dist.barrier()  # ckpt.pt is there when train returns, on every process
        return step
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        for s, handler in handlers.items(): signal.signal(s, handler)
