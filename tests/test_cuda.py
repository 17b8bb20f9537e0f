"""The CUDA half of the fused op: on a GPU where there is one; anywhere compiled by nvcc and run on the CPU, emulated.

The emulator (cuda_emulator.h) compiles csrc/cuda_kernels.cu and csrc/cuda_ops.cpp, unchanged, for the CPU: every thread
of a block, every barrier and the tensor core's fragments by their definition. It shows that the arithmetic, the indices
and the barriers are right, at sizes of a few blocks. What only a GPU shows (memory order, streams, graphs, speed) is
tested on one, and skipped elsewhere with the reason.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths
from util import grads_of, random_op_inputs

import dydilit

ROOT = Path(__file__).parent.parent
CSRC, TORCH = ROOT / "csrc", Path(torch.__file__).parent
CXX = os.environ.get("CXX", "c++")
CUDA_HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "c10/cuda/CUDAException.h", "c10/cuda/CUDAGuard.h",
                "c10/cuda/CUDAStream.h")

# ---------------------------------------------------------------------------------------------------------------------
# What is tested: torch.ops.dydilit on a GPU, torch.ops.dydilit_emulated on the CPU.


def once(name, command, sources, output=None):
    """Run `command` unless it has succeeded for the same sources before; its output as text."""
    text = " ".join(map(str, command)).encode() + b"".join(source.read_bytes() for source in sorted(sources))
    log = ROOT / "build" / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.log"
    if not log.exists() or (output and not output.exists()):
        log.parent.mkdir(exist_ok=True)
        if output:  # which will not be what earlier sources made
            for earlier in log.parent.glob(f"{name}-{'?' * 16}.log"): earlier.unlink()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-8000:]
        log.write_text(done.stdout)
    return log.read_text()


def torch_includes():
    return [flag for path in include_paths() for flag in ("-isystem", path)]


def build_emulator():
    """Compile the CUDA half for the CPU, next to nothing but torch, and load it."""
    fake = ROOT / "build" / "emulator"
    for header in CUDA_HEADERS:  # what they declare is in cuda_emulator.h
        (fake / header).parent.mkdir(parents=True, exist_ok=True)
        (fake / header).write_text("#pragma once\n")
    schema = re.search(r"^TORCH_LIBRARY\(dydilit, m\) \{.*?^\}", (CSRC / "ops.cpp").read_text(), re.M | re.S).group()
    (fake / "schema.cpp").write_text(f"#include <torch/library.h>\n{schema}\n")
    library = fake / "emulated.so"
    command = [CXX, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-Ddydilit=dydilit_emulated",
               "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",  # vector accesses at multiples of 16 bytes
               f"-I{fake}", f"-I{CSRC}", *torch_includes(), ROOT / "tests/cuda_emulated.cpp", fake / "schema.cpp",
               f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{TORCH}/lib",
               "-o", library]
    sources = [*CSRC.glob("*.h"), *CSRC.glob("cuda_*"), *(ROOT / "tests").glob("cuda_emulat*"), fake / "schema.cpp"]
    once("emulator", command, sources, library)
    torch.ops.load_library(library)


@pytest.fixture(scope="module")
def emulated():
    if shutil.which(CXX) is None:
        pytest.skip("no C++ compiler")
    build_emulator()
    library = torch.library.Library("aten", "IMPL")  # bmm with an output type is CUDA's alone
    library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU")
    yield torch.ops.dydilit_emulated, "cpu"
    library._destroy()


def gpu():
    """Why nothing can be tested on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    if "cuda" not in dydilit.FUSED_DEVICES:
        return "the extension is not built with CUDA"


needs_gpu = pytest.mark.skipif(gpu() is not None, reason=str(gpu()))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def backend(request):
    """(operators, device); the tests below are the same for both, but for the sizes."""
    return request.getfixturevalue("emulated") if request.param == "emulated" else (torch.ops.dydilit, "cuda")


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ops, settings, *inputs):
        out, *kept = ops.attention_fwd(*inputs, *settings)
        ctx.save_for_backward(*inputs, *kept)
        ctx.ops, ctx.settings = ops, settings
        return out

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        return None, None, *ctx.ops.attention_bwd(dout, *saved[:9], *ctx.settings, *saved[9:])


