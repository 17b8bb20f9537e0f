"""rounding.py: the model of the op's roundings."""

import pytest
import torch
from util import assert_close, grads_of, random_op_inputs

import dydilit
from csrc import rounding


@pytest.mark.parametrize("N, D", [(9, 24), (30, 12)], ids=["tokens first", "features first"])
def test_without_roundings_the_model_is_the_python_path(N, D):
    x = random_op_inputs(1, N, D, 3, 3, torch.float64, margin=1e-3, lams=(0.9, 1.5))
    cotangent = torch.randn_like(x["v"])
    got, grads = grads_of(lambda **z: rounding.attention(frozenset())(*z.values()), x, cotangent)
    want, wanted = grads_of(dydilit.dydila_reference, x, cotangent)
    assert_close("out", got, want, atol=1e-9 * want.abs().max().item())
    for name, true in wanted.items():
        assert_close(name, grads[name], true, atol=1e-9 * true.abs().max().item())


def test_every_place_changes_the_gradients():
    tensors, dout = rounding.inputs(30, 12, 3, (0.1, 0.9), seed=0)
    exact = rounding.results(frozenset(), tensors, dout)
    for place in rounding.CUDA | {"den"}:
        error = rounding.error_of_gradients(rounding.results({place}, tensors, dout), exact)
        assert 1e-4 < error < 1, place


def test_the_table_has_a_row_for_each_size_and_range(capsys, monkeypatch):
    monkeypatch.setattr(rounding, "CPU_CHOICES", {"float32 products": frozenset()})
    rounding.table("CPU", rounding.cpu_shares, seeds=1)
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2 + 9
    for row in rows[2:]:  # the error is half of what is allowed
        assert all(0.45 < float(share) <= 0.5 for share in row.split("|")[2].split(","))
