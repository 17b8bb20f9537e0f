"""Speed of the attention: Python path, torch.compile of it, fused op, and softmax attention.

    python -m csrc.bench                          # on the GPU if there is one; Markdown tables
    python -m csrc.bench --threads 1              # one thread
    python -m csrc.bench --dtype bfloat16 --plot bench.png
    python -m csrc.bench --size 8 256 384 9       # B, N, D, n_F = n_D; may be repeated

All of them run in one process, in turn, so that other work on the machine slows all of them alike.
A cell is the median of --repeats calls and, in brackets, the fastest. The error is the largest one
of output and gradients against float64, relative to the largest entry; large sizes, where float64
would take minutes, have none. On a GPU, softmax attention is measured with each of PyTorch's
kernels, and GiB is the peak of forward and backward beyond the inputs.

A whole training step, its memory and its multiply-adds: python -m experiments.costs.
Imports dydilit.py and support/.
"""

import argparse
import statistics
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dydilit
from dydilit import dydila_attention
from support.terminal import keep_memory
from support.timing import machine, seconds

# (B, N, D, n_F = n_D)
CPU_SIZES = [(8, 256, 384, 9), (2, 1024, 768, 21), (1, 4096, 768, 21)]
GPU_SIZES = [
    (256, 256, 384, 9),
    (256, 256, 512, 15),
    (256, 256, 768, 21),
    (64, 1024, 768, 21),
    (4, 4096, 768, 21),
    (1, 16384, 768, 21),
]
PLOT_N = {
    "cpu": [64, 128, 256, 512, 1024, 2048],
    "cuda": [256, 512, 1024, 2048, 4096, 8192, 16384],
}
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}  # B N up to which errors are measured
GIB = 2**30


# --------------------------------------------------------------------------------------------------
# What is compared.


def inputs(B, N, D, n, dtype, device):
    """The nine tensors of dydila_attention, with gradients, and a cotangent of the output.

    As at the start of training: gamma near 3, lambda near 0.01, so that the routes differ.
    """
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(B, N, D, generator=g).to(device, dtype) for _ in range(6)]
    gamma = 3 + torch.rand(n, generator=g)
    lam = 0.01 * torch.rand(n, generator=g)
    kernel_routers = torch.randn(4, D, n, generator=g) / D**0.5
    difference_routers = torch.randn(2, 2 * D, n, generator=g) / D**0.5
    leaves = [*tokens[:5], gamma, lam, kernel_routers, difference_routers]
    leaves = [t.to(device).requires_grad_() for t in leaves]
    return leaves, tokens[5]


def attention(backend):
    def attend(*leaves):
        return dydila_attention(*leaves, backend=backend)

    return attend


def softmax_attention(kernel=None):
    """Heads of 64 channels, which suit fast kernels. Another function: it does not read q', k'."""

    def attend(q, k, q_prime, k_prime, v, *_):
        heads = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(kernel) if kernel else nullcontext():
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    return attend


def contestants(device, compiled=True):
    """{name: function of the nine tensors}."""
    table = {"reference": attention("reference")}
    if compiled:
        # Other sizes were compiled too. After eight compilations torch would silently run eagerly.
        torch.compiler.reset()
        table["torch.compile"] = torch.compile(attention("reference"), dynamic=False)
    if device in dydilit.FUSED_DEVICES:
        table["fused"] = attention("fused")
    if device == "cpu":
        table["softmax, 64-wide heads"] = softmax_attention()
        return table
    kernels = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    )
    for kernel in kernels:
        table[f"softmax, {kernel.name.lower()}"] = softmax_attention(kernel)
    return table


# --------------------------------------------------------------------------------------------------
# What is measured.


def forward(f, leaves, dout):
    with torch.no_grad():
        return f(*leaves)


def forward_backward(f, leaves, dout):
    """The output, and the gradients of all nine tensors."""
    out = f(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout, allow_unused=True)]


def measure(table, step, leaves, dout, device, repeats):
    """{name: times}, each contestant once per round.

    A softmax attention that cannot run is removed from the table.
    """
    for name, f in list(table.items()):
        try:
            for _ in range(3):  # compiles, allocates
                step(f, leaves, dout)
        except RuntimeError as e:  # not every kernel takes every dtype and size
            if not name.startswith("softmax"):
                raise
            print(f"{name} is left out: {e}", file=sys.stderr)
            del table[name]
    times = {name: [] for name in table}
    for _ in range(repeats):
        for name, f in table.items():
            times[name].append(seconds(lambda f=f: step(f, leaves, dout), device))
    return times


