"""What goes wrong in a run: wrong settings, another run's folder, full disks, kills, NaN.

The error is one clear line, and nothing is lost.
"""

import errno
import math
import os
import re
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    CONFIG,
    RUN,
    at_step,
    contents,
    parts,
    prepare_digits,
    resume,
    write_set,
)

import dydilit
from dydilit import (
    Diffusion,
    DyDiLiT,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    train,
)

pytestmark = pytest.mark.usefixtures("cpu")

# ----------------------------------------------------------------------------------------------
# Settings.

WRONG = [
    (CONFIG, "depth", 0),
    (CONFIG, "depth", 2.0),
    (CONFIG, "depth", True),
    (CONFIG, "depth", "3"),
    (CONFIG, "normalize", 1),
    (RUN, "steps", 0),
    (RUN, "batch_size", 0),
    (RUN, "lr", -1e-4),
    (RUN, "lr", math.nan),
    (RUN, "label_dropout", 1.5),
    (RUN, "ema_decay", math.nan),
    (RUN, "decay", 2.0),
    (RUN, "seed", -1),
    (RUN, "data", 3),
    (RUN, "micro_batch", -1),
]


@pytest.mark.parametrize("part, field, value", WRONG)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(part, field, value):
    message = rf"^{type(part).__name__}\.{field} must be .*, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        replace(part, **{field: value})


@pytest.mark.parametrize("world, micro_batch", [(1, 3), (1, 16), (3, 0), (2, 3), (9, 0)])
def test_a_batch_that_does_not_divide_is_refused(run, monkeypatch, world, micro_batch):
    monkeypatch.setattr(dydilit, "distributed", lambda: (0, world, torch.device("cpu")))
    with pytest.raises(ValueError, match=f"batch_size 8 for {world} processes: not divisible"):
        train(CONFIG, replace(run, micro_batch=micro_batch))
    assert not Path(run.out).exists()


# ----------------------------------------------------------------------------------------------
# The folder of another run.


@pytest.mark.parametrize("left", ["ckpt.pt", "log.jsonl"])
def test_a_folder_that_holds_a_run_is_left_alone(run, left):
    Path(run.out).mkdir()
    Path(run.out, left).write_bytes(b"precious")
    message = "holds a run; --resume continues it, --out takes another"
    with pytest.raises(FileExistsError, match=message):
        train(CONFIG, run)
    assert contents(run.out) == {left: b"precious"}


