"""data/imagefolder/prepare.py --vae: what the latents are, that no kill and no number of processes shows in them, what
is refused, and that training reads them. As a script: what a test kills, see `killed`."""

import errno
import functools
import json
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import util
from PIL import Image
from runs import CONFIG, ROOT, RUN, differing, finish, start, torchrun
from test_data import NAMES, contents, folder, noise, rows, spoil
from test_train import parts, read_log, without_speed, write_set

from dydilit import Config, Data, generator, load_checkpoint, train

SCRIPT = ROOT / "data/imagefolder/prepare.py"
SIZE, BATCH, C = 16, 4, 2  # latents are C x 8 x 8
N = 23  # a last block of three
save_vae = functools.partial(util.save_vae, latent_channels=C)


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder with random weights, made and saved by diffusers; it halves the size."""
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """N noisy images in three classes, of several sizes."""
    root, rng = tmp_path_factory.mktemp("images") / "in", np.random.default_rng(0)
    for i in range(N):
        (root / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 256, (SIZE + i % 5, SIZE + i % 7, 3), dtype=np.uint8)
        Image.fromarray(x).save(root / "abc"[i % 3] / f"{i:02d}.png")
    return root


def prepare(root, out, vae, **options):
    """In this process, into `out`, whose bytes it returns."""
    folder.prepare(root, SIZE, out, **{"held_out": 0.2, "vae": vae, "batch": BATCH, **options})
    return contents(out)


def arguments(root, out, vae, *more):
    """The same for a process."""
    return [root, "--size", SIZE, "--held-out", "0.2", "--vae", vae, "--batch", BATCH, "--out", out, *more]


@pytest.fixture(scope="module")
def plain(images, vae, tmp_path_factory):
    """The set that every interrupted, shared or resumed run must end in: the folder."""
    out = tmp_path_factory.mktemp("plain") / "set"
    prepare(images, out, vae)
    return out


def read(out):
    return np.load(out / "images.npy"), np.load(out / "labels.npy"), json.loads((out / "meta.json").read_text())


def files_in_order(root, held_out=0.2):
    _, files, labels = folder.find(root)
    return [files[i] for i in folder.shuffled(labels, folder.n_held_out(held_out, len(files)))]


# ---------------------------------------------------------------------------------------------------------------------
# What they are.


def test_layout_and_meta(plain, vae):
    images, labels, meta = read(plain)
    assert sorted(contents(plain)) == NAMES
    assert images.shape == (N, 2, 2 * C, 8, 8) and images.dtype == np.float16 and labels.dtype == np.int64
    assert meta == {"name": "set", "classes": ["a", "b", "c"], "flip": True, "held_out": 5, "levels": 255,
                    "vae": vae, "scaling": 0.3, "pixels": SIZE}


def encode_directly(vae, x):
    """uint8 (n, 3, H, W) -> means and standard deviations (n, 2C, h, w) float32, one image at a time."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    with torch.no_grad():
        posteriors = [model.encode(torch.tensor(z[None] / 127.5 - 1, dtype=torch.float32)).latent_dist for z in x]
    return torch.cat([torch.cat([p.mean, p.std], 1) for p in posteriors]).numpy()


def test_they_are_the_means_and_deviations_of_diffusers_for_the_image_and_for_its_mirror_image(plain, images, vae):
    latents, labels, meta = read(plain)
    files = files_in_order(images)
    assert [meta["classes"][y] for y in labels] == [Path(f).parent.name for f in files]
    x = np.stack([folder.load_image(f, SIZE) for f in files])
    for view, pixels in ((0, x), (1, x[..., ::-1].copy())):
        want = encode_directly(vae, pixels)
        assert (want[:, C:] > 0).all() and np.abs(want).max() < 100
        close = np.abs(latents[:, view] - want) <= 2.0**-11 * np.abs(want) + 1e-5  # float16's rounding, and float32's
        assert close.all()
    assert np.abs(latents[:, 1] - latents[:, 0, ..., ::-1]).max() > 0.01  # a VAE is not equivariant


def test_without_flips_only_the_images_as_they_are(plain, images, vae, tmp_path):
    prepare(images, tmp_path / "set", vae, flip=False)
    latents, _, meta = read(tmp_path / "set")
    assert meta["flip"] is False and np.array_equal(latents, read(plain)[0][:, :1])


