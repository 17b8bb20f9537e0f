"""support/prepared.py: a data set that does not fit its model is refused in one line."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from runs import CONFIG, ROOT, write_set

from dydilit import PRESETS, Config
from support.prepared import check_set

GREY = np.zeros((12, 1, 8, 8), np.uint8)
LABELS = np.zeros(12, np.int64)


def test_the_digits_fit_a_model_of_digits(digits):
    check_set(digits, CONFIG)


DO_NOT_FIT = [
    (GREY, np.full(12, 10), "labels.npy has labels 10 .. 10, expected 0 .. 9"),
    (GREY, np.full(12, -1), "labels.npy has labels -1 .. -1, expected 0 .. 9"),
    (GREY, np.zeros(11, np.int64), "labels.npy is int64 (11,), expected int64 (12,)"),
    (
        np.zeros((12, 1, 9, 9), np.uint8),
        LABELS,
        "uint8 (1, 9, 9), but the model reads uint8 (1, 8, 8)",
    ),
    (
        np.zeros((12, 3, 8, 8), np.uint8),
        LABELS,
        "uint8 (3, 8, 8), but the model reads uint8 (1, 8, 8)",
    ),
    (np.zeros((12, 8, 8), np.uint8), LABELS, "uint8 (12, 8, 8), expected uint8 (N, C, H, W)"),
    (GREY.astype(np.float32), LABELS, "float32 (12, 1, 8, 8), expected uint8 (N, C, H, W)"),
]


@pytest.mark.parametrize("images, labels, message", DO_NOT_FIT)
def test_data_that_do_not_fit_the_model_are_refused(tmp_path, images, labels, message):
    folder = write_set(tmp_path / "set", images, labels)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        check_set(folder, CONFIG)
    assert str(folder) in str(e.value)


def test_a_set_with_nothing_left_to_train_on_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", GREY, LABELS, held_out=12)
    with pytest.raises(ValueError, match=r"meta\.json: held_out is 12, expected less than the 12"):
        check_set(folder, CONFIG)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("kept", [0, 50, 200])
def test_data_that_were_cut_short_are_refused(tmp_path, name, kept):
    file = write_set(tmp_path / "set", GREY, LABELS) / name
    file.write_bytes(file.read_bytes()[:kept])
    message = f"{file} is (no .npy array, or a damaged one|shorter than its header says)"
    with pytest.raises(ValueError, match=message):
        check_set(tmp_path / "set", CONFIG)


def test_missing_digits_name_the_command_that_makes_them(tmp_path):
    missing = tmp_path / "digits"
    with pytest.raises(FileNotFoundError, match="no prepared data set in") as e:
        check_set(missing, CONFIG)
    python, *command = shlex.split(str(e.value).split("make it: ")[1])
    assert python == "python"
    command = [sys.executable, *command]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    check_set(missing, CONFIG)


def test_missing_images_name_the_command_that_prepares_a_folder_of_them(tmp_path):
    message = re.escape("data/imagefolder/prepare.py ROOT --size 32 --out")
    with pytest.raises(FileNotFoundError, match=message):
        check_set(tmp_path / "mine", PRESETS["pixels32"])


def test_missing_latents_name_the_command_that_makes_them(tmp_path):
    message = r"make it: python data/imagefolder/prepare\.py ROOT --size 256 --vae"
    with pytest.raises(FileNotFoundError, match=message):
        check_set(tmp_path / "imagenet256", Config())
