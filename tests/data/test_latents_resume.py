"""Latents: kills and the number of processes do not change the bytes; what is not continued."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from folders import noise, spoil
from latent_sets import (
    BATCH,
    SCRIPT,
    SIZE,
    Killed,
    N,
    arguments,
    files_in_order,
    folder,
    missing,
    prepare,
    rows,
    save_vae,
    small,
    stop_at,
)
from PIL import Image
from runs import ROOT, SET_FILES, contents, finish, forked, read_set, start, torchrun

pytestmark = pytest.mark.usefixtures("cpu")
KILLED = ROOT / "tests" / "data" / "killed_prepare.py"

# ----------------------------------------------------------------------------------------------
# The same bytes, whatever happened on the way.


def test_a_stop_before_any_change_on_the_disk_leaves_no_trace_in_the_end(
    images, vae, tmp_path, monkeypatch
):
    root = small(images, tmp_path / "in")
    with monkeypatch.context() as patch:
        events, _ = stop_at(patch, None)
        want = prepare(root, tmp_path / "whole" / "set", vae)
    assert sorted(want) == SET_FILES and events.count("put") == 8 and len(events) > 20
    for event in range(1, len(events) + 1):
        out = tmp_path / str(event) / "set"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            _, before = stop_at(patch, event)
            prepare(root, out, vae)
        if (out / "meta.json").exists():  # complete, but for the tidying up
            assert {name: (out / name).read_bytes() for name in SET_FILES} == want
            continue
        done = np.zeros(6)
        if (out / rows.PLAN).exists():
            done = np.load(out / rows.DONE)["size"]
        with monkeypatch.context() as patch:
            _, after = stop_at(patch, None)
            got = prepare(root, out, vae)
        assert got == want, f"stopped before event {event}: {events[event - 1]}"
        remaining = np.array(files_in_order(root))[done == 0]
        assert sorted(after) == sorted(remaining), "no row is done twice"
        assert len(set(before) & set(after)) <= BATCH, "at most a block is lost"


def test_one_rank_is_killed_and_two_go_on_without_touching_what_is_done(
    plain, images, vae, tmp_path
):
    out, want = tmp_path / "set", read_set(plain)[0]
    synced, sync = [], rows.Rows.sync

    def killed():
        """When it has written three blocks, before it marks the third as done."""

        def count(self):
            sync(self)
            synced.append(self)
            if len(synced) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        rows.Rows.sync = count
        prepare(images, out, vae)

    assert forked(killed) == -signal.SIGKILL and missing(out) == N - 2 * BATCH
    assert not set(contents(out)) & set(SET_FILES)
    marks = np.load(out / rows.DONE)
    done = marks["size"] > 0
    half = np.load(out / rows.ROWS, mmap_mode="r+")
    assert np.array_equal(half[done], want[done])
    half[done] = 7  # to be recognised
    half.flush()
    for i in np.flatnonzero(done):  # as if 7 had been written
        marks[i] = rows.marked(half[i], marks["size"][i], 0)
    np.save(out / rows.DONE, marks)
    two = ["--standalone", "--nproc_per_node=2", SCRIPT]
    process = torchrun(*two, *arguments(images, out, vae))
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    line = f"{out}: set, images (23, 2, 4, 8, 8) float16, 3 classes, 5 held out, 0.02 MB\n"
    assert stdout == line
    latents = read_set(out)[0]
    assert (latents[done] == 7).all() and np.array_equal(latents[~done], want[~done])
    got, others = contents(out), contents(plain)
    assert got.keys() == others.keys()
    assert all(got[name] == others[name] for name in ("labels.npy", "meta.json"))


def test_one_of_two_ranks_is_killed_and_one_with_workers_goes_on(plain, images, vae, tmp_path):
    out = tmp_path / "set"
    two = ["--standalone", "--nproc_per_node=2", KILLED]
    process = torchrun(*two, 2, 1, *arguments(images, out, vae))
    _, stderr = finish(process)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in stderr
    assert missing(out) >= 2 * BATCH - 1  # two of rank 1's three blocks, the last of them short
    process = start(SCRIPT, *arguments(images, out, vae, workers=2))
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert contents(out) == contents(plain)


class Store(dict):
    """A stand-in for torchrun's store, for ranks that take turns in one process."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def add(self, key, n):
        self[key] = dict.get(self, key, 0) + n
        return self[key]


