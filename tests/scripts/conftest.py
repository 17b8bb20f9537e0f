"""Scripts run here as from a command line; a model of latents with its autoencoder."""

import runpy
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, ROOT, RUN, prepare_digits
from util import save_vae

from dydilit import train

LATENTS = replace(CONFIG, in_channels=4, num_classes=3)


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """The bits of a run depend on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train_min.py", "--steps=3") runs it here as __main__: (exit code, stdout, stderr)."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the end of a process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="session")
def latents(vae, tmp_path_factory):
    """The checkpoint of a model that a few steps have trained on 24 images, prepared as latents."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    for i in range(24):
        file = folder / "in" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "data" / "imagefolder")
        prepare = runpy.run_path(str(ROOT / "data" / "imagefolder" / "prepare.py"))["prepare"]
        prepare(folder / "in", 16, folder / "set", held_out=0.2, vae=vae, batch=8)
    run = replace(RUN, data=str(folder / "set"), out=str(folder / "out"), ema_decay=0.0, steps=12)
    train(LATENTS, run)
    return folder / "out" / "ckpt.pt"
