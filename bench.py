"""Speed of the attention: the Python path, torch.compile of it, the fused op, and softmax attention of the same width.

    python bench.py                          # this machine's GPU if there is one, else its CPU; a Markdown table
    OMP_NUM_THREADS=1 python bench.py        # one thread
    python bench.py --dtype bfloat16 --plot bench.png
    python bench.py --size 8 256 384 9       # B, N, D, n_F = n_D; as often as you like
    python bench.py --step                   # a training step of S/2, with and without the fused op
    python bench.py --memory                 # what a training step of S/2 keeps; --no-fused for the Python path
    python bench.py --flops                  # multiply-adds of every compared model beside the paper's GFLOPs

--step and --memory run on the CPU, and take every --preset, those of baselines.py too.

All of them run in one process, in turn, so that whatever else the machine does hits them alike; a cell is the median of
--repeats calls and, behind it, the fastest. The error is the largest one of output and gradients against float64,
relative to the largest entry, for as long as float64 takes no minutes. On a GPU softmax attention is there with each of
PyTorch's kernels, and GiB is what forward and backward together take at their peak, beyond the inputs.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dydilit
from baselines import multiply_adds, preset
from dydilit import Diffusion, dydila_attention
from sample_min import keep_memory

# (B, N, D, n_F = n_D)
CPU_SIZES = [(8, 256, 384, 9), (2, 1024, 768, 21), (1, 4096, 768, 21)]
GPU_SIZES = [(256, 256, 384, 9), (256, 256, 512, 15), (256, 256, 768, 21), (64, 1024, 768, 21), (4, 4096, 768, 21),
             (1, 16384, 768, 21)]
PLOT_N = {"cpu": [64, 128, 256, 512, 1024, 2048], "cuda": [256, 512, 1024, 2048, 4096, 8192, 16384]}


def inputs(B, N, D, n, dtype, device):
    """Tensors as at the start of training (gamma near 3, lambda near 0.01, so that routes differ), and a cotangent."""
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randn(B, N, D, generator=g).to(device, dtype) for _ in range(6)]
    gamma, lam = 3 + torch.rand(n, generator=g), 0.01 * torch.rand(n, generator=g)
    routers = [torch.randn(4, D, n, generator=g) / D**0.5, torch.randn(2, 2 * D, n, generator=g) / D**0.5]
    leaves = [t.to(device).requires_grad_() for t in [*tokens[:5], gamma, lam, *routers]]
    return leaves, tokens[5]


def attention(backend):
    return lambda *leaves: dydila_attention(*leaves, backend=backend)


def softmax_attention(kernel=None):
    """Heads of 64 channels, as fast kernels want them. It does not read q', k': fewer inputs, another function."""
    def attend(q, k, q_prime, k_prime, v, *_):
        heads = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kernel) if kernel else nullcontext():
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    return attend


def contestants(device, compiled=True):
    table = {"reference": attention("reference")}
    if compiled:
        torch.compiler.reset()  # other sizes count too, and beyond eight compilations it would silently run eagerly
        table["torch.compile"] = torch.compile(attention("reference"), dynamic=False)
    if device in dydilit.FUSED_DEVICES: table["fused"] = attention("fused")
    if device == "cpu": return table | {"softmax, 64-wide heads": softmax_attention()}
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return table | {f"softmax, {kernel.name.lower()}": softmax_attention(kernel) for kernel in kernels}


def forward(f, leaves, dout):
    with torch.no_grad():
        return f(*leaves)


def forward_backward(f, leaves, dout):
    out = f(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout, allow_unused=True)]


def seconds(run, device):
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(table, step, leaves, dout, device, repeats):
    """{name: times}: every contestant once per round, so that all see the same machine."""
    for name, f in list(table.items()):
        try:
            for _ in range(3): step(f, leaves, dout)  # compiles, allocates
        except RuntimeError as e:
            if not name.startswith("softmax"): raise
            print(f"{name} is left out: {e}", file=sys.stderr)  # not every kernel takes every dtype and size
            del table[name]
    times = {name: [] for name in table}
    for _ in range(repeats):
        for name, f in table.items():
            times[name].append(seconds(lambda f=f: step(f, leaves, dout), device))
    return times


def errors(table, leaves, dout):
    """{name: largest error of output and gradients against float64}. A route that float64 changes would show."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = forward_backward(attention("reference"), exact, dout.double())
    result = {}
    for name, f in table.items():
        if name.startswith("softmax"): continue
        got = forward_backward(f, leaves, dout)
        worst = [((g.double() - t).abs().max() / t.abs().max()).item() for g, t in zip(got, truth)]
        result[name] = max(worst)
    return result


