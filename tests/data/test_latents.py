"""data/imagefolder/prepare.py --vae: what the latents are, and what is refused.

test_latents_resume.py kills it, test_latents_training.py trains on them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import noise
from latent_sets import (
    BATCH,
    SCRIPT,
    SIZE,
    C,
    N,
    arguments,
    encode_directly,
    files_in_order,
    folder,
    latents,
    missing,
    prepare,
    save_vae,
    small,
)
from PIL import Image
from runs import ROOT, SET_FILES, contents, read_set

pytestmark = pytest.mark.usefixtures("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"

# ----------------------------------------------------------------------------------------------
# What they are.


def test_layout_and_meta(plain, vae):
    images, labels, meta = read_set(plain)
    assert sorted(contents(plain)) == SET_FILES
    assert images.shape == (N, 2, 2 * C, 8, 8) and images.dtype == np.float16
    assert labels.dtype == np.int64
    assert meta == {
        "name": "set",
        "classes": ["a", "b", "c"],
        "flip": True,
        "held_out": 5,
        "levels": 255,
        "vae": vae,
        "scaling": 0.3,
        "pixels": SIZE,
    }


def test_the_readme_names_every_file_and_every_field(plain):
    text = (ROOT / "data" / "README.md").read_text()
    names = [*SET_FILES, *read_set(plain)[2], "class_seed"]
    assert all(f"`{name}`" in text for name in names)


def test_labels_are_those_of_the_files(plain, images):
    _, labels, meta = read_set(plain)
    folders = [Path(f).parent.name for f in files_in_order(images)]
    assert [meta["classes"][y] for y in labels] == folders


@pytest.mark.parametrize("view", [0, 1], ids=["image", "mirror image"])
def test_they_are_the_means_and_deviations_of_diffusers(plain, images, vae, view):
    pixels = np.stack([folder.load_image(f, SIZE) for f in files_in_order(images)])
    if view == 1:
        pixels = pixels[..., ::-1].copy()
    want = encode_directly(vae, pixels)
    assert (want[:, C:] > 0).all() and np.abs(want).max() < 100
    error = np.abs(read_set(plain)[0][:, view] - want)
    assert (error <= 2.0**-11 * np.abs(want) + 1e-5).all()  # float16's rounding, and float32's


def test_the_latent_of_a_mirrored_image_is_not_the_mirrored_latent(plain):
    latents = read_set(plain)[0]
    assert np.abs(latents[:, 1] - latents[:, 0, ..., ::-1]).max() > 0.01


def test_without_flips_the_images_alone_are_encoded(plain, images, vae, tmp_path):
    prepare(images, tmp_path / "set", vae, flip=False)
    latents, _, meta = read_set(tmp_path / "set")
    assert meta["flip"] is False and np.array_equal(latents, read_set(plain)[0][:, :1])


def test_images_of_every_mode_are_encoded_from_their_pixels(vae, tmp_path):
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    x = noise(SIZE, SIZE, 4)
    pictures = {"l.png": x[..., 0], "rgba.png": x, "deep.png": x[..., 0].astype(np.uint16) * 257}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(root / "a" / name)
    Image.fromarray(x, "CMYK").save(root / "a" / "cmyk.jpg")
    prepare(root, tmp_path / "set", vae)
    pixels = np.stack([folder.load_image(f, SIZE) for f in files_in_order(root)])
    want = encode_directly(vae, pixels)
    assert np.abs(read_set(tmp_path / "set")[0][:, 0] - want).max() < 1e-2


def test_autocast_around_it_changes_nothing(plain, images, vae, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        prepare(images, tmp_path / "set", vae)
    assert contents(tmp_path / "set") == contents(plain)


def test_neither_the_number_of_threads_nor_the_layout_of_the_memory_shows(tmp_path):
    vae = save_vae(tmp_path / "vae", block_out_channels=(8, 16))  # large enough that they would
    x = noise(8, 32, 32, 3).transpose(0, 3, 1, 2)
    want = latents.Encoder(vae, 32, True)(x, {})
    torch.set_num_threads(2)
    assert np.array_equal(latents.Encoder(vae, 32, True)(x, {}), want)
    assert np.array_equal(latents.Encoder(vae, 32, True)(np.ascontiguousarray(x), {}), want)


# ----------------------------------------------------------------------------------------------
# A subset of the classes.


def many_classes(root, n=12):
    """n classes with an image each, whose grey is the number of its class."""
    for i in range(n):
        (root / f"n{i:02d}").mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(root / f"n{i:02d}" / "0.png")
    return root


# these never change
DRAWN = {0: ["n01", "n02", "n03", "n08", "n11"], 1: ["n02", "n04", "n05", "n07", "n09"]}


@pytest.mark.parametrize("seed", DRAWN)
@pytest.mark.parametrize("of_latents", [False, True], ids=["pixels", "latents"])
def test_classes_draws_a_subset_and_says_which(vae, tmp_path, seed, of_latents):
    root = many_classes(tmp_path / "in")
    (root / "n00" / "0.png").unlink()  # it is not drawn, so it may be empty
    given = vae if of_latents else None
    prepare(root, tmp_path / "set", given, classes=5, class_seed=seed)
    images, labels, meta = read_set(tmp_path / "set")
    assert len(images) == 5 and sorted(labels) == list(range(5))
    assert meta["class_seed"] == seed and meta["classes"] == DRAWN[seed]
    if not of_latents:
        assert [DRAWN[seed][y] for y in labels] == [f"n{i:02d}" for i in images[:, 0, 0, 0]]


@pytest.mark.parametrize("n", [0, 13, -1])
def test_more_classes_than_there_are_or_none_are_refused(tmp_path, n):
    with pytest.raises(ValueError, match=f"{n} classes are asked for, .*in has 12"):
        prepare(many_classes(tmp_path / "in"), tmp_path / "set", None, classes=n)


# ----------------------------------------------------------------------------------------------
# Autoencoders that cannot be had or do not fit.


def empty(vae, path):
    path.mkdir()


def nowhere(vae, path):
    pass


def without_weights(vae, path):
    shutil.copytree(vae, path)
    (path / WEIGHTS).unlink()


def without_encoder(vae, path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(vae, path)
    weights = load_file(path / WEIGHTS)
    decoder = {k: v for k, v in weights.items() if k.startswith("decoder")}
    save_file(decoder, path / WEIGHTS)


def with_config(**config):
    """A copy of the autoencoder whose config.json has these values."""

    def make(vae, path):
        shutil.copytree(vae, path)
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))

    return make


def grey(vae, path):
    save_vae(path, in_channels=1, out_channels=1)


def six_levels(vae, path):
    down, up = ("DownEncoderBlock2D",) * 6, ("UpDecoderBlock2D",) * 6
    save_vae(path, block_out_channels=(8,) * 6, down_block_types=down, up_block_types=up)


AUTOENCODERS = [
    (empty, r"cannot load the autoencoder .*no file named config.json found in"),
    (nowhere, r"cannot load the autoencoder .*\(offline\?\): We couldn't connect to"),
    (without_weights, "no file named diffusion_pytorch"),
    (
        with_config(block_out_channels=[4, 4]),
        "cannot load the autoencoder .*Error.s. in loading",
    ),
    (without_encoder, r"lacks \d+ weights, encoder.conv_in.bias among them$"),
    (with_config(shift_factor=0.1), "also shifts its latents; only a scaling is provided for"),
    (grey, "takes 1 channels, images have 3"),
    (six_levels, "size 16 is not a multiple of 32, the factor"),
]


@pytest.mark.parametrize("make, message", AUTOENCODERS)
def test_an_autoencoder_that_does_not_fit_is_refused_in_one_line(
    images, vae, tmp_path, make, message
):
    make(vae, tmp_path / "vae")
    with pytest.raises(ValueError, match=message) as e:
        prepare(images, tmp_path / "set", str(tmp_path / "vae"))
    assert "\n" not in str(e.value) and not (tmp_path / "set").exists()


def test_an_autoencoder_of_the_hub_is_refused_offline_in_one_line(images, tmp_path):
    message = r"cannot load the autoencoder 'stabilityai/sd-vae-ft-ema', neither"
    with pytest.raises(ValueError, match=message) as e:
        prepare(images, tmp_path / "set", "stabilityai/sd-vae-ft-ema")
    assert "\n" not in str(e.value) and not (tmp_path / "set").exists()


def old_name(key):
    """The name of a weight in older diffusers; the published Stable Diffusion VAEs have them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, former in old.items():
        key = key.replace(f".{new}.", f".{former}.")
    return key


