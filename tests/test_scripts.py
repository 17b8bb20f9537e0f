"""The scripts from the command line: a run from nothing to samples, sampling, error lines, and what the README says."""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, ROOT, RUN, finish, flags, prepare_digits, start, torchrun
from torch.distributed.run import get_args_parser

import sample_min
from baselines import preset
from dydilit import PRESETS, Config, Training, train
from sample_min import save_grid
from train_min import RECIPES

TINY = flags(**asdict(CONFIG), **{k: v for k, v in asdict(RUN).items() if k not in ("data", "out")})


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train_min.py", "--steps=3") runs it as __main__, here: (what it exits with, stdout, stderr)."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


# ---------------------------------------------------------------------------------------------------------------------
# From nothing to samples.


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """What a real `torchrun train_min.py` leaves, over two processes: its folder and its output."""
    out = tmp_path_factory.mktemp("finished") / "out"
    process = torchrun("--standalone", "--nproc_per_node=2", "train_min.py", *TINY, f"--data={digits}", f"--out={out}",
                       "--samples=40", "--sampling-steps=3")
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    return out, stdout


def test_training_leaves_checkpoint_log_plot_and_samples(finished):
    out, _ = finished
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png", "samples.npz", "samples.png"]
    with Image.open(out / "loss.png") as plot:
        assert plot.width > 300 and len(plot.convert("RGB").getcolors(1 << 24)) > 2  # there are lines in it


def test_samples_are_as_many_as_asked_and_every_class_equally_often(finished):
    with np.load(finished[0] / "samples.npz") as npz:
        images, labels = npz["arr_0"], npz["labels"]
    assert images.dtype == np.uint8 and images.shape == (40, 8, 8, 1)
    assert labels.dtype == np.int64 and Counter(labels.tolist()) == dict.fromkeys(range(10), 4)
    assert images.std() > 10  # not blank


def test_training_prints_the_figures(finished):
    _, stdout = finished
    columns = "Frechet distance, pixels | KID, pixels, subsets of 40 | precision | recall | class accuracy | n |"
    assert f"\n| samples | {columns}" in stdout
    figures = r"[\d.]+ \| \S+ ± \S+ \| [\d.]+ \| [\d.]+"
    assert re.search(rf"^\| samples\.npz \| {figures} \| [\d.]+ \| 40 \|", stdout, re.MULTILINE)
    assert re.search(rf"^\| real halves \| {figures} \|  \| 898 \|", stdout, re.MULTILINE)
    assert "40 samples against digits" in stdout and stdout.count("class accuracy") == 1  # one process speaks


def test_finished_run_is_neither_trained_nor_sampled_again(finished, digits, script, monkeypatch):
    out, stdout = finished
    before = {name: (out / name).read_bytes() for name in ("ckpt.pt", "log.jsonl", "samples.npz", "samples.png")}
    monkeypatch.setattr(sample_min, "generate", None)
    arguments = [*TINY, f"--data={digits}", f"--out={out}", "--samples=40", "--sampling-steps=3"]
    code, again, _ = script("train_min.py", *arguments, "--resume")
    assert code == 0 and {name: (out / name).read_bytes() for name in before} == before
    assert again == stdout


