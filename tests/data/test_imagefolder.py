"""data/imagefolder for pixels: the set, what is refused, what an interruption leaves."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import fail_at, make_root, run_prepare, spoil
from PIL import Image
from runs import ROOT, SET_FILES, contents, load_prepare, read_set

folder = load_prepare("imagefolder")
import rows  # noqa: E402  (load_prepare has put its folder on the path)

# ----------------------------------------------------------------------------------------------
# The set.


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A prepared set of three classes."""
    tmp_path = tmp_path_factory.mktemp("pets")
    root = make_root(tmp_path / "in", {"cat": 40, "ant": 20, "bee": 20})
    folder.prepare(root, 8, tmp_path / "pets", held_out=0.2)
    return tmp_path / "pets"


def test_folder_layout(pets):
    images, labels, meta = read_set(pets)
    assert sorted(contents(pets)) == SET_FILES
    assert images.shape == (80, 3, 8, 8) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert meta == {
        "name": "pets",
        "classes": ["ant", "bee", "cat"],
        "flip": True,
        "held_out": 16,
        "levels": 255,
    }


def test_each_image_comes_once_with_the_label_of_its_folder(pets):
    images, labels, meta = read_set(pets)
    assert (images == images[:, :, :1, :1]).all() and (images[:, 2] == 7).all()
    drawn = {"cat": 0, "ant": 1, "bee": 2}  # make_root's numbers, not the sorted ones
    assert [drawn[meta["classes"][y]] for y in labels] == images[:, 0, 0, 0].tolist()
    assert len({tuple(i) for i in images[:, :2, 0, 0]}) == 80


def test_the_held_out_images_are_stratified_and_shuffled(pets):
    labels = read_set(pets)[1]
    assert (np.diff(labels) < 0).any()
    assert np.bincount(labels[-16:]).tolist() == [4, 4, 8]


def test_gray_no_flip_and_nothing_held_out(tmp_path):
    root = make_root(tmp_path / "in", {"a": 3, "b": 3})
    folder.prepare(root, 5, tmp_path / "out", held_out=0, flip=False, gray=True)
    images, _, meta = read_set(tmp_path / "out")
    assert images.shape == (6, 1, 5, 5) and meta["flip"] is False and meta["held_out"] == 0


def test_one_image_is_left_to_train_on(tmp_path):
    root = make_root(tmp_path / "in", {"a": 3, "b": 3})
    folder.prepare(root, 5, tmp_path / "out", held_out=0.99)
    assert read_set(tmp_path / "out")[2]["held_out"] == 5


def test_nested_files_of_every_kind_are_found_and_no_others(tmp_path):
    a = tmp_path / "in" / "a"
    (a / "deep" / "er").mkdir(parents=True)
    (a / ".hidden").mkdir()
    (tmp_path / "in" / ".git").mkdir()
    kinds = {
        "1.png": "PNG",
        "2.PNG": "PNG",
        "3.jpg": "JPEG",
        "4.JPEG": "JPEG",
        "deep/5.webp": "WEBP",
        "deep/er/6.Jpg": "JPEG",
    }
    for name, kind in kinds.items():
        with open(a / name, "wb") as file:
            Image.new("RGB", (4, 4)).save(file, kind)
    for name in ("notes.txt", "7.mpg", ".8.png", ".hidden/9.png", "../loose.png"):
        (a / name).write_bytes(b"not an image")
    folder.prepare(tmp_path / "in", 4, tmp_path / "out")
    images, _, meta = read_set(tmp_path / "out")
    assert len(images) == 6 and meta["classes"] == ["a"]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    for name in ("one", "two"):
        make_root(tmp_path / name, {"a": 30, "b": 20}, size=9)
    folder.prepare(tmp_path / "one", 8, tmp_path / "x" / "set")
    out = tmp_path / "y" / "set"
    r = run_prepare("imagefolder", tmp_path / "two", "--size=8", "--out", out, "--workers=2")
    assert r.returncode == 0, r.stderr
    assert contents(tmp_path / "x" / "set") == contents(out)


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    make_root(tmp_path / "in", {"a": 30, "b": 20})
    found, walk = folder.find(tmp_path / "in"), os.walk

    def other_order(*args, **options):
        for parent, folders, files in walk(*args, **options):
            yield parent, folders, sorted(files, key=lambda name: name[::-1])

    monkeypatch.setattr(os, "walk", other_order)
    assert folder.find(tmp_path / "in")[:2] == found[:2]


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_absence(tmp_path, monkeypatch):
    root, scandir = make_root(tmp_path / "in", {"a": 3, "b": 3}), os.scandir
    (root / "a" / "more").mkdir()

    def refused(path):
        if str(path).endswith("more"):
            raise PermissionError(f"no: {path}")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="more"):
        folder.find(root)


