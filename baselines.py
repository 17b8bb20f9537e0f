"""The models that the paper compares DyDi-LiT with, and every rung of its ablations, in the skeleton of dydilit.py.

    torchrun train_min.py --preset DiT-digits            a variant, a hyphen, a preset of dydilit.py
    torchrun train_min.py --preset ladder-2-measure-S/2 --data data/NAME --out out/NAME

Every attention takes tokens (B, N, D) and a grid (H, W) and returns (B, N, D), as DyDiLA does; those without softmax
compute in float32, as it does, and all but DiG share its denominator. The variants are listed at the end (MODELS and
LADDER); NOTES.md says what was read of each model and what is ours.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import dydilit
from dydilit import DWC, PRESETS, Block, Config, DyDiLiT, GLUMBConv, image, linear_attention, power_kernel, tokens, wide

@dataclass(frozen=True)
class Baseline(Config):
    """A Config that chooses its attention and feed-forward by name. The comments are help lines here too."""
    attention: str = "softmax"  # softmax, kv-compressed, moh, relu, focused, lit, edit, gated or ladder
    feed_forward: str = "mlp"  # mlp (DiT), glumbconv (Sana) or swiglu (DiG)
    heads: int = 1  # attention heads; edit and ladder have one
    shared_heads: int = 0  # moh: heads that every token uses
    routed_heads: int = 1  # moh: how many of the other heads each token uses
    kernel: str = "dynamic"  # ladder: relu, focused (Eq. 5, gamma 3) or dynamic (Eq. 6)
    projection: str = "dynamic"  # ladder: shared, or dynamic (Eq. 2): Q' and K', or Q and K without a difference
    differential: str = "token"  # ladder: none, token (Eq. 8) or map (Eq. 10)
    dwc: bool = True  # ladder: the re-parameterised convolution (Eq. 9)
    rising_lambda: bool = False  # ladder: lambda starts at 0.2 in the first block to 0.8 in the last, not at 0.01
    batch_norm: bool = False  # ladder: a batch norm in each branch of that convolution, as ACNet has it

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.heads < 1 or self.hidden_size % (self.heads * (2 if self.attention == "gated" else 1)):
            raise ValueError(f"{self.heads} heads do not divide hidden_size {self.hidden_size}")
        if self.attention in ("edit", "ladder") and self.heads > 1:
            raise ValueError(f"attention {self.attention!r} has one head, got {self.heads}")
        if self.attention == "moh" and not 1 <= self.routed_heads <= self.heads - self.shared_heads:
            raise ValueError(f"routed_heads {self.routed_heads} must be between 1 and the {self.heads} heads less the "
                             f"{self.shared_heads} shared ones")
        if self.differential != "none" and self.projection == "shared":
            raise ValueError(f"differential {self.differential!r} needs Q' and K': projection must be 'dynamic'")
        if (self.batch_norm and not self.dwc) or (self.rising_lambda and self.differential == "none"):
            raise ValueError("batch_norm needs dwc, and rising_lambda a differential: it would change nothing")
        for name in ("kernel", "projection", "differential", "dwc", "rising_lambda", "batch_norm"):
            if self.attention != "ladder" and getattr(self, name) != getattr(Baseline, name):
                raise ValueError(f"{name} is for attention 'ladder', not for {self.attention!r}")

    def build(self):
        block, feed_forward = DiGBlock if self.attention == "gated" else Block, FEED_FORWARDS[self.feed_forward][0]
        model = DyDiLiT(self, [block(self, attention_of(self, i)(self, i), feed_forward(self.hidden_size))
                               for i in range(self.depth)])
        initialize(model)
        return model

# ---------------------------------------------------------------------------------------------------------------------
# Attentions. Each is made of a config and the number of its block.

def split(x, heads):  # (B, N, D) -> (B, heads, N, D / heads)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

def join(x):  # and back
    return x.transpose(1, 2).flatten(2)

def convolution(inputs, outputs, size, **how):
    """A Conv2d whose weight lies as its gradient will: `image` makes channels-last tensors."""
    return nn.Conv2d(inputs, outputs, size, **how).to(memory_format=torch.channels_last)

class Softmax(nn.Module):
    """DiT: softmax(q k^T / sqrt(d)) v in every head; biases and parameter names as DiT has them from timm."""
    def __init__(self, config, i=0):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def compress(self, k, v, grid): return k, v

    def attend(self, x, grid):  # (B, N, D) -> (B, heads, N, D / heads)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(*(split(z, self.heads) for z in (q, *self.compress(k, v, grid))))

    def forward(self, x, grid):
        return self.proj(join(self.attend(x, grid)))

class KVCompressed(Softmax):
    """PixArt-Sigma (its public code): keys and values shrunk 2 x 2 before the softmax.

    One depthwise convolution, its stride its size, and one LayerNorm serve both. In the last half of the blocks only
    (`attention_of`), as there: 14 of 28. The last row or column of an odd grid is dropped.
    """
    def __init__(self, config, i=0, ratio=2):
        super().__init__(config)
        self.sr = convolution(config.hidden_size, config.hidden_size, ratio, stride=ratio, groups=config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        initialize(self)

    def compress(self, k, v, grid): return (self.norm(tokens(self.sr(image(z, grid)))) for z in (k, v))

class WithLoss(torch.autograd.Function):
    """x, unchanged; backward also gives `loss` the gradient `weight`, as if weight * loss were part of the total."""
    @staticmethod
    def forward(ctx, x, loss, weight):
        ctx.gradient = torch.full_like(loss, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout, ctx.gradient, None

class MoH(Softmax):
    """Mixture of heads (its public code): out = concat(g_h head_h), the gates g of each token its own.

    Shared heads: softmax(W_s x) times their number. The others: softmax(W_r x), the routed_heads largest, brought to
    sum 1, times their number; a single one so has gate 1, and W_r learns from the balance alone. The two groups weigh
    2 softmax(W_0 x). All heads are computed, as in its training code: nothing is saved.

    Balance: E^2 mean_e(mean gate_e * share of tokens_e) over the E routed heads, times 0.01, mean over the blocks. Its
    gradient enters by WithLoss: the training loop, its logged loss and `held_out` do not see it. It is taken over what
    passes at once, so it depends on --micro-batch (and enters once for each) and on the number of processes.
    """
    def __init__(self, config, i=0):
        super().__init__(config)
        D, self.shared, self.routed = config.hidden_size, config.shared_heads, config.routed_heads
        self.weight = 0.01 / config.depth
        self.wg = nn.Linear(D, self.heads - self.shared, bias=False)
        if self.shared: self.wg_0 = nn.Linear(D, 2, bias=False)
        if self.shared > 1: self.wg_1 = nn.Linear(D, self.shared, bias=False)

    def gates(self, x):
        """x (B, N, D) -> the gates (B, N, heads), shared ones first, and the balance loss ()."""
        def softmax(layer): return F.linear(wide(x), wide(layer.weight)).softmax(-1)
        with torch.autocast(x.device.type, enabled=False):
            p = softmax(self.wg)                                                             # (B, N, E)
            chosen = torch.zeros_like(p).scatter(-1, p.topk(self.routed, dim=-1).indices, 1)
            balance = (p.mean((0, 1)) * chosen.mean((0, 1))).mean() * p.shape[-1] ** 2
            routed = self.routed * p * chosen / (p * chosen).sum(-1, keepdim=True)
            if not self.shared: return routed, balance
            shared = self.shared * softmax(self.wg_1) if self.shared > 1 else torch.ones_like(p[..., :1])
            groups = 2 * softmax(self.wg_0)                                                  # (B, N, 2)
            return torch.cat([groups[..., :1] * shared, groups[..., 1:] * routed], dim=-1), balance

    def forward(self, x, grid):
        gates, balance = self.gates(x)
        if self.training: gates = WithLoss.apply(gates, balance, self.weight)
        heads = self.attend(x, grid)
        return self.proj(join(heads * gates.mT.unsqueeze(-1).to(heads.dtype)))

class ReLULinear(nn.Module):
    """Sana: Eq. 4 with phi = ReLU in every head.

    Sana itself has heads of 32 channels; the paper's GFLOPs leave it one head of width D, which is what the preset has.
    """
    def __init__(self, config, i=0):
        super().__init__()
        self.heads, self.normalize = config.heads, config.normalize
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def phi(self, z): return wide(z).relu()

    def local(self, v, grid): return 0

    def forward(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            heads = (split(z, self.heads) for z in (self.phi(q), self.phi(k), wide(v)))
            o = join(linear_attention(*heads, self.normalize)).to(v.dtype)
        return self.proj(o + self.local(v, grid))

class LiT(ReLULinear):
    """LiT: ReLU, few heads, and a 5x5 depthwise convolution of V, one for all heads, added before the projection.

    Its code has not been read: after the published description, the convolution as in FLatten. Two heads for S are the
    paper's, other numbers ours. Nothing is inherited from a trained DiT or distilled from a teacher.
    """
    def __init__(self, config, i=0):
        super().__init__(config)
        d = config.hidden_size // config.heads
        self.conv = convolution(d, d, 5, padding=2, groups=d)

    def local(self, v, grid):
        v = split(v, self.heads)                                                             # (B, heads, N, d)
        return join(tokens(self.conv(image(v.flatten(0, 1), grid))).view(v.shape))

class FLatten(LiT):
    """Focused linear attention: phi is Eq. 5 with one fixed gamma = 3, its norms over all heads.

    Without two things of its code: learned positions, which tie it to one resolution, and a learned scale per channel.
    """
    def phi(self, z): return power_kernel(z, 3.0)

class EDiT(nn.Module):
    """EDiT: queries that see their neighbours, a quarter of the keys and values, linear attention between them.

        q = relu(W_q (x + conv1x1(leaky_relu(group_norm(conv3x3(x))))))
        k = relu(conv(W_k x)),  v = conv(W_v x)          conv: depthwise 3x3, stride 2

    No public code: after the published description. Ours: half the channels inside the 3x3 and one head, as the
    paper's GFLOPs say (NOTES.md); 16 groups if they divide; no biases in W_q, W_k, W_v. Nothing is distilled.
    """
    def __init__(self, config, i=0):
        super().__init__()
        D, self.normalize = config.hidden_size, config.normalize
        self.squeeze, self.norm = convolution(D, D // 2, 3, padding=1), nn.GroupNorm(math.gcd(16, D // 2), D // 2)
        self.expand = nn.Linear(D // 2, D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.k_conv, self.v_conv = (convolution(D, D, 3, stride=2, padding=1, groups=D) for _ in range(2))
        self.proj = nn.Linear(D, D)

    def forward(self, x, grid):
        q = self.q(x + self.expand(tokens(F.leaky_relu(self.norm(self.squeeze(image(x, grid)))))))      # (B, N, D)
        k, v = (tokens(conv(image(w(x), grid))) for w, conv in ((self.k, self.k_conv), (self.v, self.v_conv)))
        M, (_, N, D) = k.shape[1], q.shape                                                              # k, v (B, M, D)
        with torch.autocast(x.device.type, enabled=False):
            o = linear_attention(wide(q).relu(), wide(k).relu(), wide(v), self.normalize,
                                 tokens_first=2 * N * M <= (N + M) * D)
        return self.proj(o.to(v.dtype))

def gated_scan(q, k, v, log_a, chunk=8):
    """o_t = q_t S_t with S_t = diag(a_t) S_{t-1} + k_t^T v_t, S_0 = 0: gated linear attention (Yang et al. 2024).

    q, k, log_a (..., N, K), log_a <= 0; v (..., N, V); returns (..., N, V). All pairs at once within a chunk, a state
    from chunk to chunk. What is exponentiated is never positive, so nothing overflows.
    """
    N = q.shape[-2]
    q, k, v, log_a = (F.pad(z, (0, 0, 0, -N % chunk)).unflatten(-2, (-1, chunk)) for z in (q, k, v, log_a))
    b = log_a.cumsum(-2)                                                 # (..., N / C, C, K), since its chunk began
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    decay = (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(later, -math.inf).exp()             # (..., C, C, K)
    inside = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1) @ v
    end = b[..., -1:, :]
    added, kept = (k * (end - b).exp()).mT @ v, end.exp().mT             # (..., K, V), (..., K, 1) of each chunk
    states = [torch.zeros_like(added[..., 0, :, :])]                     # S at each chunk's beginning
    for i in range(added.shape[-3] - 1):
        states.append(kept[..., i, :, :] * states[-1] + added[..., i, :, :])
    return (inside + (q * b.exp()) @ torch.stack(states, -3)).flatten(-3, -2)[..., :N, :]

def scan_order(grid, i):
    """Token numbers (N,) in the order in which block i reads them: rows, rows backwards, columns, columns backwards.

    DiG flips the sequence after each block and transposes it after every second; this is where block i then stands.
    """
    order = torch.arange(math.prod(grid)).view(grid)
    order = (order.mT if i % 4 >= 2 else order).flatten()
    return order.flip(0) if i % 2 else order

class GatedLinear(nn.Module):
    """DiG (its public code): gated linear attention along a scan. Causal, without a denominator.

    Queries and keys have half the width; log a = logsigmoid(W_2 W_1 x) / 16, of rank 16; each head's output passes an
    RMSNorm and a SiLU gate.
    """
    def __init__(self, config, i=0):
        super().__init__()
        D, self.heads, self.i = config.hidden_size, config.heads, i
        self.q_proj, self.k_proj = (nn.Linear(D, D // 2, bias=False) for _ in range(2))
        self.v_proj, self.g_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.gk_proj = nn.Sequential(nn.Linear(D, 16, bias=False), nn.Linear(16, D // 2))
        self.g_norm = nn.RMSNorm(D // self.heads, eps=1e-6)
        initialize(self)

    def forward(self, x, grid):
        order = scan_order(grid, self.i).to(x.device)
        x = x[:, order]
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gk_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, gk = (split(wide(z), self.heads) for z in parts)
            o = join(self.g_norm(gated_scan(q * q.shape[-1] ** -0.5, k, v, F.logsigmoid(gk) / 16)))
        gate = F.silu(self.g_proj(x))
        return self.o_proj(o.to(gate.dtype) * gate)[:, order.argsort()]

class DiGBlock(Block):
    """DiG's block: a 3x3 depthwise convolution of the whole stream follows; it starts as the identity."""
    def __init__(self, config, attn, mlp):
        super().__init__(config, attn, mlp)
        self.dw_conv = convolution(config.hidden_size, config.hidden_size, 3, padding=1, groups=config.hidden_size)

    def forward(self, x, c, grid):
        return tokens(self.dw_conv(image(super().forward(x, c, grid), grid)))

