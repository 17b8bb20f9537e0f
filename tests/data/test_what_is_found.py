"""data/imagefolder: which files are taken, what is said of the others, what is refused."""

import os
import re
import resource
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from folders import make_root, noise, run_prepare
from PIL import Image, features
from runs import ROOT, contents, load_prepare, read_set

folder = load_prepare("imagefolder")

# ----------------------------------------------------------------------------------------------
# Formats.

FORMATS = ["png", "bmp", "tif", "tiff", "jfif", "gif", "webp", "jpe", "ppm", "tga", "ico", "jp2"]


@pytest.mark.parametrize("suffix", [*FORMATS, "BMP", "avif"])
def test_what_pillow_reads_is_taken(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "in" / f"a/x.{suffix}")
    folder.prepare(tmp_path / "in", 8, tmp_path / "out")
    images = read_set(tmp_path / "out")[0]
    assert images.shape == (1, 3, 8, 8) and np.abs(images.astype(int) - 200).max() <= 2


def test_every_file_is_taken_or_counted(tmp_path):
    """The example that was reported: 24 files of eight kinds, one of them loose."""
    root = tmp_path / "in"
    kinds = ["png", "bmp", "tif", "jfif", "gif", "webp", "jpg"]
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for kind in kinds:
            Image.fromarray(noise(8, 8, 3)).save(root / name / f"x.{kind}")
    Image.fromarray(noise(8, 8, 3)).save(root / "loose.png")
    r = run_prepare("imagefolder", root, "--size=8", "--out", tmp_path / "out", "--workers=1")
    assert r.returncode == 0 and "(14, 3, 8, 8)" in r.stdout
    assert r.stderr == f"left out: files in {root} itself, outside the class folders (1)\n"


def test_what_is_skipped_is_counted_by_reason(tmp_path):
    root = make_root(tmp_path / "in", {"a": 2, "b": 2})
    for name in ("notes.txt", "more.TXT", "film.mpg", "drawing.eps", "Makefile", ".hidden.png"):
        (root / "a" / name).write_bytes(b"")
    for name in (".git", "b/.thumbnails"):
        (root / name).mkdir()
    (root / "b" / "link").symlink_to(root / "a")
    os.mkfifo(root / "b" / "pipe.png")
    (root / "loose.jpg").write_bytes(b"")
    _, files, _, skipped = folder.find(root)
    assert len(files) == 4
    assert skipped == Counter({
        "files *.txt, which Pillow does not read": 2,
        "files *.mpg, which Pillow does not read": 1,
        "files *.eps, which Pillow does not read": 1,
        "files without suffix": 1,
        "names with a dot in front": 3,
        "links to folders": 1,
        "pipes, sockets or devices": 1,
        f"files in {root} itself, outside the class folders": 1,
    })  # fmt: skip


def test_nothing_is_said_of_nothing(tmp_path, capsys):
    folder.prepare(make_root(tmp_path / "in", {"a": 2}), 4, tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_what_is_skipped_is_said_once_before_the_work(tmp_path, capsys, monkeypatch):
    root = make_root(tmp_path / "in", {"a": 2})
    (root / "a" / "x.txt").write_text("")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "fill", stop)
    with pytest.raises(KeyboardInterrupt):
        folder.prepare(root, 4, tmp_path / "out")
    assert capsys.readouterr().err == "left out: files *.txt, which Pillow does not read (1)\n"


def test_a_broken_link_is_an_unreadable_image(tmp_path):
    root = make_root(tmp_path / "in", {"a": 2})
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match=r"unreadable images: 1 of 3.*\n.*gone.png"):
        folder.prepare(root, 4, tmp_path / "out")


def test_a_class_without_images_says_what_it_has(tmp_path):
    root = make_root(tmp_path / "in", {"a": 1, "b": 0})
    (root / "b" / "clip.mpg").write_bytes(b"")
    message = r"class 'b' has no images in .*b, only files \*.mpg, which Pillow does not read \(1"
    with pytest.raises(ValueError, match=message):
        folder.prepare(root, 4, tmp_path / "out")


