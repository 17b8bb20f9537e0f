"""What the tests share: a comparison, gradients, the paper's equations as loops, and inputs.

Nothing here calls dydilit. The loops are the paper's formulas in numpy float64, one token at a
time, written to be checked by eye. runs.py has what tests of training and of commands share.
"""

import math

import numpy as np
import torch


def assert_close(name, got, want, atol, rtol=0.0):
    """|got - want| <= atol + rtol |want| everywhere, the same shape, no NaN.

    `name` and the worst errors are in the message, and are printed.
    """
    got, want = (torch.as_tensor(z, dtype=torch.float64).detach().cpu() for z in (got, want))
    shapes = f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.shape == want.shape, shapes
    for which, z in (("got", got), ("expected", want)):
        nans = int(z.isnan().sum())
        assert nans == 0, f"{name}: {which} {nans} NaN among {z.numel()} values"
    error = (got - want).abs()
    relative = error / want.abs().clamp_min(1e-300)
    worst, worst_relative = (e.max().item() if e.numel() else 0.0 for e in (error, relative))
    line = f"{name}: max abs error {worst:.2e} (atol {atol:.0e}), "
    line += f"max rel error {worst_relative:.2e} (rtol {rtol:.0e})"
    print(line)
    assert (error <= atol + rtol * want.abs()).all(), line


def grads_of(fn, inputs, cotangent):
    """fn(**inputs) and {name: gradient of <fn, cotangent>}; zeros for an input that fn ignores."""
    leaves = {name: z.detach().clone().requires_grad_() for name, z in inputs.items()}
    out = fn(**leaves)
    grads = torch.autograd.grad(
        out, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True
    )
    return out.detach(), dict(zip(leaves, grads))


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, a function of the shape and the seed alone."""
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def randomized(module, seed=0):
    """The module in float64 with random weights: no zeros of adaLN-Zero, no two equal gammas."""
    rng = np.random.default_rng(seed)
    ranges = {"gamma": (1.5, 4), "lam": (0.05, 0.6)}
    with torch.no_grad():
        for name, p in module.double().named_parameters():
            low_high = ranges.get(name.split(".")[-1])
            value = rng.uniform(*low_high, p.shape) if low_high else 0.4 * rng.normal(size=p.shape)
            p.copy_(torch.tensor(value))
    return module


def arrays(module):
    """The module's state dict as numpy arrays."""
    return {name: z.detach().numpy() for name, z in module.state_dict().items()}


# ----------------------------------------------------------------------------------------------
# The equations.


def power(z, gamma):
    """Eq. 5 for one token z (D,)."""
    r = np.maximum(z, 0.0)
    if not r.any():
        return np.zeros_like(r)
    p = r**gamma
    return p / np.sqrt((p**2).sum()) * np.sqrt((r**2).sum())


def choose(z, router):
    """The arg max of Eqs. 1, 6 and 7 for one token z (D,): the first of the largest logits."""
    best, largest = 0, -np.inf
    for u in range(router.shape[1]):
        logit = (z * router[:, u]).sum()
        if logit > largest:
            best, largest = u, logit
    return best


def attend(q, k, v, normalize, eps):
    """Eq. 4 with its guarded denominator, or without one (Eq. 8): a loop over i and j.

    One image: q, k, v (N, D).
    """
    out = []
    for q_i in q:
        numerator, denominator, lengths = np.zeros(v.shape[1]), 0.0, 0.0
        for k_j, v_j in zip(k, v):
            similarity = (q_i * k_j).sum()
            numerator = numerator + similarity * v_j
            denominator += similarity
            lengths += np.sqrt((k_j**2).sum())
        floor = 1e-3 * np.sqrt((q_i**2).sum()) * lengths
        out.append(numerator / (max(denominator, floor) + eps) if normalize else numerator)
    return np.stack(out)


def attention_loop(
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers,
    normalize=True, eps=1e-6,
):  # fmt: skip
    """dydila_attention, one token at a time; tensors in, numpy float64 (B, N, D) out."""
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers = (
        z.detach().double().numpy()
        for z in (q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers)
    )
    out = []
    for b in range(len(q)):
        dq, dk = [], []
        for i in range(q.shape[1]):
            q_t, k_t, qp_t, kp_t = (
                power(z[b, i], gamma[choose(z[b, i], router)])
                for z, router in zip((q, k, q_prime, k_prime), kernel_routers)
            )
            lam_q = lam[choose(np.concatenate([q_t, qp_t]), difference_routers[0])]
            lam_k = lam[choose(np.concatenate([k_t, kp_t]), difference_routers[1])]
            dq.append(q_t - lam_q * qp_t)
            dk.append(k_t - lam_k * kp_t)
        out.append(attend(np.stack(dq), np.stack(dk), v[b], normalize, eps))
    return np.stack(out)