def fused(ops, normalize=True, router_grad=True):
    return lambda **x: Fused.apply(ops, (normalize, router_grad, 1e-6), *x.values())


def reference(core, normalize=True, router_grad=True, scale=1.0):
    """The Python path, with the products on operands of type `core`, as the CUDA op has them.

    Dq and Dk times `scale` change nothing but the rounding.
    """

    def attention(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers):
        q_t, k_t, qp_t, kp_t = (
            dydilit.measure(z, gamma, r, router_grad) for z, r in zip((q, k, q_prime, k_prime), kernel_routers)
        )
        dq = dydilit.difference(q_t, qp_t, lam, difference_routers[0], router_grad)
        dk = dydilit.difference(k_t, kp_t, lam, difference_routers[1], router_grad)
        dq, dk = ((scale * d).to(core) for d in (dq, dk))
        out = dydilit.linear_attention(dq, dk, v.to(core), normalize, 1e-6 * scale**2)
        return (out if normalize else out / scale**2).to(v.dtype)

    return attention


def wide_parameters(x):
    """gamma, lambda and the routers in float32, as the op takes them."""
    tokens = ("q", "k", "q_prime", "k_prime", "v")
    return {name: z if name in tokens else z.float() for name, z in x.items()}


def run(fn, x, cotangent, device="cpu"):
    """{"out": fn(**x), name: gradient}, on the CPU in float64."""
    leaves = {name: z.detach().to(device).requires_grad_() for name, z in x.items()}
    out = fn(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(device), allow_unused=True,
                                materialize_grads=True)
    return {name: z.detach().cpu().double() for name, z in zip(["out", *leaves], [out, *grads])}


