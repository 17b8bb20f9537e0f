"""The fused op as a citizen of torch: torch.library.opcheck and torch.compile."""

from functools import partial

import pytest
import torch
from util import assert_close, grads_of, normal, random_op_inputs

import dydilit
from dydilit import dydila_attention

if "cpu" not in dydilit.FUSED_DEVICES:
    reason = "the extension is not built: python setup.py build_ext --inplace"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def small():
    """The arguments of attention_fwd."""
    inputs = random_op_inputs(2, 6, 5, 3, 2, margin=1e-4)
    return (*inputs.values(), True, True, 1e-6)


def test_opcheck_of_the_forward(small):
    for z in small[:9]:
        z.requires_grad_()
    torch.library.opcheck(torch.ops.dydilit.attention_fwd, small)


def test_opcheck_of_the_operator_without_gradients(small):
    torch.library.opcheck(torch.ops.dydilit.attention, (*small[:9], True, True, 1e-6))


def test_opcheck_of_the_backward(small):
    kept = torch.ops.dydilit.attention_fwd(*small)[1:]
    dout = normal(2, 6, 5, dtype=torch.float32)
    tests = ("test_schema", "test_faketensor")  # it has no derivative, on purpose
    arguments = (dout, *small, *kept)
    torch.library.opcheck(torch.ops.dydilit.attention_bwd, arguments, test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("backend", ["fused", "auto"])
def test_compile_without_graph_breaks(backend):
    inputs = random_op_inputs(2, 16, 8, 3, 3, margin=1e-4)
    cotangent = normal(2, 16, 8, dtype=torch.float32)
    op = partial(dydila_attention, backend=backend)
    want, wanted = grads_of(op, inputs, cotangent)
    compiled = torch.compile(lambda **z: op(**z) * 2, fullgraph=True)
    out, grads = grads_of(compiled, inputs, cotangent / 2)
    assert_close("out", out / 2, want, atol=1e-6, rtol=1e-6)
    for name in inputs:
        assert_close(name, grads[name], wanted[name], atol=1e-6, rtol=1e-6)


def grad_twice(f):
    return torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())


def vmap_of_grad(f):
    return torch.func.vmap(torch.func.grad(f))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("transform", [torch.func.grad, grad_twice, vmap_of_grad])
def test_compiled_transforms_of_torch_func(transform):
    """Within them auto takes the Python path, and the question does not break the graph."""
    q, *rest = random_op_inputs(2, 6, 8, 3, 2, dtype=torch.float64).values()
    if transform is vmap_of_grad:
        q = torch.stack([q, 2 * q])
    f = transform(lambda q: dydila_attention(q, *rest).square().sum())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(q), f(q), atol=1e-9, rtol=1e-9)
