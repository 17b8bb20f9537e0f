"""Many images: latents decoded, work shared, interrupted and taken up again; what is written; models for others."""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, ROOT, RUN, finish, torchrun
from util import save_vae

import dydilit
import load
import sample_min
from dydilit import Diffusion, DyDiLA, train
from load import load_model

MODEL = replace(CONFIG, in_channels=4, num_classes=3)
SETTINGS = {"cfg": 1.5, "cfg_channels": 3, "steps": 3, "sampler": "ddpm", "seed": 0, "dtype": "float32",
            "attention_dtype": None}


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    """Images, prepared as latents, and a model that a few steps have trained on them: its checkpoint."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for i in range(24):
        (folder / "in" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "in" / "abc"[i % 3] / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "data" / "imagefolder")
        prepare = runpy.run_path(str(ROOT / "data" / "imagefolder" / "prepare.py"))["prepare"]
        prepare(folder / "in", 16, folder / "set", held_out=0.2, vae=vae, batch=8)
    train(MODEL, replace(RUN, data=str(folder / "set"), out=str(folder / "out"), ema_decay=0.0, steps=12))
    return folder / "out" / "ckpt.pt"


@pytest.fixture
def sample(monkeypatch, capsys):
    """sample(arguments) runs sample_min.py here: (what it exits with, stdout)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample_min.py", *map(str, arguments)])
        try:
            sample_min.main()
            code = 0
        except (ValueError, OSError) as e:  # as the script does
            code = f"{type(e).__name__}: {e}"
        return code, capsys.readouterr().out

    return call


def read(npz):
    with np.load(npz) as made:
        return made["arr_0"], made["labels"], json.loads(str(made["settings"]))


FLAGS = ("--steps=3", "--images=11", "--batch=4")


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """Eleven images in three chunks, in one process and in one go."""
    out = tmp_path_factory.mktemp("whole") / "s.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample_min.py", str(latents), *FLAGS, f"--out={out}"])
        sample_min.main()
    return read(out)


# ---------------------------------------------------------------------------------------------------------------------
# What is written.


