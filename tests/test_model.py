"""The modules and the network against loops, from the paper and from what DiT does; sizes, costs, gradients, errors."""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from util import assert_close, attention_loop, choose, side_margin, top2_margin

import dydilit
from dydilit import DWC, PRESETS, Config, DyDiLA, DyDiLiT, position_embedding
from train_min import override, preset

pytestmark = pytest.mark.usefixtures("reference_path")  # test_fused.py has the extension
TINY = Config(input_size=6, patch_size=2, in_channels=2, hidden_size=8, depth=2, n_projectors=2, n_kernels=3,
              n_lambdas=3, num_classes=4)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def randomized(module, seed=0):
    """The module in float64 with weights that are nowhere special: no zeros of adaLN-Zero, no equal gammas."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in module.double().named_parameters():
            low_high = {"gamma": (1.5, 4), "lam": (0.05, 0.6)}.get(name.split(".")[-1])
            p.copy_(torch.tensor(rng.uniform(*low_high, p.shape) if low_high else 0.4 * rng.normal(size=p.shape)))
    return module


def arrays(module):
    return {name: z.detach().numpy() for name, z in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The network as loops, in numpy float64.


def depthwise(x, grid, kernel):
    """Every channel of tokens x (N, D) with its own kernel (D, 1, h, w), zeros around the image."""
    (H, W), (h, w), out = grid, kernel.shape[2:], np.zeros_like(x)
    for i, j in np.ndindex(H, W):
        for a, b in np.ndindex(h, w):
            row, column = i + a - h // 2, j + b - w // 2
            if 0 <= row < H and 0 <= column < W:
                out[i * W + j] += kernel[:, 0, a, b] * x[row * W + column]
    return out


def dwc_loop(v, grid, s):
    return sum(depthwise(v, grid, s[branch]) for branch in ("square", "horizontal", "vertical")) + s["bias"]


def part(s, prefix):
    return {name[len(prefix) :]: z for name, z in s.items() if name.startswith(prefix)}


def dydila_loop(x, grid, s, normalize=True):
    """Fig. 2b for one image: x (N, D), s the module's arrays."""
    q, k, v = np.split(x @ s["qkv.weight"].T, 3, axis=1)
    q_prime, k_prime = (
        np.stack([token @ s[f"{z}_projectors"][choose(token, s[f"{z}_projector_router"])] for token in x]) for z in "qk"
    )
    args = [torch.tensor(z)[None] for z in (q, k, q_prime, k_prime, v)]
    args += [torch.tensor(s[name]) for name in ("gamma", "lam", "kernel_routers", "difference_routers")]
    o = attention_loop(*args, normalize=normalize)[0]
    return (o + dwc_loop(v, grid, part(s, "dwc."))) @ s["proj.weight"].T + s["proj.bias"]


def silu(z):
    return z / (1 + np.exp(-z))


def linear(z, s, name):
    return z @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def norm_and_modulate(x, shift, scale):
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * (1 + scale) + shift


def feed_forward_loop(x, grid, s):
    """Sana's: 1x1 to 8D, SiLU, depthwise 3x3, half of it gates the other half, 1x1 back."""
    x = silu(linear(x, s, "inverted_conv"))
    x = depthwise(x, grid, s["depth_conv.weight"]) + s["depth_conv.bias"]
    x, gate = np.split(x, 2, axis=1)
    return (x * silu(gate)) @ s["point_conv.weight"].T


