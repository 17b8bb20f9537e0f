"""sample_min.py from the command line: labels, options, grids, animations, exported models."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, RUN, finish, torchrun, write_set
from sampling import FLAGS, differ, read

import dydilit
import sample_min
from dydilit import DyDiLA, DyDiLiT, train

OPTIONS = ("--steps=4", "--per-class=2")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A checkpoint for colour images of three named classes, trained until the class matters."""
    folder = tmp_path_factory.mktemp("zoo")
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), np.uint8)
    names = {"name": "zoo", "classes": ["cat", "dog", "owl"], "flip": True, "held_out": 3}
    write_set(folder / "set", images, np.arange(30) % 3, **names)
    config = replace(CONFIG, in_channels=3, num_classes=3)
    run = replace(RUN, data=str(folder / "set"), out=str(folder), ema_decay=0.0, steps=12)
    train(config, run)
    return folder / "ckpt.pt"


@pytest.fixture
def sample(script, zoo, tmp_path):
    """sample("--cfg=2") -> images and labels of an .npz that sample_min.py has written."""

    def call(*arguments):
        out = tmp_path / "s.npz"
        out.unlink(missing_ok=True)
        code, stdout, _ = script("sample_min.py", zoo, *OPTIONS, f"--out={out}", *arguments)
        assert code == 0 and stdout.startswith(f"{out}: ")
        return read(out)[:2]

    return call


# --------------------------------------------------------------------------------------------------
# Labels and options.


def test_samples_of_every_class_by_default(sample):
    images, labels = sample()
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_classes_are_chosen_by_index_or_by_name(sample):
    by_index, labels = sample("--classes", "2", "0")
    by_name, names = sample("--classes", "owl", "cat")
    assert labels.tolist() == names.tolist() == [2, 0, 2, 0] and (by_index == by_name).all()


def test_the_class_changes_the_image(sample):
    owl, dog = (sample("--classes", name, "cat")[0] for name in ("owl", "dog"))
    assert (owl != dog)[::2].any()  # of the same noise


def test_a_class_is_known_by_its_name_before_its_index():
    names = sorted(map(str, range(20)))  # 0, 1, 10, 11 .. 2, 20
    assert sample_min.labels_for(["10", "2"], names) == [names.index("10"), names.index("2")]
    assert sample_min.labels_for(["1"], ["cat", "dog"]) == [1]


def test_balanced_labels_take_every_class_in_turn():
    assert sample_min.many_labels([2, 5], 5, "balanced", 0).tolist() == [2, 5, 2, 5, 2]


def test_random_labels_are_drawn_evenly():
    labels = sample_min.many_labels([0, 1, 2], 60, "random", 0)
    assert 8 < np.bincount(labels, minlength=3).min() < 20, "drawn, not dealt"


def test_random_label_i_depends_on_the_seed_and_on_i_alone():
    labels = sample_min.many_labels([0, 1, 2], 60, "random", 0).tolist()
    assert sample_min.many_labels([0, 1, 2], 7, "random", 0).tolist() == labels[:7]
    assert sample_min.many_labels([0, 1, 2], 60, "random", 1).tolist() != labels


def test_random_labels_are_of_the_given_classes():
    assert set(sample_min.many_labels([2, 5], 20, "random", 0).tolist()) == {2, 5}


def test_the_command_draws_random_labels(sample):
    labels = sample("--images=60", "--labels=random", "--steps=2")[1]
    assert labels.tolist() == sample_min.many_labels([0, 1, 2], 60, "random", 0).tolist()


def test_the_same_command_makes_the_same_images(sample):
    assert (sample()[0] == sample()[0]).all()


def test_seed_guidance_sampler_and_steps_change_the_images(sample):
    changes = ["--seed=1", "--cfg=1.0", "--cfg=4", "--sampler=ddim", "--steps=5"]
    changes.append("--cfg-channels=1")
    found = {sample()[0].tobytes(), *(sample(change)[0].tobytes() for change in changes)}
    assert len(found) == 1 + len(changes)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_image_does_not_depend_on_the_batch(sample, batch):
    """Products of other sizes round otherwise, which may move a pixel by one grey level."""
    images = sample("--per-class=5")[0]
    assert differ(sample("--per-class=5", f"--batch={batch}")[0], images)[0] <= 1


