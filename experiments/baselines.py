"""The models that the paper compares DyDi-LiT with, and every row of its ablations.

    torchrun -m experiments.train --preset DiT-digits    a variant, a hyphen, a preset of dydilit.py
    torchrun -m experiments.train --preset ladder-2-measure-S/2 --data data/NAME --out out/NAME

For readers who want to know what was compared. Imports dydilit.py, dig.py, mhla.py and routing.py.

Every variant keeps the skeleton of dydilit.py and changes three things: the attention, the
feed-forward and the number of blocks. An attention maps tokens (B, N, D) and their grid (H, W) to
(B, N, D), as DyDiLA does. The attentions without softmax compute in float32, and all of them but
DiG's and MHLA's divide by DyDiLA's guarded denominator. In the formulas below i and j number
tokens, h numbers heads, and d = D / heads. README.md says what was read of each model and what is a
choice of ours.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import dydilit
from dydilit import (
    DWC,
    PRESETS,
    Block,
    Config,
    DyDiLiT,
    GLUMBConv,
    at_least_float32,
    linear_attention,
    power_kernel,
    to_image,
    to_tokens,
)
from experiments import routing
from experiments.dig import gated_scan, scan_order
from experiments.mhla import block_attention, blocks_per_side, first_mixture

LADDER_FIELDS = (
    "kernel",
    "projection",
    "differential",
    "dwc",
    "rising_lambda",
    "batch_norm",
    "router_rule",
)


@dataclass(frozen=True)
class Baseline(Config):
    """A Config that names its attention and feed-forward. A comment is its field's help line."""

    attention: str = "softmax"  # softmax|kv-compressed|moh|relu|focused|lit|mhla|edit|gated|ladder
    feed_forward: str = "mlp"  # mlp (DiT), glumbconv (DyDi-LiT), sana (its start) or swiglu (DiG)
    heads: int = 1  # attention heads; edit and ladder have one
    shared_heads: int = 0  # moh: heads that every token uses, in the first two thirds of the blocks
    routed_heads: int = 1  # moh: how many of the other heads each token uses there
    qk_norm: bool = False  # relu: an RMSNorm of q and of k before the kernel, as in Sana-1.5
    kernel: str = "dynamic"  # ladder: relu, focused (Eq. 5, gamma 3) or dynamic (Eq. 6)
    projection: str = "dynamic"  # ladder: shared or dynamic (Eq. 2)
    differential: str = "token"  # ladder: none, token (Eq. 8) or map (Eq. 10)
    dwc: bool = True  # ladder: the re-parameterised convolution (Eq. 9)
    rising_lambda: bool = False  # ladder: lambda starts at 0.2 to 0.8 (by block), not at 0.01
    batch_norm: bool = False  # ladder: a batch norm in each branch of the convolution, as in ACNet
    router_rule: str = "ratio"  # ladder: how routers learn, ratio (dydilit.py), score or dense

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}"
                )
        self.check_heads()
        self.check_ladder()

    def check_heads(self):
        """ValueError if the attention cannot have so many heads, or so many routed ones."""
        divisor = self.heads * (2 if self.attention == "gated" else 1)  # DiG's q and k have D / 2
        if self.heads < 1 or self.hidden_size % divisor:
            raise ValueError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        if self.attention in ("edit", "ladder") and self.heads > 1:
            raise ValueError(f"attention {self.attention!r} has one head, got {self.heads}")
        if self.attention == "moh" and not 1 <= self.routed_heads <= self.heads - self.shared_heads:
            raise ValueError(
                f"routed_heads {self.routed_heads} must be between 1 and the {self.heads} heads "
                f"less the {self.shared_heads} shared ones"
            )
        if self.qk_norm and self.attention != "relu":
            raise ValueError(f"qk_norm is for attention 'relu', not for {self.attention!r}")

    def check_ladder(self):
        """ValueError if fields of the ladder contradict each other or belong to no ladder."""
        if self.differential != "none" and self.projection == "shared":
            raise ValueError(
                f"differential {self.differential!r} needs Q' and K': projection must be 'dynamic'"
            )
        useless_norm = self.batch_norm and not self.dwc
        useless_lambda = self.rising_lambda and self.differential == "none"
        if useless_norm or useless_lambda:
            raise ValueError(
                "batch_norm needs dwc, and rising_lambda a differential: it would change nothing"
            )
        if self.router_rule != "ratio":
            if not self.router_grad:
                raise ValueError(f"router_rule {self.router_rule!r} needs router_grad")
            if self.differential == "map":
                raise ValueError("differential 'map' has router_rule 'ratio' only")
        for name in LADDER_FIELDS:
            if self.attention != "ladder" and getattr(self, name) != getattr(Baseline, name):
                raise ValueError(f"{name} is for attention 'ladder', not for {self.attention!r}")

    def build(self):
        """The network, with its initial values."""
        block_class = DiGBlock if self.attention == "gated" else Block
        feed_forward = FEED_FORWARDS[self.feed_forward][0]
        blocks = []
        for i in range(self.depth):
            attn = attention_of(self, i)(self, i)
            blocks.append(block_class(self, attn, feed_forward(self.hidden_size)))
        model = DyDiLiT(self, blocks)
        initialize(model)
        return model