def sincos_loop(grid, D):
    """DiT's table: token n in row r, column c; the first half of the width is the column's, sin before cos."""
    out = np.empty((grid[0] * grid[1], D))
    for n in range(len(out)):
        r, c = divmod(n, grid[1])
        for half, position in ((0, c), (D // 2, r)):
            for i in range(D // 4):
                angle = position * 10000 ** (-i / (D / 4))
                out[n, half + i], out[n, half + D // 4 + i] = math.sin(angle), math.cos(angle)
    return out


def timestep_loop(t):
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def model_loop(config, s, x, t, y):
    """DyDiLiT for one image: x (C, H, W) and the numbers t, y -> (2C, H, W)."""
    p, D = config.patch_size, config.hidden_size
    side = config.input_size // p
    z = sincos_loop((side, side), D).astype(np.float32).astype(np.float64)  # the buffer is stored in float32
    for n in range(side * side):
        i, j = divmod(n, side)
        patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
        z[n] += (s["x_embedder.proj.weight"] * patch).sum((1, 2, 3)) + s["x_embedder.proj.bias"]
    c = linear(silu(linear(timestep_loop(t), s, "t_embedder.mlp.0")), s, "t_embedder.mlp.2")
    c = c + s["y_embedder.embedding_table.weight"][y]
    for b in range(config.depth):
        block = part(s, f"blocks.{b}.")
        m = np.split(linear(silu(c), block, "adaLN_modulation.1"), 6)  # shift, scale, gate; of attention, of the mlp
        attention = dydila_loop(norm_and_modulate(z, *m[0:2]), (side, side), part(block, "attn."), config.normalize)
        z = z + m[2] * attention
        z = z + m[5] * feed_forward_loop(norm_and_modulate(z, *m[3:5]), (side, side), part(block, "mlp."))
    z = norm_and_modulate(z, *np.split(linear(silu(c), s, "final_layer.adaLN_modulation.1"), 2))
    return unpatchify_loop(linear(z, s, "final_layer.linear"), p, side)


def unpatchify_loop(z, p, side):
    """Tokens (N, p p C), the channel fastest, to an image (C, H, W)."""
    C = z.shape[1] // p**2
    out = np.empty((C, side * p, side * p))
    for n, a, b, c in np.ndindex(len(z), p, p, C):
        out[c, n // side * p + a, n % side * p + b] = z[n, (a * p + b) * C + c]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# DWC, Eq. 9.


def test_dwc_is_a_loop_over_pixels():
    dwc, v = randomized(DWC(3)), normal(2, 12, 3)
    want = np.stack([dwc_loop(image, (3, 4), arrays(dwc)) for image in v.numpy()])
    assert_close("DWC", dwc(v, (3, 4)), want, atol=1e-13)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)])
def test_dwc_is_the_sum_of_three_convolutions_and_merges_into_one(grid):
    dwc, v = randomized(DWC(5)), normal(2, grid[0] * grid[1], 5)
    image = v.reshape(2, *grid, 5).permute(0, 3, 1, 2)
    want = (F.conv2d(image, dwc.square, dwc.bias, padding=1, groups=5)
            + F.conv2d(image, dwc.horizontal, padding=(0, 1), groups=5)
            + F.conv2d(image, dwc.vertical, padding=(1, 0), groups=5)).permute(0, 2, 3, 1).reshape(v.shape)
    assert_close("branches", dwc(v, grid), want, atol=1e-12)
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


# ---------------------------------------------------------------------------------------------------------------------
# DyDiLA.


def dydila(seed=0, **fields):
    """With the fields that it reads and no others."""
    config = SimpleNamespace(hidden_size=6, n_projectors=3, n_kernels=4, n_lambdas=3, normalize=True, router_grad=True)
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


def test_dydila_stands_alone_in_another_model():
    class Foreign(nn.Module):
        """Wide pictures to 3 classes, around the attention; strides and layout are not ours."""

        def __init__(self):
            super().__init__()
            self.stem, self.attn, self.head = nn.Conv2d(3, 6, 4, stride=4), dydila().float(), nn.Linear(6, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.attn(x.flatten(2).transpose(1, 2), x.shape[2:]).mean(1))

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
    assert (attn(x[:, order], (3, 5)) - attn(x, (3, 5))[:, order]).abs().max() > 0.01, "DWC knows where a token is"
    for p in attn.dwc.parameters():
        nn.init.zeros_(p)
    assert_close("O", attn(x[:, order], (3, 5)), attn(x, (3, 5))[:, order], atol=1e-11)
    assert_close("O, another grid", attn(x, (5, 3)), attn(x, (3, 5)), atol=1e-11)


def test_dydila_gradcheck(monkeypatch):
    """x and every parameter but the routers, whose gradient is no derivative of the forward pass."""
    attn = dydila(seed=264, hidden_size=4, n_projectors=2, n_kernels=2, n_lambdas=2, router_grad=False)
    x, seen = normal(1, 4, 4), []
    with monkeypatch.context() as m:
        m.setattr(dydilit, "dydila_attention", lambda *args, **_: seen.extend(args) or args[4])
        attn(x, (2, 2))
    # the seed was chosen so: no choice is close and no entry is near relu's kink, a finite difference sees a smooth op
    q, k, q_prime, k_prime, _, gamma, _, kernel_routers, difference_routers = (z.detach().numpy() for z in seen)
    assert all(abs(z).min() > 0.01 for z in (q, k, q_prime, k_prime))
    for s, (z, z_prime) in enumerate(((q, q_prime), (k, k_prime))):
        routers = kernel_routers[s], kernel_routers[s + 2], difference_routers[s]
        assert min(side_margin(a, b, gamma, *routers) for a, b in zip(z[0], z_prime[0])) > 0.01
    for router in (attn.q_projector_router, attn.k_projector_router):
        assert top2_margin(x.numpy(), router.detach().numpy()).min() > 0.01

    names = [name for name, p in attn.named_parameters() if p.requires_grad]
    assert not any("router" in name for name in names)

    def run(x, *weights):
        return torch.func.functional_call(attn, dict(zip(names, weights)), (x, (2, 2)))

    assert gradcheck(run, (x.requires_grad_(), *(p for p in attn.parameters() if p.requires_grad)))


def test_without_router_grad_routers_are_frozen_and_the_rest_trains():
    attn, x = dydila(router_grad=False), normal(2, 15, 6)
    attn(x, (3, 5)).square().sum().backward()
    for name, p in attn.named_parameters():
        assert (p.grad is None and not p.requires_grad) if "router" in name else p.grad.any(), name
    trained = dydila(router_grad=True)
    assert torch.equal(trained(x, (3, 5)), attn(x, (3, 5)))
    assert all(p.requires_grad for p in trained.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The network.


@pytest.mark.parametrize("normalize", [True, False])
def test_dydilit_is_a_loop_over_tokens(normalize):
    config = override(TINY, normalize=normalize)
    model = randomized(DyDiLiT(config))
    x, t, y = normal(3, 2, 6, 6), torch.tensor([0, 17, 999]), torch.tensor([3, 0, 4])  # 4 is "no label"
    out = model(x, t, y)
    assert out.dtype == torch.float64 and out.shape == (3, 4, 6, 6)
    s = arrays(model)
    want = np.stack([model_loop(config, s, x[b].numpy(), t[b].item(), y[b].item()) for b in range(3)])
    assert_close("eps, v", out, want, atol=1e-9, rtol=1e-9)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float64 and p.grad.isfinite().all() for p in model.parameters())


def test_float32_agrees_with_float64():
    model = randomized(DyDiLiT(TINY))
    x, t, y = normal(3, 2, 6, 6), torch.tensor([0, 17, 999]), torch.tensor([3, 0, 4])
    want = model(x, t, y)
    assert_close("eps, v", model.float()(x.float(), t, y), want, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("config", [PRESETS["digits"], override(PRESETS["S/2"], depth=1), TINY])
def test_the_output_is_exactly_zero_at_the_start(config):
    model = DyDiLiT(config)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    out = model(x, torch.tensor([3, 900]), torch.tensor([0, config.num_classes]))
    assert out.shape == (2, 2 * config.in_channels, config.input_size, config.input_size) and (out == 0).all()
    z, c = torch.randn(2, model.grid[0] ** 2, config.hidden_size), torch.randn(2, config.hidden_size)
    assert torch.equal(model.blocks[0](z, c, model.grid), z), "a block is the identity"


def test_unpatchify_undoes_patchify():
    model = DyDiLiT(Config(input_size=6, patch_size=2, in_channels=3, hidden_size=12, depth=1)).double()
    identity = torch.zeros(12, 3, 2, 2)  # feature (a p + b) C + c of a token is pixel (a, b) of channel c of its patch
    for a, b, c in np.ndindex(2, 2, 3):
        identity[(a * 2 + b) * 3 + c, c, a, b] = 1
    with torch.no_grad():
        model.x_embedder.proj.weight.copy_(identity)
        model.x_embedder.proj.bias.zero_()
    x = normal(2, 3, 6, 6)
    assert_close("x", model.unpatchify(model.x_embedder(x)), x, atol=1e-14)
    z = normal(2, 9, 24)  # and as the network uses it, with 2C channels
    assert_close("image", model.unpatchify(z), np.stack([unpatchify_loop(image, 2, 3) for image in z.numpy()]), atol=0)


@pytest.mark.parametrize("grid, D", [((4, 4), 8), ((3, 5), 12), ((16, 16), 384)])
def test_position_embedding(grid, D):
    assert_close("positions", position_embedding(grid, D), sincos_loop(grid, D), atol=1e-7)


def test_positions_are_fixed():
    model = DyDiLiT(TINY)
    assert_close("pos_embed", model.pos_embed, sincos_loop((3, 3), 8)[None], atol=1e-7)
    assert "pos_embed" in dict(model.named_buffers()) and "pos_embed" not in dict(model.named_parameters())


def test_timestep_embedding():
    embedder, seen = dydilit.TimestepEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0, 1, 17, 999])
    embedder(t)
    assert_close("frequencies", seen[0], np.stack([timestep_loop(i.item()) for i in t]), atol=1e-6)


def test_every_image_is_on_its_own():
    model = randomized(DyDiLiT(TINY))
    x, t, y = normal(4, 2, 6, 6), torch.tensor([5, 400, 0, 999]), torch.tensor([3, 0, 4, 1])
    for i in range(4):
        one = slice(i, i + 1)
        assert_close(f"image {i}", model(x[one], t[one], y[one]), model(x, t, y)[one], atol=1e-9)


def test_names_are_those_of_dit():
    """What a softmax DiT has outside its attention and mlp, so that a baseline can load official checkpoints."""
    names = set(DyDiLiT(override(TINY, depth=1)).state_dict())
    dit = {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "blocks.0.adaLN_modulation.1", "blocks.0.attn.proj",
        "final_layer.linear", "final_layer.adaLN_modulation.1")}
    dit |= {"pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"}
    assert dit <= names
    assert all(name.startswith(("blocks.0.attn.", "blocks.0.mlp.")) for name in names - dit)


