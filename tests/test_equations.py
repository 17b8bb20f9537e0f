"""Equations 1 to 8 against loops over tokens (util.py), their gradients against hand-written ones."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from util import assert_close, attend, attention_loop, choose, grads_of, power, random_op_inputs, top2_margin

import dydilit
from dydilit import difference, dydila_attention, linear_attention, measure, power_kernel, route, routed_projection

pytestmark = pytest.mark.usefixtures("reference_path")  # test_fused.py has the extension
f64 = torch.float64
TOKENS = ("q", "k", "q_prime", "k_prime", "v")


def normal(*shape, seed=0, dtype=f64):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def straight_through(z, index, g, router):
    """A router's gradient by hand: what is selected is s p / stop(p), so d = sum_i g_i z_i (onehot_i - softmax_i)^T.

    z (M, D) tokens, index (M,) their choices, g (M,) = <dL/d selected, selected>, router (D, n); numpy.
    """
    grad = np.zeros(router.shape)
    for z_i, u, g_i in zip(z, index, g):
        e = np.exp(z_i @ router - (z_i @ router).max())
        grad += g_i * np.outer(z_i, np.eye(len(e))[u] - e / e.sum())
    return grad


# ---------------------------------------------------------------------------------------------------------------------
# The norm-preserving power kernel, Eq. 5.


@pytest.mark.parametrize("dtype, rtol", [(f64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0, 12.5])
def test_power_kernel_is_equation_5_token_by_token(gamma, dtype, rtol):
    z = normal(2, 5, 7, dtype=dtype)
    want = np.stack([[power(token, gamma) for token in image] for image in z.double().numpy()])
    assert_close("phi", power_kernel(z, gamma), want, atol=1e-12, rtol=rtol)


def test_power_kernel_takes_one_gamma_per_token():
    z, gamma = normal(2, 5, 7), 1 + normal(2, 5, 1, seed=1).square()
    want = np.stack([[power(z[b, i].numpy(), gamma[b, i].item()) for i in range(5)] for b in range(2)])
    assert_close("phi", power_kernel(z, gamma), want, atol=1e-13)


def test_power_kernel_with_gamma_1_is_relu_and_with_a_large_gamma_one_hot():
    z = torch.tensor([[3.0, -1.0, 4.0, 0.0]], dtype=f64)
    assert_close("gamma 1", power_kernel(z, 1.0), [[3.0, 0.0, 4.0, 0.0]], atol=1e-15)
    assert_close("gamma 200", power_kernel(z, 200.0), [[0.0, 0.0, 5.0, 0.0]], atol=1e-15)


def test_power_kernel_with_gamma_0_shares_the_norm_among_the_positive():
    """The limit of Eq. 5, finite: gamma is learned and nothing keeps it positive."""
    inputs = {"z": torch.tensor([[3.0, -1.0, 4.0, 0.0]], dtype=f64), "gamma": torch.zeros(1, 1, dtype=f64)}
    phi, grads = grads_of(power_kernel, inputs, normal(1, 4))
    assert_close("gamma 0", phi, [[12.5**0.5, 0.0, 12.5**0.5, 0.0]], atol=1e-15)
    assert grads["z"].isfinite().all() and grads["gamma"].isfinite().all()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(z=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12), gamma=st.floats(0.5, 30))
@example(z=[1e4] * 12, gamma=30.0)
@example(z=[1e4, 1e-3, -1e4], gamma=30.0)
@example(z=[1e-3, 2e-3], gamma=30.0)  # without the division by the maximum, 1e-3^30 is 0 in float32
def test_power_kernel_keeps_the_norm(z, gamma):
    phi = power_kernel(torch.tensor([z]), gamma)
    norm = np.sqrt((np.maximum(z, 0) ** 2).sum())
    assert_close("norm", phi.double().norm(), norm, atol=1e-15, rtol=1e-5)  # squares below 1e-38 vanish in float32
    assert (phi >= 0).all()


def test_power_kernel_ignores_what_is_negative():
    z = normal(6, 9)
    other = torch.where(z < 0, -normal(6, 9, seed=1).abs(), z)
    assert torch.equal(power_kernel(z, 3.0), power_kernel(other, 3.0))
    z.requires_grad_()
    (grad,) = torch.autograd.grad(power_kernel(z, 3.0).sum(), z)
    assert (grad[z < 0] == 0).all() and (grad[z > 0] != 0).all()


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-1.0, 0.0])
def test_a_token_without_a_positive_entry_gives_zero_and_zero_gradients(fill, dtype):
    z = normal(4, 6, dtype=dtype)
    z[1], z[3] = fill, fill
    z[0, 0] = 1  # alive
    gamma = torch.full((4, 1), 2.5, dtype=f64 if dtype == f64 else torch.float32)
    phi, grads = grads_of(power_kernel, {"z": z, "gamma": gamma}, torch.ones(4, 6, dtype=gamma.dtype))
    for dead in (1, 3):
        assert (phi[dead] == 0).all() and (grads["z"][dead] == 0).all() and (grads["gamma"][dead] == 0).all()
    # and the living beside it do not notice
    alone, alone_grads = grads_of(power_kernel, {"z": z[:1], "gamma": gamma[:1]}, torch.ones(1, 6, dtype=gamma.dtype))
    assert_close("phi", phi[:1], alone, atol=0)
    assert_close("dz", grads["z"][:1], alone_grads["z"], atol=0)
    assert grads["z"][0].any() and grads["gamma"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_power_kernel_computes_16_bit_tokens_in_float32(dtype):
    z = (1e4 * normal(8, 16)).to(dtype)  # 1e4 squared is infinite in float16
    phi = power_kernel(z, 7.0)
    assert phi.dtype == torch.float32 and torch.equal(phi, power_kernel(z.float(), 7.0))
    want = np.stack([power(token, 7.0) for token in z.double().numpy()])
    assert_close("phi", phi, want, atol=0.1, rtol=1e-5)  # values up to 3e4


def test_power_kernel_gradcheck():
    z = normal(5, 6)
    z = z + 0.05 * z.sign()  # relu has a kink at 0
    z[2] = -1  # a dead token: both sides are 0
    gamma = 1.5 + normal(5, 1, seed=1).square()
    assert gradcheck(power_kernel, (z.requires_grad_(), gamma.requires_grad_()))


# ---------------------------------------------------------------------------------------------------------------------
# Routing, Eqs. 1, 6, 7.


def test_route_takes_the_largest_logit():
    z, router = normal(3, 11, 5), normal(5, 7, seed=1)
    index, gate = route(z, router)
    want = [[choose(token, router.numpy()) for token in image] for image in z.numpy()]
    assert index.dtype == torch.int64 and index.tolist() == want
    assert np.unique(want).size > 3, "the inputs use several routes"
    assert gate.shape == (3, 11, 1) and (gate == 1).all()


@pytest.mark.parametrize("n", [2, 5, 21, 64])
def test_the_lowest_index_wins_an_exact_tie(n):
    router = torch.zeros(3, n)
    assert route(normal(9, 3, dtype=torch.float32), router)[0].tolist() == [0] * 9, "all tie"
    for first in range(n - 1):
        for last in range(first + 1, n):
            router = -torch.ones(1, n)
            router[:, [first, last]] = 2.0
            assert route(torch.tensor([[3.0]]), router)[0].item() == first


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_is_not_left_to_16_bits(dtype, autocast):
    z, router = torch.ones(1, 2, dtype=dtype), torch.tensor([[256.0, 256.0], [0.0, 1.0]], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        index, gate = route(z, router)
    assert index.item() == 1  # 257 rounds to 256 in bfloat16, where index 0 would win the tie
    assert gate.dtype == torch.float32


def test_routers_get_the_straight_through_gradient():
    z, router, s = normal(13, 4), normal(4, 5, seed=1), normal(5, seed=2)
    cotangent = normal(13, seed=3)

    def selected(z, router):
        index, gate = route(z, router)
        return s[index] * gate.squeeze(-1)

    out, grads = grads_of(selected, {"z": z, "router": router}, cotangent)
    index = [choose(token, router.numpy()) for token in z.numpy()]
    assert_close("selected", out, s[index], atol=0)
    g = (cotangent * s[index]).numpy()
    assert_close("d router", grads["router"], straight_through(z.numpy(), index, g, router.numpy()), atol=1e-13)
    p = torch.softmax(z @ router, -1).numpy()
    dz = [g[i] * router.numpy() @ (np.eye(5)[index[i]] - p[i]) for i in range(13)]
    assert_close("d z", grads["z"], np.stack(dz), atol=1e-13)


def test_route_without_router_grad_is_the_same_choice_and_no_gradient():
    z, router = normal(13, 4).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    (index, gate), (trained_index, trained_gate) = route(z, router, router_grad=False), route(z, router)
    assert torch.equal(index, trained_index) and torch.equal(gate, trained_gate)
    assert not gate.requires_grad and trained_gate.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The routed projection, Eqs. 1 and 2.


def dense_then_select(x, projectors, router, router_grad=True):
    """Every token through every projector, (B, N, n_P, D); then one of them is kept."""
    projected = torch.einsum("bnd,pde->bnpe", x, projectors)
    index = torch.tensor([[choose(token, router.detach().numpy()) for token in image] for image in x.detach().numpy()])
    chosen = F.one_hot(index, len(projectors)).to(x)
    selected = (projected * chosen.unsqueeze(-1)).sum(2)
    if not router_grad:
        return selected
    p = (torch.softmax(x @ router, -1) * chosen).sum(-1, keepdim=True)
    return selected * p / p.detach()


@pytest.mark.parametrize("router_grad", [True, False])
@pytest.mark.parametrize("n_P", [1, 3, 7])
def test_routed_projection_is_dense_then_select_with_its_gradients(n_P, router_grad):
    inputs = {"x": normal(2, 12, 5), "projectors": normal(n_P, 5, 5, seed=1), "router": normal(5, n_P, seed=2)}
    if n_P == 3:
        inputs["router"][:, 1] = 0  # a projector that nobody chooses: below |x_0|
        inputs["router"][:, 0], inputs["router"][:, 2] = torch.eye(5, dtype=f64)[0], -torch.eye(5, dtype=f64)[0]
    cotangent = normal(2, 12, 5, seed=3)
    out, grads = grads_of(lambda **z: routed_projection(**z, router_grad=router_grad), inputs, cotangent)
    want, want_grads = grads_of(lambda **z: dense_then_select(**z, router_grad=router_grad), inputs, cotangent)
    assert_close("Q'", out, want, atol=1e-13)
    for name in inputs:
        assert_close(f"d {name}", grads[name], want_grads[name], atol=1e-12)
    if n_P == 3:
        assert (grads["projectors"][1] == 0).all() and grads["projectors"][0].any() and grads["projectors"][2].any()
        assert grads["router"][:, 1].any() == router_grad  # its router column still learns that others were taken


def test_routed_projection_by_grouped_mm_is_the_same(monkeypatch):
    """The branch for bfloat16 on recent GPUs; F.grouped_mm exists on the CPU too. One projector is nobody's choice."""
    inputs = {"x": normal(2, 12, 8), "projectors": normal(4, 8, 8, seed=1), "router": normal(8, 4, seed=2)}
    inputs["router"][:, 1] = 0
    inputs["router"][:, 0], inputs["router"][:, 2] = torch.eye(8, dtype=f64)[0], -torch.eye(8, dtype=f64)[0]
    inputs = {name: z.float() for name, z in inputs.items()}
    cotangent, found = normal(2, 12, 8, seed=3).bfloat16(), []
    for kernel in (False, True):
        monkeypatch.setattr(dydilit, "grouped_mm_has_a_kernel", lambda x, kernel=kernel: kernel)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(grads_of(routed_projection, inputs, cotangent))
    (out, grads), (want, want_grads) = found
    assert out.dtype == want.dtype == torch.bfloat16
    assert_close("Q'", out, want, atol=1e-2, rtol=1e-2)
    for name in inputs:
        assert_close(f"d {name}", grads[name], want_grads[name], atol=3e-2, rtol=1e-2)


