"""An .npz of samples: latents decoded, shared among processes, interrupted and taken up again."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, finish, forked, torchrun
from sampling import FLAGS, differ, read
from util import save_vae

import sample_min
from dydilit import Diffusion, DyDiLiT
from support import shards
from support.decoder import Decoder


@pytest.fixture
def sample(capsys):
    """sample(*arguments) runs sample_min.py here: (its error or 0, stdout)."""

    def call(*arguments):
        try:
            sample_min.main([str(a) for a in arguments])
            code = 0
        except (ValueError, OSError) as e:  # as the script does
            code = f"{type(e).__name__}: {e}"
        return code, capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """Images, labels and settings, made by one process without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "s.npz"
    sample_min.main([str(latents), *FLAGS, f"--out={out}"])
    return read(out)


def same(out, whole):
    """Whether a file has the bytes of `whole`, images and labels."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(read(out)[:2], whole[:2], strict=True))


# --------------------------------------------------------------------------------------------------
# What is written.


def test_latents_are_divided_by_the_scaling_decoded_and_rounded(latents, vae, whole):
    from diffusers import AutoencoderKL

    images, labels, _ = whole
    model = DyDiLiT.from_pretrained(latents)
    decoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    assert model.meta["scaling"] == 0.3  # the tiny autoencoder's
    y = torch.tensor(labels)
    x = Diffusion(3).sample(model, y, range(11), seed=0, cfg=1.5, cfg_channels=3)
    with torch.no_grad():
        pixels = decoder.decode(x / 0.3).sample
    want = (127.5 * pixels + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert differ(images, want)[0] <= 1  # one batch here, three there: other rounding


def test_images_and_labels_have_their_shapes_and_types(whole):
    images, labels, _ = whole
    assert images.dtype == np.uint8 and images.shape == (11, 16, 16, 3)
    assert images.std() > 5  # not blank
    assert labels.dtype == np.int64 and labels.tolist() == [i % 3 for i in range(11)]


def test_settings_stand_beside_the_images(vae, whole):
    settings = dict(whole[2])
    assert len(settings.pop("weights")) == 16
    assert settings == {
        "model": "dydila",
        "step": 12,
        "data": "set",
        "cfg": 1.5,
        "cfg_channels": 3,
        "steps": 3,
        "sampler": "ddpm",
        "seed": 0,
        "dtype": "float32",
        "attention_dtype": None,
        "vae": vae,
    }


def test_numpy_reads_it_without_pickle(latents, whole, sample, tmp_path):
    assert sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")[0] == 0
    with np.load(tmp_path / "s.npz", allow_pickle=False) as made:
        assert made.files == ["arr_0", "labels", "settings"]
        assert made["arr_0"].tobytes() == whole[0].tobytes()


def test_nothing_stays_beside_it(latents, sample, tmp_path):
    assert sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_a_grid_is_made_of_the_same_images(latents, whole, sample, tmp_path):
    grid = ["--steps=3", "--per-class=2", "--classes", "a", f"--out={tmp_path}/g.png"]
    assert sample(latents, *grid)[0] == 0
    with Image.open(tmp_path / "g.png") as im:
        cell = np.asarray(im)[: 16 * 3 : 3, : 16 * 3 : 3]
    assert differ(cell, whole[0][0])[0] <= 1


# --------------------------------------------------------------------------------------------------
# Shared and interrupted.


def killed(after, latents, out):
    """A fork of this process that kill -9 ends before its chunk number `after`."""
    original, done = sample_min.generate, []

    def generate(*args, **kwargs):
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return original(*args, **kwargs)

    def sample():
        sample_min.generate = generate
        sample_min.main([str(latents), *FLAGS, f"--out={out}"])

    assert forked(sample) == -signal.SIGKILL


def marks(out):
    """Which chunks of an unfinished file are marked as done."""
    return shards.read_marks(Path(f"{out}.partial"))["done"].tolist()


def test_a_killed_run_leaves_its_chunks_and_no_file(latents, tmp_path):
    out = tmp_path / "s.npz"
    killed(2, latents, out)
    assert not out.exists()
    assert marks(out) == [1, 1, 0]


def test_a_killed_run_goes_on_without_doing_anything_twice(
    latents, whole, sample, tmp_path, monkeypatch
):
    out, original, chunks = tmp_path / "s.npz", sample_min.generate, []
    killed(2, latents, out)

    def spy(model, labels, index, *args, **kwargs):
        chunks.append(index)
        return original(model, labels, index, *args, **kwargs)

    monkeypatch.setattr(sample_min, "generate", spy)
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert chunks == [range(8, 11)] and same(out, whole)


def test_two_processes_take_up_what_one_left(latents, whole, tmp_path):
    out = tmp_path / "s.npz"
    killed(1, latents, out)
    command = ["sample_min.py", latents, *FLAGS, f"--out={out}"]
    process = torchrun("--standalone", "--nproc_per_node=2", *command)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert stdout.count("11 images from step 12") == 1 and same(out, whole)


@pytest.mark.parametrize("crash", ["done", "images.npy", "settings.json"])
def test_a_stop_while_the_folder_is_made_loses_nothing(latents, whole, sample, tmp_path, crash):
    """`crash` is the file that was to be written next. Without settings.json all begins anew."""
    out, folder = tmp_path / "s.npz", tmp_path / "s.npz.partial"
    folder.mkdir()
    if crash != "done":
        (folder / "done").write_bytes(b"\1")
    if crash == "settings.json":
        (folder / "images.npy").write_bytes(b"half")
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert same(out, whole)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seed=1", "seed 0 (now 1)"),
        ("--cfg=4", "cfg 1.5 (now 4.0)"),
        ("--batch=5", "batch 4 (now 5)"),
        ("--images=12", "n 11 (now 12)"),
        ("--labels=random", "labels"),
        ("--sampler=ddim", "sampler 'ddpm' (now 'ddim')"),
        ("--dtype=bfloat16", "dtype 'float32' (now 'bfloat16')"),
    ],
)
def test_other_settings_do_not_go_on_with_it(latents, sample, tmp_path, flag, named):
    out = tmp_path / "s.npz"

    def stop(*args, **kwargs):
        raise OSError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_min, "generate", stop)
        assert sample(latents, *FLAGS, f"--out={out}")[0] == "OSError: stop"
    code, _ = sample(latents, *FLAGS, flag, f"--out={out}")
    assert code.startswith("ValueError: ") and "was begun with other settings" in code
    assert named in code
    assert not out.exists() and (tmp_path / "s.npz.partial").exists()


# --------------------------------------------------------------------------------------------------
# Bytes that are not as they were written.


@pytest.fixture(scope="module")
def begun(latents, tmp_path_factory):
    """The folder of a run that was killed after two of three chunks."""
    out = tmp_path_factory.mktemp("begun") / "s.npz"
    killed(2, latents, out)
    return Path(f"{out}.partial")


@pytest.fixture
def resumed(begun, latents, whole, tmp_path, monkeypatch, capsys):
    """resumed(damage) copies `begun`, calls damage(folder) and goes on: chunks made, stderr.

    The file is the same as that of a run without an interruption.
    """

    def call(damage):
        out, chunks, original = tmp_path / "s.npz", [], sample_min.generate
        folder = shutil.copytree(begun, f"{out}.partial")
        damage(Path(folder))

        def spy(model, labels, index, *args, **kwargs):
            chunks.append(index.start // 4)
            return original(model, labels, index, *args, **kwargs)

        monkeypatch.setattr(sample_min, "generate", spy)
        sample_min.main([str(latents), *FLAGS, f"--out={out}"])
        assert same(out, whole) and [p.name for p in tmp_path.iterdir()] == ["s.npz"]
        usual = ("sample [", "attention: ")
        lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(usual)]
        return chunks, lines

    return call


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_an_undamaged_folder_is_taken_up_without_a_word(resumed):
    assert resumed(lambda folder: None) == ([2], [])


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_chunk_with_a_flipped_bit_is_made_again(resumed, chunk):
    def damage(folder):
        size = (folder / "images.npy").stat().st_size
        flip(folder / "images.npy", 8 * (size - (11 - 4 * chunk) * 768) + 5)

    chunks, (line,) = resumed(damage)
    assert chunks == [chunk, 2]
    assert "s.npz.partial: 1 of 3 chunks are not as they were written and are made again" in line


@pytest.mark.parametrize("content", [b"", b"\1", b"\1\1\0", b"\1\1\1", bytes(5), bytes(20)])
def test_marks_of_a_wrong_length_are_no_marks(resumed, content):
    chunks, (line,) = resumed(lambda folder: (folder / "done").write_bytes(content))
    assert chunks == [0, 1, 2] and "s.npz.partial is begun anew: done has " in line


def test_marks_that_nobody_wrote_are_no_marks(resumed):
    chunks, (line,) = resumed(lambda folder: (folder / "done").write_bytes(b"\1\0\0\0\0" * 3))
    assert chunks == [0, 1, 2] and "3 of 3 chunks" in line


@pytest.mark.parametrize("name", ["done", "images.npy"])
def test_a_folder_that_lost_a_file_is_begun_anew(resumed, name):
    chunks, (line,) = resumed(lambda folder: (folder / name).unlink())
    assert chunks == [0, 1, 2] and "is begun anew: " in line


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_settings_that_cannot_be_read_are_no_settings(resumed, content):
    chunks, (line,) = resumed(lambda folder: (folder / "settings.json").write_bytes(content))
    assert chunks == [0, 1, 2] and line.endswith("is begun anew: settings.json is damaged")


@pytest.mark.parametrize("kept", [0, 60, 128, 1000])
def test_images_that_were_cut_short_are_made_anew(resumed, kept):
    chunks, (line,) = resumed(lambda folder: os.truncate(folder / "images.npy", kept))
    assert chunks == [0, 1, 2] and "is begun anew: images.npy is damaged" in line


def test_images_whose_header_is_torn_are_made_anew(resumed):
    """numpy reads a header as Python, and may raise an error of Python's tokenizer."""

    def damage(folder):
        file = folder / "images.npy"
        file.write_bytes(file.read_bytes().replace(b"), }", b"   }", 1))

    chunks, (line,) = resumed(damage)
    assert chunks == [0, 1, 2] and "is begun anew: images.npy is damaged" in line


