"""setup.py: what the extension is built from, and where its CUDA headers are looked for."""

import runpy
from pathlib import Path

import pytest
import setuptools
from runs import ROOT
from torch.utils import cpp_extension


@pytest.fixture
def extension(monkeypatch):
    """extension() -> what setup.py hands to setuptools."""

    def call():
        given = {}
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
        runpy.run_path(str(ROOT / "setup.py"))
        return given["ext_modules"][0]

    return call


def test_the_extension_depends_on_every_header_and_source(extension):
    """Also on those of CUDA, where it is built without: a source distribution takes its files from
    this list."""
    kinds = {".h", ".cuh", ".cpp", ".cu"}
    files = {path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds}
    assert {path.suffix for path in files} == kinds
    assert {ROOT / path for path in extension().depends} == files


@pytest.fixture
def no_headers(monkeypatch, tmp_path):
    """torch has found a CUDA folder without headers. (nvcc may be a script that calls another.)"""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return tmp_path


def test_a_cuda_home_without_headers_gives_way_to_the_usual_one(extension, no_headers):
    usual = Path("/usr/local/cuda")
    there = (usual / "include/cuda_runtime.h").exists()
    extension()
    assert cpp_extension.CUDA_HOME == str(usual if there else no_headers)


def test_a_cuda_home_that_the_user_names_stays(extension, no_headers, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(no_headers))
    extension()
    assert cpp_extension.CUDA_HOME == str(no_headers)


def test_a_cuda_home_with_headers_stays(extension, no_headers):
    (no_headers / "include").mkdir()
    (no_headers / "include/cuda_runtime.h").touch()
    extension()
    assert cpp_extension.CUDA_HOME == str(no_headers)