# --------------------------------------------------------------------------------------------------
# Attentions. The arguments of each class are a config and the number of its block.


def split_heads(x, heads):
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x):
    """(B, heads, N, D / heads) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def convolution(inputs, outputs, size, **options):
    """A Conv2d with a channels-last weight.

    to_image gives channels-last inputs, so the weight's gradient is channels-last too, and DDP
    wants a parameter and its gradient to have the same strides.
    """
    return nn.Conv2d(inputs, outputs, size, **options).to(memory_format=torch.channels_last)


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of every head. All (B, heads, N or M, d)."""
    return F.scaled_dot_product_attention(q, k, v)


class Softmax(nn.Module):
    """DiT (Peebles & Xie, ICCV 2023; facts of its public code).

        q, k, v = x W + b      o_ih = softmax_j(q_ih k_jh^T / sqrt(d)) v_jh
        O_i = [o_i1, o_i2, ..] W_o + b_o

    Parameter names are DiT's, which come from timm.
    """

    def __init__(self, config, i=0):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def compress(self, k, v, grid):
        """Keys and values (B, N, D) -> (B, M, D); here all N of them."""
        return k, v

    def attend(self, x, grid):
        """x (B, N, D) -> (B, heads, N, D / heads)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = self.compress(k, v, grid)
        q, k, v = (split_heads(z, self.heads) for z in (q, k, v))
        return softmax_attention(q, k, v)

    def forward(self, x, grid):
        return self.proj(join_heads(self.attend(x, grid)))


class KVCompressed(Softmax):
    """PixArt-Sigma (Chen et al., ECCV 2024; its public code).

        k, v <- LayerNorm(conv(k)), LayerNorm(conv(v))      conv: depthwise 2 x 2, stride 2

    and then DiT's attention, with a quarter of the keys. One convolution and one LayerNorm serve k
    and v. attention_of compresses in the last half of the blocks only, as PixArt-Sigma does (14 of
    28). An odd grid loses its last row or column of keys.
    """

    def __init__(self, config, i=0, ratio=2):
        super().__init__(config)
        D = config.hidden_size
        self.sr = convolution(D, D, ratio, stride=ratio, groups=D)
        self.norm = nn.LayerNorm(D)
        initialize(self)

    def compress(self, k, v, grid):
        return tuple(self.norm(to_tokens(self.sr(to_image(z, grid)))) for z in (k, v))


class WithLoss(torch.autograd.Function):
    """Return x unchanged; backward adds the gradient of weight * loss, a part of the total loss."""

    @staticmethod
    def forward(ctx, x, loss, weight):
        ctx.gradient = torch.full_like(loss, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout, ctx.gradient, None


def gate_softmax(layer, x):
    """softmax(x W) of a layer without bias, in float32: the gates of MoH."""
    return F.linear(at_least_float32(x), at_least_float32(layer.weight)).softmax(-1)


class GatedHeads(Softmax):
    """MoH where nothing is routed, the last third of its blocks: every head has a gate.

        O_i = [g_i1 o_i1, g_i2 o_i2, ..] W_o + b_o      o as in DiT; g_i = S softmax(x_i W_1)

    S is the number of heads; a single head has gate 1.
    """

    def __init__(self, config, i=0, shared=None):
        super().__init__(config)
        self.shared = self.heads if shared is None else shared
        if self.shared > 1:
            self.wg_1 = nn.Linear(config.hidden_size, self.shared, bias=False)

    def shared_gates(self, x):
        """x (B, N, D) -> the gates of the shared heads among each other (B, N, S), their mean 1."""
        if self.shared > 1:
            return self.shared * gate_softmax(self.wg_1, x)
        return torch.ones_like(at_least_float32(x[..., :1]))

    def gates(self, x):
        """x (B, N, D) -> the gates (B, N, heads), and the balance term, which is None."""
        with torch.autocast(x.device.type, enabled=False):
            return self.shared_gates(x), None

    def forward(self, x, grid):
        gates, balance = self.gates(x)
        if self.training and balance is not None:
            gates = WithLoss.apply(gates, balance, self.weight)
        heads = self.attend(x, grid)  # (B, heads, N, d)
        return self.proj(join_heads(heads * gates.mT.unsqueeze(-1).to(heads.dtype)))


class MoH(GatedHeads):
    """Mixture of heads (Jin et al., arXiv 2410.11842; its public code).

        O_i = [g_i1 o_i1, g_i2 o_i2, ..] W_o + b_o      o as in DiT; every token has its own gates g

    S shared heads come first, then E routed ones, of which a token uses K = routed_heads:

        shared: g_i = 2 a_i1 S softmax(x_i W_1)
        routed: g_i = 2 a_i2 K p_i / sum(chosen p_i) for the K largest p_i = softmax(x_i W), else 0
        a_i = softmax(x_i W_0), or 1/2 if there is no shared head

    A single routed head so has gate 1, and W learns from the balance term alone. All heads are
    computed, as in MoH's training code: no time is saved. attention_of routes in the first two
    thirds of the blocks only, as MoH's S/2 with 90 % of the heads active does (8 of 12).

    Balance term: 0.01 E^2 mean_e(mean_i p_ie * share of tokens that use e), mean over the blocks
    that route. WithLoss adds its gradient, so the training loop, its logged loss and the held-out
    loss exclude it. It is taken over the images of one forward pass: it depends on --micro-batch
    (and is added once for each micro-batch) and on the number of processes.
    """

    def __init__(self, config, i=0):
        super().__init__(config, i, config.shared_heads)
        D = config.hidden_size
        self.routed = config.routed_heads
        routing_blocks = sum(attention_of(config, b) is MoH for b in range(config.depth))
        self.weight = 0.01 / routing_blocks
        self.wg = nn.Linear(D, self.heads - self.shared, bias=False)
        if self.shared:
            self.wg_0 = nn.Linear(D, 2, bias=False)

    def gates(self, x):
        """x (B, N, D) -> the gates (B, N, heads), shared heads first, and the balance term ()."""
        with torch.autocast(x.device.type, enabled=False):
            p = gate_softmax(self.wg, x)  # (B, N, E)
            best = p.topk(self.routed, dim=-1).indices  # (B, N, K)
            chosen = torch.zeros_like(p).scatter(-1, best, 1)  # (B, N, E), 0 or 1
            E = p.shape[-1]
            balance = (p.mean((0, 1)) * chosen.mean((0, 1))).mean() * E**2
            routed = self.routed * p * chosen / (p * chosen).sum(-1, keepdim=True)
            if not self.shared:
                return routed, balance
            groups = 2 * gate_softmax(self.wg_0, x)  # (B, N, 2)
            shared = groups[..., :1] * self.shared_gates(x)
            return torch.cat([shared, groups[..., 1:] * routed], dim=-1), balance


class ReLULinear(nn.Module):
    """Sana (Xie et al., ICLR 2025; facts of its public code): Eq. 4 with phi = ReLU in every head.

        o_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) sum_j relu(k_j)^T)
        O_i = [o_i1, o_i2, ..] W_o + b_o

    Sana has heads of 32 channels. The paper's GFLOPs admit one head of width D only, and so does
    the preset. qk_norm: q and k pass an RMSNorm over all D channels first, as in Sana-1.5.
    """

    qkv_bias = False

    def __init__(self, config, i=0):
        super().__init__()
        D = config.hidden_size
        self.heads = config.heads
        self.normalize = config.normalize
        self.qkv = nn.Linear(D, 3 * D, bias=self.qkv_bias)
        self.q_norm = nn.RMSNorm(D, eps=1e-5) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=1e-5) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(D, D)

    def phi(self, z):
        """The kernel of q and k. z (B, N, D), float32 or float64."""
        return z.relu()

    def attend(self, q, k, v, grid):
        """The attention of every head. q, k after the kernel; all (B, heads, N, d)."""
        return linear_attention(q, k, v, self.normalize)

    def local(self, v, grid):
        """What is added to the attention before the projection. v (B, N, D); here nothing."""
        return 0

    def forward(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            q_features = self.phi(self.q_norm(at_least_float32(q)))
            k_features = self.phi(self.k_norm(at_least_float32(k)))
            features = q_features, k_features, at_least_float32(v)
            heads = [split_heads(z, self.heads) for z in features]
            o = join_heads(self.attend(*heads, grid)).to(v.dtype)
        return self.proj(o + self.local(v, grid))


class LiT(ReLULinear):
    """LiT (Wang et al., arXiv 2501.12976; facts of a class that its first author published later).

        O = (o + conv(v)) W_o + b_o      o as in Sana; conv: depthwise 5 x 5, shared by the heads

    q, k and v have biases. The convolution is FLatten's. Two heads for S are the paper's, other
    numbers are ours. Nothing is inherited from a trained DiT or distilled from a teacher.
    """

    qkv_bias = True

    def __init__(self, config, i=0):
        super().__init__(config)
        d = config.hidden_size // config.heads
        self.conv = convolution(d, d, 5, padding=2, groups=d)

    def local(self, v, grid):
        v = split_heads(v, self.heads)  # (B, heads, N, d)
        images = to_image(v.flatten(0, 1), grid)  # (B heads, d, H, W)
        return join_heads(to_tokens(self.conv(images)).view(v.shape))


class FLatten(LiT):
    """Focused linear attention (Han et al., ICCV 2023; facts of its public code).

        phi(z) = z+^3 |z+| / |z+^3|, z+ = relu(z): Eq. 5 with gamma = 3, norms over all heads

    Linear attention, biases and convolution as in LiT. Two parts of its code are left out: learned
    positions, which tie a model to one resolution, and a learned scale for each channel.
    """

    def phi(self, z):
        return power_kernel(z, 3.0)


class MHLA(ReLULinear):
    """MHLA (Zhang et al., ICLR 2026; facts of its public code): every block of tokens reads its own
    mixture of the key-value summaries of all blocks.

        q, k, v = LayerNorm(x) W + b      phi(z) = relu(z) + 1e-6
        O = (block_attention(phi(q), phi(k), v) + conv(v)) W_o + b_o      conv: depthwise 3 x 3

    in every head; the mixture, one matrix for all heads, is learned and kept between 0 and 1. The
    LayerNorm has weights and comes after adaLN's. Ours: the number of blocks at other grids than
    16 x 16 and 14 x 14 (blocks_per_side), and no dropout behind W_o, where MHLA's code has 0.1.
    """

    qkv_bias = True

    def __init__(self, config, i=0):
        super().__init__(config)
        D = config.hidden_size
        side = config.input_size // config.patch_size
        n = blocks_per_side(side)
        self.width = side // n  # of a block, in tokens
        self.norm = nn.LayerNorm(D)
        self.conv = convolution(D, D, 3, padding=1, groups=D)
        self.mixture = nn.Parameter(torch.empty(n**2, n**2))
        initialize(self)

    def phi(self, z):
        return z.relu() + 1e-6

    def attend(self, q, k, v, grid):
        mixture = at_least_float32(self.mixture).clamp(0, 1)  # averaged weights may be just outside
        return block_attention(q, k, v, mixture, grid, self.width, self.normalize)

    def local(self, v, grid):
        return to_tokens(self.conv(to_image(v, grid)))

    def forward(self, x, grid):
        if self.training:  # MHLA's code does so after each step of the optimiser
            self.mixture.data.clamp_(0, 1)
        return super().forward(self.norm(x), grid)


class EDiT(nn.Module):
    """EDiT (Becker et al., arXiv 2503.16726; its published description, no code is public).

        q = relu(W_q (x + conv1x1(leaky_relu(group_norm(conv3x3(x))))))
        k = relu(conv(W_k x)),  v = conv(W_v x)      conv: depthwise 3 x 3, stride 2

    and Eq. 4 of them: every query sees its neighbours, and a quarter of the keys and values is
    left. Two of three summaries print this query; in the third the norm follows the activation and
    there is no W_q. Ours: D / 2 channels inside the 3 x 3 and one head, as the paper's GFLOPs say
    (README.md); 16 groups if 16 divides D / 2; no biases in W_q, W_k, W_v. Nothing is distilled.
    """

    def __init__(self, config, i=0):
        super().__init__()
        D = config.hidden_size
        self.normalize = config.normalize
        self.squeeze = convolution(D, D // 2, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(16, D // 2), D // 2)
        self.expand = nn.Linear(D // 2, D)
        self.q = nn.Linear(D, D, bias=False)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D, bias=False)
        self.k_conv = convolution(D, D, 3, stride=2, padding=1, groups=D)
        self.v_conv = convolution(D, D, 3, stride=2, padding=1, groups=D)
        self.proj = nn.Linear(D, D)

    def forward(self, x, grid):
        neighbours = F.leaky_relu(self.norm(self.squeeze(to_image(x, grid))))  # (B, D / 2, H, W)
        q = self.q(x + self.expand(to_tokens(neighbours)))  # (B, N, D)
        k = to_tokens(self.k_conv(to_image(self.k(x), grid)))  # (B, M, D)
        v = to_tokens(self.v_conv(to_image(self.v(x), grid)))  # (B, M, D)
        N, M, D = q.shape[1], k.shape[1], q.shape[2]
        with torch.autocast(x.device.type, enabled=False):
            o = linear_attention(
                at_least_float32(q).relu(),
                at_least_float32(k).relu(),
                at_least_float32(v),
                self.normalize,
                tokens_first=2 * N * M <= (N + M) * D,  # the cheaper order for N queries, M keys
            )
        return self.proj(o.to(v.dtype))


class GatedLinear(nn.Module):
    """DiG (Zhu et al., CVPR 2025; its public code): causal, without a denominator.

        q, k = x W_q, x W_k of width D / 2      v = x W_v
        log a = logsigmoid(x W_1 W_2 + b) / 16
        o = gated_scan(q / sqrt(d / 2), k, v, log a)      O = (RMSNorm(o) silu(x W_g)) W_o

    in every head, along scan_order. W_1 W_2 has rank 16; the RMSNorm is over one head.
    """

    def __init__(self, config, i=0):
        super().__init__()
        D = config.hidden_size
        self.heads = config.heads
        self.i = i
        self.q_proj = nn.Linear(D, D // 2, bias=False)
        self.k_proj = nn.Linear(D, D // 2, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.g_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(D, 16, bias=False), nn.Linear(16, D // 2))
        self.g_norm = nn.RMSNorm(D // self.heads, eps=1e-6)
        initialize(self)

    def forward(self, x, grid):
        order = scan_order(grid, self.i).to(x.device)
        x = x[:, order]
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gk_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, gk = (split_heads(at_least_float32(z), self.heads) for z in parts)
            o = gated_scan(q * q.shape[-1] ** -0.5, k, v, F.logsigmoid(gk) / 16)
            o = join_heads(self.g_norm(o))
        gate = F.silu(self.g_proj(x))
        return self.o_proj(o.to(gate.dtype) * gate)[:, order.argsort()]


class DiGBlock(Block):
    """DiG's block: ends with a 3x3 depthwise convolution of the stream, at first the identity."""

    def __init__(self, config, attn, mlp):
        super().__init__(config, attn, mlp)
        D = config.hidden_size
        self.dw_conv = convolution(D, D, 3, padding=1, groups=D)

    def forward(self, x, c, grid):
        x = super().forward(x, c, grid)
        return to_tokens(self.dw_conv(to_image(x, grid)))


