"""The rules by which routers learn: their values against loops, their gradients by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loops import GRID, TINY, compare, projected, rung, softmax
from torch.autograd import gradcheck
from util import arrays, assert_close, attend, choose, dwc_loop, linear, normal, part, power

import dydilit
from dydilit import Diffusion
from experiments import routing
from experiments.baselines import LADDER, Baseline, variant

pytestmark = pytest.mark.usefixtures("reference_path")

X, ROUTER = normal(2, 5, 6), normal(6, 3, seed=1)
PROJECTORS, BANK = normal(3, 6, 6, seed=2), torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64)
OTHER = normal(2, 5, 6, seed=3)
BOTH = normal(12, 3, seed=4)


def functions(rule):
    """{name: (function of its bank and its router, bank, router, what choice u gives)}."""
    project = (
        lambda bank, router: routing.routed_projection(X, bank, router, rule),
        PROJECTORS,
        ROUTER,
        lambda u: X @ PROJECTORS[u],
    )
    kernel = (
        lambda bank, router: routing.measure(X, bank, router, rule),
        BANK,
        ROUTER,
        lambda u: dydilit.power_kernel(X, BANK[u]),
    )
    factor = (
        lambda bank, router: X - routing.difference(X, OTHER, bank, router, rule),
        BANK,
        BOTH,
        lambda u: BANK[u] * OTHER,
    )
    return {"projection": project, "measure": kernel, "difference": factor}


NAMES = pytest.mark.parametrize("name", ["projection", "measure", "difference"])


def logits_of(name):
    z = torch.cat([X, OTHER], dim=-1) if name == "difference" else X
    return z @ (BOTH if name == "difference" else ROUTER)


@NAMES
def test_ratio_is_dydilit(name):
    function, bank, router, _ = functions("ratio")[name]
    want = {
        "projection": lambda: dydilit.routed_projection(X, bank, router),
        "measure": lambda: dydilit.measure(X, bank, router),
        "difference": lambda: X - dydilit.difference(X, OTHER, bank, router),
    }[name]()
    assert torch.equal(function(bank, router), want)


@NAMES
def test_dense_has_the_value_of_the_equations(name):
    function, bank, router, _ = functions("dense")[name]
    want, *_ = functions("ratio")[name]
    assert_close(name, function(bank, router), want(bank, router), atol=1e-14)


@NAMES
def test_score_multiplies_what_the_winner_gives(name):
    function, bank, router, gives = functions("score")[name]
    got = function(bank, router)
    logits = logits_of(name).numpy()
    for b, i in np.ndindex(2, 5):
        p = softmax(logits[b, i])
        want = p.max() * gives(int(p.argmax()))[b, i]
        assert_close(name, got[b, i], want, atol=1e-14)


def router_gradient(function, bank, router, cotangent):
    router = router.clone().requires_grad_()
    return torch.autograd.grad((function(bank, router) * cotangent).sum(), router)[0]


@NAMES
def test_densely_a_router_learns_from_every_choice(name):
    """d loss / d logit_u = p_u (c_u - sum_v p_v c_v), with c_u = <cotangent, what u gives>.

    Of the kernel, c_u is gamma_u times the derivative by the gamma of the winner.
    """
    function, bank, router, gives = functions("dense")[name]
    cotangent = normal(2, 5, 6, seed=5)
    got = router_gradient(function, bank, router, cotangent)
    z = torch.cat([X, OTHER], dim=-1) if name == "difference" else X
    logits = logits_of(name).numpy()
    want = np.zeros(router.shape)
    for b, i in np.ndindex(2, 5):
        p = softmax(logits[b, i])
        if name == "measure":
            gamma = BANK[p.argmax()].clone().requires_grad_()
            value = (dydilit.power_kernel(X[b, i], gamma) * cotangent[b, i]).sum()
            c = BANK.numpy() * torch.autograd.grad(value, gamma)[0].item()
        else:
            c = np.array([(gives(u)[b, i] * cotangent[b, i]).sum().item() for u in range(3)])
        want += np.outer(z[b, i].numpy(), p * (c - p @ c))
    assert_close(name, got, want, atol=1e-12)


@NAMES
def test_densely_only_the_winner_of_a_bank_learns(name):
    gradients = []
    for rule in ("dense", "ratio"):
        function, bank, router, _ = functions(rule)[name]
        bank = bank.clone().requires_grad_()
        gradients += torch.autograd.grad((function(bank, router) * OTHER).sum(), bank)
    assert_close(name, *gradients, atol=1e-12)


@NAMES
def test_the_gradient_of_score_is_the_derivative(name):
    function, bank, router, _ = functions("score")[name]
    inputs = [bank.clone().requires_grad_(), router.clone().requires_grad_()]
    assert gradcheck(function, inputs)


# --------------------------------------------------------------------------------------------------
# In the ladder.


def score_loop(x, grid, s):
    """DyDiLA, token by token, with every choice multiplied by its score."""

    def scored(z, router):
        return choose(z, router), softmax(z @ router).max()

    def primes(z):
        out = []
        for token in x:
            index, score = scored(token, s[f"{z}_projector_router"])
            out.append(score * (token @ s[f"{z}_projectors"][index]))
        return np.stack(out)

    def phi(tokens, which):
        out = []
        for token in tokens:
            index, score = scored(token, s["kernel_routers"][which])
            out.append(score * power(token, s["gamma"][index]))
        return np.stack(out)

    def subtract(z, z_prime, which):
        out = []
        for a, b in zip(z, z_prime):
            index, score = scored(np.concatenate([a, b]), s["difference_routers"][which])
            out.append(a - score * s["lam"][index] * b)
        return np.stack(out)

    q, k, v = projected(x, s)
    q, k, qp, kp = (phi(z, which) for which, z in enumerate((q, k, primes("q"), primes("k"))))
    o = attend(subtract(q, qp, 0), subtract(k, kp, 1), v, True, 1e-6)
    return linear(o + dwc_loop(v, grid, part(s, "dwc.")), s, "proj")


def test_dydila_with_scores_is_a_loop():
    compare("score", rung("ladder-5-dwc", router_rule="score"), score_loop)


TOKEN_WISE = [name for name in LADDER if name not in ("map-wise", "rising-lambda")]


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_a_dense_row_has_the_value_of_the_row(name):
    x = normal(2, 15, 12)
    want = rung(name)(x, GRID)
    assert_close(name, rung(name, router_rule="dense")(x, GRID), want, atol=1e-11)


@pytest.mark.parametrize("rule", ["score", "dense"])
def test_a_model_of_every_rule_trains(rule):
    config = replace(variant("ladder-5-dwc", TINY), router_rule=rule)
    model, diffusion = config.build(), Diffusion()
    x, noise = torch.randn(8, 2, 8, 8), torch.randn(8, 2, 8, 8)
    y, t = torch.arange(8) % 5, torch.arange(8) * 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        losses.append(sum(diffusion.loss(model, x, y, t, noise)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    for key, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), key


@pytest.mark.parametrize("rule", ["score", "dense"])
def test_rules_add_no_parameters(rule):
    shapes = [
        {key: p.shape for key, p in rung("ladder-5-dwc", router_rule=r).named_parameters()}
        for r in ("ratio", rule)
    ]
    assert shapes[0] == shapes[1]
    weights = [arrays(rung("ladder-5-dwc", router_rule=r)) for r in ("ratio", rule)]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


WRONG = [
    ({"router_rule": "softmax"}, "unknown router_rule 'softmax'; known: ratio, score, dense"),
    ({"router_rule": "score", "router_grad": False}, "'score' needs router_grad"),
    ({"router_rule": "dense", "differential": "map"}, "'map' has router_rule 'ratio' only"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_rule_that_cannot_be_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Baseline(attention="ladder", **changes)


def test_a_rule_is_for_the_ladder():
    with pytest.raises(ValueError, match="router_rule is for attention 'ladder', not for 'softma"):
        Baseline(router_rule="score")
