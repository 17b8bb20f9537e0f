"""Everything that needs a GPU, in one command and below eight minutes: `python gpu.py` (or `make gpu`).

    build       the extension, with CUDA
    test        tests/test_cuda.py and tests/test_fused.py
    memcheck    compute-sanitizer on small shapes: accesses out of bounds or misaligned
    racecheck   ... and races in shared memory
    kernels     the time of every kernel in one forward and backward, against a measured copy
    bench       bench.py

A step that fails does not stop the others; out/gpu-<name>.md names the GPU and holds what each step said.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parent
BUDGET = 470  # seconds in all
PYTHON, SANITIZER = sys.executable, ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
STEPS = {  # name: (command, seconds that it may take)
    "build": ([PYTHON, "setup.py", "build_ext", "--inplace"], 180),
    "test": ([PYTHON, "-m", "pytest", "tests/test_cuda.py", "tests/test_fused.py", "-k",
              "not emulated and not compile"], 120),
    "memcheck": ([*SANITIZER, "memcheck", PYTHON, "gpu.py", "--small"], 45),
    "racecheck": ([*SANITIZER, "racecheck", PYTHON, "gpu.py", "--small"], 45),
    "kernels": ([PYTHON, "gpu.py", "--kernels"], 40),
    "bench": ([PYTHON, "bench.py"], BUDGET),
}


def inputs(B, N, D, n, dtype):
    tokens = [torch.randn(B, N, D, device="cuda", dtype=dtype) for _ in range(5)]
    gamma, lam = torch.full((n,), 3.0, device="cuda"), torch.full((n,), 0.01, device="cuda")
    routers = (torch.randn(size, D, n, device="cuda") / D**0.5 for size in (4, 4))
    kernel_routers, difference_routers = routers
    return [*tokens, gamma, lam, kernel_routers, difference_routers.view(2, 2 * D, n)]


def once(x, normalize=True):
    """Forward and backward, the operators alone."""
    ops, settings = torch.ops.dydilit, (normalize, True, 1e-6)
    out, *kept = ops.attention_fwd(*x, *settings)
    return ops.attention_bwd(torch.ones_like(out), *x, *settings, *kept)


def small():
    """What the sanitizers watch: both orders of the products, every type, vector and scalar loads, wide rows."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for B, N, D, n in ((2, 5, 64, 9), (1, 70, 33, 17), (1, 3, 1000, 3)):
            once(inputs(B, N, D, n, dtype))
    torch.cuda.synchronize()


# Passes over a (B, N, D) bfloat16 tensor that a kernel makes, reads and writes together; the products are cuBLAS's
PASSES = {"features_kernel": 6, "features_backward_kernel": 14, "sum_keys_kernel": 1, "denominator_kernel": 3,
          "divide_kernel": 2, "denominator_backward_kernel": 3, "sum_keys_backward_kernel": 3}


def kernels(B=256, N=256, D=384, n=9, repeats=20):
    sets = [inputs(B, N, D, n, torch.bfloat16) for _ in range(3)]  # in turn: more than the cache holds
    for x in sets: once(x)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    copy = 2 * source.nbytes / sorted(times)[5] / 1e9  # TB/s, read and written
    del source, target
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(repeats): once(sets[i % 3])
        torch.cuda.synchronize()
    spent = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"^void |\(.*", "", event.name.replace("(anonymous namespace)::", ""))
            spent[re.sub(r"dydilit::cuda::|<.*", "", name)].append(event.device_time)
    total = sum(map(sum, spent.values()))
    print(f"B {B}, N {N}, D {D}, n_F = n_D = {n}, bfloat16, normalised, straight-through; "
          f"a copy moves {copy:.2f} TB/s\n")
    print("| kernel | calls | us per forward + backward | share | TB/s | of the copy |\n|---|---:|---:|---:|---:|---:|")
    for name, t in sorted(spent.items(), key=lambda item: -sum(item[1])):
        line = f"| {name[:60]} | {len(t) / repeats:.0f} | {sum(t) / repeats:.1f} | {sum(t) / total:.0%} |"
        if name in PASSES:
            rate = PASSES[name] * B * N * D * 2 * repeats / sum(t) / 1e6
            line += f" {rate:.2f} | {rate / copy:.0%} |"
        else:
            line += " | |"
        print(line)
    print(f"| all | | {total / repeats:.1f} | 100% | | |")


def run(name, command, limit, environment):
    start = time.time()
    if shutil.which(command[0]) is None:
        return f"## {name}: not run, no {command[0]} here\n", False
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        verdict, said = ("ok" if done.returncode == 0 else f"FAILED, exit status {done.returncode}"), done.stdout
    except subprocess.TimeoutExpired as error:
        verdict, said = f"FAILED, not done after {limit} s", (error.stdout or b"").decode(errors="replace")
    quoted = said[-6000:].strip() if name in ("kernels", "bench") else f"```\n{said[-3000:].strip()}\n```"
    title = f"## {name}: {verdict}, {time.time() - start:.0f} s"
    return f"{title}\n\n`{' '.join(map(os.path.basename, command))}`\n\n{quoted}\n", verdict == "ok"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one small call of everything, for a sanitizer")
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel, as Markdown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no GPU")
    if args.small or args.kernels:
        import dydilit_C  # noqa: F401  registers the operators

        return small() if args.small else kernels()

    device = torch.cuda.get_device_properties(0)
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    release = re.search(r"release [\d.]+", nvcc)
    report = [f"# {device.name}\n\ncompute capability {device.major}.{device.minor}, {device.multi_processor_count} "
              f"multiprocessors, {device.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, nvcc "
              f"{release.group() if release else 'absent'}\n"]
    path = ROOT / "out" / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', device.name)}.md"
    path.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "DYDILIT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{device.major}.{device.minor}"}
    failed, start = [], time.time()
    for name, (command, limit) in STEPS.items():
        text, ok = run(name, command, min(limit, start + BUDGET - time.time()), environment)
        report.append(text)
        path.write_text("\n".join(report))  # what is known so far, if the GPU is taken away
        print(text, flush=True)
        if not ok: failed.append(name)
    print(f"{path.relative_to(ROOT)}: {'all steps passed' if not failed else 'failed: ' + ', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
