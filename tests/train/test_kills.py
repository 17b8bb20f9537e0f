"""kill -9 at any moment of a run, seeded: KILLS=100 (default 3) of them."""

import contextlib
import io
import os
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from runs import CONFIG, RUN, differing, flags, parts, read_log, without_speed

import train_min

pytestmark = pytest.mark.usefixtures("cpu")
NUMBER = int(os.environ.get("KILLS", 3))


def begin(arguments):
    """A fork of this process that trains and samples, and goes on with what it finds."""
    child, status = os.fork(), 1
    if child == 0:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                train_min.train_and_sample([*arguments, "--resume"])
            status = 0
        finally:
            os._exit(status)
    return child


def end(child, seconds):
    """The exit status of the child, which is killed after so many seconds."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(out):
    """What a run leaves: checkpoint, log without the speed, images and labels."""
    with np.load(out / "samples.npz") as made:
        samples = made["arr_0"].tobytes(), made["labels"].tobytes()
    return parts(out), without_speed(read_log(out)), samples


def stage(out):
    if (out / "samples.npz").exists():
        return "at the end"
    if (out / "samples.npz.partial").exists():
        return "sampling"
    return "training" if (out / "ckpt.pt").exists() else "before the first checkpoint"


def test_a_killed_run_goes_on_to_the_bits_of_a_whole_one(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train_min, "draw", lambda *_, **__: None)  # matplotlib takes seconds
    run = replace(RUN, data=digits, steps=10, ckpt_every=1)

    def arguments(out):
        samples = ["--samples=20", "--sampling-steps=8"]
        return [*flags(**asdict(CONFIG), **asdict(replace(run, out=str(out)))), *samples]

    train_min.train_and_sample(arguments(tmp_path / "whole"))
    whole, began = left(tmp_path / "whole"), time.monotonic()
    assert end(begin(arguments(tmp_path / "another")), 600) == 0
    took = time.monotonic() - began
    rng, killed, ended, number = random.Random(0), Counter(), 0, 0
    while killed.total() < NUMBER or number:
        out = tmp_path / str(ended)
        # the last run is not killed any more
        patience = rng.uniform(0, took) if killed.total() < NUMBER else 600
        status = end(begin(arguments(out)), patience)
        assert status in (0, -signal.SIGKILL)
        number += 1
        if status:
            killed[stage(Path(out))] += 1
            continue
        assert not differing(left(out), whole), f"after {number - 1} kills"
        assert not {".lock", "samples.npz.partial"} & {path.name for path in out.iterdir()}
        ended, number = ended + 1, 0
    print(f"{killed.total()} kills of {ended} runs: {dict(killed)}")
