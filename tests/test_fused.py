"""The fused op against the Python path: output and gradients, in every dtype, at awkward sizes.

tests/csrc has the slow checks of the op: inside torch, how it is built, its CUDA half.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from util import normal, randomized

import dydilit
from dydilit import Config, DyDiLA, DyDiLiT, dydila_attention
from support import fused

if "cpu" not in dydilit.FUSED_DEVICES:
    reason = "the extension is not built: python setup.py build_ext --inplace"
    pytest.skip(reason, allow_module_level=True)

INPUTS = ["q", "k", "q_prime", "k_prime", "v", "gamma", "lam", "kernel_routers"]
NAMES = ["out", *INPUTS, "difference_routers"]
DEVICES = [d for d in dydilit.FUSED_DEVICES if d == "cpu" or torch.cuda.is_available()]
SIZES = [  # B, N, D, n_F, n_D
    (2, 5, 7, 3, 2),
    (2, 70, 33, 9, 9),
    (1, 63, 60, 4, 9),
    (1, 65, 130, 21, 21),
    (2, 130, 64, 9, 5),
    (1, 300, 40, 15, 15),
]


def inputs(
    B, N, D, n_F, n_D, dtype=torch.float64, seed=0, device="cpu",
    gamma=(0.8, 6.0), lam=(0.0, 0.5), scale=1.0,
):  # fmt: skip
    """The nine tensors and a cotangent, without near-ties: in every router the best logit leads."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(n, low, high):
        return low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)

    q, k, qp, kp, v, dout = (scale * normal(B, N, D) for _ in range(6))
    routers = [normal(4, D, n_F) / D**0.5, normal(2, 2 * D, n_D) / D**0.5]
    tensors = [q, k, qp, kp, v, uniform(n_F, *gamma), uniform(n_D, *lam), *routers, dout]
    tensors = [t.to(dtype).to(device) for t in tensors]
    for _ in range(50):  # tokens near a tie are drawn again
        near = near_ties(*[t.double() for t in tensors[:9]])
        if not any(bad.any() for bad in near):
            return tensors[:9], tensors[9]
        for pair, bad in zip(((0, 2), (1, 3)), near):
            for i in pair:
                fresh = (scale * normal(B, N, D)).to(dtype).to(device)
                tensors[i] = torch.where(bad.unsqueeze(-1), fresh, tensors[i])
    raise AssertionError("no inputs without near-ties")


def near_ties(q, k, qp, kp, v, gamma, lam, R_F, R_D, margin=1e-4):
    """Where one of a token's three routes is a near-tie (B, N); for the queries, for the keys."""

    def tie(logits):
        if logits.shape[-1] == 1:
            return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        best = logits.topk(2, -1).values
        return best[..., 0] - best[..., 1] < margin * (1 + best[..., 0].abs())

    result = []
    for side, (z, zp) in enumerate(((q, qp), (k, kp))):
        y = dydilit.measure(z, gamma, R_F[side])
        yp = dydilit.measure(zp, gamma, R_F[side + 2])
        kernels = tie(z @ R_F[side]) | tie(zp @ R_F[side + 2])
        result.append(kernels | tie(torch.cat([y, yp], -1) @ R_D[side]))
    return result


