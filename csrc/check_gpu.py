"""Every check that needs a GPU, in one command and under eight minutes: `make gpu`.

    python -m csrc.check_gpu

    build       the extension, with CUDA
    test        the tests of tests/test_fused.py and tests/csrc/test_cuda.py that need a GPU
    kernels     the time of every kernel in one forward and backward, against a measured copy
    bench       csrc/bench.py at the training shape of S/2: Python path, torch.compile, softmax
    sizes       csrc/bench.py at longer and wider shapes, without torch.compile, and a plot over N
    models      experiments/on_gpu.py: steps of whole models beside DiT and Sana, as many as fit
    memcheck    compute-sanitizer on small shapes: accesses out of bounds or misaligned
    racecheck   the same for races in shared memory

A step that fails does not stop the others. out/gpu-<name>.md names the GPU and holds the end of
each step's output, out/gpu-<name>.<step>.log all of it. For whoever has a GPU; imports torch only.
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

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
THIS = [PYTHON, "-m", "csrc.check_gpu"]
MARKDOWN = ("kernels", "bench", "sizes", "models")  # steps whose output is Markdown


class Step(NamedTuple):
    command: list
    seconds: int  # its share of the time; it may also use the time that earlier steps left over
    environment: tuple = ()  # pairs of name and value


def steps(stem):
    """{name: Step}; the shares add up to 470 s.

    The sanitizers come last because they are the likeliest to hang.
    """
    # --report-api-errors no: at its import PyTorch tries driver calls that not every driver has. A
    # failed launch of our kernels raises an error anyway. --kernel-name: patch our kernels only, or
    # the sanitizer would spend its time on PyTorch's.
    sanitizer = [
        "compute-sanitizer",
        *("--error-exitcode", "1"),
        *("--report-api-errors", "no"),
        *("--kernel-name", "kns=dydilit"),
        "--tool",
    ]
    # Without the caching allocator every tensor is an allocation of its own, so the sanitizer sees
    # an access beyond its end.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    quietly = [PYTHON, "-W", "ignore", "-m"]  # a table with nothing in between
    bench = [*quietly, "csrc.bench", "--dtype", "bfloat16"]
    test = [
        *(PYTHON, "-m", "pytest"),
        "tests/test_fused.py",
        "tests/csrc/test_cuda.py",
        *("-k", "cuda and not cpu and not emulated and not compile"),
        *("-vv", "--tb=short"),
        *("-W", "default"),  # a warning of PyTorch is no failure here
        "--continue-on-collection-errors",  # hypothesis may be absent; the other files still run
        *("-o", "faulthandler_timeout=60"),  # the traceback of a test that hangs
    ]
    return {
        "build": Step([*THIS, "build"], 90),  # six files, in parallel by ninja
        "test": Step(test, 75),
        "kernels": Step([*THIS, "kernels"], 20),
        "bench": Step([*bench, "--size", "256", "256", "384", "9"], 65),  # torch.compile, twice
        "sizes": Step([*bench, "--no-compile", "--plot", f"{stem}.png"], 70),
        "models": Step([*quietly, "experiments.on_gpu"], 100),
        "memcheck": Step([*sanitizer, "memcheck", "--padding", "32", *THIS, "small"], 25, uncached),
        "racecheck": Step([*sanitizer, "racecheck", *THIS, "races"], 25, uncached),
    }


# --------------------------------------------------------------------------------------------------
# Parts: steps that this file does itself.


def build():
    """Build the extension; exit with a message if the result has no CUDA or is for another torch.

    --force, because setuptools takes any extension younger than its sources, one without CUDA too.
    """
    command = [PYTHON, "setup.py", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=ROOT, check=True)
    info = importlib.import_module("dydilit_C").build_info()
    print(info)
    if not info["cuda_archs"] or info["torch"] != torch.__version__.split("+")[0]:
        sys.exit(f"check_gpu.py: this extension is not one with CUDA for torch {torch.__version__}")


def inputs(B, N, D, n, dtype):
    """The nine tensors of the op, on the GPU."""
    tokens = [torch.randn(B, N, D, device="cuda", dtype=dtype) for _ in range(5)]
    gamma = torch.full((n,), 3.0, device="cuda")
    lam = torch.full((n,), 0.01, device="cuda")
    kernel_routers = torch.randn(4, D, n, device="cuda") / D**0.5
    difference_routers = torch.randn(2, 2 * D, n, device="cuda") / D**0.5
    return [*tokens, gamma, lam, kernel_routers, difference_routers]


def once(x, normalize=True):
    """Forward and backward of the operators alone, without autograd."""
    ops = torch.ops.dydilit
    settings = (normalize, True, 1e-6)  # normalize, router_grad, eps
    out, *kept = ops.attention_fwd(*x, *settings)
    return ops.attention_bwd(torch.ones_like(out), *x, *settings, *kept)


def small(dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """memcheck's input: both orders of the products, every dtype, vector and scalar loads."""
    importlib.import_module("dydilit_C")  # registers the operators
    for dtype in dtypes:
        for B, N, D, n in ((2, 5, 64, 9), (1, 70, 33, 17), (1, 3, 1200, 3)):
            once(inputs(B, N, D, n, dtype))
    torch.cuda.synchronize()