class NormedDWC(DWC):
    """DWC with ACNet's batch norm in its three branches, for comparison (Ding et al., ICCV 2019).

    With gradients, three convolutions and the batch's own statistics; without, one 3x3 with the
    running statistics folded in. The running statistics are parameters without a gradient, not
    buffers, so that the averaged weights average them as well. Images of all noise levels share
    them. Each micro-batch and each process has its own statistics, so one process and eight
    processes train different models.
    """

    def __init__(self, dim):
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(3, dim))
        self.mean = nn.Parameter(torch.zeros(3, dim), requires_grad=False)
        self.var = nn.Parameter(torch.ones(3, dim), requires_grad=False)

    def folded_scale(self):
        """(3, D): what the running variance and the learned scale multiply each branch with."""
        return self.scale * (self.var + 1e-5).rsqrt()

    def kernel(self):
        factor = self.folded_scale().view(3, -1, 1, 1, 1)
        horizontal = F.pad(self.horizontal, (0, 0, 1, 1))
        vertical = F.pad(self.vertical, (1, 1, 0, 0))
        padded = self.square, horizontal, vertical
        return sum(f * weight for f, weight in zip(factor, padded))

    def merge_(self):
        raise NotImplementedError("only DWC without batch norm is merged for good")

    def forward(self, v, grid):
        x = to_image(v, grid)
        if self.training and torch.is_grad_enabled():
            return to_tokens(self.bias.view(-1, 1, 1) + self.normed_branches(x))
        bias = self.bias - (self.folded_scale() * self.mean).sum(0)
        return to_tokens(F.conv2d(x, self.kernel(), bias, padding=1, groups=len(bias)))

    def normed_branches(self, x):
        """x (B, D, H, W) -> the sum of the three branches; moves the running statistics."""
        total = 0
        branches = self.square, self.horizontal, self.vertical
        for weight, mean, var, scale in zip(branches, self.mean, self.var, self.scale):
            padding = (weight.shape[2] // 2, weight.shape[3] // 2)
            y = F.conv2d(x, weight, padding=padding, groups=len(weight))
            total = total + F.batch_norm(y, mean, var, scale, training=True)
        return total


class Ladder(nn.Module):
    """The rows of Tables 4 to 6: from Sana's attention (all switches off) to DyDiLA (all on).

    Parameter names are DyDiLA's. "We replace the projections of Q and K with dynamic projections"
    is read so: Q and K are the routed projections (Eq. 2); the difference adds shared Q and K, and
    makes the routed projections Q' and K'. In Eq. 10 each of the two attentions has its own
    denominator.
    """

    def __init__(self, config, i=0):
        super().__init__()
        D = config.hidden_size
        n_P, n_F, n_D = config.n_projectors, config.n_kernels, config.n_lambdas
        self.kernel = config.kernel
        self.differential = config.differential
        self.normalize = config.normalize
        self.router_grad = config.router_grad
        self.rule = config.router_rule
        self.routed = config.projection == "dynamic"
        self.primes = config.differential != "none"  # are there Q' and K'?
        self.lambda_start = 0.01
        if config.rising_lambda:
            self.lambda_start = 0.2 + 0.6 * i / max(1, config.depth - 1)

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape))

        def router(*shape):
            return nn.Parameter(torch.empty(shape), requires_grad=self.router_grad)

        if self.routed and not self.primes:
            self.v = nn.Linear(D, D, bias=False)
        else:
            self.qkv = nn.Linear(D, 3 * D, bias=False)
        if self.routed:
            self.q_projectors = parameter(n_P, D, D)
            self.k_projectors = parameter(n_P, D, D)
            self.q_projector_router = router(D, n_P)
            self.k_projector_router = router(D, n_P)
        if self.kernel == "dynamic":
            self.gamma = parameter(n_F)
            self.kernel_routers = router(4 if self.primes else 2, D, n_F)  # for Q, K (, Q', K')
        if self.primes:
            self.lam = parameter(n_D)
            self.difference_routers = router(1 if self.differential == "map" else 2, 2 * D, n_D)
        self.dwc = None
        if config.dwc:
            self.dwc = NormedDWC(D) if config.batch_norm else DWC(D)
        self.proj = nn.Linear(D, D)
        initialize(self)

    def phi(self, z, which):
        """The kernel of z (B, N, D), which is Q, K, Q' or K' for which = 0, 1, 2, 3."""
        if self.kernel == "dynamic":
            router = self.kernel_routers[which]
            return routing.measure(z, self.gamma, router, self.rule, self.router_grad)
        return power_kernel(z, 3.0) if self.kernel == "focused" else at_least_float32(z).relu()

    def attend(self, q, k, v, *primes):
        """Eq. 4, Eq. 8 or Eq. 10 of q, k, v and, with a difference, q' and k'; all (B, N, D)."""
        if (self.differential, self.kernel, self.rule) == ("token", "dynamic", "ratio"):
            return self.fused_attend(q, k, v, *primes)
        with torch.autocast(q.device.type, enabled=False):
            q, k, *primes = (self.phi(z, which) for which, z in enumerate((q, k, *primes)))
            if self.differential == "token":
                q, k = self.token_difference(q, k, *primes)
            o = linear_attention(q, k, at_least_float32(v), self.normalize)
            if self.differential == "map":
                o = o - self.map_factor(q, primes[0]) * linear_attention(
                    *primes, at_least_float32(v), self.normalize
                )
            return o.to(v.dtype)

    def fused_attend(self, q, k, v, q_prime, k_prime):
        """Eqs. 5 to 8 by DyDiLA's own function, which is fused where the extension is built."""
        return dydilit.dydila_attention(
            q,
            k,
            q_prime,
            k_prime,
            v,
            self.gamma,
            self.lam,
            self.kernel_routers,
            self.difference_routers,
            normalize=self.normalize,
            router_grad=self.router_grad,
        )

    def token_difference(self, q, k, q_prime, k_prime):
        """Eqs. 7 and 8 of tokens after the kernel."""
        q_router, k_router = self.difference_routers
        how = self.rule, self.router_grad
        q = routing.difference(q, q_prime, self.lam, q_router, *how)
        k = routing.difference(k, k_prime, self.lam, k_router, *how)
        return q, k

    def map_factor(self, q, q_prime):
        """Lambda (B, N, 1) of every query in Eq. 10, chosen as in Eq. 7."""
        both = torch.cat([q, q_prime], dim=-1)
        router = self.difference_routers[0]
        return routing.chosen(self.lam, both, router, self.rule, self.router_grad)

    def routed_pair(self, x):
        """Eqs. 1 and 2: the routed projections of x for Q and for K."""
        q_router, k_router = self.q_projector_router, self.k_projector_router
        how = self.rule, self.router_grad
        q = routing.routed_projection(x, self.q_projectors, q_router, *how)
        k = routing.routed_projection(x, self.k_projectors, k_router, *how)
        return q, k

    def forward(self, x, grid):
        if self.routed and not self.primes:
            q, k = self.routed_pair(x)
            v, primes = self.v(x), ()
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            primes = self.routed_pair(x) if self.primes else ()
        o = self.attend(q, k, v, *primes)
        return self.proj(o + self.dwc(v, grid) if self.dwc else o)


