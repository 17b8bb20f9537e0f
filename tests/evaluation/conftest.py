"""What the tests of the metrics compare: the digits; colours, with cheap features."""

import numpy as np
import pytest
from comparing import save, toy_network
from runs import prepare_digits

import eval_min


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the prepared digits."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def real(data):
    """All digits as a sampler would save them, (N, H, W, C), and their labels."""
    return np.load(data / "images.npy").transpose(0, 2, 3, 1), np.load(data / "labels.npy")


@pytest.fixture
def toy(monkeypatch):
    """The cheap network, which eval_min takes for Inception."""
    monkeypatch.setattr(eval_min, "inception", toy_network)
    return toy_network()


@pytest.fixture
def colours(tmp_path):
    """80 samples and 100 real images of 8 x 8 x 3, as arrays and as files."""
    rng = np.random.default_rng(0)
    fake = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    real = rng.integers(0, 230, (100, 8, 8, 3), dtype=np.uint8)
    return fake, real, save(tmp_path / "fake.npz", fake), save(tmp_path / "real.npz", real)


@pytest.fixture
def command(capsys):
    """command(*arguments) runs eval_min.py here: (what it exits with, stdout, stderr)."""

    def call(*arguments):
        try:
            eval_min.main([str(a) for a in arguments])
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call