def check(ops, device, x, normalize=True, router_grad=True):
    """Output and gradients against float64: the error is at most twice that of the Python path with its products in the
    op's precision, the worst of five roundings, and a little more. float32: the largest error, 3e-6 more; 16 bits: the
    error's norm, 1e-4 more."""
    dtype = x["q"].dtype
    cotangent = torch.randn(x["v"].shape).to(dtype)
    core = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    settings = {"normalize": normalize, "router_grad": router_grad}
    exact = run(reference(torch.float64, **settings), {n: z.double() for n, z in x.items()}, cotangent.double())
    got = run(fused(ops, **settings), wide_parameters(x), cotangent, device)
    low = [run(reference(core, **settings, scale=c), wide_parameters(x), cotangent) for c in (1, 1.1, 1.25, 1.4, 1.6)]
    for name, want in exact.items():
        assert got[name].shape == want.shape and not got[name].isnan().any(), name
        if dtype == torch.float32:
            size, atol = (lambda e: e.abs().max().item() if e.numel() else 0.0), 3e-6
        else:
            size, atol = (lambda e: e.norm().item()), 1e-4
        error, allowed = size(got[name] - want), 2 * max(size(z[name] - want) for z in low) + atol * size(want) + 1e-30
        print(f"{name}: error {error:.1e}, allowed {allowed:.1e}, size {size(want):.1e}")
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {size(want):.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# The same on both.

WELL = {"margin": 1e-3, "gammas": (1.0, 3.0), "lams": (0.01, 0.1)}  # no near-tie, no denominator near its floor

SMALL = [  # B, N, D, n_F, n_D
    (2, 5, 8, 3, 4), (1, 1, 60, 9, 9), (2, 9, 33, 2, 17), (1, 70, 16, 33, 1), (3, 63, 24, 9, 9), (1, 10, 384, 9, 9),
    (1, 9, 512, 15, 15), (1, 9, 768, 21, 21), (1, 3, 1000, 3, 5),
]
LARGE = [(2, 256, 384, 9, 9), (2, 256, 512, 15, 15), (1, 1024, 768, 21, 21), (1, 600, 60, 9, 9), (1, 63, 33, 40, 3),
         (300, 1, 96, 9, 9), (4, 1024, 64, 9, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_output_and_gradients(backend, shape, dtype):
    check(*backend, random_op_inputs(*shape, dtype=dtype, **WELL), normalize=shape[1] > 1)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_output_and_gradients_large(shape, dtype):
    check(torch.ops.dydilit, "cuda", random_op_inputs(*shape, dtype=dtype, **WELL), normalize=shape[1] > 1)


def test_one_token_attends_to_itself(backend):
    """out = v but for eps; the gradients that are left are rounding, so that only their size is compared."""
    ops, device = backend
    x = random_op_inputs(3, 1, 60, 9, 9, **WELL)
    got = run(fused(ops), x, torch.randn(3, 1, 60), device)
    assert (got["out"] - x["v"]).abs().max() < 1e-5
    assert all(got[name].abs().max() < 1e-4 for name in ("q", "k", "q_prime", "k_prime", "gamma", "lam"))


@pytest.mark.parametrize("normalize, router_grad", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("N", [5, 20], ids=["tokens first", "features first"])
def test_settings(backend, N, normalize, router_grad):
    check(*backend, random_op_inputs(2, N, 12, 3, 4, **WELL), normalize, router_grad)


def test_dead_rows_and_wide_ranges(backend):
    check(*backend, random_op_inputs(2, 9, 24, 9, 9, dead=3, **WELL))
    check(*backend, random_op_inputs(1, 9, 24, 9, 9, margin=1e-3, gammas=(0.5, 30), lams=(0.01, 0.1)))
    huge = random_op_inputs(1, 9, 24, 9, 9, **WELL)
    for name in ("q", "k", "q_prime", "k_prime"): huge[name] *= 1e4
    check(*backend, huge)


def test_denominator_at_its_floor(backend):
    x = random_op_inputs(1, 12, 24, 3, 3, margin=1e-3, lams=(1.0, 3.0))
    ops, device = backend
    *_, dq, dk, _, _, _, _, den = ops.attention_fwd(*(z.to(device) for z in x.values()), True, True, 1e-6)
    assert ((dq * dk.sum(1, keepdim=True)).sum(-1) < 0.999 * (den - 1e-6)).any(), "no query is at the floor"
    check(*backend, x)


def test_lowest_index_wins_a_tie(backend):
    ops, device = backend
    x = random_op_inputs(1, 9, 40, 4, 4, **WELL)
    for name in ("kernel_routers", "difference_routers"): x[name] = x[name][..., :1].expand_as(x[name])
    first = {**x, "gamma": x["gamma"][:1].expand(4), "lam": x["lam"][:1].expand(4)}
    a, b = (ops.attention_fwd(*(z.to(device) for z in y.values()), True, True, 1e-6)[0] for y in (x, first))
    assert torch.equal(a, b)


@pytest.mark.parametrize("router_grad", [True, False])
def test_a_router_with_nan_takes_the_first_nan(backend, router_grad):
    ops, device = backend
    x = random_op_inputs(2, 9, 24, 3, 4, gammas=(1.0, 4.0), **{k: v for k, v in WELL.items() if k != "gammas"})
    x["kernel_routers"][:, :, 1] = torch.nan
    x["difference_routers"][:, :, 2:] = torch.nan  # the first of the two
    want = run(reference(torch.float32, router_grad=False), x, torch.ones_like(x["v"]))  # else its gate is NaN
    got = run(fused(ops, router_grad=router_grad), x, torch.ones_like(x["v"]), device)
    assert torch.allclose(got["out"], want["out"], rtol=1e-4, atol=1e-4)
    for name, chosen in (("gamma", 1), ("lam", 2)): assert got[name].nonzero().flatten().tolist() == [chosen], name
    assert got["kernel_routers"].isnan().any() == router_grad


def outputs(ops, x, cotangent):
    out, *kept = ops.attention_fwd(*x.values(), True, True, 1e-6)
    return [out, *ops.attention_bwd(cotangent, *x.values(), True, True, 1e-6, *kept)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_any_strides(backend, dtype):
    """Parts of a joint projection are read in place, everything else is copied: the same bits, or nearly so on a GPU,
    where cuBLAS may choose another kernel for other strides."""
    ops, device = backend
    for D in (24, 33):
        x = {n: z.to(device) for n, z in wide_parameters(random_op_inputs(2, 9, D, 3, 4, dtype=dtype, **WELL)).items()}
        joint = torch.cat([x["q"], x["k"], x["v"]], -1)
        y = dict(x, q=joint[..., :D], k=joint[..., D : 2 * D], v=joint[..., 2 * D :],
                 q_prime=x["q_prime"].mT.contiguous().mT, gamma=x["gamma"].repeat_interleave(2)[::2])
        cotangent = torch.randn_like(x["q"][..., :1]).expand_as(x["q"])
        for a, b in zip(outputs(ops, x, cotangent.contiguous()), outputs(ops, y, cotangent)):
            assert b.is_contiguous()
            near = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] if device == "cuda" else 0
            assert (a - b).float().norm() <= near * a.float().norm()


def test_the_same_bits_on_every_run(backend):
    ops, device = backend
    for dtype in (torch.float32, torch.bfloat16):
        x = {n: z.to(device) for n, z in wide_parameters(random_op_inputs(2, 21, 72, 9, 9, dtype=dtype)).items()}
        cotangent, runs = torch.randn_like(x["q"]), []
        for seed in range(3):
            if device == "cpu": ops.seed(seed)  # another order of the threads
            runs.append(outputs(ops, x, cotangent))
        for run_ in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run_))


@pytest.mark.parametrize("B, N", [(0, 5), (2, 0)])
def test_nothing(backend, B, N):
    ops, device = backend
    x = {n: z.to(device) for n, z in random_op_inputs(B, N, 24, 3, 4).items()}
    out, *grads = outputs(ops, x, torch.empty_like(x["q"]))
    assert out.shape == (B, N, 24)
    for z, grad in zip(x.values(), grads):
        assert grad.shape == z.shape and not grad.any()


def test_limits_are_clear_errors(backend):
    ops, device = backend
    for message, shape, dtype in (("takes float32, bfloat16 or float16", (1, 2, 8, 2, 2), torch.float64),
                                  ("takes D up to 1536", (1, 2, 1544, 2, 2), torch.float32),
                                  ("takes up to 256", (1, 2, 8, 257, 2), torch.float32)):
        x = random_op_inputs(*shape, dtype=dtype)
        with pytest.raises(RuntimeError, match=message):
            ops.attention_fwd(*(z.to(device) for z in x.values()), True, True, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# On a machine without a GPU: does it compile, and into how many registers?

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def resources(log):
    """[(architecture, kernel, registers, bytes of spill stores)] from ptxas -v."""
    pattern = (r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers")
    found = re.findall(pattern, log, re.S)
    names = subprocess.run(["c++filt", *(f[0] for f in found)], capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"dydilit::cuda::|::|^void |\(.*", "", name.replace("(anonymous namespace)", ""))
             for name in names.splitlines()]
    return [(arch, name, int(used), int(spill)) for (_, arch, spill, used), name in zip(found, short)]


@needs_nvcc
def test_kernels_compile_without_spills():
    target = ROOT / "build" / "cuda_kernels.o"
    target.parent.mkdir(exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-c", CSRC / "cuda_kernels.cu", "-o", target, "-Werror", "all-warnings",
               "-Xptxas", "-v", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90))]
    sources = [*CSRC.glob("cuda_kernels.*"), CSRC / "cuda_mma.cuh", CSRC / "phi.h"]
    table = resources(once("kernels", command, sources, target))
    assert len(table) >= 80
    for arch, name, registers, spill in table:
        print(f"{arch} {name:60} {registers:4} registers, {spill} bytes spilled")
    wide_rows = re.compile("features.*, 4>")  # D from 769 to 1536
    assert not [row for row in table if row[3] and not wide_rows.match(row[1])]


@needs_nvcc
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_binding_compiles(standard):
    """Beside a torch without CUDA, whose CUDA headers lack one generated file."""
    if standard == "c++17" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        pytest.skip("torch's own headers need C++20 from 2.13 on")
    macros = ROOT / "build" / "macros" / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True, exist_ok=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    toolkit = Path(shutil.which("nvcc")).resolve().parent.parent / "include"
    if not toolkit.joinpath("cuda_runtime.h").exists():
        toolkit = Path("/usr/local/cuda/include")
    command = [CXX, f"-std={standard}", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
               "-isystem", ROOT / "build" / "macros", *torch_includes(), "-isystem", toolkit,
               "-isystem", sysconfig.get_paths()["include"], CSRC / "cuda_ops.cpp"]
    once("binding", command, [*CSRC.glob("*.h"), *CSRC.glob("cuda_*")])


# ---------------------------------------------------------------------------------------------------------------------
# Only a GPU shows.


@needs_gpu
def test_side_stream():
    x = {n: z.cuda() for n, z in random_op_inputs(2, 63, 384, 9, 9).items()}
    cotangent = torch.randn_like(x["q"])
    want = outputs(torch.ops.dydilit, x, cotangent)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # inputs on the default stream would be read too early
        late = {n: z * 1 for n, z in x.items()}
        got = outputs(torch.ops.dydilit, late, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_graph(dtype):
    """Captured once, replayed on other data: no synchronisation, nothing read back, no pointer that goes stale."""
    drawn = (wide_parameters(random_op_inputs(2, 63, 64, 9, 9, dtype=dtype, seed=seed)) for seed in (0, 1))
    first, second = ({n: z.cuda() for n, z in x.items()} for x in drawn)
    cotangent = torch.randn_like(first["q"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): outputs(torch.ops.dydilit, first, cotangent)  # cuBLAS sets itself up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs(torch.ops.dydilit, first, cotangent)
    for name, z in second.items(): first[name].copy_(z)
    graph.replay()
    want = outputs(torch.ops.dydilit, second, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device():
    x = {n: z.to("cuda:1") for n, z in random_op_inputs(2, 9, 64, 9, 9).items()}
    y = {n: z.to("cuda:0") for n, z in x.items()}
    got, want = (outputs(torch.ops.dydilit, z, torch.ones_like(z["q"])) for z in (x, y))
    assert all(a.device == torch.device("cuda:1") and torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want))


@needs_gpu
def test_autocast_leaves_the_products_alone():
    x = {n: z.cuda() for n, z in random_op_inputs(2, 63, 64, 9, 9).items()}
    cotangent = torch.randn_like(x["q"])
    want = outputs(torch.ops.dydilit, x, cotangent)
    with torch.autocast("cuda", torch.bfloat16):
        got = outputs(torch.ops.dydilit, x, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_gpu
@pytest.mark.parametrize("N", [9, 30], ids=["tokens first", "features first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_dydila_attention_takes_it(dtype, N):
    """The same bits through autograd; and what the fake kernel promises is what comes, in type, shape and strides."""
    x = {n: z.cuda() for n, z in wide_parameters(random_op_inputs(2, N, 24, 3, 4, dtype=dtype)).items()}
    cotangent = torch.randn_like(x["q"])
    out, grads = grads_of(dydilit.dydila_attention, x, cotangent)
    for a, b in zip(outputs(torch.ops.dydilit, x, cotangent), [out, *grads.values()]): assert torch.equal(a, b)
    for normalize in (True, False):
        torch.library.opcheck(torch.ops.dydilit.attention_fwd, (*x.values(), normalize, True, 1e-6),
                              test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_routed_projection(dtype, device):
    """Nobody takes the last route. In bfloat16 on sm_90 this is F.grouped_mm, whose weight gradient once hung there."""
    x, projectors = torch.randn(2, 2048, 384) / 20, torch.randn(5, 384, 384) / 20
    router = torch.randn(384, 5)
    x[..., 0], router[:, 4], router[0, 4] = 1, 0, -30  # logit 4 is -30
    exact, cotangent = {"x": x, "projectors": projectors, "router": router}, torch.randn_like(x)
    assert dydilit.route(x, router)[0].unique().tolist() == [0, 1, 2, 3]
    inputs = {n: z.to(device) for n, z in exact.items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        assert dydilit.grouped_mm_has_a_kernel(inputs["x"].flatten(0, 1)) == (
            device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] == 9)
        out, grads = grads_of(dydilit.routed_projection, inputs, cotangent.to(device, dtype))
    exact = {n: z.double() for n, z in exact.items()}
    truth, true_grads = grads_of(dydilit.routed_projection, exact, cotangent.double())
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in ((out, truth), *((grads[n], true_grads[n]) for n in inputs)):
        assert (got.cpu().double() - want).norm() <= bound * want.norm()
    assert not true_grads["projectors"][4].any() and not grads["projectors"][4].any()