# --------------------------------------------------------------------------------------------------
# Feed-forwards. GLUMBConv, Sana's, is in dydilit.py.


class MLP(nn.Module):
    """DiT's, with DiT's names: D to 4D, GELU (tanh approximation), back to D."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x, grid):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SanaGLUMBConv(GLUMBConv):
    """dydilit.py's GLUMBConv with the initial values of Sana's code, which `initialize` draws.

    Sana leaves its two 1 x 1 convolutions at PyTorch's default: uniform, bound 1 / sqrt(fan_in),
    the bias too. dydilit.py draws them by DiT's rule, and so does the ladder, whose rows then
    differ in their attention alone.
    """


class SwiGLU(nn.Module):
    """DiG's: D to 2h, one half gates the other, back to D; h is 8/3 D, up to a multiple of 256."""

    def __init__(self, dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, 2 * self.width(dim), bias=False)
        self.down_proj = nn.Linear(self.width(dim), dim, bias=False)

    @staticmethod
    def width(dim):
        return 256 * math.ceil(dim * 8 // 3 / 256)

    def forward(self, x, grid):
        gate, y = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * y)


# --------------------------------------------------------------------------------------------------
# Names and initial values.

ATTENTIONS = {
    "softmax": Softmax,
    "kv-compressed": KVCompressed,
    "moh": MoH,
    "relu": ReLULinear,
    "focused": FLatten,
    "lit": LiT,
    "mhla": MHLA,
    "edit": EDiT,
    "gated": GatedLinear,
    "ladder": Ladder,
}
FEED_FORWARDS = {  # the class, and its multiply-adds for a token of width D
    "mlp": (MLP, lambda D: 8 * D**2),
    "glumbconv": (GLUMBConv, lambda D: 12 * D**2 + 72 * D),
    "sana": (SanaGLUMBConv, lambda D: 12 * D**2 + 72 * D),
    "swiglu": (SwiGLU, lambda D: 3 * D * SwiGLU.width(D)),
}
CHOICES = {
    "attention": ATTENTIONS,
    "feed_forward": FEED_FORWARDS,
    "kernel": ("relu", "focused", "dynamic"),
    "projection": ("shared", "dynamic"),
    "differential": ("none", "token", "map"),
    "router_rule": routing.RULES,
}