def test_every_mode_of_an_image_goes_the_way_of_the_pixels(vae, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    x = noise(SIZE, SIZE, 4)
    pictures = {"l.png": x[..., 0], "rgba.png": x, "deep.png": x[..., 0].astype(np.uint16) * 257}
    for name, pixels in pictures.items(): Image.fromarray(pixels).save(tmp_path / "in" / "a" / name)
    Image.fromarray(x, "CMYK").save(tmp_path / "in" / "a" / "cmyk.jpg")
    prepare(tmp_path / "in", tmp_path / "set", vae)
    want = encode_directly(vae, np.stack([folder.load_image(f, SIZE) for f in files_in_order(tmp_path / "in")]))
    assert np.abs(read(tmp_path / "set")[0][:, 0] - want).max() < 1e-2


def test_autocast_around_it_changes_nothing(plain, images, vae, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        prepare(images, tmp_path / "set", vae)
    assert contents(tmp_path / "set") == contents(plain)


def test_neither_the_number_of_threads_nor_the_layout_of_the_memory_shows(tmp_path):
    from latents import Encoder

    vae = save_vae(tmp_path / "vae", block_out_channels=(8, 16))  # of this size they would show
    x = noise(8, 32, 32, 3).transpose(0, 3, 1, 2)
    want = Encoder(vae, 32, True)(x, {})
    torch.set_num_threads(2)
    assert np.array_equal(Encoder(vae, 32, True)(x, {}), want)
    assert np.array_equal(Encoder(vae, 32, True)(np.ascontiguousarray(x), {}), want)


# ---------------------------------------------------------------------------------------------------------------------
# The same bytes, whatever happened on the way.


class Killed(BaseException):
    pass


def stop_at(monkeypatch, event, log=None):
    """Raise Killed before the event-th change on the disk, if there are so many. Counts the images that are encoded."""
    import latents

    seen, encoded, call = [], [], latents.Encoder.__call__

    def stopping(real, what):
        def action(*a, **k):
            seen.append(what)
            if len(seen) == event:
                raise Killed
            return real(*a, **k)
        return action

    monkeypatch.setattr(latents.Encoder, "__call__", lambda self, x, files: (encoded.extend(files.values()),
                                                                           call(self, x, files))[1])
    monkeypatch.setattr(rows.Rows, "put", stopping(rows.Rows.put, "put"))
    monkeypatch.setattr(os, "replace", stopping(os.replace, "replace"))
    monkeypatch.setattr(os, "fsync", stopping(os.fsync, "fsync"))
    monkeypatch.setattr(np, "save", stopping(np.save, "save"))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink, "unlink"))
    return seen, encoded


