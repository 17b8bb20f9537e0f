"""A finished comparison of two tiny models, for the tests of its tables and of its figures."""

import pytest
import torch
from comparison import TINY, TWO, Here, memory_of, runs_started_by
from runs import prepare_digits

from experiments import ablate, costs


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture(scope="session")
def finished(digits, tmp_path_factory):
    """A comparison that ran without interruption: its folder, and the arguments of ablate.py."""
    out = tmp_path_factory.mktemp("finished")
    arguments = [*TWO, f"--data={digits}", f"--out={out}", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        runs_started_by(Here, patch)
        patch.setattr(costs, "memory_of", memory_of)
        ablate.main(arguments)
    return out, arguments
