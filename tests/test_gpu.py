"""gpu.py, `make gpu`, setup.py and bench.py's part in it, as far as a machine without a GPU shows it."""

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
import torch._dynamo.config
from torch.utils import cpp_extension

import bench
import gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """fake_gpu(name=Step, ...) runs those steps as `python gpu.py` would: (exit status, the results, its last line)."""
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=1, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])

    def call(capsys, **steps):
        monkeypatch.setattr(gpu, "steps", lambda stem: steps)
        with pytest.raises(SystemExit) as end: gpu.main()
        return end.value.code, (tmp_path / "out/gpu-A-GPU.md").read_text(), capsys.readouterr().out.splitlines()[-1]

    return call


def shell(script, seconds=20, environment=()):
    return gpu.Step(["sh", "-c", script], seconds, environment)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in (["gpu.py"], ["gpu.py", "kernels"]):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit, match=r"^gpu\.py: torch \S+ sees no GPU$"): gpu.main()


def test_a_step_that_fails_does_not_stop_the_others(fake_gpu, tmp_path, capsys):
    refusal = shell("echo '========= Error: Device not supported.'; exit 1")
    absent = gpu.Step(["no-such-sanitizer"], 1)
    code, results, last = fake_gpu(capsys, build=shell("exit 3"), memcheck=refusal, racecheck=absent,
                                   kernels=shell("echo $CACHING; seq 9999", environment=(("CACHING", "off"),)))
    assert code == 1 and last == (
        "out/gpu-A-GPU.md: build FAILED, exit status 3; memcheck not run, compute-sanitizer does not know this GPU or "
        "its driver; racecheck not run, no no-such-sanitizer here")
    assert re.search(r"^## kernels: ok, \d s$", results, re.M)
    log = (tmp_path / "out/gpu-A-GPU.kernels.log").read_text()
    assert log.startswith("off\n1\n") and log.endswith("\n9999\n") and len(log) > len(results)
    assert fake_gpu(capsys, kernels=shell("exit 0"), racecheck=absent)[0] == 0


def test_a_step_at_its_limit_ends_with_all_that_it_started_and_the_next_has_its_own_time(fake_gpu, tmp_path, capsys):
    _, results, last = fake_gpu(capsys, bench=shell("(sleep 2; touch late) & echo early; sleep 60", 1),
                                sizes=shell("sleep 0.5; echo $PATH; echo $PYTHONUNBUFFERED", 2))
    assert last == "out/gpu-A-GPU.md: bench FAILED, stopped at its time limit"
    assert "early" in results and str(Path(sys.executable).parent) in results  # where ninja is
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


def test_the_steps_fit_into_eight_minutes():
    steps = gpu.steps(ROOT / "out" / "gpu-x")
    assert sum(step.seconds for step in steps.values()) <= 470
    order = list(steps)
    assert order[:3] == ["build", "test", "kernels"] and order[-2:] == ["memcheck", "racecheck"]
    for name in order[-2:]:
        command = steps[name].command
        assert command[command.index("--kernel-name") + 1] == "kns=dydilit"
        assert dict(steps[name].environment)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert ("--padding" in steps["memcheck"].command) and "--padding" not in steps["racecheck"].command


