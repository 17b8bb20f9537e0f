"""One writer at a time for a folder or a file, by the operating system's lock.

For every script that writes. Imports the standard library only.
"""

import errno
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # some file systems' answer
held = {}  # {lock file: how many blocks of this process hold it}
changing = threading.Lock()  # of `held`


class BlockedError(OSError):
    """Another process writes there."""


@contextmanager
def one_writer(path, wait=False):
    """Hold `path`, an existing folder or a file that will be written, alone while the block runs.

    BlockedError, one line, says which process holds it and since when; with `wait` the block
    begins when that one has ended. The lock is fcntl.flock on FOLDER/.lock or FILE.lock. The
    system drops it when its holder ends, however it ends, so a file that a kill leaves blocks
    nobody. Within a process blocks may be nested. Under torchrun rank 0 holds the lock for all.
    Without fcntl, or where the file system has no locks, there is none.
    """
    file = lock_file(path)
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    key = (os.getpid(), file)  # a fork inherits `held`, but not what its parent holds
    with changing:
        descriptor = held[key][0] if key in held else take(file, path, wait)
        held[key] = (descriptor, held.get(key, (None, 0))[1] + 1)
    try:
        yield
    finally:
        with changing:
            descriptor, blocks = held.pop(key)
            if blocks > 1:
                held[key] = (descriptor, blocks - 1)
            elif descriptor is not None:
                release(file, descriptor)


def lock_file(path):
    path = Path(os.path.realpath(path))  # one name, however the folder is reached
    return path / ".lock" if path.is_dir() else path.with_name(f"{path.name}.lock")


def take(file, path, wait):
    """A descriptor of the locked file; None where the file system has no locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_open_in(file, descriptor):
                os.ftruncate(descriptor, 0)
                when = time.strftime("%Y-%m-%d %H:%M:%S")
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                os.write(descriptor, f" since {when}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = holder_of(descriptor)
            os.close(descriptor)
            raise BlockedError(f"{path} is being written by {holder}") from None
        except OSError as e:
            os.close(descriptor)
            if e.errno not in NO_LOCKS:
                raise
            file.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # its holder removed it meanwhile: the name is another file's


def is_open_in(file, descriptor):
    """Whether the name still is that of the open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def holder_of(descriptor):
    """Who wrote the lock file; its holder may be about to."""
    for _ in range(20):
        text = os.pread(descriptor, 500, 0).decode(errors="replace")
        if text.endswith("\n"):
            return text.strip()
        time.sleep(0.01)
    return "another process"


def release(file, descriptor):
    """Remove the file while it is still locked, then unlock it."""
    if is_open_in(file, descriptor):
        with suppress(OSError):
            os.unlink(file)
    os.close(descriptor)
