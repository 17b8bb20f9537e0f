"""support/decoder.py: from the numbers of a model to pixels. test_npz.py has its autoencoder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CONFIG
from util import normal, save_vae

from support.decoder import Decoder, check_autoencoder, to_uint8


def rounded(value):
    """DiT's pixel: 127.5 x + 128, rounded down, between 0 and 255."""
    return min(max(math.floor(127.5 * value + 128), 0), 255)


def test_to_uint8_rounds_like_dit():
    values = [-2.0, -1.0, -0.999, 0.0, 0.003, 0.5, 0.99, 1.0, 1.5]
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, 3, 3)
    assert to_uint8(x).dtype == torch.uint8
    assert to_uint8(x).flatten().tolist() == [rounded(v) for v in values]


def test_every_grey_level_survives():
    levels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    assert to_uint8(levels).flatten().tolist() == list(range(256))


def test_to_uint8_puts_the_channels_last():
    x = normal(2, 3, 4, 5)
    out = to_uint8(x)
    assert out.shape == (2, 4, 5, 3) and out.is_contiguous()
    assert out[1, 2, 3, 0] == rounded(x[1, 0, 2, 3].item())


# --------------------------------------------------------------------------------------------------
# Before training.


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def not_a_number(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_in.bias"][1] = math.nan
    save_file(weights, folder / WEIGHTS)


def with_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = [
    (without_weights, "cannot load the autoencoder"),
    (cut, "cannot load the autoencoder"),
    (not_a_number, "has weights that are no numbers, in decoder.conv_in.bias"),
    (with_config(latent_channels=8), "cannot load|decodes 8 channels, the model makes 4"),
    (with_config(shift_factor=0.1), "also shifts its latents"),
    (with_config(block_out_channels=[8]), "cannot load"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    (lambda folder: (folder / "config.json").unlink(), "cannot load"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_an_autoencoder_is_checked_before_training(tmp_path, damage, message):
    vae = save_vae(tmp_path / "vae")
    check_autoencoder(vae, 4)
    damage(Path(vae))
    with pytest.raises(ValueError, match=message) as e:
        check_autoencoder(vae, 4)
    assert "\n" not in str(e.value) and vae in str(e.value)


def test_an_autoencoder_of_other_channels_is_refused(tmp_path):
    vae = save_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match="decodes 4 channels, the model makes 3"):
        check_autoencoder(vae, 3)
    grey = save_vae(tmp_path / "grey", out_channels=1)
    with pytest.raises(ValueError, match="makes 1 channels, not RGB"):
        check_autoencoder(grey, 4)


def test_an_autoencoder_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"cannot load the autoencoder .*offline"):
        check_autoencoder("nobody/has-this", 4)


@pytest.mark.parametrize("scaling", [None, 0, -1.0, math.nan, math.inf, "0.18215"])
def test_a_scaling_that_is_no_number_above_0_is_refused(tmp_path, scaling):
    vae = save_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match="the scaling of the latents is"):
        Decoder(replace(CONFIG, in_channels=4), vae, scaling, "cpu")
