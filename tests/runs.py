"""For test_train.py and test_scripts.py: a tiny run, its processes, and, as a script, what torchrun starts for them."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dydilit  # noqa: E402
from dydilit import Config, Training, train  # noqa: E402

# The run that every comparison repeats: warm-up, decay, averaging, a held-out loss and a checkpoint all happen in it.
CONFIG = Config(input_size=8, in_channels=1, hidden_size=16, depth=1, n_projectors=2, n_kernels=3, n_lambdas=3,
                num_classes=10)
RUN = Training(steps=6, batch_size=8, lr=1e-2, warmup=2, decay=0.5, ema_decay=0.9, log_every=1, eval_every=2,
               ckpt_every=3)


def prepare_digits(folder):
    runpy.run_path(str(ROOT / "data" / "digits" / "prepare.py"))["prepare"](folder)
    return folder


def flags(**values):
    """{"micro_batch": 4, "bf16": False} -> ["--micro-batch=4", "--no-bf16"]"""
    return [f"--{'' if value else 'no-'}{name.replace('_', '-')}" if isinstance(value, bool) else
            f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def start(*command):
    """A process in the repository's root, on the CPU, with warnings as errors and, since the bits depend on it, one
    thread, as in the tests."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | settings,
    )


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", *arguments)


def finish(process, timeout=120):
    """Its stdout and stderr. After `timeout` it is told to stop; torchrun then ends its workers, by force if needed."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(f"still running after {timeout} s:\n{process.communicate(timeout=60)}") from None


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def differing(a, b, tolerance=None):
    """Where two nested dicts, lists and tensors differ, as a list of paths: in any bit, or by more than tolerance."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [f"{k}/{path}" for k in a for path in differing(a[k], b[k], tolerance)]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [f"{i}/{path}" for i, (x, y) in enumerate(zip(a, b)) for path in differing(x, y, tolerance)]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
        worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        same = torch.equal(a, b) if tolerance is None else worst <= tolerance
        return [] if same else [f" differs by {worst:.2e}"]
    if isinstance(a, float) and isinstance(b, float) and tolerance is not None:
        return [] if abs(a - b) <= tolerance else [f" {a!r} {b!r}"]
    return [] if type(a) is type(b) and a == b else [f" {a!r} {b!r}"]


# ---------------------------------------------------------------------------------------------------------------------
# As a script: torchrun tests/runs.py together|killed DATA OUT


def at_step(action):
    """Call action(step) in the main thread, at the start of every step of `train`."""
    original = dydilit.learning_rate

    def learning_rate(training, step):
        action(step)
        return original(training, step)

    dydilit.learning_rate = learning_rate


def together(data, out, rank):
    """In one launch: a plain run; one in micro-batches, counting reductions; one that rank 1 is told to stop, and its
    continuation; one whose checkpoint only rank 0 can see."""
    run = replace(RUN, data=data)
    train(CONFIG, replace(run, out=f"{out}/plain"))

    reductions, DDP = [], torch.nn.parallel.DistributedDataParallel

    class Counting(DDP):
        def __init__(self, model):
            super().__init__(model)
            self.register_comm_hook(None, self.count)

        def count(self, state, bucket):
            reductions.extend([bucket.is_last()] * bucket.is_last())
            return allreduce_hook(state, bucket)

    torch.nn.parallel.DistributedDataParallel = Counting
    train(CONFIG, replace(run, out=f"{out}/accumulated", micro_batch=2))
    torch.nn.parallel.DistributedDataParallel = DDP

    at_step(lambda step: os.kill(os.getpid(), signal.SIGTERM) if (step, rank, stopped) == (1, 1, []) else None)
    stopped = []
    stopped.append(train(CONFIG, replace(run, out=f"{out}/stopped")))
    train(CONFIG, replace(run, out=f"{out}/stopped"), resume=True)

    if rank == 0:
        shutil.copytree(f"{out}/plain", f"{out}/apart0")
    try:
        train(CONFIG, replace(run, out=f"{out}/apart{rank}"), resume=True)
        message = "trained"
    except ValueError as e:
        message = str(e)
    found = {"reductions": len(reductions), "stopped": stopped[0], "apart": message}
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))


def killed(data, out, rank):
    """Rank 1 dies without a word at step 4, but only once. Each attempt leaves its first step in a file."""
    attempt, first = len(list(Path(out).glob(f"first_step_*_{rank}"))), []

    def action(step):
        if not first:
            first.append(step)
            Path(out, f"first_step_{attempt}_{rank}").write_text(str(step))
        if (step, rank, attempt) == (4, 1, 0):
            os.kill(os.getpid(), signal.SIGKILL)

    at_step(action)
    train(CONFIG, replace(RUN, data=data, out=f"{out}/run"), resume=True)


if __name__ == "__main__":
    {"together": together, "killed": killed}[sys.argv[1]](*sys.argv[2:4], int(os.environ["RANK"]))
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may hold the hook's callbacks still: to release them while Python ends is an abort
