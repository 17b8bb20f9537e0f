"""Two commands at once in one folder: each ends well, or with one line; what is left is whole."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from runs import (
    CONFIG,
    ROOT,
    RUN,
    at_step,
    differing,
    finish,
    flags,
    forked,
    parts,
    start,
    torchrun,
)

import train_min
from dydilit import DyDiLiT, load_checkpoint, train
from support.prepared import check_set
from support.shards import is_whole

LONG = replace(RUN, steps=200, ckpt_every=1, log_every=1, eval_every=100, warmup=0, decay=0.0)


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A model to sample from and to export."""
    out = tmp_path_factory.mktemp("model")
    train(CONFIG, replace(RUN, data=digits, out=str(out)))
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def commands(checkpoint, digits):
    """{name: command(folder)}, each of which writes to the folder."""
    make_reference = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'evaluation')!r})\n"
        "import comparing, eval_min\n"
        "eval_min.inception = comparing.toy_network\n"
        "eval_min.main(sys.argv[1:])"
    )
    sample = ["sample_min.py", checkpoint, "--steps=10", "--per-class=4"]

    def training(folder, *more):
        run = replace(RUN, data=digits, out=str(folder), steps=30)
        samples = ["--samples=20", "--sampling-steps=5"]
        return ["train_min.py", *flags(**asdict(CONFIG), **asdict(run)), *samples, *more]

    return {
        "train": training,
        "train --resume": lambda folder: training(folder, "--resume"),
        "sample npz": lambda folder: [*sample, f"--out={folder}/s.npz", "--batch=8"],
        "sample png": lambda folder: [*sample, f"--out={folder}/s.png"],
        "export": lambda folder: ["sample_min.py", checkpoint, f"--export={folder}"],
        "prepare": lambda folder: ["data/digits/prepare.py", f"--out={folder}"],
        "reference": lambda folder: [
            "-c", make_reference, digits, f"--make-reference={folder}/ref.npz"
        ],
    }


# --------------------------------------------------------------------------------------------------
# A folder that another process holds.


@pytest.fixture
def holder():
    """holder(path) -> a process that holds it until the test ends."""
    held = []

    def call(path):
        code = "import sys\nfrom support.lock import one_writer\n"
        code += "with one_writer(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "held\n"
        held.append(process)
        return process

    yield call
    for process in held:
        process.communicate("")


SECOND = [("train --resume", ""), ("sample npz", "s.npz"), ("sample png", "s.png"), ("export", "")]


@pytest.mark.parametrize(("name", "held"), SECOND)
def test_a_second_writer_is_told_in_one_line_who_writes(
    commands, holder, script, tmp_path, name, held
):
    other = holder(tmp_path / held)
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = script(*commands[name](tmp_path))
    assert (stdout, stderr) == ("", "") and "\n" not in code
    assert f".py: error: {tmp_path / held} is being written by process {other.pid} on " in code
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "held"), [("train", ""), ("reference", "ref.npz")])
def test_the_shell_sees_the_same_line(commands, holder, tmp_path, name, held):
    other = holder(tmp_path / held)
    before = sorted(tmp_path.iterdir())
    process = start(*commands[name](tmp_path))
    stdout, stderr = finish(process)
    assert process.returncode in (1, 2) and stdout == "" and stderr.count("\n") == 1
    writes = f"{tmp_path / held} is being written by process {other.pid} on "
    assert f".py: error: {writes}" in stderr or f"-c: error: {writes}" in stderr
    assert sorted(tmp_path.iterdir()) == before


def test_under_torchrun_the_line_comes_once(commands, holder, tmp_path):
    holder(tmp_path)
    process = torchrun("--standalone", "--nproc_per_node=2", *commands["train --resume"](tmp_path))
    stderr = finish(process)[1]
    assert process.returncode == 1 and stderr.count("is being written by") == 1
    assert stderr.count("Traceback") == 1, "torchrun's own"


def test_a_run_can_be_sampled_from_while_it_trains(commands, holder, script, checkpoint):
    holder(checkpoint.parent)
    code, _, stderr = script(*commands["sample npz"](checkpoint.parent))
    assert code == 0, stderr