def test_where_no_test_ran_on_the_gpu_the_step_fails(tmp_path):
    """Without a GPU the tests of this step are skipped, all of them, also where hypothesis cannot be imported."""
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('no hypothesis here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis has a plugin, where it is installed
    log = tmp_path / "log"
    code = gpu.run(gpu.steps(ROOT)["test"].command, 120, environment, log)
    said = log.read_text()
    assert code == 1 and "no hypothesis here" in said and "test_dydila_attention_takes_it" in said, said
    skipped = int(re.search(r"(\d+) skipped", said)[1])
    assert skipped > 50 and not re.search(r"\d passed|\d failed", said)
    assert gpu.verdict("test", 0, f"{skipped} skipped in 9.87s") == "FAILED, no test ran on the GPU"
    assert gpu.verdict("test", 0, "10 passed, 3 skipped in 9.87s") == "ok"


THIS = torch.__version__.split("+")[0]


@pytest.mark.parametrize(("archs", "version", "good"), [("9.0", THIS, True), ("", THIS, False), ("9.0", "1.0", False)])
def test_a_build_without_cuda_or_for_another_torch_fails(archs, version, good, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    info = {"torch": version, "cuda_archs": archs}
    monkeypatch.setitem(sys.modules, "dydilit_C", SimpleNamespace(build_info=lambda: info))
    if good: gpu.build()
    else:
        with pytest.raises(SystemExit, match="not one with CUDA for torch"): gpu.build()
    assert commands[0][1:] == ["setup.py", "build_ext", "--inplace", "--force"]


def test_the_kernels_whose_passes_are_counted_exist():
    source = (ROOT / "csrc/cuda_kernels.cu").read_text()
    assert set(gpu.PASSES) <= set(re.findall(r"(\w+_kernel)\(", source)) and "namespace dydilit::cuda {" in source


@pytest.fixture
def extension(monkeypatch):
    """What setup.py hands to setuptools."""
    def call():
        made = []
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: made.extend(arguments["ext_modules"]))
        runpy.run_path(str(ROOT / "setup.py"))
        return made[0]

    return call


def test_every_header_and_source_is_one_that_the_extension_depends_on(extension):
    """Those of CUDA too where it is built without: a source distribution takes them from here."""
    files = {path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu")}
    assert len({path.suffix for path in files}) == 4 and {ROOT / path for path in extension().depends} == files


def test_a_cuda_home_without_headers_gives_way(extension, monkeypatch, tmp_path):
    usual = "/usr/local/cuda" if Path("/usr/local/cuda/include/cuda_runtime.h").exists() else str(tmp_path)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    extension()
    assert usual == cpp_extension.CUDA_HOME
    for variable, header in ((str(tmp_path), False), (None, True)):  # said so by the user; has headers
        if variable: monkeypatch.setenv("CUDA_HOME", variable)
        else: monkeypatch.delenv("CUDA_HOME")
        if header:
            (tmp_path / "include").mkdir()
            (tmp_path / "include/cuda_runtime.h").touch()
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        extension()
        assert cpp_extension.CUDA_HOME == str(tmp_path)


@pytest.mark.parametrize("given", [None, "python3"])
def test_make_gpu_builds_its_interpreter_unless_one_is_given(given, tmp_path):
    for name in ("Makefile", "requirements.txt"): shutil.copy(ROOT / name, tmp_path)  # a fresh clone
    command = ["make", "-n", "gpu", *([f"PYTHON={given}"] if given else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    said = said.stdout.splitlines()  # as from a shell, also where `make test` runs this
    assert said[-1] == f"{given or '.venv/bin/python'} gpu.py" and ("-m venv .venv" in said[0]) == (given is None)


# ---------------------------------------------------------------------------------------------------------------------
# bench.py.


def test_bench_compiles_every_size(monkeypatch, capsys):
    """Two a size, forward alone and with backward. More of one function than the limit would silently run eagerly."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for N in (4, 5): bench.report((1, N, 64, 2), torch.float32, "cpu", 1, True)
    assert capsys.readouterr().out.count("| torch.compile |") == 2


def test_bench_of_given_sizes_leaves_out_softmax_attention_that_cannot_be(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = "bench.py --no-compile --repeats 1 --size 1 8 64 2 --size 2 8 48 2"
    monkeypatch.setattr(sys, "argv", arguments.split())
    bench.main()
    said, complaint = capsys.readouterr()
    assert re.findall(r"^\*\*(B \d, N \d, D \d+)", said, re.M) == ["B 1, N 8, D 64", "B 2, N 8, D 48"]
    assert said.count("| softmax, 64-wide heads |") == 1 and "softmax, 64-wide heads is left out" in complaint