def test_the_command_takes_every_option(tmp_path):
    root = make_root(tmp_path / "in", {"a": 6, "b": 6})
    (root / "a" / "bad.png").write_bytes(b"")
    options = ["--held-out=0.25", "--no-flip", "--gray", "--on-error=skip", "--workers=1"]
    r = run_prepare("imagefolder", root, "--size=4", "--out", tmp_path / "out", *options)
    assert r.returncode == 0, r.stderr
    assert "(12, 1, 4, 4)" in r.stdout and "2 classes" in r.stdout and r.stdout.count("\n") == 1
    assert "bad.png" in r.stderr and "left out 1" in r.stderr
    assert read_set(tmp_path / "out")[2] == {
        "name": "out",
        "classes": ["a", "b"],
        "flip": False,
        "held_out": 3,
        "levels": 255,
    }


# ----------------------------------------------------------------------------------------------
# What is refused.


def one_image(root):
    make_root(root, {"a": 1})


def void_class(root):
    make_root(root, {"a": 1})
    (root / "void").mkdir()


def class_of_texts(root):
    make_root(root, {"a": 1, "b": 0})
    (root / "b" / "x.txt").touch()


REFUSED = [
    (lambda root: None, {}, "is not a folder"),
    (lambda root: root.write_text("a file"), {}, "is not a folder"),
    (lambda root: root.mkdir(), {}, "no class folders"),
    (void_class, {}, "class 'void' has no images"),
    (class_of_texts, {}, "class 'b' has no images"),
    (one_image, {"size": 0}, "size must be at least 1, got 0"),
    (one_image, {"held_out": 1.0}, "held-out share"),
    (one_image, {"held_out": -0.1}, "held-out share"),
    (one_image, {"workers": 0}, "workers"),
    (one_image, {"on_error": "ignore"}, "refuse or skip"),
]


