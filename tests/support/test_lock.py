"""support/lock.py: one writer at a time; a holder that was killed blocks nobody."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from runs import ROOT, finish, start

from support import lock
from support.lock import BlockedError, one_writer

HOLDER = """
import sys
from support.lock import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def other_process(path):
    """A process that holds `path` until its standard input ends, or until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


@pytest.fixture
def holder(tmp_path):
    process = other_process(tmp_path)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("what", ["folder", "file.npz"])
def test_the_lock_lies_inside_a_folder_or_beside_a_file_and_is_removed(tmp_path, what):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    with one_writer(path):
        lock_file = {"folder": path / ".lock", "file.npz": tmp_path / "file.npz.lock"}[what]
        assert lock_file.exists()
    assert not lock_file.exists()


def test_the_second_process_is_told_who_holds_it_and_since_when(tmp_path, holder):
    with pytest.raises(BlockedError) as e, one_writer(tmp_path):
        raise AssertionError("held twice")
    want = f"{tmp_path} is being written by process {holder.pid} on {socket.gethostname()} since "
    assert str(e.value).startswith(want) and "\n" not in str(e.value)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", str(e.value).removeprefix(want))


def test_a_blocked_process_leaves_the_holders_file(tmp_path, holder):
    before = (tmp_path / ".lock").read_bytes()
    with pytest.raises(BlockedError), one_writer(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == before


def test_it_is_free_when_the_holder_has_ended(tmp_path, holder):
    assert holder.communicate("")[1] == ""
    with one_writer(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_it_is_free_at_once_when_the_holder_was_killed(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists(), "a kill leaves the file"
    with one_writer(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"process 1 on elsewhere since 1970", b"\xff\0"])
def test_a_file_that_nobody_holds_does_not_block(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with one_writer(tmp_path):
        assert f"process {os.getpid()} on ".encode() in (tmp_path / ".lock").read_bytes()


def test_blocks_of_one_process_may_be_nested(tmp_path):
    with one_writer(tmp_path):
        with one_writer(f"{tmp_path}/."):
            pass
        assert (tmp_path / ".lock").exists()
        stderr = finish(start("-c", HOLDER, tmp_path))[1]
        assert "BlockedError" in stderr, "held until the outer block ends"
    assert not lock.held


def test_it_is_free_after_an_error_in_the_block(tmp_path):
    with pytest.raises(KeyError), one_writer(tmp_path):
        raise KeyError
    finish(other_process(tmp_path))
    assert not lock.held


def test_a_link_to_the_folder_is_the_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    process = other_process(tmp_path / "folder")
    with pytest.raises(BlockedError), one_writer(tmp_path / "link"):
        pass
    process.communicate("")


def test_a_fork_does_not_hold_what_its_parent_holds(tmp_path):
    with one_writer(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with one_writer(tmp_path):
                    os._exit(0)
            except BlockedError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_folder_that_is_deleted_meanwhile_is_no_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with one_writer(folder):
        (folder / ".lock").unlink()
        folder.rmdir()
    assert not any(tmp_path.iterdir())


def test_waiting_begins_when_the_holder_has_ended(tmp_path, holder):
    threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
    began = time.monotonic()
    with one_writer(tmp_path, wait=True):
        assert time.monotonic() - began > 0.2


COUNTER = """
import os, sys, time
from support.lock import BlockedError, one_writer
done = 0
while done < 40:
    try:
        with one_writer(sys.argv[1]):
            before = int(open(sys.argv[2]).read())
            time.sleep(0.0005)
            open(sys.argv[2], "w").write(str(before + 1))
            done += 1
    except BlockedError:
        pass
"""


def test_no_two_hold_it_while_the_file_comes_and_goes(tmp_path):
    """Four processes take and release it 40 times each; each adds one to a number in a file.

    A lock on a name that its holder has just removed would let two of them in.
    """
    (tmp_path / "counted").write_text("0")
    processes = [start("-c", COUNTER, tmp_path / "x", tmp_path / "counted") for _ in range(4)]
    for process in processes:
        stderr = finish(process)[1]
        assert process.returncode == 0, stderr
    assert (tmp_path / "counted").read_text() == "160"
    assert [p.name for p in tmp_path.iterdir()] == ["counted"]


def test_a_file_system_without_locks_is_written_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with one_writer(tmp_path):
        pass
    assert not lock.held


def test_a_system_without_fcntl_is_written_without(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with one_writer(tmp_path):
        assert not any(tmp_path.iterdir())


def test_rank_0_holds_it_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with one_writer(tmp_path):
        assert not any(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".lock"))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"), one_writer(tmp_path):
        pass