def test_routed_projection_gives_each_token_its_own_projector():
    x, router = normal(2, 9, 4), normal(4, 3, seed=2)
    projectors = normal(3, 4, 4, seed=1)
    want = [[token @ projectors[choose(token, router.numpy())].numpy() for token in image] for image in x.numpy()]
    assert_close("Q'", routed_projection(x, projectors, router), np.array(want), atol=1e-13)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close("Q', strided", routed_projection(strided, projectors, router), np.array(want), atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 0, 4)])
def test_nothing_to_project_is_no_error(shape):
    inputs = {"x": torch.zeros(shape), "projectors": torch.ones(3, 4, 4), "router": torch.ones(4, 3)}
    out, grads = grads_of(routed_projection, inputs, torch.ones(shape))
    assert out.shape == shape and not grads["projectors"].any() and not grads["router"].any()


def test_router_gradient_of_the_projection_by_hand():
    x, projectors, router = normal(2, 9, 4), normal(3, 4, 4, seed=1), normal(4, 3, seed=2)
    cotangent = normal(2, 9, 4, seed=3)
    _, grads = grads_of(routed_projection, {"x": x, "projectors": projectors, "router": router}, cotangent)
    tokens = x.flatten(0, 1).numpy()
    index = [choose(token, router.numpy()) for token in tokens]
    g = [(c * (z @ projectors[u].numpy())).sum() for z, u, c in zip(tokens, index, cotangent.flatten(0, 1).numpy())]
    assert_close("d router", grads["router"], straight_through(tokens, index, g, router.numpy()), atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The dynamic measure kernel (Eq. 6) and the token difference (Eqs. 7 and 8).


def test_measure_is_equation_6_token_by_token():
    z, router, gamma = normal(2, 9, 5), normal(5, 4, seed=1), torch.tensor([0.7, 1.5, 3.0, 8.0], dtype=f64)
    index = [[choose(token, router.numpy()) for token in image] for image in z.numpy()]
    assert np.unique(index).size == 4
    want = [[power(z[b, i].numpy(), gamma[index[b][i]].item()) for i in range(9)] for b in range(2)]
    assert_close("z~", measure(z, gamma, router), np.array(want), atol=1e-13)


def test_difference_is_equations_7_and_8_token_by_token():
    z_t, zp_t, router, lam = normal(2, 9, 5), normal(2, 9, 5, seed=1), normal(10, 4, seed=2), normal(4, seed=3)
    want = np.empty((2, 9, 5))
    for b, i in np.ndindex(2, 9):
        a, c = z_t[b, i].numpy(), zp_t[b, i].numpy()
        want[b, i] = a - lam[choose(np.concatenate([a, c]), router.numpy())].item() * c
    assert_close("z~ - lambda z~'", difference(z_t, zp_t, lam, router), want, atol=1e-13)


@pytest.mark.parametrize("fn", [measure, difference])
def test_factors_in_16_bits_are_used_in_float32(fn):
    z, z_prime = normal(1, 4, 6, dtype=torch.bfloat16), normal(1, 4, 6, seed=1, dtype=torch.bfloat16)
    tokens = (z,) if fn is measure else (z.float(), z_prime.float())
    factors, router = torch.tensor([1.5, 3.0], dtype=torch.bfloat16), normal(6 * len(tokens), 2, dtype=torch.bfloat16)
    out = fn(*tokens, factors, router)
    assert out.dtype == torch.float32
    assert torch.equal(out, fn(*(a.float() for a in tokens), factors.float(), router.float()))


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention, Eqs. 4 and 8.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(3, 8), (8, 3), (5, 5), (1, 4)])
def test_linear_order_is_quadratic_order_is_a_loop_over_pairs(N, D, normalize):
    q, k, v = (normal(2, N, D, seed=s) for s in range(3))
    for eps in (1e-6, 0.5):  # the large one shows where eps is added
        want = np.stack([attend(q[b].numpy(), k[b].numpy(), v[b].numpy(), normalize, eps) for b in range(2)])
        for first in (True, False, None):
            out = linear_attention(q, k, v, normalize, eps, tokens_first=first)
            assert_close(f"O, tokens_first={first}, eps={eps}", out, want, atol=1e-9, rtol=1e-11)


