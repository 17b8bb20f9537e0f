"""bench.py: what it measures and what it leaves out."""

import functools
import re
import sys

import pytest
import torch
import torch._dynamo.config

from csrc import bench


@pytest.fixture
def output(monkeypatch, capsys):
    """output("--repeats", ...) -> stdout and stderr of bench.py on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # of this process, for good

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        bench.main()
        return capsys.readouterr()

    return call


def test_bench_compiles_every_size(monkeypatch, capsys):
    """Twice a size: forward alone and with backward. Beyond the limit torch would run eagerly."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for N in (4, 5):
            bench.report((1, N, 64, 2), torch.float32, "cpu", 1, True)
    assert capsys.readouterr().out.count("| torch.compile |") == 2


ONE_REPEAT = ["--no-compile", "--repeats", "1"]


def test_bench_measures_the_given_sizes(output):
    said, _ = output(*ONE_REPEAT, *"--size 1 8 64 2 --size 2 8 48 2".split())
    sizes = re.findall(r"^\*\*(B \d, N \d, D \d+)", said, re.M)
    assert sizes == ["B 1, N 8, D 64", "B 2, N 8, D 48"]


def test_bench_leaves_out_a_softmax_that_cannot_be(output):
    """Its heads have 64 channels, and 48 is no multiple of 64."""
    said, complaint = output(*ONE_REPEAT, *"--size 1 8 64 2 --size 2 8 48 2".split())
    assert said.count("| softmax, 64-wide heads |") == 1
    assert "softmax, 64-wide heads is left out" in complaint


def test_the_error_is_small(output):
    said, _ = output(*ONE_REPEAT, *"--size 1 8 64 2".split())
    (row,) = re.findall(r"^\| reference \|.*$", said, re.M)
    assert float(row.split("|")[6]) < 1e-4


def test_the_plot_is_a_picture(output, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.PLOT_N, "cpu", [4, 8])
    output(*ONE_REPEAT, *"--size 1 8 64 2 --plot".split(), str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
