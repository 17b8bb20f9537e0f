"""data/*/prepare.py: what lands in the folder, what is refused, and that an error leaves nothing behind."""
import importlib.util
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["images.npy", "labels.npy", "meta.json"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits, photos, folder = load("digits"), load("photos"), load("imagefolder")
import rows  # noqa: E402, I001  (imagefolder's, which load() has put on the path)


def read(out):
    return np.load(out / "images.npy"), np.load(out / "labels.npy"), json.loads((out / "meta.json").read_text())


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def cli(name, *args):
    return subprocess.run([sys.executable, ROOT / "data" / name / "prepare.py", *map(str, args)],
                          capture_output=True, text=True, timeout=60)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_root(root, counts, size=8):
    """A class folder for each entry of counts; every image is one flat colour, (class, number, 7)."""
    for label, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (size, size), (label, i, 7)).save(root / name / f"{i:03d}.png")
    return root

# -----------------------------------------------------------------------------
# digits

@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    digits.prepare(out)
    return out


def test_digits_layout(digits_dir):
    images, labels, meta = read(digits_dir)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.uint8 and images.max() == 255
    assert labels.shape == (1797,) and labels.dtype == np.int64
    assert meta == {"name": "digits", "classes": list("0123456789"), "flip": False, "held_out": 180, "levels": 16}
    assert sorted(p.name for p in digits_dir.iterdir()) == NAMES
    assert isinstance(np.load(digits_dir / "images.npy", mmap_mode="r"), np.memmap)


def test_digits_are_the_digits_with_their_labels(digits_dir):
    images, labels, _ = read(digits_dir)
    want = load_digits()
    back = np.rint(images.reshape(-1, 64) * (16 / 255))                     # the 17 levels come back exactly
    def pairs(x, y): return sorted(map(tuple, np.column_stack([x, y]).astype(int).tolist()))
    assert pairs(back, labels) == pairs(want.data, want.target)
    assert not np.array_equal(labels, want.target)                          # and shuffled
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}


def test_digits_held_out_is_stratified(digits_dir):
    labels = np.load(digits_dir / "labels.npy")
    share = np.bincount(labels) * 180 / 1797
    assert (np.abs(np.bincount(labels[-180:]) - share) < 1).all()
    assert (np.diff(labels[-180:]) < 0).any()                               # shuffled too, not class by class


def test_digits_bytes_are_equal_and_it_renews_its_folder(digits_dir, tmp_path):
    digits.prepare(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits_dir)
    (tmp_path / "again" / "images.npy").write_bytes(b"damaged")
    digits.prepare(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits_dir)


def test_digits_cli_prints_one_line(tmp_path):
    r = cli("digits", "--out", tmp_path / "d")
    assert r.returncode == 0 and r.stderr == "" and r.stdout.count("\n") == 1
    assert all(s in r.stdout for s in ("(1797, 1, 8, 8)", "10 classes", "180 held out", "MB"))
    assert sorted(contents(tmp_path / "d")) == NAMES