def test_an_image_does_not_depend_on_the_number_of_processes(sample, zoo, tmp_path):
    images, labels = sample("--per-class=5")
    command = ["sample_min.py", zoo, "--steps=4", "--per-class=5", f"--out={tmp_path}/two.npz"]
    process = torchrun("--standalone", "--nproc_per_node=2", *command)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert stdout.count("15 images from step 12") == 1
    two, same = read(tmp_path / "two.npz")[:2]
    assert differ(two, images)[0] <= 1 and (same == labels).all()


DTYPES = [
    ((), (torch.float32, False)),
    (("--dtype=bfloat16",), (torch.bfloat16, True)),
    (("--attention-dtype=bfloat16",), (torch.bfloat16, False)),
    (("--dtype=bfloat16", "--attention-dtype=float32"), (torch.float32, True)),
]


@pytest.mark.parametrize(("flags", "want"), DTYPES)
def test_dtypes_reach_the_attention_and_the_images(sample, monkeypatch, flags, want):
    images = sample()[0]
    seen, original = set(), dydilit.dydila_attention

    def spy(q, *args, **kwargs):
        seen.add((q.dtype, torch.is_autocast_enabled("cpu")))
        return original(q, *args, **kwargs)

    monkeypatch.setattr(dydilit, "dydila_attention", spy)
    monkeypatch.setattr("support.fused.check_fused", lambda *_: "")  # it has dtypes of its own
    worst, mean = differ(sample(*flags)[0], images)
    assert seen == {want}
    assert mean < 3 and (worst > 0) == bool(flags)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_stand_in_the_settings(sample, tmp_path, dtype):
    sample(f"--dtype={dtype}", f"--attention-dtype={dtype}")
    settings = read(tmp_path / "s.npz")[2]
    assert settings["dtype"] == settings["attention_dtype"] == dtype


def test_the_attention_in_another_dtype_adds_in_the_models():
    module, x = DyDiLA(replace(CONFIG, hidden_size=24)), torch.randn(2, 6, 24)
    want = module(x, (2, 3))
    module.dtype = torch.bfloat16
    got = module(x, (2, 3))
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_network_makes_the_same_images(sample, monkeypatch):
    """By Dynamo and AOTAutograd; Inductor, which takes half a minute, is in test_fused.py."""
    images = sample()[0]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert differ(sample("--compile")[0], images)[0] <= 1


# --------------------------------------------------------------------------------------------------
# Pictures.


def test_grid_shows_each_class_in_a_row_of_its_own(sample, script, zoo, tmp_path):
    images, _ = sample()
    picture = tmp_path / "new folder" / "grid.png"
    assert script("sample_min.py", zoo, *OPTIONS, f"--out={picture}")[0] == 0
    with Image.open(picture) as im:
        assert im.mode == "RGB"
        sheet = np.asarray(im)
    cell = 9 * 6  # eight pixels and a line, enlarged six times
    assert sheet.shape == (3 * cell, 2 * cell, 3)
    cells = sheet.reshape(3, cell, 2, cell, 3).swapaxes(1, 2).reshape(6, cell, cell, 3)
    assert (cells[:, 3:48:6, 3:48:6] == images[[0, 3, 1, 4, 2, 5]]).all()


def test_a_grid_leaves_nothing_beside_it(script, zoo, tmp_path):
    assert script("sample_min.py", zoo, *OPTIONS, f"--out={tmp_path}/g.png")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["g.png"]


