"""Equations 1 to 8 against the loops of util.py, their gradients against gradients by hand."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode
from util import (
    assert_close,
    attend,
    attention_loop,
    choose,
    grads_of,
    normal,
    power,
    random_op_inputs,
    top2_margin,
)

import dydilit
from dydilit import (
    difference,
    dydila_attention,
    dydila_reference,
    linear_attention,
    measure,
    power_kernel,
    route,
    routed_projection,
)

pytestmark = pytest.mark.usefixtures("reference_path")  # test_fused.py tests the extension
f64 = torch.float64
TOKENS = ("q", "k", "q_prime", "k_prime", "v")


def choices(x, router):
    """The routes of tokens x (B, N, D), as nested lists."""
    return [[choose(token, router.numpy()) for token in image] for image in x.detach().numpy()]


def straight_through(z, index, g, router):
    """A router's gradient by hand, in numpy.

    z (M, D) tokens, index (M,) their choices, router (D, n), and g (M,) = <dL/d s, s> for the
    selected s. The gate multiplies s by p / stop_gradient(p), p the softmax probability of the
    choice, so the gradient is sum_i g_i z_i (onehot_i - softmax_i)^T.
    """
    grad = np.zeros(router.shape)
    for z_i, u, g_i in zip(z, index, g):
        e = np.exp(z_i @ router - (z_i @ router).max())
        grad += g_i * np.outer(z_i, np.eye(len(e))[u] - e / e.sum())
    return grad


# ----------------------------------------------------------------------------------------------
# The norm-preserving power kernel, Eq. 5.


@pytest.mark.parametrize("dtype, rtol", [(f64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0, 12.5])
def test_power_kernel_is_equation_5_token_by_token(gamma, dtype, rtol):
    z = normal(2, 5, 7, dtype=dtype)
    want = np.stack([[power(token, gamma) for token in image] for image in z.double().numpy()])
    assert_close("phi", power_kernel(z, gamma), want, atol=1e-12, rtol=rtol)


def test_power_kernel_takes_one_gamma_per_token():
    z, gamma = normal(2, 5, 7), 1 + normal(2, 5, 1, seed=1).square()
    want = np.empty((2, 5, 7))
    for b, i in np.ndindex(2, 5):
        want[b, i] = power(z[b, i].numpy(), gamma[b, i].item())
    assert_close("phi", power_kernel(z, gamma), want, atol=1e-13)


def test_power_kernel_with_gamma_1_is_relu():
    z = torch.tensor([[3.0, -1.0, 4.0, 0.0]], dtype=f64)
    assert_close("phi", power_kernel(z, 1.0), [[3.0, 0.0, 4.0, 0.0]], atol=1e-15)


def test_power_kernel_with_a_large_gamma_is_one_hot():
    z = torch.tensor([[3.0, -1.0, 4.0, 0.0]], dtype=f64)
    assert_close("phi", power_kernel(z, 200.0), [[0.0, 0.0, 5.0, 0.0]], atol=1e-15)


def test_power_kernel_with_gamma_0_shares_the_norm_among_the_positive_entries():
    """The limit of Eq. 5, with finite gradients: nothing keeps a learned gamma positive."""
    z = torch.tensor([[3.0, -1.0, 4.0, 0.0]], dtype=f64)
    inputs = {"z": z, "gamma": torch.zeros(1, 1, dtype=f64)}
    phi, grads = grads_of(power_kernel, inputs, normal(1, 4))
    assert_close("phi", phi, [[12.5**0.5, 0.0, 12.5**0.5, 0.0]], atol=1e-15)
    assert grads["z"].isfinite().all() and grads["gamma"].isfinite().all()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    z=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    gamma=st.floats(0.5, 30),
)
@example(z=[1e4] * 12, gamma=30.0)
@example(z=[1e4, 1e-3, -1e4], gamma=30.0)
@example(z=[1e-3, 2e-3], gamma=30.0)  # 1e-3^30 is 0 in float32: the maximum is divided out first
def test_power_kernel_keeps_the_norm(z, gamma):
    phi = power_kernel(torch.tensor([z]), gamma)
    norm = np.sqrt((np.maximum(z, 0) ** 2).sum())
    # atol: squares below 1e-38 vanish in float32
    assert_close("norm", phi.double().norm(), norm, atol=1e-15, rtol=1e-5)
    assert (phi >= 0).all()


def test_power_kernel_ignores_negative_entries():
    z = normal(6, 9)
    other = torch.where(z < 0, -normal(6, 9, seed=1).abs(), z)
    assert torch.equal(power_kernel(z, 3.0), power_kernel(other, 3.0))


def test_negative_entries_get_the_gradient_0():
    z = normal(6, 9).requires_grad_()
    (grad,) = torch.autograd.grad(power_kernel(z, 3.0).sum(), z)
    assert (grad[z < 0] == 0).all() and (grad[z > 0] != 0).all()


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-1.0, 0.0])
def test_a_token_without_a_positive_entry_gives_zero_and_zero_gradients(fill, dtype):
    z = normal(4, 6, dtype=dtype)
    z[1], z[3] = fill, fill  # dead
    z[0, 0] = 1  # alive
    core = f64 if dtype == f64 else torch.float32
    gamma, ones = torch.full((4, 1), 2.5, dtype=core), torch.ones(4, 6, dtype=core)
    phi, grads = grads_of(power_kernel, {"z": z, "gamma": gamma}, ones)
    for dead in (1, 3):
        assert (phi[dead] == 0).all()
        assert (grads["z"][dead] == 0).all() and (grads["gamma"][dead] == 0).all()
    # the living token beside them is what it is alone
    alone = {"z": z[:1], "gamma": gamma[:1]}
    phi_alone, grads_alone = grads_of(power_kernel, alone, ones[:1])
    assert_close("phi", phi[:1], phi_alone, atol=0)
    assert_close("dz", grads["z"][:1], grads_alone["z"], atol=0)
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


# ----------------------------------------------------------------------------------------------
# Routing, Eqs. 1, 6, 7.


def test_route_takes_the_largest_logit():
    z, router = normal(3, 11, 5), normal(5, 7, seed=1)
    index, gate = route(z, router)
    want = choices(z, router)
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
def test_logits_are_float32_in_16_bits_and_under_autocast(dtype, autocast):
    z = torch.ones(1, 2, dtype=dtype)
    router = torch.tensor([[256.0, 256.0], [0.0, 1.0]], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        index, gate = route(z, router)
    assert index.item() == 1  # in bfloat16 257 rounds to 256, and index 0 would win the tie
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
    d_router = straight_through(z.numpy(), index, g, router.numpy())
    assert_close("d router", grads["router"], d_router, atol=1e-13)
    p = torch.softmax(z @ router, -1).numpy()
    dz = [g[i] * router.numpy() @ (np.eye(5)[index[i]] - p[i]) for i in range(13)]
    assert_close("d z", grads["z"], np.stack(dz), atol=1e-13)


def test_route_without_router_grad_makes_the_same_choice_and_gives_no_gradient():
    z, router = normal(13, 4).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    index, gate = route(z, router, router_grad=False)
    trained_index, trained_gate = route(z, router)
    assert torch.equal(index, trained_index) and torch.equal(gate, trained_gate)
    assert not gate.requires_grad and trained_gate.requires_grad


# ----------------------------------------------------------------------------------------------
# The routed projection, Eqs. 1 and 2.


def dense_then_select(x, projectors, router, router_grad=True):
    """Every token through every projector, (B, N, n_P, D); then one of them is kept."""
    projected = torch.einsum("bnd,pde->bnpe", x, projectors)
    index = torch.tensor(choices(x, router.detach()))
    chosen = F.one_hot(index, len(projectors)).to(x)
    selected = (projected * chosen.unsqueeze(-1)).sum(2)
    if not router_grad:
        return selected
    p = (torch.softmax(x @ router, -1) * chosen).sum(-1, keepdim=True)
    return selected * p / p.detach()


def avoid_projector_1(router):
    """Its logit becomes 0; those of projectors 0 and 2 become x_0 and -x_0, one of them larger."""
    first = torch.eye(len(router), dtype=router.dtype)[0]
    router[:, 0] = first
    router[:, 1] = 0
    router[:, 2] = -first


@pytest.mark.parametrize("router_grad", [True, False])
@pytest.mark.parametrize("n_P", [1, 3, 7])
def test_routed_projection_is_dense_then_select_with_its_gradients(n_P, router_grad):
    projectors, router = normal(n_P, 5, 5, seed=1), normal(5, n_P, seed=2)
    inputs = {"x": normal(2, 12, 5), "projectors": projectors, "router": router}
    cotangent = normal(2, 12, 5, seed=3)
    out, grads = grads_of(partial(routed_projection, router_grad=router_grad), inputs, cotangent)
    want, wanted = grads_of(partial(dense_then_select, router_grad=router_grad), inputs, cotangent)
    assert_close("Q'", out, want, atol=1e-13)
    for name in inputs:
        assert_close(f"d {name}", grads[name], wanted[name], atol=1e-12)


@pytest.mark.parametrize("router_grad", [True, False])
def test_a_projector_without_tokens_gets_no_gradient_but_its_router_column_does(router_grad):
    projectors, router = normal(3, 5, 5, seed=1), normal(5, 3, seed=2)
    avoid_projector_1(router)
    inputs = {"x": normal(2, 12, 5), "projectors": projectors, "router": router}
    cotangent = normal(2, 12, 5, seed=3)
    out, grads = grads_of(partial(routed_projection, router_grad=router_grad), inputs, cotangent)
    want, wanted = grads_of(partial(dense_then_select, router_grad=router_grad), inputs, cotangent)
    assert_close("Q'", out, want, atol=1e-13)
    for name in inputs:
        assert_close(f"d {name}", grads[name], wanted[name], atol=1e-12)
    assert (grads["projectors"][1] == 0).all()
    assert grads["projectors"][0].any() and grads["projectors"][2].any()
    assert grads["router"][:, 1].any() == router_grad  # it learns that others were taken


@pytest.mark.parametrize("M", [0, 1, 5, 200])
@pytest.mark.parametrize("n_P", [1, 3, 7])
def test_the_projection_by_tiles_is_that_by_index(n_P, M):
    """The tiles are for GPUs, and compute the same anywhere."""
    index = (normal(M, seed=4).abs() * n_P).long() % max(1, n_P - 1)  # the last one has no rows
    inputs = {"rows": normal(M, 6), "projectors": normal(n_P, 6, 6, seed=1)}
    cotangent = normal(M, 6, seed=3)
    out, grads = grads_of(partial(dydilit.project_by_tiles, index=index), inputs, cotangent)
    want, wanted = grads_of(partial(dydilit.project, index=index), inputs, cotangent)
    assert_close("out", out, want, atol=1e-13)
    for name in inputs:
        assert_close(f"d {name}", grads[name], wanted[name], atol=1e-12)


def test_a_tile_may_be_exactly_full():
    """256 rows fill tiles of 16; each of the first two projectors has 128 of them."""
    rows, projectors, index = normal(256, 6), normal(3, 6, 6, seed=1), torch.arange(256) // 128
    out = dydilit.project_by_tiles(rows, projectors, index)
    want = torch.cat([rows[:128] @ projectors[0], rows[128:] @ projectors[1]])
    assert_close("out", out, want, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("project", [dydilit.project, dydilit.project_by_tiles])
def test_the_projection_has_the_dtype_of_a_product(project, dtype, autocast):
    rows, projectors = normal(8, 16).to(dtype), normal(2, 16, 16, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        product = rows @ projectors[0]
        out = project(rows, projectors, torch.zeros(8, dtype=torch.long))
    assert out.dtype == product.dtype
    assert_close("out", out, product, atol=0.1 if out.dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("project", [dydilit.project, dydilit.project_by_tiles])
def test_gradcheck_of_the_projection_twice(project):
    index = torch.tensor([0, 2, 2, 0, 3, 2, 0])
    leaves = [normal(7, 4).requires_grad_(), normal(4, 4, 4, seed=1).requires_grad_()]
    assert gradcheck(partial(project, index=index), leaves)
    assert gradgradcheck(partial(project, index=index), leaves)


def test_routed_projection_gives_each_token_its_own_projector():
    x, router = normal(2, 9, 4), normal(4, 3, seed=2)
    projectors = normal(3, 4, 4, seed=1)
    want = np.empty((2, 9, 4))
    for b, i in np.ndindex(2, 9):
        token = x[b, i].numpy()
        want[b, i] = token @ projectors[choose(token, router.numpy())].numpy()
    assert_close("Q'", routed_projection(x, projectors, router), want, atol=1e-13)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close("Q', strided", routed_projection(strided, projectors, router), want, atol=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.func imports
def test_routed_projection_in_vmap_is_a_loop_over_examples():
    """There nobody can count the tokens of a route: the examples of a batch have other counts."""
    projectors, router = normal(3, 4, 4, seed=1), normal(4, 3, seed=2)
    avoid_projector_1(router)
    x = normal(5, 2, 6, 4)

    def loss(projectors, tokens):
        return routed_projection(tokens, projectors, router).square().sum()

    both = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(projectors, x)
    for i, tokens in enumerate(x):
        leaves = [projectors.clone().requires_grad_(), tokens.clone().requires_grad_()]
        for got, want in zip(both, torch.autograd.grad(loss(*leaves), leaves)):
            assert_close(f"example {i}", got[i], want, atol=1e-12)


def test_on_the_meta_device_a_routed_projection_has_its_shape_and_flops():
    inputs = {"x": normal(2, 12, 5), "projectors": normal(3, 5, 5), "router": normal(5, 3)}
    counted = []
    for device in ("cpu", "meta"):
        moved = {name: z.to(device) for name, z in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            out, grads = grads_of(routed_projection, moved, moved["x"])
        assert out.shape == (2, 12, 5) and out.device.type == device
        assert {name: g.shape for name, g in grads.items()} == {
            name: z.shape for name, z in inputs.items()
        }
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 0, 4)])
def test_an_empty_batch_projects_to_an_empty_batch(shape):
    inputs = {"x": torch.zeros(shape), "projectors": torch.ones(3, 4, 4)}
    inputs["router"] = torch.ones(4, 3)
    out, grads = grads_of(routed_projection, inputs, torch.ones(shape))
    assert out.shape == shape and not grads["projectors"].any() and not grads["router"].any()


def test_router_gradient_of_the_projection_by_hand():
    x, projectors, router = normal(2, 9, 4), normal(3, 4, 4, seed=1), normal(4, 3, seed=2)
    inputs = {"x": x, "projectors": projectors, "router": router}
    cotangent = normal(2, 9, 4, seed=3)
    _, grads = grads_of(routed_projection, inputs, cotangent)
    tokens, d_out = x.flatten(0, 1).numpy(), cotangent.flatten(0, 1).numpy()
    index = [choose(token, router.numpy()) for token in tokens]
    g = [(c * (z @ projectors[u].numpy())).sum() for z, u, c in zip(tokens, index, d_out)]
    want = straight_through(tokens, index, g, router.numpy())
    assert_close("d router", grads["router"], want, atol=1e-12)


# ----------------------------------------------------------------------------------------------
# The dynamic measure kernel (Eq. 6) and the token difference (Eqs. 7 and 8).


def test_measure_is_equation_6_token_by_token():
    z, router = normal(2, 9, 5), normal(5, 4, seed=1)
    gamma = torch.tensor([0.7, 1.5, 3.0, 8.0], dtype=f64)
    index = choices(z, router)
    assert np.unique(index).size == 4
    want = np.empty((2, 9, 5))
    for b, i in np.ndindex(2, 9):
        want[b, i] = power(z[b, i].numpy(), gamma[index[b][i]].item())
    assert_close("z~", measure(z, gamma, router), want, atol=1e-13)


def test_difference_is_equations_7_and_8_token_by_token():
    z_t, zp_t = normal(2, 9, 5), normal(2, 9, 5, seed=1)
    router, lam = normal(10, 4, seed=2), normal(4, seed=3)
    want = np.empty((2, 9, 5))
    for b, i in np.ndindex(2, 9):
        a, c = z_t[b, i].numpy(), zp_t[b, i].numpy()
        want[b, i] = a - lam[choose(np.concatenate([a, c]), router.numpy())].item() * c
    assert_close("z~ - lambda z~'", difference(z_t, zp_t, lam, router), want, atol=1e-13)


@pytest.mark.parametrize("fn", [measure, difference])
def test_factors_in_16_bits_are_used_in_float32(fn):
    z = normal(1, 4, 6, dtype=torch.bfloat16)
    z_prime = normal(1, 4, 6, seed=1, dtype=torch.bfloat16)
    tokens = (z,) if fn is measure else (z.float(), z_prime.float())
    factors = torch.tensor([1.5, 3.0], dtype=torch.bfloat16)
    router = normal(6 * len(tokens), 2, dtype=torch.bfloat16)
    out = fn(*tokens, factors, router)
    assert out.dtype == torch.float32
    assert torch.equal(out, fn(*(a.float() for a in tokens), factors.float(), router.float()))


# ----------------------------------------------------------------------------------------------
# Linear attention, Eqs. 4 and 8.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(3, 8), (8, 3), (5, 5), (1, 4)])
def test_linear_order_is_quadratic_order_is_a_loop_over_pairs(N, D, normalize):
    q, k, v = (normal(2, N, D, seed=s) for s in range(3))
    for eps in (1e-6, 0.5):  # the large one shows where eps is added
        images = zip(q.numpy(), k.numpy(), v.numpy())
        want = np.stack([attend(*image, normalize, eps) for image in images])
        for first in (True, False, None):
            out = linear_attention(q, k, v, normalize, eps, tokens_first=first)
            name = f"O, tokens_first={first}, eps={eps}"
            assert_close(name, out, want, atol=1e-9, rtol=1e-11)


@pytest.mark.parametrize("N, D", [(3, 8), (8, 3), (5, 5)])
def test_the_cheaper_order_is_taken(N, D):
    q = torch.zeros(1, N, D)
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, q, q, normalize=False)
    # two products, two operations a multiply-add
    assert counter.get_total_flops() == 2 * 2 * N * D * min(N, D)


def test_positive_weights_average_the_values():
    q, k = normal(2, 6, 4).abs(), normal(2, 6, 4, seed=1).abs()
    out = linear_attention(q, k, torch.full((2, 6, 4), 7.0, dtype=f64), eps=0)
    assert_close("O", out, torch.full((2, 6, 4), 7.0), atol=1e-12)


# the third key cancels the first two in the sum: this is q . sum k
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
        k = k - k.mean(1, keepdim=True) * (seed % 3)  # as drawn, cancelling, overshooting
        out = linear_attention(q * 10.0 ** (seed % 7 - 3), k, v)
        assert (out.abs() <= 1000 * v.abs().max()).all()


def test_the_bound_of_a_thousand_is_met():
    """So 1e-3 is the floor: keys +q and -q, values +1 and -1."""
    q, ones = normal(1, 1, 4), torch.ones(1, 1, 4, dtype=f64)
    k, v = torch.cat([q, -q], 1), torch.cat([ones, -ones], 1)
    out = linear_attention(q.expand(1, 2, 4), k, v, eps=0)
    assert_close("O", out, torch.full((1, 2, 4), 1000.0), atol=1e-8)


def test_the_guard_does_not_depend_on_scale():
    q, k, v = (normal(2, 8, 4, seed=s) for s in range(3))
    want = linear_attention(q, k, v, eps=0)
    for a, b in ((1e-3, 1.0), (1.0, 1e3), (1e4, 1e-2)):
        out = linear_attention(a * q, b * k, v, eps=0)
        assert_close(f"O of {a} q, {b} k", out, want, atol=1e-9, rtol=1e-10)


def test_queries_or_keys_of_zeros_give_zero():
    v, nothing = normal(1, 3, 4), torch.zeros(1, 3, 4, dtype=f64)
    assert (linear_attention(nothing, v, v) == 0).all()
    assert (linear_attention(v, nothing, v) == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(3, 4), (5, 2)])
def test_linear_attention_gradcheck(N, D, normalize):
    q, k, v = (normal(1, N, D, seed=s) for s in range(3))
    q[:, 0], q[:, 1] = k.sum(1), -k.sum(1)
    floor = 1e-3 * q[0].norm(dim=-1) * k[0].norm(dim=-1).sum()
    ratio = q[0] @ k[0].sum(0) / floor
    # both sides of the kink of the maximum, and nothing near it
    assert ratio[0] > 2 and ratio[1] < 0 and ((ratio - 1).abs() > 0.5).all()
    for first in (True, False):
        inputs = [z.clone().requires_grad_() for z in (q, k, v)]
        attention = partial(linear_attention, normalize=normalize, tokens_first=first)
        # where the guard holds, outputs and slopes are in the hundreds: hence atol
        assert gradcheck(attention, inputs, atol=1e-3)


# ----------------------------------------------------------------------------------------------
# The whole op.

SIZES = [(2, 3, 8), (2, 9, 4), (1, 1, 5), (2, 5, 5)]


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("B, N, D", SIZES)
def test_dydila_attention_is_a_loop_over_tokens(B, N, D, normalize, eps):
    inputs = random_op_inputs(B, N, D, 4, 3, dtype=f64, dead=N // 4, lams=(0.1, 1.5))
    want = attention_loop(**inputs, normalize=normalize, eps=eps)
    out = dydila_attention(**inputs, normalize=normalize, eps=eps)
    assert_close("O", out, want, atol=1e-10, rtol=1e-10)


PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=str)
def test_dydila_attention_in_float32_and_16_bits(dtype, tolerance):
    # small lambda and few tokens keep the denominators away from 0; the margin keeps the routes
    inputs = random_op_inputs(2, 6, 16, 4, 3, dtype=dtype, margin=1e-3, lams=(0.01, 0.1))
    out = dydila_attention(**inputs)
    assert out.dtype == dtype
    assert_close(f"O in {dtype}", out, attention_loop(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N", [3, 9])
def test_autocast_does_not_reach_into_the_op(N, normalize):
    inputs, cotangent = random_op_inputs(2, N, 6, 4, 3), torch.ones(2, N, 6)

    def attention(autocast, **z):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return dydila_attention(**z, normalize=normalize)

    out, grads = grads_of(partial(attention, True), inputs, cotangent)
    want, wanted = grads_of(partial(attention, False), inputs, cotangent)
    assert torch.equal(out, want)
    assert all(torch.equal(grads[name], wanted[name]) for name in inputs)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_grad_leaves_the_forward_bits_alone(normalize):
    inputs = random_op_inputs(2, 7, 6, 4, 3)
    on = dydila_attention(**inputs, normalize=normalize, router_grad=True)
    off = dydila_attention(**inputs, normalize=normalize, router_grad=False)
    assert torch.equal(on, off)


def test_an_empty_batch_gives_an_empty_output():
    inputs = random_op_inputs(0, 5, 4, 3, 2)
    out, grads = grads_of(dydila_attention, inputs, torch.ones(0, 5, 4))
    assert out.shape == (0, 5, 4) and not grads["gamma"].any()


def op_written_densely(
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers,
    normalize=True, router_grad=True, kept=None,
):  # fmt: skip
    """The op for autograd, as printed: one-hot choices, explicit gates, the quadratic order.

    kept collects (tokens, one-hot choice, selected factor) of the six routers.
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
        r = z.relu()
        p = r ** select(z, gamma, router)
        return p / p.norm(dim=-1, keepdim=True).clamp_min(1e-30) * r.norm(dim=-1, keepdim=True)

    tokens = (q, k, q_prime, k_prime)
    q_t, k_t, qp_t, kp_t = (kernel(z, router) for z, router in zip(tokens, kernel_routers))
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
    out, grads = grads_of(partial(dydila_attention, **how), inputs, cotangent)
    want, wanted = grads_of(partial(op_written_densely, **how), inputs, cotangent)
    assert_close("O", out, want, atol=1e-10, rtol=1e-10)
    for name in inputs:
        scale = wanted[name].abs().max().item()
        assert_close(f"d {name}", grads[name], wanted[name], atol=1e-9 * max(scale, 1))
        if name.endswith("routers"):
            assert grads[name].any() == router_grad


