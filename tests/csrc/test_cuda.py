"""The CUDA half of the fused op, on a GPU where there is one, and emulated on every CPU.

The emulator (cuda_emulator.h) compiles csrc/cuda_kernels.cu and csrc/cuda_ops.cpp, unchanged, for
the CPU: every thread of a block, every barrier, and the fragments of the tensor core by their
definition. It shows that the arithmetic, the indices and the barriers are right, at sizes of a few
blocks. Memory order, streams, graphs and speed show on a GPU alone: their tests are skipped
elsewhere.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import ROOT
from torch.utils.cpp_extension import include_paths
from util import grads_of, random_op_inputs

import dydilit
from support.lock import one_writer

CSRC, BUILD, HERE = ROOT / "csrc", ROOT / "build", ROOT / "tests" / "csrc"
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX", "c++")
CUDA_HEADERS = (
    "cuda_runtime.h",
    "cuda_bf16.h",
    "cuda_fp16.h",
    "c10/cuda/CUDAGuard.h",
    "c10/cuda/CUDAStream.h",
)
TOKENS = ("q", "k", "q_prime", "k_prime", "v")
OPTIONS = (True, True, 1e-6)  # normalize, router_grad, eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# ----------------------------------------------------------------------------------------------
# The operators: torch.ops.dydilit on a GPU, torch.ops.dydilit_emulated on the CPU.


def once(name, command, sources, output=None):
    """Run `command` unless it has succeeded for the same sources before; its output as text."""
    text = " ".join(map(str, command)).encode()
    text += b"".join(source.read_bytes() for source in sorted(sources))
    log = BUILD / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.log"
    if not log.exists() or (output and not output.exists()):
        log.parent.mkdir(exist_ok=True)
        if output:  # the logs of earlier sources no longer describe it
            for earlier in log.parent.glob(f"{name}-{'?' * 16}.log"):
                earlier.unlink()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-8000:]
        log.write_text(done.stdout)
    return log.read_text()


def torch_includes():
    return [flag for path in include_paths() for flag in ("-isystem", path)]


def write_schema(path):
    """The TORCH_LIBRARY block of ops.cpp as a source of its own."""
    text = (CSRC / "ops.cpp").read_text()
    schema = re.search(r"^TORCH_LIBRARY\(dydilit, m\) \{.*?^\}", text, re.M | re.S).group()
    path.write_text(f"#include <torch/library.h>\n{schema}\n")


def build_emulator():
    """Compile the CUDA half for the CPU, with torch's libraries alone, and load it."""
    fake = BUILD / "emulator"
    for header in CUDA_HEADERS:  # their declarations are in cuda_emulator.h
        (fake / header).parent.mkdir(parents=True, exist_ok=True)
        (fake / header).write_text("#pragma once\n")
    schema, library = fake / "schema.cpp", fake / "emulated.so"
    write_schema(schema)
    command = [CXX, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-Ddydilit=dydilit_emulated"]
    # vector accesses must lie at multiples of 16 bytes
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += [f"-I{fake}", f"-I{CSRC}", *torch_includes()]
    command += [HERE / "cuda_emulated.cpp", schema]
    command += [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{TORCH}/lib"]
    command += ["-o", library]
    sources = [*CSRC.glob("*.h"), *CSRC.glob("cuda_*"), *HERE.glob("cuda_emulat*"), schema]
    once("emulator", command, sources, library)
    torch.ops.load_library(library)


@pytest.fixture(scope="module")
def emulated():
    if shutil.which(CXX) is None:
        pytest.skip("no C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    with one_writer(BUILD, wait=True):  # tests run in several processes
        build_emulator()
    library = torch.library.Library("aten", "IMPL")  # bmm with an output type is CUDA's alone
    library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU")
    yield torch.ops.dydilit_emulated, "cpu"
    library._destroy()


def why_no_gpu():
    """Why nothing can be tested on a GPU here; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if "cuda" not in dydilit.FUSED_DEVICES:
        return "the extension is not built with CUDA"
    return None


needs_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def backend(request):
    """(operators, device): most tests below run on both."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return torch.ops.dydilit, "cuda"


# ----------------------------------------------------------------------------------------------
# The comparison with the Python path.


class Fused(torch.autograd.Function):
    """The operators of a backend, in autograd."""

    @staticmethod
    def forward(ctx, ops, options, *inputs):
        out, *kept = ops.attention_fwd(*inputs, *options)
        ctx.save_for_backward(*inputs, *kept)
        ctx.ops, ctx.options = ops, options
        return out

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        return None, None, *ctx.ops.attention_bwd(dout, *saved[:9], *ctx.options, *saved[9:])


def fused(ops, normalize=True, router_grad=True):
    return lambda **x: Fused.apply(ops, (normalize, router_grad, 1e-6), *x.values())


def reference(core, normalize=True, router_grad=True, scale=1.0):
    """The Python path, with products of operands of type `core`, as the CUDA op has them.

    The denominator is of dq and dk before they are rounded. They are multiplied by `scale`, which
    changes nothing but the rounding.
    """

    def attention(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers):
        measured = zip((q, k, q_prime, k_prime), kernel_routers)
        q_t, k_t, qp_t, kp_t = (dydilit.measure(z, gamma, r, router_grad) for z, r in measured)
        dq = dydilit.difference(q_t, qp_t, lam, difference_routers[0], router_grad)
        dk = dydilit.difference(k_t, kp_t, lam, difference_routers[1], router_grad)
        dq, dk = scale * dq, scale * dk
        num = dydilit.linear_attention(dq.to(core), dk.to(core), v.to(core), normalize=False)
        dot = dq @ dk.sum(1, keepdim=True).mT
        floor = 1e-3 * dydilit.norm(dq) * dydilit.norm(dk).sum(1, keepdim=True)
        den = torch.maximum(dot, floor) + 1e-6 * scale**2 if normalize else scale**2
        return (num / den).to(v.dtype)

    return attention


def wide_parameters(x):
    """gamma, lambda and the routers in float32, as the op takes them."""
    return {name: z if name in TOKENS else z.float() for name, z in x.items()}


def moved(x, device):
    return {name: z.to(device) for name, z in x.items()}


def run(fn, x, cotangent, device="cpu"):
    """{"out": fn(**x), name: gradient}, on the CPU in float64."""
    out, grads = grads_of(fn, moved(x, device), cotangent.to(device))
    return {name: z.cpu().double() for name, z in {"out": out, **grads}.items()}


def check(ops, device, x, normalize=True, router_grad=True):
    """The error against float64 is at most twice that of the Python path, and a little more.

    The Python path has its products in the op's precision; its error is the worst of five
    roundings. The little more is a share of the value: float32: 3e-6, of the largest entry;
    16 bits: 1e-4, of the norm.
    """
    dtype = x["q"].dtype
    cotangent = torch.randn(x["v"].shape).to(dtype)
    core = BF16 if dtype == BF16 else F32
    path = partial(reference, normalize=normalize, router_grad=router_grad)
    double = {name: z.double() for name, z in x.items()}
    exact = run(path(torch.float64), double, cotangent.double())
    wide = wide_parameters(x)
    got = run(fused(ops, normalize, router_grad), wide, cotangent, device)
    low = [run(path(core, scale=c), wide, cotangent) for c in (1, 1.1, 1.25, 1.4, 1.6)]

    def largest(e):
        return e.abs().max().item() if e.numel() else 0.0

    size, atol = (largest, 3e-6) if dtype == F32 else (lambda e: e.norm().item(), 1e-4)
    for name, want in exact.items():
        assert got[name].shape == want.shape and not got[name].isnan().any(), name
        error = size(got[name] - want)
        allowed = 2 * max(size(z[name] - want) for z in low) + atol * size(want) + 1e-30
        line = f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {size(want):.2e}"
        print(line)
        assert error <= allowed, line


def dtypes(*several):
    return pytest.mark.parametrize("dtype", several, ids=lambda t: str(t).split(".")[1])


# ----------------------------------------------------------------------------------------------
# On both.

# no near-tie, no denominator near its floor
WELL = {"margin": 1e-3, "gammas": (1.0, 3.0), "lams": (0.01, 0.1)}

SMALL = [  # B, N, D, n_F, n_D
    (2, 5, 8, 3, 4),
    (1, 1, 60, 9, 9),
    (2, 9, 33, 2, 17),
    (1, 70, 16, 33, 1),
    (3, 63, 24, 9, 9),
    (1, 10, 384, 9, 9),
    (1, 9, 512, 15, 15),
    (1, 9, 768, 21, 21),
    (1, 9, 1200, 3, 5),  # four groups of columns a warp
]
LARGE = [
    (2, 256, 384, 9, 9),
    (2, 256, 512, 15, 15),
    (1, 1024, 768, 21, 21),
    (1, 600, 60, 9, 9),
    (1, 63, 33, 40, 3),
    (300, 1, 96, 9, 9),
    (4, 1024, 64, 9, 9),
]


@dtypes(F32, BF16, F16)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_output_and_gradients(backend, shape, dtype):
    check(*backend, random_op_inputs(*shape, dtype=dtype, **WELL), normalize=shape[1] > 1)


@needs_gpu
@dtypes(F32, BF16, F16)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_output_and_gradients_large(shape, dtype):
    x = random_op_inputs(*shape, dtype=dtype, **WELL)
    check(torch.ops.dydilit, "cuda", x, normalize=shape[1] > 1)


def test_one_token_attends_to_itself(backend):
    """out = v but for eps. The gradients are rounding alone, so only their size is compared."""
    ops, device = backend
    x = random_op_inputs(3, 1, 60, 9, 9, **WELL)
    got = run(fused(ops), x, torch.randn(3, 1, 60), device)
    assert (got["out"] - x["v"]).abs().max() < 1e-5
    names = ("q", "k", "q_prime", "k_prime", "gamma", "lam")
    assert all(got[name].abs().max() < 1e-4 for name in names)


@pytest.mark.parametrize("normalize, router_grad", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("N", [5, 20], ids=["tokens first", "features first"])
def test_settings(backend, N, normalize, router_grad):
    check(*backend, random_op_inputs(2, N, 12, 3, 4, **WELL), normalize, router_grad)


def test_more_gammas_than_threads_that_add_them_up(backend):
    check(*backend, random_op_inputs(1, 2100, 4, 3, 2, **WELL))


def test_dead_rows(backend):
    check(*backend, random_op_inputs(2, 9, 24, 9, 9, dead=3, **WELL))


def test_a_wide_range_of_gamma(backend):
    ranges = {"gammas": (0.5, 30), "lams": (0.01, 0.1)}
    check(*backend, random_op_inputs(1, 9, 24, 9, 9, margin=1e-3, **ranges))


def test_huge_tokens(backend):
    huge = random_op_inputs(1, 9, 24, 9, 9, **WELL)
    for name in ("q", "k", "q_prime", "k_prime"):
        huge[name] *= 1e4
    check(*backend, huge)


@dtypes(F32, BF16, F16)
@pytest.mark.parametrize("seed", [3, 6])
def test_denominators_at_and_near_their_floor(backend, seed, dtype):
    """There the rounding of Dq and Dk to bfloat16 is as large as the denominator."""
    ops, device = backend
    x = random_op_inputs(1, 64, 64, 3, 3, dtype, seed, margin=1e-3, lams=(0.1, 0.9))
    wide = moved(wide_parameters(x), device)
    _, dq, *_, k_sum, den = ops.attention_fwd(*wide.values(), *OPTIONS)
    times_floor = den / (1e-3 * dq.float().norm(dim=-1) * k_sum[:, -1:])
    assert (times_floor < 0).any() and ((times_floor > 1) & (times_floor < 10)).any()
    check(*backend, x)


@pytest.mark.parametrize("N", [9, 512, 513])
def test_the_sums_of_all_keys(backend, N):
    """Beyond 64 tiles, 512 tokens, they are added up in two steps."""
    ops, device = backend
    q, k, q_prime, k_prime, v = (torch.randn(1, N, 4, device=device) for _ in TOKENS)
    parameters = (torch.ones(shape, device=device) for shape in ((2,), (2,), (4, 4, 2), (2, 8, 2)))
    _, _, dk, *_, k_sum, _ = ops.attention_fwd(q, k, q_prime, k_prime, v, *parameters, *OPTIONS)
    assert torch.allclose(k_sum[:, :-1], dk.sum(1), rtol=1e-5, atol=1e-3)
    assert torch.allclose(k_sum[:, -1], dk.norm(dim=-1).sum(1), rtol=1e-5)


def test_lowest_index_wins_a_tie(backend):
    ops, device = backend
    x = random_op_inputs(1, 9, 40, 4, 4, **WELL)
    for name in ("kernel_routers", "difference_routers"):
        x[name] = x[name][..., :1].expand_as(x[name])
    first = {**x, "gamma": x["gamma"][:1].expand(4), "lam": x["lam"][:1].expand(4)}
    got, want = (ops.attention_fwd(*moved(y, device).values(), *OPTIONS)[0] for y in (x, first))
    assert torch.equal(got, want)


def test_a_router_with_nan_takes_the_first_nan(backend):
    ops, device = backend
    x = random_op_inputs(2, 9, 24, 3, 4, **WELL | {"gammas": (1.0, 4.0)})
    x["kernel_routers"][:, :, 1] = torch.nan
    x["difference_routers"][:, :, 2:] = torch.nan  # two of four
    ones = torch.ones_like(x["v"])
    want = run(reference(F32, router_grad=False), x, ones)
    got = run(fused(ops, router_grad=False), x, ones, device)
    assert torch.allclose(got["out"], want["out"], rtol=1e-4, atol=1e-4)
    with_gates = run(fused(ops), x, ones, device)  # they are NaN, so the pairs (y, y') are too
    for name, chosen, with_gate in (("gamma", 1, 1), ("lam", 2, 0)):
        assert got[name].nonzero().flatten().tolist() == [chosen], name
        assert with_gates[name].nonzero().flatten().tolist() == [with_gate], name
    assert not got["kernel_routers"].any() and with_gates["kernel_routers"].isnan().any()
    assert with_gates["out"].isnan().all()


def test_a_lambda_that_no_token_takes_may_be_nan(backend):
    """The rows that fill up a tile would take it; they must not reach the sums over the keys."""
    ops, device = backend
    x = random_op_inputs(1, 9, 24, 3, 3, **WELL)
    x["lam"][0], x["difference_routers"][..., 0] = torch.nan, -1
    out = run(fused(ops), x, torch.ones_like(x["v"]), device)["out"]
    assert out.isfinite().all()


@dtypes(F32, BF16, F16)
@pytest.mark.parametrize("router_grad", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("N", [3, 13], ids=["tokens first", "features first"])
def test_what_is_not_finite_goes_where_it_goes_in_the_python_path(
    backend, N, value, router_grad, dtype
):
    """At the least. With infinite tokens or routers the CUDA op may have more: their logits are
    NaN (csrc/README.md)."""
    ops, device = backend
    places = {"gamma": 1, "lam": 1, "kernel_routers": (1, 2, 1), "difference_routers": (0, 2, 1)}
    for name in (*TOKENS, *places):
        x = wide_parameters(random_op_inputs(1, N, 12, 3, 4, dtype=dtype, dead=1, **WELL))
        x[name][places.get(name, (0, 1, 2))] = value
        cotangent = torch.ones_like(x["v"])
        core = BF16 if dtype == BF16 else F32
        want = run(reference(core, router_grad=router_grad), x, cotangent)
        got = run(fused(ops, router_grad=router_grad), x, cotangent, device)
        for which, w in want.items():
            assert not (w.isnan() & got[which].isfinite()).any(), (name, which)
        inference = ops.attention(*moved(x, device).values(), True, router_grad, 1e-6)
        assert torch.equal(inference.isnan().cpu(), got["out"].isnan())


@dtypes(F32, BF16)
@pytest.mark.parametrize("D, gammas", [(384, [-3.5, -3, -0.5]), (16, [-5, 2, -1])], ids=str)
def test_negative_gamma(backend, D, gammas, dtype):
    x = random_op_inputs(1, 9, D, 3, 1, dtype=dtype, **WELL)  # one lambda: its router has no ties
    x["gamma"] = torch.tensor(gammas, dtype=dtype)
    check(*backend, x)


def outputs(ops, x, cotangent):
    """The output and the nine gradients."""
    out, *kept = ops.attention_fwd(*x.values(), *OPTIONS)
    return [out, *ops.attention_bwd(cotangent, *x.values(), *OPTIONS, *kept)]


@dtypes(F32, BF16)
@pytest.mark.parametrize("D", [24, 33])
def test_any_strides(backend, D, dtype):
    """Parts of a joint projection are read in place, everything else is copied.

    The bits are the same; on a GPU nearly so: cuBLAS may choose another kernel for other strides.
    """
    ops, device = backend
    x = moved(wide_parameters(random_op_inputs(2, 9, D, 3, 4, dtype=dtype, **WELL)), device)
    joint = torch.cat([x["q"], x["k"], x["v"]], -1)
    strided = x | {
        "q": joint[..., :D],
        "k": joint[..., D : 2 * D],
        "v": joint[..., 2 * D :],
        "q_prime": x["q_prime"].mT.contiguous().mT,
        "gamma": x["gamma"].repeat_interleave(2)[::2],
    }
    cotangent = torch.randn_like(x["q"][..., :1]).expand_as(x["q"])
    near = {F32: 1e-5, BF16: 1e-2}[dtype] if device == "cuda" else 0
    wanted = outputs(ops, x, cotangent.contiguous())
    for want, got in zip(wanted, outputs(ops, strided, cotangent)):
        assert got.is_contiguous()
        assert (want - got).float().norm() <= near * want.float().norm()


@dtypes(F32, BF16)
def test_the_same_bits_on_every_run(backend, dtype):
    ops, device = backend
    x = moved(wide_parameters(random_op_inputs(2, 21, 72, 9, 9, dtype=dtype)), device)
    cotangent, runs = torch.randn_like(x["q"]), []
    for seed in range(3):
        if device == "cpu":
            ops.seed(seed)  # another order of the threads
        runs.append(outputs(ops, x, cotangent))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


@pytest.mark.parametrize("B, N", [(0, 5), (2, 0)])
def test_an_empty_batch_gives_empty_gradients(backend, B, N):
    ops, device = backend
    x = moved(random_op_inputs(B, N, 24, 3, 4), device)
    out, *grads = outputs(ops, x, torch.empty_like(x["q"]))
    assert out.shape == (B, N, 24)
    for z, grad in zip(x.values(), grads):
        assert grad.shape == z.shape and not grad.any()


BEYOND = [
    ("takes N up to 4194240", (1, 1, 1, 2, 2), F32),
    ("takes float32, bfloat16 or float16", (1, 2, 8, 2, 2), torch.float64),
    ("takes D up to 1536", (1, 2, 1544, 2, 2), F32),
    ("takes up to 256", (1, 2, 8, 257, 2), F32),
]


@pytest.mark.parametrize("message, shape, dtype", BEYOND)
def test_inputs_beyond_the_limits_are_refused(backend, message, shape, dtype):
    ops, device = backend
    x = moved(random_op_inputs(*shape, dtype=dtype), device)
    if "N" in message:
        x |= {name: x[name].expand(1, 4194241, 1) for name in TOKENS}
    with pytest.raises(RuntimeError, match=message):
        ops.attention_fwd(*x.values(), *OPTIONS)


def test_every_emulated_kernel_that_cannot_start_is_an_error(emulated):
    ops, _ = emulated
    x = random_op_inputs(1, 9, 24, 3, 4)
    ops.refuse(1000)
    outputs(ops, x, torch.ones_like(x["q"]))
    launches = 1000 - ops.refuse(-1)
    assert launches > 10
    for launch in range(launches):
        ops.refuse(launch)
        with pytest.raises(RuntimeError, match="could not start a kernel: invalid configuration"):
            outputs(ops, x, torch.ones_like(x["q"]))


# ----------------------------------------------------------------------------------------------
# By nvcc, on any machine. check_gpu.py leaves out the tests that have "compile" in their name.

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def resources(log):
    """[(architecture, kernel, registers, bytes of spill stores)] from ptxas -v."""
    entry = r"Compiling entry function '(\w+)' for '(\w+)'"
    pattern = entry + r".*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, log, re.S)
    command = ["c++filt", *(mangled for mangled, *_ in found)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = names.replace("(anonymous namespace)", "")
    short = [re.sub(r"dydilit::cuda::|::|^void |\(.*", "", n) for n in names.splitlines()]
    rows = [(arch, int(used), int(spill)) for _, arch, spill, used in found]
    return [(arch, name, used, spill) for (arch, used, spill), name in zip(rows, short)]


@needs_nvcc
def test_kernels_compile_with_few_spills():
    """Registers that spill cost time, but so do too few warps: csrc/README.md has the bytes."""
    target = BUILD / "cuda_kernels.o"
    target.parent.mkdir(exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-c", CSRC / "cuda_kernels.cu", "-o", target]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    sources = {*CSRC.glob("cuda_kernels.*"), *CSRC.glob("cuda_*.*h"), CSRC / "phi.h"}
    table = resources(once("kernels", command, sources, target))
    assert len(table) >= 60
    for arch, name, registers, spill in table:
        print(f"{arch} {name:60} {registers:4} registers, {spill} bytes spilled")
    allowed = {"features_backward_kernel<float": 600, "features_backward_kernel": 200}
    for _, name, _, spill in table:
        most = next((allowed[start] for start in allowed if name.startswith(start)), 24)
        assert spill <= most, f"{name} spills {spill} bytes"


@needs_nvcc
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_binding_compiles(standard):
    """Beside a torch without CUDA, whose CUDA headers lack one generated file."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if standard == "c++17" and version >= (2, 13):
        pytest.skip("torch's own headers need C++20 from 2.13 on")
    macros = BUILD / "macros" / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True, exist_ok=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    toolkit = Path(shutil.which("nvcc")).resolve().parent.parent / "include"
    if not toolkit.joinpath("cuda_runtime.h").exists():
        toolkit = Path("/usr/local/cuda/include")
    command = [CXX, f"-std={standard}", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", BUILD / "macros", *torch_includes(), "-isystem", toolkit]
    command += ["-isystem", sysconfig.get_paths()["include"], CSRC / "cuda_ops.cpp"]
    once("binding", command, [*CSRC.glob("*.h"), *CSRC.glob("cuda_*")])


# ----------------------------------------------------------------------------------------------
# On a GPU alone.


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others))


@needs_gpu
def test_side_stream():
    x = moved(random_op_inputs(2, 63, 384, 9, 9), "cuda")
    cotangent = torch.randn_like(x["q"])
    want = outputs(torch.ops.dydilit, x, cotangent)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the default stream would read the inputs too early
        late = {name: z * 1 for name, z in x.items()}
        got = outputs(torch.ops.dydilit, late, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    assert equal(want, got)


@needs_gpu
@dtypes(F32, BF16)
def test_graph(dtype):
    """Captured once, replayed on other data: no synchronisation, no read-back, no stale pointer."""
    first, second = (
        moved(wide_parameters(random_op_inputs(2, 63, 64, 9, 9, dtype=dtype, seed=seed)), "cuda")
        for seed in (0, 1)
    )
    cotangent = torch.randn_like(first["q"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs(torch.ops.dydilit, first, cotangent)  # cuBLAS sets itself up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs(torch.ops.dydilit, first, cotangent)
    for name, z in second.items():
        first[name].copy_(z)
    graph.replay()
    assert equal(outputs(torch.ops.dydilit, second, cotangent), got)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device():
    x = moved(random_op_inputs(2, 9, 64, 9, 9), "cuda:1")
    y = moved(x, "cuda:0")
    got, want = (outputs(torch.ops.dydilit, z, torch.ones_like(z["q"])) for z in (x, y))
    assert all(z.device == torch.device("cuda:1") for z in got)
    assert equal([z.cpu() for z in got], [z.cpu() for z in want])


@needs_gpu
def test_autocast_leaves_the_products_alone():
    x = moved(random_op_inputs(2, 63, 64, 9, 9), "cuda")
    cotangent = torch.randn_like(x["q"])
    want = outputs(torch.ops.dydilit, x, cotangent)
    with torch.autocast("cuda", BF16):
        got = outputs(torch.ops.dydilit, x, cotangent)
    assert equal(want, got)


@needs_gpu
@pytest.mark.parametrize("N", [9, 30], ids=["tokens first", "features first"])
@dtypes(F32, BF16, F16)
def test_dydila_attention_gives_the_bits_of_the_operators(dtype, N):
    x = moved(wide_parameters(random_op_inputs(2, N, 24, 3, 4, dtype=dtype)), "cuda")
    cotangent = torch.randn_like(x["q"])
    out, grads = grads_of(dydilit.dydila_attention, x, cotangent)
    assert equal(outputs(torch.ops.dydilit, x, cotangent), [out, *grads.values()])


@needs_gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N", [9, 30], ids=["tokens first", "features first"])
@dtypes(F32, BF16, F16)
def test_the_fake_kernel_promises_the_right_types_shapes_and_strides(dtype, N, normalize):
    x = moved(wide_parameters(random_op_inputs(2, N, 24, 3, 4, dtype=dtype)), "cuda")
    tests = ("test_schema", "test_faketensor")
    arguments = (*x.values(), normalize, True, 1e-6)
    torch.library.opcheck(torch.ops.dydilit.attention_fwd, arguments, test_utils=tests)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@dtypes(F32, BF16)
def test_routed_projection_without_tokens_for_the_last_projector(dtype, device):
    x, projectors = torch.randn(2, 2048, 384) / 20, torch.randn(5, 384, 384) / 20
    router = torch.randn(384, 5)
    x[..., 0], router[:, 4], router[0, 4] = 1, 0, -30  # logit 4 is -30
    exact, cotangent = {"x": x, "projectors": projectors, "router": router}, torch.randn_like(x)
    assert dydilit.route(x, router)[0].unique().tolist() == [0, 1, 2, 3]
    inputs = moved(exact, device)
    with torch.autocast(device, dtype, enabled=dtype != F32):
        out, grads = grads_of(dydilit.routed_projection, inputs, cotangent.to(device, dtype))
    exact = {name: z.double() for name, z in exact.items()}
    truth, true_grads = grads_of(dydilit.routed_projection, exact, cotangent.double())
    bound = 1e-2 if dtype == BF16 else 1e-5
    for got, want in ((out, truth), *((grads[name], true_grads[name]) for name in inputs)):
        assert (got.cpu().double() - want).norm() <= bound * want.norm()
    assert not true_grads["projectors"][4].any() and not grads["projectors"][4].any()