class NormedDWC(DWC):
    """DWC with ACNet's batch norm in its branches, which are three convolutions then; for comparison.

    A batch's own statistics where there are gradients, the running ones elsewhere, folded into one 3x3. These are
    parameters without a gradient, not buffers, so that the averaged weights average them as well. Images of all noise
    levels share them; each micro-batch and each process has its own, so here one process and eight do not train alike.
    """
    def __init__(self, dim):
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(3, dim))
        self.mean, self.var = (nn.Parameter(x, requires_grad=False) for x in (torch.zeros(3, dim), torch.ones(3, dim)))

    def kernel(self):
        factor = (self.scale * (self.var + 1e-5).rsqrt()).view(3, -1, 1, 1, 1)
        padded = self.square, F.pad(self.horizontal, (0, 0, 1, 1)), F.pad(self.vertical, (1, 1, 0, 0))
        return sum(f * weight for f, weight in zip(factor, padded))

    def merge_(self): raise NotImplementedError("only DWC without batch norm is merged for good")

    def forward(self, v, grid):
        x = image(v, grid)
        if not (self.training and torch.is_grad_enabled()):
            bias = self.bias - (self.scale * (self.var + 1e-5).rsqrt() * self.mean).sum(0)
            return tokens(F.conv2d(x, self.kernel(), bias, padding=1, groups=len(bias)))
        return tokens(self.bias.view(-1, 1, 1) + sum(
            F.batch_norm(F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=len(weight)),
                         mean, var, scale, training=True)
            for weight, mean, var, scale in zip((self.square, self.horizontal, self.vertical), self.mean, self.var,
                                                self.scale)))