def test_router_gradients_of_the_op_by_hand():
    """From dL/d(selected gamma or lambda), which the dense op supplies, on by hand."""
    inputs = random_op_inputs(2, 6, 5, 4, 3, dtype=f64, margin=1e-6)
    cotangent, kept = normal(2, 6, 5, seed=9), []
    _, grads = grads_of(dydila_attention, inputs, cotangent)
    leaves = {name: z.clone().requires_grad_() for name, z in inputs.items()}
    (op_written_densely(**leaves, kept=kept) * cotangent).sum().backward()
    routers = [*inputs["kernel_routers"], *inputs["difference_routers"]]
    got = [*grads["kernel_routers"], *grads["difference_routers"]]
    for which, (tokens, chosen, selected) in enumerate(kept):
        index = chosen.argmax(-1).flatten().numpy()
        g = (selected.grad * selected).detach().flatten().numpy()
        tokens = tokens.flatten(0, 1).numpy()
        want = straight_through(tokens, index, g, routers[which].numpy())
        assert_close(f"router {which}", got[which], want, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_dead_tokens_stay_finite_in_the_op(normalize):
    inputs = random_op_inputs(2, 6, 5, 4, 3, dead=3)
    inputs["q_prime"][:, 0] = -1  # this token has no positive entry in q and none in q'
    attention = partial(dydila_attention, normalize=normalize)
    out, grads = grads_of(attention, inputs, torch.ones(2, 6, 5))
    assert (out[:, 0] == 0).all() and out[:, 1:].isfinite().all()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    assert not grads["q"][:, :3].any() and not grads["k"][:, :3].any()
    assert not grads["q_prime"][:, 0].any()
    assert all(grads[name][:, 3:].any() for name in TOKENS)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(2, 4), (4, 2)])