@pytest.mark.parametrize("N, D", [(3, 8), (8, 3), (5, 5)])
def test_the_cheaper_order_is_taken(N, D):
    q = torch.zeros(1, N, D)
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, q, q, normalize=False)
    assert counter.get_total_flops() == 2 * 2 * N * D * min(N, D)  # two products, two operations a multiply-add


def test_positive_weights_average_the_values():
    q, k = normal(2, 6, 4).abs(), normal(2, 6, 4, seed=1).abs()
    out = linear_attention(q, k, torch.full((2, 6, 4), 7.0, dtype=f64), eps=0)
    assert_close("O", out, torch.full((2, 6, 4), 7.0), atol=1e-12)


# the third key cancels the first two in the sum: q . sum k is 0, tiny, or negative
GUARDED = {"zero": 0.0, "tiny": 1e-7, "negative": -0.8, "very negative": -50.0}


@pytest.mark.parametrize("case", GUARDED)
def test_the_guard_takes_over_where_the_denominator_vanishes_or_turns_negative(case):
    q = torch.tensor([[[1.0, 2.0, 0.0, -1.0]]], dtype=f64)
    k = normal(1, 3, 4, seed=1)
    along = q / q.square().sum()  # q . along = 1
    k[:, 2] = GUARDED[case] * along[:, 0] - k[:, 0] - k[:, 1]
    v = normal(1, 3, 4, seed=2)
    q_n, k_n, v_n = q[0, 0].numpy(), k[0].numpy(), v[0].numpy()
    floor = 1e-3 * np.linalg.norm(q_n) * sum(np.linalg.norm(k_j) for k_j in k_n)
    assert sum(k_j @ q_n for k_j in k_n) < floor, "the guard is engaged"
    want = sum((q_n @ k_j) * v_j for k_j, v_j in zip(k_n, v_n)) / (floor + 1e-6)
    for first in (True, False):
        out = linear_attention(q.expand(1, 3, 4), k, v, tokens_first=first)
        assert_close("O", out, np.stack([want] * 3)[None], atol=1e-10, rtol=1e-9)