class Ladder(nn.Module):
    """Tables 4 to 6: from Sana's attention (all switches off) to DyDiLA (all on), with DyDiLA's parameter names.

    "We replace the projections of Q and K with dynamic projections" is read so: Q and K are the routed ones, and Q' and
    K' come with the difference. Eq. 10 with a denominator: each of its two attentions has its own.
    """
    def __init__(self, config, i=0):
        super().__init__()
        c, D, n_P, n_F, n_D = config, config.hidden_size, config.n_projectors, config.n_kernels, config.n_lambdas
        self.kernel, self.differential, self.normalize, self.router_grad = (
            c.kernel, c.differential, c.normalize, c.router_grad)
        self.routed, self.primes = c.projection == "dynamic", c.differential != "none"
        self.lambda_start = 0.2 + 0.6 * i / max(1, c.depth - 1) if c.rising_lambda else 0.01
        def parameter(*shape): return nn.Parameter(torch.empty(shape))
        def router(*shape): return nn.Parameter(torch.empty(shape), requires_grad=self.router_grad)
        if self.routed and not self.primes: self.v = nn.Linear(D, D, bias=False)
        else: self.qkv = nn.Linear(D, 3 * D, bias=False)
        if self.routed:
            self.q_projectors, self.k_projectors = parameter(n_P, D, D), parameter(n_P, D, D)
            self.q_projector_router, self.k_projector_router = router(D, n_P), router(D, n_P)
        if c.kernel == "dynamic":
            self.gamma, self.kernel_routers = parameter(n_F), router(4 if self.primes else 2, D, n_F)
        if self.primes:
            self.lam, self.difference_routers = parameter(n_D), router(1 if c.differential == "map" else 2, 2 * D, n_D)
        self.dwc = (NormedDWC if c.batch_norm else DWC)(D) if c.dwc else None
        self.proj = nn.Linear(D, D)
        initialize(self)

    def phi(self, z, which):
        """z (B, N, D) through the kernel; `which` of the routers: 0 to 3 for Q, K, Q', K'."""
        if self.kernel == "dynamic":
            return dydilit.measure(z, self.gamma, self.kernel_routers[which], self.router_grad)
        return power_kernel(z, 3.0) if self.kernel == "focused" else wide(z).relu()

    def attend(self, q, k, v, *primes):
        """Eq. 4, Eq. 8 or Eq. 10 of q, k, v and, where there is a difference, q', k'; all (B, N, D)."""
        if self.differential == "token" and self.kernel == "dynamic":  # DyDiLA's own function, fused where it is built
            return dydilit.dydila_attention(
                q, k, *primes, v, self.gamma, self.lam, self.kernel_routers, self.difference_routers,
                normalize=self.normalize, router_grad=self.router_grad)
        with torch.autocast(q.device.type, enabled=False):
            q, k, *primes = (self.phi(z, which) for which, z in enumerate((q, k, *primes)))
            if self.differential == "token":
                q, k = (dydilit.difference(z, z_prime, self.lam, router, self.router_grad)
                        for z, z_prime, router in zip((q, k), primes, self.difference_routers))
            o = linear_attention(q, k, wide(v), self.normalize)
            if self.differential == "map":
                router = self.difference_routers[0]
                index, gate = dydilit.route(torch.cat([q, primes[0]], dim=-1), router, self.router_grad)  # as Eq. 7
                o = o - wide(self.lam)[index].unsqueeze(-1) * gate * linear_attention(*primes, wide(v), self.normalize)
            return o.to(v.dtype)

    def forward(self, x, grid):
        routed = (dydilit.routed_projection(x, w, router, self.router_grad) for w, router in (
            (self.q_projectors, self.q_projector_router), (self.k_projectors, self.k_projector_router),
        )) if self.routed else ()
        q, k, v, *primes = (*routed, self.v(x)) if hasattr(self, "v") else (*self.qkv(x).chunk(3, dim=-1), *routed)
        o = self.attend(q, k, v, *primes)
        return self.proj(o + self.dwc(v, grid) if self.dwc else o)

