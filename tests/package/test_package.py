"""What `pip install .` gives: dydilit.py and the check of its op, with or without the extension."""

import inspect
import re
import shutil
import subprocess
import sys

import pytest
import torch
from runs import CONFIG, ROOT
from setuptools.config.pyprojecttoml import read_configuration
from util import assert_close, randomized

import dydilit
from dydilit import DyDiLiT

FUNCTIONS = [
    "power_kernel",
    "route",
    "routed_projection",
    "measure",
    "difference",
    "linear_attention",
    "dydila_reference",
    "dydila_attention",
    "at_least_float32",
    "to_image",
    "to_tokens",
    "initialize",
    "generator",
    "respace",
    "with_guidance",
    "discretized_log_likelihood",
    "distributed",
    "save_checkpoint",
    "load_checkpoint",
    "learning_rate",
    "train",
]
METHODS = [
    "DWC.forward",
    "DyDiLA.forward",
    "GLUMBConv.forward",
    "Block.forward",
    "FinalLayer.forward",
    "DyDiLiT.forward",
    "DyDiLiT.from_pretrained",
    "DyDiLiT.save_pretrained",
    "Diffusion.q_sample",
    "Diffusion.q_posterior",
    "Diffusion.p_mean_variance",
    "Diffusion.loss",
    "Diffusion.sample",
    "Data.batch",
    "Data.held_out",
]


@pytest.fixture(scope="module")
def project():
    """[project] of pyproject.toml, as setuptools reads it."""
    return read_configuration(ROOT / "pyproject.toml")["project"]


def test_the_version_is_that_of_the_package(project):
    assert dydilit.__version__ == project["version"]


def test_the_package_depends_on_what_dydilit_imports(project):
    names = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    assert {"torch", "numpy", "safetensors"} <= names


@pytest.mark.parametrize("name", FUNCTIONS + METHODS)
def test_every_argument_of_a_public_function_is_annotated(name):
    function = dydilit
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    plain = [n for n, p in parameters.items() if p.annotation is p.empty and n != "self"]
    assert not plain


USE = """
import sys
import torch
import dydilit

assert dydilit.FUSED_DEVICES == ()
for path in sys.argv[1:3]:
    model = dydilit.DyDiLiT.from_pretrained(path)
    x, t, y = torch.load("batch.pt")
    with torch.no_grad():
        torch.save(model(x, t, y), f"{path}.out")
    print(model.step, model.meta["name"])
"""


def install(folder):
    """What pyproject.toml names, without the extension, in an empty folder."""
    named = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    for module in named["py-modules"]:
        shutil.copy(ROOT / f"{module}.py", folder)
    for package in named["packages"]:
        shutil.copytree(ROOT / named["package-dir"][package], folder / package)


def test_the_installed_module_says_which_path_runs(tmp_path):
    install(tmp_path)
    command = [sys.executable, "-m", "dydilit"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attention: Python path (no extension built), CPU, float32\n")


def test_dydilit_alone_loads_a_checkpoint_and_a_folder(tmp_path):
    """In an empty folder, without the extension and without the repository."""
    model = randomized(DyDiLiT(CONFIG)).float()
    model.meta, model.step = {"name": "digits"}, 5
    model.save_pretrained(tmp_path / "model")
    weights = model.state_dict()
    about = {"step": 5, "kind": "Config", "config": vars(CONFIG), "training": {}}
    parts = {"model": {}, "ema": weights, "optimizer": {}, "meta": model.meta}
    dydilit.save_checkpoint(tmp_path / "ckpt.pt", parts | about)
    batch = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])
    torch.save(batch, tmp_path / "batch.pt")
    install(tmp_path)

    command = [sys.executable, "-c", USE, "ckpt.pt", "model"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5 digits\n5 digits\n"
    want = model(*batch)
    for name in ("ckpt.pt.out", "model.out"):
        assert_close(name, torch.load(tmp_path / name), want, atol=1e-5, rtol=1e-5)
