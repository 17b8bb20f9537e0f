"""The compared models against loops over tokens, the ladder rung by rung, DiT's names and numbers, costs, scripts."""

import argparse
import ast
import math
import re
import runpy
import sys
from dataclasses import asdict, fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn as nn
from runs import CONFIG, ROOT, RUN, prepare_digits
from test_model import (
    arrays,
    depthwise,
    linear,
    norm_and_modulate,
    normal,
    part,
    randomized,
    silu,
    sincos_loop,
    timestep_loop,
    unpatchify_loop,
)
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from util import assert_close, attend, choose, power, save_vae

import baselines
import bench
import dydilit
import sample_min
import train_min
from baselines import ATTENTIONS, LADDER, MODELS, VARIANTS, Baseline, attention_of, multiply_adds, preset, variant
from dydilit import PRESETS, Config, Diffusion, DyDiLA, Training, train
from load import load_model

pytestmark = pytest.mark.usefixtures("reference_path")  # but for one test of the fused op
TINY = Config(input_size=8, in_channels=2, hidden_size=16, depth=2, n_projectors=2, n_kernels=3, n_lambdas=3,
              num_classes=4)
GRID = (3, 5)


def attention(kind, i=0, seed=0, **changes):
    """One attention in float64 with weights that are nowhere special."""
    config = Baseline(**{"hidden_size": 12, "heads": 2, "n_projectors": 2, "n_kernels": 3, "n_lambdas": 3, "depth": 3}
                      | {"attention": kind} | changes)
    return randomized(ATTENTIONS[kind](config, i), seed)


def projected(x, s, names=("q", "k", "v")):
    """q, k, v (N, D) of the tokens x (N, D), by one fused layer."""
    return np.split(x @ s["qkv.weight"].T + s.get("qkv.bias", 0), 3, axis=1)


def heads_of(x, n):
    return np.split(x, n, axis=1)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def softmax_attend(q, k, v):
    """One head, query by query."""
    return np.stack([sum(p * v_j for p, v_j in zip(softmax(k @ q_i / math.sqrt(len(q_i))), v)) for q_i in q])


def relu(z):
    return np.maximum(z, 0)