def errors(table, leaves, dout):
    """{name: largest error of output and gradients against float64}.

    A token that float64 routes otherwise is part of the error.
    """
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = forward_backward(attention("reference"), exact, dout.double())
    result = {}
    for name, f in table.items():
        if name.startswith("softmax"):
            continue
        worst = 0.0
        for got, true in zip(forward_backward(f, leaves, dout), truth):
            error = (got.double() - true).abs().max() / true.abs().max()
            worst = max(worst, error.item())
        result[name] = worst
    return result


def peak_on_gpu(f, leaves, dout):
    """GiB that a forward and backward takes at its peak beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(f, leaves, dout)
    return (torch.cuda.max_memory_allocated() - before) / GIB


# --------------------------------------------------------------------------------------------------
# Tables and plot.


def cell(times):
    """Milliseconds: median and fastest."""
    return f"{1e3 * statistics.median(times):.2f} ({1e3 * min(times):.2f})"


def ratio(times, name):
    """Median over the fused op's median."""
    if "fused" not in times:
        return "-"
    return f"{statistics.median(times[name]) / statistics.median(times['fused']):.2f}"


def report(size, dtype, device, repeats, compiled):
    """Measure one size and print its table."""
    B, N, D, n = size
    leaves, dout = inputs(*size, dtype, device)
    table = contestants(device, compiled)
    fwd = measure(table, forward, leaves, dout, device, repeats)
    both = measure(table, forward_backward, leaves, dout, device, repeats)
    error = errors(table, leaves, dout) if B * N <= MOST_TOKENS[device] else {}
    settings = f"B {B}, N {N}, D {D}, n_F = n_D = {n}, {str(dtype)[6:]}, {device}"
    columns = ["", "forward", "x fused", "forward + backward", "x fused", "error"]
    if device == "cuda":
        columns.append("GiB")
    print(f"\n**{settings}** (ms: median, fastest)\n")
    print(f"| {' | '.join(columns)} |".replace("|  |", "| |"))
    print(len(columns) * "|---" + "|")
    for name, f in table.items():
        cells = [name, cell(fwd[name]), ratio(fwd, name), cell(both[name]), ratio(both, name)]
        cells.append(f"{error[name]:.1e}" if name in error else "-")
        if device == "cuda":
            cells.append(f"{peak_on_gpu(f, leaves, dout):.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def plot(path, dtype, device, repeats):
    """Forward + backward time against N, at D 384 and B N constant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = PLOT_N[device]
    lines = {}  # {name: [(N, microseconds a token)]}
    for N in sizes:
        B = max(1, sizes[-1] // N)
        leaves, dout = inputs(B, N, 384, 9, dtype, device)
        table = contestants(device, compiled=False)
        times = measure(table, forward_backward, leaves, dout, device, repeats)
        for name, t in times.items():
            lines.setdefault(name, []).append((N, 1e6 * min(t) / (B * N)))
    axes = plt.figure(figsize=(6, 3.8), layout="constrained").gca()
    for name, points in lines.items():
        axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="N, tokens per image",
        xticks=sizes,
        xticklabels=sizes,
        ylabel="microseconds per token, forward and backward",
        title=f"D 384, {str(dtype)[6:]}, {machine(device)}",
    )
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    plt.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m csrc.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    option("--repeats", type=int, default=15, help="default: %(default)s")
    option("--threads", type=int, help="CPU threads (default: torch's)")
    option(
        "--size",
        nargs=4,
        type=int,
        action="append",
        metavar=("B", "N", "D", "n"),
        help="instead of the usual sizes; n is n_F and n_D",
    )
    option("--no-compile", action="store_true", help="without torch.compile, a minute a size")
    option("--no-fused", action="store_true", help="as if the fused op had not been built")
    option("--plot", metavar="FILE", help="also draw time against N")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.no_fused:
        dydilit.FUSED_DEVICES = ()
    elif not dydilit.FUSED_DEVICES:
        print("the fused op is not built: python setup.py build_ext --inplace", file=sys.stderr)
    dtype = getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine(device)}; torch {torch.__version__}")
    if device == "cpu":
        keep_memory()  # as train_min.py does; page faults would slow one or the other by chance
    for size in args.size or (GPU_SIZES if device == "cuda" else CPU_SIZES):
        report(size, dtype, device, args.repeats, not args.no_compile)
    if args.plot:
        plot(args.plot, dtype, device, args.repeats)


if __name__ == "__main__":
    main()
