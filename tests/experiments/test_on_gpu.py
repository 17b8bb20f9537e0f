"""on_gpu.py, on the CPU with tiny models."""

import re

import pytest
import torch

from experiments import on_gpu
from experiments.on_gpu import Case


@pytest.fixture
def compiled(monkeypatch):
    """The options of every call of torch.compile, which compiles nothing here."""
    calls = []

    def compile(model, **options):
        calls.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("model", ["digits", "DiT-digits", "Sana-digits"])
@pytest.mark.parametrize("what", ["training", "sampling"])
def test_a_row_has_times_and_throughput(what, model):
    row = on_gpu.row(Case(what, model, 16, 4, "eager"), "cpu", 1)
    pattern = rf"\| {what} \| {model} \| 16 \| 4 \| eager \| ([\d.]+) \| (\d+) \| - \| [\d.]+ \|"
    ms, images = re.fullmatch(pattern, row).groups()
    assert float(images) == pytest.approx(4 / (float(ms) / 1e3), rel=0.05)


def test_the_model_has_the_tokens_of_the_case(monkeypatch):
    built = []
    monkeypatch.setattr(on_gpu, "seconds", lambda call, device: built.append(call()) or 1.0)
    original = on_gpu.Diffusion.loss

    def loss(self, net, x, *rest):
        built.append((net.grid, tuple(x.shape)))
        return original(self, net, x, *rest)

    monkeypatch.setattr(on_gpu.Diffusion, "loss", loss)
    on_gpu.row(Case("training", "photos", 64, 2, "eager"), "cpu", 1)
    assert built[0] == ((8, 8), (2, 3, 16, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_each_mode_compiles_as_it_says(compiled):
    for mode in on_gpu.MODES:
        row = on_gpu.row(Case("sampling", "digits", 16, 1, mode), "cpu", 1)
        assert "failed" not in row
    assert compiled == [{"fullgraph": True}, {"fullgraph": True, "mode": "reduce-overhead"}]


def test_a_model_that_does_not_compile_is_one_line(monkeypatch, capsys):
    def compile(model, **options):
        raise AssertionError("no | such\nthing")

    monkeypatch.setattr(torch, "compile", compile)
    rows = [Case("training", "digits", 16, 1, mode) for mode in ("compiled", "eager")]
    on_gpu.table(rows, "cpu", 1)
    broken, whole = capsys.readouterr().out.splitlines()[-2:]
    assert broken == (
        "| training | digits | 16 | 1 | compiled | failed: AssertionError: no / such | | | |"
    )
    assert re.search(r"\| eager \| [\d.]+ \| \d+ \| - \|", whole)


def test_what_was_asked_for_is_among_the_cases():
    cases = set(on_gpu.cases())
    assert len(cases) == len(on_gpu.cases()), "none is measured twice"
    for model in ("S/2", "DiT-S/2", "Sana-S/2"):
        for mode in ("eager", "compiled"):
            for tokens, images in ((256, 64), (1024, 16), (4096, 4)):
                assert Case("training", model, tokens, images, mode) in cases
        for images in (1, 64):
            assert Case("sampling", model, 256, images, "CUDA graphs") in cases
