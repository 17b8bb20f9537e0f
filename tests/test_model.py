"""The modules and the network against the loops of util.py; sizes, costs, gradients, errors."""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from util import (
    arrays,
    assert_close,
    dwc_loop,
    dydila_loop,
    model_loop,
    normal,
    randomized,
    side_margin,
    sincos_loop,
    timestep_loop,
    top2_margin,
    unpatchify_loop,
)

import dydilit
from dydilit import DWC, PRESETS, Config, DyDiLA, DyDiLiT, position_embedding, to_image, to_tokens

pytestmark = pytest.mark.usefixtures("reference_path")  # test_fused.py tests the extension
TINY = Config(
    input_size=6,
    patch_size=2,
    in_channels=2,
    hidden_size=8,
    depth=2,
    n_projectors=2,
    n_kernels=3,
    n_lambdas=3,
    num_classes=4,
)


def tiny_batch(B=3, dtype=torch.float64):
    """x, t, y for TINY; the third label is "no label"."""
    t, y = torch.tensor([0, 17, 999]), torch.tensor([3, 0, 4])
    return normal(B, 2, 6, 6, dtype=dtype), t[:B], y[:B]


# ----------------------------------------------------------------------------------------------
# DWC, Eq. 9.


def test_to_tokens_undoes_to_image():
    x = normal(2, 12, 3)
    image = to_image(x, (3, 4))
    assert image.shape == (2, 3, 3, 4) and image[1, 2, 1, 3] == x[1, 1 * 4 + 3, 2]
    assert torch.equal(to_tokens(image), x)


def test_dwc_is_a_loop_over_pixels():
    dwc, v = randomized(DWC(3)), normal(2, 12, 3)
    want = np.stack([dwc_loop(image, (3, 4), arrays(dwc)) for image in v.numpy()])
    assert_close("DWC", dwc(v, (3, 4)), want, atol=1e-13)


def three_convolutions(dwc, v, grid):
    """The branches of a DWC one by one."""
    D = v.shape[-1]
    image = v.reshape(len(v), *grid, D).permute(0, 3, 1, 2)
    square = F.conv2d(image, dwc.square, dwc.bias, padding=1, groups=D)
    horizontal = F.conv2d(image, dwc.horizontal, padding=(0, 1), groups=D)
    vertical = F.conv2d(image, dwc.vertical, padding=(1, 0), groups=D)
    return (square + horizontal + vertical).permute(0, 2, 3, 1).reshape(v.shape)


GRIDS = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)]