def attention_of(config, i):
    """The class of block i's attention.

    PixArt-Sigma compresses in the last half of the blocks; MoH does not route in the last third.
    """
    if config.attention == "kv-compressed" and 2 * i < config.depth - 1:
        return Softmax
    if config.attention == "moh" and 3 * i >= 2 * config.depth:
        return GatedHeads
    return ATTENTIONS[config.attention]


@torch.no_grad()
def initialize(model):
    """The initial values that dydilit.initialize does not set."""
    for module in model.modules():
        if isinstance(module, Ladder):
            initialize_ladder(module)
        elif isinstance(module, KVCompressed):  # the mean of a patch
            nn.init.constant_(module.sr.weight, 1 / module.sr.weight[0].numel())
            nn.init.zeros_(module.sr.bias)
        elif isinstance(module, SanaGLUMBConv):
            module.inverted_conv.reset_parameters()
            module.point_conv.reset_parameters()
        elif isinstance(module, MHLA):
            n = math.isqrt(len(module.mixture))
            module.mixture.copy_(first_mixture(n, n))
            identity_(module.conv)
        elif isinstance(module, GatedLinear):  # small, as in DiG's code
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        elif isinstance(module, DiGBlock):
            identity_(module.dw_conv)


def identity_(depthwise):
    """A depthwise convolution starts as the identity, in DiG's and in MHLA's code."""
    nn.init.dirac_(depthwise.weight, groups=len(depthwise.weight))
    nn.init.zeros_(depthwise.bias)