def test_samples_lost_or_of_other_weights_are_made_anew(finished, digits, script, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    with np.load(out / "samples.npz") as npz:
        before = npz["arr_0"]
    (out / "samples.npz").unlink()
    arguments = [*TINY, f"--data={digits}", f"--out={out}", "--samples=40", "--sampling-steps=3", "--resume"]
    assert script("train_min.py", *arguments)[0] == 0
    with np.load(out / "samples.npz") as npz:  # one process now, two before
        assert abs(npz["arr_0"].astype(int) - before).max() <= 1
    with np.load(out / "samples.npz") as npz:
        other = dict(npz) | {"settings": np.array(str(npz["settings"]).replace('"weights": "', '"weights": "x'))}
    for old in (b"cut short", other):  # samples of other weights
        (out / "samples.npz").write_bytes(old) if old is not other else np.savez(out / "samples.npz", **other)
        assert script("train_min.py", *arguments)[0] == 0
        with np.load(out / "samples.npz") as npz:
            assert len(npz["arr_0"]) == 40 and '"weights": "x' not in str(npz["settings"])


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("photos", 2)])
def test_a_missing_bundled_set_is_prepared_and_its_classes_counted(name, classes, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in TINY if not a.startswith(("--num-classes", "--input-size", "--in-channels"))]
    assert script("train_min.py", f"--preset={name}", *arguments, "--steps=1", "--samples=0", "--out=here")[0] == 0
    assert sorted(p.name for p in Path("here").iterdir()) == ["ckpt.pt", "log.jsonl"]
    assert torch.load("here/ckpt.pt")["config"]["num_classes"] == classes
    message = f"no prepared data set in else/{name}; make it: python data/{name}/prepare.py --out else/{name}"
    code = script("train_min.py", f"--preset={name}", *arguments, f"--data=else/{name}", "--out=there")[0]
    assert message in code, "only where the data sets of this repository lie"


# ---------------------------------------------------------------------------------------------------------------------
# The command line of train_min.py.


def test_help_lists_every_field_with_its_comment_and_default(script):
    code, stdout, _ = script("train_min.py", "--help")
    assert code == 0
    text = " ".join(stdout.split())
    source = ast.parse((ROOT / "dydilit.py").read_text())
    lines = (ROOT / "dydilit.py").read_text().splitlines()
    comments = {
        line.target.id: lines[line.lineno - 1].split("  # ")[1]
        for part in source.body if isinstance(part, ast.ClassDef) and part.name in ("Config", "Training")
        for line in part.body if isinstance(line, ast.AnnAssign)
    }
    for part in (PRESETS["digits"], RECIPES["digits"]):
        for field in fields(part):
            flag = f"--{field.name.replace('_', '-')}"
            assert re.search(rf"(^|\s){flag}[\s,]", text), flag
            assert f"{comments[field.name]} (default {getattr(part, field.name)})" in text, flag
    assert len(comments) == len(fields(Config)) + len(fields(Training))


def test_help_of_a_preset_shows_its_own_defaults(script):
    text = " ".join(script("train_min.py", "--help", "--preset", "B/2")[1].split())
    assert "a multiple of 4 (default 512)" in text and "(default data/imagenet256)" in text


def test_every_flag_reaches_its_field():
    import train_min

    config = replace(CONFIG, patch_size=4, normalize=False, router_grad=False)
    training = replace(RUN, data="a", out="b", micro_batch=4, grad_clip=1.5, label_dropout=0.2, bf16=True, seed=3)
    given = asdict(config) | asdict(training)
    different = asdict(PRESETS["digits"]) | asdict(RECIPES["digits"])
    assert {k for k in given if given[k] == different[k]} <= {"input_size", "in_channels", "num_classes"}
    assert train_min.parse(flags(**given))[:2] == (config, training)
    assert train_min.parse([])[:2] == (PRESETS["digits"], RECIPES["digits"])
    assert train_min.parse(["--preset=S/2"])[:2] == (PRESETS["S/2"], Training())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset=nope"], "unknown preset 'nope'; known: S/2, B/2, L/2, pixels32, photos, digits"),
    (["--hidden-size=18"], "hidden_size 18 must be a multiple of 4"),
    (["--patch-size=3"], "patch_size 3 does not divide input_size 8"),
    (["--lr=-1"], "Training.lr must be"),
    (["--label-dropout=1.5"], "Training.label_dropout must be"),
    (["--steps=0"], "Training.steps must be"),
    (["--num-classes=5"], "labels 0 .. 9, the model 5 classes"),
    (["--in-channels=3"], "but the model reads uint8 (3, 8, 8)"),
    (["--batch-size=10", "--micro-batch=3"], "batch_size 10 for 1 processes: not divisible, or not by micro=3"),
    (["--data=nowhere"], "no prepared data set in nowhere; make it: python data/imagefolder/prepare.py ROOT --size 8"),
    (["--samples=-1"], "--samples must be 0 or at least 2"),
    (["--sampling-steps=1"], "--sampling-steps between 2 and 1000"),
    (["--lr=1e30", "--warmup=0"], "step 1: loss"),
])
def test_a_wrong_value_ends_train_min_with_one_line(script, digits, tmp_path, arguments, message):
    code, _, stderr = script("train_min.py", f"--data={digits}", *TINY, f"--out={tmp_path}/out", *arguments)
    assert isinstance(code, str) and code.startswith("train_min.py: error: ") and "\n" not in code
    assert message in code and "Traceback" not in stderr
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("arguments", [["--hiden-size=16"], ["--depth=two"], ["--hidden=16"], ["--steps"]])
def test_a_wrong_flag_ends_train_min_with_a_line_that_names_it(script, arguments):
    code, _, stderr = script("train_min.py", *arguments)
    assert code == 2
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("train_min.py: error: ") and arguments[0].split("=")[0] in last


