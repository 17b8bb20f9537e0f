"""data/imagefolder: from one image file to its square of 8-bit pixels."""

import struct
import zlib

import numpy as np
import pytest
from folders import noise
from PIL import Image
from runs import load_prepare

folder = load_prepare("imagefolder")

# ----------------------------------------------------------------------------------------------
# The crop.


def bicubic(n_in, n_out):
    """Matrix n_out x n_in of a bicubic (a = -1/2) resize.

    It is widened where it shrinks, and normalised again at the edges.
    """
    scale = n_in / n_out
    wide = max(scale, 1)
    centres = (np.arange(n_out) + 0.5)[:, None] * scale
    x = np.abs((np.arange(n_in) + 0.5)[None] - centres) / wide
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    k = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return k / k.sum(1, keepdims=True)


def expected_crop(x, size):
    """uint8 H x W x 3 -> float size x size x 3, in numpy alone; halved sides must be even."""
    x = x.astype(float)
    while min(x.shape[:2]) >= 2 * size:
        h, w = x.shape[0] // 2, x.shape[1] // 2
        assert x.shape[:2] == (2 * h, 2 * w)
        x = x.reshape(h, 2, w, 2, 3).mean((1, 3))
    h, w = (round(s * size / min(x.shape[:2])) for s in x.shape[:2])
    # across first, as Pillow does: it clips between the two
    x = np.einsum("ij,kjc->kic", bicubic(x.shape[1], w), x)
    x = np.einsum("ij,jkc->ikc", bicubic(x.shape[0], h), x.clip(0, 255))
    top, left = (h - size) // 2, (w - size) // 2
    return x[top : top + size, left : left + size].clip(0, 255)


BOX_ALONE = [(8, 8, 8), (16, 16, 8), (32, 48, 8), (96, 64, 16)]
BOX_THEN_DOWN = [(15, 15, 8), (20, 32, 8), (44, 28, 8), (30, 23, 16)]
UP_OR_ODD = [(5, 5, 8), (3, 7, 16), (11, 8, 8), (8, 11, 8)]


@pytest.mark.parametrize("h, w, size", BOX_ALONE + BOX_THEN_DOWN + UP_OR_ODD)
def test_crop_against_numpy(h, w, size):
    x = noise(h, w, 3, seed=h * w)
    got = np.asarray(folder.centre_crop(Image.fromarray(x), size)).astype(float)
    assert got.shape == (size, size, 3)
    assert np.abs(got - expected_crop(x, size)).max() <= 2  # Pillow rounds after each pass


def test_crop_halves_only_while_it_stays_large_enough(monkeypatch):
    seen, real = [], Image.Image.resize

    def resize(im, size, method):
        seen.append((size, method))
        return real(im, size, method)

    monkeypatch.setattr(Image.Image, "resize", resize)
    folder.centre_crop(Image.new("RGB", (127, 130)), 32)
    box, cubic = Image.Resampling.BOX, Image.Resampling.BICUBIC
    assert seen == [((63, 65), box), ((32, 33), cubic)]