# ---------------------------------------------------------------------------------------------------------------------
# Feed-forwards; GLUMBConv, Sana's, is in dydilit.py.

class MLP(nn.Module):
    """DiT's, with its names: D to 4D, GELU by tanh, back to D."""
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, grid):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

class SwiGLU(nn.Module):
    """DiG's: D to twice the width h, one half gates the other, back to D; h is 8/3 D, up to a multiple of 256."""
    def __init__(self, dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, 2 * self.width(dim), bias=False)
        self.down_proj = nn.Linear(self.width(dim), dim, bias=False)

    @staticmethod
    def width(dim): return -(dim * 8 // 3 // -256) * 256

    def forward(self, x, grid):
        gate, y = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * y)

# ---------------------------------------------------------------------------------------------------------------------
# Names, initial values, costs.

ATTENTIONS = {"softmax": Softmax, "kv-compressed": KVCompressed, "moh": MoH, "relu": ReLULinear, "focused": FLatten,
              "lit": LiT, "edit": EDiT, "gated": GatedLinear, "ladder": Ladder}
FEED_FORWARDS = {  # and what they multiply and add for a token
    "mlp": (MLP, lambda D: 8 * D**2), "glumbconv": (GLUMBConv, lambda D: 12 * D**2 + 72 * D),
    "swiglu": (SwiGLU, lambda D: 3 * D * SwiGLU.width(D))}
