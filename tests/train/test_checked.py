"""What is read back is checked: checkpoints before a run goes on, data, the log, exports."""

import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    CONFIG,
    ROOT,
    at_step,
    contents,
    differing,
    parts,
    read_log,
    resume,
    without_speed,
    write_set,
)

import dydilit
from dydilit import DyDiLiT, learning_rate, save_checkpoint, stop_signals, train
from support import pretrained
from support.pretrained import load

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def ended(run):
    """A run that has ended, to be continued for two more steps."""
    train(CONFIG, run)
    return replace(run, steps=8)


@pytest.fixture
def model(tmp_path):
    """A model with a history, and the folder that it was exported to."""
    model = DyDiLiT(CONFIG).eval()
    model.meta, model.step = {"name": "made up", "classes": list("abcdefghij")}, 6
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def refusal(action, *names):
    """The one line of the ValueError, which has these words."""
    with pytest.raises(ValueError) as e:
        action()
    line = str(e.value)
    assert "\n" not in line and all(name in line for name in names), line
    return line


def same(a, b):
    return not differing(dict(a.state_dict()), dict(b.state_dict()))


# ----------------------------------------------------------------------------------------------
# Checkpoints.


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_bit_of_a_weight_that_changed_is_told(ended):
    file = Path(ended.out, "ckpt.pt")
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flip(file, largest.header_offset + 200 + largest.file_size // 2)
    before = contents(ended.out)
    for read in (DyDiLiT.from_pretrained, load, lambda _: resume(CONFIG, ended)):
        refusal(lambda read=read: read(file), str(file), "has changed since it was written")
    assert contents(ended.out) == before


def change(ckpt, part, name, value):
    if part == "optimizer":
        ckpt["optimizer"]["state"][0][name] = value
    elif part == "group":
        ckpt["optimizer"]["param_groups"][0][name] = value
    elif part:
        ckpt[part][name] = value
    else:
        ckpt[name] = value


WRONG = [
    ("optimizer", "exp_avg", torch.zeros(3), "exp_avg is float32 (3,), but its model has float32"),
    ("optimizer", "exp_avg_sq", None, "exp_avg_sq is NoneType None"),
    ("optimizer", "step", torch.tensor(5.0), "step is 5, but step is 6"),
    ("group", "betas", (0.5, 0.5), "betas is (0.5, 0.5), but training has (0.9, 0.999)"),
    ("group", "params", [0], "params is [0]"),
    ("model", "x_embedder.proj.bias", torch.zeros(16).half(), "is float16 (16,), but"),
    ("ema", "pos_embed", torch.zeros(1, 16, 15), "ema: pos_embed is float32 (1, 16, 15)"),
    ("ema", "extra", torch.zeros(3), "extra is none of its model's"),
    (None, "model", {}, "model: pos_embed is missing"),
    (None, "step", "6", "step must be of type int, got '6'"),
    (None, "step", True, "step must be of type int, got True"),
    (None, "meta", torch.zeros(3, 3), "meta must be of type dict, got tensor([[0., 0., 0.],"),
    (None, "meta", None, "meta must be of type dict"),
    (None, "config", {"depth": torch.zeros(2)}, "config must hold texts and numbers"),
]


@pytest.mark.parametrize("part, name, value, message", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_checkpoint_with_a_wrong_entry_is_refused_by_its_name(ended, part, name, value, message):
    file = Path(ended.out, "ckpt.pt")
    ckpt = torch.load(file)
    change(ckpt, part, name, value)
    save_checkpoint(file, ckpt)
    before = contents(ended.out)
    refusal(lambda: resume(CONFIG, ended), str(file), message)
    assert contents(ended.out) == before


def test_moments_that_share_their_memory_are_refused(ended):
    """Of the right shape, but one number behind it: AdamW would write beyond its end."""
    file = Path(ended.out, "ckpt.pt")
    ckpt = torch.load(file)
    moments = ckpt["optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(1).expand(moments["exp_avg"].shape)
    save_checkpoint(file, ckpt)
    refusal(lambda: resume(CONFIG, ended), str(file), "exp_avg", "strides")


# ----------------------------------------------------------------------------------------------
# The data of a run.


@pytest.fixture
def on_grey(run, tmp_path):
    """A run on its own copy of a small set."""
    data = write_set(tmp_path / "grey", np.full((12, 1, 8, 8), 9, np.uint8), np.zeros(12, np.int64))
    run = replace(run, data=str(data))
    train(CONFIG, run)
    return replace(run, steps=8)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_run_does_not_go_on_with_other_images_or_labels(on_grey, name):
    file = Path(on_grey.data, f"{name}.npy")
    changed = np.load(file)
    changed[5] += 1
    np.save(file, changed)
    refusal(lambda: resume(CONFIG, on_grey), "ckpt.pt was trained on other images or labels")


def test_a_checkpoint_that_is_older_than_the_checksum_of_data_goes_on(on_grey):
    file = Path(on_grey.out, "ckpt.pt")
    ckpt = torch.load(file)
    del ckpt["meta"]["crc32"]
    save_checkpoint(file, ckpt)
    assert resume(CONFIG, on_grey) == 8


def test_a_checkpoint_without_a_newer_field_had_its_default(on_grey):
    file = Path(on_grey.out, "ckpt.pt")
    ckpt = torch.load(file)
    del ckpt["training"]["tf32"], ckpt["config"]["label_std"]
    save_checkpoint(file, ckpt)
    refusal(lambda: resume(CONFIG, replace(on_grey, tf32=True)), "tf32 False (now True)")
    assert resume(CONFIG, on_grey) == 8


def test_of_a_large_set_some_rows_and_all_labels_are_compared(tmp_path):
    shape = (4096, 1, 264, 264)
    folder = write_set(tmp_path / "large", np.zeros((1, 1, 1, 1), np.uint8), np.arange(4096) % 10)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)  # sparse
    began = time.process_time()
    first = dydilit.Data(folder, CONFIG).meta["crc32"]
    assert time.process_time() - began < 1
    images[::9] = 1  # the rows that are read
    assert dydilit.Data(folder, CONFIG).meta["crc32"] != first


# ----------------------------------------------------------------------------------------------
# The log.

STRANGE = [b"\n", b"3\n", b"{}\n", b"null\n", b'{"step": 1}\n', b"\xff\xfe\n", b"[" * 10**5 + b"\n",
           b'{"step": "1", "loss": 1}\n', b"\0" * 512 + b"\n"]  # fmt: skip


@pytest.mark.parametrize("line", STRANGE, ids=range(len(STRANGE)))
def test_a_log_that_cannot_be_read_is_put_aside_and_goes_on(ended, line, tmp_path, capsys):
    log = Path(ended.out, "log.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    broken = log.read_bytes()
    assert resume(CONFIG, ended) == 8
    assert Path(f"{log}.1").read_bytes() == broken
    said = capsys.readouterr().err
    assert said.startswith(f"{log} cannot be read (line 3 ") and said.count("\n") == 1
    assert [entry["step"] for entry in read_log(ended.out)] == list(range(1, 9))


def test_a_folder_in_place_of_the_log_is_put_aside(ended):
    log = Path(ended.out, "log.jsonl")
    log.unlink()
    log.mkdir()
    Path(f"{log}.1").write_text("of before")
    assert resume(CONFIG, ended) == 8
    assert Path(f"{log}.2").is_dir() and Path(f"{log}.1").read_text() == "of before"


def test_a_log_is_cut_in_bytes(ended):
    """A line with letters of several bytes, before lines after the checkpoint."""
    log, file = Path(ended.out, "log.jsonl"), Path(ended.out, "ckpt.pt")
    lines = log.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"note": "größer"}, ensure_ascii=False)
    log.write_text("\n".join([*lines, '{"step": 7, "loss": 1.0}', '{"step": 8, "lo']), "utf-8")
    before = parts(ended.out)
    assert resume(CONFIG, replace(ended, steps=6)) == 6
    assert log.read_text("utf-8") == "\n".join([*lines, ""])
    assert not differing(parts(ended.out), before) and file.exists()


# ----------------------------------------------------------------------------------------------
# Exports.


def test_an_export_is_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        DyDiLiT(CONFIG).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("calls", [1, 2])
def test_an_export_that_is_killed_between_its_files_leaves_one_of_the_models(
    model, monkeypatch, calls
):
    class Killed(BaseException):
        pass

    old, folder = model
    new = DyDiLiT(CONFIG)
    new.step, real, seen = 7, os.replace, []

    def replace_or_die(source, target):
        seen.append(target)
        if len(seen) == calls:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(Killed):
        new.save_pretrained(folder)
    for read in (DyDiLiT.from_pretrained, load):
        found = read(folder)
        one = old if calls == 1 else new
        assert found.step == one.step and same(found, one)


def test_a_full_disk_leaves_the_export_of_before(model):
    folder = model[1]
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 1000, len(before["model.safetensors"]) // 2):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError) as e:
                DyDiLiT(CONFIG).save_pretrained(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(e.value) and contents(folder) == before


def test_weights_of_an_export_that_changed_are_told(model):
    file = model[1] / "model.safetensors"
    flip(file, file.stat().st_size - 1000)
    refusal(lambda: load(model[1]), str(model[1]), "checksum")
    refusal(lambda: load(file), str(model[1]), "checksum")


EDITS = [("depth", 10**9), ("hidden_size", 8000), ("n_kernels", 10**9), ("normalize", False),
         ("n_projectors", 10**9), ("input_size", 10**9)]  # fmt: skip


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name, value", EDITS)
def test_a_config_is_compared_with_the_weights_before_anything_is_built(
    model, monkeypatch, name, value, older
):
    """`older`: an export without a checksum and a description of its own."""
    if older and name == "normalize":
        pytest.skip("weights do not tell it")
    from safetensors.torch import save_file

    weights, folder = dict(model[0].state_dict()), model[1]
    about = json.loads((folder / "config.json").read_text())
    if older:
        save_file(weights, folder / "model.safetensors")
        del about["crc32"]
    about["config"][name] = value
    (folder / "config.json").write_text(json.dumps(about))
    built = []
    monkeypatch.setattr(dydilit, "initialize", built.append)
    began = time.process_time()
    refusal(lambda: load(folder), str(folder), name)
    assert not built and time.process_time() - began < 0.5


def test_a_merged_model_comes_back_as_the_same_function(model, tmp_path):
    merged = model[0]
    for block in merged.blocks:
        block.attn.dwc.merge_()
    merged.save_pretrained(tmp_path / "merged")
    batch = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])
    assert torch.equal(load(tmp_path / "merged")(*batch), merged(*batch))
    with pytest.raises(ValueError, match=r"dwc\.horizontal") as e:  # dydilit.py alone
        DyDiLiT.from_pretrained(tmp_path / "merged")
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------
# Files of others.


