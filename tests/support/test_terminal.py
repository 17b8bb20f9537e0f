"""support/terminal.py: the bar, the error line, the memory that stays."""

import sys

import pytest
from runs import finish, start

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


ERROR = """
from support.terminal import run
def main():
    raise {error}
run(main, ValueError)
"""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ("ValueError('why')", 1, "-c: error: why\n"),
        ("SystemExit('why')", 1, "why\n"),
        ("SystemExit(130)", 130, ""),
        ("SystemExit(None)", 0, ""),
    ],
)
def test_run_ends_as_the_error_says(error, code, text):
    process = start("-c", ERROR.format(error=error))
    stderr = finish(process)[1]
    assert (process.returncode, stderr) == (code, text)


def test_run_does_not_hide_other_errors():
    process = start("-c", ERROR.format(error="KeyError(3)"))
    assert "Traceback" in finish(process)[1] and process.returncode == 1


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