def small(images, root):
    """Six of the images, two classes: two blocks."""
    for name in ("a/00.png", "a/03.png", "a/06.png", "b/01.png", "b/04.png", "b/07.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, root / name)
    return root


def test_a_stop_before_any_change_on_the_disk_leaves_no_trace_in_the_end(images, vae, tmp_path, monkeypatch):
    root, event = small(images, tmp_path / "in"), 0
    with monkeypatch.context() as patch:
        events, _ = stop_at(patch, None)
        want = prepare(root, tmp_path / "whole" / "set", vae)
    assert sorted(want) == NAMES and events.count("put") == 8 and len(events) > 20
    for event in range(1, len(events) + 1):
        out = tmp_path / str(event) / "set"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            _, before = stop_at(patch, event)
            prepare(root, out, vae)
        if (out / "meta.json").exists():  # it was complete, but for the tidying up
            assert {name: (out / name).read_bytes() for name in NAMES} == want
            continue
        done = np.load(out / "tmp.done.npy") if (out / "tmp.plan.json").exists() else np.zeros(6)
        with monkeypatch.context() as patch:
            _, after = stop_at(patch, None)
            assert prepare(root, out, vae) == want, f"stopped before event {event}: {events[event - 1]}"
        assert sorted(after) == sorted(np.array(files_in_order(root))[done == 0])  # all that was not done, and no more
        assert len(set(before) & set(after)) <= BATCH  # at most a block is lost


def killed(blocks, rank, *argv):
    """prepare.py with these arguments; it is killed when this rank has written the rows of so many blocks and has not
    yet flagged the last of them as done."""
    synced, sync = [], rows.Rows.sync

    def count(self):
        sync(self)
        synced.append(self)
        if len(synced) == int(blocks) and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.argv, rows.Rows.sync = [str(SCRIPT), *argv], count
    runpy.run_path(str(SCRIPT), run_name="__main__")


def missing(out):
    return (np.load(out / "tmp.done.npy") == 0).sum()


def test_one_rank_is_killed_and_two_go_on_without_touching_what_is_done(plain, images, vae, tmp_path):
    out, want = tmp_path / "set", read(plain)[0]
    process = start(__file__, 3, 0, *arguments(images, out, vae, "--workers", 1))
    _, stderr = finish(process)
    assert process.returncode == -signal.SIGKILL and missing(out) == N - 2 * BATCH, stderr
    assert not set(contents(out)) & set(NAMES)
    done = np.load(out / "tmp.done.npy") > 0
    half = np.load(out / "tmp.images.npy", mmap_mode="r+")
    assert np.array_equal(half[done], want[done])
    half[done] = 7  # to be recognised
    half.flush()
    process = torchrun("--standalone", "--nproc_per_node=2", SCRIPT, *arguments(images, out, vae, "--workers", 1))
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert stdout == f"{out}: set, images (23, 2, 4, 8, 8) float16, 3 classes, 5 held out, 0.02 MB\n"
    latents = read(out)[0]
    assert (latents[done] == 7).all() and np.array_equal(latents[~done], want[~done])
    assert {k: v for k, v in contents(out).items() if k != "images.npy"} == {
        k: v for k, v in contents(plain).items() if k != "images.npy"}


def test_one_of_two_ranks_is_killed_and_one_with_workers_goes_on(plain, images, vae, tmp_path):
    out = tmp_path / "set"
    command = [__file__, 2, 1, *arguments(images, out, vae, "--workers", 1)]
    process = torchrun("--standalone", "--nproc_per_node=2", *command)
    _, stderr = finish(process)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in stderr
    assert missing(out) >= 2 * BATCH - 1  # two of rank 1's three blocks, the last of them short
    process = start(SCRIPT, *arguments(images, out, vae, "--workers", 2))
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert contents(out) == contents(plain)


class Store(dict):
    """What torchrun's processes share, for ranks that take turns in one process."""
    def set(self, key, value): self[key] = value.encode()
    def get(self, key): return self[key]
    def check(self, keys): return all(key in self for key in keys)
    def add(self, key, n): self[key] = dict.get(self, key, 0) + n; return self[key]


def test_ranks_share_the_blocks_and_the_first_hears_of_all_unreadable_images(tmp_path, monkeypatch):
    store, files, shape = Store(), [f"{i}.png" for i in range(N)], (2, 1, 1, 1)
    monkeypatch.setattr(rows, "progress", lambda total, quiet: lambda finished: shown.append(finished))
    shown, seen, bad = [], {}, {}

    def read(file):
        return np.zeros((3, 2, 2), np.uint8), *((0, "torn") if file in ("5.png", "9.png") else (len(file or ""), None))

    for rank in (0, 1):
        rows.begin(tmp_path, {"a": 1}, files, np.float16, shape, (rank, 2, store))
    with pytest.raises(ValueError, match="rank 1 finds other files or settings than rank 0"):
        rows.begin(tmp_path, {"a": 2}, files, np.float16, shape, (1, 2, store))
    for rank in (1, 0):
        def encode(x, there, rank=rank):
            seen.setdefault(rank, []).append((len(x), list(there.values())))
            return np.full((len(x), *shape), rank + 1, np.float16)
        bad[rank] = rows.fill(tmp_path, files, BATCH, read, encode, 1, (rank, 2, store))
    whole = [files[i : i + BATCH] for i in range(0, N, BATCH)]
    assert [f for _, f in seen[0]] == [whole[0], ["8.png", "10.png", "11.png"], whole[4]]
    assert [f for _, f in seen[1]] == [["4.png", "6.png", "7.png"], whole[3], whole[5]]
    assert [n for n, _ in seen[0]] == [4, 4, 4] and [n for n, _ in seen[1]] == [4, 4, 3]  # whole, whatever is in them
    assert bad == {1: {5: "torn"}, 0: {5: "torn", 9: "torn"}} and shown == [4, 8, 11, 15, 19, 23]
    filled, done = np.load(tmp_path / "tmp.images.npy")[:, 0, 0, 0, 0], np.load(tmp_path / "tmp.done.npy")
    assert filled.tolist() == [0 if i in (5, 9) else 1 + i // BATCH % 2 for i in range(N)]
    assert done.tolist() == [0 if i in (5, 9) else len(f) for i, f in enumerate(files)]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the children in /proc")
def test_a_killed_run_leaves_no_workers_behind(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.fromarray(noise(1500, 1500, 3)).save(tmp_path / "in" / "a" / "0.png", compress_level=0)
    for i in range(400): os.link(tmp_path / "in/a/0.png", tmp_path / f"in/a/{i + 1}.png")
    process = start(SCRIPT, tmp_path / "in", "--size", 8, "--out", tmp_path / "out", "--workers", 2)
    children, end = [], time.time() + 60
    while len(children) < 3 and time.time() < end:  # two workers, and what Python starts beside them
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr): pipe.close()  # who still lives holds the other ends
    def alive(pid): return os.path.exists(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    end = time.time() + 20
    while any(map(alive, children)) and time.time() < end: time.sleep(0.05)
    orphans = [pid for pid in children if alive(pid)]
    for pid in orphans: os.kill(int(pid), signal.SIGKILL)
    assert len(children) == 3 and orphans == []


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images.


def test_unreadable_images_are_listed_and_the_rest_is_kept_for_the_next_run(images, vae, tmp_path, monkeypatch, capsys):
    for name in ("mended", "skipped", "clean"): shutil.copytree(images, tmp_path / name)
    for root in ("mended", "skipped"): bad = spoil(tmp_path / root)
    outs = {name: tmp_path / name / ".out" / "set" for name in ("mended", "skipped", "clean")}
    for name in ("mended", "skipped"):
        with pytest.raises(ValueError, match=r"unreadable images: 3 of 26; the others are done \(--on-error skip") as e:
            prepare(tmp_path / name, outs[name], vae)
        assert all(f in str(e.value) for f in bad) and "00.png" not in str(e.value)
        assert e.value.__notes__ == [f"{outs[name]} keeps what is done: the same command goes on from there"]
        assert missing(outs[name]) == 3 and not (outs[name] / "meta.json").exists()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="unreadable images: 3 of 26"):  # again
        encoded = stop_at(patch, None)[1]
        prepare(tmp_path / "mended", outs["mended"], vae)
    assert encoded == [] and missing(outs["mended"]) == 3

    with monkeypatch.context() as patch:  # left out: as if they had never been there
        encoded = stop_at(patch, None)[1]
        got = prepare(tmp_path / "skipped", outs["skipped"], vae, on_error="skip")
    assert encoded == [] and "left out 3 unreadable images of 26" in capsys.readouterr().err
    assert got == prepare(tmp_path / "clean", outs["clean"], vae)

    for file in ("a/empty.png", "b/cut.jpg", "b/cut.png"):  # mended: as if they had always been right
        Image.fromarray(noise(SIZE, SIZE, 3)).save(tmp_path / "mended" / file)
    with monkeypatch.context() as patch:
        encoded = stop_at(patch, None)[1]
        got = prepare(tmp_path / "mended", outs["mended"], vae)
    assert sorted(Path(f).name for f in encoded) == sorted(bad)
    assert got == prepare(tmp_path / "mended", tmp_path / "again" / "set", vae)


def test_a_stop_while_images_are_left_out_leaves_no_trace_either(images, vae, tmp_path, monkeypatch):
    root = small(images, tmp_path / "in")
    want = prepare(root, tmp_path / "clean" / "set", vae)
    (root / "a" / "02.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        events, _ = stop_at(patch, None)
        assert prepare(root, tmp_path / "whole" / "set", vae, on_error="skip") == want
    for event in range(events.index("replace") + 1, len(events) + 1):
        out = tmp_path / str(event) / "set"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, event)
            prepare(root, out, vae, on_error="skip")
        if not (out / "meta.json").exists():
            assert prepare(root, out, vae, on_error="skip") == want
        assert {name: (out / name).read_bytes() for name in NAMES} == want


def test_a_class_without_readable_images_is_an_error(images, vae, tmp_path):
    root = small(images, tmp_path / "in")
    (root / "c").mkdir()
    (root / "c" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="class 'c' has no readable images"):
        prepare(root, tmp_path / "set", vae, on_error="skip")


# ---------------------------------------------------------------------------------------------------------------------
# A subset of the classes.


def many_classes(root, n=12):
    for i in range(n):
        (root / f"n{i:02d}").mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(root / f"n{i:02d}" / "0.png")
    return root


def test_classes_draws_a_subset_and_says_which(vae, tmp_path):
    root = many_classes(tmp_path / "in")
    (root / "n00" / "0.png").unlink()  # not asked for: its emptiness does not matter
    drawn = {}
    for seed in (0, 1):
        for name, given in (("pixels", None), ("latents", vae)):
            prepare(root, tmp_path / f"{name}{seed}", given, classes=5, class_seed=seed)
            images, labels, meta = read(tmp_path / f"{name}{seed}")
            assert len(images) == 5 and sorted(labels) == list(range(5)) and meta["class_seed"] == seed
            assert meta["classes"] == sorted(set(meta["classes"])) == drawn.setdefault(seed, meta["classes"])
        images, labels, _ = read(tmp_path / f"pixels{seed}")
        assert [drawn[seed][y] for y in labels] == [f"n{i:02d}" for i in images[:, 0, 0, 0]]
    assert drawn == {0: ["n01", "n02", "n03", "n08", "n11"], 1: ["n02", "n04", "n05", "n07", "n09"]}  # for ever


@pytest.mark.parametrize("n", [0, 13, -1])
def test_more_classes_than_there_are_or_none_are_refused(tmp_path, n):
    with pytest.raises(ValueError, match=f"{n} classes are asked for, .*in has 12"):
        prepare(many_classes(tmp_path / "in"), tmp_path / "set", None, classes=n)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.fixture
def half(images, vae, tmp_path, monkeypatch):
    """The folder of a run that was stopped in its second block, and its images."""
    root, out = small(images, tmp_path / "in"), tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 13)
        prepare(root, out, vae)
    assert missing(out) == 2
    return root, out


def other_vae(tmp_path): return save_vae(tmp_path / "other", latent_channels=C)


@pytest.mark.parametrize(("change", "message"), [
    (lambda root, tmp: {"size": 32}, r"size 16 \(now 32\)$"),
    (lambda root, tmp: {"vae": save_vae(tmp / "other")}, r"vae '.*tiny' \(now '.*other'\)$"),
    (lambda root, tmp: {"vae": None}, r"weights '\w{16}' \(now None\), vae .*, scaling 0.3 \(now None\)$"),
    (lambda root, tmp: {"flip": False}, r"flip True \(now False\)$"),
    (lambda root, tmp: {"held_out": 0.1}, r"held_out 0.2 \(now 0.1\)$"),
    (lambda root, tmp: {"batch": 2}, r"batch 4 \(now 2\)$"),
    (lambda root, tmp: {"classes": 1}, r"classes None \(now 1\), files '6, .*' \(now '3, .*'\), class_seed None"),
    (lambda root, tmp: (root / "a" / "new.png").write_bytes(b"") and {}, r"files '6, sha256 .*' \(now '7, .*'\)$"),
    (lambda root, tmp: (root / "a" / "00.png").rename(root / "a" / "0.png") and {}, r"files '6, .*' \(now '6, .*'\)$"),
    (lambda root, tmp: [f.write_bytes(f.read_bytes() + b"1") for f in root.glob("?/*")] and {}, r"size of .*, size of"),
], ids=["size", "vae", "pixels", "flip", "held_out", "batch", "classes", "more files", "other names", "other content"])
def test_a_run_is_not_continued_with_other_settings_or_files_and_says_which(half, vae, tmp_path, change, message):
    root, out = half
    before, options = contents(out), change(root, tmp_path) or {}
    with pytest.raises(ValueError, match=f"half holds part of another set; .* what differs: {message}") as e:
        folder.prepare(root, out=out, **{"size": SIZE, "held_out": 0.2, "vae": vae, "batch": BATCH, **options})
    assert contents(out) == before and not hasattr(e.value, "__notes__")


def test_other_weights_under_the_same_name_are_another_autoencoder(images, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    name, root = save_vae(tmp_path / "vae"), small(images, tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 13)
        prepare(root, tmp_path / "set", name)
    model = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    model.decoder.conv_in.bias.data += 1  # the decoder does not matter
    model.save_pretrained(name)
    model.encoder.conv_in.bias.data += 1
    model.save_pretrained(tmp_path / "changed")
    shutil.copytree(tmp_path / "changed", tmp_path / "kept")
    shutil.move(name, tmp_path / "first")
    shutil.move(tmp_path / "kept", name)
    with pytest.raises(ValueError, match=r"differs: weights '\w{16}' \(now '\w{16}'\)$"):
        prepare(root, tmp_path / "set", name)
    shutil.rmtree(name)
    shutil.move(tmp_path / "first", name)
    prepare(root, tmp_path / "set", name)


def test_before_the_first_block_is_done_other_settings_lose_nothing(images, vae, tmp_path, monkeypatch):
    root, out = small(images, tmp_path / "in"), tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 8)
        prepare(root, out, vae)
    assert missing(out) == 6
    def copy(*_): shutil.copytree(out, tmp_path / "halfway" / "set"); raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):  # what a kill leaves while other files are laid out
        patch.setattr(np, "save", copy)
        prepare(root, out, vae, flip=False)
    halfway = tmp_path / "halfway" / "set"
    assert np.load(halfway / "tmp.images.npy").shape[1] == 1 and sorted(contents(halfway)) == [rows.DONE, rows.ROWS]
    assert prepare(root, halfway, vae) == prepare(root, tmp_path / "again" / "set", vae)  # back to the first settings
    assert prepare(root, out, vae, flip=False) == prepare(root, tmp_path / "third" / "set", vae, flip=False)


