"""What tests of training, data and commands share: a tiny run, its data, its processes."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from util import assert_close

import dydilit
from dydilit import Config, Training, load_checkpoint, train
from support.runs import prepare_resume

ROOT = Path(__file__).resolve().parent.parent

# The run that every comparison repeats. It has a warm-up, a decay, averaged weights, held-out
# losses and a checkpoint in the middle.
CONFIG = Config(
    input_size=8,
    in_channels=1,
    hidden_size=16,
    depth=1,
    n_projectors=2,
    n_kernels=3,
    n_lambdas=3,
    num_classes=10,
)
RUN = Training(
    steps=6,
    batch_size=8,
    lr=1e-2,
    warmup=2,
    decay=0.5,
    ema_decay=0.9,
    log_every=1,
    eval_every=2,
    ckpt_every=3,
)

# ----------------------------------------------------------------------------------------------
# Data sets.

SET_FILES = ["images.npy", "labels.npy", "meta.json"]


@functools.cache
def load_prepare(name):
    """data/NAME/prepare.py as a module."""
    path = ROOT / "data" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare_digits(folder):
    """Write the digits into `folder`, and return it."""
    load_prepare("digits").prepare(folder)
    return folder


def write_set(folder, images, labels, **meta):
    """Write a prepared set into the new folder, and return it. `meta` adds to these fields."""
    folder.mkdir()
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    known = {
        "name": "made up",
        "classes": list("0123456789"),
        "flip": False,
        "held_out": 0,
        "levels": 255,
    }
    (folder / "meta.json").write_text(json.dumps(known | meta))
    return folder


def read_set(folder):
    """images, labels, meta of a prepared set."""
    meta = json.loads((folder / "meta.json").read_text())
    return np.load(folder / "images.npy"), np.load(folder / "labels.npy"), meta


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# ----------------------------------------------------------------------------------------------
# What a run leaves, and how two of them are compared.


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def without_speed(log):
    """The lines of a log without images_per_s, the one entry that two equal runs do not share."""
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in log]


def parts(out):
    """The checkpoint's weights, averaged weights, state of the optimiser, and step."""
    ckpt = load_checkpoint(Path(out, "ckpt.pt"))
    return {k: ckpt[k] for k in ("model", "ema", "optimizer", "step")}


def differing(a, b, tolerance=None):
    """The paths at which two nested dicts, lists and tensors differ.

    They differ in any bit, or with a tolerance by more than it.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [f"{k}/{path}" for k in a for path in differing(a[k], b[k], tolerance)]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b))
        return [f"{i}/{path}" for i, (x, y) in pairs for path in differing(x, y, tolerance)]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.shape, a.dtype) == (b.shape, b.dtype):
            worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            same = torch.equal(a, b) if tolerance is None else worst <= tolerance
            return [] if same else [f" differs by {worst:.2e}"]
        return [f" {a.shape} {a.dtype}, {b.shape} {b.dtype}"]
    if isinstance(a, float) and isinstance(b, float) and tolerance is not None:
        return [] if abs(a - b) <= tolerance else [f" {a!r} {b!r}"]
    return [] if type(a) is type(b) and a == b else [f" {a!r} {b!r}"]


def assert_same_run(a, b):
    """The losses and weights of two folders agree within rounding, 1e-6 here after six steps."""
    for one, other in zip(read_log(a), read_log(b), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        compared = one.keys() - {"images_per_s"}
        assert all(one[k] == pytest.approx(other[k], rel=1e-4) for k in compared), (one, other)
    for part in ("model", "ema"):
        one, other = parts(a)[part], parts(b)[part]
        assert one.keys() == other.keys()
        for name in one:
            assert_close(f"{part} {name}", one[name], other[name], atol=1e-4)


def resume(config, training, **hooks):
    """What a script does for --resume; returns the steps done."""
    prepare_resume(config, training)
    return train(config, training, resume=True, **hooks)


def at_step(action):
    """Call action(step) in the main thread, at the start of every step of `train`."""
    original = dydilit.learning_rate

    def learning_rate(training, step):
        action(step)
        return original(training, step)

    dydilit.learning_rate = learning_rate


# ----------------------------------------------------------------------------------------------
# Processes.


def flags(**values):
    """{"micro_batch": 4, "bf16": False} -> ["--micro-batch=4", "--no-bf16"]"""
    arguments = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def start(*command):
    """Start python with these arguments in the repository's root, and return the process.

    It runs on the CPU, with warnings as errors, on one thread as the tests do: the number of
    threads decides the bits.
    """
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | settings,
    )


def forked(action):
    """action() in a fork of this process, which needs no imports: its exit status, or minus the
    signal that ended it."""
    child, status = os.fork(), 1
    if child == 0:
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", *arguments)


def finish(process, timeout=120):
    """stdout and stderr of a process that ends; after `timeout` seconds it is terminated.

    torchrun, when it is terminated, ends its workers, by force if needed.
    """
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        text = process.communicate(timeout=60)
        raise AssertionError(f"still running after {timeout} s:\n{text}") from None