CHOICES = {"attention": ATTENTIONS, "feed_forward": FEED_FORWARDS, "kernel": ("relu", "focused", "dynamic"),
           "projection": ("shared", "dynamic"), "differential": ("none", "token", "map")}

def attention_of(config, i):
    """The class of block i's attention. PixArt-Sigma compresses in the last half of the blocks."""
    first_half = config.attention == "kv-compressed" and 2 * i < config.depth - 1
    return Softmax if first_half else ATTENTIONS[config.attention]

@torch.no_grad()
def initialize(model):
    """The initial values that dydilit.initialize does not know."""
    for module in model.modules():
        if isinstance(module, Ladder):  # as DyDiLA's
            for name, p in module.named_parameters(recurse=False):
                if "router" in name: nn.init.normal_(p, std=0.02)
                elif "projectors" in name: [nn.init.xavier_uniform_(weight) for weight in p]
                else: nn.init.constant_(p, 3.0 if name == "gamma" else module.lambda_start)
        elif isinstance(module, KVCompressed):  # the mean of a patch
            nn.init.constant_(module.sr.weight, 1 / module.sr.weight[0].numel())
            nn.init.zeros_(module.sr.bias)
        elif isinstance(module, GatedLinear):  # small, as in its code
            for layer in module.modules():
                if isinstance(layer, nn.Linear): nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        elif isinstance(module, DiGBlock):  # the identity
            nn.init.dirac_(module.dw_conv.weight, groups=len(module.dw_conv.weight))
            nn.init.zeros_(module.dw_conv.bias)

