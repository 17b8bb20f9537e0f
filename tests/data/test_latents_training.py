"""Training on latents: the draws from their posterior, shares of ranks, resuming."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_sets import SIZE, C, N
from runs import (
    CONFIG,
    RUN,
    contents,
    differing,
    parts,
    read_log,
    read_set,
    resume,
    without_speed,
    write_set,
)

from dydilit import Data, generator, load_checkpoint, train
from support.prepared import check_set

pytestmark = pytest.mark.usefixtures("cpu")
MODEL = replace(CONFIG, in_channels=C)


@pytest.fixture
def run(plain, tmp_path):
    """The tiny run of runs.py on latents."""
    return replace(RUN, data=str(plain), out=str(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------
# What a step sees.


@pytest.fixture
def sure(tmp_path):
    """A set whose posteriors have no width: image i is i, and -i mirrored, in every entry."""
    n = 24
    images = np.zeros((n, 2, 2 * C, 8, 8), np.float16)
    images[:, 0, :C] = np.arange(n)[:, None, None, None]
    images[:, 1, :C] = -images[:, 0, :C]
    meta = {"flip": True, "held_out": 4, "vae": "a/vae", "scaling": 0.5, "pixels": SIZE}
    return Data(write_set(tmp_path / "sure", images, np.arange(n) % 10, **meta), MODEL)


def test_a_visit_takes_the_image_or_its_mirror_image_scaled(sure):
    mirrored = 0
    for step in range(100):
        x, y, *_ = sure.batch(0, step, 8, range(8), 0.0)
        assert x.dtype == torch.float32 and (x == x[:, :1, :1, :1]).all()
        number = x[:, 0, 0, 0] / 0.5
        assert number.abs().max() < 20 and (number.abs().long() % 10 == y).all()
        mirrored += (number < 0).sum().item()
    assert abs(mirrored / 800 - 0.5 * 19 / 20) < 0.07  # image 0 has no sign


def test_held_out_latents_are_not_mirrored(sure):
    x, y, *_ = sure.held_out()
    assert x[:, 0, 0, 0].tolist() == [10.0, 10.5, 11.0, 11.5] and y.tolist() == [0, 1, 2, 3]


VISITS = 3000


def draws(data, row, flip):
    """x of many visits of a row, (VISITS, C, 8, 8)."""
    return np.stack([data.item(row, generator(0, 1, i), flip, 0.0)[0] for i in range(VISITS)])


def assert_posterior(data, row, view, x):
    """x (n, C, 8, 8) has the mean and the deviation of a stored posterior, and is normal."""
    n, x = len(x), x.reshape(len(x), -1)
    posterior = np.split(data.images[row, view], 2)
    mean, std = (z.astype(np.float64).ravel() * 0.3 for z in posterior)
    assert (np.abs(x.mean(0) - mean) < 5 * std / n**0.5).all()
    assert (np.abs(x.std(0) / std - 1) < 5 / (2 * n) ** 0.5).all()
    z = (x - mean) / std
    assert abs((z**4).mean() / 3 - 1) < 0.05, "the tails of a Gaussian"


def test_over_many_visits_x_has_the_mean_and_deviation_of_the_posterior(plain):
    data = Data(plain, MODEL)
    assert_posterior(data, 0, 0, draws(data, 0, flip=False))


def test_over_many_visits_the_image_and_its_mirror_image_come_equally_often(plain):
    data, row = Data(plain, MODEL), 3
    x = draws(data, row, flip=True)
    # two Gaussians: the whole image tells which of the two means is nearer
    means = data.images[row, :, :C].astype(np.float64) * 0.3
    near = ((x[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert abs(near.mean() - 0.5) < 0.05
    for view in (0, 1):
        assert_posterior(data, row, view, x[near == view])


def test_the_draw_of_a_latent_and_its_noise_are_independent(plain):
    data = Data(plain, MODEL)
    items = [data.item(0, generator(0, 1, i), False, 0.0) for i in range(300)]
    x, _, _, noise = (np.stack(z) for z in zip(*items))
    centred = x.ravel() - np.tile(x.mean(0).ravel(), 300)
    assert abs(np.corrcoef(centred, noise.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("world", [2, 4, 8])
def test_shares_of_all_ranks_are_the_batch_of_one_process_bit_for_bit(plain, world):
    data, again = Data(plain, MODEL), Data(plain, MODEL)
    for step in range(4):
        whole = data.batch(0, step, 8, range(8), 0.5)
        ranges = [range(r * 8 // world, (r + 1) * 8 // world) for r in range(world)]
        shares = [again.batch(0, step, 8, share, 0.5) for share in ranges]
        assert not differing(whole, [torch.cat(z) for z in zip(*shares)])
    assert differing(whole, data.batch(1, step, 8, range(8), 0.5))


def test_the_order_of_an_epoch_is_that_of_its_own_seed(sure):
    """Also if a batch of the same epoch was just drawn with another seed."""
    want = sure.batch(7, 0, 8, range(8), 0.0)
    sure.batch(3, 0, 8, range(8), 0.0)
    assert not differing(want, sure.batch(7, 0, 8, range(8), 0.0))


def test_the_held_out_batch_never_changes(plain):
    data = Data(plain, MODEL)
    first = data.held_out()
    data.batch(0, 5, 8, range(8), 0.5)
    assert len(first[0]) == 5 and not differing(first, data.held_out())
    assert first[1].tolist() == np.load(plain / "labels.npy")[-5:].tolist()


def test_held_out_latents_are_draws_too(plain):
    """As in training; the means alone would be another distribution."""
    data = Data(plain, MODEL)
    mean = torch.from_numpy(data.images[-5:, 0, :C].astype(np.float32)) * 0.3
    assert (data.held_out()[0] != mean).all()


# ----------------------------------------------------------------------------------------------
# Runs.


def test_training_on_latents_resumes_to_the_same_bits(run, tmp_path, monkeypatch):
    train(MODEL, run)
    batch, broken = Data.batch, replace(run, out=str(tmp_path / "broken"))

    def unreadable(self, seed, step, *rest):
        if step == 5:
            raise OSError("the disk is gone")
        return batch(self, seed, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Data, "batch", unreadable)
        train(MODEL, broken)
    assert parts(broken.out)["step"] == 3
    assert resume(MODEL, broken) == 6
    assert not differing(parts(run.out), parts(broken.out))
    assert without_speed(read_log(run.out)) == without_speed(read_log(broken.out))


def test_a_checkpoint_says_how_its_latents_are_decoded(run, vae):
    train(MODEL, replace(run, steps=1))
    meta = load_checkpoint(Path(run.out, "ckpt.pt"))["meta"]
    assert (meta["vae"], meta["scaling"], meta["pixels"]) == (vae, 0.3, SIZE)


def refuse_to_resume(run, data, now):
    """A run on latents of scaling 0.3 is not resumed on this set, and stays as it is."""
    before = contents(run.out)
    message = rf"another configuration: scaling 0.3 \(now {now}\)"
    with pytest.raises(ValueError, match=message):
        resume(MODEL, replace(run, data=str(data)))
    assert contents(run.out) == before


@pytest.fixture
def other(plain, tmp_path):
    """A copy of the latents."""
    shutil.copytree(plain, tmp_path / "other" / "set")
    return tmp_path / "other" / "set"


def test_a_run_is_not_resumed_on_latents_of_another_scaling(run, other):
    train(MODEL, replace(run, steps=1))
    meta = json.loads((other / "meta.json").read_text()) | {"scaling": 0.18215}
    (other / "meta.json").write_text(json.dumps(meta))
    refuse_to_resume(run, other, "0.18215")


def test_a_run_on_latents_is_not_resumed_on_pixels(run, other):
    train(MODEL, replace(run, steps=1))
    meta = json.loads((other / "meta.json").read_text())
    del meta["scaling"]
    (other / "meta.json").write_text(json.dumps(meta))
    np.save(other / "images.npy", np.zeros((N, C, 8, 8), np.uint8))
    refuse_to_resume(run, other, "None")


# ----------------------------------------------------------------------------------------------
# Sets that do not fit the model.

MODELS = [
    (replace(MODEL, in_channels=4), r"float16 \(2, 8, 8, 8\)"),
    (replace(MODEL, input_size=16), r"float16 \(2, 4, 16, 16\)"),
]


@pytest.mark.parametrize("config, reads", MODELS)
def test_a_model_of_another_size_is_refused(plain, config, reads):
    message = rf"images.npy is float16 \(2, 4, 8, 8\), but the model reads {reads}"
    with pytest.raises(ValueError, match=message):
        check_set(plain, config)


def test_latents_are_not_taken_for_pixels(plain, tmp_path):
    images, labels, meta = read_set(plain)
    del meta["scaling"]
    folder = write_set(tmp_path / "set", images, labels, **meta)
    message = r"float16 \(23, 2, 4, 8, 8\), expected uint8 \(N, C, H, W\).* has no field scaling"
    with pytest.raises(ValueError, match=message):
        check_set(folder, MODEL)


def test_mirrored_latents_are_not_taken_for_images_alone(plain, tmp_path):
    images, labels, meta = read_set(plain)
    folder = write_set(tmp_path / "set", images, labels, **meta | {"flip": False, "scaling": 1.0})
    message = r"float16 \(23, 2, 4, 8, 8\), expected float16 \(N, 1, 2C, h, w\)"
    with pytest.raises(ValueError, match=message):
        check_set(folder, MODEL)