def initialize_ladder(attn):
    """As DyDiLA's, but for the lambdas of `rising_lambda`."""
    for name, p in attn.named_parameters(recurse=False):
        if "router" in name:
            nn.init.normal_(p, std=0.02)
        elif "projectors" in name:
            for weight in p:
                nn.init.xavier_uniform_(weight)
        else:
            nn.init.constant_(p, 3.0 if name == "gamma" else attn.lambda_start)


# --------------------------------------------------------------------------------------------------
# Multiply-adds.


def ladder_routers(config):
    """How many logits the routers of a ladder compute for a token, a product of D numbers each."""
    c = config
    primes = c.differential != "none"
    projectors = 2 * c.n_projectors if c.projection == "dynamic" else 0
    kernels = 2 * (1 + primes) * c.n_kernels if c.kernel == "dynamic" else 0
    lambdas = {"none": 0, "map": 2, "token": 4}[c.differential] * c.n_lambdas  # inputs of width 2D
    return projectors + lambdas + kernels


def attention_cost(config, kind, side):
    """Multiply-adds of an attention of class `kind` for side x side tokens.

    Returns two numbers: what the paper's GFLOPs include, and what they leave out (README.md).
    """
    c = config
    N, D = side**2, c.hidden_size
    projections = 4 * N * D**2  # q, k, v and the output
    softmax = 2 * N**2 * D
    denominator = N * D * c.normalize
    linear = 2 * N * D * min(N, D // c.heads) + denominator  # the cheaper order of the products

    pixart_keys = (side // 2) ** 2
    compressed = 2 * N * pixart_keys * D + 2 * 4 * pixart_keys * D

    m = ((side + 1) // 2) ** 2  # EDiT's keys
    edit_convolutions = 5 * N * D**2 + 2 * 9 * m * D
    edit = edit_convolutions + min(2 * N * m, (N + m) * D) * D + denominator

    gates = c.heads + 2 * (c.shared_heads > 0) - (c.shared_heads == 1)  # columns of W, W_0, W_1
    all_gates = c.heads * (c.heads > 1)

    M = blocks_per_side(side) ** 2  # MHLA's blocks
    summaries = (2 * N + M**2) * D * (D // c.heads)  # made, mixed, read
    mhla = summaries + 9 * N * D + (denominator + M * N * c.heads * c.normalize)

    dig_parts = 24 * N * D + 9 * N * D  # the rank-16 decay, and the convolution of DiG's block
    dig_scan = N * D * (D // c.heads)  # k^T v and q S
    maps = 1 + (c.differential == "map")
    primes = 2 * D * (c.differential != "none")  # Q' and K'
    if c.router_rule == "dense" and c.projection == "dynamic":
        primes += 2 * D * (c.n_projectors - 1)  # a token goes through every projector
    # fmt: off
    inside, left_out = {
        Softmax:      (softmax, 0),
        KVCompressed: (compressed, 0),
        GatedHeads:   (softmax, N * D * all_gates),
        MoH:          (softmax, N * D * gates),
        ReLULinear:   (linear, 0),
        LiT:          (linear + 25 * N * D, 0),
        FLatten:      (linear + 25 * N * D, 0),
        MHLA:         (mhla, 0),
        EDiT:         (edit, 0),
        GatedLinear:  (dig_parts, dig_scan),
        Ladder:       (maps * linear + 9 * N * D * c.dwc, N * D * (primes + ladder_routers(c))),
    }[kind]
    # fmt: on
    return projections + inside, left_out


def multiply_adds(config, side=None):
    """Multiply-adds of one forward pass of one image with side x side tokens.

    Returns two numbers: what the paper's GFLOPs columns include, and what they leave out. Products
    of matrices and convolutions count; element-wise work, norms and biases do not. Takes any
    Config: a plain one is counted as the ladder's last row, which is DyDiLA. side=None is the
    config's own grid.
    """
    c = config if isinstance(config, Baseline) else variant("ladder-5-dwc", config)
    side = side or c.input_size // c.patch_size
    D = c.hidden_size
    counted, left_out = 0, 0
    for i in range(c.depth):
        inside, outside = attention_cost(c, attention_of(c, i), side)
        counted += inside
        left_out += outside
    feed_forward = side**2 * FEED_FORWARDS[c.feed_forward][1](D)
    adaln = 6 * D**2
    patch = c.patch_size**2 * c.in_channels
    patches = side**2 * D * 3 * patch  # in, and out with twice the channels
    conditions = (256 + D) * D + 2 * D**2  # timestep MLP, adaLN of the last layer
    return counted + c.depth * (feed_forward + adaln) + patches + conditions, left_out


# --------------------------------------------------------------------------------------------------
# Variants: each turns a Config into a Baseline of its size.

# The compared models: attention, feed-forward, channels of a head (0: one head). Their number of
# blocks is nearest_depth: "we adjust the number of blocks in other models to ensure their FLOPs
# roughly aligned".
# fmt: off
MODELS = {
    "DiT":     ("softmax", "mlp", 64),
    "PixArt":  ("kv-compressed", "mlp", 64),
    "MoH":     ("moh", "mlp", 64),
    "Sana":    ("relu", "sana", 0),
    "FLatten": ("focused", "mlp", 64),  # a classifier's attention, here in a DiT
    "LiT":     ("lit", "mlp", 192),
    "MHLA":    ("mhla", "mlp", 64),
    "EDiT":    ("edit", "mlp", 0),
    "DiG":     ("gated", "swiglu", 64),
}

# The ablations: kernel, projection, differential, dwc, rising_lambda. They have as many blocks as
# the Config. The default rows of Tables 5 and 6 equal Table 4's row of ladder-4, figure for figure;
# so their other rows, map-wise and rising-lambda, have no convolution either.
LADDER = {
    "ladder-0-sana":       ("relu",    "shared",  "none",  False, False),
    "ladder-1-focused":    ("focused", "shared",  "none",  False, False),
    "ladder-2-measure":    ("dynamic", "shared",  "none",  False, False),
    "ladder-3-projection": ("dynamic", "dynamic", "none",  False, False),
    "ladder-4-difference": ("dynamic", "dynamic", "token", False, False),
    "ladder-5-dwc":        ("dynamic", "dynamic", "token", True,  False),
    "map-wise":            ("dynamic", "dynamic", "map",   False, False),
    "rising-lambda":       ("dynamic", "dynamic", "token", False, True),
}
# fmt: on
VARIANTS = MODELS | LADDER


def nearest_depth(config, base):
    """`config` with the number of blocks whose multiply-adds come nearest to those of `base`.

    At 16 x 16 tokens for every larger grid: the paper keeps at 512 pixels the blocks of 256 pixels.
    """
    side = min(16, base.input_size // base.patch_size)
    target = multiply_adds(base, side)[0]

    def distance(depth):
        return abs(multiply_adds(replace(config, depth=depth), side)[0] - target)

    return replace(config, depth=min(range(1, 4 * base.depth), key=distance))


def variant(name, base):
    """The Config `base` as the named variant. ValueError for a name that is not in VARIANTS."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    if name in LADDER:
        switches = dict(zip(LADDER_FIELDS, LADDER[name]))
        return Baseline(**asdict(base), attention="ladder", feed_forward="glumbconv", **switches)
    attention, feed_forward, width = MODELS[name]
    if base.hidden_size < 256:
        width //= 2  # so that a small model has several heads as well
    heads = max(1, base.hidden_size // width) if width else 1
    config = Baseline(
        **asdict(base),
        attention=attention,
        feed_forward=feed_forward,
        heads=heads,
        shared_heads=heads // 2,  # 3 + 2 of 6 for S, as published; of 1 or 2 heads all are used,
        routed_heads=max(1, round(heads / 3)),  # so MoH routes nothing there
    )
    return nearest_depth(config, base)


def preset(name):
    """The Config of a preset of dydilit.py (S/2), or of a variant of one (DiT-S/2).

    ValueError lists the known names.
    """
    which, _, base = name.rpartition("-")
    if base not in PRESETS or (which not in VARIANTS and name != base):
        raise ValueError(
            f"unknown preset {name!r}; known: {', '.join(PRESETS)}; and each of them behind a "
            f"variant and a hyphen, such as DiT-S/2: {', '.join(VARIANTS)}"
        )
    return variant(which, PRESETS[base]) if which else PRESETS[base]