# ----------------------------------------------------------------------------------------------
# The network, for one image. s: the arrays of a module.


def part(s, prefix):
    """The arrays of the submodule whose names begin with `prefix`."""
    return {name[len(prefix) :]: z for name, z in s.items() if name.startswith(prefix)}


def depthwise(x, grid, kernel):
    """Every channel of tokens x (N, D) with its own kernel (D, 1, h, w), zeros around the image."""
    (H, W), (h, w), out = grid, kernel.shape[2:], np.zeros_like(x)
    for i, j in np.ndindex(H, W):
        for a, b in np.ndindex(h, w):
            row, column = i + a - h // 2, j + b - w // 2
            if 0 <= row < H and 0 <= column < W:
                out[i * W + j] += kernel[:, 0, a, b] * x[row * W + column]
    return out


def silu(z):
    return z / (1 + np.exp(-z))


def linear(z, s, name):
    return z @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def norm_and_modulate(x, shift, scale):
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * (1 + scale) + shift


def dwc_loop(v, grid, s):
    """Eq. 9."""
    branches = (depthwise(v, grid, s[name]) for name in ("square", "horizontal", "vertical"))
    return sum(branches) + s["bias"]


def dydila_loop(x, grid, s, normalize=True):
    """Fig. 2b: x (N, D)."""
    q, k, v = np.split(x @ s["qkv.weight"].T, 3, axis=1)
    q_prime, k_prime = (
        np.stack(
            [token @ s[f"{z}_projectors"][choose(token, s[f"{z}_projector_router"])] for token in x]
        )
        for z in "qk"
    )
    args = [torch.tensor(z)[None] for z in (q, k, q_prime, k_prime, v)]
    names = ("gamma", "lam", "kernel_routers", "difference_routers")
    args += [torch.tensor(s[name]) for name in names]
    o = attention_loop(*args, normalize=normalize)[0]
    return (o + dwc_loop(v, grid, part(s, "dwc."))) @ s["proj.weight"].T + s["proj.bias"]


def feed_forward_loop(x, grid, s):
    """Sana's: 1x1 to 8D, SiLU, depthwise 3x3, one half gates the other half, 1x1 back."""
    x = silu(linear(x, s, "inverted_conv"))
    x = depthwise(x, grid, s["depth_conv.weight"]) + s["depth_conv.bias"]
    x, gate = np.split(x, 2, axis=1)
    return (x * silu(gate)) @ s["point_conv.weight"].T