def test_the_folder_may_move_between_two_runs(half, vae, tmp_path, monkeypatch):
    root, out = half
    shutil.move(root, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepare(".", out, vae) == prepare("../elsewhere/", tmp_path / "x" / "half", vae)


def edited(vae, path, drop=None, **config):
    """A copy of the autoencoder with another config.json; `drop`, a file to leave out."""
    shutil.copytree(vae, path)
    if config: (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
    if drop: (path / drop).unlink()
    return str(path)


def lacking(vae, path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(vae, path)
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    decoder = {k: v for k, v in weights.items() if k.startswith("decoder")}
    save_file(decoder, path / "diffusion_pytorch_model.safetensors")
    return str(path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda vae, p: (p.mkdir(), str(p))[1], r"cannot load the autoencoder .*no file named config.json found in"),
    (lambda vae, p: str(p), r"cannot load the autoencoder .*\(offline\?\): We couldn't connect to"),
    (lambda vae, p: "stabilityai/sd-vae-ft-ema", r"cannot load the autoencoder 'stabilityai/sd-vae-ft-ema', neither"),
    (lambda vae, p: edited(vae, p, drop="diffusion_pytorch_model.safetensors"), r"no file named diffusion_pytorch"),
    (lambda vae, p: edited(vae, p, block_out_channels=[4, 4]), r"cannot load the autoencoder .*Error.s. in loading"),
    (lambda vae, p: lacking(vae, p), r"lacks \d+ weights, encoder.conv_in.bias among them$"),
    (lambda vae, p: edited(vae, p, shift_factor=0.1), "also shifts its latents; only a scaling is provided for"),
    (lambda vae, p: save_vae(p, in_channels=1, out_channels=1), "takes 1 channels, images have 3"),
    (lambda vae, p: save_vae(p, block_out_channels=(8,) * 6, down_block_types=("DownEncoderBlock2D",) * 6,
                             up_block_types=("UpDecoderBlock2D",) * 6), "size 16 is not a multiple of 32, the factor"),
], ids=["empty", "nowhere", "offline", "no weights", "other shape", "lacking", "shift", "grey", "factor"])
def test_an_autoencoder_that_cannot_be_had_or_does_not_fit_is_refused_in_one_line(images, vae, tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as e:
        prepare(images, tmp_path / "set", make(vae, tmp_path / "vae"))
    assert "\n" not in str(e.value) and not (tmp_path / "set").exists()


def test_the_weights_of_older_diffusers_are_read_too(plain, images, vae, tmp_path):
    """The published Stable Diffusion autoencoders name the weights of their attention so."""
    from safetensors.torch import load_file, save_file

    file = "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def rename(k): return next((k.replace(f".{a}.", f".{b}.") for a, b in old.items() if f".{a}." in k), k)
    weights = load_file(Path(vae, file))
    assert sum(rename(k) != k for k in weights) == 16
    save_file({rename(k): v for k, v in weights.items()}, Path(edited(vae, tmp_path / "old", drop=file), file))
    prepare(images, tmp_path / "set", str(tmp_path / "old"))
    assert (tmp_path / "set" / "images.npy").read_bytes() == (plain / "images.npy").read_bytes()


def test_without_diffusers_it_says_what_to_install(images, vae, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="latents need diffusers: pip install diffusers safetensors"):
        prepare(images, tmp_path / "set", vae)


def test_grey_latents_and_shared_pixels_are_refused(images, vae, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--vae and --gray exclude each other"):
        prepare(images, tmp_path / "set", vae, gray=True)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        prepare(images, tmp_path / "set", vae, batch=0)
    monkeypatch.setattr(folder, "torchrun", lambda: (0, 2, None))
    with pytest.raises(ValueError, match="torchrun is for --vae"):
        prepare(images, tmp_path / "set", None)


def test_a_disk_without_room_is_refused_before_the_start(half, images, vae, tmp_path, monkeypatch):
    a_row = 2 * 2 * C * 8 * 8 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("usage", (), {"free": N * a_row - 1}))
    with pytest.raises(ValueError, match=r"set needs 0.0 GB, and its disk has 0.0 GB left"):
        prepare(images, tmp_path / "set", vae)
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("usage", (), {"free": 2 * a_row}))
    prepare(*half, vae)  # two rows are missing


def test_a_disk_that_fills_up_is_named_and_what_is_done_is_kept(images, vae, plain, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    def full(fd):
        synced.append(fd)
        if len(synced) == 4: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as e:
        patch.setattr(os, "fsync", full)
        prepare(images, tmp_path / "set", vae)
    assert "the same command goes on from there" in e.value.__notes__[0] and missing(tmp_path / "set") == N - 3 * BATCH
    assert prepare(images, tmp_path / "set", vae) == contents(plain)


def test_a_prepared_set_of_latents_is_not_written_over(plain, images, vae):
    before = contents(plain)
    with pytest.raises(ValueError, match="already holds a prepared set"):
        prepare(images, plain, vae)
    assert contents(plain) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_latents_that_are_not_finite_name_their_image(images, vae, tmp_path, monkeypatch, value):
    from latents import Encoder

    files, made = files_in_order(images), []
    def poisoned(self, *a, init=Encoder.__init__):
        init(self, *a)
        encode = self.vae.encode
        def wrong(x):
            made.append(x)
            posterior = encode(x).latent_dist
            if len(made) == 4: posterior.mean[2, 0, 3, 3] = value  # of the mirror image of the seventh image
            return type("output", (), {"latent_dist": posterior})
        self.vae.encode = wrong
    monkeypatch.setattr(Encoder, "__init__", poisoned)
    with pytest.raises(ValueError, match=f"the latents of {files[6]} are not finite"):
        prepare(images, tmp_path / "set", vae)
    assert missing(tmp_path / "set") == N - BATCH


def test_a_gpu_without_enough_memory_says_what_to_do(images, vae, tmp_path, monkeypatch):
    from latents import Encoder

    encoder = Encoder(vae, SIZE, True)
    def full(x): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(encoder.vae, "encode", full)
    with pytest.raises(ValueError, match="the GPU cannot take 4 images at once; --batch says how many"):
        encoder(np.zeros((4, 3, SIZE, SIZE), np.uint8), {})


def command_line(monkeypatch, *argv):
    """Exit code of the script with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    with pytest.raises(SystemExit) as e: folder.main()
    return e.value.code


def test_the_command_line_reports_an_error_in_one_line(images, vae, tmp_path, monkeypatch, capsys):
    assert command_line(monkeypatch, *arguments(images, tmp_path / "set", tmp_path / "no" / "vae", "--workers", 1)) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1
    assert stderr.startswith("prepare.py: error: cannot load the autoencoder")


def test_an_interrupted_run_says_how_to_go_on(images, vae, tmp_path, monkeypatch, capsys):
    import latents

    def interrupted(self, *_): raise KeyboardInterrupt
    monkeypatch.setattr(latents.Encoder, "__call__", interrupted)
    assert command_line(monkeypatch, *arguments(images, tmp_path / "set", vae, "--workers", 1)) == 130
    assert capsys.readouterr().err == (
        f"prepare.py: error: interrupted\n{tmp_path}/set keeps what is done: the same command goes on from there\n")


def test_vae_alone_is_the_published_one(images, tmp_path, monkeypatch, capsys):
    assert command_line(monkeypatch, images, "--size", SIZE, "--out", tmp_path / "set", "--vae", "--workers", 1) == 2
    assert "cannot load the autoencoder 'stabilityai/sd-vae-ft-ema'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Training on them.


MODEL = replace(CONFIG, in_channels=C)


def sure(tmp_path, n=24, **meta):
    """A set whose posteriors have no width: image i is i as it is and -i mirrored, in every entry."""
    images = np.zeros((n, 2, 2 * C, 8, 8), np.float16)
    images[:, 0, :C], images[:, 1, :C] = np.arange(n)[:, None, None, None], -np.arange(n)[:, None, None, None]
    return Data(write_set(tmp_path / "sure", images, np.arange(n) % 10, **{
        "flip": True, "held_out": 4, "vae": "a/vae", "scaling": 0.5, "pixels": SIZE, **meta}), MODEL)


def test_a_visit_takes_the_image_or_its_mirror_image_scaled(tmp_path):
    data, flipped = sure(tmp_path), 0
    for step in range(100):
        x, y, *_ = data.batch(0, step, 8, range(8), 0.0)
        assert x.dtype == torch.float32 and (x == x[:, :1, :1, :1]).all()
        number = x[:, 0, 0, 0] / 0.5
        assert number.abs().max() < 20 and (number.abs().long() % 10 == y).all()
        flipped += (number < 0).sum().item()
    assert abs(flipped / 800 - 0.5 * 19 / 20) < 0.07  # image 0 has no sign
    x, y, *_ = data.held_out()
    assert x[:, 0, 0, 0].tolist() == [10.0, 10.5, 11.0, 11.5] and y.tolist() == [0, 1, 2, 3]


def test_over_many_visits_x_has_the_mean_and_deviation_of_the_posterior(plain):
    data, visits = Data(plain, MODEL), 3000
    for row, flip in ((0, False), (3, True)):
        data.meta["flip"] = flip
        x = np.stack([data.item(row, generator(0, 1, i), flip, 0.0)[0] for i in range(visits)])
        drawn = x.reshape(visits, -1)
        if flip:  # two Gaussians, half of the visits each: told apart by which the whole image is nearer to
            mean = data.images[row, :, :C].astype(np.float64) * 0.3
            near = ((x[:, None] - mean) ** 2).sum((2, 3, 4)).argmin(1)
            assert abs(near.mean() - 0.5) < 0.05
        for view in (0, 1) if flip else (0,):
            part = drawn[near == view] if flip else drawn
            mean, std = (z.astype(np.float64).ravel() * 0.3 for z in np.split(data.images[row, view], 2))
            assert (np.abs(part.mean(0) - mean) < 5 * std / len(part) ** 0.5).all()
            assert (np.abs(part.std(0) / std - 1) < 5 / (2 * len(part)) ** 0.5).all()
            z = (part - mean) / std
            assert abs((z**4).mean() / 3 - 1) < 0.05  # normal, not just of that width
    x, _, _, noise = (np.stack(z) for z in zip(*(data.item(0, generator(0, 1, i), False, 0.0) for i in range(300))))
    assert abs(np.corrcoef(x.ravel() - np.tile(x.mean(0).ravel(), 300), noise.ravel())[0, 1]) < 0.03  # two draws


@pytest.mark.parametrize("world", [2, 4, 8])
def test_shares_of_all_ranks_are_the_batch_of_one_process_bit_for_bit(plain, world):
    data, again = Data(plain, MODEL), Data(plain, MODEL)
    for step in range(4):
        whole = data.batch(0, step, 8, range(8), 0.5)
        shares = [again.batch(0, step, 8, range(r * 8 // world, (r + 1) * 8 // world), 0.5) for r in range(world)]
        assert not differing(whole, [torch.cat(z) for z in zip(*shares)])
    assert differing(whole, data.batch(1, step, 8, range(8), 0.5))


def test_the_order_of_an_epoch_is_that_of_its_own_seed(tmp_path):
    """Also if a batch of the same epoch was just drawn with another seed."""
    data = sure(tmp_path)
    want = data.batch(7, 0, 8, range(8), 0.0)
    data.batch(3, 0, 8, range(8), 0.0)
    assert not differing(want, data.batch(7, 0, 8, range(8), 0.0))


def test_the_held_out_batch_never_changes(plain):
    data = Data(plain, MODEL)
    first = data.held_out()
    data.batch(0, 5, 8, range(8), 0.5)
    assert len(first[0]) == 5 and not differing(first, data.held_out())
    assert first[1].tolist() == np.load(plain / "labels.npy")[-5:].tolist()
    mean = torch.from_numpy(data.images[-5:, 0, :C].astype(np.float32)) * 0.3
    assert (first[0] != mean).all()  # a draw, as in training, but a fixed one


@pytest.fixture
def run(plain, tmp_path):
    return replace(RUN, data=str(plain), out=str(tmp_path / "out"))


def test_training_on_latents_resumes_to_the_same_bits(run, vae, tmp_path, monkeypatch):
    train(MODEL, run)
    batch, broken = Data.batch, replace(run, out=str(tmp_path / "broken"))
    def unreadable(self, seed, step, *rest):
        if step == 5: raise OSError("the disk is gone")
        return batch(self, seed, step, *rest)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Data, "batch", unreadable)
        train(MODEL, broken)
    assert load_checkpoint(Path(broken.out, "ckpt.pt"))["step"] == 3
    assert train(MODEL, broken, resume=True) == 6
    assert not differing(parts(run.out), parts(broken.out))
    assert without_speed(read_log(run.out)) == without_speed(read_log(broken.out))
    meta = load_checkpoint(Path(run.out, "ckpt.pt"))["meta"]
    assert meta["vae"] == vae and meta["scaling"] == 0.3 and meta["pixels"] == SIZE


def test_a_run_is_not_resumed_on_latents_of_another_scaling(run, plain, tmp_path):
    train(MODEL, replace(run, steps=1))
    before = contents(Path(run.out))
    shutil.copytree(plain, tmp_path / "other" / "set")
    for scaling, text in ((0.18215, "0.18215"), (None, "None")):
        meta = json.loads((plain / "meta.json").read_text()) | {"scaling": scaling}
        if scaling is None:
            del meta["scaling"]
            np.save(tmp_path / "other/set/images.npy", np.zeros((N, C, 8, 8), np.uint8))
        (tmp_path / "other/set/meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=rf"another configuration: scaling 0.3 \(now {text}\)"):
            train(MODEL, replace(run, data=str(tmp_path / "other/set")), resume=True)
        assert contents(Path(run.out)) == before


@pytest.mark.parametrize(("config", "message"), [
    (replace(MODEL, in_channels=4), r"set: float16 \(2, 4, 8, 8\), but the model reads float16 \(2, 8, 8, 8\)"),
    (replace(MODEL, input_size=16), r"set: float16 \(2, 4, 8, 8\), but the model reads float16 \(2, 4, 16, 16\)"),
])
def test_a_model_of_another_size_is_refused(plain, config, message):
    with pytest.raises(ValueError, match=message):
        Data(plain, config)


def test_latents_and_pixels_are_not_taken_for_each_other(plain, tmp_path):
    images, labels, meta = read(plain)
    del meta["scaling"]
    with pytest.raises(ValueError, match=r"float16 \(2, 4, 8, 8\), but the model reads uint8 \(2, 8, 8\)"):
        Data(write_set(tmp_path / "set", images, labels, **meta), MODEL)
    with pytest.raises(ValueError, match=r"float16 \(2, 4, 8, 8\), but the model reads float16 \(1, 4, 8, 8\)"):
        Data(write_set(tmp_path / "other", images, labels, **meta | {"flip": False, "scaling": 1.0}), MODEL)


def test_missing_latents_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it: python data/imagefolder/prepare\.py ROOT --size 256 --vae"):
        Data(tmp_path / "imagenet256", Config())


def test_docs_name_every_field_of_meta(plain):
    text = (ROOT / "data" / "README.md").read_text()
    assert all(f"`{name}`" in text for name in [*read(plain)[2], "class_seed"])


if __name__ == "__main__":
    killed(*sys.argv[1:])