def test_a_restart_by_torchrun_leaves_another_run_alone(run, monkeypatch):
    """The first attempt was refused; the second must not take the folder for its own."""
    Path(run.out).mkdir()
    Path(run.out, "log.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(FileExistsError, match="--resume continues it"):
        train(CONFIG, run)
    assert contents(run.out) == {"log.jsonl": b'{"step": 1}\n'}


OTHER_RUNS = [
    ({"n_kernels": 4}, {}, "n_kernels 3 (now 4)"),
    ({"normalize": False}, {}, "normalize True (now False)"),
    ({}, {"lr": 1e-3}, "lr 0.01 (now 0.001)"),
    ({}, {"seed": 1}, "seed 0 (now 1)"),
    ({}, {"batch_size": 16}, "batch_size 8 (now 16)"),
]


@pytest.mark.parametrize("config, training, named", OTHER_RUNS)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(run, config, training, named):
    train(CONFIG, replace(run, steps=1))
    before = contents(run.out)
    message = re.escape(f"belongs to another configuration: {named}")
    with pytest.raises(ValueError, match=message):
        resume(replace(CONFIG, **config), replace(run, **training))
    assert contents(run.out) == before


def test_a_checkpoint_of_another_kind_of_model_is_refused(run):
    train(CONFIG, replace(run, steps=1))
    path = Path(run.out, "ckpt.pt")
    save_checkpoint(path, load_checkpoint(path) | {"kind": "Baseline"})
    before = contents(run.out)
    with pytest.raises(ValueError, match=r"kind 'Baseline' \(now 'Config'\)"):
        resume(CONFIG, run)
    assert contents(run.out) == before


GREY = np.zeros((12, 1, 8, 8), np.uint8)


def test_a_run_is_not_resumed_on_other_data(run, tmp_path):
    train(CONFIG, replace(run, steps=1))
    other = write_set(tmp_path / "other", GREY, np.zeros(12, np.int64))
    with pytest.raises(ValueError, match=r"name 'digits' \(now 'made up'\)"):
        resume(CONFIG, replace(run, data=str(other)))


def test_a_run_is_resumed_on_its_own_data_in_another_folder(run, tmp_path):
    train(CONFIG, replace(run, steps=1))
    moved = prepare_digits(tmp_path / "moved")
    assert resume(CONFIG, replace(run, data=str(moved), steps=2)) == 2


CHANGES = [
    {"classes": list("1234567890")},
    {"held_out": 1},
    {"flip": True},
    {"scaling": 0.2},
    {"images": 13},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_run_is_not_resumed_on_other_data_of_the_same_name(run, tmp_path, change):
    then = write_set(tmp_path / "then", GREY, np.zeros(12, np.int64))
    train(CONFIG, replace(run, data=str(then), steps=1))
    before = contents(run.out)
    field, n = next(iter(change)), change.get("images", 12)
    images = np.zeros((n, 1, 8, 8), np.uint8)
    if field == "scaling":
        images = np.zeros((n, 1, 2, 8, 8), np.float16)
    meta = {k: v for k, v in change.items() if k != "images"}
    now = write_set(tmp_path / "now", images, np.zeros(n, np.int64), **meta)
    message = rf"belongs to another configuration: {field} .* \(now "
    with pytest.raises(ValueError, match=message):
        resume(CONFIG, replace(run, data=str(now), steps=2))
    assert contents(run.out) == before


# ----------------------------------------------------------------------------------------------
# Checkpoints: damaged, missing, half written.


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_checkpoint_that_was_cut_short_is_refused(run, kept):
    train(CONFIG, replace(run, steps=1))
    file = Path(run.out, "ckpt.pt")
    file.write_bytes(file.read_bytes()[:kept])
    before = contents(run.out)
    for attempt in (lambda: resume(CONFIG, run), lambda: DyDiLiT.from_pretrained(file)):
        with pytest.raises(ValueError, match=r"ckpt.pt is not a readable checkpoint \(cut short"):
            attempt()
    assert contents(run.out) == before


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path):
    message = r"no checkpoint at .*`torchrun train_min.py` makes one"
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("room", [100, 20_000, -100])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(run, room):
    """A limit on the size of a file stands for the disk.

    torch meets it in the header, in a tensor, in the index.
    """
    short = {"decay": 0.0, "log_every": 100, "eval_every": 100}
    train(CONFIG, replace(run, steps=3, **short))
    file, log = Path(run.out, "ckpt.pt"), Path(run.out, "log.jsonl")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write_text("")  # far from the limit
    size = room if room > 0 else len(before) + room
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(OSError, match=r"File too large|cannot write .*ckpt\.pt\.\d+\.tmp"):
            resume(CONFIG, replace(run, ckpt_every=4, steps=100, **short))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(run.out) == {"ckpt.pt": before, "log.jsonl": b""}
    assert DyDiLiT.from_pretrained(file).step == 3


def state_at(step):
    """A checkpoint without contents."""
    names = ("model", "ema", "optimizer", "kind", "config", "training", "meta")
    return {name: {} for name in names} | {"step": step}


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """A kill runs no clean-up: the bytes in ckpt.pt at each moment of the writing count."""
    file = tmp_path / "ckpt.pt"
    save_checkpoint(file, state_at(1))
    before, real_save, real_replace = file.read_bytes(), torch.save, os.replace

    def save(state, f):
        f.write(b"half")
        f.flush()
        assert file.read_bytes() == before
        f.seek(0)
        real_save(state, f)
        assert file.read_bytes() == before

    def replace_complete(source, target):
        assert load_checkpoint(source) == state_at(2)  # it is whole when it takes the name
        real_replace(source, target)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(os, "replace", replace_complete)
    save_checkpoint(file, state_at(2))
    assert load_checkpoint(file) == state_at(2)


def test_a_disk_that_fills_up_while_saving_is_named_and_no_half_file_stays(tmp_path, monkeypatch):
    def save(state, f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "ckpt.pt"
    save_checkpoint(file, state_at(1))
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(file, state_at(2))
    assert load_checkpoint(file) == state_at(1) and list(contents(tmp_path)) == ["ckpt.pt"]


# ----------------------------------------------------------------------------------------------
# Numbers that are not finite.


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run, monkeypatch):
    loss = Diffusion.loss

    def poisoned(*args):
        return tuple(z * math.nan for z in loss(*args))

    def poison(step):
        if step == 4:
            monkeypatch.setattr(Diffusion, "loss", poisoned)

    monkeypatch.setattr(dydilit, "learning_rate", learning_rate)  # undone afterwards, and at_step
    at_step(poison)
    with pytest.raises(FloatingPointError, match=r"step 4: loss nan.*keeps its last checkpoint"):
        train(CONFIG, run)
    assert parts(run.out)["step"] == 3
    assert all(p.isfinite().all() for p in parts(run.out)["model"].values())


def test_weights_that_explode_stop_the_run_before_they_are_saved(run):
    with pytest.raises(FloatingPointError, match="step 1: loss "):
        train(CONFIG, replace(run, lr=1e30, warmup=0))
    assert not Path(run.out, "ckpt.pt").exists()


class Steep(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


def test_an_infinite_gradient_stops_the_run_even_if_the_loss_is_finite(run, monkeypatch):
    loss = Diffusion.loss

    def steep(*args):
        return tuple(Steep.apply(z) for z in loss(*args))

    monkeypatch.setattr(Diffusion, "loss", steep)
    with pytest.raises(FloatingPointError, match=r"step 0: loss [0-9.]+, gradient norm (nan|inf)"):
        train(CONFIG, run)
    assert not Path(run.out, "ckpt.pt").exists()