def sincos_loop(grid, D):
    """DiT's positions: token n in row r, column c; half of the width is the column's, sin first."""
    out = np.empty((grid[0] * grid[1], D))
    for n in range(len(out)):
        r, c = divmod(n, grid[1])
        for half, position in ((0, c), (D // 2, r)):
            for i in range(D // 4):
                angle = position * 10000 ** (-i / (D / 4))
                out[n, half + i] = math.sin(angle)
                out[n, half + D // 4 + i] = math.cos(angle)
    return out


def timestep_loop(t):
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def unpatchify_loop(z, p, side):
    """Tokens (N, p p C), the channel fastest, to an image (C, H, W)."""
    C = z.shape[1] // p**2
    out = np.empty((C, side * p, side * p))
    for n, a, b, c in np.ndindex(len(z), p, p, C):
        out[c, n // side * p + a, n % side * p + b] = z[n, (a * p + b) * C + c]
    return out


def model_loop(config, s, x, t, y):
    """DyDiLiT: x (C, H, W) and the numbers t, y -> (2C, H, W)."""
    p, D = config.patch_size, config.hidden_size
    side = config.input_size // p
    # the model stores its positions in float32
    z = sincos_loop((side, side), D).astype(np.float32).astype(np.float64)
    for n in range(side * side):
        i, j = divmod(n, side)
        patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
        z[n] += (s["x_embedder.proj.weight"] * patch).sum((1, 2, 3)) + s["x_embedder.proj.bias"]
    c = linear(silu(linear(timestep_loop(t), s, "t_embedder.mlp.0")), s, "t_embedder.mlp.2")
    c = c + s["y_embedder.embedding_table.weight"][y]
    for b in range(config.depth):
        block = part(s, f"blocks.{b}.")
        # shift, scale and gate of the attention, then of the feed-forward
        m = np.split(linear(silu(c), block, "adaLN_modulation.1"), 6)
        attn, mlp = part(block, "attn."), part(block, "mlp.")
        h = norm_and_modulate(z, m[0], m[1])
        z = z + m[2] * dydila_loop(h, (side, side), attn, config.normalize)
        h = norm_and_modulate(z, m[3], m[4])
        z = z + m[5] * feed_forward_loop(h, (side, side), mlp)
    shift, scale = np.split(linear(silu(c), s, "final_layer.adaLN_modulation.1"), 2)
    z = linear(norm_and_modulate(z, shift, scale), s, "final_layer.linear")
    return unpatchify_loop(z, p, side)


# ----------------------------------------------------------------------------------------------
# Inputs for dydila_attention.


def top2_margin(z, router):
    """Largest minus second largest logit of every token z (..., D); infinite if there is one."""
    logits = np.sort(z @ router, axis=-1)
    if router.shape[1] == 1:
        return np.full(logits.shape[:-1], np.inf)
    return logits[..., -1] - logits[..., -2]


def side_margin(z, z_prime, gamma, router, router_prime, difference_router):
    """The smallest of the three margins of one token of Q (with Q'), or of K (with K').

    z, z_prime (D,).
    """
    z_t = power(z, gamma[choose(z, router)])
    zp_t = power(z_prime, gamma[choose(z_prime, router_prime)])
    both = np.concatenate([z_t, zp_t])
    margins = top2_margin(z, router), top2_margin(z_prime, router_prime)
    return min(*margins, top2_margin(both, difference_router))


def random_op_inputs(
    B, N, D, n_F, n_D, dtype=torch.float32, seed=0,
    *, margin=0.0, away=0.0, dead=0, gammas=(1.5, 4), lams=(0.05, 0.6),
):  # fmt: skip
    """{argument: tensor} for dydila_attention, in its order, from `seed` alone.

    margin: tokens are drawn again until the winner of every choice of a factor leads by more than
        this (logits are of order 1). An implementation that rounds otherwise, or a finite
        difference, then takes the same routes.
    away: no entry of q, k, q', k' is nearer than this to 0, the kink of relu.
    dead: this many tokens of every image have no positive entry in q and k.
    """
    rng = np.random.default_rng(seed)

    def rounded(z):  # margins hold for the values that the implementation will see
        return torch.tensor(z).to(dtype).double().numpy()

    def draw(all_negative):
        z = rng.normal(size=D)
        z = -abs(z) if all_negative else z
        return rounded(z + np.sign(z) * away)

    gamma = rounded(rng.uniform(*gammas, n_F))
    lam = rounded(rng.uniform(*lams, n_D))
    kernel_routers = rounded(rng.normal(size=(4, D, n_F)) / D**0.5)
    difference_routers = rounded(rng.normal(size=(2, 2 * D, n_D)) / D**0.5)
    q, k, q_prime, k_prime = (np.empty((B, N, D)) for _ in range(4))
    for b, i in np.ndindex(B, N):
        for s, (z, z_prime) in enumerate(((q, q_prime), (k, k_prime))):
            routers = kernel_routers[s], kernel_routers[s + 2], difference_routers[s]
            for _ in range(1000):
                z[b, i] = draw(i < dead)
                z_prime[b, i] = draw(False)
                if side_margin(z[b, i], z_prime[b, i], gamma, *routers) >= margin:
                    break
            else:
                raise ValueError(f"no token with a margin of {margin} in 1000 draws")
    arrays = {
        "q": q,
        "k": k,
        "q_prime": q_prime,
        "k_prime": k_prime,
        "v": rng.normal(size=(B, N, D)),
        "gamma": gamma,
        "lam": lam,
        "kernel_routers": kernel_routers,
        "difference_routers": difference_routers,
    }
    return {name: torch.tensor(z).to(dtype) for name, z in arrays.items()}


# ----------------------------------------------------------------------------------------------
# An autoencoder.


def save_vae(path, seed=0, **config):
    """Save a tiny diffusers.AutoencoderKL with random weights as the folder `path`, and return it.

    It halves the size of an image.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    two_levels = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.3,
    }
    AutoencoderKL(**(two_levels | config)).save_pretrained(path)
    return str(path)