def test_output_never_exceeds_a_thousand_times_the_largest_value():
    for seed in range(20):
        q, k, v = (normal(2, 16, 4, seed=3 * seed + s) for s in range(3))
        k = k - k.mean(1, keepdim=True) * (seed % 3)  # cancelling, overshooting
        out = linear_attention(q * 10.0 ** (seed % 7 - 3), k, v)
        assert (out.abs() <= 1000 * v.abs().max()).all()
    # the bound is met, so 1e-3 is the floor: keys +q and -q, values +1 and -1
    q = normal(1, 1, 4)
    k, v = torch.cat([q, -q], 1), torch.cat([torch.ones(1, 1, 4), -torch.ones(1, 1, 4)], 1).double()
    out = linear_attention(q.expand(1, 2, 4), k, v, eps=0)
    assert_close("O", out, torch.full((1, 2, 4), 1000.0), atol=1e-8)


def test_the_guard_does_not_depend_on_scale():
    q, k, v = (normal(2, 8, 4, seed=s) for s in range(3))
    out = linear_attention(q, k, v, eps=0)
    for a, b in ((1e-3, 1.0), (1.0, 1e3), (1e4, 1e-2)):
        assert_close(f"O of {a} q, {b} k", linear_attention(a * q, b * k, v, eps=0), out, atol=1e-9, rtol=1e-10)