def results(tensors, dout, backend, **options):
    """[out, nine gradients], None where there is none."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = dydila_attention(*leaves, backend=backend, **options)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True)
    return [out.detach(), *grads]


def assert_same_bits(one, other):
    for name, a, b in zip(NAMES, one, other):
        assert torch.equal(a, b), name


def nudged(tensors, seed):
    """The tensors with every entry off by up to half a unit of float32's last place.

    float32 cannot tell them from the tensors themselves.
    """
    g = torch.Generator().manual_seed(seed)
    shifts = (2.0**-24 * (2 * torch.rand(t.shape, generator=g) - 1) for t in tensors)
    return [t * (1 + shift).to(t.device) for t, shift in zip(tensors, shifts)]


def check(tensors, dout, atol, factor=2.0, **options):
    """error of the fused op <= factor * error of the reference in the same dtype + atol.

    Errors are relative to the largest entry of the truth, the reference in float64. Where the
    denominator cancels, a float32 result is luck, the reference's too: its error is the worst of
    five, for the inputs and for four nudged copies of them.
    """
    truth = results([t.double() for t in tensors], dout.double(), "reference", **options)
    copies = [tensors]
    if tensors[0].dtype == torch.float32:
        copies += [nudged(tensors, seed) for seed in range(4)]
    references = [results(x, dout, "reference", **options) for x in copies]
    fused = results(tensors, dout, "fused", **options)
    for name, t, f, *r in zip(NAMES, truth, fused, *references):
        if t is None:
            assert f is None, name
            continue
        assert f.shape == r[0].shape and f.dtype == r[0].dtype and f.is_contiguous(), name
        assert f.isfinite().all(), f"{name} is not finite"
        scale = t.abs().max().clamp_min(1e-6)
        error, *errors = ((x.double() - t).abs().max() / scale for x in (f, *r))
        line = f"{name}: error {error:.2e}, the reference's {max(errors):.2e}"
        assert error <= factor * max(errors) + atol, line


# ----------------------------------------------------------------------------------------------
# Numbers.

ATOL = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_every_gradient(size, normalize, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is for the CPU")
    if dtype == torch.bfloat16 and device == "cuda":
        pytest.skip("CUDA rounds dq, dk and their product; so does the reference of test_cuda.py")
    check(*inputs(*size, dtype, device=device), ATOL[dtype], normalize=normalize)


@pytest.mark.parametrize("size", [(1, 1, 8, 2, 2), (3, 1, 1, 1, 1), (2, 6, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_one_token_and_one_channel(size, normalize):
    """With one key out = v, with one channel phi = relu: gradients cancel, only float64 tells."""
    check(*inputs(*size), 1e-8, normalize=normalize)
    for dtype in (torch.float32, torch.bfloat16):
        assert all(x.isfinite().all() for x in results(*inputs(*size, dtype), "fused"))


any_size = st.tuples(
    st.integers(1, 3),
    st.integers(2, 150),
    st.integers(2, 150),
    st.integers(1, 21),
    st.integers(1, 21),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    any_size,
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_random_sizes(size, dtype, normalize, router_grad, seed):
    tensors, dout = inputs(*size, dtype, seed)
    check(tensors, dout, ATOL[dtype], normalize=normalize, router_grad=router_grad)


def test_float32_is_tight_at_the_papers_size():
    """Positive tokens, lambda 0.01 as at the start of training: nothing cancels."""
    start = {"gamma": (2.0, 4.0), "lam": (0.0, 0.02)}
    check(*inputs(1, 256, 384, 9, 9, torch.float32, **start), atol=2e-6)


EXTREMES = {
    "dead rows": {},
    "all dead": {},
    "huge": {},
    "steep": {"gamma": (20.0, 30.0)},
    "flat": {"gamma": (0.5, 0.9)},
    # where a token is 0, log2 t is taken for -127: t^gamma is then 2, and t^(gamma - 1) would be
    # 2^128, which must not become infinite
    "negative": {"gamma": (-1 / 127, -1 / 127)},
    "lambda beyond 1": {"lam": (1.0, 3.0)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes(case, dtype):
    tensors, dout = inputs(2, 20, 12, 3, 4, dtype, seed=5, **EXTREMES[case])
    if case == "dead rows":
        for i, x in enumerate(tensors[:4]):
            x[:, i::4] = -x[:, i::4].abs()
    if case == "all dead":
        tensors[:4] = [-x.abs() for x in tensors[:4]]
    if case == "huge":
        tensors[:4] = [1e4 * x for x in tensors[:4]]
        tensors[7:] = [1e-4 * x for x in tensors[7:]]
    if case in ("flat", "negative"):  # t^(gamma - 1) is unbounded: t stays away from 0
        tensors[:4] = [torch.where(x.abs() < 0.01, 0.01 * x.sign(), x) for x in tensors[:4]]
    check(tensors, dout, ATOL[dtype])


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("gamma", [(0.5, 6.0), (-3.0, -0.5)], ids=str)
def test_minus_zero_is_zero(gamma, dtype):
    """In q; its bits are those of the smallest integer."""
    tensors, dout = inputs(2, 9, 20, 3, 4, dtype, gamma=gamma)
    zeros = [torch.where(x.abs() < 0.3, 0.0, x) for x in tensors[:4]]
    minus = [torch.where(x.abs() < 0.3, -0.0, x) for x in tensors[:4]]
    want = results([*zeros, *tensors[4:]], dout, "fused")
    got = results([*minus, *tensors[4:]], dout, "fused")
    for name, a, b in zip(NAMES, want, got):
        assert torch.equal(a, b), name  # where 0 and -0 are equal


def test_the_guard_of_the_denominator_has_the_right_gradient_where_it_is_engaged():
    tensors, dout = inputs(2, 30, 20, 3, 3, lam=(0.9, 1.1), seed=3)
    _, dq, *_, k_sum, den = torch.ops.dydilit.attention_fwd(*tensors, True, True, 1e-6)
    floor = 1e-3 * dq.norm(dim=-1) * k_sum[:, -1:] + 1e-6
    at_floor = (den / floor - 1).abs() < 1e-9
    assert at_floor.any() and not at_floor.all()
    check(tensors, dout, atol=1e-9)


def losses(config, steps=6):
    """The losses of the first training steps on fixed random images."""
    torch.manual_seed(0)
    model, diffusion = dydilit.DyDiLiT(config), dydilit.Diffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, noise = torch.randn(2, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.arange(16) * 60, torch.arange(16) % 10
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(diffusion.loss(model, x, y, t, noise)).mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def test_the_digits_model_trains_alike_with_and_without_it(monkeypatch):
    calls, original = [], torch.ops.dydilit.attention_fwd

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(torch.ops.dydilit, "attention_fwd", counted)
    fused = losses(dydilit.PRESETS["digits"])
    assert calls, "backend='auto' takes the extension"
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ())
    assert fused == pytest.approx(losses(dydilit.PRESETS["digits"]), rel=2e-5)


def test_ties_take_the_lowest_index():
    tensors, dout = inputs(1, 12, 8, 3, 3)
    tensors[7:] = [torch.zeros_like(router) for router in tensors[7:]]  # every logit is exactly 0
    check(tensors, dout, atol=1e-9)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(4, 6), (7, 3)])
def test_gradcheck(N, D, normalize):
    """Against finite differences, but for the routers: straight-through is no derivative."""
    tensors, _ = inputs(2, N, D, 3, 2, seed=1, gamma=(1.5, 4.0))
    leaves = [t.requires_grad_() for t in tensors[:7]]
    how = {"normalize": normalize, "router_grad": False, "backend": "fused"}

    def op(*leaves):
        return dydila_attention(*leaves, *tensors[7:], **how)

    assert torch.autograd.gradcheck(op, leaves, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size, gamma",
    [
        ((2, 9, 384, 3, 3), (-3.5, -3.5)),
        ((2, 30, 16, 3, 3), (-5.0, -5.0)),
        ((1, 70, 60, 9, 5), (-3.0, 3.0)),
        ((1, 9, 384, 3, 3), (-1e-3, 1e-3)),
    ],
    ids=str,
)
def test_negative_gamma(size, gamma, dtype):
    """t^gamma leaves float32's range as t goes to 0, unless t is scaled by the smallest entry."""
    tensors, dout = inputs(*size, dtype, gamma=gamma)
    check(tensors, dout, ATOL[dtype])


