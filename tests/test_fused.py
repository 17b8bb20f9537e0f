"""The fused op against the Python path: output and every gradient, in every dtype, at awkward sizes."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dydilit
from dydilit import dydila_attention

if "cpu" not in dydilit.FUSED_DEVICES:
    pytest.skip("the extension is not built: python setup.py build_ext --inplace", allow_module_level=True)

NAMES = ["out", "q", "k", "q_prime", "k_prime", "v", "gamma", "lam", "kernel_routers", "difference_routers"]
DEVICES = [d for d in dydilit.FUSED_DEVICES if d == "cpu" or torch.cuda.is_available()]
SIZES = [(2, 5, 7, 3, 2), (2, 70, 33, 9, 9), (1, 63, 60, 4, 9), (1, 65, 130, 21, 21), (2, 130, 64, 9, 5),
         (1, 300, 40, 15, 15)]


def inputs(B, N, D, n_F, n_D, dtype=torch.float64, seed=0, device="cpu", gamma=(0.8, 6.0), lam=(0.0, 0.5), scale=1.0):
    """The nine tensors and a cotangent. No token is near a tie: its best logit leads by a margin, in every router."""
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
        if not any(bad.any() for bad in near): return tensors[:9], tensors[9]
        for pair, bad in zip(((0, 2), (1, 3)), near):
            for i in pair:
                fresh = (scale * normal(B, N, D)).to(dtype).to(device)
                tensors[i] = torch.where(bad.unsqueeze(-1), fresh, tensors[i])
    raise AssertionError("no inputs without near-ties")


def near_ties(q, k, qp, kp, v, gamma, lam, R_F, R_D, margin=1e-4):
    """Where one of a token's three routes is a near-tie, for the queries' side and the keys' (B, N)."""

    def tie(logits):
        if logits.shape[-1] == 1: return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        best = logits.topk(2, -1).values
        return best[..., 0] - best[..., 1] < margin * (1 + best[..., 0].abs())

    result = []
    for side, (z, zp) in enumerate(((q, qp), (k, kp))):
        y, yp = dydilit.measure(z, gamma, R_F[side]), dydilit.measure(zp, gamma, R_F[side + 2])
        result.append(tie(z @ R_F[side]) | tie(zp @ R_F[side + 2]) | tie(torch.cat([y, yp], -1) @ R_D[side]))
    return result


def results(tensors, dout, backend, **options):
    """[out, nine gradients], None where there is none."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = dydila_attention(*leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True)]


def nudged(tensors, seed):
    """The tensors, every entry off by up to half a unit of float32's last place: as good as the tensors themselves."""
    g = torch.Generator().manual_seed(seed)
    return [t * (1 + 2.0**-24 * (2 * torch.rand(t.shape, generator=g) - 1)).to(t.device) for t in tensors]


def check(tensors, dout, atol, factor=2.0, **options):
    """error of the fused op <= factor x error of the reference in the same dtype + atol, both relative to the
    largest entry of the truth, which is the reference in float64.

    Where the denominator cancels, a float32 result is luck, the reference's too: its error is taken as the worst of
    five, for the inputs and for four nudged copies of them.
    """
    truth = results([t.double() for t in tensors], dout.double(), "reference", **options)
    copies = [nudged(tensors, seed) for seed in range(4)] if tensors[0].dtype == torch.float32 else []
    references = [results(x, dout, "reference", **options) for x in (tensors, *copies)]
    for name, t, f, *r in zip(NAMES, truth, results(tensors, dout, "fused", **options), *references):
        if t is None:
            assert f is None, name
            continue
        assert f.shape == r[0].shape and f.dtype == r[0].dtype and f.is_contiguous(), name
        assert f.isfinite().all(), f"{name} is not finite"
        scale = t.abs().max().clamp_min(1e-6)
        error, *errors = ((x.double() - t).abs().max() / scale for x in (f, *r))
        assert error <= factor * max(errors) + atol, f"{name}: error {error:.2e}, the reference's {max(errors):.2e}"


