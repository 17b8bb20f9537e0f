"""The extension as it was built; what happens without it, or with one for another torch."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT

import dydilit

needs_extension = pytest.mark.skipif(
    "cpu" not in dydilit.FUSED_DEVICES,
    reason="the extension is not built: python setup.py build_ext --inplace",
)

BROKEN = "raise ImportError('undefined symbol')"
STALE = "def build_info(): return {'torch': '1.0', 'cuda_archs': ''}"
USE = """
import dydilit, torch
x = torch.rand(1, 2, 3)
routers = torch.rand(4, 3, 3), torch.rand(2, 6, 3)
out = dydilit.dydila_attention(x, x, x, x, x, x[0, 0], x[0, 0], *routers)
print(dydilit.FUSED_DEVICES, tuple(out.shape))
"""


def run_python(folder, *arguments):
    """Python with a copy of dydilit.py in `folder`, which comes first in its path."""
    shutil.copy(ROOT / "dydilit.py", folder)
    env = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_an_extension_for_another_python_is_named(tmp_path):
    other = "dydilit_C.cpython-38-x86_64-linux-gnu.so"
    (tmp_path / other).touch()
    shutil.copytree(ROOT / "support", tmp_path / "support")
    run = run_python(tmp_path, "-c", USE)
    assert run.returncode == 0 and run.stdout == "() (1, 2, 3)\n", run.stderr
    assert f"the Python path instead ({other} is for another Python)" in run.stderr
    run = run_python(tmp_path, "-m", "dydilit")
    assert run.stdout.startswith(f"attention: Python path ({other} is for another Python), CPU")


@needs_extension
def test_the_module_says_which_path_runs():
    command = [sys.executable, "-m", "dydilit"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("attention: fused op, CPU ") and run.stdout.count("\n") >= 3


@pytest.mark.parametrize("extension", [BROKEN, STALE, None], ids=["broken", "stale", "missing"])
def test_without_a_fitting_extension_the_python_path_runs(extension, tmp_path):
    """Stale or broken: one line on stderr. Never built: silence."""
    if extension:
        (tmp_path / "dydilit_C.py").write_text(extension)
    shutil.copy(ROOT / "dydilit.py", tmp_path)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USE]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "() (1, 2, 3)\n"
    lines = [line for line in run.stderr.splitlines() if line.startswith("dydilit:")]
    assert len(lines) == (1 if extension else 0), run.stderr
    assert all("setup.py build_ext" in line for line in lines), run.stderr


@needs_extension
def test_build_info_says_what_the_extension_was_built_for():
    info = importlib.import_module("dydilit_C").build_info()
    known = {"torch", "compiler", "isa", "cuda_archs", "max_width", "max_choices"}
    assert set(info) == known
    assert importlib.util.find_spec("dydilit_C").origin


SMALL_STACK = """
import sys, threading
sys.path[:0] = sys.argv[1:]
import torch
from util import grads_of, random_op_inputs
import dydilit

torch.set_num_threads(1)
tokens_first = random_op_inputs(1, 70, 400, 9, 9, dtype=torch.float64)
features_first = random_op_inputs(1, 400, 70, 9, 9, dtype=torch.float64)

def attention(**inputs):
    return dydilit.dydila_attention(**inputs, backend="fused")

def run():
    for inputs in (tokens_first, features_first):
        grads_of(attention, inputs, torch.ones_like(inputs["v"]))
    print("survived")

threading.stack_size(160 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@needs_extension
def test_forward_and_backward_run_in_a_thread_with_a_small_stack():
    """160 KB, in float64, in both orders of the products."""
    command = [sys.executable, "-c", SMALL_STACK, ROOT, ROOT / "tests"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "survived\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("level", ["-O1", "-O3"])
def test_no_float_leads_to_undefined_behaviour(level, tmp_path):
    """-0, NaN and infinity too: in the bits of a float they are the extremes of an integer."""
    source, program = ROOT / "tests" / "csrc" / "ubsan_check.cpp", tmp_path / "check"
    command = ["g++", "-std=c++20", level, "-fno-wrapv", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    command += [f"-I{ROOT}/csrc", source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no undefined behaviour\n"), done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_products_of_every_instruction_set(tmp_path):
    """The loader picks one build of the matrix products; here all that this machine can run."""
    source, program = ROOT / "tests" / "csrc" / "gemm_check.cpp", tmp_path / "check"
    command = ["g++", "-std=c++20", "-O2", f"-I{ROOT}/csrc", source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "baseline" in done.stdout and "chosen" in done.stdout, done.stdout