def test_digits_refuses_the_folder_of_another_set(tmp_path):
    (tmp_path / "meta.json").write_text('{"name": "mine"}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another prepared set"):
        digits.prepare(tmp_path)
    assert contents(tmp_path) == before
    r = cli("digits", "--out", tmp_path)
    assert r.returncode != 0 and "another prepared set" in r.stderr


def fail_at(monkeypatch, call, error):
    """Make the call-th os.replace() fail."""
    real, calls = os.replace, []
    def replace(*args):
        calls.append(args)
        if len(calls) == call: raise error
        real(*args)
    monkeypatch.setattr(os, "replace", replace)
    return calls


# photos

@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("photos")
    photos.prepare(out)
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Which pixel of its photograph each pixel of each crop is: rows and columns, (N, 32, 32) each.

    From a preparation of photographs that are maps of themselves, not from what prepare.py says of its crops.
    """
    y, x = np.mgrid[:427, :640]
    maps = [np.stack([y % 256, x % 256, 4 * (y // 256) + x // 256], axis=-1).astype(np.uint8)] * 2
    out = tmp_path_factory.mktemp("maps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "load_sample_images", lambda: type("", (), {"images": maps}))
        photos.prepare(out)
    a, b, c = read(out)[0].astype(int).transpose(1, 0, 2, 3)
    return a + 256 * (c // 4), b + 256 * (c % 4)


def test_photos_layout(photos_dir):
    images, labels, meta = read(photos_dir)
    assert images.shape == (4840, 3, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (4840,) and labels.dtype == np.int64
    assert meta == {"name": "photos", "classes": ["china", "flower"], "flip": True, "held_out": 704, "levels": 255}
    assert sorted(contents(photos_dir)) == NAMES
    for part in (labels[:-704], labels[-704:]):                             # both half and half, both shuffled
        assert np.bincount(part).tolist() == [len(part) // 2] * 2 and (np.diff(part) < 0).any()


def test_photos_are_crops_of_the_photograph_that_their_label_names(photos_dir, pixels):
    images, labels, meta = read(photos_dir)
    y, x = pixels
    assert (np.diff(y, axis=1) == 1).all() and (np.diff(x, axis=2) == 1).all()
    data = load_sample_images()
    for label, (file, photograph) in enumerate(zip(data.filenames, data.images)):
        mine = labels == label
        assert np.array_equal(images[mine].transpose(0, 2, 3, 1), photograph[y[mine], x[mine]])
        assert Path(file).stem == meta["classes"][label]


def test_no_held_out_crop_shares_a_pixel_with_a_training_crop(photos_dir, pixels):
    labels, held_out, (y, x) = read(photos_dir)[1], np.arange(4840) >= 4840 - 704, pixels
    for label in (0, 1):
        used = np.zeros((2, 427, 640), bool)                                # trained on, held out
        for part in (0, 1):
            mine = (labels == label) & (held_out == part)
            used[part][y[mine], x[mine]] = True
            corners = set(zip(y[mine][:, 0, 0].tolist(), x[mine][:, 0, 0].tolist()))
            assert len(corners) == mine.sum(), "no crop twice"
        assert not (used[0] & used[1]).any()
        assert used[0].mean() > 0.7 and used[1].mean() > 0.15 and used[:, :419].any((1, 2)).all()
        assert used[0].any(0).sum() + used[1].any(0).sum() > 600, "all over the photograph"


def test_photos_bytes_are_equal(photos_dir, tmp_path):
    photos.prepare(tmp_path)
    assert contents(tmp_path) == contents(photos_dir)
    r = cli("photos", "--out", tmp_path / "again")
    assert r.returncode == 0 and r.stderr == "" and "photos, images (4840, 3, 32, 32)" in r.stdout
    assert contents(tmp_path / "again") == contents(photos_dir)


def test_a_set_refuses_the_folder_of_another(photos_dir, tmp_path):
    photos.prepare(tmp_path)
    with pytest.raises(ValueError, match="another prepared set"): digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(photos_dir)

# -----------------------------------------------------------------------------
# both

@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_digits_interrupted_leaves_nothing(tmp_path, monkeypatch, call, again):
    if again: digits.prepare(tmp_path)
    calls = fail_at(monkeypatch, call, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt): digits.prepare(tmp_path)
    assert len(calls) == call and contents(tmp_path) == {}


def test_digits_error_before_the_exchange_keeps_the_earlier_set(tmp_path, monkeypatch, digits_dir):
    digits.prepare(tmp_path)
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): digits.prepare(tmp_path)
    assert contents(tmp_path) == contents(digits_dir)


@pytest.mark.parametrize("module", [digits, folder])
def test_meta_is_put_in_place_last(tmp_path, monkeypatch, module):
    calls = fail_at(monkeypatch, 99, None)
    if module is digits: digits.prepare(tmp_path / "out")
    else: folder.prepare(make_root(tmp_path / "in", {"a": 2}), 4, tmp_path / "out")
    assert [Path(dst).name for _, dst in calls][-3:] == NAMES
    assert all(Path(src).parent == Path(dst).parent for src, dst in calls)  # one file system: replace() is atomic

# -----------------------------------------------------------------------------
# the shuffle

@pytest.mark.parametrize("counts,held", [([100, 50, 10], 16), ([7, 7, 7], 4), ([4, 1], 3), ([1, 1, 1], 2), ([9], 0),
                                         ([3, 3], 5), ([1] * 40 + [400, 2], 22)])
def test_shuffled(counts, held):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = folder.shuffled(labels, held)
    assert sorted(order) == list(range(len(labels)))
    tail = np.bincount(labels[order[len(labels) - held:]], minlength=len(counts))
    assert tail.sum() == held
    if counts == [4, 1]: assert list(tail) == [3, 0]                        # the only image of a class is trained on
    elif len(counts) == 42: assert list(tail) == [0] * 40 + [21, 1]
    else: assert (np.abs(tail - np.array(counts) * held / len(labels)) < 1).all()
    assert np.array_equal(order, folder.shuffled(labels, held))
    if len(labels) > 9: assert not np.array_equal(order, folder.shuffled(labels, held, seed=1))


def test_shuffled_is_the_same_for_ever():
    assert list(folder.shuffled(np.array([0, 0, 0, 1, 1, 1]), 2)) == [1, 0, 4, 5, 3, 2]

# -----------------------------------------------------------------------------
# one image: crop

def bicubic(n_in, n_out):
    """Matrix n_out x n_in of a bicubic (a = -1/2) resize that is widened when it shrinks, renormalised at the edges."""
    scale = n_in / n_out
    wide = max(scale, 1)
    x = np.abs((np.arange(n_in) + 0.5)[None] - (np.arange(n_out) + 0.5)[:, None] * scale) / wide
    k = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return k / k.sum(1, keepdims=True)


def expected_crop(x, size):
    """uint8 H x W x 3 -> float size x size x 3, in numpy alone; odd lines may only fall away where none exist."""
    x = x.astype(float)
    while min(x.shape[:2]) >= 2 * size:
        h, w = x.shape[0] // 2, x.shape[1] // 2
        assert x.shape[:2] == (2 * h, 2 * w)
        x = x.reshape(h, 2, w, 2, 3).mean((1, 3))
    h, w = (round(s * size / min(x.shape[:2])) for s in x.shape[:2])
    x = np.einsum("ij,kjc->kic", bicubic(x.shape[1], w), x)     # across first, as Pillow does: it clips between the two
    x = np.einsum("ij,jkc->ikc", bicubic(x.shape[0], h), x.clip(0, 255))
    top, left = (h - size) // 2, (w - size) // 2
    return x[top:top + size, left:left + size].clip(0, 255)


@pytest.mark.parametrize("h,w,size", [
    (8, 8, 8), (16, 16, 8), (32, 48, 8), (96, 64, 16),      # exact powers: box alone
    (15, 15, 8), (20, 32, 8), (44, 28, 8), (30, 23, 16),    # box, then bicubic down
    (5, 5, 8), (3, 7, 16), (11, 8, 8), (8, 11, 8)])         # bicubic up; odd rests
def test_crop_against_numpy(h, w, size):
    x = noise(h, w, 3, seed=h * w)
    got = np.asarray(folder.centre_crop(Image.fromarray(x), size)).astype(float)
    assert got.shape == (size, size, 3)
    assert np.abs(got - expected_crop(x, size)).max() <= 2      # Pillow rounds after each pass


def test_crop_halves_only_while_it_stays_large_enough(monkeypatch):
    seen, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize",
                        lambda im, size, method: (seen.append((size, method)), real(im, size, method))[1])
    folder.centre_crop(Image.new("RGB", (127, 130)), 32)
    box, cubic = Image.Resampling.BOX, Image.Resampling.BICUBIC
    assert seen == [((63, 65), box), ((32, 33), cubic)]


@pytest.mark.parametrize("w,h", [(90, 30), (30, 90), (37, 33)])
def test_crop_takes_the_centre(w, h):
    x = np.full((h, w, 3), (255, 0, 0), np.uint8)
    s = min(w, h)
    top, left = (h - s) // 2, (w - s) // 2
    x[top:top + s, left:left + s] = (0, 255, 0)                 # all that the crop may see, but for a blurred edge
    x[top + s // 3:top + 2 * s // 3, left + s // 3:left + 2 * s // 3] = (0, 0, 255)
    got = np.asarray(folder.centre_crop(Image.fromarray(x), 15)).astype(int)
    assert (got[7, 7] == (0, 0, 255)).all() and (got[[2, 2, 12, 12], [2, 12, 2, 12]] == (0, 255, 0)).all()
    assert got[1:-1, 1:-1, 0].max() < 30                        # none of what lies beside
    blue = got[..., 2] > 127
    assert blue.sum() == 25 and blue[5:10, 5:10].all()


@pytest.mark.parametrize("w,h", [(1, 50), (50, 1), (1, 1), (2, 2)])
def test_crop_of_extreme_shapes(w, h):
    assert folder.centre_crop(Image.new("RGB", (w, h), (1, 2, 3)), 1).size == (1, 1)
    assert np.array_equal(np.asarray(folder.centre_crop(Image.new("RGB", (w, h), (1, 2, 3)), 4)), np.full(
        (4, 4, 3), (1, 2, 3)))

# -----------------------------------------------------------------------------
# one image: modes

def save(tmp_path, im, ext="png", **kw):
    file = tmp_path / f"im.{ext}"
    im.save(file, **kw)
    return file


def check(file, want, gray=False, tolerance=0):
    """Each pixel of the loaded 8 x 8 image is `want`, a colour or H x W (x 3)."""
    got = folder.load_image(file, 8, gray)
    assert got.dtype == np.uint8 and got.shape == (1 if gray else 3, 8, 8)
    want = np.asarray(want, int)
    if want.ndim == 2: want = want[..., None]
    assert np.abs(got.transpose(1, 2, 0).astype(int) - want).max() <= tolerance


def test_mode_rgb_and_l_and_1(tmp_path):
    x = noise(8, 8, 3)
    check(save(tmp_path, Image.fromarray(x)), x)
    check(save(tmp_path, Image.fromarray(x[..., 0])), x[..., 0])
    check(save(tmp_path, Image.fromarray(x[..., 0] > 127)), (x[..., 0] > 127) * 255)


def test_gray_is_one_channel(tmp_path):
    x = noise(8, 8)
    check(save(tmp_path, Image.fromarray(x)), x, gray=True)
    check(save(tmp_path, Image.new("RGB", (8, 8), (200, 100, 50))), [0.299 * 200 + 0.587 * 100 + 0.114 * 50], gray=True,
          tolerance=1)


def test_mode_p(tmp_path):
    colours = np.array([[10, 20, 30], [200, 100, 0], [7, 255, 90], [0, 0, 0]], np.uint8)
    index = noise(8, 8) % 4
    im = Image.fromarray(index)
    im.putpalette(colours.tobytes())                                        # which makes it mode P
    check(save(tmp_path, im), colours[index])
    check(save(tmp_path, im, transparency=1), np.where((index == 1)[..., None], 255, colours[index]))


def test_mode_p_with_an_alpha_for_each_colour(tmp_path):
    im = Image.new("P", (8, 8), 1)
    im.putpalette([0, 0, 0, 200, 100, 0])
    check(save(tmp_path, im, transparency=bytes([255, 51])), [255 - (255 - c) / 5 for c in (200, 100, 0)], tolerance=1)


@pytest.mark.parametrize("ext", ["png", "webp"])
def test_alpha_lies_on_white(tmp_path, ext):
    x = noise(8, 8, 4)
    x[:2, :, 3], x[2:4, :, 3] = 0, 255
    a = x[..., 3:] / 255
    file = save(tmp_path, Image.fromarray(x), ext, **({"lossless": True, "exact": True} if ext == "webp" else {}))
    check(file, np.rint(x[..., :3] * a + 255 * (1 - a)), tolerance=1)
    check(file, np.rint((x[..., :3] * a + 255 * (1 - a)) @ [0.299, 0.587, 0.114]), gray=True, tolerance=2)


def test_la_and_transparent_colour_lie_on_white(tmp_path):
    check(save(tmp_path, Image.new("LA", (8, 8), (100, 51))), [255 - 155 / 5], tolerance=1)
    x = np.full((8, 8, 3), (9, 8, 7), np.uint8)
    x[3] = (1, 2, 3)
    want = x.copy()
    want[3] = 255
    check(save(tmp_path, Image.fromarray(x), transparency=(1, 2, 3)), want)


def test_cmyk(tmp_path):
    im = Image.new("CMYK", (8, 8), (255, 0, 0, 0))                          # all cyan: no red
    check(save(tmp_path, im, "jpg", quality=100), [0, 255, 255], tolerance=3)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    x[0, :4] = 0, 65535, 256, 128 * 257
    for gray in (False, True):
        check(save(tmp_path, Image.fromarray(x)), np.rint(x / 257), gray)
    im = Image.fromarray(x.astype(np.int32))
    assert im.mode == "I" and np.array_equal(np.asarray(folder.to_rgb(im)), np.rint(x / 257))    # as some files open


def test_16_bit_colour_is_scaled(tmp_path):
    """Pillow writes no such file, so here is one by hand."""
    x = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in x)
    def chunk(kind, x): return struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    (tmp_path / "im.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                      + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    check(tmp_path / "im.png", x / 257, tolerance=1)


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="floating"):
        folder.to_rgb(Image.new("F", (8, 8)))


@pytest.mark.parametrize("orientation,stored", [
    (1, lambda u: u), (2, lambda u: u[:, ::-1]), (3, lambda u: u[::-1, ::-1]), (4, lambda u: u[::-1]),
    (5, lambda u: u.swapaxes(0, 1)), (6, lambda u: np.rot90(u, 1)), (7, lambda u: np.rot90(u, 2).swapaxes(0, 1)),
    (8, lambda u: np.rot90(u, -1))])
def test_exif_orientation(tmp_path, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for upright in (noise(8, 8, 3), (noise(8, 8).astype(np.uint16) * 257)):
        im = Image.fromarray(np.ascontiguousarray(stored(upright)))
        check(save(tmp_path, im, exif=exif), upright if upright.ndim == 3 else upright // 257)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_exif_that_pillow_cannot_read_or_write_does_not_cost_the_image(tmp_path, format):
    im, odd = Image.fromarray(np.full((8, 8, 3), 77, np.uint8)), Image.Exif()
    odd[0x0112], odd[0x8298] = 6, b"\xff\xfe"
    for exif in (odd.tobytes(), b"Exif\0\0junk that is no TIFF"):
        im.save(tmp_path / f"x.{format}", exif=exif, **({"lossless": True} if format == "webp" else {}))
        assert folder.load_image(tmp_path / f"x.{format}", 8).shape == (3, 8, 8)


def test_exif_orientation_comes_before_the_crop(tmp_path):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 4:12] = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    im = Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1)))
    check(save(tmp_path, im, exif=exif), upright[:, 4:12])

# -----------------------------------------------------------------------------
# imagefolder: the set

def test_folder_layout(tmp_path):
    root = make_root(tmp_path / "in", {"cat": 40, "ant": 20, "bee": 20})
    folder.prepare(root, 8, tmp_path / "pets", held_out=0.2)
    images, labels, meta = read(tmp_path / "pets")
    assert sorted(contents(tmp_path / "pets")) == NAMES
    assert images.shape == (80, 3, 8, 8) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert meta == {"name": "pets", "classes": ["ant", "bee", "cat"], "flip": True, "held_out": 16, "levels": 255}
    assert (images == images[:, :, :1, :1]).all() and (images[:, 2] == 7).all()
    drawn = {"cat": 0, "ant": 1, "bee": 2}                                  # make_root's numbers, not the sorted ones
    assert [drawn[meta["classes"][l]] for l in labels] == images[:, 0, 0, 0].tolist()
    assert len({tuple(i) for i in images[:, :2, 0, 0]}) == 80               # each image once
    assert (np.diff(labels) < 0).any() and list(np.bincount(labels[-16:])) == [4, 4, 8]


def test_folder_options(tmp_path):
    root = make_root(tmp_path / "in", {"a": 3, "b": 3})
    folder.prepare(root, 5, tmp_path / "out", held_out=0, flip=False, gray=True)
    images, _, meta = read(tmp_path / "out")
    assert images.shape == (6, 1, 5, 5) and meta["flip"] is False and meta["held_out"] == 0
    folder.prepare(root, 5, tmp_path / "most", held_out=0.99)
    assert read(tmp_path / "most")[2]["held_out"] == 5                      # one is left to train on


def test_folder_finds_nested_files_of_every_kind_and_no_others(tmp_path):
    a = tmp_path / "in" / "a"
    (a / "deep" / "er").mkdir(parents=True)
    (a / ".hidden").mkdir()
    (tmp_path / "in" / ".git").mkdir()
    for name in ("1.png", "2.PNG", "3.jpg", "4.JPEG", "deep/5.webp", "deep/er/6.Jpg"):
        im = io.BytesIO()
        Image.new("RGB", (4, 4)).save(im, {"png": "PNG", "ebp": "WEBP"}.get(name[-3:].lower(), "JPEG"))
        (a / name).write_bytes(im.getvalue())
    for name in ("notes.txt", "7.gif", ".8.png", ".hidden/9.png", "../loose.png"):
        (a / name).write_bytes(b"not for us")
    folder.prepare(tmp_path / "in", 4, tmp_path / "out")
    images, _, meta = read(tmp_path / "out")
    assert len(images) == 6 and meta["classes"] == ["a"]


def test_folder_bytes_do_not_depend_on_workers(tmp_path):
    for name in ("one", "two"):
        make_root(tmp_path / name, {"a": 30, "b": 20}, size=9)
    folder.prepare(tmp_path / "one", 8, tmp_path / "x" / "set")
    r = cli("imagefolder", tmp_path / "two", "--size", 8, "--out", tmp_path / "y" / "set", "--workers", 2)
    assert r.returncode == 0, r.stderr
    assert contents(tmp_path / "x" / "set") == contents(tmp_path / "y" / "set")


def test_folder_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    make_root(tmp_path / "in", {"a": 30, "b": 20})
    found, walk = folder.find(tmp_path / "in"), os.walk
    def other(*a, **k): return ((d, s, sorted(f, key=lambda n: n[::-1])) for d, s, f in walk(*a, **k))
    monkeypatch.setattr(os, "walk", other)
    assert folder.find(tmp_path / "in")[:2] == found[:2]


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_absence(tmp_path, monkeypatch):
    root, scandir = make_root(tmp_path / "in", {"a": 3, "b": 3}), os.scandir
    (root / "a" / "more").mkdir()

    def refused(path):
        if str(path).endswith("more"): raise PermissionError(f"no: {path}")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="more"): folder.find(root)


def test_folder_cli(tmp_path):
    root = make_root(tmp_path / "in", {"a": 6, "b": 6})
    (root / "a" / "bad.png").write_bytes(b"")
    r = cli("imagefolder", root, "--size", 4, "--out", tmp_path / "out", "--held-out", 0.25, "--no-flip", "--gray",
            "--on-error", "skip", "--workers", 1)
    assert r.returncode == 0, r.stderr
    assert "(12, 1, 4, 4)" in r.stdout and "2 classes" in r.stdout and r.stdout.count("\n") == 1
    assert "bad.png" in r.stderr and "left out 1" in r.stderr
    assert read(tmp_path / "out")[2] == {"name": "out", "classes": ["a", "b"], "flip": False, "held_out": 3,
                                         "levels": 255}

# -----------------------------------------------------------------------------
# imagefolder: what is refused

@pytest.mark.parametrize("make,args,message", [
    (lambda r: None, {}, "is not a folder"),
    (lambda r: r.write_text("a file"), {}, "is not a folder"),
    (lambda r: r.mkdir(), {}, "no class folders"),
    (lambda r: (make_root(r, {"a": 1}), (r / "void").mkdir()), {}, "class 'void' has no images"),
    (lambda r: (make_root(r, {"a": 1, "b": 0}), (r / "b" / "x.txt").touch()), {}, "class 'b' has no images"),
    (lambda r: make_root(r, {"a": 1}), {"size": 0}, "size must be at least 1, got 0"),
    (lambda r: make_root(r, {"a": 1}), {"held_out": 1.0}, "held-out share"),
    (lambda r: make_root(r, {"a": 1}), {"held_out": -0.1}, "held-out share"),
    (lambda r: make_root(r, {"a": 1}), {"workers": 0}, "workers"),
    (lambda r: make_root(r, {"a": 1}), {"on_error": "ignore"}, "refuse or skip"),
])
def test_folder_errors(tmp_path, make, args, message):
    make(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        folder.prepare(tmp_path / "in", **{"size": 4, "out": tmp_path / "out", **args})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_folder_refuses_a_prepared_set(tmp_path, name):
    root = make_root(tmp_path / "in", {"a": 2})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a prepared set.*delete"):
        folder.prepare(root, 4, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_folder_refuses_a_full_disk(tmp_path, monkeypatch):
    root = make_root(tmp_path / "in", {"a": 2})
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda p: type("usage", (), {"free": 2 * 3 * 4 * 4 - 1}))
    with pytest.raises(ValueError, match="needs"): folder.prepare(root, 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(root):
    """Three unreadable files beside good ones -> their names."""
    good = noise(64, 64, 3)
    (root / "a" / "empty.png").write_bytes(b"")
    for name, kind in (("cut.jpg", "JPEG"), ("cut.png", "PNG")):
        im = io.BytesIO()
        Image.fromarray(good).save(im, kind)
        (root / "b" / name).write_bytes(im.getvalue()[:len(im.getvalue()) // 2])
    return ["empty.png", "cut.jpg", "cut.png"]


def test_unreadable_images_are_all_listed_and_nothing_is_written(tmp_path):
    root = make_root(tmp_path / "in", {"a": 5, "b": 5})
    bad = spoil(root)
    with pytest.raises(ValueError, match="unreadable images: 3 of 13") as e:
        folder.prepare(root, 8, tmp_path / "out")
    assert all(name in str(e.value) for name in bad) and "000.png" not in str(e.value)
    assert not (tmp_path / "out").exists()

    (tmp_path / "mine").mkdir()                                             # a folder that was there stays there
    (tmp_path / "mine" / "keep.txt").write_text("mine")
    r = cli("imagefolder", root, "--size", 8, "--out", tmp_path / "mine", "--workers", 2)
    assert r.returncode != 0 and r.stdout == "" and all(name in r.stderr for name in bad)
    assert contents(tmp_path / "mine") == {"keep.txt": b"mine"}


def test_skipped_images_might_never_have_been_there(tmp_path, capsys):
    for name in ("clean", "spoiled"):
        root = make_root(tmp_path / name, {"a": 300, "b": 9})               # more than one block of the copy
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

# -----------------------------------------------------------------------------
# imagefolder: interruption, progress

@pytest.mark.parametrize("call", [1, 2, 3, 4])                              # the plan, then NAMES
@pytest.mark.parametrize("existed", [False, True])
def test_folder_error_while_files_change_hands(tmp_path, monkeypatch, call, existed):
    root = make_root(tmp_path / "in", {"a": 4})
    if existed: (tmp_path / "out").mkdir()
    calls = fail_at(monkeypatch, call, OSError("disk"))
    with pytest.raises(OSError, match="disk"): folder.prepare(root, 4, tmp_path / "out")
    assert len(calls) == call and list(tmp_path.glob("out/*")) == [] and (tmp_path / "out").exists() == existed


def test_folder_interrupted_while_decoding(tmp_path, monkeypatch):
    root, seen = make_root(tmp_path / "in", {"a": 4}), []
    def load_image(file, size, gray):
        seen.append((tmp_path / "out" / "tmp.images.npy").exists())         # it was under way
        if len(seen) == 3: raise KeyboardInterrupt
        return np.zeros((3, size, size), np.uint8)
    monkeypatch.setattr(folder, "load_image", load_image)
    with pytest.raises(KeyboardInterrupt): folder.prepare(root, 4, tmp_path / "out")
    assert seen == [True] * 3 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    folder.prepare(root, 4, tmp_path / "out")                               # and the next run goes through


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_with_workers_leaves_nothing(tmp_path):
    root = make_root(tmp_path / "in", {"a": 1}, size=1200)
    for i in range(600): os.link(root / "a" / "000.png", root / "a" / f"{i + 1:03d}.png")
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, ROOT / "data/imagefolder/prepare.py", root, "--size", "8", "--out", out,
                            "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a shell's & ignores it
    end = time.monotonic() + 20
    while not (out / "tmp.images.npy").exists() and time.monotonic() < end: time.sleep(0.02)
    time.sleep(0.7)                                                         # let the workers start
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)                                       # what a terminal does: to all of them
    run.communicate(timeout=30)
    assert run.returncode != 0 and not out.exists()


@pytest.mark.parametrize("tty", [False, True])
def test_progress(monkeypatch, tty):
    err, clock = io.StringIO(), iter(np.arange(0, 1000, 4.0))               # 4 seconds an image
    err.isatty = lambda: tty
    monkeypatch.setattr(rows.sys, "stderr", err)
    monkeypatch.setattr(rows.time, "monotonic", lambda: next(clock))
    show = rows.progress(8)
    for finished in range(1, 9): show(finished)
    text = err.getvalue()
    if tty: assert text.count("\r") == 8 and text.count("\n") == 1 and text.endswith("\n") and "8/8" in text
    else: assert re.findall(r"(\d)/8 images.* (\d:\d\d) left\n", text) == [("3", "0:20"), ("6", "0:08")]  # 12 s apart
    assert "[" + "#" * 9 + "." * 15 + "] 3/8" in text and "0.2 per second" in text
    rows.progress(8, quiet=True)(8)
    assert err.getvalue() == text


def test_docs_name_every_field_of_meta(digits_dir):
    text = (ROOT / "data" / "README.md").read_text()
    assert all(f"`{name}`" in text for name in [*NAMES, *read(digits_dir)[2]])