def test_dydila_attention_gradcheck(N, D, normalize):
    """The routers are fixed, tokens stay off relu's kink and off ties: the op is smooth there."""
    inputs = random_op_inputs(1, N, D, 3, 2, dtype=f64, margin=0.02, away=0.1)
    names = (*TOKENS, "gamma", "lam")
    routers = {name: inputs[name] for name in ("kernel_routers", "difference_routers")}

    def op(*z):
        how = {"normalize": normalize, "router_grad": False}
        return dydila_attention(**dict(zip(names, z)), **routers, **how)

    assert gradcheck(op, [inputs[name].requires_grad_() for name in names])


def test_attention_ignores_the_order_of_the_tokens():
    inputs = random_op_inputs(2, 7, 4, 3, 2, dtype=f64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = {name: z[:, order] if name in TOKENS else z for name, z in inputs.items()}
    want = dydila_attention(**inputs)[:, order]
    assert_close("O", dydila_attention(**shuffled), want, atol=1e-10)


# ----------------------------------------------------------------------------------------------
# Backends and errors.

WRONG = {
    "k": (2, 6, 4),
    "q_prime": (2, 5, 5),
    "k_prime": (1, 5, 4),
    "v": (2, 5),
    "kernel_routers": (3, 4, 3),
    "difference_routers": (2, 4, 2),
    "gamma": (3, 1),
    "lam": (1, 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_named(name):
    inputs = random_op_inputs(2, 5, 4, 3, 2)
    shape = ", ".join(map(str, WRONG[name]))
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got \({shape}"):
        dydila_attention(**{**inputs, name: torch.zeros(WRONG[name])})


def test_q_without_a_batch_is_an_error():
    inputs = random_op_inputs(1, 5, 4, 3, 2)
    inputs = {name: z[0] if name in TOKENS else z for name, z in inputs.items()}
    with pytest.raises(ValueError, match=r"q must be \(B, N, D\), got \(5, 4\)"):
        dydila_attention(**inputs)


@pytest.mark.parametrize("how", [{}, {"normalize": False}, {"router_grad": False, "eps": 0.3}])
def test_dydila_reference_is_the_reference_backend_bit_for_bit(how):
    inputs, cotangent = random_op_inputs(2, 5, 4, 3, 2), torch.randn(2, 5, 4)
    out, grads = grads_of(partial(dydila_reference, **how), inputs, cotangent)
    backend = partial(dydila_attention, **how, backend="reference")
    want, wanted = grads_of(backend, inputs, cotangent)
    assert torch.equal(out, want)
    assert all(torch.equal(grads[name], wanted[name]) for name in inputs)


def test_the_reference_backend_calls_dydila_reference(monkeypatch):
    inputs = random_op_inputs(1, 5, 4, 3, 2)
    monkeypatch.setattr(dydilit, "dydila_reference", lambda *args, **how: "called")
    assert dydila_attention(**inputs, backend="reference") == "called"


def test_dydila_reference_takes_no_backend():
    with pytest.raises(TypeError, match="backend"):
        dydila_reference(**random_op_inputs(1, 5, 4, 3, 2), backend="reference")


def test_auto_without_the_extension_is_the_reference():
    inputs = random_op_inputs(1, 5, 4, 3, 2)
    assert torch.equal(dydila_attention(**inputs), dydila_reference(**inputs))


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'reference' or 'fused'"):
        dydila_attention(**random_op_inputs(1, 5, 4, 3, 2), backend="cuda")


def test_fused_without_the_extension_is_an_error():
    with pytest.raises(RuntimeError, match="extension"):
        dydila_attention(**random_op_inputs(1, 5, 4, 3, 2), backend="fused")


# ----------------------------------------------------------------------------------------------
# The inputs of these tests.


def test_random_op_inputs_keep_their_margins():
    """Logits are computed again from the rounded tensors."""
    inputs = random_op_inputs(2, 6, 5, 4, 3, dtype=torch.bfloat16, margin=0.05, away=0.1, dead=2)
    z = {name: t.double() for name, t in inputs.items()}
    tilde = {}
    for name, router in zip(("q", "k", "q_prime", "k_prime"), z["kernel_routers"]):
        assert (top2_margin(z[name].numpy(), router.numpy()) >= 0.05).all()
        assert (z[name].abs() > 0.09).all()
        tilde[name] = measure(z[name], z["gamma"], router)
    for side, router in zip("qk", z["difference_routers"]):
        assert (z[side][:, :2] < 0).all() and (z[side][:, 2:] > 0).any()
        pairs = torch.cat([tilde[side], tilde[f"{side}_prime"]], -1)
        assert (top2_margin(pairs.numpy(), router.numpy()) > 0.0499).all()
