"""probe.py: attention matrices and routes of every model, against loops and known cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import CONFIG, RUN, differing, prepare_digits, read_log, without_speed
from util import assert_close, choose, power

import dydilit
from dydilit import Config, Data, DyDiLA, train
from experiments import baselines, pretrained, probe
from experiments.baselines import MODELS, VARIANTS, GatedLinear, Ladder, ReLULinear, variant
from experiments.probe import entropies, routers, row_statistics, usage, usage_entropy, watched
from support.runs import prepare_resume

BASE = Config(
    input_size=8,
    in_channels=1,
    hidden_size=24,
    depth=2,
    n_projectors=2,
    n_kernels=3,
    n_lambdas=4,
    num_classes=10,
)
NAMES = ["q_projector", "k_projector", *probe.KERNELS, *probe.DIFFERENCES]


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


def model_of(name, **changes):
    """A small model in float64 with two blocks and weights that are nowhere special."""
    config = variant(name, BASE) if name in VARIANTS else BASE
    config = replace(config, depth=2, **changes)
    if name == "MoH":
        config = replace(config, heads=4, shared_heads=1, routed_heads=2)
    if name in ("DiT", "PixArt", "LiT", "MHLA", "DiG", "FLatten"):
        config = replace(config, heads=2)
    model = config.build().double()
    for key, p in model.named_parameters():
        if "gamma" in key:
            torch.nn.init.uniform_(p, 1, 4)
        else:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def some_input():
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    return x, torch.tensor([3, 700]), torch.tensor([1, 2])


# --------------------------------------------------------------------------------------------------
# Attention matrices.


def before_projection(attn, x, grid):
    """The attention before its convolution and projection, from a forward pass without a probe."""
    if isinstance(attn, Ladder):
        attn.dwc = None
    if isinstance(attn, DyDiLA):
        attn.dwc.forward = lambda v, grid: 0
    if isinstance(attn, ReLULinear):
        attn.local = lambda v, grid: 0
    caught = []
    last = attn.o_proj if isinstance(attn, GatedLinear) else attn.proj
    hook = last.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    attn(x, grid)
    hook.remove()
    return caught[0]


def seen_attention(model, block, x, grid):
    """(matrix, values) of the second of two forward passes of one block's attention."""
    with watched(model, matrices=True) as seen:
        block.attn(torch.randn_like(x), grid)
        block.attn(x, grid)
    return seen[list(model.blocks).index(block)]["attention"][1]


def scan_of(grid, i):
    """DiG's scan in the first two blocks: rows, rows backwards."""
    order = list(range(math.prod(grid)))
    return order[::-1] if i % 2 else order


EVERY_BLOCK = pytest.mark.parametrize("block", [0, 1])  # PixArt and DiG differ from block to block
GRIDS = pytest.mark.parametrize("grid", [(2, 4), (6, 6)])  # fewer tokens than channels, and more