def test_an_occupied_folder_ends_train_min_with_one_line_and_stays(script, digits, tmp_path):
    arguments = [*TINY, f"--data={digits}", f"--out={tmp_path}", "--samples=0"]
    assert script("train_min.py", *arguments)[0] == 0  # the folder may exist, as long as it holds no run
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = script("train_min.py", *arguments)[0]
    assert code.startswith(f"train_min.py: error: {tmp_path} holds another run; --resume continues it")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_error_is_exit_status_1_and_one_line_for_the_shell_too(tmp_path):
    for arguments in (["train_min.py", "--preset=nope"], ["sample_min.py", tmp_path / "none.pt"]):
        process = start(*arguments)
        stdout, stderr = finish(process)
        assert process.returncode == 1 and stdout == ""
        assert re.fullmatch(rf"{arguments[0]}: error: [^\n]+\n", stderr)


# ---------------------------------------------------------------------------------------------------------------------
# sample_min.py.


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A checkpoint for colour images of three classes with names, trained a little so that the class matters."""
    folder = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (30, 3, 8, 8), np.uint8))
    np.save(folder / "labels.npy", np.arange(30) % 3)
    meta = {"name": "zoo", "classes": ["cat", "dog", "owl"], "flip": True, "held_out": 3, "levels": 255}
    (folder / "meta.json").write_text(json.dumps(meta))
    config = replace(CONFIG, in_channels=3, num_classes=3)
    train(config, replace(RUN, data=str(folder), out=str(folder / "out"), ema_decay=0.0, steps=12))
    return folder / "out" / "ckpt.pt"


@pytest.fixture
def sample(script, zoo, tmp_path):
    """sample("--cfg=2") -> images and labels of an .npz that sample_min.py has written."""

    def call(*arguments):
        out = tmp_path / "s.npz"
        out.unlink(missing_ok=True)
        code, stdout, _ = script("sample_min.py", zoo, "--steps=4", "--per-class=2", f"--out={out}", *arguments)
        assert code == 0 and stdout.startswith(f"{out}: ")
        with np.load(out) as npz:
            return npz["arr_0"], npz["labels"]

    return call


def test_samples_of_every_class_by_default(sample):
    images, labels = sample()
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 0, 1, 2]  # every part has them all


def test_classes_are_chosen_by_number_or_by_name(sample):
    by_number, labels = sample("--classes", "2", "0")
    by_name, names = sample("--classes", "owl", "cat")
    assert labels.tolist() == names.tolist() == [2, 0, 2, 0] and (by_number == by_name).all()
    assert (by_name != sample("--classes", "dog", "cat")[0])[::2].any()  # the same noise, another class


def test_seed_guidance_sampler_and_steps_change_the_images_and_nothing_else_does(sample):
    images = sample()[0]
    assert (images == sample()[0]).all()
    changes = ["--seed=1", "--cfg=1.0", "--cfg=4", "--sampler=ddim", "--steps=5", "--cfg-channels=1"]
    changed = [sample(change)[0] for change in changes]
    assert all((images != other).any() for other in changed)
    assert len({other.tobytes() for other in changed}) == len(changed)


def test_an_image_depends_on_seed_and_number_not_on_the_batch_or_the_processes(sample, zoo, tmp_path):
    """Products of other sizes are rounded otherwise, which may move a pixel by one of its 256 steps, not by more."""
    images, labels = sample("--per-class=5")
    for batch in (1, 4):
        assert abs(sample("--per-class=5", f"--batch={batch}")[0].astype(int) - images).max() <= 1
    process = torchrun("--standalone", "--nproc_per_node=2", "sample_min.py", zoo, "--steps=4", "--per-class=5",
                       f"--out={tmp_path}/two.npz")
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert stdout.count("15 images from step 12") == 1
    with np.load(tmp_path / "two.npz") as npz:
        assert abs(npz["arr_0"].astype(int) - images).max() <= 1 and (npz["labels"] == labels).all()


def test_grid_shows_each_class_in_a_row_of_its_own(sample, script, zoo, tmp_path):
    images, _ = sample()
    picture = tmp_path / "new folder" / "grid.png"
    assert script("sample_min.py", zoo, "--steps=4", "--per-class=2", f"--out={picture}")[0] == 0
    with Image.open(picture) as im:
        assert im.mode == "RGB"
        sheet = np.asarray(im)
    cell = 9 * 6  # eight pixels and a line, enlarged six times
    assert sheet.shape == (3 * cell, 2 * cell, 3)
    cells = sheet.reshape(3, cell, 2, cell, 3).swapaxes(1, 2).reshape(6, cell, cell, 3)
    assert (cells[:, 3:48:6, 3:48:6] == images[[0, 3, 1, 4, 2, 5]]).all()


def test_attention_dtype_is_refused_where_nothing_would_read_it(script, tmp_path):
    config, data, out = preset("DiT-digits"), prepare_digits(tmp_path / "digits"), tmp_path / "out"
    train(replace(config, depth=1), replace(RUN, data=str(data), out=str(out), steps=1))
    code, *_ = script("sample_min.py", out / "ckpt.pt", f"--out={tmp_path}/s.npz", "--attention-dtype=float32")
    assert code == "sample_min.py: error: --attention-dtype is for DyDiLA; this model has another attention"


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid_writes_every_pixel_with_lines_and_blanks_between(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (5, 24, 24, channels), np.uint8)
    save_grid(tmp_path / "grid.png", images, 3)
    with Image.open(tmp_path / "grid.png") as im:
        assert im.mode == ("L" if channels == 1 else "RGB") and im.size == (3 * 25 * 2, 2 * 25 * 2)
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


@pytest.mark.parametrize(("arguments", "message"), [
    (["--classes", "3"], "unknown class '3'; there are 3: cat, dog, owl"),
    (["--classes", "cat", "-1"], "unknown class '-1'"),
    (["--classes", "horse"], "unknown class 'horse'"),
    (["--steps=1"], "between 2 and 1000, got 1"),
    (["--steps=1001"], "between 2 and 1000, got 1001"),
    (["--per-class=0"], "--per-class, --images and --batch must be at least 1"),
    (["--images=0"], "--per-class, --images and --batch must be at least 1"),
    (["--batch=0"], "--per-class, --images and --batch must be at least 1"),
    (["--seed=-1"], "--seed must be at least 0"),
    (["--out=grid.jpg"], "--out must end in .png or .npz, got grid.jpg"),
    (["--labels=random"], "--labels random needs --images"),
])
def test_a_wrong_value_ends_sample_min_with_one_line(script, zoo, tmp_path, arguments, message):
    code, _, stderr = script("sample_min.py", zoo, f"--out={tmp_path}/s.npz", *arguments)
    assert isinstance(code, str) and code.startswith("sample_min.py: error: ") and "\n" not in code
    assert message in code and "Traceback" not in stderr and not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"weights": torch.zeros(3)}])
def test_a_checkpoint_that_is_none_ends_sample_min_with_one_line(script, tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "ckpt.pt")  # another program's
    code, _, stderr = script("sample_min.py", tmp_path / "ckpt.pt", f"--out={tmp_path}/s.npz")
    assert isinstance(code, str) and code.startswith("sample_min.py: error: ") and "\n" not in code
    assert str(tmp_path / "ckpt.pt") in code and "Traceback" not in stderr


# ---------------------------------------------------------------------------------------------------------------------
# The README.


@pytest.fixture(scope="module")
def commands():
    """Every command of the README's ```sh blocks, as a list of words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make(*targets):
    return subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, timeout=20)


