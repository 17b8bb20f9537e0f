"""Runs of several processes, and runs that get a signal or are killed; slow."""

import json
import shlex
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from runs import (
    CONFIG,
    RUN,
    assert_same_run,
    contents,
    differing,
    finish,
    flags,
    parts,
    read_log,
    resume,
    start,
    torchrun,
    without_speed,
)

import train_min
from dydilit import DyDiLiT, load_checkpoint, train
from support import processes

pytestmark = pytest.mark.usefixtures("cpu")
UNDER_TORCHRUN = "tests/train/under_torchrun.py"


# ----------------------------------------------------------------------------------------------
# One process that gets a signal.


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    """{signal: (Training, process, stdout, stderr)} of a long run of train_min.py that got it."""
    processes, results = {}, {}
    for s in (signal.SIGTERM, signal.SIGINT):
        out = str(tmp_path_factory.mktemp("interrupted") / "out")
        endless = {"steps": 1_000_000, "ckpt_every": 1_000_000, "decay": 0.0}
        training = replace(RUN, data=digits, out=out, **endless)
        command = flags(**asdict(CONFIG), **asdict(training))
        processes[s] = training, start("train_min.py", *command)
    for s, (training, process) in processes.items():
        log, deadline = Path(training.out, "log.jsonl"), time.time() + 100
        while not (log.exists() and len(log.read_bytes().splitlines()) > 3):
            assert process.poll() is None and time.time() < deadline, finish(process, 0)
            time.sleep(0.01)
        process.send_signal(s)
        results[s] = training, process, *finish(process)
    return results


SIGNALS = pytest.mark.parametrize("s", [signal.SIGTERM, signal.SIGINT])


@SIGNALS
def test_an_interrupted_run_exits_with_130_and_leaves_checkpoint_and_log(interrupted, s):
    training, process, _, stderr = interrupted[s]
    assert process.returncode == 130 and "Traceback" not in stderr
    assert sorted(contents(training.out)) == ["ckpt.pt", "log.jsonl"]


@SIGNALS
def test_an_interrupted_run_prints_the_command_to_go_on(interrupted, s):
    training, _, stdout, _ = interrupted[s]
    step = load_checkpoint(Path(training.out, "ckpt.pt"))["step"]
    message = stdout.strip().splitlines()[-1]
    assert f"stopped at step {step} of 1000000, saved {training.out}/ckpt.pt" in message
    command = shlex.split(message.split("to go on: ")[1])
    assert command[:2] == ["python", "train_min.py"] and "--resume" in command
    config, again, arguments = train_min.parse(command[2:])
    assert (config, again, arguments.resume) == (CONFIG, training, True)


@SIGNALS
def test_an_interrupted_run_continues_to_the_bits_of_an_uninterrupted_one(interrupted, s, tmp_path):
    training = interrupted[s][0]
    step = load_checkpoint(Path(training.out, "ckpt.pt"))["step"]
    training = replace(training, steps=step + 3)
    assert resume(CONFIG, training) == step + 3
    whole = replace(training, out=str(tmp_path / "whole"))
    train(CONFIG, whole)
    assert_same_bits(whole.out, training.out)


def assert_same_bits(a, b):
    """Two folders hold the same checkpoint and the same log."""
    assert not differing(parts(a), parts(b))
    assert without_speed(read_log(a)) == without_speed(read_log(b))


# ----------------------------------------------------------------------------------------------
# Two processes.


@pytest.fixture(scope="module")
def alone(cpu, digits, tmp_path_factory):
    """The folder of the run that all of the following repeat, in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(CONFIG, replace(RUN, data=digits, out=str(out)))
    return out


@pytest.fixture(scope="module")
def together(digits, tmp_path_factory):
    """The runs of `together` in under_torchrun.py: their folder, and what each rank found."""
    out = tmp_path_factory.mktemp("together")
    process = torchrun(
        "--standalone", "--nproc_per_node=2", UNDER_TORCHRUN, "together", digits, out
    )
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    return out, [json.loads((out / f"rank{r}.json").read_text()) for r in (0, 1)]


def test_two_processes_train_the_model_of_one(alone, together):
    assert_same_run(alone, together[0] / "plain")


def test_two_processes_that_compile_train_the_model_of_one(alone, together):
    assert_same_run(alone, together[0] / "compiled")
    assert parts(together[0] / "compiled")["model"].keys() == parts(alone)["model"].keys()


def test_two_processes_that_accumulate_train_the_model_of_one(alone, together):
    assert_same_run(alone, together[0] / "accumulated")


def test_two_processes_that_accumulate_exchange_gradients_once_a_step(together):
    # six steps of two micro-batches each
    assert [rank["reductions"] for rank in together[1]] == [6, 6]


def test_the_checkpoint_of_two_processes_is_that_of_a_single_model(together):
    out = together[0] / "plain"
    # DistributedDataParallel would write "module." before each name
    assert parts(out)["model"].keys() == DyDiLiT(CONFIG).state_dict().keys()
    DyDiLiT.from_pretrained(out / "ckpt.pt")


def test_processes_that_see_different_checkpoints_refuse_to_start(together):
    message = "the processes find checkpoints of steps [6, 0]: all machines must share"
    assert all(rank["apart"].startswith(message) for rank in together[1])
    assert not (together[0] / "apart1").exists()


def test_a_signal_to_one_process_stops_all_after_the_same_step(together):
    assert [rank["stopped"] for rank in together[1]] == [2, 2]


def test_two_processes_resume_to_the_bits_of_their_uninterrupted_run(together):
    assert_same_bits(together[0] / "plain", together[0] / "stopped")


# ----------------------------------------------------------------------------------------------
# torchrun on two machines, and restarts.


def two_agents(*arguments):
    """Two torchruns with a process each, as on two machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command = ["--nnodes=2", "--nproc_per_node=1", *rendezvous, *arguments]
    agents = [torchrun(*command) for _ in range(2)]
    outputs = [finish(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs


def test_two_torchrun_agents_train_the_model_of_one_process(alone, digits, tmp_path):
    training = asdict(replace(RUN, data=digits, out=str(tmp_path / "out")))
    two_agents("train_min.py", *flags(**asdict(CONFIG), **training, samples=0))
    assert_same_run(alone, tmp_path / "out")


def assert_restarted_from_step_3(out):
    """Both ranks of `killed` in under_torchrun.py began at step 0, and again at the checkpoint."""
    first_steps = {p.name: int(p.read_text()) for p in out.glob("first_step_*")}
    assert first_steps == {
        "first_step_0_0": 0,
        "first_step_0_1": 0,
        "first_step_1_0": 3,
        "first_step_1_1": 3,
    }


def test_torchrun_restarts_a_killed_process_from_the_last_checkpoint(together, digits, tmp_path):
    how = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = torchrun(*how, UNDER_TORCHRUN, "killed", digits, tmp_path)
    _, stderr = finish(process)
    assert process.returncode == 0, stderr
    assert_restarted_from_step_3(tmp_path)
    assert_same_bits(together[0] / "plain", tmp_path / "run")


def test_two_torchrun_agents_restart_a_killed_process(together, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    two_agents("--max-restarts=2", UNDER_TORCHRUN, "killed", digits, tmp_path)
    assert_restarted_from_step_3(tmp_path)
    assert_same_bits(together[0] / "plain", tmp_path / "run")


def test_restarts_on_several_machines_are_refused_where_they_would_hang(monkeypatch):
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.dist, "rendezvous", lambda _: iter([(None, 0, 2)]))
    with pytest.raises(ValueError, match="restart only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        processes.join()
