"""check_gpu.py, as far as a machine without a GPU can show it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT

from csrc import check_gpu


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """fake_gpu(capsys, name=Step, ...) runs those steps as `python -m csrc.check_gpu` would.

    Returns the exit status, the report, and the last line on the terminal.
    """
    properties = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=1, total_memory=2**30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(check_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])

    def call(capsys, **steps):
        monkeypatch.setattr(check_gpu, "steps", lambda stem: steps)
        with pytest.raises(SystemExit) as end:
            check_gpu.main()
        report = (tmp_path / "out/gpu-A-GPU.md").read_text()
        return end.value.code, report, capsys.readouterr().out.splitlines()[-1]

    return call


def shell(script, seconds=20, environment=()):
    return check_gpu.Step(["sh", "-c", script], seconds, environment)


@pytest.mark.parametrize("arguments", [[], ["kernels"]])
def test_without_a_gpu_it_says_so_in_one_line(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *arguments])
    with pytest.raises(SystemExit, match=r"^check_gpu\.py: torch \S+ sees no GPU$"):
        check_gpu.main()


ABSENT = check_gpu.Step(["no-such-sanitizer"], 1)


def test_a_step_that_fails_does_not_stop_the_others(fake_gpu, capsys):
    code, report, last = fake_gpu(
        capsys,
        build=shell("exit 3"),
        memcheck=shell("echo '========= Error: Device not supported.'; exit 1"),
        racecheck=ABSENT,
        kernels=shell("echo done"),
    )
    assert code == 1
    assert last == (
        "out/gpu-A-GPU.md: build FAILED, exit status 3; "
        "memcheck not run, compute-sanitizer does not know this GPU or its driver; "
        "racecheck not run, no no-such-sanitizer here"
    )
    assert re.search(r"^## kernels: ok, \d s$", report, re.M)


def test_a_step_that_cannot_run_is_no_failure(fake_gpu, capsys):
    code, _, _ = fake_gpu(capsys, kernels=shell("exit 0"), racecheck=ABSENT)
    assert code == 0


def test_the_log_of_a_step_has_all_of_its_output(fake_gpu, tmp_path, capsys):
    script = "echo $CACHING; seq 9999"
    _, report, _ = fake_gpu(capsys, kernels=shell(script, environment=(("CACHING", "off"),)))
    log = (tmp_path / "out/gpu-A-GPU.kernels.log").read_text()
    assert log.startswith("off\n1\n") and log.endswith("\n9999\n")
    assert len(log) > len(report), "the report has the end of it"


def test_a_step_at_its_limit_ends_with_all_that_it_started(fake_gpu, tmp_path, capsys):
    script = "(sleep 2; touch late) & echo early; sleep 60"
    _, report, last = fake_gpu(capsys, bench=shell(script, 1))
    assert last == "out/gpu-A-GPU.md: bench FAILED, stopped at its time limit"
    assert "early" in report
    time.sleep(1.7)
    assert not (tmp_path / "late").exists()


def test_a_step_at_its_limit_takes_no_time_from_the_next(fake_gpu, capsys):
    _, _, last = fake_gpu(capsys, bench=shell("sleep 60", 1), sizes=shell("sleep 0.5", 2))
    assert last == "out/gpu-A-GPU.md: bench FAILED, stopped at its time limit"


def test_steps_find_ninja_beside_the_interpreter(fake_gpu, capsys):
    _, report, _ = fake_gpu(capsys, sizes=shell("echo $PATH; echo $PYTHONUNBUFFERED"))
    assert str(Path(sys.executable).parent) in report


def test_the_steps_fit_into_eight_minutes():
    steps = check_gpu.steps(ROOT / "out" / "gpu-x")
    assert sum(step.seconds for step in steps.values()) <= 470


def test_the_sanitizers_come_last():
    order = list(check_gpu.steps(ROOT / "out" / "gpu-x"))
    assert order[:3] == ["build", "test", "kernels"]
    assert order[-2:] == ["memcheck", "racecheck"]


@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_the_sanitizers_watch_our_kernels_without_the_caching_allocator(name):
    step = check_gpu.steps(ROOT / "out" / "gpu-x")[name]
    command = step.command
    assert command[command.index("--kernel-name") + 1] == "kns=dydilit"
    assert dict(step.environment)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert ("--padding" in command) == (name == "memcheck")


def test_the_test_step_goes_on_where_a_package_is_missing(tmp_path):
    """Without a GPU all its tests are skipped, also where hypothesis cannot be imported."""
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('no hypothesis here')")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # hypothesis has a plugin, where it is installed
    }
    log = tmp_path / "log"
    code = check_gpu.run(check_gpu.steps(ROOT)["test"].command, 120, environment, log)
    said = log.read_text()
    assert code == 1 and "no hypothesis here" in said, said
    assert "tests/csrc/test_cuda.py::" in said, said
    assert int(re.search(r"(\d+) skipped", said)[1]) > 50
    assert not re.search(r"\d passed|\d failed", said)


def test_where_no_test_ran_on_the_gpu_the_step_fails():
    said = "77 skipped in 9.87s"
    assert check_gpu.verdict("test", 0, said) == "FAILED, no test ran on the GPU"
    assert check_gpu.verdict("test", 0, "10 passed, 3 skipped in 9.87s") == "ok"


ROW = "| training | S/2 | 256 | 64 | eager | 30.00 | 2133 | 9.00 | 1.0 |"
BROKEN = "| training | S/2 | 256 | 64 | compiled | failed: RuntimeError: no | | | |"


@pytest.mark.parametrize(
    "script, said",
    [
        (f"echo '{ROW}'", "all steps passed"),
        (f"echo '{ROW}'; sleep 60", "models cut short at its time limit"),
        (f"echo '{ROW}'; echo '{BROKEN}'", "models ok, but 1 of 2 rows failed"),
        ("sleep 60", "models FAILED, stopped at its time limit"),
        (f"echo '{ROW}'; exit 3", "models FAILED, exit status 3"),
    ],
)
def test_what_the_models_step_measured_is_kept(script, said, fake_gpu, capsys):
    code, report, last = fake_gpu(capsys, models=shell(script, 1))
    assert last == f"out/gpu-A-GPU.md: {said}"
    assert code == ("FAILED" in said)
    if not code:
        assert f"\n\n{ROW}\n" in report, "a table, not a log"


THIS = torch.__version__.split("+")[0]


@pytest.fixture
def build(monkeypatch):
    """build(torch=version, cuda_archs=...) builds nothing, and finds such an extension."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))

    def call(**info):
        extension = SimpleNamespace(build_info=lambda: info)
        monkeypatch.setitem(sys.modules, "dydilit_C", extension)
        check_gpu.build()
        return commands

    return call


def test_the_build_is_forced(build):
    (command,) = build(torch=THIS, cuda_archs="9.0")
    assert command[1:] == ["setup.py", "build_ext", "--inplace", "--force"]


@pytest.mark.parametrize(("version", "archs"), [(THIS, ""), ("1.0", "9.0")])
def test_a_build_without_cuda_or_for_another_torch_fails(version, archs, build):
    with pytest.raises(SystemExit, match="not one with CUDA for torch"):
        build(torch=version, cuda_archs=archs)


def test_kernel_names_are_short():
    name = "void dydilit::cuda::(anonymous namespace)::features_kernel<float, 2>(float const*, int)"
    assert check_gpu.short_name(name) == "features_kernel"
    assert check_gpu.short_name("Memset (Device)") == "Memset "
