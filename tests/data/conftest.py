"""An autoencoder, images, and their latents; no test changes them."""

import numpy as np
import pytest
import torch
from latent_sets import SIZE, N, prepare, save_vae
from PIL import Image


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A tiny autoencoder with random weights, made and saved by diffusers; it halves the size."""
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of N noisy images in three classes, of several sizes."""
    root, rng = tmp_path_factory.mktemp("images") / "in", np.random.default_rng(0)
    for i in range(N):
        (root / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 256, (SIZE + i % 5, SIZE + i % 7, 3), dtype=np.uint8)
        Image.fromarray(x).save(root / "abc"[i % 3] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def plain(images, vae, tmp_path_factory):
    """The folder of the set that every interrupted, shared or resumed run must end in."""
    out = tmp_path_factory.mktemp("plain") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        prepare(images, out, vae)
    return out