def frames_of(gif):
    """The frames of a GIF as RGB arrays, and for how many milliseconds each is shown."""
    with Image.open(gif) as im:
        found = []
        for i in range(im.n_frames):
            im.seek(i)
            found.append((np.asarray(im.convert("RGB")).astype(int), im.info["duration"]))
    return [x for x, _ in found], [t for _, t in found]


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A checkpoint for grey images, of three classes, and its grid."""
    folder = tmp_path_factory.mktemp("grey")
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), np.uint8)
    write_set(folder / "set", images, np.arange(30) % 3, classes=["a", "b", "c"])
    run = replace(RUN, data=str(folder / "set"), out=str(folder), ema_decay=0.0, steps=12)
    train(replace(CONFIG, num_classes=3), run)
    return folder / "ckpt.pt"


def middles(sheet, scale):
    """The middle of each of the 3 x 2 images' pixels, in the order of the grid."""
    cell = 9 * scale
    assert sheet.shape[:2] == (3 * cell, 2 * cell)
    cells = sheet.reshape(3, cell, 2, cell, 3).swapaxes(1, 2).reshape(6, cell, cell, 3)
    return cells[:, scale // 2 : 8 * scale : scale, scale // 2 : 8 * scale : scale]


@pytest.fixture
def gif(script, grey, tmp_path):
    """Frames and durations of an animation, and the images of an .npz of the same command."""
    assert script("sample_min.py", grey, *OPTIONS, f"--out={tmp_path}/s.npz")[0] == 0
    code, stdout, _ = script("sample_min.py", grey, *OPTIONS, f"--out={tmp_path}/s.gif")
    assert code == 0 and stdout.startswith(f"{tmp_path}/s.gif: 6 images from step 12, ddpm 4 steps")
    return *frames_of(tmp_path / "s.gif"), read(tmp_path / "s.npz")[0]


def test_the_last_frame_of_a_gif_is_the_grid(gif):
    frames, _, images = gif
    rows = images[[0, 3, 1, 4, 2, 5]]  # a class in each row
    assert differ(middles(frames[-1], scale=4), rows)[0] <= 255 / 15 / 2 + 1, "16 greys"


def test_a_gif_begins_with_noise(gif):
    frames = gif[0]
    assert differ(frames[0], frames[-1])[1] > 5


def test_a_gif_holds_its_last_frame_for_two_seconds(gif):
    _, durations, _ = gif
    assert len(durations) == 4, "a frame for every step"
    assert durations[-1] == 2000 and max(durations[:-1]) <= 1000


@pytest.mark.parametrize("steps", [2, 50, 51, 100, 250, 1000])
def test_the_frames_of_a_gif_reach_from_the_first_step_to_the_last(steps):
    shown = sorted(sample_min.steps_to_show(steps))
    assert shown[0] == 1 and shown[-1] == steps and len(shown) <= 60
    gaps = np.diff(shown)
    assert gaps[0] >= gaps[-1], "denser towards the end"


def test_a_gif_of_many_steps_has_few_frames(script, grey, tmp_path):
    arguments = ["--steps=150", "--per-class=1", f"--out={tmp_path}/s.gif"]
    assert script("sample_min.py", grey, *arguments)[0] == 0
    frames, _ = frames_of(tmp_path / "s.gif")
    assert len(frames) <= 60 and (tmp_path / "s.gif").stat().st_size < 100_000


def test_a_gif_of_colours(script, zoo, tmp_path):
    assert script("sample_min.py", zoo, *OPTIONS, f"--out={tmp_path}/s.gif")[0] == 0
    frames, _ = frames_of(tmp_path / "s.gif")
    assert len(frames) == 4 and (frames[-1][..., 0] != frames[-1][..., 2]).any()


def test_a_gif_of_latents_is_decoded(latents, script, tmp_path):
    arguments = ["--steps=3", "--per-class=1", f"--out={tmp_path}/s.gif"]
    assert script("sample_min.py", latents, *arguments)[0] == 0
    frames, _ = frames_of(tmp_path / "s.gif")
    assert frames[0].shape == (3 * 17 * 2, 17 * 2, 3)
    assert len(frames) >= 2 and (frames[0] != frames[-1]).any()  # Pillow joins equal frames


def test_a_gif_leaves_nothing_beside_it(script, zoo, tmp_path):
    assert script("sample_min.py", zoo, *OPTIONS, f"--out={tmp_path}/s.gif")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s.gif"]


def test_a_gif_is_not_made_by_several_processes(script, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = script("sample_min.py", zoo, f"--out={tmp_path}/s.gif")[0]
    assert code == "sample_min.py: error: a .gif is made by one process; start it without torchrun"


# --------------------------------------------------------------------------------------------------
# Models for others.


def test_an_exported_model_is_the_checkpoints(latents, script, tmp_path):
    code, stdout, _ = script("sample_min.py", latents, f"--export={tmp_path}/model")
    assert code == 0 and stdout == f"{tmp_path}/model: model.safetensors, config.json of step 12\n"
    a, b = DyDiLiT.from_pretrained(latents), DyDiLiT.from_pretrained(tmp_path / "model")
    assert a.config == b.config and a.meta == b.meta and b.step == 12 and not b.training
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other and torch.equal(x, y)


def test_an_exported_model_makes_the_same_images(latents, script, tmp_path):
    assert script("sample_min.py", latents, f"--export={tmp_path}/model")[0] == 0
    made = []
    for i, path in enumerate((latents, tmp_path / "model")):
        assert script("sample_min.py", path, *FLAGS, f"--out={tmp_path}/{i}.npz")[0] == 0
        made.append(read(tmp_path / f"{i}.npz"))
    assert made[0][0].tobytes() == made[1][0].tobytes() and made[0][2] == made[1][2]


def test_an_exported_model_is_plain_safetensors_and_json(latents, script, tmp_path):
    from safetensors import safe_open

    assert script("sample_min.py", latents, f"--export={tmp_path}")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(dydilit.load_checkpoint(latents)["ema"])
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"]["hidden_size"] == 16 and about["meta"]["classes"] == ["a", "b", "c"]


def damage(kind, folder):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "no config":
        config.unlink()
    if kind == "no weights":
        weights.unlink()
    if kind == "not json":
        config.write_text("{")
    if kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:100])
    if kind == "lacks a field":
        config.write_text("{}")
    if kind == "other model":
        config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 20'))
    if kind == "other field":
        config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_width": 16'))