@pytest.mark.parametrize("w, h", [(90, 30), (30, 90), (37, 33)])
def test_crop_takes_the_centre(w, h):
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    x = np.full((h, w, 3), red, np.uint8)
    s = min(w, h)
    top, left = (h - s) // 2, (w - s) // 2
    x[top : top + s, left : left + s] = green
    x[top + s // 3 : top + 2 * s // 3, left + s // 3 : left + 2 * s // 3] = blue
    got = np.asarray(folder.centre_crop(Image.fromarray(x), 15)).astype(int)
    assert (got[7, 7] == blue).all()
    assert (got[[2, 2, 12, 12], [2, 12, 2, 12]] == green).all()
    assert got[1:-1, 1:-1, 0].max() < 30, "no red, but for a blurred edge"
    inner = got[..., 2] > 127
    assert inner.sum() == 25 and inner[5:10, 5:10].all()


@pytest.mark.parametrize("w, h", [(1, 50), (50, 1), (1, 1), (2, 2)])
def test_crop_of_extreme_shapes(w, h):
    im = Image.new("RGB", (w, h), (1, 2, 3))
    assert folder.centre_crop(im, 1).size == (1, 1)
    got = np.asarray(folder.centre_crop(im, 4))
    assert np.array_equal(got, np.full((4, 4, 3), (1, 2, 3)))


# ----------------------------------------------------------------------------------------------
# Colours, transparency, depth.


def save(tmp_path, im, ext="png", **options):
    file = tmp_path / f"im.{ext}"
    im.save(file, **options)
    return file


def check(file, want, gray=False, tolerance=0):
    """Each pixel of the loaded 8 x 8 image is `want`, a colour or H x W (x 3)."""
    got = folder.load_image(file, 8, gray)
    assert got.dtype == np.uint8 and got.shape == (1 if gray else 3, 8, 8)
    want = np.asarray(want, int)
    if want.ndim == 2:
        want = want[..., None]
    assert np.abs(got.transpose(1, 2, 0).astype(int) - want).max() <= tolerance


def test_colours_stay_as_they_are(tmp_path):
    x = noise(8, 8, 3)
    check(save(tmp_path, Image.fromarray(x)), x)


def test_grey_becomes_three_equal_channels(tmp_path):
    x = noise(8, 8)
    check(save(tmp_path, Image.fromarray(x)), x)


def test_black_and_white_becomes_0_and_255(tmp_path):
    x = noise(8, 8) > 127
    check(save(tmp_path, Image.fromarray(x)), x * 255)


def test_gray_is_one_channel(tmp_path):
    x = noise(8, 8)
    check(save(tmp_path, Image.fromarray(x)), x, gray=True)


def test_gray_is_the_luma_of_colours(tmp_path):
    file = save(tmp_path, Image.new("RGB", (8, 8), (200, 100, 50)))
    check(file, [0.299 * 200 + 0.587 * 100 + 0.114 * 50], gray=True, tolerance=1)


@pytest.fixture
def palette():
    """A paletted image, the index of each pixel, the colours."""
    colours = np.array([[10, 20, 30], [200, 100, 0], [7, 255, 90], [0, 0, 0]], np.uint8)
    index = noise(8, 8) % 4
    im = Image.fromarray(index)
    im.putpalette(colours.tobytes())  # which makes it mode P
    return im, index, colours


def test_a_palette_becomes_its_colours(tmp_path, palette):
    im, index, colours = palette
    check(save(tmp_path, im), colours[index])


def test_the_transparent_colour_of_a_palette_becomes_white(tmp_path, palette):
    im, index, colours = palette
    want = np.where((index == 1)[..., None], 255, colours[index])
    check(save(tmp_path, im, transparency=1), want)


def test_a_palette_with_an_alpha_for_each_colour_lies_on_white(tmp_path):
    im = Image.new("P", (8, 8), 1)
    im.putpalette([0, 0, 0, 200, 100, 0])
    file = save(tmp_path, im, transparency=bytes([255, 51]))
    check(file, [255 - (255 - c) / 5 for c in (200, 100, 0)], tolerance=1)


@pytest.mark.parametrize("ext", ["png", "webp"])
def test_alpha_lies_on_white(tmp_path, ext):
    x = noise(8, 8, 4)
    x[:2, :, 3], x[2:4, :, 3] = 0, 255
    a = x[..., 3:] / 255
    options = {"lossless": True, "exact": True} if ext == "webp" else {}
    file = save(tmp_path, Image.fromarray(x), ext, **options)
    want = x[..., :3] * a + 255 * (1 - a)
    check(file, np.rint(want), tolerance=1)
    check(file, np.rint(want @ [0.299, 0.587, 0.114]), gray=True, tolerance=2)


def test_grey_with_alpha_lies_on_white(tmp_path):
    check(save(tmp_path, Image.new("LA", (8, 8), (100, 51))), [255 - 155 / 5], tolerance=1)


def test_a_transparent_colour_becomes_white(tmp_path):
    x = np.full((8, 8, 3), (9, 8, 7), np.uint8)
    x[3] = (1, 2, 3)
    want = x.copy()
    want[3] = 255
    check(save(tmp_path, Image.fromarray(x), transparency=(1, 2, 3)), want)


def test_cmyk_becomes_rgb(tmp_path):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    check(save(tmp_path, cyan, "jpg", quality=100), [0, 255, 255], tolerance=3)


@pytest.fixture
def deep():
    """8 x 8 grey pixels of 16 bits, the extremes among them."""
    x = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    x[0, :4] = 0, 65535, 256, 128 * 257
    return x


@pytest.mark.parametrize("gray", [False, True])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, deep, gray):
    check(save(tmp_path, Image.fromarray(deep)), np.rint(deep / 257), gray)


def test_16_bit_grey_in_mode_i_is_scaled_too(deep):
    im = Image.fromarray(deep.astype(np.int32))
    assert im.mode == "I"
    assert np.array_equal(np.asarray(folder.to_rgb(im)), np.rint(deep / 257))


def png_16_bit_colour(x):
    """The bytes of a PNG file of x (H, W, 3) big-endian uint16, which Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in x))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bit_colour_is_scaled(tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    (tmp_path / "im.png").write_bytes(png_16_bit_colour(x))
    check(tmp_path / "im.png", x / 257, tolerance=1)


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="floating"):
        folder.to_rgb(Image.new("F", (8, 8)))


# ----------------------------------------------------------------------------------------------
# Orientation.

ORIENTATION = 0x0112
STORED = {  # how a camera stores an upright image
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.swapaxes(0, 1),
    6: lambda u: np.rot90(u, 1),
    7: lambda u: np.rot90(u, 2).swapaxes(0, 1),
    8: lambda u: np.rot90(u, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("grey_16_bit", [False, True])
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, grey_16_bit):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    want = noise(8, 8) if grey_16_bit else noise(8, 8, 3)
    upright = want.astype(np.uint16) * 257 if grey_16_bit else want
    im = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    check(save(tmp_path, im, exif=exif), want)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_exif_that_pillow_cannot_read_or_write_does_not_cost_the_image(tmp_path, format):
    im, odd = Image.fromarray(np.full((8, 8, 3), 77, np.uint8)), Image.Exif()
    odd[ORIENTATION], odd[0x8298] = 6, b"\xff\xfe"
    options = {"lossless": True} if format == "webp" else {}
    for exif in (odd.tobytes(), b"Exif\0\0junk that is no TIFF"):
        im.save(tmp_path / f"x.{format}", exif=exif, **options)
        assert folder.load_image(tmp_path / f"x.{format}", 8).shape == (3, 8, 8)


def test_an_image_is_turned_before_the_crop(tmp_path):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 4:12] = noise(8, 8, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    im = Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1)))
    check(save(tmp_path, im, exif=exif), upright[:, 4:12])