@pytest.mark.parametrize("grid", GRIDS)
def test_dwc_is_the_sum_of_three_convolutions(grid):
    dwc, v = randomized(DWC(5)), normal(2, grid[0] * grid[1], 5)
    assert_close("branches", dwc(v, grid), three_convolutions(dwc, v, grid), atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_dwc_merges_into_one_convolution(grid):
    dwc, v = randomized(DWC(5)), normal(2, grid[0] * grid[1], 5)
    want = three_convolutions(dwc, v, grid)
    for _ in range(2):  # merging twice is merging once
        dwc.merge_()
        assert_close("merged", dwc(v, grid), want, atol=1e-12)
    assert sorted(dict(dwc.named_parameters())) == ["bias", "square"]


def test_every_branch_of_dwc_learns():
    dwc, v = randomized(DWC(2)), normal(1, 6, 2)
    names = [name for name, _ in dwc.named_parameters()]

    def run(v, *weights):
        return torch.func.functional_call(dwc, dict(zip(names, weights)), (v, (2, 3)))

    assert gradcheck(run, (v.requires_grad_(), *dwc.parameters()))
    assert len(names) == 4


# ----------------------------------------------------------------------------------------------
# DyDiLA.


def dydila(seed=0, **fields):
    """A random module, from a config that has the fields it reads and no others."""
    config = SimpleNamespace(
        hidden_size=6, n_projectors=3, n_kernels=4, n_lambdas=3, normalize=True, router_grad=True
    )
    vars(config).update(fields)
    return randomized(DyDiLA(config), seed)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grid", [(3, 5), (2, 2), (1, 1)])
def test_dydila_is_a_loop_over_tokens(grid, normalize):
    attn, x = dydila(normalize=normalize), normal(2, grid[0] * grid[1], 6)
    want = np.stack([dydila_loop(tokens, grid, arrays(attn), normalize) for tokens in x.numpy()])
    assert_close("O", attn(x, grid), want, atol=1e-10, rtol=1e-10)
    attn.dwc.merge_()
    assert_close("O, merged", attn(x, grid), want, atol=1e-10, rtol=1e-10)


class Foreign(nn.Module):
    """Wide pictures to 3 classes around the attention; strides and layout are not DyDiLiT's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.attn = dydila().float()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.attn(x.flatten(2).transpose(1, 2), x.shape[2:]).mean(1))


def test_dydila_learns_in_another_model():
    net, x = Foreign(), normal(8, 3, 8, 20, dtype=torch.float32)
    y = torch.arange(8) % 3
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(30):
        losses.append(F.cross_entropy(net(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("grid", [(3, 4), (15, 2), (0, 0)])
def test_a_grid_that_does_not_hold_the_tokens_is_an_error(grid):
    with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]} does not hold 15 tokens"):
        dydila()(normal(1, 15, 6), grid)


def test_without_dwc_the_order_of_the_tokens_does_not_matter():
    attn, x, order = dydila(), normal(2, 15, 6), torch.randperm(15)
    moved = (attn(x[:, order], (3, 5)) - attn(x, (3, 5))[:, order]).abs().max()
    assert moved > 0.01, "DWC knows where a token is"
    for p in attn.dwc.parameters():
        nn.init.zeros_(p)
    assert_close("O", attn(x[:, order], (3, 5)), attn(x, (3, 5))[:, order], atol=1e-11)
    assert_close("O, another grid", attn(x, (5, 3)), attn(x, (3, 5)), atol=1e-11)


def assert_smooth(attn, x, monkeypatch):
    """No choice of a token is close and no entry is near relu's kink."""
    seen = []

    def keep(*args, **_):
        seen.extend(args)
        return args[4]

    with monkeypatch.context() as patch:
        patch.setattr(dydilit, "dydila_attention", keep)
        attn(x, (2, 2))
    arguments = (z.detach().numpy() for z in seen)
    q, k, q_prime, k_prime, _, gamma, _, kernel_routers, difference_routers = arguments
    assert all(abs(z).min() > 0.01 for z in (q, k, q_prime, k_prime))
    for s, (z, z_prime) in enumerate(((q, q_prime), (k, k_prime))):
        routers = kernel_routers[s], kernel_routers[s + 2], difference_routers[s]
        assert min(side_margin(a, b, gamma, *routers) for a, b in zip(z[0], z_prime[0])) > 0.01
    for router in (attn.q_projector_router, attn.k_projector_router):
        assert top2_margin(x.numpy(), router.detach().numpy()).min() > 0.01


def test_dydila_gradcheck(monkeypatch):
    """x and every parameter but the routers: their gradient is no derivative of the forward."""
    # with this seed a finite difference sees a smooth op
    attn = dydila(
        seed=264, hidden_size=4, n_projectors=2, n_kernels=2, n_lambdas=2, router_grad=False
    )
    x = normal(1, 4, 4)
    assert_smooth(attn, x, monkeypatch)
    trained = {name: p for name, p in attn.named_parameters() if p.requires_grad}
    assert not any("router" in name for name in trained)

    def run(x, *weights):
        return torch.func.functional_call(attn, dict(zip(trained, weights)), (x, (2, 2)))

    assert gradcheck(run, (x.requires_grad_(), *trained.values()))


def test_without_router_grad_routers_are_frozen_and_the_rest_trains():
    attn, x = dydila(router_grad=False), normal(2, 15, 6)
    attn(x, (3, 5)).square().sum().backward()
    for name, p in attn.named_parameters():
        assert (p.grad is None and not p.requires_grad) if "router" in name else p.grad.any(), name


def test_router_grad_does_not_change_the_output():
    x = normal(2, 15, 6)
    frozen, trained = dydila(router_grad=False), dydila(router_grad=True)
    assert torch.equal(trained(x, (3, 5)), frozen(x, (3, 5)))
    assert all(p.requires_grad for p in trained.parameters())


def test_dydila_hands_its_settings_to_the_op(monkeypatch):
    seen = {}

    def record(*args, **settings):
        seen.update(settings)
        return args[4]

    monkeypatch.setattr(dydilit, "dydila_attention", record)
    attn = dydila(normalize=False, router_grad=False)
    assert attn.backend == "auto"
    attn.backend = "reference"
    attn(normal(1, 15, 6), (3, 5))
    assert seen == {"normalize": False, "router_grad": False, "backend": "reference"}


# ----------------------------------------------------------------------------------------------
# The network.


@pytest.mark.parametrize("normalize", [True, False])
def test_dydilit_is_a_loop_over_tokens(normalize):
    config = replace(TINY, normalize=normalize)
    model = randomized(DyDiLiT(config))
    x, t, y = tiny_batch()
    out = model(x, t, y)
    assert out.dtype == torch.float64 and out.shape == (3, 4, 6, 6)
    images = zip(x.numpy(), t.tolist(), y.tolist())
    want = np.stack([model_loop(config, arrays(model), *image) for image in images])
    assert_close("eps, v", out, want, atol=1e-9, rtol=1e-9)


def test_every_gradient_of_dydilit_is_finite_and_in_its_parameters_dtype():
    model = randomized(DyDiLiT(TINY))
    model(*tiny_batch()).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float64 and p.grad.isfinite().all(), name


def test_float32_agrees_with_float64():
    model = randomized(DyDiLiT(TINY))
    x, t, y = tiny_batch()
    want = model(x, t, y)
    got = model.float()(x.float(), t, y)
    assert_close("eps, v", got, want, atol=1e-4 * want.abs().max().item())


AT_THE_START = [PRESETS["digits"], replace(PRESETS["S/2"], depth=1), TINY]


@pytest.mark.parametrize("config", AT_THE_START)
def test_the_output_is_exactly_zero_at_the_start(config):
    model, C, side = DyDiLiT(config), config.in_channels, config.input_size
    x = torch.randn(2, C, side, side)
    out = model(x, torch.tensor([3, 900]), torch.tensor([0, config.num_classes]))
    assert out.shape == (2, 2 * C, side, side) and (out == 0).all()


@pytest.mark.parametrize("config", AT_THE_START)
def test_a_block_is_the_identity_at_the_start(config):
    model, D = DyDiLiT(config), config.hidden_size
    z, c = torch.randn(2, model.grid[0] ** 2, D), torch.randn(2, D)
    assert torch.equal(model.blocks[0](z, c, model.grid), z)


def test_unpatchify_undoes_patchify():
    config = Config(input_size=6, patch_size=2, in_channels=3, hidden_size=12, depth=1)
    model = DyDiLiT(config).double()
    # feature (a p + b) C + c of a token is pixel (a, b) of channel c of its patch
    identity = torch.zeros(12, 3, 2, 2)
    for a, b, c in np.ndindex(2, 2, 3):
        identity[(a * 2 + b) * 3 + c, c, a, b] = 1
    with torch.no_grad():
        model.x_embedder.proj.weight.copy_(identity)
        model.x_embedder.proj.bias.zero_()
    x = normal(2, 3, 6, 6)
    assert_close("x", model.unpatchify(model.x_embedder(x)), x, atol=1e-14)


def test_unpatchify_is_a_loop_over_pixels():
    config = Config(input_size=6, patch_size=2, in_channels=3, hidden_size=12, depth=1)
    z = normal(2, 9, 24)  # 2C channels
    want = np.stack([unpatchify_loop(image, 2, 3) for image in z.numpy()])
    assert_close("image", DyDiLiT(config).unpatchify(z), want, atol=0)


@pytest.mark.parametrize("grid, D", [((4, 4), 8), ((3, 5), 12), ((16, 16), 384)])
def test_position_embedding_is_that_of_dit(grid, D):
    assert_close("positions", position_embedding(grid, D), sincos_loop(grid, D), atol=1e-7)


def test_positions_are_fixed():
    model = DyDiLiT(TINY)
    assert_close("pos_embed", model.pos_embed, sincos_loop((3, 3), 8)[None], atol=1e-7)
    assert "pos_embed" in dict(model.named_buffers())
    assert "pos_embed" not in dict(model.named_parameters())


def test_timestep_embedding_is_that_of_dit():
    embedder, seen = dydilit.TimestepEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0, 1, 17, 999])
    embedder(t)
    want = np.stack([timestep_loop(i.item()) for i in t])
    assert_close("frequencies", seen[0], want, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    model = randomized(DyDiLiT(TINY))
    x, t, y = normal(4, 2, 6, 6), torch.tensor([5, 400, 0, 999]), torch.tensor([3, 0, 4, 1])
    together = model(x, t, y)
    for i in range(4):
        one = slice(i, i + 1)
        assert_close(f"image {i}", model(x[one], t[one], y[one]), together[one], atol=1e-9)


def test_layers_outside_attention_and_feed_forward_have_the_names_of_dit():
    """So that a baseline can load DiT's official checkpoints."""
    names = set(DyDiLiT(replace(TINY, depth=1)).state_dict())
    layers = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "blocks.0.adaLN_modulation.1",
        "blocks.0.attn.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    dit = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    dit |= {"pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"}
    assert dit <= names
    ours = names - dit
    assert all(name.startswith(("blocks.0.attn.", "blocks.0.mlp.")) for name in ours)


def assert_uniform(weight, bound):
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.1


@pytest.fixture(scope="module")
def fresh():
    """A new model, wide enough to measure the spread of its weights."""
    torch.manual_seed(0)
    config = Config(input_size=4, in_channels=1, hidden_size=128, depth=1, num_classes=10)
    return DyDiLiT(config)


def test_initial_factors_are_those_of_the_paper(fresh):
    attn = fresh.blocks[0].attn
    assert (attn.gamma == 3).all() and (attn.lam == 0.01).all()  # Sec. 4.1


def test_initial_linear_maps_are_xavier_uniform(fresh):
    D, attn = 128, fresh.blocks[0].attn
    assert_uniform(attn.qkv.weight, (6 / (D + 3 * D)) ** 0.5)
    assert_uniform(attn.proj.weight, (6 / (D + D)) ** 0.5)
    assert_uniform(fresh.x_embedder.proj.weight, (6 / (D + 4)) ** 0.5)
    for projector in (*attn.q_projectors, *attn.k_projectors):
        assert_uniform(projector, (6 / (D + D)) ** 0.5)


def test_initial_convolutions_are_pytorchs(fresh):
    block = fresh.blocks[0]
    assert_uniform(block.attn.dwc.square, 9**-0.5)
    assert_uniform(block.attn.dwc.horizontal, 3**-0.5)
    assert_uniform(block.attn.dwc.vertical, 3**-0.5)
    assert_uniform(block.mlp.depth_conv.weight, 9**-0.5)


def test_initial_routers_are_small_and_not_zero(fresh):
    attn = fresh.blocks[0].attn
    routers = [attn.q_projector_router, attn.k_projector_router]
    for weight in (*routers, attn.kernel_routers, attn.difference_routers):
        assert abs(weight.std().item() / 0.02 - 1) < 0.15


def test_initial_embeddings_are_those_of_dit(fresh):
    mlp = fresh.t_embedder.mlp
    for layer in (fresh.y_embedder.embedding_table, mlp[0], mlp[2]):
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.15


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_initial_labels_have_the_spread_of_the_config(std):
    model = DyDiLiT(replace(TINY, hidden_size=64, num_classes=100, label_std=std))
    assert abs(model.y_embedder.embedding_table.weight.std().item() / std - 1) < 0.1


def test_initial_labels_are_those_of_dit_for_the_papers_sizes_alone():
    start = {name: config.label_std for name, config in PRESETS.items()}
    assert [name for name in start if start[name] == 0.02] == ["S/2", "B/2", "L/2"]
    assert {start[name] for name in start if start[name] != 0.02} == {1.0}


def test_initial_biases_are_zero_but_for_a_convolution(fresh):
    for name, p in fresh.named_parameters():
        if name.endswith(".bias") and "depth_conv" not in name:
            assert not p.any(), name


def test_initial_values_follow_torchs_seed():
    torch.manual_seed(7)
    one = DyDiLiT(TINY).state_dict()
    torch.manual_seed(7)
    again, other = DyDiLiT(TINY).state_dict(), DyDiLiT(TINY).state_dict()
    assert all(torch.equal(z, one[name]) for name, z in again.items())
    assert not torch.equal(other["x_embedder.proj.weight"], one["x_embedder.proj.weight"])


def test_no_label_is_a_label_and_the_next_number_is_not():
    model = DyDiLiT(TINY)
    x, t = torch.randn(1, 2, 6, 6), torch.tensor([3])
    model(x, t, torch.tensor([TINY.num_classes]))
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([TINY.num_classes + 1]))