def test_images_of_another_shape_are_made_anew(resumed):
    other = np.zeros((11, 16, 16, 1), np.uint8)
    chunks, (line,) = resumed(lambda folder: np.save(folder / "images.npy", other))
    assert chunks == [0, 1, 2] and "images.npy is uint8 (11, 16, 16, 1)" in line


@pytest.fixture
def finished_file(latents, tmp_path, capsys):
    """A finished file and what the same command says about it."""
    out = tmp_path / "s.npz"
    sample_min.main([str(latents), *FLAGS, f"--out={out}"])
    labels = torch.from_numpy(read(out)[1])

    def says():
        try:
            sample_min.main([str(latents), *FLAGS, f"--out={out}"])
            return capsys.readouterr().out
        except FileExistsError as e:
            return str(e)

    capsys.readouterr()
    assert says() == f"{out}: already there\n" and sample_min.settings_in(out, labels)
    return out, says


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -300, -20, -1])
def test_a_finished_file_that_was_cut_short_is_not_this_commands(finished_file, kept):
    out, says = finished_file
    os.truncate(out, kept if kept >= 0 else out.stat().st_size + kept)
    assert "exists, and not by this command; delete it" in says()


def test_a_finished_file_whose_images_cannot_be_read_is_not_this_commands(finished_file):
    out, says = finished_file
    flip(out, 8 * 2000 + 3)
    assert "exists, and not by this command; delete it" in says()