SHAPE = (2, 1, 1, 1)  # of a row of two_ranks
FILES = [f"{i}.png" for i in range(N)]


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """rows.fill by rank 1, then by rank 0, with two unreadable files.

    A row gets the rank plus 1. Returns the folder, {rank: its calls of encode}, {rank: the
    unreadable rows it hears of}, and the numbers that the progress bar showed.
    """
    store, shown, calls, bad = Store(), [], {0: [], 1: []}, {}
    monkeypatch.setattr(rows, "progress", lambda total, quiet: shown.append)

    def read(file):
        image = np.zeros((3, 2, 2), np.uint8)
        if file in ("5.png", "9.png"):
            return image, 0, False, "torn"
        return image, len(file or ""), False, None

    for rank in (0, 1):
        rows.begin(tmp_path, {"a": 1}, FILES, np.float16, SHAPE, (rank, 2, store))
    for rank in (1, 0):

        def encode(x, readable, rank=rank):
            calls[rank].append((len(x), list(readable.values())))
            return np.full((len(x), *SHAPE), rank + 1, np.float16)

        bad[rank] = rows.fill(tmp_path, FILES, BATCH, read, encode, 1, (rank, 2, store))
    return tmp_path, calls, bad, shown


def test_ranks_take_turns_with_the_blocks(two_ranks):
    whole = [FILES[i : i + BATCH] for i in range(0, N, BATCH)]
    _, calls, _, _ = two_ranks
    assert [files for _, files in calls[0]] == [whole[0], ["8.png", "10.png", "11.png"], whole[4]]
    assert [files for _, files in calls[1]] == [["4.png", "6.png", "7.png"], whole[3], whole[5]]


def test_a_block_is_encoded_whole_with_unreadable_images_in_it(two_ranks):
    _, calls, _, _ = two_ranks
    assert [n for n, _ in calls[0]] == [4, 4, 4] and [n for n, _ in calls[1]] == [4, 4, 3]