@pytest.mark.parametrize("make, options, message", REFUSED)
def test_a_wrong_folder_or_option_is_refused_before_anything_is_written(
    tmp_path, make, options, message
):
    make(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        folder.prepare(tmp_path / "in", **{"size": 4, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SET_FILES)
def test_a_prepared_set_is_not_written_over(tmp_path, name):
    root = make_root(tmp_path / "in", {"a": 2})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a prepared set.*delete"):
        folder.prepare(root, 4, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    root = make_root(tmp_path / "in", {"a": 2})
    usage = type("usage", (), {"free": 2 * 3 * 4 * 4 - 1})
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda p: usage)
    with pytest.raises(ValueError, match="needs"):
        folder.prepare(root, 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_all_listed_and_nothing_is_written(tmp_path):
    root = make_root(tmp_path / "in", {"a": 5, "b": 5})
    bad = spoil(root)
    with pytest.raises(ValueError, match="unreadable images: 3 of 13") as e:
        folder.prepare(root, 8, tmp_path / "out")
    assert all(name in str(e.value) for name in bad) and "000.png" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_refusal_leaves_a_folder_that_was_there_with_its_files(tmp_path):
    root = make_root(tmp_path / "in", {"a": 5, "b": 5})
    bad, out = spoil(root), tmp_path / "mine"
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    r = run_prepare("imagefolder", root, "--size=8", "--out", out, "--workers=2")
    assert r.returncode != 0 and r.stdout == "" and all(name in r.stderr for name in bad)
    assert contents(out) == {"keep.txt": b"mine"}


def test_skipped_images_might_never_have_been_there(tmp_path, capsys):
    for name in ("clean", "spoiled"):
        root = make_root(tmp_path / name, {"a": 300, "b": 9})  # more than one block of the copy
    bad = spoil(root)
    folder.prepare(tmp_path / "clean", 8, tmp_path / "x" / "set", held_out=0.1)
    capsys.readouterr()
    folder.prepare(tmp_path / "spoiled", 8, tmp_path / "y" / "set", held_out=0.1, on_error="skip")
    printed = capsys.readouterr()
    assert all(name in printed.err for name in bad) and "left out 3" in printed.err
    assert contents(tmp_path / "x" / "set") == contents(tmp_path / "y" / "set")


def test_a_class_without_readable_images_is_an_error(tmp_path):
    root = make_root(tmp_path / "in", {"a": 2, "b": 1})
    (root / "b" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="class 'b' has no readable images"):
        folder.prepare(root, 4, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------
# Interruption, progress.


@pytest.mark.parametrize("call", [1, 2, 3, 4])  # the plan, then SET_FILES
@pytest.mark.parametrize("existed", [False, True])
def test_an_error_while_files_change_hands_leaves_nothing(tmp_path, monkeypatch, call, existed):
    root, out = make_root(tmp_path / "in", {"a": 4}), tmp_path / "out"
    if existed:
        out.mkdir()
    calls = fail_at(monkeypatch, call, OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        folder.prepare(root, 4, out)
    assert len(calls) == call
    assert list(out.glob("*")) == [] and out.exists() == existed


def test_an_interruption_while_decoding_leaves_nothing(tmp_path, monkeypatch):
    root, out, seen = make_root(tmp_path / "in", {"a": 4}), tmp_path / "out", []

    def load(file, size, gray):
        seen.append((out / "tmp.images.npy").exists())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return np.zeros((3, size, size), np.uint8), False

    with monkeypatch.context() as patch:
        patch.setattr(folder, "load", load)
        with pytest.raises(KeyboardInterrupt):
            folder.prepare(root, 4, out)
    assert seen == [True] * 3, "it was under way"
    assert not out.exists()
    folder.prepare(root, 4, out)  # and the next run goes through


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_with_workers_leaves_nothing(tmp_path):
    root, out = make_root(tmp_path / "in", {"a": 1}, size=1200), tmp_path / "out"
    for i in range(600):
        os.link(root / "a" / "000.png", root / "a" / f"{i + 1:03d}.png")
    script = ROOT / "data" / "imagefolder" / "prepare.py"
    run = subprocess.Popen(
        [sys.executable, script, root, "--size=8", "--out", out, "--workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a shell that starts the tests with & has them ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 20
    while not (out / "tmp.images.npy").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.7)  # the workers start
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)  # to all of them, as a terminal does
    run.communicate(timeout=30)
    assert run.returncode != 0 and not out.exists()


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def shown(request, monkeypatch):
    """(whether stderr is a terminal, its text) after 8 images, one every 4 seconds."""
    err, clock = io.StringIO(), iter(np.arange(0, 1000, 4.0))
    err.isatty = lambda: request.param
    monkeypatch.setattr(rows.sys, "stderr", err)
    monkeypatch.setattr(rows.time, "monotonic", lambda: next(clock))
    show = rows.progress(8)
    for finished in range(1, 9):
        show(finished)
    return request.param, err


def test_progress_is_one_line_in_a_terminal_and_a_line_every_ten_seconds_in_a_file(shown):
    terminal, err = shown
    text = err.getvalue()
    if terminal:
        assert text.count("\r") == 8 and text.count("\n") == 1
        assert text.endswith("\n") and "8/8" in text
    else:
        lines = re.findall(r"(\d)/8 images.* (\d:\d\d) left\n", text)
        assert lines == [("3", "0:20"), ("6", "0:08")]


def test_progress_shows_a_bar_and_a_rate(shown):
    text = shown[1].getvalue()
    assert "[" + "#" * 9 + "." * 15 + "] 3/8" in text and "0.2 per second" in text


def test_quiet_progress_shows_nothing(shown):
    _, err = shown
    before = err.getvalue()
    rows.progress(8, quiet=True)(8)
    assert err.getvalue() == before
