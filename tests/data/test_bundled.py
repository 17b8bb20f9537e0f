"""data/digits and data/photos: what they write, and that an error leaves nothing behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from folders import fail_at, make_root, run_prepare
from runs import SET_FILES, contents, load_prepare, read_set
from sklearn.datasets import load_digits, load_sample_images

digits = load_prepare("digits")
photos = load_prepare("photos")
folder = load_prepare("imagefolder")

# ----------------------------------------------------------------------------------------------
# digits


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    digits.prepare(out)
    return out


def test_digits_layout(digits_dir):
    images, labels, meta = read_set(digits_dir)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.uint8 and images.max() == 255
    assert labels.shape == (1797,) and labels.dtype == np.int64
    assert meta == {
        "name": "digits",
        "classes": list("0123456789"),
        "flip": False,
        "held_out": 180,
        "levels": 16,
    }
    assert sorted(contents(digits_dir)) == SET_FILES
    assert isinstance(np.load(digits_dir / "images.npy", mmap_mode="r"), np.memmap)


def test_digits_are_the_digits_with_their_labels(digits_dir):
    images, labels, _ = read_set(digits_dir)
    want = load_digits()
    back = np.rint(images.reshape(-1, 64) * (16 / 255))

    def pairs(x, y):
        return sorted(map(tuple, np.column_stack([x, y]).astype(int).tolist()))

    assert pairs(back, labels) == pairs(want.data, want.target)
    assert not np.array_equal(labels, want.target), "they are shuffled"


def test_digits_keep_their_17_levels(digits_dir):
    images, _, _ = read_set(digits_dir)
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}


def test_digits_held_out_is_stratified_and_shuffled(digits_dir):
    labels = np.load(digits_dir / "labels.npy")
    share = np.bincount(labels) * 180 / 1797
    assert (np.abs(np.bincount(labels[-180:]) - share) < 1).all()
    assert (np.diff(labels[-180:]) < 0).any(), "not class by class"


def test_digits_always_have_the_same_bytes(digits_dir, tmp_path):
    digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(digits_dir)


def test_digits_renew_their_folder(digits_dir, tmp_path):
    digits.prepare(tmp_path)
    (tmp_path / "images.npy").write_bytes(b"damaged")
    digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(digits_dir)


def test_the_command_for_digits_prints_one_line(tmp_path):
    r = run_prepare("digits", "--out", tmp_path / "d")
    assert r.returncode == 0 and r.stderr == "" and r.stdout.count("\n") == 1
    assert all(s in r.stdout for s in ("(1797, 1, 8, 8)", "10 classes", "180 held out", "MB"))
    assert sorted(contents(tmp_path / "d")) == SET_FILES


def test_digits_refuse_the_folder_of_another_set(tmp_path):
    (tmp_path / "meta.json").write_text('{"name": "mine"}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another prepared set"):
        digits.prepare(tmp_path)
    r = run_prepare("digits", "--out", tmp_path)
    assert r.returncode != 0 and "another prepared set" in r.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_digits_interrupted_leave_nothing(tmp_path, monkeypatch, call, again):
    if again:
        digits.prepare(tmp_path)
        (tmp_path / "images.npy").write_bytes(b"other")
    calls = fail_at(monkeypatch, call, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(tmp_path)
    assert len(calls) == call and contents(tmp_path) == {}


def test_an_error_before_the_exchange_keeps_the_earlier_set(tmp_path, monkeypatch, digits_dir):
    digits.prepare(tmp_path)
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(digits_dir)


def prepare_digits(tmp_path):
    digits.prepare(tmp_path / "out")


def prepare_two_images(tmp_path):
    folder.prepare(make_root(tmp_path / "in", {"a": 2}), 4, tmp_path / "out")


@pytest.mark.parametrize("prepare", [prepare_digits, prepare_two_images])
def test_meta_is_put_in_place_last(tmp_path, monkeypatch, prepare):
    calls = fail_at(monkeypatch, 99, None)
    prepare(tmp_path)
    assert [Path(target).name for _, target in calls][-3:] == SET_FILES
    # on one file system, where replace() is atomic
    assert all(Path(source).parent == Path(target).parent for source, target in calls)


# ----------------------------------------------------------------------------------------------
# photos


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("photos")
    photos.prepare(out)
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Which pixel of its photograph each pixel of each crop is: rows and columns, (N, 32, 32) each.

    Read from crops of photographs that are maps of themselves; prepare.py's own words are not used.
    """
    y, x = np.mgrid[:427, :640]
    maps = [np.stack([y % 256, x % 256, 4 * (y // 256) + x // 256], axis=-1).astype(np.uint8)] * 2
    out = tmp_path_factory.mktemp("maps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "load_sample_images", lambda: type("", (), {"images": maps}))
        photos.prepare(out)
    a, b, c = read_set(out)[0].astype(int).transpose(1, 0, 2, 3)
    return a + 256 * (c // 4), b + 256 * (c % 4)


def test_photos_layout(photos_dir):
    images, labels, meta = read_set(photos_dir)
    assert images.shape == (4840, 3, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (4840,) and labels.dtype == np.int64
    assert meta == {
        "name": "photos",
        "classes": ["china", "flower"],
        "flip": True,
        "held_out": 704,
        "levels": 255,
    }
    assert sorted(contents(photos_dir)) == SET_FILES


def test_both_parts_of_the_photos_are_half_and_half_and_shuffled(photos_dir):
    labels = read_set(photos_dir)[1]
    for part in (labels[:-704], labels[-704:]):
        assert np.bincount(part).tolist() == [len(part) // 2] * 2
        assert (np.diff(part) < 0).any()


def test_photos_are_crops_of_the_photograph_that_their_label_names(photos_dir, pixels):
    images, labels, meta = read_set(photos_dir)
    y, x = pixels
    assert (np.diff(y, axis=1) == 1).all() and (np.diff(x, axis=2) == 1).all()
    data = load_sample_images()
    for label, (file, photograph) in enumerate(zip(data.filenames, data.images)):
        mine = labels == label
        assert np.array_equal(images[mine].transpose(0, 2, 3, 1), photograph[y[mine], x[mine]])
        assert Path(file).stem == meta["classes"][label]


def pixels_used(labels, pixels, label):
    """Which pixels of a photograph the training crops use, and which the held-out ones."""
    held_out = np.arange(4840) >= 4840 - 704
    y, x = pixels
    used = np.zeros((2, 427, 640), bool)
    for part in (0, 1):
        mine = (labels == label) & (held_out == part)
        used[part][y[mine], x[mine]] = True
    return used


@pytest.mark.parametrize("label", [0, 1])
def test_no_held_out_crop_shares_a_pixel_with_a_training_crop(photos_dir, pixels, label):
    used = pixels_used(read_set(photos_dir)[1], pixels, label)
    assert not (used[0] & used[1]).any()


@pytest.mark.parametrize("label", [0, 1])
def test_the_crops_cover_the_photograph(photos_dir, pixels, label):
    used = pixels_used(read_set(photos_dir)[1], pixels, label)
    assert used[0].mean() > 0.7 and used[1].mean() > 0.15
    assert used[:, :419].any((1, 2)).all()
    assert used[0].any(0).sum() + used[1].any(0).sum() > 600


@pytest.mark.parametrize("label", [0, 1])
def test_no_crop_comes_twice(photos_dir, pixels, label):
    mine = read_set(photos_dir)[1] == label
    y, x = pixels
    corners = set(zip(y[mine][:, 0, 0].tolist(), x[mine][:, 0, 0].tolist()))
    assert len(corners) == mine.sum()


def test_photos_always_have_the_same_bytes(photos_dir, tmp_path):
    photos.prepare(tmp_path)
    assert contents(tmp_path) == contents(photos_dir)


def test_the_command_for_photos_writes_the_same_bytes(photos_dir, tmp_path):
    r = run_prepare("photos", "--out", tmp_path)
    assert r.returncode == 0 and r.stderr == "" and "photos, images (4840, 3, 32, 32)" in r.stdout
    assert contents(tmp_path) == contents(photos_dir)


def test_a_set_refuses_the_folder_of_another(photos_dir, tmp_path):
    photos.prepare(tmp_path)
    with pytest.raises(ValueError, match="another prepared set"):
        digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(photos_dir)


# ----------------------------------------------------------------------------------------------
# The order of rows.

SETS = [  # images per class, held out
    ([100, 50, 10], 16),
    ([7, 7, 7], 4),
    ([4, 1], 3),
    ([1, 1, 1], 2),
    ([9], 0),
    ([3, 3], 5),
    ([1] * 40 + [400, 2], 22),
]


def held_out_per_class(counts, held):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = folder.shuffled(labels, held)
    return np.bincount(labels[order[len(labels) - held :]], minlength=len(counts))


@pytest.mark.parametrize("counts, held", SETS)
def test_shuffled_is_a_permutation_that_the_seed_decides(counts, held):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = folder.shuffled(labels, held)
    assert sorted(order) == list(range(len(labels)))
    assert np.array_equal(order, folder.shuffled(labels, held))
    if len(labels) > 9:
        assert not np.array_equal(order, folder.shuffled(labels, held, seed=1))


@pytest.mark.parametrize("counts, held", [s for s in SETS if s[0] != [4, 1] and len(s[0]) < 42])
def test_each_class_holds_out_its_share(counts, held):
    tail = held_out_per_class(counts, held)
    assert tail.sum() == held
    assert (np.abs(tail - np.array(counts) * held / sum(counts)) < 1).all()


@pytest.mark.parametrize(
    "counts, held, want", [([4, 1], 3, [3, 0]), ([1] * 40 + [400, 2], 22, [0] * 40 + [21, 1])]
)
def test_the_only_image_of_a_class_is_trained_on(counts, held, want):
    assert held_out_per_class(counts, held).tolist() == want


def test_shuffled_never_changes():
    assert list(folder.shuffled(np.array([0, 0, 0, 1, 1, 1]), 2)) == [1, 0, 4, 5, 3, 2]