def compare(name, attn, loop, grid=GRID, **how):
    """attn(x) and loop(tokens of one image, arrays) on two images, at float64's precision."""
    x = normal(2, math.prod(grid), 12)
    want = np.stack([loop(tokens, grid, arrays(attn), **how) for tokens in x.numpy()])
    assert_close(name, attn(x, grid), want, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax, and what it is compared with.


def softmax_loop(x, grid, s, gates=None, compress=lambda z, grid, s: z):
    q, k, v = projected(x, s)
    k, v = compress(k, grid, s), compress(v, grid, s)
    heads = [softmax_attend(*z) for z in zip(heads_of(q, 2), heads_of(k, 2), heads_of(v, 2))]
    if gates is not None: heads = [gates[:, [h]] * head for h, head in enumerate(heads)]
    return linear(np.concatenate(heads, axis=1), s, "proj")


def test_softmax_is_a_loop_over_queries():
    compare("softmax", attention("softmax"), softmax_loop)


def patches(z, grid, s):
    """KV compression by hand: a weighted sum of each 2 x 2 patch, then LayerNorm; what is left over is dropped."""
    (H, W), out = grid, []
    for i, j in np.ndindex(H // 2, W // 2):
        token = s["sr.bias"].copy()
        for a, b in np.ndindex(2, 2):
            token += s["sr.weight"][:, 0, a, b] * z[(2 * i + a) * W + 2 * j + b]
        out.append((token - token.mean()) / np.sqrt(token.var() + 1e-5) * s["norm.weight"] + s["norm.bias"])
    return np.stack(out)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_kv_compression_is_a_loop_over_patches(grid):
    compare("kv-compressed", attention("kv-compressed"), softmax_loop, grid, compress=patches)


def test_kv_compression_by_one_with_an_identical_norm_is_softmax():
    full, x = attention("softmax"), normal(2, 15, 12)
    one = baselines.KVCompressed(Baseline(hidden_size=12, heads=2), ratio=1).double()
    assert (one.sr.weight == 1).all() and not one.sr.bias.any()
    one.norm = nn.Identity()
    assert not one.load_state_dict(full.state_dict(), strict=False).unexpected_keys
    assert_close("O", one(x, GRID), full(x, GRID), atol=1e-12)


def test_kv_compression_starts_as_the_mean_and_only_in_the_last_half():
    model = replace(variant("PixArt", TINY), depth=5).build()
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ["Softmax", "Softmax", "KVCompressed", "KVCompressed", "KVCompressed"]
    sr = model.blocks[4].attn.sr
    assert (sr.weight == 0.25).all() and not sr.bias.any()
    deep = Baseline(attention="kv-compressed", depth=28)
    assert [i for i in range(28) if attention_of(deep, i) is baselines.KVCompressed] == list(range(14, 28))  # as there


def moh_gates(x, s, shared, routed):
    """Gates (N, heads) and the balance loss, token by token."""
    p = np.stack([softmax(s["wg.weight"] @ token) for token in x])
    gates, chosen = [], np.zeros_like(p)
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
    return np.stack(gates), E**2 * np.mean([p[:, e].mean() * chosen[:, e].mean() for e in range(E)])


@pytest.mark.parametrize(("heads", "shared", "routed"), [(6, 2, 3), (6, 1, 1), (4, 0, 2), (3, 1, 2)])
def test_moh_is_a_loop_over_tokens(heads, shared, routed):
    attn, x = attention("moh", heads=heads, shared_heads=shared, routed_heads=routed), normal(2, 15, 12)
    s = arrays(attn)
    gates = [moh_gates(tokens, s, shared, routed)[0] for tokens in x.numpy()]
    got, balance = attn.gates(x)
    assert_close("gates", got, np.stack(gates), atol=1e-12)
    assert_close("balance", balance, moh_gates(x.flatten(0, 1).numpy(), s, shared, routed)[1], atol=1e-12)
    assert ((got > 0).sum(-1) == shared + routed).all()
    if shared > 1: assert_close("sum of gates", got[..., :shared].sum(-1) / shared + got[..., shared:].sum(-1) / routed,
                                torch.full((2, 15), 2.0), atol=1e-12)
    want = []
    for tokens, gate in zip(x.numpy(), gates):
        parts = [gate[:, [h]] * softmax_attend(*z) for h, z in enumerate(
            zip(*(heads_of(z, heads) for z in projected(tokens, s))))]
        want.append(linear(np.concatenate(parts, axis=1), s, "proj"))
    assert_close("O", attn(x, GRID), np.stack(want), atol=1e-10)


def test_moh_with_all_heads_routed_and_equal_gates_is_plain_heads():
    moh, plain = attention("moh", heads=4, routed_heads=4), attention("softmax", heads=4)
    nn.init.zeros_(moh.wg.weight)
    assert moh.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["wg.weight"]
    x = normal(2, 15, 12)
    assert_close("O", moh(x, GRID), plain(x, GRID), atol=1e-12)


def test_moh_balance_reaches_the_gradient_as_if_it_were_in_the_loss():
    moh, x = attention("moh", heads=4, shared_heads=2, depth=3), normal(2, 15, 12).requires_grad_()
    leaves, cotangent = [x, *moh.parameters()], normal(2, 15, 12, seed=1)
    loss = (moh(x, GRID) * cotangent).sum()  # in training: the module adds its gradient
    got = torch.autograd.grad(loss, leaves)
    moh.eval()
    plain = (moh(x, GRID) * cotangent).sum()
    assert torch.equal(plain, loss), "the value knows nothing of it"
    want = torch.autograd.grad(plain + 0.01 / 3 * moh.gates(x)[1], leaves)
    for name, a, b in zip(["x", *dict(moh.named_parameters())], got, want):
        assert_close(name, a, b, atol=1e-12)
    without = torch.autograd.grad((moh(x, GRID) * cotangent).sum(), leaves)
    assert (got[0] - without[0]).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Linear attentions.


def linear_loop(x, grid, s, phi, heads=2, normalize=True, conv=False):
    q, k, v = projected(x, s)
    q, k = (np.stack([phi(token) for token in z]) for z in (q, k))
    out = np.concatenate([attend(*z, normalize, 1e-6) for z in zip(*(heads_of(z, heads) for z in (q, k, v)))], axis=1)
    if conv:  # one kernel for all heads
        kernel, bias = np.tile(s["conv.weight"], (heads, 1, 1, 1)), np.tile(s["conv.bias"], heads)
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


@pytest.mark.parametrize("grid", [(3, 5), (6, 2)])
def test_focused_is_a_loop_with_the_norm_over_all_heads(grid):
    compare("focused", attention("focused"), linear_loop, grid, phi=lambda z: power(z, 3.0), conv=True)


def test_focused_with_gamma_1_is_relu_linear(monkeypatch):
    original, x = dydilit.power_kernel, normal(2, 15, 12)
    monkeypatch.setattr(baselines, "power_kernel", lambda z, gamma: original(z, gamma - 2))
    assert_close("FLatten, LiT", attention("focused")(x, GRID), attention("lit")(x, GRID), atol=1e-12)
    one = dict(heads=1, projection="shared", differential="none", dwc=False)
    ladder = [attention("ladder", kernel=kernel, **one)(x, GRID) for kernel in ("focused", "relu")]
    assert_close("ladder", *ladder, atol=1e-12)


def edit_loop(x, grid, s, normalize=True):
    (H, W), D, half = grid, x.shape[1], x.shape[1] // 2
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

    def fewer(z, conv):
        full = depthwise(z, grid, s[f"{conv}.weight"]) + s[f"{conv}.bias"]
        return np.stack([full[i * W + j] for i in range(0, H, 2) for j in range(0, W, 2)])

    k, v = relu(fewer(x @ s["k.weight"].T, "k_conv")), fewer(x @ s["v.weight"].T, "v_conv")
    assert k.shape == (-(-H // 2) * -(-W // 2), D)
    return linear(attend(q, k, v, normalize, 1e-6), s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (2, 1), (9, 9)])
def test_edit_is_a_loop(grid, normalize):
    compare("edit", attention("edit", heads=1, normalize=normalize), edit_loop, grid, normalize=normalize)


# ---------------------------------------------------------------------------------------------------------------------
# Gated linear attention.


def recurrence(q, k, v, a):
    """One head, token by token: a (N, K) decays the state's rows."""
    state, out = np.zeros((k.shape[1], v.shape[1])), []
    for q_t, k_t, v_t, a_t in zip(q, k, v, a):
        state = a_t[:, None] * state + np.outer(k_t, v_t)
        out.append(q_t @ state)
    return np.stack(out)


@pytest.mark.parametrize("N", [1, 7, 8, 9, 37])
def test_gated_scan_is_the_recurrence(N):
    q, k, v = normal(2, 3, N, 4), normal(2, 3, N, 4, seed=1), normal(2, 3, N, 5, seed=2)
    log_a = -normal(2, 3, N, 4, seed=3).square()
    inputs = [z.numpy() for z in (q, k, v, log_a.exp())]
    want = np.stack([[recurrence(*(z[b, h] for z in inputs)) for h in range(3)] for b in range(2)])
    assert_close("o", baselines.gated_scan(q, k, v, log_a), want, atol=1e-12)
    assert_close("o, chunk 3", baselines.gated_scan(q, k, v, log_a, chunk=3), want, atol=1e-12)


def test_gated_scan_survives_any_decay():
    q, k, v = (normal(1, 40, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    log_a = -torch.logspace(-3, 4, 40).view(1, 40, 1).expand(1, 40, 4).contiguous()
    leaves = [z.requires_grad_() for z in (q, k, v, log_a)]
    o = baselines.gated_scan(*leaves)
    want = recurrence(*(z[0].double().detach().numpy() for z in (q, k, v, log_a.double().exp())))
    assert_close("o", o[0], want, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), leaves))


def test_gated_scan_gradcheck():
    inputs = [normal(2, 10, 3, seed=seed) for seed in range(3)] + [-normal(2, 10, 3, seed=3).square()]
    assert gradcheck(lambda *z: baselines.gated_scan(*z, chunk=4), [z.requires_grad_() for z in inputs])


@pytest.mark.parametrize("grid", [(3, 4), (5, 5), (2, 7), (1, 3)])
def test_scan_order_is_digs_flips_and_transposes(grid):
    """DiG acts on the sequence itself: it flips it after each block and transposes it after every second one."""
    sequence, (H, W) = np.arange(math.prod(grid)), grid
    for i in range(9):
        assert baselines.scan_order(grid, i).tolist() == sequence.tolist(), i
        sequence = sequence[::-1]
        if i % 2 == 1:
            sequence, (H, W) = sequence.reshape(H, W).T.flatten(), (W, H)


def dig_loop(x, grid, s, i):
    H, W = grid
    by_hand = [list(range(H * W)), list(range(H * W))[::-1],
               [r * W + c for c in range(W) for r in range(H)], [r * W + c for c in range(W) for r in range(H)][::-1]]
    order, out = by_hand[i % 4], np.empty_like(x)
    x = x[order]
    q, k, v, g = (x @ s[f"{name}_proj.weight"].T for name in "qkvg")
    a = (1 / (1 + np.exp(-linear(x @ s["gk_proj.0.weight"].T, s, "gk_proj.1")))) ** (1 / 16)
    heads = []
    for q_h, k_h, v_h, a_h in zip(*(heads_of(z, 2) for z in (q, k, v, a))):
        o = recurrence(q_h / math.sqrt(q_h.shape[1]), k_h, v_h, a_h)
        heads.append(o / np.sqrt((o**2).mean(1, keepdims=True) + 1e-6) * s["g_norm.weight"])
    out[order] = (np.concatenate(heads, axis=1) * silu(g)) @ s["o_proj.weight"].T
    return out


@pytest.mark.parametrize("i", range(5))
def test_dig_is_the_recurrence_in_each_direction(i):
    compare("gated", attention("gated", i), dig_loop, i=i)


def test_dig_starts_with_small_projections():
    """Xavier with gain 2^-2.5, as its code has it; the feed-forward with gain 1."""
    block = replace(variant("DiG", replace(TINY, hidden_size=128)), depth=1).build().blocks[0]
    for layer in (block.attn.q_proj, block.attn.v_proj, block.attn.g_proj, block.attn.gk_proj[1], block.attn.o_proj):
        assert abs(layer.weight.std() / (2 / sum(layer.weight.shape)) ** 0.5 / 2**-2.5 - 1) < 0.1
    assert abs(block.mlp.down_proj.weight.std() / (2 / sum(block.mlp.down_proj.weight.shape)) ** 0.5 - 1) < 0.1
    assert not block.attn.gk_proj[1].bias.any() and (block.attn.g_norm.weight == 1).all()


def test_digs_convolution_follows_the_block_and_starts_as_the_identity():
    model = replace(variant("DiG", TINY), depth=1).build()
    block, x, c = model.blocks[0], torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(block(x, c, (4, 4)), x)
    randomized(block)
    x, c = x.double(), c.double()
    plain = dydilit.Block.forward(block, x, c, (4, 4)).detach().numpy()
    s = arrays(block)
    want = np.stack([depthwise(z, (4, 4), s["dw_conv.weight"]) + s["dw_conv.bias"] for z in plain])
    assert_close("block", block(x, c, (4, 4)), want, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The ladder.


def rung(name, **changes):
    """The named variant's attention, of width 12."""
    config = variant(name, Config(hidden_size=12, n_projectors=2, n_kernels=3, n_lambdas=3, depth=4))
    return randomized(baselines.Ladder(replace(config, **changes)))


def load(module, state, **renamed):
    """Fill `module` from another's state and `renamed`; every parameter of it must be there."""
    module.load_state_dict({name: state[name] for name in module.state_dict() if name in state} | renamed)
    return module


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("router_grad", [True, False])
def test_the_last_rung_is_dydila(normalize, router_grad):
    ladder = rung("ladder-5-dwc", normalize=normalize, router_grad=router_grad)
    dydila = DyDiLA(Config(hidden_size=12, n_projectors=2, n_kernels=3, n_lambdas=3, normalize=normalize,
                           router_grad=router_grad)).double()
    dydila.load_state_dict(ladder.state_dict())
    x, cotangent = normal(2, 15, 12), normal(2, 15, 12, seed=1)
    a, b = (m(x, GRID) for m in (ladder, dydila))
    assert torch.equal(a, b)
    for out in (a, b): (out * cotangent).sum().backward()
    for (name, p), (other, q) in zip(sorted(ladder.named_parameters()), sorted(dydila.named_parameters())):
        assert name == other and p.requires_grad == q.requires_grad and (
            p.grad is q.grad is None or torch.equal(p.grad, q.grad)), name


def test_a_model_of_last_rungs_is_dydilit():
    ladder, model = variant("ladder-5-dwc", TINY).build(), TINY.build()
    ladder.load_state_dict(randomized(model).float().state_dict())
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 4])
    assert torch.equal(ladder(x, t, y), model(x, t, y))


@pytest.mark.skipif("cpu" not in dydilit.FUSED_DEVICES, reason="the extension is not built")
def test_the_last_two_rungs_run_the_fused_op(monkeypatch):
    x = normal(2, 15, 12)
    for name in ("ladder-4-difference", "ladder-5-dwc"):
        want, seen = rung(name)(x, GRID), []
        with monkeypatch.context() as m:
            m.setattr(dydilit, "FUSED_DEVICES", ("cpu",))
            m.setattr(dydilit, "measure", lambda *_, seen=seen: seen.append(1))
            assert_close(name, rung(name)(x, GRID), want, atol=1e-9)
        assert not seen


def test_the_first_rung_is_sana():
    ladder, x = rung("ladder-0-sana"), normal(2, 15, 12)
    sana = attention("relu", heads=1)
    sana.load_state_dict(ladder.state_dict())
    assert_close("O", ladder(x, GRID), sana(x, GRID), atol=1e-12)


def test_rungs_differ_only_in_what_they_name():
    """Shared parameters have the same names and shapes; with what is added made neutral, the same output."""
    x, f64 = normal(2, 15, 12), torch.float64
    names = {name: {k: tuple(p.shape) for k, p in rung(name).named_parameters()} for name in LADDER}
    projectors = {"q_projectors", "k_projectors", "q_projector_router", "k_projector_router"}
    added = {"ladder-1-focused": (set(), set()),
             "ladder-2-measure": ({"gamma", "kernel_routers"}, set()),
             "ladder-3-projection": ({"v.weight"} | projectors, {"qkv.weight"}),
             "ladder-4-difference": ({"qkv.weight", "lam", "difference_routers"}, {"v.weight"}),
             "ladder-5-dwc": ({"dwc.square", "dwc.horizontal", "dwc.vertical", "dwc.bias"}, set())}
    for lower, upper in pairwise(list(LADDER)[:6]):
        new, gone = added[upper]
        assert names[upper].keys() - names[lower].keys() == new and names[lower].keys() - names[upper].keys() == gone
        differing = {k for k in names[lower].keys() & names[upper].keys() if names[lower][k] != names[upper][k]}
        assert differing == ({"kernel_routers"} if upper == "ladder-4-difference" else set())  # two more, of Q' and K'
    assert names["rising-lambda"] == names["ladder-4-difference"]
    assert names["map-wise"] == names["ladder-4-difference"] | {"difference_routers": (1, 24, 3)}

    # 1 and 2: every gamma is 3
    one = rung("ladder-1-focused")
    two = load(rung("ladder-2-measure"), one.state_dict(), gamma=torch.full((3,), 3.0, dtype=f64),
               kernel_routers=normal(2, 12, 3))
    assert_close("1 -> 2", two(x, GRID), one(x, GRID), atol=1e-12)
    # 2 and 3: one projector
    two = rung("ladder-2-measure")
    q, k, v = two.qkv.weight.detach().chunk(3)
    three = load(rung("ladder-3-projection", n_projectors=1), two.state_dict(), **{
        "v.weight": v, "q_projectors": q.T[None], "k_projectors": k.T[None], "q_projector_router": normal(12, 1),
        "k_projector_router": normal(12, 1)})
    assert_close("2 -> 3", three(x, GRID), two(x, GRID), atol=1e-12)
    # 3 and 4: no lambda. Q and K are the shared ones again, here what the single projector was
    four = load(rung("ladder-4-difference", n_projectors=1), three.state_dict(), **{
        "qkv.weight": two.qkv.weight.detach(), "lam": torch.zeros(3, dtype=f64), "difference_routers": normal(2, 24, 3),
        "kernel_routers": torch.cat([three.kernel_routers.detach(), normal(2, 12, 3)])})
    assert_close("3 -> 4", four(x, GRID), three(x, GRID), atol=1e-12)
    # 4 and 5: no convolution
    four, five = rung("ladder-4-difference"), rung("ladder-5-dwc")
    nothing = {k: torch.zeros_like(z) for k, z in five.state_dict().items() if k.startswith("dwc.")}
    five.load_state_dict(four.state_dict() | nothing)
    assert_close("4 -> 5", five(x, GRID), four(x, GRID), atol=1e-12)


@pytest.mark.parametrize("learning", [True, False])
def test_batch_norm_in_the_branches_is_that_of_torch(learning):
    dwc, x = randomized(baselines.NormedDWC(6)), normal(4, 15, 6)
    with torch.no_grad(): dwc.var.abs_()
    norms, before = [], dwc.state_dict(keep_vars=False) | {k: dwc.state_dict()[k].clone() for k in ("mean", "var")}
    for scale, mean, var in zip(before["scale"], before["mean"], before["var"]):
        norms.append(nn.BatchNorm2d(6).double().train(learning))
        norms[-1].load_state_dict({"weight": scale, "bias": torch.zeros(6), "running_mean": mean, "running_var": var,
                                   "num_batches_tracked": torch.tensor(0)})
    want = dwc.bias.view(-1, 1, 1)
    for norm, weight in zip(norms, (dwc.square, dwc.horizontal, dwc.vertical)):
        z = dydilit.image(x, GRID)
        want = want + norm(nn.functional.conv2d(z, weight, padding=[n // 2 for n in weight.shape[2:]], groups=6))
    with torch.set_grad_enabled(learning): got = dwc(x, GRID)
    assert_close("normed", got, dydilit.tokens(want), atol=1e-11)
    for name in ("mean", "var"):
        assert_close(name, getattr(dwc, name), torch.stack([getattr(norm, f"running_{name}") for norm in norms]), 1e-12)
        assert torch.equal(getattr(dwc, name), before[name]) != learning, "they move only while it learns"
    with torch.no_grad(): sample = dwc(x[:1], GRID)
    dwc.eval()
    assert_close("an image alone", dwc(x, GRID)[:1], sample, atol=1e-11)
    with pytest.raises(NotImplementedError): dwc.merge_()


def test_the_averaged_weights_average_the_statistics_too(tmp_path):
    config = replace(variant("ladder-5-dwc", CONFIG), batch_norm=True)
    train(config, replace(RUN, data=str(prepare_digits(tmp_path / "data")), out=str(tmp_path / "out"), ema_decay=0.5))
    ckpt = torch.load(tmp_path / "out" / "ckpt.pt")
    for name in ("mean", "var"):
        start, ema, now = (z[f"blocks.0.attn.dwc.{name}"] for z in (config.build().state_dict(), ckpt["ema"],
                                                                    ckpt["model"]))
        assert not torch.equal(start, ema) and not torch.equal(ema, now)
        assert ((ema - start).abs() < (now - start).abs()).float().mean() > 0.9, "it lags behind"


def routed(x, s):
    """Eq. 2: both of (N, D)."""
    return [np.stack([token @ s[f"{z}_projectors"][choose(token, s[f"{z}_projector_router"])] for token in x])
            for z in "qk"]


def test_dynamic_projection_alone_is_a_loop_of_routed_q_and_k():
    def loop(x, grid, s):
        q, k = routed(x, s)
        q, k = (np.stack([power(token, s["gamma"][choose(token, router)]) for token in z])
                for z, router in zip((q, k), s["kernel_routers"]))
        return linear(attend(q, k, x @ s["v.weight"].T, True, 1e-6), s, "proj")

    compare("ladder-3", rung("ladder-3-projection"), loop)


def map_loop(x, grid, s, normalize=True, lam=None):
    """Eq. 10 without DWC; each of the two attentions has its own denominator."""
    tokens = [*projected(x, s)[:2], *routed(x, s)]
    q, k, qp, kp = (np.stack([power(token, s["gamma"][choose(token, router)]) for token in z])
                    for z, router in zip(tokens, s["kernel_routers"]))
    lam, v = s["lam"] if lam is None else lam, projected(x, s)[2]
    factors = [lam[choose(np.concatenate(pair), s["difference_routers"][0])] for pair in zip(q, qp)]
    o = attend(q, k, v, normalize, 1e-6) - np.array(factors)[:, None] * attend(qp, kp, v, normalize, 1e-6)
    return linear(o, s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
def test_map_wise_is_a_loop(normalize):
    compare("map-wise", rung("map-wise", normalize=normalize), map_loop, normalize=normalize)


def test_map_wise_with_lambda_0_is_no_difference():
    both, x = rung("map-wise"), normal(2, 15, 12)
    nn.init.zeros_(both.lam)
    plain = load(rung("ladder-2-measure"), both.state_dict() | {"kernel_routers": both.kernel_routers[:2].detach()})
    assert_close("O", both(x, GRID), plain(x, GRID), atol=1e-12)
    nn.init.ones_(both.lam)
    assert (both(x, GRID) - plain(x, GRID)).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", ["relu", "focused", "dynamic"])
def test_the_token_difference_works_with_every_kernel(kernel):
    def loop(x, grid, s):
        def phi(token, i):
            fixed = {"relu": 1.0, "focused": 3.0}
            return power(token, fixed[kernel] if kernel in fixed else s["gamma"][choose(token, s["kernel_routers"][i])])

        tokens = [*projected(x, s)[:2], *routed(x, s)]
        q, k, qp, kp = (np.stack([phi(token, i) for token in z]) for i, z in enumerate(tokens))
        dq, dk = (np.stack([a - s["lam"][choose(np.concatenate([a, b]), router)] * b for a, b in zip(z, zp)])
                  for z, zp, router in ((q, qp, s["difference_routers"][0]), (k, kp, s["difference_routers"][1])))
        return linear(attend(dq, dk, projected(x, s)[2], True, 1e-6), s, "proj")

    compare(kernel, rung("ladder-4-difference", kernel=kernel), loop)


def test_initial_lambdas_and_gammas():
    def lambdas(name, depth=4):
        model = variant(name, replace(TINY, depth=depth, hidden_size=128)).build()
        for block in model.blocks:
            attn = block.attn
            assert (attn.gamma == 3).all()
            for router in (attn.q_projector_router, attn.kernel_routers, attn.difference_routers):
                assert abs(router.std() / 0.02 - 1) < 0.2
            for w in attn.q_projectors: assert abs(w.std() / (2 / 256) ** 0.5 - 1) < 0.1  # Xavier
            assert (attn.lam == attn.lam[0]).all()
        return [block.attn.lam[0].item() for block in model.blocks]

    for name in ("ladder-4-difference", "ladder-5-dwc", "map-wise"):
        assert lambdas(name) == pytest.approx([0.01] * 4)  # Sec. 4.1
    assert lambdas("rising-lambda") == pytest.approx([0.2, 0.4, 0.6, 0.8])  # Table 6
    assert lambdas("rising-lambda", depth=1) == pytest.approx([0.2])


# ---------------------------------------------------------------------------------------------------------------------
# All of them: gradients, training, sampling.


def kinds():
    """(attention, its changes): every attention and every rung."""
    table = [(kind, {}) for kind in ATTENTIONS if kind not in ("ladder", "edit")] + [("edit", {"heads": 1})]
    switches = ("kernel", "projection", "differential", "dwc")
    table += [("ladder", dict(zip(switches, LADDER[name]))) for name in LADDER if name != "rising-lambda"]
    return [pytest.param(kind, changes, id="-".join([kind, *map(str, changes.values())])) for kind, changes in table]


@pytest.mark.parametrize(("kind", "changes"), kinds())
def test_gradcheck(kind, changes):
    """x and every parameter; routers, whose gradient is no derivative, are frozen, and MoH's balance is off."""
    size = {"hidden_size": 4, "heads": 1} if kind == "ladder" else {"hidden_size": 8, "heads": 2}
    attn, grid = attention(kind, 1, seed=5, router_grad=False, **size | changes).eval(), (2, 3)
    names = [name for name, p in attn.named_parameters() if p.requires_grad]

    def run(x, *weights):
        return torch.func.functional_call(attn, dict(zip(names, weights)), (x, grid))

    x = normal(1, 6, size["hidden_size"]).requires_grad_()
    assert gradcheck(run, (x, *(p for p in attn.parameters() if p.requires_grad)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_samples(name):
    """Ten steps on one batch; then every parameter has a gradient that lies as the parameter does, as DDP wants it."""
    config = variant(name, replace(TINY, hidden_size=96))  # three heads, as the digits have
    model, diffusion = config.build(), Diffusion()
    x, noise, y, t = torch.randn(8, 2, 8, 8), torch.randn(8, 2, 8, 8), torch.arange(8) % 5, torch.arange(8) * 120
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(11):
        losses.append(sum(diffusion.loss(model, x, y, t, noise)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        if len(losses) < 11: optimizer.step()
    assert all(loss.isfinite() for loss in losses) and losses[-1] < 0.97 * losses[0]
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
        assert p.grad.stride() == p.stride(), key
    images = Diffusion(3).sample(model, torch.arange(4), range(4), seed=0, cfg=2.0, clip=True)
    assert images.shape == (4, 2, 8, 8) and images.isfinite().all() and images.std() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_at_zero_and_keeps_images_apart(name):
    model = replace(variant(name, TINY), depth=2).build()
    x, t, y = torch.randn(3, 2, 8, 8), torch.tensor([5, 400, 999]), torch.tensor([3, 0, 4])
    assert (model(x, t, y) == 0).all()
    assert torch.equal(model.blocks[1](z := torch.randn(1, 16, 16), torch.randn(1, 16), (4, 4)), z), "adaLN-Zero"
    model, x = randomized(model), x.double()
    for i in range(3):
        one = slice(i, i + 1)
        assert_close(f"image {i}", model(x[one], t[one], y[one]), model(x, t, y)[one], atol=1e-8)


@pytest.mark.parametrize("name", ["MoH", "Sana", "FLatten", "LiT", "EDiT", "DiG", "ladder-1-focused", "map-wise"])
def test_bfloat16_autocast_leaves_linear_attention_in_float32(name, monkeypatch):
    model = randomized(replace(variant(name, TINY), depth=2).build()).float()
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 4])
    want, seen = model(x, t, y), set()

    def recording(original):
        def call(*args, **how):
            seen.update((z.dtype, torch.is_autocast_enabled("cpu")) for z in args if isinstance(z, torch.Tensor))
            return original(*args, **how)
        return call

    for function in ("linear_attention", "gated_scan"):
        monkeypatch.setattr(baselines, function, recording(getattr(baselines, function)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen == (set() if name == "MoH" else {(torch.float32, False)})
    assert out.isfinite().all() and (out - want).std() < 0.3 * want.std()
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# DiT.


def official(depth, D, patch, channels, classes, tokens):
    """{name: shape} of facebookresearch/DiT's state dict, from what its paper describes."""
    def layer(name, out, inputs): return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}
    shapes = {"pos_embed": (1, tokens, D), "y_embedder.embedding_table.weight": (classes + 1, D),
              "x_embedder.proj.weight": (D, channels, patch, patch), "x_embedder.proj.bias": (D,)}
    shapes |= layer("t_embedder.mlp.0", D, 256) | layer("t_embedder.mlp.2", D, D)
    for i in range(depth):
        shapes |= layer(f"blocks.{i}.attn.qkv", 3 * D, D) | layer(f"blocks.{i}.attn.proj", D, D)
        shapes |= layer(f"blocks.{i}.mlp.fc1", 4 * D, D) | layer(f"blocks.{i}.mlp.fc2", D, 4 * D)
        shapes |= layer(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    shapes |= layer("final_layer.linear", patch**2 * 2 * channels, D)
    return shapes | layer("final_layer.adaLN_modulation.1", 2 * D, D)


XL = Baseline(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, heads=16, num_classes=1000)


def test_dit_xl_2_has_the_official_names_and_shapes():
    shapes = official(28, 1152, 2, 4, 1000, 256)
    with torch.device("meta"):
        model = XL.build()
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert {name: tuple(z.shape) for name, z in model.state_dict().items()} == shapes
    model.load_state_dict(state, strict=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(675e6, rel=1e-3)  # "675" million, in its paper


@pytest.mark.parametrize(("name", "D", "heads"), [("DiT-S/2", 384, 6), ("DiT-B/2", 512, 8), ("DiT-L/2", 768, 12)])
def test_dit_of_the_paper(name, D, heads):
    """Sec. 4.1: twelve blocks at every size; heads of 64 channels as in DiT's own S and B."""
    config = preset(name)
    assert (config.hidden_size, config.heads, config.depth, config.feed_forward) == (D, heads, 12, "mlp")


def gelu(z):
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def dit_forward(s, x, t, y, *, depth, heads, p, D):
    """DiT for one image, after its paper and the names in its state dict; numpy."""
    side = x.shape[1] // p
    z = sincos_loop((side, side), D).astype(np.float32).astype(np.float64)
    for n in range(side * side):
        i, j = divmod(n, side)
        patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
        z[n] += (s["x_embedder.proj.weight"] * patch).sum((1, 2, 3)) + s["x_embedder.proj.bias"]
    c = linear(silu(linear(timestep_loop(t), s, "t_embedder.mlp.0")), s, "t_embedder.mlp.2")
    c = c + s["y_embedder.embedding_table.weight"][y]
    for b in range(depth):
        block = part(s, f"blocks.{b}.")
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = np.split(linear(silu(c), block, "adaLN_modulation.1"), 6)
        h = linear(norm_and_modulate(z, shift, scale), block, "attn.qkv").reshape(side * side, 3, heads, D // heads)
        h = np.concatenate([softmax_attend(*h[:, :, head].swapaxes(0, 1)) for head in range(heads)], axis=1)
        z = z + gate * linear(h, block, "attn.proj")
        h = gelu(linear(norm_and_modulate(z, shift_mlp, scale_mlp), block, "mlp.fc1"))
        z = z + gate_mlp * linear(h, block, "mlp.fc2")
    z = norm_and_modulate(z, *np.split(linear(silu(c), s, "final_layer.adaLN_modulation.1"), 2))
    return unpatchify_loop(linear(z, s, "final_layer.linear"), p, side)


SMALL = Baseline(input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2, heads=3, num_classes=5)


def test_dit_is_dit():
    model, x = randomized(SMALL.build()), normal(3, 4, 8, 8)
    t, y = torch.tensor([0, 17, 999]), torch.tensor([3, 0, 5])
    s, size = arrays(model), dict(depth=2, heads=3, p=2, D=24)
    want = np.stack([dit_forward(s, x[b].numpy(), t[b].item(), y[b].item(), **size) for b in range(3)])
    assert_close("eps, v", model(x, t, y), want, atol=1e-9, rtol=1e-9)


@pytest.fixture
def dit_file(tmp_path):
    """A file as facebookresearch/DiT offers them, a bare state dict, but small and random."""
    rng = np.random.default_rng(0)
    shapes = official(2, 24, 2, 4, 5, 16)
    state = {name: torch.tensor(0.1 * rng.normal(size=shape), dtype=torch.float32) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "DiT.pt")
    return tmp_path / "DiT.pt", state


def test_a_dit_file_is_a_model(dit_file):
    path, state = dit_file
    model, ckpt = load_model(path, heads=3)
    assert model.config == SMALL and ckpt["meta"]["classes"] == list("01234")
    assert all(torch.equal(z, state[name]) for name, z in model.state_dict().items()) and not model.training
    with pytest.raises(ValueError, match=r"DiT.pt: a width of 24 is none of DiT's own; --heads must say how many"):
        load_model(path)
    other = {name: z + 1 for name, z in state.items()}  # as DiT's train.py keeps them
    torch.save({"model": other, "ema": state, "opt": {}, "args": argparse.Namespace(model="DiT-S/2")}, path)
    for name, z in load_model(path, heads=3)[0].state_dict().items(): assert torch.equal(z, state[name])
    torch.save({name: z.bfloat16() for name, z in state.items()}, path)
    model, ckpt = load_model(path, heads=3)
    assert all(z.dtype == torch.float32 for z in model.state_dict().values())
    assert len(sample_min.settings_of(model, ckpt, cfg=1.5, steps=3, seed=0)["weights"]) == 16
    state["final_layer.linear.bias"] = torch.zeros(16)  # without the learned variance
    torch.save(state, path)
    message = r"DiT.pt: the weights are not those of its model: .*final_layer.linear.bias"
    with pytest.raises(ValueError, match=message) as e:
        load_model(path, heads=3)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("D", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_dits_own_widths_tell_their_heads(tmp_path, D, heads, monkeypatch):
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in official(1, D, 4, 4, 1000, 64).items()}
    torch.save({}, tmp_path / "DiT.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    with torch.device("meta"):
        config = load_model(tmp_path / "DiT.pt")[0].config
    assert config == Baseline(input_size=32, patch_size=4, hidden_size=D, depth=1, heads=heads)


def test_sample_min_samples_from_a_dit_file(dit_file, tmp_path, script):
    code, stdout, _ = script("sample_min.py", dit_file[0], "--heads=3", "--steps=3", "--per-class=2",
                             "--classes", "4", "1", f"--vae={save_vae(tmp_path / 'vae')}", f"--out={tmp_path}/s.npz")
    assert code == 0 and "4 images" in stdout
    with np.load(tmp_path / "s.npz") as npz:
        assert npz["arr_0"].shape == (4, 16, 16, 3) and npz["labels"].tolist() == [4, 1, 4, 1]
    code, _, _ = script("sample_min.py", dit_file[0], f"--out={tmp_path}/s.npz")
    assert code.startswith("sample_min.py: error: ") and "--heads" in code


# ---------------------------------------------------------------------------------------------------------------------
# Costs.


def counted_by_torch(config):
    """flop_counter's multiply-adds of one image. It does not see the scan, which is left out of both sides here."""
    model = config.build()
    size = (1, config.in_channels, config.input_size, config.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(size), torch.tensor([5]), torch.tensor([0]))
    return counter.get_total_flops() / 2


# more tokens than channels, fewer, and an odd side: the order of the products and the rounding of the strides change
SIZES = [(8, 2, 64), (16, 1, 32), (10, 2, 16)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("input_size", "patch_size", "D"), SIZES)
@pytest.mark.parametrize("name", [*VARIANTS, "DyDi-LiT"])
def test_multiply_adds_are_what_torch_counts(name, input_size, patch_size, D, normalize, monkeypatch):
    base = replace(TINY, input_size=input_size, patch_size=patch_size, hidden_size=D, n_kernels=5, normalize=normalize)
    config = replace(base if name == "DyDi-LiT" else variant(name, base), depth=3)
    monkeypatch.setattr(baselines, "gated_scan", lambda q, k, v, log_a: v)
    counted, left_out = multiply_adds(config)
    assert counted + (0 if name == "DiG" else left_out) == counted_by_torch(config)
    routers_or_gates = name in ("MoH", "DiG", "DyDi-LiT", *list(LADDER)[2:])
    assert (left_out > 0) == routers_or_gates


def test_the_scan_costs_two_products_a_token_and_head():
    config = Baseline(attention="gated", feed_forward="swiglu", heads=6, hidden_size=384, depth=2)
    K, V = 384 // 2 // 6, 384 // 6
    assert multiply_adds(config)[1] == 2 * 256 * 6 * (K * V + K * V)  # blocks, tokens, heads, k^T v and q S


PRINTED = [(pixels, size, model, printed) for (_, pixels, size), models in bench.PAPER_GFLOPS.items()
           for model, printed in models.items() if printed]


@pytest.mark.parametrize(("pixels", "size", "model", "printed"), PRINTED)
def test_multiply_adds_are_those_of_the_paper(pixels, size, model, printed):
    """PixArt and DiG within 2 %, the others within 0.3 % (Table 5's rows 0.5 %); and the paper's number of blocks."""
    depth, gflops, left_out = bench.counted(pixels, size, model)
    assert gflops == pytest.approx(printed, rel={"PixArt": 0.02, "DiG": 0.02, "map-wise": 0.005}.get(model, 0.003))
    assert depth == {"DiT": 12, "PixArt": 12, "DiG": 12 if size == "B/2" else 13}.get(model, 9)
    low, high = {"DiG": (0.005, 0.02), "DiT": (0, 0), "PixArt": (0, 0), "EDiT": (0, 0), "Sana": (0, 0)}.get(
        model, (0.11, 0.14))
    assert low <= left_out / printed <= high


def test_bench_prints_every_model_beside_the_paper(script):
    code, stdout, _ = script("bench.py", "--flops")
    assert code == 0
    rows = [line.split("|")[1:-1] for line in stdout.splitlines()[2:]]
    assert len(rows) == 29 and all(len(row) == 8 for row in rows)
    dydilit_row = ["1", "DyDi-LiT, S/2, 256 px", "9", "5.98", "5.97", "-0.09%", "0.75", "6.72"]
    assert [cell.strip() for cell in rows[5]] == dydilit_row
    assert [cell.strip() for cell in rows[-3]][1:4] == ["MoH, S/2, 256 px", "12", ""]


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_nearest_in_multiply_adds(name, base):
    config, target = preset(f"{name}-{base}"), multiply_adds(PRESETS[base])[0]
    gaps = [abs(multiply_adds(replace(config, depth=config.depth + step))[0] - target) for step in (-1, 0, 1)]
    assert gaps[1] == min(gaps)
    large, medium = (variant(name, replace(PRESETS[base], input_size=n * PRESETS[base].patch_size)) for n in (32, 16))
    assert large.depth == medium.depth, "256 pixels decide for 512, as in the paper"


# ---------------------------------------------------------------------------------------------------------------------
# Names, the command line, checkpoints.


@pytest.fixture
def script(monkeypatch, capsys):
    """script("sample_min.py", "--steps=3") runs it as __main__, here: (what it exits with, stdout, stderr)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("base", PRESETS)
def test_every_variant_of_every_preset_builds(base):
    for name in VARIANTS:
        config = preset(f"{name}-{base}")
        assert isinstance(config, Baseline) and (name not in LADDER or config.depth == PRESETS[base].depth)
        inherited = {f.name: getattr(config, f.name) for f in fields(Config)}
        assert inherited == asdict(PRESETS[base]) | {"depth": config.depth}
        with torch.device("meta"): replace(config, depth=1).build()
    assert preset(base) is PRESETS[base]


@pytest.mark.parametrize("name", ["XL/2", "DiT-XL/2", "DiX-S/2", "DiT", "-", "-S/2", "DiT-", "S/2-DiT", "DiT-S/2 "])
def test_an_unknown_preset_lists_the_known(name):
    with pytest.raises(ValueError) as e:
        preset(name)
    assert str(e.value).startswith(f"unknown preset {name!r}; known: S/2, B/2, L/2, pixels32, photos, digits; ")
    assert all(known in str(e.value) for known in VARIANTS)


def test_an_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown variant 'dit'; known: DiT, PixArt, MoH, Sana, .*, rising-lambda$"):
        variant("dit", PRESETS["digits"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention": "flash"}, "unknown attention 'flash'; known: softmax, kv-compressed, moh, .*, ladder"),
    ({"feed_forward": ""}, "unknown feed_forward ''; known: mlp, glumbconv, swiglu"),
    ({"kernel": "elu"}, "unknown kernel 'elu'; known: relu, focused, dynamic"),
    ({"projection": "none"}, "unknown projection 'none'; known: shared, dynamic"),
    ({"differential": "tokens"}, "unknown differential 'tokens'; known: none, token, map"),
    ({"heads": 5}, "5 heads do not divide hidden_size 384"),
    ({"heads": 0}, "0 heads do not divide"),
    ({"heads": 2, "attention": "edit"}, "attention 'edit' has one head, got 2"),
    ({"heads": 2, "attention": "ladder"}, "attention 'ladder' has one head, got 2"),
    ({"heads": 384, "attention": "gated"}, "384 heads do not divide"),
    ({"heads": 6, "attention": "moh", "shared_heads": 6}, "routed_heads 1 must be between 1 and the 6 heads less"),
    ({"heads": 6, "attention": "moh", "routed_heads": 0}, "routed_heads 0 must be"),
    ({"projection": "shared"}, "differential 'token' needs Q' and K': projection must be 'dynamic'"),
    ({"attention": "ladder", "batch_norm": True, "dwc": False}, "batch_norm needs dwc"),
    ({"attention": "ladder", "rising_lambda": True, "differential": "none"}, "rising_lambda a differential"),
    ({"kernel": "relu"}, "kernel is for attention 'ladder', not for 'softmax'"),
    ({"shared_heads": -1}, "Baseline.shared_heads must be between 0 and inf, got -1"),
    ({"heads": 2.0}, "Baseline.heads must be int"),
    ({"depth": 0}, "Baseline.depth must be between 1"),
])
def test_a_wrong_field_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Baseline(**changes)


def test_the_command_line_knows_every_variant_and_its_fields(script):
    given = ["--preset=ladder-2-measure-digits", "--depth=3", "--kernel=focused", "--dwc"]
    config, training, _ = train_min.parse(given)
    assert config == replace(preset("ladder-2-measure-digits"), depth=3, kernel="focused", dwc=True)
    assert training == replace(train_min.RECIPES["digits"], out="out/ladder-2-measure-digits"), "the recipe of its size"
    assert train_min.parse(["--preset=DiT-S/2"])[:2] == (preset("DiT-S/2"), Training(out="out/DiT-S-2"))
    text = " ".join(script("train_min.py", "--preset=MoH-digits", "--help")[1].split())
    lines = (ROOT / "baselines.py").read_text().splitlines()
    (part,) = (p for p in ast.parse("\n".join(lines)).body if isinstance(p, ast.ClassDef) and p.name == "Baseline")
    own = [line for line in part.body if isinstance(line, ast.AnnAssign)]
    assert [line.target.id for line in own] == [f.name for f in fields(Baseline)][len(fields(Config)) :]
    for line in own:
        comment, value = lines[line.lineno - 1].split("  # ")[1], getattr(preset("MoH-digits"), line.target.id)
        assert f"{comment} (default {value})" in text
    assert "D, the token width; a multiple of 4 (default 96)" in text, "the inherited ones too"
    assert all(name in text for name in VARIANTS)
    code = script("train_min.py", "--preset=DiT-nope")[0]
    assert re.match(r"train_min.py: error: unknown preset 'DiT-nope'; known: S/2, [^\n]*$", code)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.mark.parametrize("name", ["DiT", "DiG", "ladder-0-sana"])
def test_a_checkpoint_says_which_model_it_is(name, digits, tmp_path, script):
    config = variant(name, CONFIG)
    run = replace(RUN, data=digits, out=str(tmp_path / "run"))
    train(config, run)
    path = tmp_path / "run" / "ckpt.pt"
    model, ckpt = load_model(path)
    assert model.config == config and type(model.config) is Baseline and ckpt["step"] == 6
    assert type(load_model(path)[0].blocks[0].attn) is attention_of(config, 0)
    assert all(torch.equal(z, ckpt["ema"][key]) for key, z in model.state_dict().items())
    code, stdout, _ = script("sample_min.py", path, "--steps=3", "--per-class=1", f"--out={tmp_path}/s.npz")
    assert code == 0 and "10 images from step 6" in stdout
    # of another kind, of the same
    for other, field in ((CONFIG, "attention"), (replace(config, normalize=False), "normalize")):
        with pytest.raises(ValueError, match=f"belongs to another configuration: .*{field} .* \\(now "):
            train(other, replace(run, steps=8), resume=True)
    assert train(config, replace(run, steps=7), resume=True) == 7


def test_a_run_of_dydilit_is_not_resumed_as_a_baseline(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path), steps=1)
    train(CONFIG, run)
    assert type(load_model(tmp_path / "ckpt.pt")[0].config) is Config
    with pytest.raises(ValueError, match=r"belongs to another configuration: .*attention None \(now 'softmax'\)"):
        train(variant("DiT", CONFIG), run, resume=True)