KINDS = ["no config", "no weights", "not json", "cut short", "lacks a field", "other model"]


@pytest.mark.parametrize("kind", [*KINDS, "other field"])
def test_a_folder_that_is_no_exported_model_is_one_line(latents, script, tmp_path, kind):
    assert script("sample_min.py", latents, f"--export={tmp_path}")[0] == 0
    damage(kind, tmp_path)
    code = script("sample_min.py", tmp_path, f"--out={tmp_path}/s.npz")[0]
    assert code.startswith("sample_min.py: error: ") and str(tmp_path) in code
    assert "\n" not in code


def test_the_model_may_come_from_another_loader(zoo, tmp_path, capsys):
    """As experiments/sample.py loads its models."""
    asked = []

    def load(path):
        asked.append(path)
        return DyDiLiT.from_pretrained(zoo)

    sample_min.main(["elsewhere.pt", *OPTIONS, f"--out={tmp_path}/s.npz"], load=load)
    assert asked == ["elsewhere.pt"] and len(read(tmp_path / "s.npz")[0]) == 6


# --------------------------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "unknown class '3'; there are 3: cat, dog, owl"),
        (["--classes", "cat", "-1"], "unknown class '-1'"),
        (["--classes", "horse"], "unknown class 'horse'"),
        (["--steps=1"], "between 2 and 1000, got 1"),
        (["--steps=1001"], "between 2 and 1000, got 1001"),
        (["--per-class=0"], "--per-class, --images and --batch must be at least 1"),
        (["--images=0"], "--per-class, --images and --batch must be at least 1"),
        (["--batch=0"], "--per-class, --images and --batch must be at least 1"),
        (["--cfg-channels=0"], "--cfg-channels must be between 1 and the model's 3"),
        (["--cfg-channels=4"], "--cfg-channels must be between 1 and the model's 3"),
        (["--seed=-1"], "--seed must be at least 0"),
        (["--seed=18446744073709551616"], f"--seed must be less than {2**63}"),
        ([f"--images={10**18}"], "s.npz needs 192,000,000.0 TB, its disk has "),
        (["--cfg=inf"], "--cfg must be a finite number, got inf"),
        (["--out=grid.jpg"], "--out must end in .png, .gif or .npz, got grid.jpg"),
        (["--labels=random"], "--labels random needs --images"),
        (["--out=s.gif", "--images=20", "--batch=19"], "of at most 19 images, not 20"),
    ],
)
def test_a_wrong_value_is_one_line(script, zoo, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = script("sample_min.py", zoo, "--out=s.npz", *arguments)
    assert isinstance(code, str) and code.startswith("sample_min.py: error: ") and "\n" not in code
    assert message in code and "Traceback" not in stderr
    assert not any(Path().iterdir())


class Other(torch.nn.Module):
    """A model with another attention."""

    config = replace(CONFIG, in_channels=3)
    meta = {"classes": ["a"]}  # noqa: RUF012
    step = None


def test_attention_dtype_is_refused_where_nothing_would_read_it(tmp_path):
    with pytest.raises(ValueError, match="is for DyDiLA; this model has another attention"):
        sample_min.main(
            ["x.pt", "--attention-dtype=float32", f"--out={tmp_path}/s.npz"], load=lambda _: Other()
        )


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"weights": torch.zeros(3)}])
def test_a_file_that_is_no_checkpoint_is_one_line(script, tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "ckpt.pt")  # of another program
    code, _, stderr = script("sample_min.py", tmp_path / "ckpt.pt", f"--out={tmp_path}/s.npz")
    assert isinstance(code, str) and code.startswith("sample_min.py: error: ") and "\n" not in code
    assert str(tmp_path / "ckpt.pt") in code and "Traceback" not in stderr
