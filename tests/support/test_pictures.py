"""support/pictures.py: every pixel of a grid; what an animation is made of."""

import numpy as np
import pytest
from PIL import Image

from support.pictures import label_some, read_losses, save_animation, save_grid, written_whole


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid_writes_every_pixel_with_lines_and_blanks_between(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (5, 24, 24, channels), np.uint8)
    save_grid(tmp_path / "grid.png", images, 3)
    with Image.open(tmp_path / "grid.png") as im:
        assert im.mode == ("L" if channels == 1 else "RGB")
        assert im.size == (3 * 25 * 2, 2 * 25 * 2)
        sheet = np.asarray(im).reshape(100, 150, channels)
    assert (sheet[::2, ::2].repeat(2, 0).repeat(2, 1) == sheet).all()  # enlarged twice, exactly
    want = np.full((50, 75, channels), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        want[row * 25 : row * 25 + 24, column * 25 : column * 25 + 24] = image
    assert (sheet[::2, ::2] == want).all()


def test_save_grid_shows_latents_by_their_first_three_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 4), np.uint8)
    save_grid(tmp_path / "grid.png", images, 1)
    with Image.open(tmp_path / "grid.png") as im:
        assert (np.asarray(im)[:48, :48] == images[0, ..., :3]).all()


def animation(tmp_path, frames):
    """Frames (RGB) and durations of the animation of these arrays."""
    save_animation(tmp_path / "a.gif", frames, 2)
    with Image.open(tmp_path / "a.gif") as im:
        for i in range(im.n_frames):
            im.seek(i)
            yield np.asarray(im.convert("RGB")).astype(int), im.info["duration"]


def test_an_animation_of_greys_is_off_by_half_a_grey_at_most(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 1), np.uint8)
    for images, (sheet, _) in zip(frames, animation(tmp_path, frames), strict=True):
        assert abs(sheet[:32, :32] - images[0]).max() <= np.ceil(255 / 15 / 2)


def test_an_animation_of_colours_is_near_them(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 3), np.uint8)
    for images, (sheet, _) in zip(frames, animation(tmp_path, frames), strict=True):
        assert abs(sheet[:32, :32] - images[0]).mean() < 30


def test_an_animation_takes_three_seconds_and_holds_its_end(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 4, 8, 8, 1), np.uint8)
    durations = [duration for _, duration in animation(tmp_path, frames)]
    assert durations == [100] * 29 + [2000]


def test_ticks_of_the_loss_are_labelled_if_they_do_not_overlap():
    ticks = {0.1: "0.1", 0.2: "0.2", 0.3: "0.3", 0.4: "", 0.5: "0.5", 0.7: "", 2: "2"}
    assert {tick: label_some(tick, None) for tick in ticks} == ticks


LOG = [
    b'{"step": 1, "loss": 2.0}',
    b"",
    b"{",
    b"3",
    b"null",
    b"{}",
    b'{"step": 2}',
    b'{"step": 2, "loss": NaN}',
    b'{"step": "a", "loss": 1}',
    b'{"step": "2", "loss": "1"}',
    b'{"step": 2, "loss": [1]}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"step": 3, "loss": 1.0, "held_out_loss": 1.5}',
    b'{"step": 4, "lo',
]


def test_lines_of_a_log_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(LOG))
    assert [line["step"] for line in read_losses(tmp_path / "log.jsonl")] == [1, 3]


def test_a_log_without_a_readable_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl has no line with a step and a loss"):
        read_losses(tmp_path / "log.jsonl")


def test_a_picture_that_fails_on_the_way_leaves_the_old_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(KeyError), written_whole(tmp_path / "a.png") as beside:
        beside.write_bytes(b"half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"