def test_every_readable_row_is_written_and_marked_as_done(two_ranks):
    out, *_ = two_ranks
    filled, done = np.load(out / rows.ROWS)[:, 0, 0, 0, 0], np.load(out / rows.DONE)["size"]
    bad = (5, 9)
    assert filled.tolist() == [0 if i in bad else 1 + i // BATCH % 2 for i in range(N)]
    assert done.tolist() == [0 if i in bad else len(f) for i, f in enumerate(FILES)]


def test_rank_0_hears_of_all_unreadable_images_and_counts_all_images(two_ranks):
    _, _, bad, shown = two_ranks
    assert bad == {1: {5: "torn"}, 0: {5: "torn", 9: "torn"}}
    assert shown == [4, 8, 11, 15, 19, 23]


def test_ranks_with_other_settings_are_refused(tmp_path):
    store = Store()
    rows.begin(tmp_path, {"a": 1}, FILES, np.float16, SHAPE, (0, 2, store))
    with pytest.raises(ValueError, match="rank 1 finds other files or settings than rank 0"):
        rows.begin(tmp_path, {"a": 2}, FILES, np.float16, SHAPE, (1, 2, store))


def alive(pid):
    """Whether a process runs, and is no zombie."""
    return os.path.exists(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the children in /proc")
def test_a_killed_run_leaves_no_workers_behind(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    first = tmp_path / "in" / "a" / "0.png"
    Image.fromarray(noise(1500, 1500, 3)).save(first, compress_level=0)
    for i in range(400):
        os.link(first, tmp_path / "in" / "a" / f"{i + 1}.png")
    how = ["--size=8", "--out", tmp_path / "out", "--workers=2"]
    process = start(SCRIPT, tmp_path / "in", *how)
    children, end = [], time.time() + 60
    while len(children) < 3 and time.time() < end:  # two workers, and Python's resource tracker
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()  # a living child holds the other end
    end = time.time() + 20
    while any(map(alive, children)) and time.time() < end:
        time.sleep(0.05)
    orphans = [pid for pid in children if alive(pid)]
    for pid in orphans:
        os.kill(int(pid), signal.SIGKILL)
    assert len(children) == 3 and orphans == []


def test_a_disk_that_fills_up_is_named_and_what_is_done_is_kept(
    images, vae, plain, tmp_path, monkeypatch
):
    synced, fsync, out = [], os.fsync, tmp_path / "set"

    def full(fd):
        synced.append(fd)
        if len(synced) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as e:
            prepare(images, out, vae)
    assert "the same command goes on from there" in e.value.__notes__[0]
    assert missing(out) == N - 3 * BATCH
    assert prepare(images, out, vae) == contents(plain)


# ----------------------------------------------------------------------------------------------
# Unreadable images.


@pytest.fixture
def spoiled(images, vae, tmp_path):
    """A run that met unreadable images: their folder, the folder of the set, their names."""
    root, out = tmp_path / "spoiled", tmp_path / "out" / "set"
    shutil.copytree(images, root)
    bad = spoil(root)
    message = r"unreadable images: 3 of 26; the others are done \(--on-error skip"
    with pytest.raises(ValueError, match=message) as e:
        prepare(root, out, vae)
    assert all(name in str(e.value) for name in bad) and "00.png" not in str(e.value)
    assert e.value.__notes__ == [f"{out} keeps what is done: the same command goes on from there"]
    return root, out, bad


def encoded_by(monkeypatch, *args, **options):
    """The names of the files that a run encodes, and the bytes that it leaves."""
    with monkeypatch.context() as patch:
        encoded = stop_at(patch, None)[1]
        got = prepare(*args, **options)
    return sorted(Path(file).name for file in encoded), got


def test_unreadable_images_are_missing_and_the_rest_is_kept(spoiled):
    _, out, _ = spoiled
    assert missing(out) == 3 and not (out / "meta.json").exists()


def test_the_same_command_lists_unreadable_images_again_and_encodes_nothing(
    spoiled, vae, monkeypatch
):
    root, out, _ = spoiled
    with monkeypatch.context() as patch:
        encoded = stop_at(patch, None)[1]
        with pytest.raises(ValueError, match="unreadable images: 3 of 26"):
            prepare(root, out, vae)
    assert encoded == [] and missing(out) == 3


def test_skipped_images_might_never_have_been_there(spoiled, images, vae, monkeypatch, capsys):
    root, out, _ = spoiled
    encoded, got = encoded_by(monkeypatch, root, out, vae, on_error="skip")
    assert encoded == []
    assert "left out 3 unreadable images of 26" in capsys.readouterr().err
    assert got == prepare(images, out.parent / "clean" / "set", vae)


def test_mended_images_might_always_have_been_right(spoiled, vae, monkeypatch):
    root, out, bad = spoiled
    for file in ("a/empty.png", "b/cut.jpg", "b/cut.png"):
        Image.fromarray(noise(SIZE, SIZE, 3)).save(root / file)
    encoded, got = encoded_by(monkeypatch, root, out, vae)
    assert encoded == sorted(bad)
    assert got == prepare(root, out.parent / "again" / "set", vae)


def test_a_stop_while_images_are_left_out_leaves_no_trace_either(
    images, vae, tmp_path, monkeypatch
):
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
        assert {name: (out / name).read_bytes() for name in SET_FILES} == want


# ----------------------------------------------------------------------------------------------
# What is not continued.


@pytest.fixture
def half(images, vae, tmp_path, monkeypatch):
    """The images and the folder of a run that was stopped in its second block."""
    root, out = small(images, tmp_path / "in"), tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 13)
        prepare(root, out, vae)
    assert missing(out) == 2
    return root, out


def another_file(root):
    (root / "a" / "new.png").write_bytes(b"")


def another_name(root):
    (root / "a" / "00.png").rename(root / "a" / "0.png")


def other_contents(root):
    for file in root.glob("?/*"):
        file.write_bytes(file.read_bytes() + b"1")


OTHER_OPTIONS = [
    ({"size": 32}, r"size 16 \(now 32\)$"),
    ({"vae": None}, r"weights '\w{16}' \(now None\), vae .*, scaling 0.3 \(now None\)$"),
    ({"flip": False}, r"flip True \(now False\)$"),
    ({"held_out": 0.1}, r"held_out 0.2 \(now 0.1\)$"),
    ({"batch": 2}, r"batch 4 \(now 2\)$"),
    ({"classes": 1}, r"classes None \(now 1\), files '6, .*' \(now '3, .*'\), class_seed None"),
]
OTHER_FILES = [
    (another_file, r"files '6, sha256 .*' \(now '7, .*'\)$"),
    (another_name, r"files '6, .*' \(now '6, .*'\)$"),
    (other_contents, r"size of .*, size of"),
]


def refuse_to_continue(root, out, message, **options):
    """It names what differs, and changes nothing."""
    before, size = contents(out), options.pop("size", SIZE)
    message = f"half holds part of another set; .* what differs: {message}"
    with pytest.raises(ValueError, match=message) as e:
        folder.prepare(root, size, out, **{"held_out": 0.2, "batch": BATCH, **options})
    assert contents(out) == before and not hasattr(e.value, "__notes__")


@pytest.mark.parametrize("options, message", OTHER_OPTIONS, ids=lambda x: str(x)[:15])
def test_a_run_is_not_continued_with_other_options(half, vae, options, message):
    refuse_to_continue(*half, message, **{"vae": vae, **options})


def test_a_run_is_not_continued_with_another_autoencoder(half, tmp_path):
    other = save_vae(tmp_path / "other")
    refuse_to_continue(*half, r"vae '.*tiny' \(now '.*other'\)$", vae=other)


@pytest.mark.parametrize("change, message", OTHER_FILES)
def test_a_run_is_not_continued_with_other_files(half, vae, change, message):
    root, out = half
    change(root)
    refuse_to_continue(root, out, message, vae=vae)


def test_other_weights_under_the_same_name_are_another_autoencoder(images, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    name, root, out = save_vae(tmp_path / "vae"), small(images, tmp_path / "in"), tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 13)
        prepare(root, out, name)
    model = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    model.decoder.conv_in.bias.data += 1  # it does not change the latents
    model.save_pretrained(name)
    shutil.copytree(name, tmp_path / "kept")
    model.encoder.conv_in.bias.data += 1
    model.save_pretrained(name)
    refuse_to_continue(root, out, r"weights '\w{16}' \(now '\w{16}'\)$", vae=name)
    shutil.rmtree(name)
    shutil.move(tmp_path / "kept", name)
    prepare(root, out, name)


def test_before_the_first_block_is_done_other_settings_lose_nothing(
    images, vae, tmp_path, monkeypatch
):
    root, out = small(images, tmp_path / "in"), tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 8)
        prepare(root, out, vae)
    assert missing(out) == 6
    want = prepare(root, tmp_path / "other" / "set", vae, flip=False)
    assert prepare(root, out, vae, flip=False) == want


def test_a_kill_between_two_settings_loses_nothing(images, vae, tmp_path, monkeypatch):
    """The files of the second are laid out over those of the first; then the first comes back."""
    root, out = small(images, tmp_path / "in"), tmp_path / "first" / "set"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 8)
        prepare(root, out, vae)
    left = tmp_path / "left" / "set"  # as a kill leaves it, before prepare tidies up

    def kill(*_):
        shutil.copytree(out, left)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "save", kill)
        prepare(root, out, vae, flip=False)
    assert np.load(left / rows.ROWS).shape[1] == 1, "of the second settings"
    assert sorted(contents(left)) == [".lock", rows.DONE, rows.ROWS]
    assert prepare(root, left, vae) == prepare(root, tmp_path / "again" / "set", vae)


def test_the_folder_may_move_between_two_runs(half, vae, tmp_path, monkeypatch):
    root, out = half
    shutil.move(root, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepare(".", out, vae) == prepare("../elsewhere/", tmp_path / "x" / "half", vae)


def test_a_disk_with_room_for_the_rows_that_are_missing_is_enough(half, vae, monkeypatch):
    root, out = half
    two_rows = np.load(out / rows.ROWS, mmap_mode="r")[:2].nbytes
    usage = type("usage", (), {"free": two_rows})
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)
    prepare(root, out, vae)
