"""ablate.py: which runs it starts, what its tables say, and that no kill changes them."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparison import MODELS, TINY, TWO, Here, memory_of, runs_started_by
from runs import ROOT, read_log

import dydilit
from eval_min import evaluate
from experiments import ablate, classifier, costs, figures, pretrained, tables
from experiments.baselines import LADDER, VARIANTS, variant


def cells(table):
    """{first cell: the others} of a Markdown table."""
    header, _, *rows = table.splitlines()
    lines = [line.strip("| ").split(" | ") for line in (header, *rows)]
    return {line[0]: line[1:] for line in lines}


def table_of(out, number=0):
    """A table in ablate.md, where the command and its conditions come first."""
    return cells((out / "ablate.md").read_text().split("\n\n")[2 + number])


def numbers_of(cell):
    """Mean and deviation of a cell."""
    return [float(x) for x in re.findall(r"-?\d[\d.]*(?:e[+-]\d+)?", cell)]


def copied(finished, tmp_path):
    """A copy of a finished comparison, and the arguments that made it."""
    out, arguments = finished
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    return tmp_path, [a.replace(str(out), str(tmp_path)) for a in arguments]


# --------------------------------------------------------------------------------------------------
# The tables.


@pytest.fixture(scope="module")
def measured(finished, digits):
    """{model: {figure: [its value in each run]}}, from the logs and the samples."""
    out, _ = finished
    figures_of = {}
    for model in MODELS:
        values = {name: [] for name in tables.COLUMNS}
        for seed in "01":
            folder = out / model / seed
            with np.load(folder / "samples.npz") as made:
                found = evaluate(made["arr_0"], made["labels"], digits)
                found |= classifier.judge(made["arr_0"], made["labels"], digits)
            found |= read_log(folder)[-1]
            for name in values:
                values[name].append(found[name])
        figures_of[model] = values
    return figures_of


@pytest.mark.parametrize("model", MODELS)
def test_cells_are_mean_and_deviation_over_the_seeds(finished, measured, model):
    table = table_of(finished[0])
    row = dict(zip(table["model"], table[model]))
    for name, title in tables.COLUMNS.items():
        values = measured[model][name]
        mean, deviation = numbers_of(row[title])
        scale, tolerance = 1, 0.0011 * abs(np.mean(values))
        if "%" in row[title]:
            scale, tolerance = 100, 0.051
        assert mean == pytest.approx(scale * np.mean(values), abs=tolerance), title
        assert deviation == pytest.approx(scale * np.std(values, ddof=1), abs=tolerance), title


@pytest.mark.parametrize("model", MODELS)
def test_a_row_has_the_size_and_the_costs_of_the_model(finished, model):
    out, _ = finished
    table = table_of(out)
    row = dict(zip(table["model"], table[model]))
    state = torch.load(out / model / "0" / "ckpt.pt")["model"]
    parameters = sum(z.numel() for name, z in state.items() if name != "pos_embed")
    assert row["seeds"] == "2" and row["blocks"] == "2"
    assert row["parameters"] == f"{parameters / 1e6:.2f} M"
    assert float(row["step, ms"]) >= 0 and row["memory, MiB"] == "12"


def test_differences_are_taken_seed_by_seed(finished, measured):
    table = table_of(finished[0], 1)
    assert list(table) == ["model", "ladder-0-sana"], "DyDi-LiT minus ladder-4, which is not there"
    row = dict(zip(table["model"], table["ladder-0-sana"]))
    assert (row["minus"], row["seeds"]) == ("DyDi-LiT", "2")
    for name, title in tables.COLUMNS.items():
        gaps = np.subtract(measured["ladder-0-sana"][name], measured["DyDi-LiT"][name])
        scale, tolerance = (100, 0.051) if "%" in row[title] else (1, 0.0011 * abs(gaps.mean()))
        want = [scale * gaps.mean(), scale * gaps.std(ddof=1)]
        assert numbers_of(row[title]) == pytest.approx(want, abs=max(tolerance, 1e-5)), title


def test_a_row_of_the_papers_tables_is_compared_with_the_row_that_it_changes():
    loss = {name: i * i for i, name in enumerate([*LADDER, "DyDi-LiT", "Sana"])}
    results = {name: {0: {"held_out_loss": loss[name]}} for name in loss}
    results["Sana"] = {1: {"held_out_loss": 0}}  # a seed that no other model has
    results["map-wise"][0] = {"diverged": "step 1: loss nan"}
    table = cells(tables.differences(results))
    rungs = [name for name in LADDER if name.startswith("ladder")]
    pairs = dict(zip(rungs[1:-1], rungs))
    pairs |= {"DyDi-LiT": rungs[-2], "rising-lambda": rungs[-2]}
    pairs |= {rungs[0]: "DyDi-LiT", rungs[-1]: "DyDi-LiT"}
    assert table.keys() - {"model"} == pairs.keys()
    for name, other in pairs.items():
        assert table[name][:2] == [other, "1"]
        assert numbers_of(table[name][2]) == [pytest.approx(loss[name] - loss[other])]
    assert tables.differences({"DiT": results["DyDi-LiT"]}) is None


def test_the_table_has_every_model_and_half_of_the_real_images(finished):
    assert list(table_of(finished[0])) == ["model", *MODELS, "half of the real images"]


def test_the_conditions_stand_above_the_table(finished, digits):
    text = (finished[0] / "ablate.md").read_text()
    assert "40 steps of 8 images; 40 samples, 3 steps" in text
    share = re.search(r"classifier.py, which recognises ([\d.]+) % of the held-out images", text)
    accuracy = classifier.fitted(digits).held_out_accuracy
    assert float(share[1]) == pytest.approx(100 * accuracy, abs=0.051)


def test_results_json_has_every_run(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    assert list(results) == list(MODELS)
    assert all(list(runs) == ["0", "1"] for runs in results.values())


# --------------------------------------------------------------------------------------------------
# What is done once.


def test_finished_runs_are_not_repeated(finished, tmp_path, monkeypatch, capsys):
    out, arguments = copied(finished, tmp_path)
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    before = {path: path.read_bytes() for path in files if path.name != "ablate.md"}
    runs_started_by(None, monkeypatch)
    monkeypatch.setattr(costs, "times_of", None)
    ablate.main(arguments)
    assert {path: path.read_bytes() for path in before} == before
    said = capsys.readouterr().out.partition("\n\nwrote")[0]
    assert (out / "ablate.md").read_text().startswith(said)


def test_an_unfinished_run_is_started(finished, tmp_path, monkeypatch):
    _, arguments = copied(finished, tmp_path)
    runs_started_by(None, monkeypatch)
    with pytest.raises(TypeError, match="NoneType"):
        ablate.main([a.replace("--seeds=2", "--seeds=3") for a in arguments])


def test_a_folder_of_other_runs_is_an_error(finished, tmp_path):
    _, arguments = copied(finished, tmp_path)
    message = r"ladder-0-sana/0 holds another run, .*--steps=40.*, not .*--steps=41"
    with pytest.raises(ValueError, match=message):
        ablate.main([a.replace("--steps=40", "--steps=41") for a in arguments])


@pytest.mark.parametrize("fails", ["draw", "training_costs", "sampling_costs"])
def test_an_error_in_a_figure_or_a_measurement_costs_no_result(
    finished, tmp_path, monkeypatch, fails
):
    out, arguments = copied(finished, tmp_path)
    for file in ("ablate.md", "results.json", "costs.json"):
        (out / file).unlink()

    def failing(*_):
        raise RuntimeError("days are not lost")

    monkeypatch.setattr(figures if fails == "draw" else ablate, fails, failing)
    monkeypatch.setattr(costs, "memory_of", memory_of)
    runs_started_by(None, monkeypatch)
    if fails == "sampling_costs":
        arguments[arguments.index("--resolutions")] = "--resolutions=16"
    with pytest.raises(RuntimeError, match="days are not lost"):
        ablate.main(arguments)
    now, then = table_of(out), table_of(finished[0])
    for name in then:
        assert now[name][:-2] == then[name][:-2]
    for model in MODELS:
        step, memory = now[model][-2:]
        assert (step == "-") == (memory == "-") == (fails == "training_costs")
    assert (out / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()


def test_nproc_reaches_the_measurement(finished, tmp_path, monkeypatch):
    out, arguments = copied(finished, tmp_path)

    def costs_of(models, configs, batch, *_):
        return {model: [batch, None] for model in models}

    runs_started_by(None, monkeypatch)
    monkeypatch.setattr(costs, "costs_of", costs_of)
    ablate.main([*arguments, "--nproc=2"])
    assert table_of(out)["DyDi-LiT"][-2:] == ["4000", "-"]
    text = (out / "ablate.md").read_text()
    assert "step: 4 images (of 8: what a process takes" in text


# --------------------------------------------------------------------------------------------------
# Data without held-out images, and latents.


@pytest.fixture
def without_held_out(tmp_path, monkeypatch):
    """compare(latents) -> (folder, {column: DyDi-LiT's cell}, {clip of every sampling})."""
    runs_started_by(Here, monkeypatch)
    monkeypatch.setattr(costs, "memory_of", memory_of)
    clips, sample = set(), dydilit.Diffusion.sample

    def watching(*args, clip, **options):
        clips.add(clip)
        return sample(*args, clip=clip, **options)

    monkeypatch.setattr(dydilit.Diffusion, "sample", watching)

    def compare(latents):
        flags = [*TINY, "--steps=4", "--bf16"]
        if latents:
            flags = [flag for flag in flags if not flag.startswith("--sampl")]
            flags += ["--input-size=8", "--preset-size=S/2"]
        data = tiny_set(tmp_path / "data", latents)
        ablate.main([*TWO, f"--data={data}", f"--out={tmp_path}/out", *flags])
        table = table_of(tmp_path / "out")
        return tmp_path / "out", dict(zip(table["model"], table["DyDi-LiT"])), clips

    return compare


def tiny_set(folder, latents):
    """40 images of two classes, none held out, as README prepares ImageNet."""
    rng = np.random.default_rng(0)
    meta = {"name": "tiny", "classes": ["a", "b"], "flip": True, "held_out": 0, "levels": 255}
    if latents:  # no autoencoder has this name; looking for it would be an error
        meta |= {"scaling": 0.5, "vae": f"{folder}/none", "pixels": 64}
        images = rng.random((40, 2, 8, 8, 8)).astype(np.float16)
    else:
        images = rng.integers(256, size=(40, 1, 8, 8)).astype(np.uint8)
    folder.mkdir()
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(40) % 2)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("latents", [False, True])
def test_data_without_held_out_images(latents, without_held_out):
    out, row, clips = without_held_out(latents)
    assert row["held-out loss"] == "-"
    assert row["memory, MiB"] == "12"
    drawn = ["routes.png"] if latents else ["routes.png", "tsne.png"]
    assert sorted(path.name for path in out.glob("*.png")) == drawn
    text = (out / "ablate.md").read_text()
    assert "![routes.png](routes.png)" in text and "step: 8 images, bfloat16 autocast, " in text
    assert clips == {not latents}
    # of latents no samples are made
    assert (row["Frechet distance"] == "-") == latents
    assert ("images; no samples. Mean" in text) == latents
    assert len([*out.glob("*/*/samples.npz")]) == (0 if latents else 4)


def plan_of_latents(tmp_path, *flags):
    data = tiny_set(tmp_path / "data", latents=True)
    args = argparse.Namespace(
        models=["DyDi-LiT"], size="S/2", data=str(data), out="out", seeds=1, nproc=1
    )
    return ablate.plan(args, [*flags])


def test_samples_of_latents_are_made_if_asked_for(tmp_path):
    plan = plan_of_latents(tmp_path, "--samples", "30", "--cfg=4")
    assert ablate.parse(plan["DyDi-LiT", 0])[2].samples == 30


def test_settings_of_samples_that_are_not_made_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="--cfg and --sampling-steps do nothing without --s"):
        plan_of_latents(tmp_path, "--cfg=4")