@pytest.mark.parametrize("shape", [(2, 2, 6, 8), (2, 2, 8, 8), (2, 3, 6, 6), (2, 6, 6)])
def test_an_input_of_the_wrong_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"this model takes \(B, 2, 6, 6\)"):
        DyDiLiT(TINY)(torch.zeros(shape), torch.zeros(2).long(), torch.zeros(2).long())


def record_dtypes(monkeypatch, *names):
    """{name of a function of dydilit: set of (dtype of its first argument, dtype it returns)}"""
    dtypes = defaultdict(set)

    def recording(name, original):
        def call(*args, **kwargs):
            out = original(*args, **kwargs)
            dtypes[name].add((args[0].dtype, out.dtype))
            return out

        return call

    for name in names:
        monkeypatch.setattr(dydilit, name, recording(name, getattr(dydilit, name)))
    return dtypes


def test_bfloat16_autocast_leaves_the_attention_in_float32(monkeypatch):
    model = randomized(DyDiLiT(TINY)).float()
    inside = ("measure", "difference", "linear_attention")
    dtypes = record_dtypes(monkeypatch, *inside, "dydila_attention", "routed_projection")
    with torch.autocast("cpu", torch.bfloat16):
        model(*tiny_batch(2, torch.float32))
    low, full = torch.bfloat16, torch.float32
    assert dtypes["dydila_attention"] == {(low, low)}, "16 bits outside"
    assert dtypes["measure"] == {(low, full)}
    assert dtypes["difference"] == dtypes["linear_attention"] == {(full, full)}
    assert dtypes["routed_projection"] == {(full, low)}, "a product in 16 bits, routed in 32"


