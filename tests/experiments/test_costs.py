"""costs.py: what a step is, how its time and memory are taken, and what happens without memory."""

import gc
import math
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

import dydilit
from dydilit import Config
from experiments import costs
from experiments.baselines import variant

BASE = Config(
    input_size=8,
    in_channels=1,
    hidden_size=24,
    depth=2,
    n_projectors=2,
    n_kernels=3,
    n_lambdas=4,
    num_classes=10,
)
SMALL = ["--preset=digits", "--hidden-size=32"]


# --------------------------------------------------------------------------------------------------
# A step.


@pytest.mark.parametrize(("train", "bf16"), [(True, False), (True, True), (False, False)])
def test_a_training_step_changes_the_weights_and_a_sampling_step_does_not(train, bf16, monkeypatch):
    torch.manual_seed(0)
    built, autocast = [], []
    monkeypatch.setattr(
        Config, "build", lambda self: built.append(dydilit.DyDiLiT(self)) or built[0]
    )
    step = costs.step_of(BASE, 2, "cpu", train, bf16)
    (model,) = built
    model.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    before = [p.clone() for p in model.parameters()]
    step()
    assert autocast == [bf16]
    changed = any(not torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert changed == train and model.training == train


def test_times_are_medians_of_steps_that_take_turns(monkeypatch):
    order = []

    def seconds(step, device):
        step()
        order.append(step)
        return float(len(order) ** 2)  # 1 4, which do not count, 9 16, 25 36, 49 64

    monkeypatch.setattr(costs, "seconds", seconds)
    models = {"a": BASE, "b": variant("DiT", BASE)}
    assert costs.times_of(models, 2, "cpu", True, 3) == {"a": 25.0, "b": 36.0}
    a, b = order[:2]
    assert order == [a, b] * 4 and a is not b


@pytest.mark.parametrize(
    ("flags", "nproc", "batch", "words"),
    [
        ([], 1, 64, "64 images, float32, "),
        (["--bf16"], 4, 16, "16 images (of 64: what a process takes at once), bfloat16 autocast, "),
        (["--micro-batch=8"], 2, 8, "8 images (of 64: what a process takes at once), float32, "),
    ],
)
def test_a_training_step_is_measured_as_it_is_trained(
    flags, nproc, batch, words, tmp_path, monkeypatch
):
    """With the images that one process takes at once, under autocast or not; the text says so."""
    calls = {}

    def times_of(configs, *how):
        calls["time"] = how
        return dict.fromkeys(configs, 0.5)

    def memory_of(argv, *how):
        calls["memory"] = how
        return 7.0

    monkeypatch.setattr(costs, "times_of", times_of)
    monkeypatch.setattr(costs, "memory_of", memory_of)
    models = {"a": ["--preset=digits", *flags]}
    found, where = costs.training_costs(models, tmp_path / "costs.json", nproc)
    assert found == {"a": [0.5, 7.0]} and where.startswith(words)
    assert calls["time"] == (batch, "cpu", True, 9, "--bf16" in flags)
    assert calls["memory"] == (8, batch, True)


def test_memory_is_that_of_the_step_as_it_is_trained(monkeypatch):
    steps = []

    def step_of(config, *how):
        steps.append(how)
        return lambda: None

    monkeypatch.setattr(costs, "step_of", step_of)
    costs.print_memory(["--preset=digits", "--bf16"], 8, 16, True)
    assert steps == [(16, "cpu", True, True)]


# --------------------------------------------------------------------------------------------------
# What is kept.


def test_a_measurement_is_kept_for_as_long_as_its_conditions_hold(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return [len(calls)]

    results = []
    for batch in (1, 1, 2, 2, 1):
        results.append(costs.once(tmp_path / "c.json", {"batch": batch}, measure))
    assert results == [[1], [1], [2], [2], [3]]


def test_training_costs_of_other_models_are_measured_again(tmp_path, monkeypatch):
    batches = []

    def costs_of(models, configs, batch, *_):
        batches.append(batch)
        return {model: [0.5, 7.0] for model in models}

    monkeypatch.setattr(costs, "costs_of", costs_of)
    file = tmp_path / "costs.json"
    costs.training_costs({"a": ["--preset=digits"]}, file)
    costs.training_costs({"a": ["--preset=digits"]}, file)
    costs.training_costs({"a": SMALL}, file, nproc=2)
    assert batches == [64, 32]


# --------------------------------------------------------------------------------------------------
# Memory.


def test_memory_is_that_of_the_step_alone():
    """torch itself, some hundred MiB, is not in it; the activations of 512 images are."""
    found = costs.memory_of(SMALL, 8, 512, True)
    assert 100 < found < 1000
    assert costs.memory_of(SMALL, 8, 8, False) < found / 10


HUGE = 10**13  # more images than there are addresses: the CPU's allocator says so


def test_a_model_that_does_not_fit_has_infinite_memory():
    assert costs.memory_of(["--preset=digits", f"--batch-size={HUGE}"], 8, HUGE, True) == math.inf


def test_models_that_do_not_fit_have_no_times():
    times = costs.times_of({"a": BASE, "b": BASE}, HUGE, "cpu", True, 1)
    assert times == {"a": None, "b": None}


def test_a_model_that_does_not_fit_has_no_costs(tmp_path):
    models = {"a": ["--preset=digits", f"--batch-size={HUGE}"]}
    for _ in range(2):  # measured, kept
        assert costs.training_costs(models, tmp_path / "costs.json")[0] == {"a": [None, None]}


def returning(code, monkeypatch):
    """The process that measures memory ends with this code."""

    def run(command, **_):
        return subprocess.CompletedProcess(command, code, "", "some other error")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_process_that_linux_kills_did_not_fit(monkeypatch):
    returning(-signal.SIGKILL, monkeypatch)
    assert costs.memory_of(SMALL, 8, 2, True) == math.inf


def test_another_error_while_measuring_memory_is_raised(monkeypatch):
    returning(1, monkeypatch)
    with pytest.raises(OSError, match="some other error"):
        costs.memory_of(SMALL, 8, 2, True)


def test_which_errors_mean_no_memory():
    assert costs.is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert costs.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't"))
    assert not costs.is_out_of_memory(RuntimeError("shapes"))


def test_models_that_do_not_fit_together_are_timed_one_by_one(monkeypatch):
    """Timed models leave nothing in memory, also where nothing collects cycles by chance."""
    alive, build = weakref.WeakSet(), Config.build

    def noted(self):
        model = build(self)
        alive.add(model)
        return model

    def seconds(step, device):
        step()
        depth = next(iter(alive)).config.depth
        if len(alive) > 1 or depth == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return depth

    monkeypatch.setattr(Config, "build", noted)
    monkeypatch.setattr(costs, "seconds", seconds)
    models = {str(depth): replace(BASE, depth=depth) for depth in (1, 3, 2)}
    gc.collect()
    gc.disable()
    try:
        assert costs.times_of(models, 2, "cpu", True, 1) == {"1": 1, "3": None, "2": 2}
    finally:
        gc.enable()
    assert len(alive) == 0


def test_another_error_while_timing_is_raised(monkeypatch):
    monkeypatch.setattr(costs, "seconds", lambda step, device: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        costs.times_of({"a": BASE}, 2, "cpu", True, 1)


def test_where_the_platform_reports_no_peak_there_are_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "PROC", tmp_path / "none")
    costs.print_memory(SMALL, 8, 2, True)
    nan = float(capsys.readouterr().out)
    assert math.isnan(nan)
    monkeypatch.setattr(costs, "memory_of", lambda *_: nan)
    seconds, memory = costs.costs_of({"a": []}, {"a": BASE}, 2, "cpu", True, 1)["a"]
    assert seconds > 0 and memory is None


# --------------------------------------------------------------------------------------------------
# The command line.


def call(monkeypatch, capsys, *arguments):
    """The output of `python -m experiments.costs` on a small model."""
    monkeypatch.setattr(sys, "argv", ["costs.py", *arguments, "--preset=digits", "--batch=4"])
    monkeypatch.setattr(costs, "keep_memory", lambda: None)  # of this process, for good
    costs.main()
    return capsys.readouterr().out


def test_step_compares_the_python_path_with_the_fused_op(monkeypatch, capsys):
    said = call(monkeypatch, capsys, "--step", "--repeats=1")
    assert "| Python path | " in said and "| fused op | " in said and "aten::" in said


def test_step_leaves_the_fused_op_as_it_was(monkeypatch, capsys):
    before = dydilit.FUSED_DEVICES
    call(monkeypatch, capsys, "--step", "--repeats=1")
    assert before == dydilit.FUSED_DEVICES


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compile_compares_eager_with_compiled_and_with_sana(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    said = call(monkeypatch, capsys, "--compile", "--repeats=1")
    torch.compiler.reset()
    assert said.count("\n| digits | ") == said.count("\n| Sana-digits | ") == 1
    assert "best over best: float32 " in said


def test_memory_names_what_keeps_it(monkeypatch, capsys):
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ())
    said = call(monkeypatch, capsys, "--memory", "--no-fused")
    for part in ("measure()", "linear_attention()", "GLUMBConv, itself", "DyDiLA, itself"):
        assert f"| {part} | " in said


def test_sampling_counts_steps_with_and_without_guidance(monkeypatch, capsys):
    said = call(monkeypatch, capsys, "--sampling")
    assert said.count("\n| 1.0 | ") == 2 and said.count("\n| 1.5 | ") == 2


def test_an_unknown_preset_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["costs.py", "--step", "--preset=DiT-nope"])
    with pytest.raises(SystemExit):
        costs.main()
    assert "unknown preset 'DiT-nope'; known: S/2, " in capsys.readouterr().err