def test_latents_are_divided_by_the_scaling_decoded_and_rounded(latents, vae, whole):
    from diffusers import AutoencoderKL

    images, labels, _ = whole
    assert images.dtype == np.uint8 and images.shape == (11, 16, 16, 3)
    assert labels.tolist() == [i % 3 for i in range(11)]
    model, ckpt = load_model(latents)
    decoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    assert ckpt["meta"]["scaling"] == 0.3  # the tiny autoencoder's
    x = Diffusion(3).sample(model, torch.tensor(labels), range(11), seed=0, cfg=1.5, cfg_channels=3)
    with torch.no_grad():
        pixels = decoder.decode(x / 0.3).sample
    want = (127.5 * pixels + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert abs(images.astype(int) - want).max() <= 1  # other batches, other rounding
    assert images.std() > 5  # not blank


def test_settings_stand_beside_the_images(latents, vae, whole):
    settings = whole[2]
    assert settings.items() >= SETTINGS.items()
    assert settings["vae"] == vae and settings["step"] == 12 and settings["model"] == "dydila"
    assert settings["data"] == "set" and len(settings["weights"]) == 16


def test_numpy_and_a_zip_tool_read_it_without_pickle(latents, whole, sample, tmp_path):
    assert sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"], "nothing stays beside it"
    with np.load(tmp_path / "s.npz", allow_pickle=False) as made:
        assert made.files == ["arr_0", "labels", "settings"] and made["labels"].dtype == np.int64
        assert made["arr_0"].tobytes() == whole[0].tobytes()


def test_a_grid_is_made_of_the_same_images(latents, whole, sample, tmp_path):
    assert sample(latents, "--steps=3", "--per-class=2", "--classes", "a", f"--out={tmp_path}/g.png")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["g.png"]
    with Image.open(tmp_path / "g.png") as im:
        cell = np.asarray(im)[: 16 * 3 : 3, : 16 * 3 : 3]
    assert abs(cell.astype(int) - whole[0][0]).max() <= 1


def test_labels_balanced_and_random(latents, sample, tmp_path):
    code, _ = sample(latents, "--steps=2", "--images=60", "--labels=random", f"--out={tmp_path}/r.npz")
    labels = read(tmp_path / "r.npz")[1]
    counts = np.bincount(labels, minlength=3)
    assert code == 0 and labels.shape == (60,) and 8 < counts.min() < 20, "drawn, not dealt"
    fewer = sample_min.many_labels([0, 1, 2], 7, "random", 0)
    assert fewer.tolist() == labels[:7].tolist(), "label i depends on (seed, i) alone"
    assert sample_min.many_labels([0, 1, 2], 60, "random", 1).tolist() != labels.tolist()
    assert set(sample_min.many_labels([2, 5], 20, "random", 0).tolist()) == {2, 5}
    assert sample_min.many_labels([2, 5], 5, "balanced", 0).tolist() == [2, 5, 2, 5, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Shared and interrupted.


def test_two_processes_write_the_bytes_of_one(latents, whole, tmp_path):
    out = tmp_path / "s.npz"
    process = torchrun("--standalone", "--nproc_per_node=2", "sample_min.py", latents, *FLAGS, f"--out={out}")
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert stdout.count("11 images from step 12") == 1
    for a, b in zip(read(out)[:2], whole): assert a.tobytes() == b.tobytes()


KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import sample_min
original, done = sample_min.generate, []
def generate(*args, **kwargs):
    if len(done) == {after}: os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return original(*args, **kwargs)
sample_min.generate = generate
sample_min.main()
"""


def killed(after, latents, out):
    """A process that kill -9 ends before its chunk number `after`."""
    code = KILLER.format(root=str(ROOT), after=after)
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, str(latents), *FLAGS, f"--out={out}"], env=os.environ | settings,
                          capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_goes_on_without_doing_anything_twice(latents, whole, sample, tmp_path, monkeypatch):
    out, original, chunks = tmp_path / "s.npz", sample_min.generate, []
    killed(2, latents, out)
    assert not out.exists() and (tmp_path / "s.npz.partial" / "done").read_bytes() == b"\1\1\0"
    monkeypatch.setattr(sample_min, "generate", lambda *a, **k: chunks.append(a[2]) or original(*a, **k))
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert chunks == [range(8, 11)]
    for a, b in zip(read(out)[:2], whole): assert a.tobytes() == b.tobytes()


def test_two_processes_take_up_what_one_left(latents, whole, tmp_path):
    out = tmp_path / "s.npz"
    killed(1, latents, out)
    process = torchrun("--standalone", "--nproc_per_node=2", "sample_min.py", latents, *FLAGS, f"--out={out}")
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    for a, b in zip(read(out)[:2], whole): assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("crash", ["done", "images.npy", "settings.json"])
def test_a_stop_while_the_work_is_laid_out_loses_nothing(latents, whole, sample, tmp_path, crash):
    """settings.json comes last: without it there is nothing to take up."""
    out, folder = tmp_path / "s.npz", tmp_path / "s.npz.partial"
    folder.mkdir()
    if crash != "done": (folder / "done").write_bytes(b"\1")
    if crash == "settings.json": (folder / "images.npy").write_bytes(b"half")
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert read(out)[0].tobytes() == whole[0].tobytes()


@pytest.mark.parametrize(("flag", "named"), [
    ("--seed=1", "seed 0 (now 1)"), ("--cfg=4", "cfg 1.5 (now 4.0)"), ("--batch=5", "batch 4 (now 5)"),
    ("--images=12", "n 11 (now 12)"), ("--labels=random", "labels"), ("--sampler=ddim", "sampler 'ddpm' (now 'ddim')"),
    ("--dtype=bfloat16", "dtype 'float32' (now 'bfloat16')")])
def test_other_settings_do_not_go_on_with_it(latents, sample, tmp_path, flag, named):
    out = tmp_path / "s.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_min, "generate", lambda *a, **k: (_ for _ in ()).throw(OSError("stop")))
        assert sample(latents, *FLAGS, f"--out={out}")[0] == "OSError: stop"
    code, _ = sample(latents, *FLAGS, flag, f"--out={out}")
    assert code.startswith("ValueError: ") and "was begun with other settings" in code and named in code
    assert not out.exists() and (tmp_path / "s.npz.partial").exists()


def test_a_finished_file_is_not_made_twice_nor_overwritten(latents, sample, tmp_path, monkeypatch):
    out = tmp_path / "s.npz"
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    before = out.read_bytes()
    monkeypatch.setattr(sample_min, "generate", None)
    Path(f"{out}.partial").mkdir()  # as a kill after the last rename leaves it
    assert sample(latents, *FLAGS, f"--out={out}") == (0, f"{out}: already there\n")
    assert not Path(f"{out}.partial").exists()
    for other in ("--seed=1", "--images=12", "--labels=random", "--classes=1"):
        code, _ = sample(latents, *FLAGS, other, f"--out={out}")
        assert code == f"FileExistsError: {out} exists, and not by this command; delete it, or choose another --out"
    assert out.read_bytes() == before
    out.write_bytes(b"somebody else's")
    assert "exists, and not by this command" in sample(latents, *FLAGS, f"--out={out}")[0]


def test_a_disk_without_room_is_refused_before_the_start(latents, sample, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 2 * 11 * 16 * 16 * 3 - 1})
    monkeypatch.setattr(sample_min.shutil, "disk_usage", lambda _: usage)
    code, _ = sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")
    assert code.startswith("OSError: ") and "its disk has 0.0 GB left" in code


def test_a_disk_that_fills_up_keeps_what_is_done(latents, whole, sample, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync
    def full(file):
        calls.append(1)
        if len(calls) == 2: raise OSError(28, "No space left on device")
        fsync(file)
    monkeypatch.setattr(sample_min.os, "fsync", full)
    out = tmp_path / "s.npz"
    assert "No space left" in sample(latents, *FLAGS, f"--out={out}")[0]
    assert (tmp_path / "s.npz.partial" / "done").read_bytes() == b"\1\0\0"
    assert sample(latents, *FLAGS, f"--out={out}")[0] == 0
    assert read(out)[0].tobytes() == whole[0].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# The network's options.


def test_dtypes_reach_the_network(latents, whole, sample, tmp_path, monkeypatch):
    seen, original = set(), dydilit.dydila_attention
    def spy(q, *args, **kwargs):
        seen.add((q.dtype, torch.is_autocast_enabled("cpu")))
        return original(q, *args, **kwargs)
    monkeypatch.setattr(dydilit, "dydila_attention", spy)
    f32, b16 = torch.float32, torch.bfloat16
    for i, (flags, want) in enumerate([((), (f32, False)), (("--dtype=bfloat16",), (b16, True)),
                                       (("--attention-dtype=bfloat16",), (b16, False)),
                                       (("--dtype=bfloat16", "--attention-dtype=float32"), (f32, True))]):
        seen.clear()
        assert sample(latents, *FLAGS, *flags, f"--out={tmp_path}/{i}.npz")[0] == 0
        assert seen == {want}
        images, _, settings = read(tmp_path / f"{i}.npz")
        difference = abs(images.astype(int) - whole[0])
        assert difference.mean() < 3 and (difference.max() > 0) == bool(flags)
        assert (settings["dtype"], settings["attention_dtype"]) == (
            "bfloat16" if "--dtype=bfloat16" in flags else "float32",
            next((f.partition("=")[2] for f in flags if f.startswith("--attention")), None))


def test_the_attention_in_another_dtype_adds_in_the_models():
    config = replace(CONFIG, hidden_size=24)
    torch.manual_seed(0)
    module, x = DyDiLA(config), torch.randn(2, 6, 24)
    want = module(x, (2, 3))
    module.dtype = torch.bfloat16
    got = module(x, (2, 3))
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_network_makes_the_same_images(latents, whole, sample, tmp_path, monkeypatch):
    """By Dynamo and AOTAutograd; Inductor, which would take half a minute, has its test in test_fused.py."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert sample(latents, *FLAGS, "--compile", f"--out={tmp_path}/s.npz")[0] == 0
    assert abs(read(tmp_path / "s.npz")[0].astype(int) - whole[0]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Models for others, and autoencoders.


def test_an_exported_model_is_the_checkpoints(latents, whole, sample, tmp_path):
    code, stdout = sample(latents, f"--export={tmp_path}/model")
    assert code == 0 and stdout == f"{tmp_path}/model: model.safetensors, config.json of step 12\n"
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    (a, ckpt), (b, about) = load_model(latents), load_model(tmp_path / "model")
    assert a.config == b.config and about["meta"] == ckpt["meta"] and about["step"] == 12 and not b.training
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items()):
        assert name == other and torch.equal(x, y)
    assert sample(tmp_path / "model", *FLAGS, f"--out={tmp_path}/s.npz")[0] == 0
    images, _, settings = read(tmp_path / "s.npz")
    assert images.tobytes() == whole[0].tobytes() and settings == whole[2]


def test_an_exported_model_is_plain_safetensors_and_json(latents, sample, tmp_path):
    from safetensors import safe_open

    assert sample(latents, f"--export={tmp_path}")[0] == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(torch.load(latents)["ema"])
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"]["hidden_size"] == 16 and about["meta"]["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["no config", "no weights", "not json", "cut short", "lacks a field", "other model",
                                    "other field"])
def test_a_folder_that_is_no_exported_model_is_one_line(latents, sample, tmp_path, damage):
    assert sample(latents, f"--export={tmp_path}")[0] == 0
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "no config": config.unlink()
    if damage == "no weights": weights.unlink()
    if damage == "not json": config.write_text("{")
    if damage == "cut short": weights.write_bytes(weights.read_bytes()[:100])
    if damage == "lacks a field": config.write_text("{}")
    if damage == "other model": config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 20'))
    if damage == "other field": config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_width": 16'))
    code, _ = sample(tmp_path, f"--out={tmp_path}/s.npz")
    assert code.startswith("ValueError: ") and str(tmp_path) in code and "\n" not in code


def test_another_autoencoder_can_be_named(latents, whole, sample, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    assert sample(latents, *FLAGS, f"--vae={other}", f"--out={tmp_path}/s.npz")[0] == 0
    images, _, settings = read(tmp_path / "s.npz")
    assert settings["vae"] == other and abs(images.astype(int) - whole[0]).mean() > 3


def test_autoencoders_that_are_not_there_or_do_not_fit(latents, sample, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    code, _ = sample(latents, *FLAGS, f"--vae={tmp_path}/empty", f"--out={tmp_path}/s.npz")
    assert code.startswith(f"ValueError: cannot load the autoencoder '{tmp_path}/empty'") and "\n" not in code
    three = save_vae(tmp_path / "three", latent_channels=3)
    code, _ = sample(latents, *FLAGS, f"--vae={three}", f"--out={tmp_path}/s.npz")
    assert code == f"ValueError: the autoencoder {three!r} decodes 3 channels, the model makes 4"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _ = sample(latents, *FLAGS, f"--out={tmp_path}/s.npz")
    assert code.startswith("ValueError: these are latents; to decode them: pip install diffusers")
    assert not (tmp_path / "s.npz").exists() and not (tmp_path / "s.npz.partial").exists()


def test_the_decoder_takes_a_few_at_a_time(latents, vae):
    model, x = load_model(latents)[0], torch.randn(7, 4, 8, 8)
    one, all_ = (load.Decoder(model.config, vae, 0.3, "cpu", batch)(x) for batch in (2, 16))
    assert one.shape == (7, 16, 16, 3) and (one.int() - all_.int()).abs().max() <= 1


def test_pixels_need_no_autoencoder():
    decode, x = load.Decoder(CONFIG, None, None, "cpu"), torch.arange(64).view(1, 1, 8, 8) / 25 - 1.26
    with pytest.raises(ValueError, match="the samples are not finite"): decode(torch.full_like(x, torch.nan))
    assert decode.shape == (8, 8, 1) and decode(x).flatten().tolist() == [
        int(min(max(127.5 * (i / 25 - 1.26) + 128, 0), 255)) for i in range(64)]
    assert Path(ROOT / "load.py").read_text().count("127.5") == 1  # the rounding stands once


def test_a_class_is_known_by_its_name_before_its_number():
    names = sorted(map(str, range(20)))  # 0, 1, 10, 11 .. 2, 20
    assert sample_min.labels_for(["10", "2"], names) == [names.index("10"), names.index("2")]
    assert sample_min.labels_for(["1"], ["cat", "dog"]) == [1]