def saved(tmp_path, tree):
    torch.save(tree, tmp_path / "other.pt")
    return tmp_path / "other.pt"


def test_the_weights_of_an_export_may_be_named_themselves(model):
    again = load(model[1] / "model.safetensors")
    assert same(again, model[0]) and again.meta == model[0].meta
    (model[1] / "config.json").unlink()
    assert same(load(model[1] / "model.safetensors"), model[0])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("place", ["ema", "state_dict", "model"])
def test_prefixes_are_removed_and_weights_are_found(model, tmp_path, prefix, place):
    weights = {f"{prefix}{name}": z for name, z in model[0].state_dict().items()}
    again = load(saved(tmp_path, {place: weights, "config": asdict(CONFIG), "epoch": 3}))
    assert same(again, model[0]) and again.meta["classes"] == list("0123456789")


def test_a_model_without_names_of_classes_gets_numbers(tmp_path):
    DyDiLiT(CONFIG).save_pretrained(tmp_path)
    assert load(tmp_path).meta["classes"] == list("0123456789")


NAMED = {
    "bare": "the weights of a DyDiLiT of width 16 and 1 blocks",
    "module": "a pickled dydilit.DyDiLiT, and reading that could run code",
    "list": "holds a list",
    "nothing": "holds no weights; its entries are: epoch, lr",
    "another": "the weights of another model, 2 tensors, fc.bias among them",
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_cannot_be_loaded_is_named_for_what_it_is(tmp_path, kind):
    model = DyDiLiT(CONFIG)
    trees = {
        "bare": model.state_dict(),
        "module": model,
        "list": [1, 2],
        "nothing": {"epoch": 3, "lr": 0.1},
        "another": {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(3)},
    }
    path = saved(tmp_path, trees[kind])
    assert "cut short" not in refusal(lambda: load(path), str(path), NAMED[kind])


def npz():
    file = io.BytesIO()
    np.savez(file, arr_0=np.zeros(3))
    return file.getvalue()


FILES = {b"": "empty", b"\x89PNG\r\n": "PNG", b"<html>": "a web page", npz(): "an .npz",
         b"version https://git-lfs.github.com/spec/v1\n": "Git LFS", b"{}": "JSON"}  # fmt: skip


@pytest.mark.parametrize("raw, what", FILES.items(), ids=FILES.values())
def test_files_that_are_no_checkpoints_are_named(tmp_path, raw, what):
    file = tmp_path / "other.pt"
    file.write_bytes(raw)
    refusal(lambda: load(file), str(file), "is not a readable checkpoint", what)


def test_a_file_of_an_old_torch_is_read(model, tmp_path):
    tree = {"state_dict": model[0].state_dict(), "config": asdict(CONFIG)}
    torch.save(tree, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.pt"), model[0])


def test_models_have_shapes_in_milliseconds():
    """In a process that has just begun: torch imports its compiler for much on the meta device."""
    code = (
        "import time, torch, dydilit; from support.pretrained import on_meta; "
        "t = time.process_time(); on_meta(dydilit.PRESETS['L/2']); print(time.process_time() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) < 0.8
    found, want = (
        {name: (z.shape, z.stride(), z.dtype) for name, z in model.state_dict().items()}
        for model in (pretrained.on_meta(CONFIG), DyDiLiT(CONFIG))
    )
    assert found == want


# ----------------------------------------------------------------------------------------------
# Threads, signals, clocks.


def test_training_in_another_thread_is_training(run, tmp_path):
    train(CONFIG, run)
    other = replace(run, out=str(tmp_path / "thread"))
    steps = []
    thread = threading.Thread(target=lambda: steps.append(train(CONFIG, other)))
    thread.start()
    thread.join()
    assert steps == [6] and not differing(parts(run.out), parts(other.out))
    assert without_speed(read_log(run.out)) == without_speed(read_log(other.out))


def test_a_hangup_saves_like_sigterm(run, monkeypatch):
    monkeypatch.setattr(dydilit, "learning_rate", learning_rate)  # undone afterwards, and at_step
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        at_step(lambda step: os.kill(os.getpid(), signal.SIGHUP) if step == 1 else None)
        assert train(CONFIG, run) == 2 and parts(run.out)["step"] == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clock_that_stands_still_does_not_end_a_run(run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert train(CONFIG, run) == 6