def test_the_weights_of_older_diffusers_are_read_too(plain, images, vae, tmp_path):
    from safetensors.torch import load_file, save_file

    old = tmp_path / "old"
    shutil.copytree(vae, old)
    weights = load_file(old / WEIGHTS)
    assert sum(old_name(k) != k for k in weights) == 16
    save_file({old_name(k): v for k, v in weights.items()}, old / WEIGHTS)
    prepare(images, tmp_path / "set", str(old))
    assert (tmp_path / "set" / "images.npy").read_bytes() == (plain / "images.npy").read_bytes()


def test_without_diffusers_it_says_what_to_install(images, vae, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = "latents need diffusers: pip install diffusers safetensors"
    with pytest.raises(ValueError, match=message):
        prepare(images, tmp_path / "set", vae)


# ----------------------------------------------------------------------------------------------
# Options, disks, numbers.


def test_grey_latents_are_refused(images, vae, tmp_path):
    with pytest.raises(ValueError, match="--vae and --gray exclude each other"):
        prepare(images, tmp_path / "set", vae, gray=True)


def test_an_empty_batch_is_refused(images, vae, tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        prepare(images, tmp_path / "set", vae, batch=0)


def test_torchrun_for_pixels_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "torchrun", lambda: (0, 2, None))
    with pytest.raises(ValueError, match="torchrun is for --vae"):
        prepare(images, tmp_path / "set", None)


def test_a_disk_without_room_is_refused_before_the_start(images, vae, tmp_path, monkeypatch):
    a_row = 2 * 2 * C * 8 * 8 * 2
    usage = type("usage", (), {"free": N * a_row - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)
    with pytest.raises(ValueError, match=r"set needs 0.0 GB, and its disk has 0.0 GB left"):
        prepare(images, tmp_path / "set", vae)
    assert not (tmp_path / "set").exists()


def test_a_prepared_set_of_latents_is_not_written_over(plain, images, vae):
    before = contents(plain)
    with pytest.raises(ValueError, match="already holds a prepared set"):
        prepare(images, plain, vae)
    assert contents(plain) == before


def test_a_class_without_readable_images_is_an_error(images, vae, tmp_path):
    root = small(images, tmp_path / "in")
    (root / "c").mkdir()
    (root / "c" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="class 'c' has no readable images"):
        prepare(root, tmp_path / "set", vae, on_error="skip")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_latents_that_are_not_finite_name_their_image(images, vae, tmp_path, monkeypatch, value):
    load, encoded = latents.load_autoencoder, []

    def poisoned(name):
        vae = load(name)
        encode = vae.encode

        def wrong(x):
            encoded.append(x)
            posterior = encode(x).latent_dist
            if len(encoded) == 4:  # the mirror images of the second block
                posterior.mean[2, 0, 3, 3] = value
            return type("output", (), {"latent_dist": posterior})

        vae.encode = wrong
        return vae

    monkeypatch.setattr(latents, "load_autoencoder", poisoned)
    seventh = files_in_order(images)[6]
    with pytest.raises(ValueError, match=f"the latents of {seventh} are not finite"):
        prepare(images, tmp_path / "set", vae)
    assert missing(tmp_path / "set") == N - BATCH


def test_a_gpu_without_enough_memory_says_what_to_do(vae, monkeypatch):
    encoder = latents.Encoder(vae, SIZE, True)

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder.vae, "encode", full)
    message = "the GPU cannot take 4 images at once; --batch says how many"
    with pytest.raises(ValueError, match=message):
        encoder(np.zeros((4, 3, SIZE, SIZE), np.uint8), {})


# ----------------------------------------------------------------------------------------------
# The command line.


def command_line(monkeypatch, *argv):
    """Exit code of the script with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        folder.main()
    return e.value.code


def test_the_command_line_reports_an_error_in_one_line(images, tmp_path, monkeypatch, capsys):
    argv = arguments(images, tmp_path / "set", tmp_path / "no" / "vae")
    assert command_line(monkeypatch, *argv) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1
    assert stderr.startswith("prepare.py: error: cannot load the autoencoder")


def test_an_interrupted_run_says_how_to_go_on(images, vae, tmp_path, monkeypatch, capsys):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(latents.Encoder, "__call__", interrupted)
    out = tmp_path / "set"
    assert command_line(monkeypatch, *arguments(images, out, vae)) == 130
    kept = f"{out} keeps what is done: the same command goes on from there"
    assert capsys.readouterr().err == f"prepare.py: error: interrupted\n{kept}\n"


def test_vae_alone_is_the_published_one(images, tmp_path, monkeypatch, capsys):
    argv = [images, f"--size={SIZE}", "--out", tmp_path / "set", "--workers=1", "--vae"]
    assert command_line(monkeypatch, *argv) == 2
    assert "cannot load the autoencoder 'stabilityai/sd-vae-ft-ema'" in capsys.readouterr().err