# ----------------------------------------------------------------------------------------------
# Animations.


def animation(file, **options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
@pytest.mark.parametrize("workers", [1, 2])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(tmp_path, suffix, workers):
    root = make_root(tmp_path / "in", {"a": 2})
    animation(root / "a" / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    how = ["--size=8", "--out", tmp_path / "out", f"--workers={workers}"]
    r = run_prepare("imagefolder", root, *how)
    assert r.returncode == 0, r.stderr
    assert r.stderr == "of several frames the first was taken, in files: 1\n"
    images = read_set(tmp_path / "out")[0].astype(int)
    colours = images[:, :, 0, 0]
    assert (np.abs(colours - [255, 0, 0]).max(1) <= 1).sum() == 1, "red"


def test_an_animation_that_is_torn_behind_its_first_frame_is_read(tmp_path):
    root = make_root(tmp_path / "in", {"a": 1})
    animation(root / "a" / "x.gif")
    whole = (root / "a" / "x.gif").read_bytes()
    (root / "a" / "x.gif").write_bytes(whole[:-30])
    folder.prepare(root, 8, tmp_path / "out")
    assert len(read_set(tmp_path / "out")[0]) == 2


# ----------------------------------------------------------------------------------------------
# Folders of parts.

PARTS = [
    ("train", "val"),
    ("train", "test"),
    ("Train", "Test"),
    ("train", "val", "test"),
    ("training", "validation"),
    ("train2017", "val2017"),
    ("train",),
]


@pytest.fixture
def here(monkeypatch, capsys):
    """here(*arguments) runs prepare.py in this process: (exit status, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments), "--workers=1"])
        try:
            folder.main()
            code = 0
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
@pytest.mark.parametrize("above", ["", "archive", "archive/more"])
def test_parts_of_a_data_set_are_not_classes(tmp_path, parts, above, here):
    for part in parts:
        make_root(tmp_path / "in" / above / part, {"cat": 2, "dog": 2})
    out = tmp_path / "out"
    code, stderr = here(tmp_path / "in", "--size=4", "--out", out)
    assert code == 2 and stderr.count("\n") == 1 and not out.exists()
    python, script, *command = stderr.split("prepare one: ")[1].split()
    assert (python, script) == ("python", "data/imagefolder/prepare.py")
    assert command[0] == str(tmp_path / "in" / above / parts[0])
    assert here(*command) == (0, "")
    assert read_set(out)[2]["classes"] == ["cat", "dog"]


def test_parts_beside_another_folder_are_not_classes(tmp_path):
    for part in ("train", "val", "unlabeled"):
        make_root(tmp_path / "in" / part, {"cat": 2})
    with pytest.raises(ValueError, match=r"not classes \(train, val\)|not classes \(val, train\)"):
        folder.prepare(tmp_path / "in", 4, tmp_path / "out")


def test_parts_without_classes_are_not_classes_either(tmp_path):
    root = make_root(tmp_path / "in", {"train": 3, "test": 3})
    with pytest.raises(ValueError, match="are parts of a data set, not classes"):
        folder.prepare(root, 4, tmp_path / "out")


@pytest.mark.parametrize("above", ["", "deep"])
def test_parts_within_a_class_are_not_mixed(tmp_path, above):
    """The command of the message, for both classes, gives what can be prepared."""
    root, new = tmp_path / "in", tmp_path / "new"
    for name in ("cat", "dog"):
        for part in ("test", "train"):
            make_root(root / name / above, {part: 2 + (part == "train")})
    with pytest.raises(ValueError, match=r"\(test, train\), a class would mix them; link") as e:
        folder.prepare(root, 4, tmp_path / "out")
    command = str(e.value).split("new folder: ")[1].replace("NEW", str(new))
    new.mkdir()
    for line in (command, command.replace("cat", "dog")):
        subprocess.run(line.split(), check=True)
    folder.prepare(new, 4, tmp_path / "out")
    images, _, meta = read_set(tmp_path / "out")
    assert len(images) == 6 and meta["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("counts", [{"train": 2, "plane": 2}, {"test": 2}, {"trainer": 1, "a": 1}])
def test_a_class_may_have_the_name_of_a_part(tmp_path, counts):
    folder.prepare(make_root(tmp_path / "in", counts), 4, tmp_path / "out")
    assert read_set(tmp_path / "out")[2]["classes"] == sorted(counts)


# ----------------------------------------------------------------------------------------------
# Very long images.

LONG = [(30000, 1), (1, 30000), (20001, 2), (3, 9999)]


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_a_very_long_image_takes_little_memory(tmp_path, shape):
    """It runs with 1 GB of addresses; the whole enlarged image would be of 2 to 6 GB."""
    x = np.zeros((shape[1], shape[0], 3), np.uint8)
    x[x.shape[0] // 2 - 4 :, x.shape[1] // 2 - 4 :] = 99
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.fromarray(x).save(tmp_path / "in" / "a" / "x.png")
    options = ["--size=256", "--out", tmp_path / "out", "--workers=1"]
    r = subprocess.run(
        [sys.executable, ROOT / "data/imagefolder/prepare.py", tmp_path / "in", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)),
    )
    assert r.returncode == 0, r.stderr
    assert (read_set(tmp_path / "out")[0] == 99).mean() > 0.9


@pytest.mark.parametrize("w, h", [(400, 17), (17, 401), (300, 9), (601, 9), (8, 403)])
def test_its_middle_is_that_of_the_whole_image(w, h, monkeypatch):
    x = Image.fromarray(noise(max(1, h // 4), max(1, w // 4), 3)).resize((w, h))  # smooth
    cut = np.asarray(folder.centre_crop(x, 32)).astype(int)
    monkeypatch.setattr(folder, "LONGEST", 10**9)
    whole = np.asarray(folder.centre_crop(x, 32)).astype(int)
    # the rounding of a long side to whole pixels moves the middle, by less than one of them
    step = np.abs(np.diff(whole, axis=0 if h > w else 1)).mean()
    assert whole.std() > 20 and np.abs(cut - whole).mean() < step


# ----------------------------------------------------------------------------------------------
# Unicode.

COMPOSED, SPLIT = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def test_the_encoding_of_a_letter_changes_nothing(tmp_path):
    """As between Linux and macOS: the same names, the same order, the same bytes."""
    for form in (COMPOSED, SPLIT):
        root = tmp_path / form / "in"
        make_root(root, {f"{form}a": 6, "f": 6, "ez": 6})
        (root / "f" / "000.png").rename(root / "f" / f"{form}.png")
        folder.prepare(root, 8, tmp_path / form / "set", held_out=0.3)
    assert contents(tmp_path / COMPOSED / "set") == contents(tmp_path / SPLIT / "set")
    assert read_set(tmp_path / SPLIT / "set")[2]["classes"] == ["ez", "f", f"{COMPOSED}a"]


@pytest.mark.parametrize("where", ["", "a/", "a/deep/"])
def test_one_name_in_two_forms_is_refused(tmp_path, where):
    root = make_root(tmp_path / "in", {"a": 1})
    for form in (COMPOSED, SPLIT):
        (root / f"{where}{form}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / f"{where}{form}" / "x.png")
    with pytest.raises(ValueError, match=r"one name in two Unicode forms, .*e\\u0301.*\\xe9") as e:
        folder.prepare(root, 4, tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_name_that_is_no_text_is_written_out(tmp_path):
    root = make_root(tmp_path / "in", {"a": 1})
    os.rename(os.fsencode(root / "a"), os.fsencode(root) + b"/caf\xe9")
    r = run_prepare("imagefolder", root, "--size=4", "--out", tmp_path / "out", "--workers=1")
    assert r.returncode == 0, r.stderr
    assert read_set(tmp_path / "out")[2]["classes"] == [r"caf\udce9"]


def test_the_suffixes_are_pillows():
    taken = folder.suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".jfif", ".gif", ".mpo"} <= taken
    assert not {".pdf", ".eps", ".ps", ".h5", ".mpg", ".txt", ""} & taken
    assert all(re.fullmatch(r"\.\w+", suffix) for suffix in taken)