def test_two_seeds_in_one_folder_do_not_mix(digits, tmp_path):
    """The run that came first is, to the bit, the one that had the folder for itself."""
    out = tmp_path / "out"
    processes = []
    for seed in (0, 5):
        run = replace(LONG, data=digits, out=str(out), seed=seed)
        arguments = [*flags(**asdict(CONFIG), **asdict(run)), "--samples=0", "--resume"]
        processes.append(start("train_min.py", *arguments))
    stderr = [finish(process)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], stderr
    first = [process.returncode for process in processes].index(0)
    assert "out is being written by process" in stderr[1 - first]
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    alone = replace(LONG, data=digits, out=str(tmp_path / "alone"), seed=(0, 5)[first])
    train(CONFIG, alone)
    assert not differing(parts(alone.out), parts(out))


def test_a_run_that_was_killed_blocks_nobody(digits, script, tmp_path):
    out = tmp_path / "out"
    endless = replace(LONG, data=digits, out=str(out), steps=10**6)
    arguments = [*flags(**asdict(CONFIG), **asdict(endless)), "--samples=0", "--resume"]

    def killed():
        at_step(lambda step: step == 3 and os.kill(os.getpid(), signal.SIGKILL))
        train_min.main(arguments)

    assert forked(killed) == -signal.SIGKILL and (out / ".lock").exists()
    step = load_checkpoint(out / "ckpt.pt")["step"]
    code, _, stderr = script("train_min.py", *arguments, f"--steps={step + 2}")
    assert code == 0, stderr
    assert load_checkpoint(out / "ckpt.pt")["step"] == step + 2
    assert not (out / ".lock").exists()


# --------------------------------------------------------------------------------------------------
# Every two commands.


def assert_whole(folder):
    """Every file of the folder can be read, and nothing unfinished is left."""
    names = {p.name for p in folder.iterdir()}
    for name in names:
        assert not name.endswith((".tmp", ".lock", ".partial")), name
        path = folder / name
        if name == "ckpt.pt":
            assert load_checkpoint(path)["step"] == 30
        elif name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, 31))
        elif path.suffix == ".npz":
            with np.load(path) as npz:
                assert is_whole(path) and "arr_0" in npz.files
        elif path.suffix == ".png":
            with Image.open(path) as im:
                im.load()
    if "meta.json" in names:
        assert names >= {"images.npy", "labels.npy"}
        check_set(folder, CONFIG)
    if names & {"config.json", "model.safetensors"}:
        DyDiLiT.from_pretrained(folder)


NAMES = ["train", "train --resume", "sample npz", "sample png", "export", "prepare", "reference"]


def test_every_pair_of_commands_ends_well_or_in_one_line(commands, tmp_path):
    """PAIRS=28 (default 3) of all pairs, the second a moment after the first; drawn from a seed."""
    assert NAMES == list(commands)
    rng = np.random.default_rng(0)
    pairs = list(itertools.combinations_with_replacement(NAMES, 2))
    drawn = rng.permutation(len(pairs))[: int(os.environ.get("PAIRS", 3))]
    ended = {"both well": 0, "one in a line": 0}
    for number, names in ((n, pairs[n]) for n in drawn):
        folder = tmp_path / str(number)
        folder.mkdir()
        processes = []
        for name in names:
            processes.append(start(*commands[name](folder)))
            time.sleep(rng.choice([0, 0.1, 0.5]))
        outputs = [finish(process) for process in processes]
        for process, (_, stderr) in zip(processes, outputs):
            assert "Traceback" not in stderr, (names, stderr)
            lines = [line for line in stderr.splitlines() if "error: " in line]
            assert len(lines) == (process.returncode != 0), (names, stderr)
        codes = [process.returncode for process in processes]
        assert 0 in codes and set(codes) <= {0, 1, 2}, (names, outputs)
        assert_whole(folder)
        ended["one in a line" if any(codes) else "both well"] += 1
    print(f"{sum(ended.values())} pairs of commands in one folder: {ended}")