def races():
    """racecheck's input. It stops at an illegal access in cuBLAS's bfloat16 products of D % 8 == 0,
    also without this op (compute-sanitizer 2025.3, H100). float16 has products of float32 numbers.
    """
    small((torch.float32, torch.float16))
    once(inputs(1, 70, 33, 17, torch.bfloat16))
    torch.cuda.synchronize()


# How many (B, N, D) bfloat16 tensors each kernel reads and writes. (The products are cuBLAS's.)
PASSES = {
    "features_kernel": 6,
    "features_backward_kernel": 14,
    "divide_kernel": 4,
    "denominator_backward_kernel": 3,
    "sum_keys_backward_kernel": 3,
}


def kernels(B=256, N=256, D=384, n=9, repeats=20):
    """Print the time of every kernel, and its memory traffic beside that of a copy."""
    importlib.import_module("dydilit_C")
    sets = [inputs(B, N, D, n, torch.bfloat16) for _ in range(3)]  # together larger than the cache
    for x in sets:
        once(x)
    copy = copy_rate()
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as profile:
        for i in range(repeats):
            once(sets[i % 3])
        torch.cuda.synchronize()
    spent = defaultdict(list)  # {kernel: microseconds of every call}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[short_name(event.name)].append(event.device_time)
    total = sum(map(sum, spent.values()))
    print(
        f"B {B}, N {N}, D {D}, n_F = n_D = {n}, bfloat16, normalised, straight-through; "
        f"a copy moves {copy:.2f} TB/s\n"
    )
    print("| kernel | calls | us per forward + backward | share | TB/s | of the copy |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, t in sorted(spent.items(), key=lambda item: -sum(item[1])):
        cells = [
            name[:60],
            f"{len(t) / repeats:.0f}",
            f"{sum(t) / repeats:.1f}",
            f"{sum(t) / total:.0%}",
        ]
        if name in PASSES:
            rate = PASSES[name] * B * N * D * 2 * repeats / sum(t) / 1e6
            cells += [f"{rate:.2f}", f"{rate / copy:.0%}"]
        else:
            cells += ["", ""]
        print(f"| {' | '.join(cells)} |")
    print(f"| all | | {total / repeats:.1f} | 100% | | |")


def copy_rate():
    """TB/s, read and written, of a copy of 2 GiB."""
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
    return 2 * source.nbytes / sorted(times)[5] / 1e9


def short_name(kernel):
    """Of `void dydilit::cuda::features_kernel<float>(..)`: features_kernel."""
    name = kernel.replace("(anonymous namespace)::", "")
    name = re.sub(r"^void |\(.*", "", name)
    return re.sub(r"dydilit::cuda::|<.*", "", name)


# --------------------------------------------------------------------------------------------------
# All steps.


def run(command, limit, environment, log):
    """Its exit status, or None if it was stopped at the limit. Its output goes to the file `log`.

    Afterwards the command and all processes that it started are killed.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)  # a process that waits for a hung GPU does not die


def verdict(name, code, said):
    """The step's result in words: ok, what was wrong, or why it could not run."""
    rows = re.findall(r"^\| (?:training|sampling) .*", said, re.M)
    if name == "models" and rows and not code:
        failed = sum("| failed: " in row for row in rows)
        end = "ok" if code == 0 else "cut short at its time limit"
        return f"{end}, but {failed} of {len(rows)} rows failed" if failed else end
    if code is None:
        return "FAILED, stopped at its time limit"
    if "Device not supported" in said:
        return "not run, compute-sanitizer does not know this GPU or its driver"
    if code:
        return f"FAILED, exit status {code}"
    if name == "test" and not re.search(r"\b[1-9]\d* passed", said):
        return "FAILED, no test ran on the GPU"
    return "ok"


def environment_of(device):
    """The environment of the steps on the GPU with these properties."""
    # torch looks for ninja on PATH; in a virtual environment ninja lies beside the interpreter
    path = f"{Path(PYTHON).parent}:{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONUNBUFFERED": "1",  # output from before a kill is in the log
        "DYDILIT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{device.major}.{device.minor}+PTX",
    }


