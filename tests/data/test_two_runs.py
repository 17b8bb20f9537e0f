"""Two preparations at once, one of them interrupted; bytes that change between two runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from folders import make_root, noise, run_prepare
from latent_sets import (
    BATCH,
    SCRIPT,
    Killed,
    N,
    arguments,
    folder,
    missing,
    prepare,
    rows,
    small,
    stop_at,
)
from PIL import Image
from runs import SET_FILES, contents, finish, load_prepare, read_set, start, torchrun

from support.lock import one_writer

pytestmark = pytest.mark.usefixtures("cpu")
SHELL = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}

# ----------------------------------------------------------------------------------------------
# Two at once.


@pytest.fixture
def slow_root(tmp_path):
    """A folder of 100 large images, which takes a second."""
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    Image.fromarray(noise(900, 900, 3)).save(root / "a" / "000.png")
    for i in range(99):
        os.link(root / "a" / "000.png", root / "a" / f"{i + 1:03d}.png")
    return root


def begin(root, out, *more):
    """Start the command, and return its process, halted once it has laid out its files."""
    options = ["--size=8", "--out", out, "--workers=1", *more]
    process = subprocess.Popen(
        [sys.executable, *map(str, [SCRIPT, root, *options])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **SHELL,
    )
    end = time.monotonic() + 30
    while not (out / rows.PLAN).exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    return process


def finish_halted(process):
    """stdout and stderr of a process of `begin`, which goes on to its end."""
    process.send_signal(signal.SIGCONT)
    return finish(process)


def test_the_second_of_two_says_who_is_there_and_touches_nothing(slow_root, tmp_path):
    out = tmp_path / "out"
    first = begin(slow_root, out)
    small_root = make_root(tmp_path / "small", {"b": 4})
    r = run_prepare("imagefolder", small_root, "--size=8", "--out", out, "--workers=1")
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and r.stdout == ""
    assert f"{out} is being written by process {first.pid} on " in r.stderr
    stdout, stderr = finish_halted(first)
    assert first.returncode == 0 and "(100, 3, 8, 8)" in stdout, stderr
    assert sorted(contents(out)) == SET_FILES and len(read_set(out)[0]) == 100


def test_the_second_is_interrupted_and_leaves_the_files_of_the_first(slow_root, tmp_path):
    out = tmp_path / "out"
    first = begin(slow_root, out)
    options = ["--size=8", "--out", out, "--workers=1"]
    for pause in (0.0, 0.1, 0.2, 0.3):
        command = [sys.executable, *map(str, [SCRIPT, slow_root, *options])]
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **SHELL)
        time.sleep(pause)
        second.send_signal(signal.SIGINT)
        second.communicate(timeout=30)
        assert second.returncode != 0
    assert finish_halted(first)[0] and first.returncode == 0
    assert sorted(contents(out)) == SET_FILES and len(read_set(out)[0]) == 100


def test_the_first_is_killed_and_its_lock_blocks_nobody(slow_root, tmp_path):
    out = tmp_path / "out"
    first = begin(slow_root, out)
    first.kill()
    first.communicate()
    assert (out / ".lock").exists() and (out / rows.PLAN).exists()
    r = run_prepare("imagefolder", slow_root, "--size=8", "--out", out, "--workers=1")
    assert r.returncode == 0, r.stderr
    assert sorted(contents(out)) == SET_FILES


def test_latents_are_written_by_one_run_at_a_time(images, vae, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    with one_writer(out):
        process = start(SCRIPT, *arguments(images, out, vae))
        _, stderr = finish(process)
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert f"{out} is being written by process {os.getpid()} on " in stderr
    assert contents(out) == {}


@pytest.mark.parametrize("held", [True, False])
def test_under_torchrun_an_error_is_said_once_and_no_rank_waits(images, vae, tmp_path, held):
    out = tmp_path / "set"
    out.mkdir()
    began, command = time.monotonic(), ["--standalone", "--nproc_per_node=2", SCRIPT]
    if held:
        with one_writer(out):
            _, stderr = finish(process := torchrun(*command, *arguments(images, out, vae)))
    else:
        root = tmp_path / "nowhere"
        _, stderr = finish(process := torchrun(*command, *arguments(root, out, vae)))
    message = f"{out} is being written by" if held else f"{root} is not a folder"
    assert process.returncode == 1 and stderr.count("prepare.py: error: ") == 1
    assert message in stderr and contents(out) == {}
    assert time.monotonic() - began < 60


def test_an_error_of_a_bundled_set_is_one_line(tmp_path):
    (tmp_path / "meta.json").write_text("{")
    r = run_prepare("digits", "--out", tmp_path)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "another prepared set" in r.stderr


def test_a_path_that_the_terminal_cannot_show_is_no_error(tmp_path):
    process = subprocess.run(
        [sys.executable, SCRIPT.parents[1] / "digits" / "prepare.py", "--out", tmp_path / "é"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert process.returncode == 0 and rb"\xe9: digits" in process.stdout


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_two_that_prepare_a_bundled_set_wait_for_each_other(tmp_path, name):
    out = tmp_path / "out"
    load_prepare(name).prepare(tmp_path / "want")
    script = SCRIPT.parents[1] / name / "prepare.py"
    processes = [start(script, "--out", out) for _ in range(2)]
    ended = [(finish(p), p.returncode) for p in processes]
    assert all(code == 0 for _, code in ended), ended
    assert contents(out) == contents(tmp_path / "want")


def test_an_interrupted_run_removes_its_own_files_alone(tmp_path, monkeypatch):
    """As where the file system has no locks: the names of two runs differ."""
    digits = load_prepare("digits")
    (tmp_path / "images.npy.1.tmp").write_bytes(b"of another process")
    monkeypatch.setattr(np, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.prepare(tmp_path)
    assert contents(tmp_path) == {"images.npy.1.tmp": b"of another process"}


def test_a_set_is_not_exchanged_for_an_equal_one(tmp_path, monkeypatch):
    """A training run that starts at this moment would find no meta.json."""
    digits = load_prepare("digits")
    digits.prepare(tmp_path)
    before = {name: os.stat(tmp_path / name).st_ino for name in SET_FILES}
    digits.prepare(tmp_path)
    assert before == {name: os.stat(tmp_path / name).st_ino for name in SET_FILES}


# ----------------------------------------------------------------------------------------------
# Bytes that change between two runs.


@pytest.fixture
def stopped(images, vae, tmp_path, monkeypatch):
    """images, folder of the set and autoencoder of a run that was stopped after four blocks."""
    out = tmp_path / "out" / "set"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 4 + 5 * 4 + 2)
        prepare(images, out, vae)
    assert missing(out) < N - 2 * BATCH
    return images, out, vae


def encoded_anew(monkeypatch, stopped):
    """How many images the continued run encodes, and the bytes it leaves."""
    with monkeypatch.context() as patch:
        encoded = stop_at(patch, None)[1]
        got = prepare(*stopped)
    return len(encoded), got


@pytest.mark.parametrize("row", [0, 1, BATCH + 2])
@pytest.mark.parametrize("byte", [0, 100, -1])
def test_a_flipped_bit_of_a_finished_row_is_noticed_and_the_row_made_anew(
    stopped, plain, monkeypatch, capsys, row, byte
):
    out, left = stopped[1], missing(stopped[1])
    x = np.load(out / rows.ROWS, mmap_mode="r+")
    x[row].reshape(-1).view(np.uint8)[byte] ^= 4
    x.flush()
    encoded, got = encoded_anew(monkeypatch, stopped)
    assert encoded == left + 1 and got == contents(plain)
    assert "1 finished rows were damaged and are made anew" in capsys.readouterr().err


@pytest.mark.parametrize("field", rows.MARK.names)
def test_a_flipped_bit_of_a_mark_is_noticed_too(stopped, plain, monkeypatch, field):
    out, left = stopped[1], missing(stopped[1])
    marks = np.load(out / rows.DONE, mmap_mode="r+")
    marks[field][2] ^= 4
    marks.flush()
    encoded, got = encoded_anew(monkeypatch, stopped)
    assert encoded == left + 1 and got == contents(plain)


def test_a_row_that_is_marked_and_was_never_written_is_made(stopped, plain, monkeypatch):
    marks = np.load(stopped[1] / rows.DONE, mmap_mode="r+")
    marks[-1] = (77, 0, 12345)
    marks.flush()
    assert encoded_anew(monkeypatch, stopped)[1] == contents(plain)


def test_rows_are_compared_after_the_exchange_of_files_too(
    images, vae, plain, tmp_path, monkeypatch
):
    """Killed between images.npy and labels.npy; a bit flips; the same command again."""
    out, replace = tmp_path / "out" / "set", os.replace

    def killed(source, target):
        if Path(target).name == "labels.npy":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        prepare(images, out, vae)
    x = np.load(out / "images.npy", mmap_mode="r+")
    x[3, 0, 0, 0, 0] += 1
    x.flush()
    encoded, got = encoded_anew(monkeypatch, (images, out, vae))
    assert encoded == 1 and got == contents(plain)


def cut(n):
    return lambda file: file.write_bytes(file.read_bytes()[:n])


def write(text):
    return lambda file: file.write_text(text)


def save(x):
    return lambda file: np.save(file, x)


DAMAGES = [
    (rows.PLAN, write(""), "is no JSON"),
    (rows.PLAN, write("\ufeff{}"), "is no JSON"),
    (rows.PLAN, write("[" * 100_000), "recursion"),
    (rows.PLAN, write("3"), "is 3, expected an object"),
    (rows.PLAN, lambda file: file.write_bytes(b"\xff\xfe"), "is no JSON"),
    (rows.DONE, cut(0), "is no .npy array"),
    (rows.DONE, cut(-1), "is shorter than its header says"),
    (rows.DONE, save(np.zeros(N - 1, rows.MARK)), r"is .* \(22,\), expected .* \(23,\)"),
    (rows.DONE, save(np.zeros(N, np.int64)), r"is int64 \(23,\), expected marks"),
    (rows.DONE, save(np.array([{}])), "holds Python objects"),
    (rows.DONE, lambda file: file.unlink(), "No such file"),
    (rows.ROWS, cut(-1), "is shorter than its header says"),
    (rows.ROWS, cut(0), "is no .npy array"),
    (rows.ROWS, save(np.zeros((N, 2, 4, 8, 8), np.float32)), "is float32"),
    (rows.ROWS, lambda file: file.unlink(), "No such file"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_damaged_files_of_a_stopped_run_are_named_in_one_line(stopped, name, damage, message):
    images, out, vae = stopped
    mark = np.load(out / rows.DONE)
    if name == rows.DONE and mark.dtype == rows.MARK:
        assert mark["size"].any()
    damage(out / name)
    before = contents(out)
    with pytest.raises(ValueError, match=message) as e:
        prepare(images, out, vae)
    assert str(e.value).startswith(f"{out} cannot be continued, delete it first: ")
    assert "\n" not in str(e.value) and contents(out) == before
    shutil.rmtree(out)
    prepare(images, out, vae)


def mutations(whole, rng, n):
    """n changed copies of some bytes: a bit, a few bytes, a piece cut out, the end cut off."""
    for _ in range(n):
        b = bytearray(whole)
        i, j = sorted(rng.integers(0, len(b), 2))
        kind = rng.integers(4)
        if kind == 0:
            b[i] ^= 1 << rng.integers(8)
        elif kind == 1:
            b[i : i + 4] = rng.bytes(4)
        elif kind == 2:
            del b[i : min(j, i + 50)]
        else:
            del b[i:]
        yield bytes(b)


@pytest.mark.parametrize("name", [rows.PLAN, rows.DONE, rows.ROWS])
def test_mutated_files_are_refused_in_one_line_or_mended(images, vae, tmp_path, monkeypatch, name):
    """MUTATIONS=300 (default 30) of each."""
    number = int(os.environ.get("MUTATIONS", 30))
    root = small(images, tmp_path / "in")
    want = prepare(root, tmp_path / "want" / "set", vae)
    out = tmp_path / "out" / "set"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 13)
        prepare(root, out, vae)
    saved, counts = contents(out), {"refused": 0, "mended": 0}
    rng = np.random.default_rng(len(name))
    for b in mutations(saved[name], rng, number):
        shutil.rmtree(out)
        out.mkdir()
        for other, whole in saved.items():
            (out / other).write_bytes(b if other == name else whole)
        try:
            got = prepare(root, out, vae)
        except ValueError as e:
            assert "\n" not in str(e) and str(out) in str(e), repr(e)
            counts["refused"] += 1
        else:
            assert got.keys() == want.keys()
            images_now, labels_now, meta_now = read_set(out)
            images_then, labels_then, meta_then = read_set(tmp_path / "want" / "set")
            assert images_now.tobytes() == images_then.tobytes()
            assert (labels_now == labels_then).all() and meta_now == meta_then
            counts["mended"] += 1
    print(name, json.dumps(counts))
    assert sum(counts.values()) == number and counts["refused"] > number // 10


def test_the_same_command_in_two_folders_at_once_is_no_conflict(tmp_path):
    root = make_root(tmp_path / "in", {"a": 5})
    with one_writer(root.parent):
        folder.prepare(root, 4, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == SET_FILES
