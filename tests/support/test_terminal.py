"""support/terminal.py: the bar, the error line, the memory that stays."""

import signal
import sys
import time

import pytest
from runs import ROOT, finish, start, torchrun

from support.terminal import Progress


def test_progress_into_a_file_is_a_line_at_the_start_and_at_the_end(capsys):
    progress = Progress("sample", 3)
    for _ in range(3):
        progress("text")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("sample [########................] 1/3  text")
    assert last.startswith("sample [########################] 3/3  text")


def test_progress_on_a_terminal_stays_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("sample", 2)
    progress()
    progress()
    shown = capsys.readouterr().err
    assert shown.count("\r") == 2 and shown.count("\n") == 1 and shown.endswith("\n")


def test_progress_may_be_quiet(capsys):
    Progress("sample", 1, quiet=True)()
    assert capsys.readouterr().err == ""


def test_a_resumed_run_does_not_count_what_was_done_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("support.terminal.time.time", lambda: now[0])
    progress = Progress("train", 100)
    progress(done=50)
    assert "/s" not in progress.line("", 0.0)
    now[0] = 10.0
    progress(done=60)
    assert progress.line("", 10.0).endswith("1.00/s  40 s left")


ENDS = """
import os, sys
from support.terminal import run
folder, *errors = sys.argv[1:]
sys.argv[1:] = []
for number, error in enumerate(errors):
    if os.fork() == 0:
        os.dup2(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT), 2)
        def main():
            raise eval(error)
        run(main, ValueError)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
ERRORS = {
    "ValueError('why')": (1, "-c: error: why\n"),
    "ValueError('why\\nand\\n\\nwhere')": (1, "-c: error: why and  where\n"),
    "SystemExit('why')": (1, "why\n"),
    "SystemExit(130)": (130, ""),
    "SystemExit(None)": (0, ""),
    "KeyboardInterrupt": (130, "\n-c: interrupted\n"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{error: (exit status, stderr)} of scripts that raise it in `run`: forks of one process."""
    folder, errors = tmp_path_factory.mktemp("ends"), [*ERRORS, "KeyError(3)"]
    process = start("-c", ENDS, folder, *errors)
    stdout, stderr = finish(process)
    assert process.returncode == 0 and stderr == "", stderr
    texts = [(folder / str(number)).read_text() for number in range(len(errors))]
    return dict(zip(errors, zip(map(int, stdout.split()), texts)))


@pytest.mark.parametrize("error", ERRORS)
def test_run_ends_as_the_error_says_in_one_line(ends, error):
    assert ends[error] == ERRORS[error]


def test_run_does_not_hide_other_errors(ends):
    code, stderr = ends["KeyError(3)"]
    assert code == 1 and "Traceback" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way with memory")
def test_what_a_step_frees_the_next_one_finds():
    """A step of twelve 4 MiB tensors pays for their pages once, where without `run` each pays."""
    code = """
import resource, torch
from support.terminal import run
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(12)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def main():
    print(*then, faults(), faults())
then = faults(), faults()
torch.cuda.is_available = lambda: False
run(main)
"""
    before, again, first, after = map(int, finish(start("-c", code))[0].split())
    assert min(before, again, first) > 12 and after <= 0.1 * again


# --------------------------------------------------------------------------------------------------
# What must not end a run, and what ends it in one line.


def test_two_equal_readings_of_the_clock_are_no_error(monkeypatch):
    monkeypatch.setattr("support.terminal.time.time", lambda: 5.0)
    progress = Progress("train", 3)
    for _ in range(3):
        progress("loss 1")
    assert "3/3" in progress.line("", 0.0)
    progress.line("", -1e-9)


def test_a_terminal_that_is_gone_does_not_end_the_work(monkeypatch):
    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    progress = Progress("train", 2)
    progress()
    progress()
    assert progress.done == 2


def test_a_letter_that_the_terminal_lacks_is_a_question_mark():
    code = "import sys; sys.stdout.reconfigure(encoding='ascii'); "
    code += "from support.terminal import run; run(lambda: print('1 \\u00b1 2 \\ud800'))"
    process = start("-c", code)
    stdout, stderr = finish(process)
    assert (process.returncode, stdout, stderr) == (0, "1 ? 2 ?\n", "")


@pytest.mark.parametrize("script", ["train_min.py", "sample_min.py", "eval_min.py"])
@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 2.5])
def test_ctrl_c_at_any_time_leaves_no_traceback(script, seconds, tmp_path):
    arguments = ["nowhere"]
    if script == "train_min.py":
        arguments = ["--data=nowhere", f"--out={tmp_path}/out"]
    process = start(script, *arguments)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in finish(process)[1]


# --------------------------------------------------------------------------------------------------
# Several processes: one speaks.

SPEAKERS = """
import os, sys, time
sys.path.insert(0, {root!r})
from support.processes import join
from support.terminal import run
rank = int(os.environ["RANK"])
def main():
    {body}
run(main, ValueError)
"""


def spoken(tmp_path, body, n=2):
    """stderr of n processes that run `body`: their lines, and torchrun's."""
    (tmp_path / "speakers.py").write_text(SPEAKERS.format(root=str(ROOT), body=body))
    process = torchrun("--standalone", f"--nproc_per_node={n}", tmp_path / "speakers.py")
    stderr = finish(process)[1]
    assert process.returncode == 1
    lines = stderr.splitlines()
    ours = [line for line in lines if line.startswith("speakers.py: error")]
    return ours, [line for line in lines if line not in ours]


@pytest.mark.parametrize(
    ("body", "n"),
    [
        ("raise ValueError(f'wrong, says {rank}')", 3),
        ("time.sleep(0.5 * (1 - rank)); raise ValueError(f'wrong, says {rank}')", 2),
        ("join(); raise ValueError(f'wrong, says {rank}')", 2),
    ],
    ids=["at once", "process 0 last", "in a group"],
)
def test_a_mistake_is_said_once_by_process_0(tmp_path, body, n):
    ours, torchruns = spoken(tmp_path, body, n)
    assert ours == ["speakers.py: error: wrong, says 0"]
    assert sum("exitcode  :" in line for line in torchruns) == 1, "torchrun reports one process"
    assert not any("closing signal" in line for line in torchruns)


def test_a_mistake_that_one_process_alone_meets_is_said_by_it(tmp_path):
    ours, _ = spoken(tmp_path, "time.sleep(60 * (rank != 1)); raise ValueError(f'says {rank}')")
    assert ours == ["speakers.py: error: says 1"]


def test_what_follows_from_the_mistake_of_another_is_not_said(tmp_path):
    body = """join()
    if rank == 0: raise ValueError("wrong")
    import torch.distributed as dist; dist.barrier()"""
    ours, torchruns = spoken(tmp_path, body)
    assert ours == ["speakers.py: error: wrong"]
    assert sum("Traceback" in line for line in torchruns) == 1, "torchrun's own"
