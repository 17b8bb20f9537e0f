"""Every test starts from the same seed, runs on one thread, and imports dydilit from the repository root."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which would try again and again


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def reference_path(monkeypatch):
    """As if the extension had not been built: the Python path is what is tested."""
    monkeypatch.setattr("dydilit.FUSED_DEVICES", ())