def attention_cost(c, kind, side):
    """Multiply-adds of one attention of class `kind` for one image: (what the paper counts, what it leaves out)."""
    N, D = side**2, c.hidden_size
    M, m = (side // 2) ** 2, ((side + 1) // 2) ** 2  # keys of PixArt, of EDiT
    den, maps, primes = N * D * c.normalize, 1 + (c.differential == "map"), c.differential != "none"
    linear = 2 * N * D * min(N, D // c.heads) + den  # the cheaper order
    gates = c.heads + 2 * (c.shared_heads > 0) - (c.shared_heads == 1)
    routers = 2 * c.n_projectors * (c.projection == "dynamic") + {"none": 0, "map": 2, "token": 4}[
        c.differential] * c.n_lambdas + 2 * (1 + primes) * c.n_kernels * (c.kernel == "dynamic")
    beyond_projections, left_out = {
        Softmax:       (2 * N**2 * D, 0),
        KVCompressed:  (2 * N * M * D + 2 * 4 * M * D, 0),
        MoH:           (2 * N**2 * D, N * D * gates),
        ReLULinear:    (linear, 0),
        LiT:           (linear + 25 * N * D, 0),
        FLatten:       (linear + 25 * N * D, 0),
        EDiT:          (5 * N * D**2 + 2 * 9 * m * D + min(2 * N * m, (N + m) * D) * D + den, 0),
        GatedLinear:   (24 * N * D + 9 * N * D, N * D * (D // c.heads)),  # its block's convolution; k^T v and q S
        Ladder:        (maps * linear + 9 * N * D * c.dwc, N * D * (2 * D * primes + routers)),  # Q', K' and routers
    }[kind]
    return 4 * N * D**2 + beyond_projections, left_out

def multiply_adds(config, side=None):
    """Those of one forward pass of one image: (what the paper's GFLOPs columns count, what they leave out).

    Products of matrices, and convolutions; nothing element-wise, no norms, no biases. `side` of the grid of tokens: the
    config's unless given. Any Config will do: DyDiLA is the ladder's last rung.
    """
    c = config if isinstance(config, Baseline) else variant("ladder-5-dwc", config)
    side = side or c.input_size // c.patch_size
    D, patch = c.hidden_size, c.patch_size**2 * c.in_channels
    counted, left_out = map(sum, zip(*(attention_cost(c, attention_of(c, i), side) for i in range(c.depth))))
    blocks = c.depth * (side**2 * FEED_FORWARDS[c.feed_forward][1](D) + 6 * D**2)  # and adaLN
    ends = side**2 * D * 3 * patch + (256 + D) * D + 2 * D**2  # patches in and out, timestep, last adaLN
    return counted + blocks + ends, left_out

# ---------------------------------------------------------------------------------------------------------------------
# Variants: each turns any Config into a Baseline of its size.

# The compared models: attention, feed-forward, channels per head (0: one head). As many blocks as come nearest to the
# Config's multiply-adds: "we adjust the number of blocks in other models to ensure their FLOPs roughly aligned".
MODELS = {
    "DiT":     ("softmax", "mlp", 64),        # Peebles & Xie, ICCV 2023
    "PixArt":  ("kv-compressed", "mlp", 64),  # PixArt-Sigma: Chen et al., ECCV 2024
    "MoH":     ("moh", "mlp", 64),            # Jin et al., arXiv 2410.11842
    "Sana":    ("relu", "glumbconv", 0),      # Xie et al., ICLR 2025
    "FLatten": ("focused", "mlp", 64),        # Han et al., ICCV 2023: a classifier's attention, here in a DiT
    "LiT":     ("lit", "mlp", 192),           # Wang et al., arXiv 2501.12976
    "EDiT":    ("edit", "mlp", 0),            # Becker et al., arXiv 2503.16726
    "DiG":     ("gated", "swiglu", 64),       # Zhu et al., CVPR 2025
}

# The ablations: kernel, projection, differential, dwc, rising_lambda. As many blocks as the Config. The default rows of
# Tables 5 and 6 are ladder-4's row of Table 4, figure for figure, so their other rows have no convolution either.
LADDER = {
    "ladder-0-sana":       ("relu", "shared", "none", False, False),
    "ladder-1-focused":    ("focused", "shared", "none", False, False),
    "ladder-2-measure":    ("dynamic", "shared", "none", False, False),
    "ladder-3-projection": ("dynamic", "dynamic", "none", False, False),
    "ladder-4-difference": ("dynamic", "dynamic", "token", False, False),
    "ladder-5-dwc":        ("dynamic", "dynamic", "token", True, False),
    "map-wise":            ("dynamic", "dynamic", "map", False, False),
    "rising-lambda":       ("dynamic", "dynamic", "token", False, True),
}
VARIANTS = MODELS | LADDER

def variant(name, base):
    """The Config `base` as the named variant. ValueError for a name that is not one of VARIANTS."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    if name in LADDER:
        switches = dict(zip(("kernel", "projection", "differential", "dwc", "rising_lambda"), LADDER[name]))
        return Baseline(**asdict(base), attention="ladder", feed_forward="glumbconv", **switches)
    attention, feed_forward, width = MODELS[name]
    if base.hidden_size < 256: width //= 2  # so that a small model has several heads as well
    heads = max(1, base.hidden_size // width) if width else 1
    # with one or two heads MoH has nothing to route
    config = Baseline(**asdict(base), attention=attention, feed_forward=feed_forward, heads=heads,
                      shared_heads=heads // 2, routed_heads=max(1, heads // 4))
    side = min(16, base.input_size // base.patch_size)  # the paper keeps at 512 pixels the blocks it has at 256
    target = multiply_adds(base, side)[0]
    return min((replace(config, depth=depth) for depth in range(1, 4 * base.depth)),
               key=lambda c: abs(multiply_adds(c, side)[0] - target))

def preset(name):
    """The Config of a preset of dydilit.py (S/2), or of a variant of one (DiT-S/2). ValueError lists what is known."""
    which, _, base = name.rpartition("-")
    if base not in PRESETS or (which not in VARIANTS and name != base):
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}; and each of them behind a variant and "
                         f"a hyphen, such as DiT-S/2: {', '.join(VARIANTS)}")
    return variant(which, PRESETS[base]) if which else PRESETS[base]