def test_readme_offers_make_train_make_test_and_torchrun(commands):
    assert ["make", "train"] in commands and ["make", "test"] in commands
    assert any(command[:2] == ["torchrun", "train_min.py"] for command in commands)


def test_every_make_target_of_the_readme_exists(commands):
    for command in commands:
        if command[0] == "make":
            result = make(*command[1:])
            assert result.returncode == 0, (command, result.stderr)
    assert make("no-such-target").returncode != 0  # so that this test can fail


def test_make_train_runs_what_the_readme_says():
    assert re.search(r"\btorchrun train_min.py\b", make("train").stdout)
    assert "runs `torchrun train_min.py`" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way with memory")
def test_what_a_step_frees_the_next_one_finds():
    """In a process of its own: a step of twelve 4 MiB tensors costs their pages once, where every step did before."""
    code = """
import resource, torch, sample_min
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(12)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def main(): print(*then, faults(), faults())
then = faults(), faults()
torch.cuda.is_available = lambda: False
sample_min.run(main)
"""
    before, again, first, after = map(int, finish(start("-c", code))[0].split())
    assert min(before, again, first) > 12 and after <= 0.1 * again


def test_every_script_and_flag_of_the_readme_exists(commands, script):
    seen = 0
    for command in commands:
        if command[0] not in ("python", "torchrun") or command[1] == "-m":
            continue
        where = next(i for i, word in enumerate(command) if word.endswith(".py"))
        if command[0] == "torchrun":  # its own flags come before the script
            get_args_parser().parse_args(command[1 : where + 1])
        else:
            assert where == 1, command
        if command[where] == "setup.py":  # setuptools' own script: its commands have the flags
            command_help = [sys.executable, "setup.py", command[where + 1], "--help"]
            help_text = subprocess.run(command_help, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        else:
            help_text = script(command[where], "--help")[1]
            if command[where] == "ablate.py": help_text += script("train_min.py", "--help")[1]  # it passes them on
        for word in command[where + 1 :]:
            if word.startswith("--"):
                assert re.search(rf"(^|[\s,\[]){re.escape(word.split('=')[0])}\b(?!-)", help_text), (command, word)
        seen += 1
    assert seen >= 4


def test_every_train_command_of_the_readme_is_accepted(commands):
    import train_min

    for command in commands:
        if "train_min.py" in command:
            arguments = command[command.index("train_min.py") + 1 :]
            train_min.parse([a for a in arguments if a != "..."])


def test_every_ablate_command_of_the_readme_is_accepted(commands, monkeypatch):
    import ablate
    import train_min

    planned = []
    monkeypatch.setattr(train_min, "fit_to_data", lambda *_: None)
    monkeypatch.setattr(ablate, "complete", lambda runs, *_: planned.append(len(runs)))
    monkeypatch.setattr(ablate, "report", lambda *_: "")
    for command in commands:
        if "ablate.py" in command: ablate.main(command[command.index("ablate.py") + 1 :])
    assert planned == [9, 3 * len(ablate.REDUCED)]