def test_bfloat16_autocast_is_near_float32_and_its_gradients_are_float32():
    model = randomized(DyDiLiT(TINY)).float()
    x, t, y = tiny_batch(2, torch.float32)
    want = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert out.isfinite().all() and (out - want).std() < 0.2 * want.std()
    out.float().square().mean().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
    )


def record_routes(monkeypatch):
    """{id of a gamma or lam: the indices that some token was routed to}"""
    used = defaultdict(set)

    def recording(original):
        def call(*args):
            *tokens, factors, router, _router_grad = args
            logits = torch.cat(tokens, -1) @ router
            used[id(factors)] |= set(logits.argmax(-1).flatten().tolist())
            return original(*args)

        return call

    monkeypatch.setattr(dydilit, "measure", recording(dydilit.measure))
    monkeypatch.setattr(dydilit, "difference", recording(dydilit.difference))
    return used


@pytest.fixture
def after_four_steps(monkeypatch):
    """A model with gradients, and its routes. At step 0 adaLN-Zero blocks nearly every gradient."""
    torch.manual_seed(1)
    model = DyDiLiT(replace(TINY, hidden_size=16, in_channels=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(16, 1, 6, 6), torch.randn(16, 2, 6, 6)
    t, y = torch.arange(16) * 60, torch.arange(16) % 5

    def backward():
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()

    for _ in range(4):
        backward()
        optimizer.step()
    used = record_routes(monkeypatch)
    backward()
    return model, used


def test_every_parameter_learns(after_four_steps):
    model, _ = after_four_steps
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_the_factors_with_tokens_learn_and_no_others(after_four_steps):
    model, used = after_four_steps
    for block in model.blocks:
        for factors in (block.attn.gamma, block.attn.lam):
            assert set(factors.grad.nonzero().flatten().tolist()) == used[id(factors)]
        assert used[id(block.attn.gamma)] == {0, 1, 2}
        assert len(used[id(block.attn.lam)]) > 1


def test_each_projector_and_each_router_learns(after_four_steps):
    model, _ = after_four_steps
    for block in model.blocks:
        attn = block.attn
        stacked = [attn.q_projectors, attn.k_projectors]
        for parameter in (*stacked, attn.kernel_routers, attn.difference_routers):
            assert all(one.any() for one in parameter.grad)


# ----------------------------------------------------------------------------------------------
# Sizes and costs.


@pytest.mark.parametrize("name, D, n", [("S/2", 384, 3), ("B/2", 512, 5), ("L/2", 768, 7)])
def test_presets_are_those_of_the_paper(name, D, n):
    config = PRESETS[name]
    assert (config.hidden_size, config.n_projectors) == (D, n)
    assert (config.n_kernels, config.n_lambdas) == (3 * n, 3 * n)
    assert (config.depth, config.patch_size) == (9, 2)
    assert (config.input_size, config.in_channels) == (32, 4)


@pytest.mark.parametrize("name", ["S/2", "B/2", "L/2"])
def test_the_number_of_parameters_is_the_sum_over_the_layers(name):
    config = PRESETS[name]
    D, n_P, n_F, n_D = config.hidden_size, config.n_projectors, config.n_kernels, config.n_lambdas
    patch = 2 * 2 * 4
    attention = 3 * D**2 + 2 * n_P * D**2 + (D**2 + D)  # q k v, projectors, output
    routers = 2 * D * n_P + 4 * D * n_F + 2 * 2 * D * n_D
    factors, dwc = n_F + n_D, (9 + 3 + 3 + 1) * D
    feed_forward = (8 * D**2 + 8 * D) + (9 + 1) * 8 * D + 4 * D**2
    block = attention + routers + factors + dwc + feed_forward + (6 * D**2 + 6 * D)
    embedders = (patch * D + D) + (256 * D + D) + (D**2 + D) + (config.num_classes + 1) * D
    final = (D * 2 * patch + 2 * patch) + (2 * D**2 + 2 * D)
    with torch.device("meta"):
        model = DyDiLiT(config)
    want = config.depth * block + embedders + final
    assert sum(p.numel() for p in model.parameters()) == want


def routed_cost(config):
    """Multiply-adds of a model's Q' and K'. They sort tokens, so the counter needs real tensors."""
    N = (config.input_size // config.patch_size) ** 2
    D, n_P = config.hidden_size, config.n_projectors
    with FlopCounterMode(display=False) as counter:
        dydilit.routed_projection(torch.randn(1, N, D), torch.randn(n_P, D, D), torch.randn(D, n_P))
    return 2 * config.depth * counter.get_total_flops() / 2


def other_cost(config, monkeypatch):
    """Multiply-adds of everything but Q' and K', on tensors without values."""
    monkeypatch.setattr(dydilit, "routed_projection", lambda x, *_: x)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has no autocast
    with torch.device("meta"):
        model = DyDiLiT(config)
        x = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.zeros(1).long(), torch.zeros(1).long())
    return counter.get_total_flops() / 2


# billions of multiply-adds: the paper's column, without the routed products; all of them
COSTS = [
    ("S/2", 32, 5.98, 6.72),
    ("B/2", 32, 10.39, 11.75),
    ("L/2", 32, 22.85, 25.88),
    ("L/2", 64, 98.55, 110.66),
]


@pytest.mark.parametrize("name, input_size, printed, true", COSTS)
def test_multiply_adds_are_those_of_the_paper(name, input_size, printed, true, monkeypatch):
    config = replace(PRESETS[name], input_size=input_size)
    N, D = (input_size // 2) ** 2, config.hidden_size
    routers = config.depth * N * D * (4 * config.n_kernels + 2 * 2 * config.n_lambdas)
    projections, rest = routed_cost(config), other_cost(config, monkeypatch)
    assert (rest - routers) / 1e9 == pytest.approx(printed, rel=0.003)
    assert (rest + projections) / 1e9 == pytest.approx(true, rel=0.003)


# ----------------------------------------------------------------------------------------------
# Configuration.

WRONG = [
    ({"hidden_size": 6}, "hidden_size must be a multiple of 4, got 6"),
    ({"input_size": 9}, "patch_size 2 must divide the side 9"),
    ({"depth": 2.0}, "Config.depth must be int, got 2.0"),
    ({"depth": True}, "Config.depth must be int, got True"),
    ({"normalize": 1}, "Config.normalize must be bool, got 1"),
    ({"n_kernels": "9"}, "Config.n_kernels must be int, got '9'"),
    ({"n_lambdas": 0}, "Config.n_lambdas must be .*1.*, got 0"),
    ({"num_classes": -1}, "Config.num_classes must be .*1.*, got -1"),
    ({"label_std": -0.1}, "Config.label_std must be between 0 .*, got -0.1"),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["S/2"], **fields)


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        PRESETS["B/2"].depth = 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    with torch.device("meta"):
        assert isinstance(PRESETS[name].build(), DyDiLiT)


# ----------------------------------------------------------------------------------------------
# A model in a folder: save_pretrained, from_pretrained. test_train.py has checkpoints.


def test_a_model_by_hand_has_no_data_and_no_step():
    model = DyDiLiT(TINY)
    assert model.meta == {} and model.step is None


def test_a_saved_model_comes_back_with_its_weights_its_output_and_what_it_knows(tmp_path):
    model = randomized(DyDiLiT(TINY)).float()
    model.meta, model.step = {"name": "made up", "classes": list("abcd")}, 12
    model.save_pretrained(tmp_path / "model")
    again = DyDiLiT.from_pretrained(tmp_path / "model")
    assert again.config == TINY and not again.training
    assert (again.meta, again.step) == (model.meta, 12)
    assert all(torch.equal(z, again.state_dict()[name]) for name, z in model.state_dict().items())
    batch = tiny_batch(dtype=torch.float32)
    assert torch.equal(again(*batch), model(*batch))