def test_no_flip_in_a_finished_file_changes_what_is_believed(finished_file):
    """MUTATIONS=300 (default 60) flips of one to three bits: refused in one line, or every array is
    as it was."""
    number = int(os.environ.get("MUTATIONS", 60))
    out, says = finished_file
    before, good = out.read_bytes(), read(out)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(number):
        out.write_bytes(before)
        for bit in rng.integers(8 * len(before), size=rng.integers(1, 4)):
            flip(out, int(bit))
        if "not by this command" in says():
            refused += 1
        else:
            now = read(out)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(good[:2], now[:2]))
            assert good[2] == now[2]
    print(f"finished .npz: {refused} mutations refused, {number - refused} without effect")
    assert refused > 0.8 * number


@pytest.fixture
def there(latents, sample, tmp_path, monkeypatch):
    """A finished file; from here on no image can be made."""
    out = tmp_path / "s.npz"
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    monkeypatch.setattr(sample_min, "generate", None)
    return out


def test_a_finished_file_is_not_made_twice(latents, sample, there):
    assert sample(latents, *FLAGS, f"--out={there}") == (0, f"{there}: already there\n")


def test_what_a_kill_after_the_last_rename_left_is_removed(latents, sample, there):
    Path(f"{there}.partial").mkdir()
    assert sample(latents, *FLAGS, f"--out={there}")[0] == 0
    assert not Path(f"{there}.partial").exists()