ATOL = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_every_gradient(size, normalize, dtype, device):
    if dtype == torch.float64 and device == "cuda": pytest.skip("float64 is for the CPU")
    if dtype == torch.bfloat16 and device == "cuda":  # which keeps Dq, Dk and their product in it
        pytest.skip("test_cuda.py has a reference that does so too")
    check(*inputs(*size, dtype, device=device), ATOL[dtype], normalize=normalize)


@pytest.mark.parametrize("size", [(1, 1, 8, 2, 2), (3, 1, 1, 1, 1), (2, 6, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_one_token_and_one_channel(size, normalize):
    """With one key out = v, with one channel phi = relu: gradients are what cancels; only float64 tells."""
    check(*inputs(*size), 1e-8, normalize=normalize)
    for dtype in (torch.float32, torch.bfloat16):
        assert all(x.isfinite().all() for x in results(*inputs(*size, dtype), "fused"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 3), st.integers(2, 150), st.integers(2, 150), st.integers(1, 21), st.integers(1, 21)),
       st.sampled_from([torch.float64, torch.float32]), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_random_sizes(size, dtype, normalize, router_grad, seed):
    tensors, dout = inputs(*size, dtype, seed)
    check(tensors, dout, ATOL[dtype], normalize=normalize, router_grad=router_grad)


def test_float32_is_tight_at_the_papers_size():
    """Positive tokens (lambda 0.01, as at the start of training): nothing cancels, errors are a few last places."""
    check(*inputs(1, 256, 384, 9, 9, torch.float32, gamma=(2.0, 4.0), lam=(0.0, 0.02)), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["dead rows", "all dead", "huge", "steep", "flat", "negative", "lambda beyond 1"])
def test_extremes(case, dtype):
    ranges = {"steep": {"gamma": (20.0, 30.0)}, "flat": {"gamma": (0.5, 0.9)},
              "negative": {"gamma": (-1 / 127, -1 / 127)}, "lambda beyond 1": {"lam": (1.0, 3.0)}}
    tensors, dout = inputs(2, 20, 12, 3, 4, dtype, seed=5, **ranges.get(case, {}))
    if case == "dead rows":
        for i, x in enumerate(tensors[:4]): x[:, i::4] = -x[:, i::4].abs()
    if case == "all dead": tensors[:4] = [-x.abs() for x in tensors[:4]]
    if case == "huge":
        tensors[:4] = [1e4 * x for x in tensors[:4]]
        tensors[7:] = [1e-4 * x for x in tensors[7:]]
    if case in ("flat", "negative"):  # t^(gamma - 1) is unbounded: keep t away from 0. At 0, where log2 t is taken for
        # -127, the second makes it 2^128, which must not be infinite
        tensors[:4] = [torch.where(x.abs() < 0.01, 0.01 * x.sign(), x) for x in tensors[:4]]
    check(tensors, dout, ATOL[dtype])


def test_guard_is_engaged_and_has_the_right_gradient():
    tensors, dout = inputs(2, 30, 20, 3, 3, lam=(0.9, 1.1), seed=3)
    *_, k_sum, den = torch.ops.dydilit.attention_fwd(*tensors, True, True, 1e-6)
    dq = torch.ops.dydilit.attention_fwd(*tensors, True, True, 1e-6)[1]
    floor = 1e-3 * dq.norm(dim=-1) * k_sum[:, -1:] + 1e-6
    at_floor = (den / floor - 1).abs() < 1e-9
    assert at_floor.any() and not at_floor.all()
    check(tensors, dout, atol=1e-9)


def losses(config, steps=6):
    """Of the first steps on fixed random images."""
    torch.manual_seed(0)
    model, diffusion, g = dydilit.DyDiLiT(config), dydilit.Diffusion(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, noise = torch.randn(2, 16, 1, 8, 8, generator=g)
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
    monkeypatch.setattr(torch.ops.dydilit, "attention_fwd", lambda *args: calls.append(1) or original(*args))
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
    """Against finite differences. Straight-through gradients are not derivatives, so routers are left out."""
    tensors, _ = inputs(2, N, D, 3, 2, seed=1, gamma=(1.5, 4.0))
    leaves = [t.requires_grad_() for t in tensors[:7]]

    def f(*leaves):
        return dydila_attention(*leaves, *tensors[7:], normalize=normalize, router_grad=False, backend="fused")

    assert torch.autograd.gradcheck(f, leaves, atol=1e-6)


def test_opcheck():
    tensors, dout = inputs(2, 6, 5, 3, 2, torch.float32)
    forward = (*[t.requires_grad_() for t in tensors], True, True, 1e-6)
    torch.library.opcheck(torch.ops.dydilit.attention_fwd, forward)
    torch.library.opcheck(torch.ops.dydilit.attention, (*[t.detach() for t in tensors], True, 1e-6))
    saved = torch.ops.dydilit.attention_fwd(*forward)[1:]
    tests = ("test_schema", "test_faketensor")  # it has no derivative, on purpose
    torch.library.opcheck(torch.ops.dydilit.attention_bwd, (dout, *forward, *saved), test_utils=tests)


def test_the_backward_alone_refuses_what_does_not_belong_together():
    """As the operator may be called by others; what it would read otherwise lies outside of the tensors."""
    tensors, dout = inputs(2, 6, 5, 3, 2, torch.float32)
    options = (True, True, 1e-6)
    kept = torch.ops.dydilit.attention_fwd(*tensors, *options)[1:]
    want = torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *kept)
    spread = [torch.stack([x, x], -1)[..., 0] for x in kept]  # not contiguous
    for x, y in zip(want, torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *spread)): assert torch.equal(x, y)
    for other in (dout[:, :5], dout.double()):
        with pytest.raises(RuntimeError, match="dout must agree with q in shape, dtype and device"):
            torch.ops.dydilit.attention_bwd(other, *tensors, *options, *kept)
    for i, x in enumerate(kept):
        for other in (x[..., 1:], x.double()):
            with pytest.raises(RuntimeError, match="takes what attention_fwd kept for the same arguments"):
                torch.ops.dydilit.attention_bwd(dout, *tensors, *options, *kept[:i], other, *kept[i + 1:])


@pytest.mark.parametrize("size", [(2, 70, 33, 9, 5), (1, 65, 130, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_uninitialised_is_read_or_returned(size, dtype):
    tensors, dout = inputs(*size, dtype)
    clean = results(tensors, dout, "fused")
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN now, in C++ too
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        poisoned = results(tensors, dout, "fused")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip(NAMES, clean, poisoned): assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.func imports
def test_forward_mode_takes_the_python_path():
    """The op has no such derivative; autograd would take it for 0, without a word."""
    tensors, dout = inputs(2, 9, 8, 3, 2)

    def slope(backend):
        return torch.func.jvp(lambda q: dydila_attention(q, *tensors[1:], backend=backend), (tensors[0],), (dout,))[1]

    assert slope("reference").any() and torch.equal(slope("reference"), slope("auto"))
    with pytest.raises(RuntimeError, match="no extension for cpu or for jvp"): slope("fused")


def test_activation_checkpointing():
    tensors, dout = inputs(2, 9, 8, 3, 2)
    def f(*leaves): return dydila_attention(*leaves, backend="fused")
    plain = results(tensors, dout, "fused")
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = checkpoint(f, *leaves, use_reentrant=False)
    for name, a, b in zip(NAMES, plain, [out, *torch.autograd.grad(out, leaves, dout)]): assert torch.equal(a, b), name


@pytest.mark.parametrize("gap", [1e12, 1e15, 1e30])
def test_logits_far_apart_have_the_gradient_0(gap):
    tensors, dout = inputs(2, 9, 8, 3, 2, torch.float32)
    tensors[7:] = [gap * t for t in tensors[7:]]
    want, got = (results(tensors, dout, backend) for backend in ("reference", "fused"))
    assert not want[8].any() and not got[8].any() and not got[9].any()
    assert all(g.isfinite().all() for g in got)


def test_a_router_with_nan_shows_in_the_choice_as_it_does_on_the_python_path():
    tensors, _ = inputs(2, 9, 8, 3, 2, gamma=(1.0, 4.0))
    tensors[7][:, :, 1] = torch.nan
    want, got = (dydila_attention(*tensors, router_grad=False, backend=b) for b in ("reference", "fused"))
    assert torch.allclose(want, got, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("D", [1, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_one_token_whose_stride_means_nothing(device, D):
    """(1, B, D) transposed counts as contiguous, though its rows are not stride(1) apart."""
    tensors, dout = inputs(5, 1, D, 3, 4, torch.float32, device=device)
    odd = [t.view(1, 5, D).clone().transpose(0, 1) if t.shape == (5, 1, D) else t for t in [*tensors, dout]]
    assert odd[0].is_contiguous() and odd[0].stride() == (D, 5 * D, 1)
    for name, a, b in zip(NAMES, results(tensors, dout, "fused"), results(odd[:9], odd[9], "fused")):
        assert torch.equal(a, b), name


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
        for name, a, b in zip(NAMES, runs[0], run): assert torch.equal(a, b), name


def test_strided_and_expanded_inputs_and_gradients():
    tensors, _ = inputs(2, 9, 8, 3, 3)
    joint = torch.cat(tensors[:3], -1)
    strided = [*joint.chunk(3, -1), tensors[3].mT.contiguous().mT, tensors[4][:1, :1].expand(2, 9, 8), *tensors[5:7],
               tensors[7].mT.contiguous().mT, tensors[8].flip(0).flip(0)]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    cotangent = torch.ones(1, 1, 1, dtype=torch.float64).expand(2, 9, 8)  # what .sum().backward() sends
    for name, a, b in zip(NAMES, results(strided, cotangent, "fused"), results(dense, cotangent.contiguous(), "fused")):
        assert torch.equal(a, b), name
    check(strided, cotangent, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_empty(shape):
    tensors = inputs(2, 4, 6, 3, 2)[0]
    tensors = [torch.zeros(shape, dtype=torch.float64) for _ in range(5)] + tensors[5:]
    out, *grads = results(tensors, torch.zeros(shape, dtype=torch.float64), "fused")
    assert out.shape == shape and all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors))


def test_mixed_dtypes_follow_the_reference():
    tensors, dout = inputs(2, 9, 8, 3, 3, torch.float32)
    tensors[4], tensors[5] = tensors[4].bfloat16(), tensors[5].bfloat16()
    check(tensors, dout.bfloat16(), atol=1e-3)


@pytest.mark.parametrize("size", [(2, 9, 8, 3, 3), (3, 100, 160, 9, 9), (3, 200, 48, 9, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_the_same_bits(size, dtype):
    """Another operator is called then, which keeps nothing."""
    tensors, dout = inputs(*size, dtype)
    with torch.no_grad():
        out = dydila_attention(*[t.requires_grad_() for t in tensors], backend="fused")
    assert not out.requires_grad and torch.equal(out, results(tensors, dout, "fused")[0])


def test_frozen_inputs():
    tensors, dout = inputs(2, 9, 8, 3, 3)
    gamma = tensors[5].requires_grad_()
    (grad,) = torch.autograd.grad(dydila_attention(*tensors, backend="fused"), gamma, dout)
    assert torch.equal(grad, results(tensors, dout, "fused")[6])


def test_autocast_reaches_the_op_only_as_dtypes():
    tensors, dout = inputs(2, 16, 8, 3, 3, torch.float32)
    low = [t.bfloat16() for t in tensors[:5]] + tensors[5:]
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(low, dout, "fused")
    for name, a, b in zip(NAMES, inside, results(low, dout, "fused")): assert torch.equal(a, b), name


def test_second_derivatives_are_refused():
    tensors, dout = inputs(1, 4, 5, 2, 2)
    q = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(dydila_attention(*tensors, backend="fused"), q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_compile_without_graph_breaks():
    tensors, dout = inputs(2, 16, 8, 3, 3, torch.float32)
    eager = results(tensors, dout, "fused")
    leaves = [t.detach().requires_grad_() for t in tensors]
    compiled = torch.compile(lambda *t: dydila_attention(*t, backend="fused") * 2, fullgraph=True)
    out = compiled(*leaves)
    for name, a, b in zip(NAMES, eager, [out.detach() / 2, *torch.autograd.grad(out, leaves, dout / 2)]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_auto_takes_the_fused_op_and_errors_are_clear(monkeypatch):
    tensors, dout = inputs(1, 4, 5, 2, 2, torch.float32)
    for a, b in zip(results(tensors, dout, "auto"), results(tensors, dout, "fused")): assert torch.equal(a, b)
    with pytest.raises(ValueError, match="backend must be"):
        dydila_attention(*tensors, backend="fast")
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ())
    with pytest.raises(RuntimeError, match="build_ext --inplace"):
        dydila_attention(*tensors, backend="fused")
    assert results(tensors, dout, "auto")[0].isfinite().all()


BROKEN, STALE = "raise ImportError('undefined symbol')", "def build_info(): return {'torch': '1.0', 'cuda_archs': ''}"


@pytest.mark.parametrize("extension", [BROKEN, STALE, None], ids=["broken", "stale", "missing"])
def test_a_stale_or_missing_extension_leaves_the_python_path(extension, tmp_path):
    """Stale or broken: one line on stderr. Never built: silence."""
    if extension: (tmp_path / "dydilit_C.py").write_text(extension)
    (tmp_path / "dydilit.py").write_text(Path(dydilit.__file__).read_text())
    code = "import dydilit as d, torch; x = torch.rand(1, 2, 3); print(d.FUSED_DEVICES, d.dydila_attention("
    code += "x, x, x, x, x, x[0, 0], x[0, 0], torch.rand(4, 3, 3), torch.rand(2, 6, 3)).shape)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("() torch.Size([1, 2, 3])"), run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("dydilit:")]
    assert len(lines) == (1 if extension else 0) and all("setup.py build_ext" in line for line in lines), run.stderr


def test_build_info():
    info = importlib.import_module("dydilit_C").build_info()
    assert set(info) == {"torch", "compiler", "isa", "cuda_archs"} and importlib.util.find_spec("dydilit_C").origin


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_products_of_every_instruction_set(tmp_path):
    """The loader picks one build of the matrix products; here all that this machine can run, the fallback too."""
    tests = Path(__file__).parent
    command = ["g++", "-std=c++20", "-O2", f"-I{tests.parent}/csrc", tests / "gemm_check.cpp", "-o", tmp_path / "check"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0 and "baseline" in done.stdout and "chosen" in done.stdout, done.stdout


class OnThePythonPath(Exception):
    pass


@pytest.mark.parametrize(("dtype", "dtype_of_v", "capability", "fused"), [
    (torch.bfloat16, torch.bfloat16, (9, 0), True), (torch.float32, torch.float32, (8, 0), True),
    (torch.bfloat16, torch.bfloat16, (7, 5), False),  # no kernel is built for it
    (torch.float64, torch.float64, (9, 0), False), (torch.float32, torch.float64, (9, 0), False),
], ids=str)
def test_auto_on_a_gpu_takes_the_op_where_its_kernels_can_run(monkeypatch, dtype, dtype_of_v, capability, fused):
    def reference(*_): raise OnThePythonPath

    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dydilit, "measure", reference)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        tensors = [torch.empty(2, 5, 8, dtype=x, device="cuda") for x in [dtype] * 4 + [dtype_of_v]]
        tensors += [torch.empty(shape, device="cuda") for shape in [(3,), (3,), (4, 8, 3), (2, 16, 3)]]
        if fused:
            assert dydila_attention(*tensors).shape == (2, 5, 8)
        else:
            with pytest.raises(OnThePythonPath): dydila_attention(*tensors)
