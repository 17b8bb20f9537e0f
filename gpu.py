"""Everything that needs a GPU, in one command and below eight minutes: `python gpu.py` (or `make gpu`).

    build       the extension, with CUDA
    test        what tests/test_fused.py and tests/test_cuda.py have for a GPU
    kernels     the time of every kernel in one forward and backward, against a measured copy
    bench       bench.py at the training shape of S/2, against the Python path, torch.compile and softmax attention
    sizes       bench.py at longer and wider shapes, without torch.compile, and a plot against N
    memcheck    compute-sanitizer on small shapes: accesses out of bounds or misaligned
    racecheck   ... and races in shared memory

A step that fails does not stop the others. out/gpu-<name>.md names the GPU and holds the end of what each step said,
out/gpu-<name>.<step>.log all of it.
"""

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent
PYTHON = sys.executable
MARKDOWN = ("kernels", "bench", "sizes")  # steps that print it


class Step(NamedTuple):
    command: list
    seconds: int  # its share of the time; what earlier steps left of theirs comes on top
    environment: tuple = ()  # names and values


def steps(stem):
    """{name: Step}. The shares add up to 470 s; figures come before the sanitizers, which are the likeliest to hang."""
    # Where the caching allocator is off, every tensor is an allocation of its own: an access beyond its end is seen.
    # compute-sanitizer patches no kernel but ours, or it would spend its time on PyTorch's, and counts no failed driver
    # call: PyTorch tries some at import that not every driver has. A failed launch of ours raises anyway.
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--report-api-errors", "no", "--kernel-name",
                 "kns=dydilit", "--tool"]
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    bench = [PYTHON, "bench.py", "--dtype", "bfloat16"]
    # test_cuda.py comes last, because its last test once hung; a warning of PyTorch fails nothing here; of a test that
    # hangs the traceback is shown. Tests whose import fails (hypothesis may be absent) do not stop the others.
    test = [PYTHON, "-m", "pytest", "tests/test_fused.py", "tests/test_cuda.py", "-k",
            "cuda and not cpu and not emulated and not compile", "-vv", "--tb=short", "-W", "default",
            "--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    return {
        "build": Step([PYTHON, "gpu.py", "build"], 110),  # six files, up to 25 s each, side by side with ninja
        "test": Step(test, 110),  # 45 s of a CPU for inputs and references
        "kernels": Step([PYTHON, "gpu.py", "kernels"], 30),
        "bench": Step([*bench, "--size", "256", "256", "384", "9"], 90),  # torch.compile, twice
        "sizes": Step([*bench, "--no-compile", "--plot", f"{stem}.png"], 50),
        "memcheck": Step([*sanitizer, "memcheck", "--padding", "32", PYTHON, "gpu.py", "small"], 40, uncached),
        "racecheck": Step([*sanitizer, "racecheck", PYTHON, "gpu.py", "small"], 40, uncached),
    }


def build():
    """--force: to setuptools an extension that is younger than its sources is done, and be it one without CUDA."""
    subprocess.run([PYTHON, "setup.py", "build_ext", "--inplace", "--force"], cwd=ROOT, check=True)
    info = importlib.import_module("dydilit_C").build_info()
    print(info)
    if not info["cuda_archs"] or info["torch"] != torch.__version__.split("+")[0]:
        sys.exit(f"gpu.py: this extension is not one with CUDA for torch {torch.__version__}")


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
    importlib.import_module("dydilit_C")  # registers the operators
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for B, N, D, n in ((2, 5, 64, 9), (1, 70, 33, 17), (1, 3, 1000, 3)):
            once(inputs(B, N, D, n, dtype))
    torch.cuda.synchronize()


# Passes over a (B, N, D) bfloat16 tensor that a kernel makes, reads and writes together; the products are cuBLAS's
PASSES = {"features_kernel": 6, "features_backward_kernel": 14, "sum_keys_kernel": 1, "denominator_kernel": 3,
          "divide_kernel": 2, "denominator_backward_kernel": 3, "sum_keys_backward_kernel": 3}


def kernels(B=256, N=256, D=384, n=9, repeats=20):
    importlib.import_module("dydilit_C")
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


def run(command, limit, environment, log):
    """Its exit status, or None if the limit ended it: it and all that it started. What it says goes to `log`."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)  # a process that waits for a hung GPU does not die


def verdict(name, code, said):
    """"ok", or what was wrong, or why a step says nothing."""
    if code is None: return "FAILED, stopped at its time limit"
    if "Device not supported" in said: return "not run, compute-sanitizer does not know this GPU or its driver"
    if code: return f"FAILED, exit status {code}"
    if name == "test" and not re.search(r"\b[1-9]\d* passed", said): return "FAILED, no test ran on the GPU"
    return "ok"


def main():
    parts = {"build": build, "small": small, "kernels": kernels}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=parts, help="of a step, alone; small: what the sanitizers watch")
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        sys.exit(f"gpu.py: torch {torch.__version__} sees no GPU")
    if part: return parts[part]()

    device = torch.cuda.get_device_properties(0)
    stem = ROOT / "out" / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', device.name)}"
    stem.parent.mkdir(exist_ok=True)
    # torch looks for ninja on PATH, which lies beside the interpreter in a virtual environment
    path = f"{Path(PYTHON).parent}:{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1",  # what was said before a kill is in the log
                   "DYDILIT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{device.major}.{device.minor}+PTX"}
    nvcc = shutil.which("nvcc", path=path)
    release = nvcc and re.search(r"release [\d.]+", subprocess.run([nvcc, "--version"], capture_output=True,
                                                                  text=True).stdout)
    report = [f"# {device.name}\n\ncompute capability {device.major}.{device.minor}, {device.multi_processor_count} "
              f"multiprocessors, {device.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, nvcc "
              f"{release.group() if release else 'absent'}\n"]
    verdicts, deadline = {}, time.time()
    for name, step in steps(stem).items():
        deadline += step.seconds
        start, log = time.time(), Path(f"{stem}.{name}.log")
        if shutil.which(step.command[0], path=path):
            code = run(step.command, deadline - start, environment | dict(step.environment), log)
            said = log.read_text(errors="replace").strip()
            verdicts[name] = verdict(name, code, said)
        else:
            said, verdicts[name] = "", f"not run, no {step.command[0]} here"
        tail = said[-8000:] if name in MARKDOWN and verdicts[name] == "ok" else f"```\n{said[-3000:]}\n```" * bool(said)
        command = " ".join(map(os.path.basename, step.command))
        report.append(f"## {name}: {verdicts[name]}, {time.time() - start:.0f} s\n\n`{command}`\n\n{tail}\n")
        Path(f"{stem}.md").write_text("\n".join(report))  # what is known so far, if the GPU is taken away
        print(report[-1], flush=True)
    amiss = [f"{name} {what}" for name, what in verdicts.items() if what != "ok"]
    print(f"{stem.relative_to(ROOT)}.md: {'; '.join(amiss) or 'all steps passed'}")
    sys.exit(any("FAILED" in what for what in verdicts.values()))


if __name__ == "__main__":
    main()
