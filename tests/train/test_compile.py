"""torch.compile of the network: no graph break, no second compilation, the gradients of eager.

By Dynamo, in which a graph breaks or not, and AOTAutograd; the last test goes on to Inductor.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import CONFIG, assert_same_run, differing, flags, parts, resume
from util import assert_close, normal, randomized

import dydilit
import sample_min
import train_min
from dydilit import Config, Diffusion, DyDiLA, DyDiLiT, train
from experiments import baselines

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own
SMALL = Config(
    input_size=8,
    in_channels=1,
    hidden_size=16,
    depth=1,
    n_projectors=3,
    n_kernels=3,
    n_lambdas=3,
    num_classes=4,
)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def aot(monkeypatch):
    """torch.compile without Inductor, here and in what is called."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def dynamo(monkeypatch):
    """torch.compile without AOTAutograd and Inductor."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def batch(seed, B=3):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, B, 1, 8, 8, generator=g)
    return x, torch.arange(B), torch.tensor([3, 500, 999])[:B], noise


def losses_and_gradients(model, network, images, bf16=False):
    """[both terms of the loss, all gradients] of `network`, whose weights are those of `model`."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        mse, vb = Diffusion().loss(network, *images)
    (mse + vb).mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [mse.detach(), vb.detach(), *(p.grad.clone() for p in trained)]


def assert_alike(got, want, bound):
    """Each tensor differs by at most `bound` of its norm."""
    assert len(got) == len(want) > 4
    for a, b in zip(got, want):
        assert (a - b).norm() <= bound * b.norm() + 1e-9


@pytest.mark.parametrize(
    ("backend", "router_grad", "bf16"),
    [
        ("reference", True, False),
        ("reference", False, True),
        ("fused", True, True),
        ("fused", False, False),
    ],
)
def test_a_training_step_is_one_graph_with_the_gradients_of_eager(backend, router_grad, bf16, aot):
    if backend == "fused" and "cpu" not in dydilit.FUSED_DEVICES:
        pytest.skip("the extension is not built")
    model = randomized(DyDiLiT(replace(SMALL, router_grad=router_grad))).float()
    for module in model.modules():
        if isinstance(module, DyDiLA):
            module.backend = backend
    network = torch.compile(model, fullgraph=True)
    images = batch(0)
    got = losses_and_gradients(model, network, images, bf16)
    # in bfloat16 the gradients of a tensor with several uses are added in another order
    assert_alike(got, losses_and_gradients(model, model, images, bf16), 3e-2 if bf16 else 1e-5)


def test_other_routes_are_not_compiled_again(dynamo):
    model = randomized(DyDiLiT(SMALL)).float()
    network = torch.compile(model, fullgraph=True)
    losses_and_gradients(model, network, batch(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            for name, p in model.named_parameters():
                if "router" in name:
                    p.data.normal_()
            got = losses_and_gradients(model, network, batch(seed))
            assert_alike(got, losses_and_gradients(model, model, batch(seed)), 1e-4)


def test_sampling_is_one_graph_for_every_number_of_images(dynamo):
    model = randomized(DyDiLiT(SMALL)).float().eval()
    diffusion, compiled = Diffusion(3), torch.compile(model, fullgraph=True)
    for B in (2, 3, 4):
        y = torch.arange(B)
        want = diffusion.sample(model, y, range(B), seed=0, cfg=1.5, clip=True)
        # the second number of images makes the shape a variable, the third finds it so
        with torch._dynamo.config.patch(error_on_recompile=B == 4):
            got = diffusion.sample(compiled, y, range(B), seed=0, cfg=1.5, clip=True)
        assert_close(f"{B} images", got, want, atol=1e-5)


@pytest.mark.parametrize("name", [*baselines.MODELS, "ladder-3-projection", "map-wise"])
def test_compared_models_are_one_graph_too(name, dynamo):
    config = replace(baselines.variant(name, replace(SMALL, depth=3)), depth=3)
    model = randomized(config.build()).float()
    network = torch.compile(model, fullgraph=True)
    got = losses_and_gradients(model, network, batch(0))
    assert_alike(got, losses_and_gradients(model, model, batch(0)), 1e-4)


def test_the_tiles_that_a_gpu_takes_are_one_graph_for_all_routes(dynamo):
    rows, projectors = normal(40, 6), normal(3, 6, 6)
    compiled = torch.compile(dydilit.project_by_tiles, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for routes in ([0, 1], [2, 2], [1, 0]):
            index = torch.tensor(routes * 20)
            got = compiled(rows, projectors, index)
            assert_close("out", got, dydilit.project(rows, projectors, index), atol=1e-13)


def test_opcheck_of_the_projection_and_of_its_gradient():
    shapes = (12, 6), (12, 6), (3, 6, 6)
    rows, cotangents, projectors = (normal(*shape).requires_grad_() for shape in shapes)
    index = torch.tensor([0, 2] * 6)
    torch.library.opcheck(torch.ops.dydilit.project, (rows, projectors, index))
    torch.library.opcheck(torch.ops.dydilit.project_weights, (rows, cotangents, index, 3))


# ----------------------------------------------------------------------------------------------
# Runs.


def test_a_compiled_run_is_that_of_eager(run, tmp_path, aot):
    train(CONFIG, run, compiled=True)
    train(CONFIG, replace(run, out=str(tmp_path / "eager")))
    assert_same_run(run.out, tmp_path / "eager")


def test_the_checkpoint_of_a_compiled_run_has_the_names_of_the_model(run, dynamo):
    train(CONFIG, run, compiled=True)
    names = DyDiLiT(CONFIG).state_dict().keys()
    assert parts(run.out)["model"].keys() == parts(run.out)["ema"].keys() == names


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "eager first"])
def test_a_run_goes_on_between_compiled_and_eager(first, run, tmp_path, dynamo):
    whole = replace(run, decay=0.0)
    train(CONFIG, whole)
    resumed = replace(whole, out=str(tmp_path / "resumed"))
    train(CONFIG, replace(resumed, steps=3), compiled=first)
    assert resume(CONFIG, resumed, compiled=not first) == run.steps
    assert not differing(parts(whole.out), parts(resumed.out), 1e-5)


@pytest.mark.parametrize("gpu", [True, False])
def test_scripts_compile_by_default_on_a_gpu_alone(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for parse in (lambda argv: train_min.parse(argv)[2], sample_min.command_line().parse_args):
        asked = [parse(argv).compile for argv in ([], ["--compile"], ["--no-compile"])]
        assert asked == [gpu, True, False]


def test_train_min_says_that_it_compiles_and_writes_the_profile(run, dynamo, capsys):
    arguments = flags(**asdict(CONFIG), **asdict(replace(run, steps=14, eval_every=14)))
    train_min.train_and_sample([*arguments, "--samples=0", "--compile", "--profile=2"])
    assert "train: the first step compiles the network ..." in capsys.readouterr().err
    trace = json.loads(Path(run.out, "profile.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep")}
    assert len(steps) == 2


# ----------------------------------------------------------------------------------------------
# Inductor.


def test_inductor_has_the_gradients_of_eager():
    model = randomized(DyDiLA(SMALL)).float()
    x, cotangent = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    want = torch.autograd.grad(model(x, (3, 4)), model.parameters(), cotangent)
    network = torch.compile(model, fullgraph=True)
    assert_alike(torch.autograd.grad(network(x, (3, 4)), model.parameters(), cotangent), want, 1e-4)
