"""Each compared attention against a loop over tokens, and its special cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from loops import (
    GRID,
    TINY,
    attention,
    compare,
    heads_of,
    projected,
    relu,
    softmax,
    softmax_attend,
)
from torch.autograd import gradcheck
from util import (
    arrays,
    assert_close,
    attend,
    depthwise,
    linear,
    normal,
    power,
    randomized,
    silu,
)

import dydilit
from experiments import baselines
from experiments.baselines import (
    Baseline,
    GatedHeads,
    KVCompressed,
    MoH,
    attention_of,
    preset,
    variant,
)

pytestmark = pytest.mark.usefixtures("reference_path")


# --------------------------------------------------------------------------------------------------
# DiT, PixArt-Sigma, MoH.


def softmax_loop(x, grid, s, compress=lambda z, grid, s: z):
    q, k, v = projected(x, s)
    k, v = compress(k, grid, s), compress(v, grid, s)
    heads = [softmax_attend(*z) for z in zip(heads_of(q, 2), heads_of(k, 2), heads_of(v, 2))]
    return linear(np.concatenate(heads, axis=1), s, "proj")


def test_softmax_is_a_loop_over_queries():
    compare("softmax", attention("softmax"), softmax_loop)


def patches(z, grid, s):
    """KV compression by hand: a weighted sum of each whole 2 x 2 patch, then LayerNorm."""
    H, W = grid
    out = []
    for i, j in np.ndindex(H // 2, W // 2):
        token = s["sr.bias"].copy()
        for a, b in np.ndindex(2, 2):
            token += s["sr.weight"][:, 0, a, b] * z[(2 * i + a) * W + 2 * j + b]
        normed = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
        out.append(normed * s["norm.weight"] + s["norm.bias"])
    return np.stack(out)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_kv_compression_is_a_loop_over_patches(grid):
    compare("kv-compressed", attention("kv-compressed"), softmax_loop, grid, compress=patches)


def test_kv_compression_by_one_with_an_identical_norm_is_softmax():
    full = attention("softmax")
    one = KVCompressed(Baseline(hidden_size=12, heads=2), ratio=1).double()
    assert (one.sr.weight == 1).all() and not one.sr.bias.any()
    one.norm = nn.Identity()
    assert not one.load_state_dict(full.state_dict(), strict=False).unexpected_keys
    x = normal(2, 15, 12)
    assert_close("O", one(x, GRID), full(x, GRID), atol=1e-12)


def test_kv_compression_starts_as_the_mean_of_a_patch():
    sr = replace(variant("PixArt", TINY), depth=5).build().blocks[4].attn.sr
    assert (sr.weight == 0.25).all() and not sr.bias.any()


def test_kv_compression_is_in_the_last_half_of_the_blocks():
    model = replace(variant("PixArt", TINY), depth=5).build()
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ["Softmax", "Softmax", "KVCompressed", "KVCompressed", "KVCompressed"]
    published = Baseline(attention="kv-compressed", depth=28)
    compressed = [i for i in range(28) if attention_of(published, i) is KVCompressed]
    assert compressed == list(range(14, 28))


def moh_gates(x, s, shared, routed):
    """Gates (N, heads) and the balance term, token by token."""
    p = np.stack([softmax(s["wg.weight"] @ token) for token in x])
    chosen = np.zeros_like(p)
    gates = []
    for n, token in enumerate(x):
        best = sorted(range(len(p[n])), key=lambda e, n=n: -p[n, e])[:routed]
        chosen[n, best] = 1
        g = p[n] * chosen[n] / p[n, best].sum() * routed
        if shared:
            groups = 2 * softmax(s["wg_0.weight"] @ token)
            first = shared * softmax(s["wg_1.weight"] @ token) if shared > 1 else np.ones(1)
            g = np.concatenate([groups[0] * first, groups[1] * g])
        gates.append(g)
    E = p.shape[1]
    balance = E**2 * np.mean([p[:, e].mean() * chosen[:, e].mean() for e in range(E)])
    return np.stack(gates), balance


MOH = pytest.mark.parametrize(
    ("heads", "shared", "routed"), [(6, 2, 3), (6, 1, 1), (4, 0, 2), (3, 1, 2)]
)


def moh(heads, shared, routed):
    """Of the first block, which routes."""
    return attention("moh", heads=heads, shared_heads=shared, routed_heads=routed)


@MOH
def test_mohs_gates_are_a_loop_over_tokens(heads, shared, routed):
    attn, x = moh(heads, shared, routed), normal(2, 15, 12)
    s = arrays(attn)
    got, balance = attn.gates(x)
    want = np.stack([moh_gates(tokens, s, shared, routed)[0] for tokens in x.numpy()])
    assert_close("gates", got, want, atol=1e-12)
    all_tokens = x.flatten(0, 1).numpy()
    assert_close("balance", balance, moh_gates(all_tokens, s, shared, routed)[1], atol=1e-12)


@MOH
def test_a_token_of_moh_uses_the_shared_and_some_routed_heads(heads, shared, routed):
    gates, _ = moh(heads, shared, routed).gates(normal(2, 15, 12))
    assert ((gates > 0).sum(-1) == shared + routed).all()
    if shared > 1:
        total = gates[..., :shared].sum(-1) / shared + gates[..., shared:].sum(-1) / routed
        assert_close("sum of gates", total, torch.full((2, 15), 2.0), atol=1e-12)


@MOH
def test_mohs_output_is_gated_heads(heads, shared, routed):
    attn, x = moh(heads, shared, routed), normal(2, 15, 12)
    s = arrays(attn)
    want = []
    for tokens in x.numpy():
        gates, _ = moh_gates(tokens, s, shared, routed)
        q, k, v = (heads_of(z, heads) for z in projected(tokens, s))
        parts = [gates[:, [h]] * softmax_attend(q[h], k[h], v[h]) for h in range(heads)]
        want.append(linear(np.concatenate(parts, axis=1), s, "proj"))
    assert_close("O", attn(x, GRID), np.stack(want), atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_a_block_of_moh_without_routing_gates_every_head(heads):
    attn, x = randomized(GatedHeads(Baseline(hidden_size=12, heads=heads))), normal(2, 15, 12)
    s = arrays(attn)
    assert {key for key in s if key.startswith("wg")} == ({"wg_1.weight"} if heads > 1 else set())
    want = []
    for tokens in x.numpy():
        q, k, v = (heads_of(z, heads) for z in projected(tokens, s))
        parts = [softmax_attend(q[h], k[h], v[h]) for h in range(heads)]
        if heads > 1:
            gates = heads * np.stack([softmax(s["wg_1.weight"] @ token) for token in tokens])
            parts = [gates[:, [h]] * part for h, part in enumerate(parts)]
        want.append(linear(np.concatenate(parts, axis=1), s, "proj"))
    assert_close("O", attn(x, GRID), np.stack(want), atol=1e-10)
    assert attn.gates(x)[1] is None, "no balance term"


MOH_SIZES = [("S/2", 6, 3, 2, 64), ("B/2", 8, 4, 3, 88), ("L/2", 12, 6, 4, 128)]


@pytest.mark.parametrize(("size", "heads", "shared", "routed", "active"), MOH_SIZES)
def test_moh_is_the_published_one_with_90_percent_active(size, heads, shared, routed, active):
    """Its S/2: 3 + 2 of 6 heads in blocks 0 to 7, all 6 in blocks 8 to 11; ours: B and L."""
    config = preset(f"MoH-{size}")
    assert (config.heads, config.shared_heads, config.routed_heads) == (heads, shared, routed)
    kinds = [attention_of(config, i) for i in range(config.depth)]
    assert kinds == [MoH] * 8 + [GatedHeads] * 4
    used = sum(shared + routed if kind is MoH else heads for kind in kinds)
    assert used == active and 0.88 < used / (12 * heads) < 0.92


def test_moh_with_all_heads_routed_and_equal_gates_is_plain_heads():
    routed = attention("moh", heads=4, routed_heads=4)
    plain = attention("softmax", heads=4)
    nn.init.zeros_(routed.wg.weight)
    assert routed.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["wg.weight"]
    x = normal(2, 15, 12)
    assert_close("O", routed(x, GRID), plain(x, GRID), atol=1e-12)


def test_mohs_balance_is_in_the_gradient_and_not_in_the_value():
    attn = attention("moh", heads=4, shared_heads=2, depth=3)  # two of three blocks route
    x, cotangent = normal(2, 15, 12).requires_grad_(), normal(2, 15, 12, seed=1)
    leaves = [x, *attn.parameters()]
    loss = (attn(x, GRID) * cotangent).sum()  # in training: the module adds its gradient
    got = torch.autograd.grad(loss, leaves)
    attn.eval()
    plain = (attn(x, GRID) * cotangent).sum()
    assert torch.equal(plain, loss)
    want = torch.autograd.grad(plain + 0.01 / 2 * attn.gates(x)[1], leaves)
    for name, a, b in zip(["x", *dict(attn.named_parameters())], got, want):
        assert_close(name, a, b, atol=1e-12)
    without = torch.autograd.grad((attn(x, GRID) * cotangent).sum(), leaves)
    assert (got[0] - without[0]).abs().max() > 1e-6


# --------------------------------------------------------------------------------------------------
# Sana, LiT, FLatten, EDiT.


def linear_loop(x, grid, s, phi, heads=2, normalize=True, conv=False):
    q, k, v = projected(x, s)
    q = np.stack([phi(token) for token in q])
    k = np.stack([phi(token) for token in k])
    parts = zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads))
    out = np.concatenate([attend(*z, normalize, 1e-6) for z in parts], axis=1)
    if conv:  # one kernel for all heads
        kernel = np.tile(s["conv.weight"], (heads, 1, 1, 1))
        bias = np.tile(s["conv.bias"], heads)
        out = out + depthwise(v, grid, kernel) + bias
    return linear(out, s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_relu_linear_is_a_loop(heads, normalize):
    attn = attention("relu", heads=heads, normalize=normalize)
    compare("relu", attn, linear_loop, phi=relu, heads=heads, normalize=normalize)


@pytest.mark.parametrize("grid", [(3, 5), (6, 2), (1, 1)])
def test_lit_is_a_loop(grid):
    compare("lit", attention("lit"), linear_loop, grid, phi=relu, conv=True)


@pytest.mark.parametrize("name", ["lit", "focused"])
def test_lit_and_flatten_have_biases_on_q_k_v(name):
    attn = attention(name)
    assert attn.qkv.bias.shape == (36,) and attention("relu").qkv.bias is None


def rms(tokens, weight):
    return tokens / np.sqrt((tokens**2).mean(1, keepdims=True) + 1e-5) * weight


def test_qk_norm_is_sana_1_5():
    """An RMSNorm of q and of k over all heads, before the kernel."""

    def loop(x, grid, s):
        q, k, v = projected(x, s)
        q, k = relu(rms(q, s["q_norm.weight"])), relu(rms(k, s["k_norm.weight"]))
        parts = zip(heads_of(q, 2), heads_of(k, 2), heads_of(v, 2))
        return linear(np.concatenate([attend(*z, True, 1e-6) for z in parts], axis=1), s, "proj")

    compare("qk_norm", attention("relu", qk_norm=True), loop)
    fresh = baselines.ReLULinear(Baseline(hidden_size=12, attention="relu", qk_norm=True))
    assert (fresh.q_norm.weight == 1).all() and (fresh.k_norm.weight == 1).all()


def test_sanas_feed_forward_starts_as_sanas():
    """Sana's 1 x 1 convolutions keep PyTorch's default, uniform up to 1 / sqrt(inputs)."""
    D = 96
    sana, ladder = (
        replace(variant(name, replace(TINY, hidden_size=D)), depth=1).build().blocks[0].mlp
        for name in ("Sana", "ladder-0-sana")
    )
    for layer, inputs in ((sana.inverted_conv, D), (sana.point_conv, 4 * D)):
        for p in layer.parameters():
            assert p.abs().max() <= inputs**-0.5
            assert p.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)
    assert not ladder.inverted_conv.bias.any()
    x = torch.randn(2, 16, D)
    sana.load_state_dict(ladder.state_dict())
    assert torch.equal(sana(x, (4, 4)), ladder(x, (4, 4))), "the function is the same"


def cube(z):
    return power(z, 3.0)


@pytest.mark.parametrize("grid", [(3, 5), (6, 2)])
def test_focused_is_a_loop_with_the_norm_over_all_heads(grid):
    compare("focused", attention("focused"), linear_loop, grid, phi=cube, conv=True)


def test_focused_with_gamma_1_is_relu_linear(monkeypatch):
    original, x = dydilit.power_kernel, normal(2, 15, 12)
    monkeypatch.setattr(baselines, "power_kernel", lambda z, gamma: original(z, gamma - 2))
    focused, lit = attention("focused")(x, GRID), attention("lit")(x, GRID)
    assert_close("FLatten, LiT", focused, lit, atol=1e-12)
    plain = dict(heads=1, projection="shared", differential="none", dwc=False)
    ladder = [attention("ladder", kernel=name, **plain)(x, GRID) for name in ("focused", "relu")]
    assert_close("ladder", *ladder, atol=1e-12)


def edit_loop(x, grid, s, normalize=True):
    H, W = grid
    D = x.shape[1]
    half = D // 2
    squeezed = np.tile(s["squeeze.bias"], (len(x), 1))
    for i, j in np.ndindex(H, W):
        for a, b in np.ndindex(3, 3):
            row, column = i + a - 1, j + b - 1
            if 0 <= row < H and 0 <= column < W:
                squeezed[i * W + j] += s["squeeze.weight"][:, :, a, b] @ x[row * W + column]
    groups = math.gcd(16, half)
    z = squeezed.reshape(len(x), groups, half // groups)
    z = (z - z.mean((0, 2), keepdims=True)) / np.sqrt(z.var((0, 2), keepdims=True) + 1e-5)
    z = z.reshape(len(x), half) * s["norm.weight"] + s["norm.bias"]
    near = linear(np.where(z > 0, z, 0.01 * z), s, "expand")
    q = relu((x + near) @ s["q.weight"].T)

    def every_second(z, conv):
        full = depthwise(z, grid, s[f"{conv}.weight"]) + s[f"{conv}.bias"]
        return np.stack([full[i * W + j] for i in range(0, H, 2) for j in range(0, W, 2)])

    k = relu(every_second(x @ s["k.weight"].T, "k_conv"))
    v = every_second(x @ s["v.weight"].T, "v_conv")
    assert k.shape == (math.ceil(H / 2) * math.ceil(W / 2), D)
    return linear(attend(q, k, v, normalize, 1e-6), s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (2, 1), (9, 9)])
def test_edit_is_a_loop(grid, normalize):
    attn = attention("edit", heads=1, normalize=normalize)
    compare("edit", attn, edit_loop, grid, normalize=normalize)


# --------------------------------------------------------------------------------------------------
# DiG.


def recurrence(q, k, v, a):
    """One head, token by token: a (N, K) decays the rows of the state."""
    state = np.zeros((k.shape[1], v.shape[1]))
    out = []
    for q_t, k_t, v_t, a_t in zip(q, k, v, a):
        state = a_t[:, None] * state + np.outer(k_t, v_t)
        out.append(q_t @ state)
    return np.stack(out)


@pytest.mark.parametrize("chunk", [8, 3])
@pytest.mark.parametrize("N", [1, 7, 8, 9, 37])
def test_gated_scan_is_the_recurrence(N, chunk):
    q, k, v = normal(2, 3, N, 4), normal(2, 3, N, 4, seed=1), normal(2, 3, N, 5, seed=2)
    log_a = -normal(2, 3, N, 4, seed=3).square()
    inputs = [z.numpy() for z in (q, k, v, log_a.exp())]
    want = np.stack([[recurrence(*(z[b, h] for z in inputs)) for h in range(3)] for b in range(2)])
    got = baselines.gated_scan(q, k, v, log_a, chunk=chunk)
    assert_close("o", got, want, atol=1e-12)


def test_gated_scan_survives_any_decay():
    q, k, v = (normal(1, 40, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    log_a = -torch.logspace(-3, 4, 40).view(1, 40, 1).expand(1, 40, 4).contiguous()
    leaves = [z.requires_grad_() for z in (q, k, v, log_a)]
    o = baselines.gated_scan(*leaves)
    inputs = [z[0].double().detach().numpy() for z in (q, k, v, log_a.double().exp())]
    assert_close("o", o[0], recurrence(*inputs), atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), leaves))


def test_gated_scan_gradcheck():
    q, k, v = (normal(2, 10, 3, seed=seed).requires_grad_() for seed in range(3))
    log_a = (-normal(2, 10, 3, seed=3).square()).requires_grad_()
    assert gradcheck(lambda *z: baselines.gated_scan(*z, chunk=4), [q, k, v, log_a])


@pytest.mark.parametrize("grid", [(3, 4), (5, 5), (2, 7), (1, 3)])
def test_scan_order_is_digs_flips_and_transposes(grid):
    """DiG flips the sequence itself after each block and transposes it after every second one."""
    H, W = grid
    sequence = np.arange(H * W)
    for i in range(9):
        assert baselines.scan_order(grid, i).tolist() == sequence.tolist(), i
        sequence = sequence[::-1]
        if i % 2 == 1:
            sequence = sequence.reshape(H, W).T.flatten()
            H, W = W, H


def dig_loop(x, grid, s, i):
    H, W = grid
    rows = list(range(H * W))
    columns = [r * W + c for c in range(W) for r in range(H)]
    order = (rows, rows[::-1], columns, columns[::-1])[i % 4]
    out = np.empty_like(x)
    x = x[order]
    q, k, v, g = (x @ s[f"{name}_proj.weight"].T for name in "qkvg")
    logits = linear(x @ s["gk_proj.0.weight"].T, s, "gk_proj.1")
    a = (1 / (1 + np.exp(-logits))) ** (1 / 16)
    heads = []
    for q_h, k_h, v_h, a_h in zip(*(heads_of(z, 2) for z in (q, k, v, a))):
        o = recurrence(q_h / math.sqrt(q_h.shape[1]), k_h, v_h, a_h)
        heads.append(o / np.sqrt((o**2).mean(1, keepdims=True) + 1e-6) * s["g_norm.weight"])
    out[order] = (np.concatenate(heads, axis=1) * silu(g)) @ s["o_proj.weight"].T
    return out


@pytest.mark.parametrize("i", range(5))
def test_dig_is_the_recurrence_in_each_direction(i):
    compare("gated", attention("gated", i), dig_loop, i=i)


def xavier_gain(weight):
    """A weight's standard deviation over that of Xavier's rule."""
    return weight.std() / (2 / sum(weight.shape)) ** 0.5


def test_dig_starts_with_small_projections():
    """Xavier with gain 2^-2.5, as in DiG's code; its feed-forward with gain 1."""
    block = replace(variant("DiG", replace(TINY, hidden_size=128)), depth=1).build().blocks[0]
    attn = block.attn
    small = (attn.q_proj, attn.v_proj, attn.g_proj, attn.gk_proj[1], attn.o_proj)
    for layer in small:
        assert abs(xavier_gain(layer.weight) / 2**-2.5 - 1) < 0.1
    assert abs(xavier_gain(block.mlp.down_proj.weight) - 1) < 0.1
    assert not attn.gk_proj[1].bias.any() and (attn.g_norm.weight == 1).all()


def test_digs_convolution_starts_as_the_identity():
    block = replace(variant("DiG", TINY), depth=1).build().blocks[0]
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(block(x, c, (4, 4)), x)


def test_digs_convolution_follows_the_block():
    block = randomized(replace(variant("DiG", TINY), depth=1).build().blocks[0])
    x, c = normal(2, 16, 16), normal(2, 16, seed=1)
    plain = dydilit.Block.forward(block, x, c, (4, 4)).detach().numpy()
    s = arrays(block)
    want = np.stack([depthwise(z, (4, 4), s["dw_conv.weight"]) + s["dw_conv.bias"] for z in plain])
    assert_close("block", block(x, c, (4, 4)), want, atol=1e-12)