def test_samples_of_latents_are_said_not_to_be_evaluated(digits, finished, monkeypatch):
    out = finished[0] / "DyDi-LiT" / "0"
    model = pretrained.load(out / "ckpt.pt")
    model.meta["scaling"] = 0.5
    monkeypatch.setattr(pretrained, "load", lambda path: model)
    result = ablate.measured(out, digits, out / "samples.npz", "cpu")
    assert "eval_min.py" in result["not_evaluated"] and "kid" not in result
    assert "not_evaluated" not in ablate.measured(out, digits, None, "cpu")


# --------------------------------------------------------------------------------------------------
# Kills, errors, several processes.


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def begin(out, digits):
    """The real command, in processes."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "experiments.ablate", *TWO, *TINY, "--jobs=1"]
    return subprocess.Popen(
        [*command, f"--data={digits}", f"--out={out}"],
        env=os.environ | settings,
        start_new_session=True,
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill(process):
    """Kill the process and all that it has started; wait for the end."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 10
    while alive(process.pid) and time.time() < deadline:
        time.sleep(0.05)


def test_killed_and_continued_it_gives_the_same_table(finished, digits, tmp_path):
    """All processes are killed when the second run has left its first checkpoint."""
    for model in MODELS:  # the runs of the second seed are there
        shutil.copytree(finished[0] / model / "1", tmp_path / model / "1")
    first, second = (tmp_path / model / "0" for model in MODELS)
    process = begin(tmp_path, digits)
    while not (second / "ckpt.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    kill(process)
    written = (first / "ckpt.pt").stat().st_mtime_ns
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    assert not (tmp_path / "ablate.md").exists()

    process = begin(tmp_path, digits)
    stdout, stderr = process.communicate(timeout=300)
    said = "".join(path.read_text() for path in tmp_path.rglob("output.txt"))
    assert process.returncode == 0, stderr + said
    assert "1/1  DyDi-LiT, seed 0: held-out loss" in stdout
    assert (first / "ckpt.pt").stat().st_mtime_ns == written, "a finished run is not repeated"
    now, then = table_of(tmp_path), table_of(finished[0])
    assert {model: row[:-2] for model, row in now.items()} == {
        model: row[:-2] for model, row in then.items()
    }
    for model in MODELS:
        assert float(now[model][-1]) > 0.1, "MiB, measured in a process"


# fmt: off
WRONG = [
    (["--models", "DiT", "DyDiT"],
     r"unknown model 'DyDiT'; known: DyDi-LiT, no-normalize, .*batch-norm, Sana-1.5, DiT-.*map-w"),
    (["--preset-size=S/3"], r"unknown preset '\S*S/3'; known: S/2, B/2, L/2, pixels32, photos, "),
    (["--seeds=0"], "--seeds, --jobs and --nproc must be at least 1"),
    (["--models", "DiT:0"], "--models DiT:0: the number of seeds must be at least 1"),
    (["--models", "DiT:"], "--models DiT:: the number of seeds must be at least 1"),
    (["--models", "DiT", "--lr=-1"], "Training.lr must be"),
    (["--models", "DiT", "DyDi-LiT", "--preset", "photos"],
     "no --preset: --preset-size and --models instead"),
    (["--preset=photos"], "no --preset: --preset-size and --models instead"),
    (["--seed", "3"], "no --seed: --seeds instead"),
    (["--seed=3"], "no --seed: --seeds instead"),
    (["--models", "DyDi-LiT", "--preset-size=DiT-digits"],
     "unknown preset 'DiT-digits'; known: S/2"),
    (["--models", "DiT", "Sana", "--attention=relu"],
     "DiT would not be what its name says: flags change its atten"),
    (["--models", "no-normalize", "--normalize"],
     "no-normalize would not be .* flags change its normalize"),
    (["--models", "DyDi-LiT", "no-normalize", "--no-normalize"],
     "DyDi-LiT and no-normalize are one and the same mod"),
    (["--nproc=3"], "batch_size 64 for --nproc 3: not divisible"),
    (["--nproc=2", "--micro-batch=12"],
     "batch_size 64 for --nproc 2: not divisible, or not by micro_batch 12"),
    (["--resolutions", "256", "500"], "--resolutions must be multiples of 16"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_is_an_error_before_anything_runs(
    arguments, message, tmp_path, monkeypatch
):
    runs_started_by(None, monkeypatch)
    with pytest.raises(ValueError, match=message):
        ablate.main([*arguments, f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_fields_that_no_name_sets_may_be_changed():
    names = ["DiT", "DyDi-LiT", "DiT", "no-normalize"]
    args = argparse.Namespace(models=names, size="digits", data=None, out="out", seeds=2, nproc=2)
    flags = ["--depth=2", "--n-kernels=4", "--no-router-grad", "--micro-batch=16"]
    plan = ablate.plan(args, flags)
    assert len(plan) == 6
    for argv in plan.values():
        config, _, _ = ablate.parse(argv)
        assert (config.depth, config.n_kernels, config.router_grad) == (2, 4, False)
    assert ablate.plan(args, [*flags, "--resume"]) == plan, "every run has --resume anyway"


def test_a_model_may_have_seeds_of_its_own():
    names = ["DiT:1", "DyDi-LiT", "MHLA:3"]
    args = argparse.Namespace(models=names, size="digits", data=None, out="out", seeds=2, nproc=1)
    runs = [*ablate.plan(args, [])]
    first = [("DiT", 0), ("DyDi-LiT", 0), ("MHLA", 0)]
    assert runs == [*first, ("DyDi-LiT", 1), ("MHLA", 1), ("MHLA", 2)], "the first seeds first"


def test_every_model_is_trained_as_its_name_says():
    names = [*ablate.ALTERNATIVES, *VARIANTS]
    configs = {name: ablate.parse(ablate.arguments(name, "digits"))[0] for name in names}
    digits = dydilit.PRESETS["digits"]
    assert configs["DyDi-LiT"] == digits
    assert configs["DiT"] == variant("DiT", digits)
    assert configs["no-normalize"] == replace(digits, normalize=False)
    assert configs["no-router-grad"] == replace(digits, router_grad=False)
    assert configs["batch-norm"] == replace(variant("ladder-5-dwc", digits), batch_norm=True)
    last = variant("ladder-5-dwc", digits)
    for rule in ("score", "dense"):
        assert configs[f"router-{rule}"] == replace(last, router_rule=rule)
    assert configs["Sana-1.5"] == replace(configs["Sana"], qk_norm=True)
    assert configs["DiT-glumbconv"] == replace(configs["DiT"], feed_forward="glumbconv")
    assert {*ablate.DEFAULT} <= configs.keys() and {*figures.RUNGS} <= {*ablate.DEFAULT}


@pytest.fixture
def diverged(digits, tmp_path):
    """The result of a run that diverges."""
    arguments = [*ablate.arguments("DyDi-LiT", "digits"), *TINY, "--lr=1e30", "--warmup=0"]
    arguments += [f"--data={digits}", "--resume", f"--out={tmp_path}"]
    ablate.work(arguments)
    return ablate.result_of(arguments)


def test_a_run_that_diverges_is_a_result(diverged):
    assert diverged["diverged"].startswith("step 1: loss")
    assert ablate.outcome_of(diverged) == diverged["diverged"]


def test_runs_that_diverged_are_counted_and_in_no_figure(finished, diverged):
    results = json.loads((finished[0] / "results.json").read_text()) | {"broken": {"0": diverged}}
    results["DyDi-LiT"]["1"] = diverged
    costs_of = {model: [0.001, 1] for model in results}
    table = cells(tables.quality(results, costs_of))
    columns = 2 + len(tables.COLUMNS)
    assert table["broken (1 diverged)"] == ["1"] + ["-"] * columns + ["1", "1"]
    one = results["DyDi-LiT"]["0"]["held_out_loss"]
    cell = table["DyDi-LiT (1 diverged)"][3]
    assert float(cell) == pytest.approx(one, rel=1e-3), "one value has no spread"


def test_a_mean_is_given_to_four_digits_or_as_asked_and_zero_has_no_sign():
    assert tables.spread([0.1234567]) == "0.1235"
    assert tables.spread([0.5, 0.7, None], percent=True) == "60.0 ± 14.1 %"
    assert tables.spread([-0.04, 0.0], digits=1) == "0.0 ± 0.0"
    assert tables.spread([None]) == "-"


def test_missing_costs_are_dashes(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    table = cells(tables.quality(results, {"DyDi-LiT": [None, None]}))
    assert table["DyDi-LiT"][-2:] == ["-", "-"] == table["ladder-0-sana"][-2:]


class Failing:
    """A process that fails. At most three run at a time."""

    commands, active = [], []

    def __init__(self, command, cwd, env, stdout, stderr):
        self.commands.append(command)
        self.active.append(self)
        assert len(self.active) <= 3
        assert env["OMP_NUM_THREADS"] == "1" or "OMP_NUM_THREADS" in os.environ

    def poll(self):
        self.returncode = 1
        if len(self.active) == 3 or len(self.commands) == 4:
            self.active.clear()
        return None if self in self.active else 1

    def terminate(self):
        pass


def test_several_processes_and_jobs(finished, tmp_path, monkeypatch):
    """--nproc: torchrun; --jobs: runs at a time. Failed runs are named after all the others."""
    monkeypatch.setattr(Failing, "commands", [])
    monkeypatch.setattr(Failing, "active", [])
    runs_started_by(Failing, monkeypatch)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    arguments = [a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]]
    message = r"not finished: .*ladder-0-sana/0 \(exit status 1; .*DyDi-LiT/1 \(exit"
    with pytest.raises(OSError, match=message):
        ablate.main([*arguments, "--nproc=2", "--jobs=3"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    begin = [*torchrun, "-m", "experiments.ablate", "--one-run"]
    assert [command[1:8] for command in Failing.commands] == [begin] * 4


def test_a_run_on_two_processes_ends(digits, tmp_path, monkeypatch):
    """The real torchrun, which reads the flags behind the script as well."""
    args = argparse.Namespace(
        models=["DyDi-LiT"], size="digits", data=digits, out=tmp_path, seeds=1, nproc=2
    )
    runs = ablate.plan(args, [*TINY, "--steps=4", "--micro-batch=2", "--bf16"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (result,) = ablate.complete(runs, 1, 2).values()
    assert result["held_out_loss"] > 0 and result["n"] == 40


def test_interrupted_it_ends_the_runs_that_it_has_started(finished, tmp_path, monkeypatch):
    calls = []

    class Endless:
        def __init__(self, *_, **__):
            calls.append("start")

        def terminate(self):
            calls.append("terminate")

        def wait(self):
            calls.append("wait")

        def poll(self):
            if calls.count("start") == 2:
                raise KeyboardInterrupt

    runs_started_by(Endless, monkeypatch)
    arguments = [a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]]
    with pytest.raises(KeyboardInterrupt):
        ablate.main([*arguments, "--jobs=2"])
    assert calls == ["start"] * 2 + ["terminate"] * 2 + ["wait"] * 2