@EVERY_BLOCK
@GRIDS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", [*VARIANTS, "DyDi-LiT"])
@torch.no_grad()
def test_matrix_times_values_is_the_attention(name, normalize, grid, block):
    changes = {}
    if name == "MHLA":  # it has the grid of its config, which is square
        grid = (max(grid),) * 2
        changes = {"input_size": 2 * max(grid)}
    model = model_of(name, normalize=normalize, **changes)
    attn = model.blocks[block].attn
    x = torch.randn(3, math.prod(grid), 24, dtype=torch.float64)
    want = before_projection(attn, x, grid)
    matrix, values = seen_attention(model, model.blocks[block], x, grid)
    assert matrix.shape[:3] == (3, getattr(attn, "heads", 1), x.shape[1])
    heads = matrix @ values
    if isinstance(attn, GatedLinear):  # a norm and a gate follow, in the order of the scan
        heads = attn.g_norm(heads)
        gate = F.silu(attn.g_proj(x))
        want = want[:, scan_of(grid, attn.i)]
    else:
        gate = 1
    o = heads.transpose(1, 2).flatten(2) * gate
    assert_close(f"{name} {grid}", o, want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_the_matrix_of_a_block_of_moh_without_routing_has_its_gates():
    model = model_of("MoH")
    model = replace(model.config, depth=3).build().double()
    attn, x = model.blocks[2].attn, torch.randn(3, 8, 24, dtype=torch.float64)
    want = before_projection(attn, x, (2, 4))
    with watched(model, matrices=True) as seen:
        attn(x, (2, 4))
    assert "heads" in seen[0]["routes"] and seen[2]["routes"] == {}
    matrix, values = seen[2]["attention"][0]
    assert_close("o", (matrix @ values).transpose(1, 2).flatten(2), want, atol=1e-10)


@pytest.mark.parametrize("rule", ["score", "dense"])
@torch.no_grad()
def test_routes_of_every_rule_are_seen(rule):
    model = model_of("ladder-5-dwc", router_rule=rule)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    with watched(model) as seen:
        model.blocks[0].attn(x, (3, 4))
    got = {key: index for key, (index,) in seen[0]["routes"].items()}
    assert list(got) == NAMES
    logits = x @ model.blocks[0].attn.q_projector_router
    assert torch.equal(got["q_projector"], logits.argmax(-1))


@pytest.mark.parametrize("name", ["DiT", "PixArt"])
@torch.no_grad()
def test_the_rows_of_a_softmax_are_probabilities(name):
    model, x = model_of(name), torch.randn(3, 36, 24, dtype=torch.float64)
    matrix, _ = seen_attention(model, model.blocks[1], x, (6, 6))
    assert_close("sums", matrix.sum(-1), torch.ones(matrix.shape[:3]), 1e-12)


@torch.no_grad()
def test_the_matrix_of_dig_is_in_the_order_of_the_image():
    """In the second block, which scans backwards, tokens see what follows them."""
    model, x = model_of("DiG"), torch.randn(3, 36, 24, dtype=torch.float64)
    first, _ = seen_attention(model, model.blocks[0], x, (6, 6))
    second, _ = seen_attention(model, model.blocks[1], x, (6, 6))
    assert torch.equal(first, first.tril()) and torch.equal(second, second.triu())


@torch.no_grad()
def test_a_row_is_similarities_over_their_sum():
    model, x = model_of("Sana"), torch.randn(1, 5, 24, dtype=torch.float64)
    attn = model.blocks[0].attn
    matrix, _ = seen_attention(model, model.blocks[0], x, (1, 5))
    q, k, _ = (x @ attn.qkv.weight.T).relu().chunk(3, dim=-1)
    for i in range(5):
        row = torch.stack([q[0, i] @ k[0, j] for j in range(5)])
        assert_close(f"row {i}", matrix[0, 0, i], row / row.sum(), atol=1e-5)


@torch.no_grad()
def test_watching_does_not_change_the_output():
    model, inputs = model_of("DyDi-LiT"), some_input()
    alone = model(*inputs)
    with watched(model, matrices=True):
        assert_close("watched", model(*inputs), alone, atol=1e-9)


REPLACED = [
    (dydilit, "FUSED_DEVICES"),
    (dydilit, "route"),
    (dydilit, "linear_attention"),
    (baselines, "linear_attention"),
    (baselines, "gated_scan"),
    (baselines, "softmax_attention"),
]


@torch.no_grad()
def test_watching_leaves_nothing_behind():
    model, inputs = model_of("DyDi-LiT"), some_input()
    before = [getattr(*place) for place in REPLACED]
    with pytest.raises(KeyError), watched(model, matrices=True) as seen:
        model(*inputs)
        raise KeyError
    assert [getattr(*place) for place in REPLACED] == before
    model(*inputs)
    assert len(seen[0]["attention"]) == 1 and len(seen[0]["routes"]["q_kernel"]) == 1


def test_row_statistics_of_rows_that_are_known():
    uniform = torch.ones(4)
    certain = torch.tensor([0.0, -2, 0, 0])
    half = torch.tensor([3.0, 0, 0, -3])
    assert row_statistics(uniform) == pytest.approx((1, 0))
    assert row_statistics(certain) == pytest.approx((0, 3))
    assert row_statistics(half) == pytest.approx((0.5, 4**2 * np.var([0.5, 0, 0, 0.5])))


def test_row_statistics_are_the_mean_over_rows_that_are_not_zero():
    rows = torch.stack([torch.ones(4), torch.tensor([0.0, -2, 0, 0]), torch.zeros(4)])
    assert row_statistics(rows) == pytest.approx((0.5, 1.5))


# --------------------------------------------------------------------------------------------------
# Routes.


def test_usage_is_the_share_of_each_route():
    assert usage(torch.tensor([0, 0, 1, 1]), 4).tolist() == [0.5, 0.5, 0, 0]


def test_usage_entropy_is_1_for_even_and_0_for_collapsed_routes():
    assert usage_entropy(usage(torch.arange(12).view(3, 4) % 3, 3)) == pytest.approx(1)
    assert usage_entropy(usage(torch.tensor([0, 0, 1, 1]), 4)) == pytest.approx(0.5)
    assert usage_entropy(usage(torch.full((3, 4), 2), 3)) == 0
    assert usage_entropy(usage(torch.zeros(3, 4, dtype=torch.long), 1)) == 1


def routes_of_token(attn, token):
    """{router's name: the choice of one token} by the equations; numpy."""
    a = {key: z.numpy() for key, z in attn.named_parameters()}
    q, k, _ = np.split(a["qkv.weight"] @ token, 3)
    routes, primes = {}, []
    for s in "qk":
        index = choose(token, a[f"{s}_projector_router"])
        routes[f"{s}_projector"] = index
        primes.append(token @ a[f"{s}_projectors"][index])
    measured = []
    for name, z, router in zip(probe.KERNELS, (q, k, *primes), a["kernel_routers"]):
        routes[name] = choose(z, router)
        measured.append(power(z, a["gamma"][routes[name]]))
    q_t, k_t, qp_t, kp_t = measured
    for name, pair, router in zip(
        probe.DIFFERENCES, ((q_t, qp_t), (k_t, kp_t)), a["difference_routers"]
    ):
        routes[name] = choose(np.concatenate(pair), router)
    return routes


@pytest.mark.parametrize("name", ["DyDi-LiT", "ladder-4-difference"])
@torch.no_grad()
def test_routes_are_those_of_the_equations(name):
    model, x = model_of(name), torch.randn(2, 12, 24, dtype=torch.float64)
    attn = model.blocks[1].attn
    with watched(model) as seen:
        attn(x, (3, 4))
    assert seen[0]["routes"] == {key: [] for key in NAMES}, "the first block was not called"
    got = {key: index for key, (index,) in seen[1]["routes"].items()}
    assert list(got) == NAMES
    for b, n in np.ndindex(2, 12):
        mine = {key: index[b, n].item() for key, index in got.items()}
        assert mine == routes_of_token(attn, x[b, n].numpy())


@torch.no_grad()
def test_entropies_are_of_every_router_and_block():
    model = model_of("DyDi-LiT")
    model.blocks[1].attn.q_projector_router.zero_()  # ties: all tokens take index 0
    with watched(model) as seen:
        model(*some_input())
    table = entropies(model, seen)
    assert list(table) == NAMES and all(len(row) == 2 for row in table.values())
    assert table["q_projector"][1] == 0 < table["q_projector"][0] <= 1


KERNELS = ["q_kernel", "k_kernel"]
ROUTERS = {name: [] for name in MODELS} | {
    "MoH": ["heads"],
    "ladder-0-sana": [],
    "ladder-1-focused": [],
    "ladder-2-measure": KERNELS,
    "ladder-3-projection": [*NAMES[:2], *KERNELS],
    "ladder-4-difference": NAMES,
    "ladder-5-dwc": NAMES,
    "map-wise": [*NAMES[:6], "map_difference"],
    "rising-lambda": NAMES,
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_routers_of_the_compared_models(name):
    model = model_of(name)
    with watched(model) as seen:
        model(*some_input())
    assert list(entropies(model, seen)) == ROUTERS[name]
    assert list(routers(model.blocks[0].attn)) == [key for key in ROUTERS[name] if key != "heads"]


@torch.no_grad()
def test_routes_of_moh_are_the_heads_with_a_gate():
    """One head is shared, and each token uses two of the other three."""
    model, x = model_of("MoH"), torch.randn(2, 12, 24).double()
    model.blocks = model.blocks[:1]
    attn = model.blocks[0].attn
    with watched(model) as seen:
        attn(x, (3, 4))
    index = seen[0]["routes"]["heads"][0]
    gates = attn.gates(x)[0][..., 1:]
    assert index.shape == (2, 12, 2)
    assert ((gates > 0).sum(-1) == 2).all() and (gates.gather(-1, index) > 0).all()
    shares = (gates > 0).sum((0, 1)) / 48
    want = -(shares * shares.log()).sum().item() / math.log(3)
    assert entropies(model, seen)["heads"] == [pytest.approx(want)]


@pytest.mark.parametrize("name", ["DyDi-LiT", "map-wise"])
@torch.no_grad()
def test_mean_lambda_is_that_of_the_chosen(name):
    model = model_of(name).float()
    x, noise = torch.randn(2, 3, 1, 8, 8)
    held_out = [x, torch.tensor([0, 1, 2]), torch.tensor([5, 50, 500]), noise]
    with watched(model) as seen:
        model(*probe.noisy(model, held_out))
    got = probe.mean_lambda(model, held_out)
    for block, part, mean in zip(model.blocks, seen, got, strict=True):
        lam = block.attn.lam.tolist()
        used = []
        for key, (index,) in part["routes"].items():
            if "difference" in key:
                used += [lam[i] for i in index.flatten().tolist()]
        assert len(used) == 3 * 16 * (1 if name == "map-wise" else 2)
        assert mean == pytest.approx(np.mean(used))


# --------------------------------------------------------------------------------------------------
# The log.


@pytest.fixture(scope="module")
def logged(digits, tmp_path_factory):
    """The folders of the same run with and without the probe."""
    out = tmp_path_factory.mktemp("logged")
    run = replace(RUN, data=digits)
    train(CONFIG, replace(run, out=str(out / "watched")), on_eval=probe.usage_at_evaluation)
    train(CONFIG, replace(run, out=str(out / "alone")))
    return out / "watched", out / "alone"


def without_usage(log):
    return [{k: v for k, v in line.items() if k != "usage_entropy"} for line in without_speed(log)]


def test_watching_disturbs_no_run(logged):
    one, other = (torch.load(out / "ckpt.pt") | {"training": None} for out in logged)
    assert differing(one, other) == []
    one, other = (without_usage(read_log(out)) for out in logged)
    assert one == other


def test_usage_entropy_is_in_the_log_of_every_evaluation(logged, digits):
    log = read_log(logged[0])
    evaluated = ["held_out_loss" in line for line in log]
    assert ["usage_entropy" in line for line in log] == evaluated == [False, True] * 3


def test_usage_entropy_in_the_log_is_that_of_the_averaged_weights(logged, digits):
    model = pretrained.load(logged[0] / "ckpt.pt")
    x, y, t, noise = (z[:64] for z in Data(digits, CONFIG).held_out())
    with watched(model) as seen:
        model(dydilit.Diffusion().q_sample(x, t, noise), t, y)
    table = entropies(model, seen)
    assert list(table) == NAMES
    want = {key: [round(h, 4) for h in row] for key, row in table.items()}
    assert read_log(logged[0])[-1]["usage_entropy"] == want


def test_a_continued_log_is_that_of_an_uninterrupted_run(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path / "once"), decay=0.0)
    train(CONFIG, run, on_eval=probe.usage_at_evaluation)
    for steps in (3, 6):
        part = replace(run, out=str(tmp_path / "twice"), steps=steps)
        if steps > 3:
            prepare_resume(CONFIG, part)
        train(CONFIG, part, resume=steps > 3, on_eval=probe.usage_at_evaluation)
    once, twice = (without_speed(read_log(tmp_path / name)) for name in ("once", "twice"))
    # the end of the first part, step 3, is evaluated as well
    assert [x for x in once if x["step"] != 3] == [x for x in twice if x["step"] != 3]


def test_a_model_that_routes_nothing_logs_nothing(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path))
    train(variant("DiT", CONFIG), run, on_eval=probe.usage_at_evaluation)
    assert not any("usage_entropy" in line for line in read_log(tmp_path))
