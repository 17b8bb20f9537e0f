"""Every test starts from the same seed, runs on one thread, and imports from the repository."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]  # dydilit and the scripts; util and runs
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no retries

from runs import RUN, prepare_digits  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def cpu():
    """No GPU is seen, on any machine: the bits of a run depend on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def reference_path(monkeypatch):
    """The Python path is tested, as if the extension had not been built."""
    monkeypatch.setattr("dydilit.FUSED_DEVICES", ())


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of the prepared digits; no test changes it."""
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture
def run(digits, tmp_path):
    """The tiny run of runs.py with its data, and a folder that does not exist yet."""
    return replace(RUN, data=digits, out=str(tmp_path / "out"))