def test_initial_values():
    D = 128  # wide enough to measure a spread
    model = DyDiLiT(Config(input_size=4, in_channels=1, hidden_size=D, depth=1, num_classes=10))
    attn = model.blocks[0].attn

    def is_uniform(weight, bound):
        assert weight.abs().max() <= bound and abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.1

    assert (attn.gamma == 3).all() and (attn.lam == 0.01).all()  # Sec. 4.1
    is_uniform(attn.qkv.weight, (6 / (D + 3 * D)) ** 0.5)  # Xavier
    is_uniform(attn.proj.weight, (6 / (D + D)) ** 0.5)
    is_uniform(model.x_embedder.proj.weight, (6 / (D + 4)) ** 0.5)
    for projector in (*attn.q_projectors, *attn.k_projectors):
        is_uniform(projector, (6 / (D + D)) ** 0.5)
    is_uniform(attn.dwc.square, 9**-0.5)
    is_uniform(attn.dwc.horizontal, 3**-0.5)
    is_uniform(attn.dwc.vertical, 3**-0.5)
    is_uniform(model.blocks[0].mlp.depth_conv.weight, 9**-0.5)
    for weight in (attn.q_projector_router, attn.k_projector_router, attn.kernel_routers, attn.difference_routers):
        assert abs(weight.std().item() / 0.02 - 1) < 0.15
    for layer in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.15
    for name, p in model.named_parameters():
        if name.endswith(".bias") and "depth_conv" not in name:
            assert not p.any(), name
    torch.manual_seed(7)
    one = DyDiLiT(TINY).state_dict()
    torch.manual_seed(7)
    assert all(torch.equal(z, one[name]) for name, z in DyDiLiT(TINY).state_dict().items())
    assert not torch.equal(DyDiLiT(TINY).x_embedder.proj.weight, one["x_embedder.proj.weight"])