def test_a_negative_gamma_whose_powers_leave_the_range_of_float32():
    """1e-9^-8 is 1e72: the Python path gives NaN in float32. The gradients of q and k cancel."""
    tensors, dout = inputs(1, 9, 16, 3, 3, torch.float32, gamma=(-8.0, -8.0))
    for x in tensors[:4]:
        x[..., 0] = 1e-9
    truth = results([x.double() for x in tensors], dout.double(), "reference")
    got = results(tensors, dout, "fused")
    assert all(x.isfinite().all() for x in got)
    for i in (0, 5):
        assert (got[i] - truth[i]).abs().max() <= 1e-5 * truth[i].abs().max(), NAMES[i]


@pytest.mark.parametrize("gap", [1e12, 1e15, 1e30])
def test_logits_far_apart_have_the_gradient_0(gap):
    tensors, dout = inputs(2, 9, 8, 3, 2, torch.float32)
    tensors[7:] = [gap * t for t in tensors[7:]]
    want, got = (results(tensors, dout, backend) for backend in ("reference", "fused"))
    assert not want[8].any() and not got[8].any() and not got[9].any()
    assert all(g.isfinite().all() for g in got)


PLACES = {"gamma": (1,), "lam": (1,), "kernel_routers": (1, 2, 1), "difference_routers": (0, 2, 1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("N, D", [(5, 12), (12, 5)])
def test_what_is_not_finite_goes_where_it_goes_in_the_python_path(N, D, name, value, dtype):
    """Into every entry of output and gradients that is NaN there; for gamma = inf some are inf.

    The op may have more of them: a token with one positive entry is finite in the Python path
    for every gamma, because 1^NaN = 1.
    """
    for normalize in (True, False):
        for router_grad in (True, False):
            options = {"normalize": normalize, "router_grad": router_grad}
            tensors, dout = inputs(2, N, D, 3, 4, dtype)
            for x in tensors[:4]:
                x[:, 0] = -x[:, 0].abs()  # no positive entry
            tensors[NAMES.index(name) - 1][PLACES.get(name, (0, 1, 2))] = value
            want = results(tensors, dout, "reference", **options)
            got = results(tensors, dout, "fused", **options)
            for which, w, g in zip(NAMES, want, got):
                if w is not None:
                    lost = w.isnan() & g.isfinite() if name == "gamma" else w.isnan() & ~g.isnan()
                    assert not lost.any(), (which, options)
            with torch.no_grad():
                out = dydila_attention(*tensors, backend="fused", **options)
            assert torch.equal(out.isnan(), got[0].isnan())


@pytest.mark.parametrize("D, gamma", [(384, -3.5), (16, -5.0)])
def test_a_module_with_negative_gammas_has_the_gradients_of_float64(D, gamma):
    """Also where the float32 of the Python path has none."""
    torch.manual_seed(0)
    model = DyDiLA(Config(hidden_size=D, n_kernels=3, n_lambdas=1, n_projectors=1))
    model.gamma.data.fill_(gamma)
    x, found = normal(2, 16, D), []
    for dtype, model.backend in ((F64, "reference"), (F32, "fused")):
        out = model.to(dtype)(x.to(dtype), (4, 4))
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
        found.append([out.detach(), *(g for g in grads if g is not None)])
    for want, got in zip(*found):
        assert got.isfinite().all()
        assert (got - want).norm() <= 1e-2 * want.norm() + 1e-6


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_model_with_nan_has_a_loss_of_nan(name):
    """Also where its value is a router's, whose softmax alone would tell."""
    model = randomized(DyDiLA(Config(hidden_size=8, n_kernels=3, n_lambdas=3))).float()
    x = normal(2, 6, 8, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    if name in parameters:
        parameters[name].data.view(-1)[1] = torch.nan
        parameters[name].data[..., 0] = torch.nan
    else:
        x[0, 0, 0] = torch.nan
    with torch.no_grad():
        assert model(x, (2, 3)).sum().isnan()
    model(x, (2, 3)).sum().backward()
    assert any(p.grad.isnan().any() for p in model.parameters())


def test_a_router_with_nan_makes_the_choice_of_the_python_path():
    tensors, _ = inputs(2, 9, 8, 3, 2, gamma=(1.0, 4.0))
    tensors[7][:, :, 1] = torch.nan
    want = dydila_attention(*tensors, router_grad=False, backend="reference")
    got = dydila_attention(*tensors, router_grad=False, backend="fused")
    assert torch.allclose(want, got, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------
# Memory, threads, strides, dtypes.


@pytest.mark.parametrize("size", [(2, 70, 33, 9, 5), (1, 65, 130, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_uninitialised_is_read_or_returned(size, dtype):
    tensors, dout = inputs(*size, dtype)
    clean = results(tensors, dout, "fused")
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, in C++ too
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        poisoned = results(tensors, dout, "fused")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(clean, poisoned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 200, 48, 9, 9), (1, 100, 160, 3, 3)], ids=str)
def test_the_same_bits_for_every_number_of_threads(size, dtype):
    tensors, dout = inputs(*size, dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results(tensors, dout, "fused"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


@pytest.mark.parametrize("D", [1, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_one_token_whose_stride_means_nothing(device, D):
    """(1, B, D) transposed counts as contiguous, though its rows are not stride(1) apart."""

    def transposed(t):
        return t.view(1, 5, D).clone().transpose(0, 1) if t.shape == (5, 1, D) else t

    tensors, dout = inputs(5, 1, D, 3, 4, torch.float32, device=device)
    odd = [transposed(t) for t in tensors]
    assert odd[0].is_contiguous() and odd[0].stride() == (D, 5 * D, 1)
    got = results(odd, transposed(dout), "fused")
    assert_same_bits(results(tensors, dout, "fused"), got)


def test_strided_and_expanded_inputs_and_gradients():
    tensors, _ = inputs(2, 9, 8, 3, 3)
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers = tensors
    strided = [
        *torch.cat([q, k, q_prime], -1).chunk(3, -1),
        k_prime.mT.contiguous().mT,
        v[:1, :1].expand(2, 9, 8),
        gamma,
        lam,
        kernel_routers.mT.contiguous().mT,
        difference_routers.flip(0).flip(0),
    ]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    cotangent = torch.ones(1, 1, 1, dtype=torch.float64).expand(2, 9, 8)  # as .sum().backward()
    got = results(strided, cotangent, "fused")
    assert_same_bits(got, results(dense, cotangent.contiguous(), "fused"))
    check(strided, cotangent, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_an_empty_batch_gives_empty_gradients(shape):
    tensors = inputs(2, 4, 6, 3, 2)[0]
    nothing = torch.zeros(shape, dtype=torch.float64)
    tensors = [nothing.clone() for _ in range(5)] + tensors[5:]
    out, *grads = results(tensors, nothing, "fused")
    assert out.shape == shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors))


def test_mixed_dtypes_follow_the_reference():
    tensors, dout = inputs(2, 9, 8, 3, 3, torch.float32)
    tensors[4], tensors[5] = tensors[4].bfloat16(), tensors[5].bfloat16()
    check(tensors, dout.bfloat16(), atol=1e-3)


INFERENCE_SIZES = [(2, 9, 8, 3, 3), (3, 100, 160, 9, 9), (3, 200, 48, 9, 9)]


@pytest.mark.parametrize("size", INFERENCE_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_the_same_bits(size, dtype):
    """Another operator is called, which keeps nothing for a backward."""
    tensors, dout = inputs(*size, dtype)
    with torch.no_grad():
        out = dydila_attention(*[t.requires_grad_() for t in tensors], backend="fused")
    assert not out.requires_grad and torch.equal(out, results(tensors, dout, "fused")[0])


# ----------------------------------------------------------------------------------------------
# Inside autograd.


def test_the_gradient_of_one_input_alone():
    tensors, dout = inputs(2, 9, 8, 3, 3)
    gamma = tensors[5].requires_grad_()
    (grad,) = torch.autograd.grad(dydila_attention(*tensors, backend="fused"), gamma, dout)
    assert torch.equal(grad, results(tensors, dout, "fused")[6])


def test_autocast_reaches_the_op_only_as_dtypes():
    tensors, dout = inputs(2, 16, 8, 3, 3, torch.float32)
    low = [t.bfloat16() for t in tensors[:5]] + tensors[5:]
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(low, dout, "fused")
    assert_same_bits(inside, results(low, dout, "fused"))


def test_activation_checkpointing_gives_the_same_bits():
    tensors, dout = inputs(2, 9, 8, 3, 2)
    plain = results(tensors, dout, "fused")
    leaves = [t.detach().requires_grad_() for t in tensors]
    op = partial(dydila_attention, backend="fused")
    out = checkpoint(op, *leaves, use_reentrant=False)
    assert_same_bits(plain, [out, *torch.autograd.grad(out, leaves, dout)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.func imports
def test_forward_mode_takes_the_python_path():
    """The op has no such derivative, and autograd would take it for 0."""
    tensors, dout = inputs(2, 9, 8, 3, 2)

    def slope(backend):
        def of_q(q):
            return dydila_attention(q, *tensors[1:], backend=backend)

        return torch.func.jvp(of_q, (tensors[0],), (dout,))[1]

    assert slope("reference").any() and torch.equal(slope("reference"), slope("auto"))
    with pytest.raises(RuntimeError, match="no extension for cpu or for jvp"):
        slope("fused")


# Each takes a function of q and gives a tensor: what torch differentiates in other ways
TRANSFORMS = {
    "grad": lambda f: grad(f),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones(()).double())[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()),
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "hessian": lambda f: hessian(f),
    "vmap of hessian": lambda f: lambda x: vmap(hessian(f))(torch.stack([x, 2 * x])),
    "autograd, twice": lambda f: lambda x: twice(f, x),
    "autograd, vectorised": lambda f: lambda x: functional.jacobian(f, x, vectorize=True),
    "autograd.functional.hessian": lambda f: lambda x: functional.hessian(f, x),
    "autograd.functional.jvp": lambda f: lambda x: functional.jvp(f, x, x)[1],
}


def twice(f, x):
    """The gradient of |gradient of f|^2."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def small_model(kind):
    """(backend -> the op, the module or the network as a function of x, and an x)"""
    config = Config(input_size=4, in_channels=1, hidden_size=8, depth=1, n_kernels=3)
    if kind == "op":
        q, *rest = inputs(2, 6, 8, 3, 2)[0]
        return lambda backend: lambda q: dydila_attention(q, *rest, backend=backend), q
    model = randomized(DyDiLA(config) if kind == "DyDiLA" else DyDiLiT(config))
    t, y = torch.tensor([3, 700]), torch.tensor([1, 2])

    def with_backend(backend):
        for module in model.modules():
            if isinstance(module, DyDiLA):
                module.backend = backend
        return lambda x: model(x, (2, 3)) if kind == "DyDiLA" else model(x, t, y)

    return with_backend, normal(2, 6, 8) if kind == "DyDiLA" else normal(2, 1, 4, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.func imports
@pytest.mark.parametrize("kind", ["op", "DyDiLA", "DyDiLiT"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_auto_has_the_derivatives_of_the_python_path(kind, name):
    with_backend, x = small_model(kind)

    def of(backend):
        f = with_backend(backend)
        return TRANSFORMS[name](lambda x: f(x).square().sum())(x)

    want, got = of("reference"), of("auto")
    assert want.any() and torch.allclose(want, got, rtol=1e-7, atol=1e-9 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_per_example_are_those_of_a_loop():
    model = randomized(DyDiLA(Config(hidden_size=8, n_projectors=3)))
    parameters, x = dict(model.named_parameters()), normal(3, 6, 8)

    def loss(parameters, example):
        return functional_call(model, parameters, (example[None], (2, 3))).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        alone = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for (name, g), want in zip(together.items(), alone):
            assert torch.allclose(g[i], want, rtol=1e-9, atol=1e-9 * want.abs().max()), name


def test_second_derivatives_under_activation_checkpointing():
    with_backend, x = small_model("op")
    op = with_backend("auto")

    def f(x):
        return checkpoint(op, x, use_reentrant=False).square().sum()

    assert torch.allclose(twice(f, x), twice(lambda x: op(x).square().sum(), x), rtol=1e-9)


# ----------------------------------------------------------------------------------------------
# Inside torch's other instruments.


def count_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("router_grad", [True, False])
@pytest.mark.parametrize("size", [(2, 6, 10, 3, 2), (2, 10, 6, 3, 2), (1, 7, 7, 1, 5)], ids=str)
def test_flops_are_those_of_the_python_path(size, normalize, router_grad):
    tensors, dout = inputs(*size)
    options = {"normalize": normalize, "router_grad": router_grad}

    def counts(backend):
        def forward():
            with torch.no_grad():
                dydila_attention(*tensors, backend=backend, **options)

        both = count_flops(lambda: results(tensors, dout, backend, **options))
        return count_flops(forward), both

    assert counts("fused") == counts("reference")


@pytest.mark.parametrize("kind", ["DyDiLA", "DyDiLiT"])
def test_flops_of_a_model_on_either_path_and_without_data(kind):
    with_backend, x = small_model(kind)
    f = with_backend("auto")
    auto = count_flops(lambda: f(x).sum().backward())
    f = with_backend("reference")
    assert auto == count_flops(lambda: f(x).sum().backward()) > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_meta_device_has_shapes_dtypes_and_flops(backend):
    config = Config(input_size=8, hidden_size=16, depth=2)
    tensors, _ = inputs(2, 6, 8, 3, 2, torch.bfloat16)
    out, *grads = results([x.to("meta") for x in tensors], tensors[4].to("meta"), backend)
    assert out.is_meta and (out.shape, out.dtype) == ((2, 6, 8), torch.bfloat16)
    assert all((g.shape, g.dtype) == (x.shape, x.dtype) for g, x in zip(grads, tensors))

    def flops(device):
        with torch.device(device):
            attention, model = DyDiLA(config), DyDiLiT(config)
            x, t = torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long)
            attention.backend = backend
        assert attention(torch.zeros(2, 6, 16, device=device), (2, 3)).shape == (2, 6, 16)
        out = model(x, t, t)
        assert (out.shape, out.dtype, out.device.type) == ((3, 8, 8, 8), torch.float32, device)
        return count_flops(lambda: model(x, t, t).sum().backward())

    assert flops("meta") == flops("cpu")


def test_integer_tokens_take_the_python_path():
    tensors, _ = inputs(1, 4, 5, 2, 2, torch.float32)
    tensors[:4] = [(3 * x).int() for x in tensors[:4]]
    want = dydila_attention(*tensors, backend="reference")
    assert torch.allclose(dydila_attention(*tensors), want, rtol=1e-5, atol=1e-6)
    tensors[4] = tensors[4].int()
    want = dydila_attention(*tensors, backend="reference")
    assert torch.equal(dydila_attention(*tensors), want)


def kept_by_forward():
    """Inputs, options, cotangent of a small call, and what the forward keeps for the backward."""
    tensors, dout = inputs(2, 6, 5, 3, 2, torch.float32)
    options = (True, True, 1e-6)
    return tensors, options, dout, torch.ops.dydilit.attention_fwd(*tensors, *options)[1:]


def test_the_backward_takes_kept_tensors_of_any_strides():
    tensors, options, dout, kept = kept_by_forward()
    want = torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *kept)
    spread = [torch.stack([x, x], -1)[..., 0] for x in kept]  # not contiguous
    got = torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *spread)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_the_backward_refuses_a_cotangent_of_another_shape_or_dtype():
    """Whoever calls the operator may get it wrong; it would read outside of the tensors."""
    tensors, options, dout, kept = kept_by_forward()
    for other in (dout[:, :5], dout.double()):
        with pytest.raises(RuntimeError, match="dout must agree with q in shape, dtype and device"):
            torch.ops.dydilit.attention_bwd(other, *tensors, *options, *kept)


def test_the_backward_refuses_kept_tensors_of_another_shape_or_dtype():
    tensors, options, dout, kept = kept_by_forward()
    message = "takes what attention_fwd kept for the same arguments"
    for i, x in enumerate(kept):
        for other in (x[..., 1:], x.double()):
            with pytest.raises(RuntimeError, match=message):
                changed = [*kept[:i], other, *kept[i + 1 :]]
                torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *changed)


# ----------------------------------------------------------------------------------------------
# Which path is taken.


def test_auto_takes_the_fused_op():
    tensors, dout = inputs(1, 4, 5, 2, 2, torch.float32)
    assert_same_bits(results(tensors, dout, "auto"), results(tensors, dout, "fused"))


def test_an_unknown_backend_is_an_error():
    tensors, _ = inputs(1, 4, 5, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="backend must be"):
        dydila_attention(*tensors, backend="fast")


def test_without_the_extension_auto_computes_and_fused_says_how_to_build_it(monkeypatch):
    tensors, dout = inputs(1, 4, 5, 2, 2, torch.float32)
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ())
    assert results(tensors, dout, "auto")[0].isfinite().all()
    with pytest.raises(RuntimeError, match="build_ext --inplace"):
        dydila_attention(*tensors, backend="fused")


class OnThePythonPath(Exception):
    pass


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ON_A_GPU = [  # dtype, dtype of v, capability, D, n_F, whether the op is taken
    (BF16, BF16, (9, 0), 8, 3, True),
    (F32, F32, (8, 0), 8, 3, True),
    (F32, F32, (8, 0), 1536, 256, True),
    (BF16, BF16, (7, 5), 8, 3, False),  # no kernel is built for it
    (F64, F64, (9, 0), 8, 3, False),
    (F32, F64, (9, 0), 8, 3, False),
    (F32, F32, (9, 0), 1540, 3, False),
    (F32, F32, (9, 0), 8, 257, False),
]


@pytest.mark.parametrize("dtype, dtype_of_v, capability, D, n_F, fused", ON_A_GPU, ids=str)
def test_auto_on_a_gpu_takes_the_op_where_its_kernels_can_run(
    monkeypatch, dtype, dtype_of_v, capability, D, n_F, fused
):
    def reference(*_, **__):
        raise OnThePythonPath

    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dydilit, "BUILD", {"max_width": 1536, "max_choices": 256})
    monkeypatch.setattr(dydilit, "dydila_reference", reference)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    shapes = [(n_F,), (3,), (4, D, n_F), (2, 2 * D, 3)]
    with FakeTensorMode():
        dtypes = [dtype] * 4 + [dtype_of_v]
        tensors = [torch.empty(2, 5, D, dtype=x, device="cuda") for x in dtypes]
        tensors += [torch.empty(shape, device="cuda") for shape in shapes]
        if fused:
            assert dydila_attention(*tensors).shape == (2, 5, D)
        else:
            with pytest.raises(OnThePythonPath):
                dydila_attention(*tensors)


# ----------------------------------------------------------------------------------------------
# The check at the start of a run.


@pytest.fixture
def wrong_op(monkeypatch):
    """wrong_op(change): the op gives change(out)."""
    original = torch.ops.dydilit.attention_fwd
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", dydilit.FUSED_DEVICES)  # put back at the end

    def call(change):
        def wrong(*arguments):
            out, *kept = original(*arguments)
            return change(out), *kept

        monkeypatch.setattr(torch.ops.dydilit, "attention_fwd", wrong)

    return call


@pytest.mark.parametrize("dtype", ATOL, ids=str)
def test_the_check_names_the_path_the_device_and_the_difference(dtype, capsys):
    line = fused.check_fused("cpu", dtype)
    name = str(dtype).removeprefix("torch.")
    assert line.startswith(f"attention: fused op, CPU {dydilit.BUILD['isa']}, {name}, largest diff")
    assert float(line.split()[-5]) < {F64: 1e-12, F32: 1e-5}.get(dtype, 1e-2)
    assert "cpu" in dydilit.FUSED_DEVICES and not capsys.readouterr().err


def test_the_check_draws_no_random_numbers_and_works_without_gradients():
    before = torch.get_rng_state()
    with torch.no_grad():
        assert "fused op" in fused.check_fused()
    assert torch.equal(before, torch.get_rng_state())


def fails(out):
    raise RuntimeError("no kernel image is available\nfor this device")


WRONG = {  # what the op does wrong -> what the line says of it
    "off by a little": (lambda out: out * 1.0001, "differs from it by"),
    "NaN": (lambda out: out * torch.nan, "differs from it by nan"),
    "infinite": (lambda out: out + torch.inf, "differs from it by inf"),
    "fails": (fails, "fails: no kernel image is available"),
}


@pytest.mark.parametrize("case", WRONG)
def test_after_the_check_of_a_wrong_op_the_python_path_runs(case, wrong_op, capsys):
    change, said = WRONG[case]
    wrong_op(change)
    line = fused.check_fused()
    assert line.startswith(f"attention: Python path (the fused op {said}") and "\n" not in line
    warning = capsys.readouterr().err
    assert warning.startswith(f"dydilit: warning: the fused op {said}") and warning.count("\n") == 1
    assert "cpu" not in dydilit.FUSED_DEVICES
    tensors, dout = inputs(1, 4, 5, 2, 2, torch.float32)
    assert_same_bits(results(tensors, dout, "auto"), results(tensors, dout, "reference"))


def test_the_check_sees_a_wrong_gradient(monkeypatch, capsys):
    original = torch.ops.dydilit.attention_bwd
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", dydilit.FUSED_DEVICES)

    def wrong(*arguments):
        *grads, of_difference_routers = original(*arguments)
        return *grads, of_difference_routers.flip(0)

    monkeypatch.setattr(torch.ops.dydilit, "attention_bwd", wrong)
    assert "Python path (the fused op differs" in fused.check_fused()
    assert "dydilit: warning" in capsys.readouterr().err


def test_the_check_without_an_extension(monkeypatch):
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ())
    monkeypatch.setattr(dydilit, "BUILD", {})
    assert fused.check_fused() == "attention: Python path (no extension built), CPU, float32"