def peak_on_gpu(f, leaves, dout):
    """GiB that a forward and backward takes beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(f, leaves, dout)
    return (torch.cuda.max_memory_allocated() - before) / GIB


def cell(times):
    return f"{1e3 * statistics.median(times):.2f} ({1e3 * min(times):.2f})"


def report(size, dtype, device, repeats, compiled):
    B, N, D, n = size
    leaves, dout = inputs(*size, dtype, device)
    table = contestants(device, compiled)
    fwd, both = (measure(table, step, leaves, dout, device, repeats) for step in (forward, forward_backward))
    error = errors(table, leaves, dout) if B * N <= (65536 if device == "cuda" else 4096) else {}
    print(f"\n**B {B}, N {N}, D {D}, n_F = n_D = {n}, {str(dtype)[6:]}, {device}** (ms: median, fastest)\n")
    on_gpu = device == "cuda"
    print("| | forward | x fused | forward + backward | x fused | error |" + on_gpu * " GiB |")
    print((6 + on_gpu) * "|---" + "|")
    for name, f in table.items():
        ratios = [f"{statistics.median(t[name]) / statistics.median(t['fused']):.2f}" if "fused" in t else "-"
                  for t in (fwd, both)]
        shown = f"{error[name]:.1e}" if name in error else "-"
        if on_gpu: shown += f" | {peak_on_gpu(f, leaves, dout):.2f}"
        print(f"| {name} | {cell(fwd[name])} | {ratios[0]} | {cell(both[name])} | {ratios[1]} | {shown} |", flush=True)


def plot(path, dtype, device, repeats):
    """Forward + backward time against N, at D 384 and B N constant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, sizes = {}, PLOT_N[device]
    for N in sizes:
        leaves, dout = inputs(max(1, sizes[-1] // N), N, 384, 9, dtype, device)
        for name, times in measure(contestants(device, False), forward_backward, leaves, dout, device, repeats).items():
            lines.setdefault(name, []).append((N, 1e6 * min(times) / (dout.shape[0] * N)))
    axes = plt.figure(figsize=(6, 3.8), layout="constrained").gca()
    for name, points in lines.items(): axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="N, tokens per image", xticks=sizes, xticklabels=sizes,
             ylabel="microseconds per token, forward and backward",
             title=f"D 384, {str(dtype)[6:]}, {machine(device)}")
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    plt.savefig(path, dpi=130)


GIB = 2**30


def peak():
    """Peak resident memory of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def saved_by(model, run):
    """Counter of bytes saved for backward while run() is computed: {innermost named part: bytes}."""
    stack, seen, saved = ["rest"], set(), Counter()

    def named(name, function):
        def wrapped(*args, **kwargs):
            stack.append(name)
            try: return function(*args, **kwargs)
            finally: stack.pop()
        return wrapped

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not tensor.is_leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved[stack[-1]] += storage.nbytes()
        return tensor

    parts = ("routed_projection", "measure", "difference", "linear_attention")
    originals = {name: getattr(dydilit, name) for name in parts}
    for name in parts: setattr(dydilit, name, named(f"{name}()", originals[name]))
    for module in model.modules():
        if type(module).__name__ in ("DyDiLA", "GLUMBConv", "Block", "DWC"):
            module.forward = named(f"{type(module).__name__}, itself", module.forward)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return run(), saved
    finally:
        for name in parts: setattr(dydilit, name, originals[name])


def training(name, batch):
    """A model, its optimiser, and a function that computes the loss of a batch."""
    config = preset(name)
    model, size = config.build(), (batch, config.in_channels, config.input_size, config.input_size)
    x, noise, y, t = torch.randn(size), torch.randn(size), torch.arange(batch), torch.arange(batch) * 60 % 1000
    print(f"{name}, {(config.input_size // config.patch_size) ** 2} tokens, {batch} images, float32\n")
    return model, torch.optim.AdamW(model.parameters(), fused=True), lambda: sum(
        Diffusion().loss(model, x, y, t, noise)).mean()


def memory(name, batch):
    model, optimizer, loss_of = training(name, batch)
    before = peak()
    loss, saved = saved_by(model, loss_of)
    forward = peak()
    loss.backward()
    optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    print("| peak resident | GiB |\n|---|---:|")
    print(f"| before the step (torch, {parameters / 1e6:.1f} M parameters) | {before:.2f} |")
    print(f"| after the forward pass | {forward:.2f} |\n| after the whole step | {peak():.2f} |\n")
    print("| saved for backward by | GiB | share |\n|---|---:|---:|")
    for part, n in saved.most_common(): print(f"| {part} | {n / GIB:.2f} | {n / saved.total():.0%} |")


def training_step(name, batch, repeats):
    """Time of a whole step with and without the fused op, in turn, and where the faster one spends it."""
    _, optimizer, loss_of = training(name, batch)
    devices = {"Python path": (), "fused op": dydilit.FUSED_DEVICES}

    def step(which):
        dydilit.FUSED_DEVICES = devices[which]
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    times = {which: [] for which in devices}
    for i in range(repeats + 1):  # the first is a warm-up
        for which in devices:
            start = time.perf_counter()
            step(which)
            if i: times[which].append(time.perf_counter() - start)
    print("| a training step | s: median (fastest) | ratio of medians |\n|---|---:|---:|")
    for which, t in times.items():
        ratio = statistics.median(times["Python path"]) / statistics.median(t)
        print(f"| {which} | {statistics.median(t):.3f} ({min(t):.3f}) | {ratio:.2f} |")
    with torch.profiler.profile() as profile: step("fused op")
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print("\n| operator, fused op | share of its time |\n|---|---:|")
    for e in events[:12]: print(f"| `{e.key}` | {e.self_cpu_time_total / total:.1%} |")


# The paper's GFLOPs columns: (table, pixels, size): {model: printed}. Table 5 is "S, map-wise"; no other table has one.
PAPER_GFLOPS = {
    ("1", 256, "S/2"): {"DiT": 6.06, "DiG": 5.92, "PixArt": 5.78, "EDiT": 5.91, "Sana": 5.97, "DyDi-LiT": 5.98},
    ("1", 256, "B/2"): {"DiT": 10.50, "DiG": 10.43, "PixArt": 10.13, "EDiT": 10.45, "Sana": 10.38, "DyDi-LiT": 10.39},
    ("1", 256, "L/2"): {"DiT": 23.01, "DiG": 23.58, "PixArt": 22.45, "EDiT": 23.39, "Sana": 22.83, "DyDi-LiT": 22.85},
    ("2", 512, "L/2"): {"DiT": 106.42, "DiG": 94.15, "PixArt": 97.38, "EDiT": 96.17, "Sana": 98.46, "DyDi-LiT": 98.55},
    ("5", 256, "S/2"): {"map-wise": 6.45, "ladder-4-difference": 5.98},
    (None, 256, "S/2"): {"MoH": None, "LiT": None, "FLatten": None},  # Table 3 has no column; FLatten is no model there
}


def counted(pixels, size, model):
    """(blocks, billions of multiply-adds that the paper's columns count, those that they leave out)."""
    config = preset(size if model == "DyDi-LiT" else f"{model}-{size}")
    return config.depth, *(x / 1e9 for x in multiply_adds(replace(config, input_size=pixels // 8)))


def flops():
    """What baselines.multiply_adds says of every compared model, as Markdown."""
    print("| table | model | blocks | paper | counted | | left out | total |\n|---|---|---:|---:|---:|---:|---:|---:|")
    for (table, pixels, size), models in PAPER_GFLOPS.items():
        for model, printed in models.items():
            depth, gflops, left_out = counted(pixels, size, model)
            shown, error = (f"{printed:.2f}", f"{gflops / printed - 1:+.2%}") if printed else ("", "")
            print(f"| {table or ''} | {model}, {size}, {pixels} px | {depth} | {shown} | {gflops:.2f} | {error} | "
                  f"{f'{left_out:.2f}' if left_out else ''} | {gflops + left_out:.2f} |")


def machine(device):
    if device == "cuda": return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--size", nargs=4, type=int, action="append", metavar=("B", "N", "D", "n"),
                        help="instead of the usual sizes; n is n_F and n_D")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, a minute for each size")
    parser.add_argument("--plot", metavar="FILE", help="also draw time against N")
    parser.add_argument("--step", action="store_true", help="a training step, with and without the fused op")
    parser.add_argument("--memory", action="store_true", help="the memory of a training step, and what keeps it")
    parser.add_argument("--flops", action="store_true", help="multiply-adds beside the paper's GFLOPs")
    parser.add_argument("--no-fused", action="store_true", help="as if the fused op had not been built")
    parser.add_argument("--preset", default="S/2", help="of --step and --memory (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="of --step and --memory (default %(default)s)")
    args = parser.parse_args()
    if args.flops: return flops()
    try: preset(args.preset)
    except ValueError as e: parser.error(str(e))
    if args.threads: torch.set_num_threads(args.threads)
    if args.no_fused: dydilit.FUSED_DEVICES = ()
    elif not dydilit.FUSED_DEVICES:
        print("the fused op is not built: python setup.py build_ext --inplace", file=sys.stderr)
    dtype = getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine(device)}; torch {torch.__version__}")
    if args.memory: return memory(args.preset, args.batch)
    if device == "cpu": keep_memory()  # as train_min.py does; else page faults fall on one or the other by chance
    if args.step: return training_step(args.preset, args.batch, args.repeats)
    for size in args.size or (GPU_SIZES if device == "cuda" else CPU_SIZES):
        report(size, dtype, device, args.repeats, not args.no_compile)
    if args.plot: plot(args.plot, dtype, device, args.repeats)


if __name__ == "__main__":
    main()