def test_no_similarity_at_all_gives_zero():
    v, nothing = normal(1, 3, 4), torch.zeros(1, 3, 4, dtype=f64)
    assert (linear_attention(nothing, v, v) == 0).all() and (linear_attention(v, nothing, v) == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(3, 4), (5, 2)])
def test_linear_attention_gradcheck(N, D, normalize):
    q, k, v = (normal(1, N, D, seed=s) for s in range(3))
    q[:, 0], q[:, 1] = k.sum(1), -k.sum(1)
    ratio = torch.tensor([q_i @ k[0].sum(0) / (1e-3 * q_i.norm() * k[0].norm(dim=-1).sum()) for q_i in q[0]])
    assert ratio[0] > 2 and ratio[1] < 0 and ((ratio - 1).abs() > 0.5).all()  # both sides of the maximum's kink, off it
    for first in (True, False):
        inputs = [z.clone().requires_grad_() for z in (q, k, v)]
        # where the guard holds, outputs and slopes are in the hundreds: hence atol
        assert gradcheck(lambda *z, f=first: linear_attention(*z, normalize, tokens_first=f), inputs, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The whole op.

SIZES = [(2, 3, 8), (2, 9, 4), (1, 1, 5), (2, 5, 5)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("B, N, D", SIZES)
def test_dydila_attention_is_a_loop_over_tokens(B, N, D, normalize):
    inputs = random_op_inputs(B, N, D, 4, 3, dtype=f64, dead=N // 4, lams=(0.1, 1.5))
    want = attention_loop(**inputs, normalize=normalize)
    assert_close("O", dydila_attention(**inputs, normalize=normalize), want, atol=1e-10, rtol=1e-10)
    want = attention_loop(**inputs, normalize=normalize, eps=0.3)
    assert_close("O, eps", dydila_attention(**inputs, normalize=normalize, eps=0.3), want, atol=1e-10, rtol=1e-10)


def test_dydila_attention_in_float32_and_16_bits():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        # small lambda and few tokens keep the denominators away from 0; the margin, the routes from rounding
        inputs = random_op_inputs(2, 6, 16, 4, 3, dtype=dtype, margin=1e-3, lams=(0.01, 0.1))
        out = dydila_attention(**inputs)
        assert out.dtype == dtype
        assert_close(f"O in {dtype}", out, attention_loop(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N", [3, 9])
def test_autocast_does_not_reach_into_the_op(N, normalize):
    inputs, cotangent = random_op_inputs(2, N, 6, 4, 3), torch.ones(2, N, 6)

    def run(autocast, **z):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return dydila_attention(**z, normalize=normalize)

    (out, grads), (want, want_grads) = (grads_of(partial(run, on), inputs, cotangent) for on in (True, False))
    assert torch.equal(out, want) and all(torch.equal(grads[name], want_grads[name]) for name in inputs)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_grad_leaves_the_forward_bits_alone(normalize):
    inputs = random_op_inputs(2, 7, 6, 4, 3)
    trained, literal = (dydila_attention(**inputs, normalize=normalize, router_grad=r) for r in (True, False))
    assert torch.equal(trained, literal)


def test_an_empty_batch_gives_an_empty_output():
    inputs = random_op_inputs(0, 5, 4, 3, 2)
    out, grads = grads_of(dydila_attention, inputs, torch.ones(0, 5, 4))
    assert out.shape == (0, 5, 4) and not grads["gamma"].any()


def op_written_densely(
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers,
    normalize=True, router_grad=True, kept=None,
):
    """The op for autograd, straight from the printed equations: one-hot choices, explicit gates, the quadratic order.

    kept collects (tokens, one-hot choice, selected factor) of the six routers, to continue by hand from there.
    """

    def select(tokens, factors, router):
        logits = tokens @ router
        chosen = F.one_hot(logits.argmax(-1), len(factors)).to(tokens)
        p = (logits.softmax(-1) * chosen).sum(-1)
        selected = (chosen * factors).sum(-1) * (p / p.detach() if router_grad else 1)
        if kept is not None:
            selected.retain_grad()
            kept.append((tokens.detach(), chosen, selected))
        return selected.unsqueeze(-1)

    def kernel(z, router):
        r, g = z.relu(), select(z, gamma, router)
        return r**g / (r**g).norm(dim=-1, keepdim=True).clamp_min(1e-30) * r.norm(dim=-1, keepdim=True)  # 0 if dead

    q_t, k_t, qp_t, kp_t = (kernel(z, router) for z, router in zip((q, k, q_prime, k_prime), kernel_routers))
    dq = q_t - select(torch.cat([q_t, qp_t], -1), lam, difference_routers[0]) * qp_t
    dk = k_t - select(torch.cat([k_t, kp_t], -1), lam, difference_routers[1]) * kp_t
    similarity = dq @ dk.mT
    if not normalize:
        return similarity @ v
    floor = 1e-3 * dq.norm(dim=-1) * dk.norm(dim=-1).sum(-1, keepdim=True)
    return similarity @ v / (torch.maximum(similarity.sum(-1), floor) + 1e-6).unsqueeze(-1)


@pytest.mark.parametrize("router_grad", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("B, N, D", SIZES)
def test_every_gradient_of_the_op(B, N, D, normalize, router_grad):
    inputs = random_op_inputs(B, N, D, 4, 3, dtype=f64, margin=1e-6, lams=(0.1, 1.5))
    cotangent, how = normal(B, N, D, seed=9), {"normalize": normalize, "router_grad": router_grad}
    out, grads = grads_of(lambda **z: dydila_attention(**z, **how), inputs, cotangent)
    want, want_grads = grads_of(lambda **z: op_written_densely(**z, **how), inputs, cotangent)
    assert_close("O", out, want, atol=1e-10, rtol=1e-10)
    for name in inputs:
        scale = want_grads[name].abs().max().item()
        assert_close(f"d {name}", grads[name], want_grads[name], atol=1e-9 * max(scale, 1))
        if name.endswith("routers"):
            assert grads[name].any() == router_grad


def test_router_gradients_of_the_op_by_hand():
    inputs = random_op_inputs(2, 6, 5, 4, 3, dtype=f64, margin=1e-6)
    cotangent, kept = normal(2, 6, 5, seed=9), []
    _, grads = grads_of(dydila_attention, inputs, cotangent)
    leaves = {name: z.clone().requires_grad_() for name, z in inputs.items()}
    (op_written_densely(**leaves, kept=kept) * cotangent).sum().backward()
    for which, got in enumerate([*grads["kernel_routers"], *grads["difference_routers"]]):
        tokens, chosen, selected = kept[which]
        # from dL/d(selected gamma or lambda), which the dense op supplies, on by hand
        g = (selected.grad * selected).detach().flatten().numpy()
        router = [*inputs["kernel_routers"], *inputs["difference_routers"]][which].numpy()
        want = straight_through(tokens.flatten(0, 1).numpy(), chosen.argmax(-1).flatten().numpy(), g, router)
        assert_close(f"router {which}", got, want, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_dead_tokens_stay_finite_in_the_op(normalize):
    inputs = random_op_inputs(2, 6, 5, 4, 3, dead=3)
    inputs["q_prime"][:, 0] = -1  # this token has no positive entry in q and none in q'
    out, grads = grads_of(lambda **z: dydila_attention(**z, normalize=normalize), inputs, torch.ones(2, 6, 5))
    assert (out[:, 0] == 0).all() and out[:, 1:].isfinite().all()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    assert not grads["q"][:, :3].any() and not grads["k"][:, :3].any() and not grads["q_prime"][:, 0].any()
    assert all(grads[name][:, 3:].any() for name in TOKENS)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(2, 4), (4, 2)])
def test_dydila_attention_gradcheck(N, D, normalize):
    """The routers are fixed, tokens stay off relu's kink and off ties, so the op is smooth around them."""
    inputs = random_op_inputs(1, N, D, 3, 2, dtype=f64, margin=0.02, away=0.1)
    names = (*TOKENS, "gamma", "lam")
    routers = {name: inputs[name] for name in ("kernel_routers", "difference_routers")}

    def op(*z):
        return dydila_attention(**dict(zip(names, z)), **routers, normalize=normalize, router_grad=False)

    assert gradcheck(op, [inputs[name].requires_grad_() for name in names])


def test_attention_ignores_the_order_of_the_tokens():
    inputs = random_op_inputs(2, 7, 4, 3, 2, dtype=f64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = {name: z[:, order] if name in TOKENS else z for name, z in inputs.items()}
    assert_close("O", dydila_attention(**shuffled), dydila_attention(**inputs)[:, order], atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Errors.

WRONG = {"k": (2, 6, 4), "q_prime": (2, 5, 5), "k_prime": (1, 5, 4), "v": (2, 5), "kernel_routers": (3, 4, 3),
         "difference_routers": (2, 4, 2), "gamma": (3, 1), "lam": (1, 2)}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_named(name):
    inputs = random_op_inputs(2, 5, 4, 3, 2)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got \({', '.join(map(str, WRONG[name]))}"):
        dydila_attention(**{**inputs, name: torch.zeros(WRONG[name])})


def test_q_without_a_batch_is_an_error():
    inputs = random_op_inputs(1, 5, 4, 3, 2)
    with pytest.raises(ValueError, match=r"q must be \(B, N, D\), got \(5, 4\)"):
        dydila_attention(**{name: z[0] if name in TOKENS else z for name, z in inputs.items()})


def test_backends():
    inputs = random_op_inputs(1, 5, 4, 3, 2)
    assert torch.equal(dydila_attention(**inputs, backend="reference"), dydila_attention(**inputs, normalize=True))
    with pytest.raises(ValueError, match="'auto', 'reference' or 'fused'"):
        dydila_attention(**inputs, backend="cuda")


def test_fused_without_the_extension_is_a_clear_error():
    with pytest.raises(RuntimeError, match="extension"):
        dydila_attention(**random_op_inputs(1, 5, 4, 3, 2), backend="fused")


def test_util_margins_hold():
    """The inputs of the other tests keep their promise: logits recomputed here, from the rounded tensors."""
    inputs = random_op_inputs(2, 6, 5, 4, 3, dtype=torch.bfloat16, margin=0.05, away=0.1, dead=2)
    z = {name: t.double() for name, t in inputs.items()}
    tilde = {}
    for name, router in zip(("q", "k", "q_prime", "k_prime"), z["kernel_routers"]):
        assert (top2_margin(z[name].numpy(), router.numpy()) >= 0.05).all() and (z[name].abs() > 0.09).all()
        tilde[name] = measure(z[name], z["gamma"], router)
    for side, router in zip("qk", z["difference_routers"]):
        assert (z[side][:, :2] < 0).all() and (z[side][:, 2:] > 0).any()
        pairs = torch.cat([tilde[side], tilde[f"{side}_prime"]], -1)
        assert (top2_margin(pairs.numpy(), router.numpy()) > 0.0499).all()
