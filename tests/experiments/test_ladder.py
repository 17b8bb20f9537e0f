"""The ladder of ablations row by row, from Sana to DyDiLA; batch norm in its convolution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from loops import GRID, TINY, attention, compare, projected, routed, rung
from runs import CONFIG, RUN, prepare_digits
from util import assert_close, attend, choose, linear, normal, power, randomized

import dydilit
from dydilit import Config, DyDiLA, train
from experiments.baselines import LADDER, NormedDWC, variant

pytestmark = pytest.mark.usefixtures("reference_path")  # but for the test of the fused op


def load(module, state, **more):
    """Fill `module` from another's state and from `more`; every parameter of it must be there."""
    shared = {name: state[name] for name in module.state_dict() if name in state}
    module.load_state_dict(shared | more)
    return module


# --------------------------------------------------------------------------------------------------
# Both ends.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("router_grad", [True, False])
def test_the_last_row_is_dydila(normalize, router_grad):
    ladder = rung("ladder-5-dwc", normalize=normalize, router_grad=router_grad)
    config = Config(
        hidden_size=12,
        n_projectors=2,
        n_kernels=3,
        n_lambdas=3,
        normalize=normalize,
        router_grad=router_grad,
    )
    dydila = DyDiLA(config).double()
    dydila.load_state_dict(ladder.state_dict())
    x, cotangent = normal(2, 15, 12), normal(2, 15, 12, seed=1)
    a, b = ladder(x, GRID), dydila(x, GRID)
    assert torch.equal(a, b)
    (a * cotangent).sum().backward()
    (b * cotangent).sum().backward()
    ours, theirs = dict(ladder.named_parameters()), dict(dydila.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        q = theirs[name]
        assert p.requires_grad == q.requires_grad, name
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name


def test_a_model_of_last_rows_is_dydilit():
    ladder, model = variant("ladder-5-dwc", TINY).build(), TINY.build()
    ladder.load_state_dict(randomized(model).float().state_dict())
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([3, 800]), torch.tensor([0, 4])
    assert torch.equal(ladder(x, t, y), model(x, t, y))


EXTENSION = "cpu" in dydilit.FUSED_DEVICES


@pytest.mark.skipif(not EXTENSION, reason="the extension is not built")
@pytest.mark.parametrize("name", ["ladder-4-difference", "ladder-5-dwc"])
def test_the_last_two_rows_run_the_fused_op(name, monkeypatch):
    x = normal(2, 15, 12)
    want = rung(name)(x, GRID)
    monkeypatch.setattr(dydilit, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(dydilit, "measure", None)  # the Python path would call it
    assert_close(name, rung(name)(x, GRID), want, atol=1e-9)


def test_the_first_row_is_sana():
    ladder, x = rung("ladder-0-sana"), normal(2, 15, 12)
    sana = attention("relu", heads=1)
    sana.load_state_dict(ladder.state_dict())
    assert_close("O", ladder(x, GRID), sana(x, GRID), atol=1e-12)


# --------------------------------------------------------------------------------------------------
# From row to row.


def shapes_of(name):
    return {key: tuple(p.shape) for key, p in rung(name).named_parameters()}


PROJECTORS = {"q_projectors", "k_projectors", "q_projector_router", "k_projector_router"}
BRANCHES = {"dwc.square", "dwc.horizontal", "dwc.vertical", "dwc.bias"}
STEPS = {  # row: the parameters that it adds to the row before, and those that it removes
    "ladder-1-focused": (set(), set()),
    "ladder-2-measure": ({"gamma", "kernel_routers"}, set()),
    "ladder-3-projection": ({"v.weight"} | PROJECTORS, {"qkv.weight"}),
    "ladder-4-difference": ({"qkv.weight", "lam", "difference_routers"}, {"v.weight"}),
    "ladder-5-dwc": (BRANCHES, set()),
}


@pytest.mark.parametrize("upper", STEPS)
def test_a_row_adds_the_parameters_that_it_names(upper):
    rows = list(LADDER)
    before = shapes_of(rows[rows.index(upper) - 1])
    after = shapes_of(upper)
    added, removed = STEPS[upper]
    assert after.keys() - before.keys() == added
    assert before.keys() - after.keys() == removed
    resized = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    # the difference brings two more kernel routers, of Q' and K'
    assert resized == ({"kernel_routers"} if upper == "ladder-4-difference" else set())


def test_the_other_rows_have_the_parameters_of_the_difference():
    assert shapes_of("rising-lambda") == shapes_of("ladder-4-difference")
    one_router = {"difference_routers": (1, 24, 3)}
    assert shapes_of("map-wise") == shapes_of("ladder-4-difference") | one_router


def test_a_measure_kernel_with_every_gamma_3_is_the_focused_kernel():
    x, focused = normal(2, 15, 12), rung("ladder-1-focused")
    measure = load(
        rung("ladder-2-measure"),
        focused.state_dict(),
        gamma=torch.full((3,), 3.0, dtype=torch.float64),
        kernel_routers=normal(2, 12, 3),
    )
    assert_close("O", measure(x, GRID), focused(x, GRID), atol=1e-12)


def one_projector(measure):
    """ladder-3 with one projector, which is the shared projection of ladder-2."""
    q, k, v = measure.qkv.weight.detach().chunk(3)
    projectors = {
        "v.weight": v,
        "q_projectors": q.T[None],
        "k_projectors": k.T[None],
        "q_projector_router": normal(12, 1),
        "k_projector_router": normal(12, 1),
    }
    return load(rung("ladder-3-projection", n_projectors=1), measure.state_dict(), **projectors)


def test_one_projector_is_the_shared_projection():
    x, measure = normal(2, 15, 12), rung("ladder-2-measure")
    assert_close("O", one_projector(measure)(x, GRID), measure(x, GRID), atol=1e-12)


def test_a_difference_with_lambda_0_is_no_difference():
    """Q and K are the shared projections again, here the weights of the single projector."""
    x, measure = normal(2, 15, 12), rung("ladder-2-measure")
    projection = one_projector(measure)
    routers = torch.cat([projection.kernel_routers.detach(), normal(2, 12, 3)])
    more = {
        "qkv.weight": measure.qkv.weight.detach(),
        "lam": torch.zeros(3, dtype=torch.float64),
        "difference_routers": normal(2, 24, 3),
        "kernel_routers": routers,
    }
    token = load(rung("ladder-4-difference", n_projectors=1), projection.state_dict(), **more)
    assert_close("O", token(x, GRID), projection(x, GRID), atol=1e-12)


def test_a_convolution_of_zeros_is_no_convolution():
    x, without = normal(2, 15, 12), rung("ladder-4-difference")
    zeros = rung("ladder-5-dwc")
    branches = {key: torch.zeros_like(zeros.state_dict()[key]) for key in BRANCHES}
    zeros.load_state_dict(without.state_dict() | branches)
    assert_close("O", zeros(x, GRID), without(x, GRID), atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Rows against loops.


def kernel_of(s, which):
    """phi with a routed gamma, for Q, K, Q', K' (which = 0 .. 3); for one token."""

    def phi(token):
        return power(token, s["gamma"][choose(token, s["kernel_routers"][which])])

    return phi


def each(phi, tokens):
    return np.stack([phi(token) for token in tokens])


def test_dynamic_projection_alone_is_a_loop_of_routed_q_and_k():
    def loop(x, grid, s):
        q, k = routed(x, s)
        q, k = each(kernel_of(s, 0), q), each(kernel_of(s, 1), k)
        return linear(attend(q, k, x @ s["v.weight"].T, True, 1e-6), s, "proj")

    compare("ladder-3", rung("ladder-3-projection"), loop)


def map_loop(x, grid, s, normalize=True):
    """Eq. 10 without DWC; each of the two attentions has its own denominator."""
    q, k, v = projected(x, s)
    tokens = [q, k, *routed(x, s)]
    q, k, qp, kp = (each(kernel_of(s, which), z) for which, z in enumerate(tokens))
    router = s["difference_routers"][0]
    lam = [s["lam"][choose(np.concatenate(pair), router)] for pair in zip(q, qp)]
    subtracted = np.array(lam)[:, None] * attend(qp, kp, v, normalize, 1e-6)
    return linear(attend(q, k, v, normalize, 1e-6) - subtracted, s, "proj")


@pytest.mark.parametrize("normalize", [True, False])
def test_map_wise_is_a_loop(normalize):
    compare("map-wise", rung("map-wise", normalize=normalize), map_loop, normalize=normalize)


def test_map_wise_with_lambda_0_is_no_difference():
    both, x = rung("map-wise"), normal(2, 15, 12)
    nn.init.zeros_(both.lam)
    routers = both.kernel_routers[:2].detach()
    plain = load(rung("ladder-2-measure"), both.state_dict() | {"kernel_routers": routers})
    assert_close("O", both(x, GRID), plain(x, GRID), atol=1e-12)
    nn.init.ones_(both.lam)
    assert (both(x, GRID) - plain(x, GRID)).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", ["relu", "focused", "dynamic"])
def test_the_token_difference_works_with_every_kernel(kernel):
    fixed = {"relu": 1.0, "focused": 3.0}

    def subtract(z, z_prime, s, which):
        out = []
        for a, b in zip(z, z_prime):
            index = choose(np.concatenate([a, b]), s["difference_routers"][which])
            out.append(a - s["lam"][index] * b)
        return np.stack(out)

    def loop(x, grid, s):
        q, k, v = projected(x, s)
        tokens = [q, k, *routed(x, s)]
        if kernel in fixed:
            features = [each(lambda token: power(token, fixed[kernel]), z) for z in tokens]
        else:
            features = [each(kernel_of(s, which), z) for which, z in enumerate(tokens)]
        q, k, qp, kp = features
        dq, dk = subtract(q, qp, s, 0), subtract(k, kp, s, 1)
        return linear(attend(dq, dk, v, True, 1e-6), s, "proj")

    compare(kernel, rung("ladder-4-difference", kernel=kernel), loop)


# --------------------------------------------------------------------------------------------------
# Initial values.


def first_lambdas(name, depth=4):
    model = variant(name, replace(TINY, depth=depth)).build()
    for block in model.blocks:
        assert (block.attn.lam == block.attn.lam[0]).all()
    return [block.attn.lam[0].item() for block in model.blocks]


@pytest.mark.parametrize("name", ["ladder-4-difference", "ladder-5-dwc", "map-wise"])
def test_lambdas_start_at_a_hundredth(name):
    assert first_lambdas(name) == pytest.approx([0.01] * 4)  # Sec. 4.1


def test_rising_lambdas_rise_with_depth():
    assert first_lambdas("rising-lambda") == pytest.approx([0.2, 0.4, 0.6, 0.8])  # Table 6
    assert first_lambdas("rising-lambda", depth=1) == pytest.approx([0.2])


@pytest.mark.parametrize(
    "name", ["ladder-4-difference", "ladder-5-dwc", "map-wise", "rising-lambda"]
)
def test_other_initial_values_are_dydilas(name):
    for block in variant(name, replace(TINY, depth=4, hidden_size=128)).build().blocks:
        attn = block.attn
        assert (attn.gamma == 3).all()
        for router in (attn.q_projector_router, attn.kernel_routers, attn.difference_routers):
            assert abs(router.std() / 0.02 - 1) < 0.2
        for weight in attn.q_projectors:
            assert abs(weight.std() / (2 / 256) ** 0.5 - 1) < 0.1  # Xavier


# --------------------------------------------------------------------------------------------------
# Batch norm.


def torch_norms(dwc, learning):
    """A BatchNorm2d of torch for each branch, with the same scale and running statistics."""
    norms = []
    for scale, mean, var in zip(dwc.scale, dwc.mean, dwc.var):
        norm = nn.BatchNorm2d(6).double().train(learning)
        norm.load_state_dict(
            {
                "weight": scale.detach().clone(),
                "bias": torch.zeros(6),
                "running_mean": mean.detach().clone(),
                "running_var": var.detach().clone(),
                "num_batches_tracked": torch.tensor(0),
            }
        )
        norms.append(norm)
    return norms


def random_normed_dwc():
    dwc = randomized(NormedDWC(6))
    with torch.no_grad():
        dwc.var.abs_()
    return dwc


@pytest.mark.parametrize("learning", [True, False])
def test_batch_norm_in_the_branches_is_that_of_torch(learning):
    dwc, x = random_normed_dwc(), normal(4, 15, 6)
    norms = torch_norms(dwc, learning)
    before = {name: getattr(dwc, name).clone() for name in ("mean", "var")}
    image = dydilit.to_image(x, GRID)
    want = dwc.bias.view(-1, 1, 1)
    for norm, weight in zip(norms, (dwc.square, dwc.horizontal, dwc.vertical)):
        padding = [n // 2 for n in weight.shape[2:]]
        want = want + norm(F.conv2d(image, weight, padding=padding, groups=6))
    with torch.set_grad_enabled(learning):
        got = dwc(x, GRID)
    assert_close("normed", got, dydilit.to_tokens(want), atol=1e-11)
    for name in ("mean", "var"):
        running = torch.stack([getattr(norm, f"running_{name}") for norm in norms])
        assert_close(name, getattr(dwc, name), running, 1e-12)
        moved = not torch.equal(getattr(dwc, name), before[name])
        assert moved == learning


def test_without_gradients_batch_norm_keeps_images_apart():
    dwc, x = random_normed_dwc(), normal(4, 15, 6)
    with torch.no_grad():
        alone = dwc(x[:1], GRID)
    assert_close("an image alone", dwc.eval()(x, GRID)[:1], alone, atol=1e-11)


def test_a_convolution_with_batch_norm_cannot_be_merged():
    with pytest.raises(NotImplementedError):
        NormedDWC(6).merge_()


def test_the_averaged_weights_average_the_statistics_too(tmp_path):
    config = replace(variant("ladder-5-dwc", CONFIG), batch_norm=True)
    data = str(prepare_digits(tmp_path / "data"))
    train(config, replace(RUN, data=data, out=str(tmp_path / "out"), ema_decay=0.5))
    ckpt = torch.load(tmp_path / "out" / "ckpt.pt")
    for name in ("mean", "var"):
        key = f"blocks.0.attn.dwc.{name}"
        start, ema, now = config.build().state_dict()[key], ckpt["ema"][key], ckpt["model"][key]
        assert not torch.equal(start, ema) and not torch.equal(ema, now)
        lags = (ema - start).abs() < (now - start).abs()
        assert lags.float().mean() > 0.9