def title(device, path):
    """The head of the report: the GPU, and the versions of torch and nvcc."""
    release = None
    if nvcc := shutil.which("nvcc", path=path):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release [\d.]+", said)
    return (
        f"# {device.name}\n\n"
        f"compute capability {device.major}.{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, "
        f"{device.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, "
        f"nvcc {release.group() if release else 'absent'}\n"
    )


def ending(name, result, said):
    """The end of a step's output, as Markdown."""
    if name in MARKDOWN and "FAILED" not in result:
        return said[-8000:]
    return f"```\n{said[-3000:]}\n```" if said else ""


def check(device):
    """Run every step and write the report; exit status 1 if a step failed."""
    stem = ROOT / "out" / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', device.name)}"
    stem.parent.mkdir(exist_ok=True)
    environment = environment_of(device)
    path = environment["PATH"]
    report = [title(device, path)]
    verdicts = {}
    deadline = time.time()
    for name, step in steps(stem).items():
        deadline += step.seconds
        start = time.time()
        log = Path(f"{stem}.{name}.log")
        if shutil.which(step.command[0], path=path):
            limit = deadline - start
            code = run(step.command, limit, environment | dict(step.environment), log)
            said = log.read_text(errors="replace").strip()
            verdicts[name] = verdict(name, code, said)
        else:
            said = ""
            verdicts[name] = f"not run, no {step.command[0]} here"
        command = " ".join(map(os.path.basename, step.command))
        report.append(
            f"## {name}: {verdicts[name]}, {time.time() - start:.0f} s\n\n"
            f"`{command}`\n\n"
            f"{ending(name, verdicts[name], said)}\n"
        )
        Path(f"{stem}.md").write_text("\n".join(report))  # after each step: the GPU may be lost
        print(report[-1], flush=True)
    amiss = [f"{name} {what}" for name, what in verdicts.items() if what != "ok"]
    print(f"{stem.relative_to(ROOT)}.md: {'; '.join(amiss) or 'all steps passed'}")
    sys.exit(any("FAILED" in what for what in verdicts.values()))


def main():
    parts = {"build": build, "small": small, "races": races, "kernels": kernels}
    parser = argparse.ArgumentParser(
        prog="python -m csrc.check_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "part", nargs="?", choices=parts, help="one part alone; small, races: the sanitizers' input"
    )
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        sys.exit(f"check_gpu.py: torch {torch.__version__} sees no GPU")
    if part:
        parts[part]()
    else:
        check(torch.cuda.get_device_properties(0))


if __name__ == "__main__":
    main()