@pytest.mark.parametrize("other", ["--seed=1", "--images=12", "--labels=random", "--classes=1"])
def test_a_file_of_another_command_is_not_overwritten(latents, sample, there, other):
    before = there.read_bytes()
    code, _ = sample(latents, *FLAGS, other, f"--out={there}")
    advice = "exists, and not by this command; delete it, or choose another --out"
    assert code == f"FileExistsError: {there} {advice}"
    assert there.read_bytes() == before


def test_a_file_of_another_program_is_not_overwritten(latents, sample, there):
    there.write_bytes(b"somebody else's")
    assert "exists, and not by this command" in sample(latents, *FLAGS, f"--out={there}")[0]
    assert there.read_bytes() == b"somebody else's"


def test_a_disk_without_room_is_refused_before_the_start(latents, sample, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 2 * 11 * 16 * 16 * 3 - 1})
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    code, _ = sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")
    assert code.startswith("OSError: ")
    assert code.endswith("needs 16.9 kB, its disk has 16.9 kB left, 1 byte too few")


def test_a_disk_that_fills_up_keeps_what_is_done(latents, whole, sample, tmp_path, monkeypatch):
    calls, fsync, out = [], os.fsync, tmp_path / "s.npz"

    def full(file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(shards.os, "fsync", full)
    assert "No space left" in sample(latents, *FLAGS, f"--out={out}")[0]
    assert marks(out) == [1, 0, 0]
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert same(out, whole)


# --------------------------------------------------------------------------------------------------
# Autoencoders.


def test_another_autoencoder_can_be_named(latents, whole, sample, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    assert sample(latents, *FLAGS, f"--vae={other}", f"--out={tmp_path}/s.npz")[0] == 0
    images, _, settings = read(tmp_path / "s.npz")
    assert settings["vae"] == other and differ(images, whole[0])[1] > 3


def test_an_autoencoder_that_is_not_there_is_one_line(latents, sample, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _ = sample(latents, *FLAGS, f"--vae={tmp_path}/empty", f"--out={tmp_path}/s.npz")
    assert code.startswith(f"ValueError: cannot load the autoencoder '{tmp_path}/empty'")
    assert "\n" not in code


def test_an_autoencoder_of_other_channels_is_one_line(latents, sample, tmp_path):
    three = save_vae(tmp_path / "three", latent_channels=3)
    code, _ = sample(latents, *FLAGS, f"--vae={three}", f"--out={tmp_path}/s.npz")
    assert code == f"ValueError: the autoencoder {three!r} decodes 3 channels, the model makes 4"


def test_without_diffusers_nothing_is_begun(latents, sample, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _ = sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")
    assert code.startswith("ValueError: these are latents; to decode them: pip install diffusers")
    assert not any(tmp_path.iterdir())


def test_the_decoder_takes_a_few_at_a_time(latents, vae):
    model, x = DyDiLiT.from_pretrained(latents), torch.randn(7, 4, 8, 8)
    two, many = (Decoder(model.config, vae, 0.3, "cpu", batch)(x) for batch in (2, 16))
    assert two.shape == (7, 16, 16, 3) and (two.int() - many.int()).abs().max() <= 1


def test_pixels_need_no_autoencoder():
    decode, x = Decoder(CONFIG, None, None, "cpu"), torch.arange(64).view(1, 1, 8, 8) / 25 - 1.26
    assert decode.shape == (8, 8, 1)
    want = [int(min(max(127.5 * (i / 25 - 1.26) + 128, 0), 255)) for i in range(64)]
    assert decode(x).flatten().tolist() == want


def test_samples_that_are_not_finite_are_refused():
    decode = Decoder(CONFIG, None, None, "cpu")
    with pytest.raises(ValueError, match="the samples are not finite"):
        decode(torch.full((1, 1, 8, 8), torch.nan))
