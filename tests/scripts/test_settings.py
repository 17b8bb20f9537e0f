"""train_min.py's presets, fields and the command that continues a run."""

import re
import shlex

import pytest
from runs import CONFIG, RUN

from dydilit import PRESETS
from train_min import again, override, preset

UNKNOWN = [
    (
        lambda: preset("XL/2"),
        "unknown preset 'XL/2'; known: S/2, B/2, L/2, pixels32, photos, digits, mnist",
    ),
    (
        lambda: override(CONFIG, hiden_size=8),
        "unknown field 'hiden_size' of Config; known: input_size, patch_size",
    ),
    (
        lambda: override(RUN, learning_rate=1.0),
        "unknown field 'learning_rate' of Training; known: data, out, steps",
    ),
]


@pytest.mark.parametrize("make, message", UNKNOWN, ids=["preset", "Config", "Training"])
def test_an_unknown_name_is_refused_and_the_known_are_listed(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_list_of_known_fields_is_whole():
    message = r"unknown field 'width' of Config; known: input_size, .*label_std$"
    with pytest.raises(ValueError, match=message):
        override(PRESETS["S/2"], depth=3, width=9)


def test_override_makes_another_config():
    changed = override(preset("B/2"), depth=3, normalize=False)
    assert (changed.depth, changed.normalize, changed.hidden_size) == (3, False, 512)
    assert PRESETS["B/2"].depth == 9 and PRESETS["B/2"].normalize


def test_override_checks_values():
    with pytest.raises(ValueError, match="patch_size 2 must divide the side 9"):
        override(PRESETS["S/2"], input_size=9)


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)


def test_the_command_to_go_on_quotes_its_arguments():
    assert again(["--resume", "--out=a b"]) == "python train_min.py '--out=a b' --resume"


def test_the_command_to_go_on_starts_torchrun_where_torchrun_started_the_run(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert again([]) == "torchrun train_min.py --resume"


def test_the_command_to_go_on_works_in_another_folder(monkeypatch, tmp_path):
    """By the path that the user gave; below the folder by the short one."""
    place, elsewhere = tmp_path / "some where", tmp_path / "else"
    place.mkdir()
    elsewhere.mkdir()
    (place / "train_min.py").touch()
    for cwd, started, printed in (
        (elsewhere, place / "train_min.py", str(place / "train_min.py")),
        (elsewhere, "../some where/train_min.py", "../some where/train_min.py"),
        (place, place / "train_min.py", "train_min.py"),
        (tmp_path, place / "train_min.py", "some where/train_min.py"),
    ):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr("sys.argv", [str(started)])
        assert shlex.split(again([])) == ["python", printed, "--resume"]
    assert again([], "-m experiments.train") == "python -m experiments.train --resume"


def test_the_command_to_go_on_has_the_processes_of_this_run(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert again([]) == "torchrun --nproc_per_node=4 train_min.py --resume"


def test_the_command_to_go_on_has_the_machines_of_this_run(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    rendezvous = "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    want = f"torchrun --nnodes=2 {rendezvous} --nproc_per_node=4 train_min.py --resume"
    assert again([]) == want