def test_null_label_is_a_label_and_the_next_is_not():
    model = DyDiLiT(TINY)
    x, t = torch.randn(1, 2, 6, 6), torch.tensor([3])
    model(x, t, torch.tensor([TINY.num_classes]))
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([TINY.num_classes + 1]))


@pytest.mark.parametrize("shape", [(2, 2, 6, 8), (2, 2, 8, 8), (2, 3, 6, 6), (2, 6, 6)])
def test_an_input_of_the_wrong_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"this model takes \(B, 2, 6, 6\)"):
        DyDiLiT(TINY)(torch.zeros(shape), torch.zeros(2).long(), torch.zeros(2).long())


def test_bfloat16_autocast_leaves_the_attention_in_float32(monkeypatch):
    model = randomized(DyDiLiT(TINY)).float()
    x, t, y = normal(2, 2, 6, 6, dtype=torch.float32), torch.tensor([10, 700]), torch.tensor([0, 4])
    want, dtypes = model(x, t, y), defaultdict(set)

    def spy(name):
        original = getattr(dydilit, name)

        def recording(*args, **kwargs):
            out = original(*args, **kwargs)
            dtypes[name].add((args[0].dtype, out.dtype))
            return out

        monkeypatch.setattr(dydilit, name, recording)

    for name in ("measure", "difference", "linear_attention", "dydila_attention", "routed_projection"):
        spy(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    low, full = torch.bfloat16, torch.float32
    assert dtypes["dydila_attention"] == {(low, low)}, "16 bits outside"
    assert dtypes["measure"] == {(low, full)} and dtypes["difference"] == dtypes["linear_attention"] == {(full, full)}
    assert dtypes["routed_projection"] == {(full, low)}, "the projection is worth 16 bits, its routing is not"
    assert out.isfinite().all() and (out - want).std() < 0.2 * want.std()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_everything_learns(monkeypatch):
    """adaLN-Zero blocks nearly every gradient at step 0; a few steps on, each parameter has one, routers included."""
    torch.manual_seed(1)
    config = override(TINY, hidden_size=16, in_channels=1)
    model = DyDiLiT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(16, 1, 6, 6), torch.randn(16, 2, 6, 6)
    t, y = torch.arange(16) * 60, torch.arange(16) % 5
    used = defaultdict(set)  # {id of gamma or lam: indices that some token was routed to}

    def recording(original):
        def call(*args):
            factors, router = args[-3], args[-2]
            tokens = torch.cat(args[:-3], -1)
            used[id(factors)] |= set((tokens @ router).argmax(-1).flatten().tolist())
            return original(*args)

        return call

    for step in range(5):
        if step == 4:
            monkeypatch.setattr(dydilit, "measure", recording(dydilit.measure))
            monkeypatch.setattr(dydilit, "difference", recording(dydilit.difference))
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()
        if step < 4:
            optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    for block in model.blocks:
        for factors in (block.attn.gamma, block.attn.lam):
            assert set(factors.grad.nonzero().flatten().tolist()) == used[id(factors)]
        assert used[id(block.attn.gamma)] == {0, 1, 2} and len(used[id(block.attn.lam)]) > 1
        for projectors in (block.attn.q_projectors, block.attn.k_projectors):
            assert all(g.any() for g in projectors.grad)
        for routers in (block.attn.kernel_routers, block.attn.difference_routers):
            assert all(g.any() for g in routers.grad), "each of the six"


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and costs.


@pytest.mark.parametrize("name, D, n_P, n_F", [("S/2", 384, 3, 9), ("B/2", 512, 5, 15), ("L/2", 768, 7, 21)])
def test_presets_are_the_papers_and_so_is_the_number_of_parameters(name, D, n_P, n_F):
    config = PRESETS[name]
    assert (config.hidden_size, config.n_projectors, config.n_kernels, config.n_lambdas) == (D, n_P, n_F, n_F)
    assert (config.depth, config.patch_size, config.input_size, config.in_channels) == (9, 2, 32, 4)
    n_D, L, classes, patch = config.n_lambdas, config.depth, config.num_classes, 2 * 2 * 4
    attention = 3 * D**2 + 2 * n_P * D**2 + (D**2 + D)  # q k v, projectors, output
    routers = 2 * D * n_P + 4 * D * n_F + 2 * 2 * D * n_D
    factors, dwc = n_F + n_D, (9 + 3 + 3 + 1) * D
    feed_forward = (8 * D**2 + 8 * D) + (9 + 1) * 8 * D + 4 * D**2
    block = attention + routers + factors + dwc + feed_forward + (6 * D**2 + 6 * D)
    embedders = (patch * D + D) + (256 * D + D) + (D**2 + D) + (classes + 1) * D
    final = (D * 2 * patch + 2 * patch) + (2 * D**2 + 2 * D)
    with torch.device("meta"):
        model = DyDiLiT(config)
    assert sum(p.numel() for p in model.parameters()) == L * block + embedders + final


# billions of multiply-adds: the paper's column, which leaves out everything routed, and the true cost
COSTS = [("S/2", 32, 5.98, 6.72), ("B/2", 32, 10.39, 11.75), ("L/2", 32, 22.85, 25.88), ("L/2", 64, 98.55, 110.66)]


@pytest.mark.parametrize("name, input_size, printed, true", COSTS)
def test_multiply_adds_are_those_of_the_paper(name, input_size, printed, true, monkeypatch):
    config = override(PRESETS[name], input_size=input_size)
    N, D, n_P = (input_size // 2) ** 2, config.hidden_size, config.n_projectors
    with FlopCounterMode(display=False) as counter:  # one routed projection, on real tensors: it sorts tokens
        dydilit.routed_projection(torch.randn(1, N, D), torch.randn(n_P, D, D), torch.randn(D, n_P))
    projections = 2 * config.depth * counter.get_total_flops() / 2e9  # Q' and K' of every block
    monkeypatch.setattr(dydilit, "routed_projection", lambda x, *_: x)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which meta tensors do not know
    with torch.device("meta"):  # the rest needs no values
        model = DyDiLiT(config)
        args = torch.zeros(1, 4, input_size, input_size), torch.zeros(1).long(), torch.zeros(1).long()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*args)
    rest = counter.get_total_flops() / 2e9
    routers = config.depth * N * D * (4 * config.n_kernels + 2 * 2 * config.n_lambdas) / 1e9
    print(f"{name} at {8 * input_size}: {rest - routers:.2f} (paper {printed}), in truth {rest + projections:.2f}")
    assert rest - routers == pytest.approx(printed, rel=0.003)
    assert rest + projections == pytest.approx(true, rel=0.003)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration.


@pytest.mark.parametrize("fields, message", [
    ({"hidden_size": 6}, "hidden_size 6 must be a multiple of 4"),
    ({"input_size": 9}, "patch_size 2 does not divide input_size 9"),
    ({"depth": 2.0}, "Config.depth must be int, got 2.0"),
    ({"depth": True}, "Config.depth must be int, got True"),
    ({"normalize": 1}, "Config.normalize must be bool, got 1"),
    ({"n_kernels": "9"}, "Config.n_kernels must be int, got '9'"),
    ({"n_lambdas": 0}, "Config.n_lambdas must be .*1.*, got 0"),
    ({"num_classes": -1}, "Config.num_classes must be .*1.*, got -1"),
])
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
    with pytest.raises(ValueError, match=message):
        override(PRESETS["S/2"], **fields)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown preset 'XL/2'; known: S/2, B/2, L/2, "):
        preset("XL/2")
    with pytest.raises(ValueError, match=r"unknown field 'width' of Config; known: input_size, .*router_grad$"):
        override(PRESETS["S/2"], depth=3, width=9)


def test_override_makes_another_config():
    changed = override(preset("B/2"), depth=3, normalize=False)
    assert (changed.depth, changed.normalize, changed.hidden_size) == (3, False, 512)
    assert PRESETS["B/2"].depth == 9 and PRESETS["B/2"].normalize
    with pytest.raises(FrozenInstanceError):
        changed.depth = 4


def test_every_preset_builds():
    for config in PRESETS.values():
        with torch.device("meta"):
            DyDiLiT(config)


def test_dydila_hands_its_settings_to_the_op(monkeypatch):
    seen = {}
    monkeypatch.setattr(dydilit, "dydila_attention", lambda *args, **how: seen.update(how) or args[4])
    attn = dydila(normalize=False, router_grad=False)
    assert attn.backend == "auto"
    attn.backend = "reference"
    attn(normal(1, 15, 6), (3, 5))
    assert seen == {"normalize": False, "router_grad": False, "backend": "reference"}
