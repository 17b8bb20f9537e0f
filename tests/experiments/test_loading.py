"""DiT's own weights: names, numbers, files; and checkpoints of the compared models."""

import argparse
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from loops import softmax_attend
from runs import CONFIG, RUN, prepare_digits
from util import (
    arrays,
    assert_close,
    linear,
    norm_and_modulate,
    normal,
    part,
    randomized,
    save_vae,
    silu,
    sincos_loop,
    timestep_loop,
    unpatchify_loop,
)

import sample_min
from dydilit import Config, DyDiLiT, respace, train
from experiments import pretrained, sample
from experiments.baselines import Baseline, attention_of, variant
from support.runs import prepare_resume

pytestmark = pytest.mark.usefixtures("cpu")


# --------------------------------------------------------------------------------------------------
# DiT's names and numbers.


def official(depth, D, patch, channels, classes, tokens):
    """{name: shape} of facebookresearch/DiT's state dict, from what its paper describes."""

    def layer(name, out, inputs):
        return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}

    shapes = {
        "pos_embed": (1, tokens, D),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        "x_embedder.proj.weight": (D, channels, patch, patch),
        "x_embedder.proj.bias": (D,),
    }
    shapes |= layer("t_embedder.mlp.0", D, 256) | layer("t_embedder.mlp.2", D, D)
    for i in range(depth):
        shapes |= layer(f"blocks.{i}.attn.qkv", 3 * D, D) | layer(f"blocks.{i}.attn.proj", D, D)
        shapes |= layer(f"blocks.{i}.mlp.fc1", 4 * D, D) | layer(f"blocks.{i}.mlp.fc2", D, 4 * D)
        shapes |= layer(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    shapes |= layer("final_layer.linear", patch**2 * 2 * channels, D)
    return shapes | layer("final_layer.adaLN_modulation.1", 2 * D, D)


def on_meta(shapes):
    with torch.device("meta"):
        return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_dit_xl_2_has_the_official_names_and_shapes():
    shapes = official(28, 1152, 2, 4, 1000, 256)
    with torch.device("meta"):
        model = Baseline(hidden_size=1152, depth=28, heads=16).build()
    assert {name: tuple(z.shape) for name, z in model.state_dict().items()} == shapes
    model.load_state_dict(on_meta(shapes), strict=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(675e6, rel=1e-3)  # "675" million in DiT's paper


def gelu(z):
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def dit_forward(s, x, t, y, *, depth, heads, p, D):
    """DiT for one image, after its paper and the names in its state dict; numpy."""
    side = x.shape[1] // p
    z = sincos_loop((side, side), D).astype(np.float32).astype(np.float64)
    for n in range(side * side):
        i, j = divmod(n, side)
        patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
        z[n] += (s["x_embedder.proj.weight"] * patch).sum((1, 2, 3)) + s["x_embedder.proj.bias"]
    c = linear(silu(linear(timestep_loop(t), s, "t_embedder.mlp.0")), s, "t_embedder.mlp.2")
    c = c + s["y_embedder.embedding_table.weight"][y]
    for b in range(depth):
        block = part(s, f"blocks.{b}.")
        m = np.split(linear(silu(c), block, "adaLN_modulation.1"), 6)  # shift, scale, gate, twice
        h = linear(norm_and_modulate(z, m[0], m[1]), block, "attn.qkv")
        h = h.reshape(side * side, 3, heads, D // heads)
        o = [softmax_attend(h[:, 0, i], h[:, 1, i], h[:, 2, i]) for i in range(heads)]
        z = z + m[2] * linear(np.concatenate(o, axis=1), block, "attn.proj")
        h = gelu(linear(norm_and_modulate(z, m[3], m[4]), block, "mlp.fc1"))
        z = z + m[5] * linear(h, block, "mlp.fc2")
    shift, scale = np.split(linear(silu(c), s, "final_layer.adaLN_modulation.1"), 2)
    z = linear(norm_and_modulate(z, shift, scale), s, "final_layer.linear")
    return unpatchify_loop(z, p, side)


SMALL = Baseline(input_size=8, hidden_size=24, depth=2, heads=3, num_classes=5)


def test_dit_is_dit():
    model, x = randomized(SMALL.build()), normal(3, 4, 8, 8)
    t, y = torch.tensor([0, 17, 999]), torch.tensor([3, 0, 5])
    s = arrays(model)
    size = dict(depth=2, heads=3, p=2, D=24)
    want = [dit_forward(s, x[b].numpy(), t[b].item(), y[b].item(), **size) for b in range(3)]
    assert_close("eps, v", model(x, t, y), np.stack(want), atol=1e-9, rtol=1e-9)


def test_respaced_timesteps_are_dits():
    """DiT: a stride (T - 1) / (steps - 1) in float64, added up; of a tie, the even number."""
    for steps in range(2, 1001):
        strides = np.full(steps, 999 / (steps - 1))
        strides[0] = 0
        want = np.rint(np.add.accumulate(strides)).astype(int)  # accumulate adds one after another
        assert respace(1000, steps) == want.tolist(), steps
        assert len(set(want)) == steps and want[-1] == 999
    assert respace(1000, 21)[10] == 499, "999 / 2 by ten strides of 49.95"


# --------------------------------------------------------------------------------------------------
# Files of DiT.


@pytest.fixture
def dit_file(tmp_path):
    """A file as facebookresearch/DiT offers them, a bare state dict, but small and random."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in official(2, 24, 2, 4, 5, 16).items():
        state[name] = torch.tensor(0.1 * rng.normal(size=shape), dtype=torch.float32)
    torch.save(state, tmp_path / "DiT.pt")
    return tmp_path / "DiT.pt", state


def assert_weights(model, state):
    for name, z in model.state_dict().items():
        assert torch.equal(z, state[name]), name


def test_a_dit_file_is_a_model(dit_file):
    path, state = dit_file
    model = pretrained.load(path, heads=3)
    assert model.config == SMALL and not model.training
    assert model.meta["classes"] == list("01234") and model.step is None
    assert_weights(model, state)


def test_dits_training_checkpoint_gives_the_averaged_weights(dit_file):
    path, state = dit_file
    other = {name: z + 1 for name, z in state.items()}
    args = argparse.Namespace(model="DiT-S/2")
    torch.save({"model": other, "ema": state, "opt": {}, "args": args}, path)
    assert_weights(pretrained.load(path, heads=3), state)


def test_a_dit_file_in_16_bits_becomes_float32(dit_file):
    path, state = dit_file
    torch.save({name: z.bfloat16() for name, z in state.items()}, path)
    model = pretrained.load(path, heads=3)
    assert all(z.dtype == torch.float32 for z in model.state_dict().values())
    assert len(sample_min.settings_of(model, cfg=1.5, steps=3, seed=0)["weights"]) == 16


def test_a_dit_file_without_the_learned_variance_is_an_error_of_one_line(dit_file):
    path, state = dit_file
    state["final_layer.linear.bias"] = torch.zeros(16)
    torch.save(state, path)
    message = r"DiT.pt: the weights are not those of its model: .*final_layer.linear.bias"
    with pytest.raises(ValueError, match=message) as e:
        pretrained.load(path, heads=3)
    assert "\n" not in str(e.value)


def test_a_width_that_is_none_of_dits_own_needs_the_heads(dit_file):
    message = r"DiT.pt: a width of 24 is none of DiT's own; --heads must say how many"
    with pytest.raises(ValueError, match=message):
        pretrained.load(dit_file[0])


@pytest.mark.parametrize(("D", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_dits_own_widths_tell_their_heads(tmp_path, D, heads, monkeypatch):
    state = on_meta(official(1, D, 4, 4, 1000, 64))
    torch.save({}, tmp_path / "DiT.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    with torch.device("meta"):
        config = pretrained.load(tmp_path / "DiT.pt").config
    assert config == Baseline(input_size=32, patch_size=4, hidden_size=D, depth=1, heads=heads)


def test_another_file_is_an_error_of_one_line(tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"other.pt is not a readable checkpoint") as e:
        pretrained.load(tmp_path / "other.pt")
    assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        pretrained.load(tmp_path / "absent.pt")


def test_sampling_from_a_dit_file(dit_file, tmp_path, capsys):
    vae = save_vae(tmp_path / "vae")
    out = tmp_path / "s.npz"
    options = ["--heads=3", "--steps=3", "--per-class=2", "--classes", "4", "1", f"--vae={vae}"]
    sample.main([str(dit_file[0]), *options, f"--out={out}"])
    assert "4 images" in capsys.readouterr().out
    with np.load(out) as npz:
        assert npz["arr_0"].shape == (4, 16, 16, 3)
        assert npz["labels"].tolist() == [4, 1, 4, 1]


# --------------------------------------------------------------------------------------------------
# Checkpoints of the compared models.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture(scope="module", params=["DiT", "DiG", "MHLA", "MoH", "ladder-0-sana"])
def trained(request, digits, tmp_path_factory):
    """A run of a compared model that has ended: (config, run, path of its checkpoint)."""
    config = variant(request.param, CONFIG)
    out = tmp_path_factory.mktemp("run") / request.param
    run = replace(RUN, data=digits, out=str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train(config, run)
    return config, run, out / "ckpt.pt"


def test_a_checkpoint_says_which_model_it_is(trained):
    config, _, path = trained
    model = pretrained.load(path)
    assert model.config == config and type(model.config) is Baseline and model.step == 6
    assert type(model.blocks[0].attn) is attention_of(config, 0)
    assert_weights(model, torch.load(path)["ema"])


def test_sampling_from_a_compared_model(trained, tmp_path, capsys):
    path = str(trained[2])
    sample.main([path, "--steps=3", "--per-class=1", f"--out={tmp_path}/s.npz"])
    assert "10 images from step 6" in capsys.readouterr().out


def test_an_exported_model_is_the_model(trained, tmp_path):
    model = pretrained.load(trained[2])
    model.save_pretrained(tmp_path / "exported")
    again = pretrained.load(tmp_path / "exported")
    assert again.config == model.config and again.meta == model.meta
    assert_weights(again, model.state_dict())


def test_dydilit_alone_says_who_can_load_a_compared_model(trained):
    with pytest.raises(ValueError, match=r"kind 'Baseline', .*experiments/pretrained.py"):
        DyDiLiT.from_pretrained(trained[2])


def test_a_run_of_a_compared_model_is_resumed(trained, tmp_path):
    config, run, _ = trained
    shutil.copytree(run.out, tmp_path / "copy")
    longer = replace(run, out=str(tmp_path / "copy"), steps=7)
    prepare_resume(config, longer)
    assert train(config, longer, resume=True) == 7


@pytest.mark.parametrize("field", ["attention", "normalize"])
def test_a_run_is_not_resumed_as_another_model(trained, field):
    config, run, _ = trained
    other = CONFIG if field == "attention" else replace(config, normalize=False)
    message = f"belongs to another configuration: .*{field} .* \\(now "
    with pytest.raises(ValueError, match=message):
        prepare_resume(other, replace(run, steps=8))


def test_a_run_of_dydilit_is_not_resumed_as_a_compared_model(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path), steps=1)
    train(CONFIG, run)
    assert type(pretrained.load(tmp_path / "ckpt.pt").config) is Config
    message = r"belongs to another configuration: .*attention None \(now 'softmax'\)"
    with pytest.raises(ValueError, match=message):
        prepare_resume(variant("DiT", CONFIG), run)
