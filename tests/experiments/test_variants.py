"""Every compared model as a whole: gradients, training, sampling; its name, size and fields."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from loops import TINY, attention
from torch.autograd import gradcheck
from util import assert_close, normal, randomized

import train_min
from dydilit import PRESETS, Config, Diffusion, Training
from experiments import baselines, costs
from experiments.baselines import (
    ATTENTIONS,
    LADDER,
    LADDER_FIELDS,
    MODELS,
    VARIANTS,
    Baseline,
    multiply_adds,
    preset,
    variant,
)

pytestmark = pytest.mark.usefixtures("reference_path")


# --------------------------------------------------------------------------------------------------
# Gradients, training, sampling.


def kinds():
    """A case (attention, its fields) for every attention and every row of the ladder."""
    table = [(kind, {}) for kind in ATTENTIONS if kind not in ("ladder", "edit")]
    table.append(("edit", {"heads": 1}))
    table.append(("relu", {"qk_norm": True}))
    for name in LADDER:
        if name != "rising-lambda":  # it differs in its initial values only
            table.append(("ladder", dict(zip(LADDER_FIELDS, LADDER[name]))))
    cases = []
    for kind, changes in table:
        name = "-".join([kind, *map(str, changes.values())])
        cases.append(pytest.param(kind, changes, id=name))
    return cases


@pytest.mark.parametrize(("kind", "changes"), kinds())
def test_gradcheck(kind, changes):
    """x and every parameter. Routers are frozen, since their gradient is no derivative; MoH's
    balance term is off."""
    size = {"hidden_size": 4, "heads": 1} if kind == "ladder" else {"hidden_size": 8, "heads": 2}
    attn = attention(kind, 1, seed=5, input_size=4, router_grad=False, **size | changes).eval()
    names = [name for name, p in attn.named_parameters() if p.requires_grad]
    grid = (2, 2) if kind == "mhla" else (2, 3)  # MHLA has the grid of its config

    def run(x, *weights):
        return torch.func.functional_call(attn, dict(zip(names, weights)), (x, grid))

    x = normal(1, math.prod(grid), size["hidden_size"]).requires_grad_()
    assert gradcheck(run, (x, *(p for p in attn.parameters() if p.requires_grad)))


def trained(name, steps=10):
    """A model after some steps on one batch, the loss of each, and the next step's gradients."""
    config = variant(name, replace(TINY, hidden_size=96))  # three heads, as the digits have
    model, diffusion = config.build(), Diffusion()
    x, noise = torch.randn(8, 2, 8, 8), torch.randn(8, 2, 8, 8)
    y, t = torch.arange(8) % 5, torch.arange(8) * 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps + 1):
        losses.append(sum(diffusion.loss(model, x, y, t, noise)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        if step < steps:
            optimizer.step()
    return model, losses


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_samples(name):
    model, losses = trained(name)
    assert all(loss.isfinite() for loss in losses) and losses[-1] < 0.97 * losses[0]
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
        assert p.grad.stride() == p.stride(), f"{key}: DDP wants both alike"
    images = Diffusion(3).sample(model, torch.arange(4), range(4), seed=0, cfg=2.0, clip=True)
    assert images.shape == (4, 2, 8, 8) and images.isfinite().all() and images.std() > 0


def three_images():
    return torch.randn(3, 2, 8, 8), torch.tensor([5, 400, 999]), torch.tensor([3, 0, 4])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_at_zero(name):
    model = replace(variant(name, TINY), depth=2).build()
    assert (model(*three_images()) == 0).all()
    x, c = torch.randn(1, 16, 16), torch.randn(1, 16)
    assert torch.equal(model.blocks[1](x, c, (4, 4)), x), "adaLN-Zero"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_images_apart(name):
    model = randomized(replace(variant(name, TINY), depth=2).build())
    x, t, y = three_images()
    x = x.double()
    together = model(x, t, y)
    for i in range(3):
        one = slice(i, i + 1)
        assert_close(f"image {i}", model(x[one], t[one], y[one]), together[one], atol=1e-8)


LINEAR = ["Sana", "FLatten", "LiT", "MHLA", "EDiT", "DiG", "ladder-1-focused", "map-wise"]


@pytest.mark.parametrize("name", ["MoH", *LINEAR])
def test_bfloat16_autocast_leaves_linear_attention_in_float32(name, monkeypatch):
    model = randomized(replace(variant(name, TINY), depth=2).build()).float()
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 4])
    want = model(x, t, y)
    seen = set()  # (dtype, autocast?) of what linear attentions read

    def recording(original):
        def call(*args, **options):
            for z in args:
                if isinstance(z, torch.Tensor):
                    seen.add((z.dtype, torch.is_autocast_enabled("cpu")))
            return original(*args, **options)

        return call

    for function in ("linear_attention", "block_attention", "gated_scan"):
        monkeypatch.setattr(baselines, function, recording(getattr(baselines, function)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen == ({(torch.float32, False)} if name in LINEAR else set())
    assert out.isfinite().all() and (out - want).std() < 0.3 * want.std()
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# Names, sizes, fields.


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_every_preset_builds(name, base):
    config = preset(f"{name}-{base}")
    assert isinstance(config, Baseline)
    inherited = {f.name: getattr(config, f.name) for f in fields(Config)}
    assert inherited == asdict(PRESETS[base]) | {"depth": config.depth}
    assert name not in LADDER or config.depth == PRESETS[base].depth
    with torch.device("meta"):
        replace(config, depth=1).build()


@pytest.mark.parametrize("base", PRESETS)
def test_a_preset_without_a_variant_is_the_preset(base):
    assert preset(base) is PRESETS[base]


@pytest.mark.parametrize(
    ("name", "D", "heads"), [("DiT-S/2", 384, 6), ("DiT-B/2", 512, 8), ("DiT-L/2", 768, 12)]
)
def test_dit_of_the_paper(name, D, heads):
    """Sec. 4.1: twelve blocks at every size; heads of 64 channels as in DiT's own S and B."""
    config = preset(name)
    assert (config.hidden_size, config.heads, config.depth) == (D, heads, 12)
    assert config.feed_forward == "mlp"


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_nearest_in_multiply_adds(name, base):
    config = preset(f"{name}-{base}")
    target = multiply_adds(PRESETS[base])[0]

    def gap(depth):
        return abs(multiply_adds(replace(config, depth=depth))[0] - target)

    around = [gap(config.depth + step) for step in (-1, 0, 1)]
    assert around[1] == min(around)


@pytest.mark.parametrize("name", MODELS)
def test_256_pixels_decide_the_depth_at_512(name):
    medium = variant(name, replace(PRESETS["S/2"], input_size=32))
    large = variant(name, replace(PRESETS["S/2"], input_size=64))
    assert large.depth == medium.depth


UNKNOWN = ["XL/2", "DiT-XL/2", "DiX-S/2", "DiT", "-", "-S/2", "DiT-", "S/2-DiT", "DiT-S/2 "]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_preset_lists_the_known(name):
    with pytest.raises(ValueError) as e:
        preset(name)
    known = f"unknown preset {name!r}; known: S/2, B/2, L/2, pixels32, photos, digits, mnist; "
    assert str(e.value).startswith(known)
    assert all(known in str(e.value) for known in VARIANTS)


def test_an_unknown_variant_lists_the_known():
    message = r"unknown variant 'dit'; known: DiT, PixArt, MoH, Sana, .*, rising-lambda$"
    with pytest.raises(ValueError, match=message):
        variant("dit", PRESETS["digits"])


# fmt: off
WRONG = [
    ({"attention": "flash"},
     "unknown attention 'flash'; known: softmax, kv-compressed, moh, .*, ladder"),
    ({"feed_forward": ""}, "unknown feed_forward ''; known: mlp, glumbconv, sana, swiglu"),
    ({"kernel": "elu"}, "unknown kernel 'elu'; known: relu, focused, dynamic"),
    ({"projection": "none"}, "unknown projection 'none'; known: shared, dynamic"),
    ({"differential": "tokens"}, "unknown differential 'tokens'; known: none, token, map"),
    ({"heads": 5}, "5 heads do not divide hidden_size 384"),
    ({"heads": 0}, "0 heads do not divide"),
    ({"heads": 2, "attention": "edit"}, "attention 'edit' has one head, got 2"),
    ({"heads": 2, "attention": "ladder"}, "attention 'ladder' has one head, got 2"),
    ({"heads": 384, "attention": "gated"}, "384 heads do not divide"),
    ({"heads": 6, "attention": "moh", "shared_heads": 6},
     "routed_heads 1 must be between 1 and the 6 heads less"),
    ({"heads": 6, "attention": "moh", "routed_heads": 0}, "routed_heads 0 must be"),
    ({"qk_norm": True}, "qk_norm is for attention 'relu', not for 'softmax'"),
    ({"projection": "shared"},
     "differential 'token' needs Q' and K': projection must be 'dynamic'"),
    ({"attention": "ladder", "batch_norm": True, "dwc": False}, "batch_norm needs dwc"),
    ({"attention": "ladder", "rising_lambda": True, "differential": "none"},
     "rising_lambda a differential"),
    ({"kernel": "relu"}, "kernel is for attention 'ladder', not for 'softmax'"),
    ({"shared_heads": -1}, "Baseline.shared_heads must be between 0 and inf, got -1"),
    ({"heads": 2.0}, "Baseline.heads must be int"),
    ({"depth": 0}, "Baseline.depth must be between 1"),
]
# fmt: on


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_field_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Baseline(**changes)


# --------------------------------------------------------------------------------------------------
# The command line.


def test_the_command_line_knows_every_field_of_a_variant():
    given = ["--preset=ladder-2-measure-digits", "--depth=3", "--kernel=focused", "--dwc"]
    config, _ = costs.parse(given)
    named = preset("ladder-2-measure-digits")
    assert config == replace(named, depth=3, kernel="focused", dwc=True)


def test_a_variant_trains_with_the_recipe_of_its_preset_in_a_folder_of_its_own():
    _, training = costs.parse(["--preset=ladder-2-measure-digits"])
    assert training == replace(train_min.RECIPES["digits"], out="out/ladder-2-measure-digits")
    assert costs.parse(["--preset=DiT-S/2"]) == (preset("DiT-S/2"), Training(out="out/DiT-S-2"))


def test_help_shows_the_fields_of_a_variant(capsys):
    with pytest.raises(SystemExit):
        train_min.parse(["--preset=MoH-digits", "--help"], preset=preset)
    text = " ".join(capsys.readouterr().out.split())
    shared = "moh: heads that every token uses, in the first two thirds of the blocks (default 1)"
    assert shared in text
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(Baseline)]
    assert [flag for flag in flags if flag not in text] == []
    assert "D, the token width; a multiple of 4 (default 96)" in text
