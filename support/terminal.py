"""A script as a program: a progress bar, errors in one line, memory that it keeps.

For whoever writes a script; readers of the paper need none of it. Imports torch and
support/processes.py.
"""

import ctypes
import io
import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from support.processes import Voice


class Progress:
    """A bar in the last line of the terminal. Where stderr is a file: a line every 20 seconds.

    speed(steps a second) -> how the bar says it.
    """

    def __init__(self, what: str, total: int, quiet: bool = False, speed="{:.2f}/s".format):
        self.what = what
        self.total = total
        self.quiet = quiet
        self.speed = speed
        self.live = sys.stderr.isatty()
        self.pause = 0.2 if self.live else 20.0  # seconds between two lines
        self.shown = 0.0  # when the last line was written
        self.done = 0
        self.first = None  # `done` at the first call; a resumed run does not begin at 0

    def __call__(self, text="", done=None):
        """Count one more, or set the count to `done`; `text` stands behind the bar."""
        now = time.time()
        self.done = self.done + 1 if done is None else done
        if self.first is None:
            self.first = self.done
            self.began = now
        finished = self.done >= self.total
        if self.quiet or (not finished and now - self.shown < self.pause):
            return
        self.shown = now
        self.write(self.line(text, now - self.began), finished)

    def compiling(self):
        """Say, until the first step is done, what takes it so long."""
        if not self.quiet:
            self.write(f"{self.what}: the first step compiles the network ...", False)

    def write(self, line, finished):
        if self.live:
            line = f"\r{line} \n" if finished else f"\r{line} "
        else:
            line = f"{line}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:  # the terminal is gone; the work goes on
            self.quiet = True

    def line(self, text, elapsed):
        bar = "#" * (24 * self.done // self.total)
        rate = (self.done - self.first) / max(elapsed, 1e-9)  # two readings may be equal
        left = f"{self.speed(rate)}  {(self.total - self.done) / rate:.0f} s left" if rate else ""
        return f"{self.what} [{bar:.<24}] {self.done}/{self.total}  {text}  {left}"


def keep_memory():
    """Make glibc keep freed memory for the next step.

    By default it returns large blocks to the system, and a training step on a CPU spends much of
    its time on the page faults that follow.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD and so on, of malloc.h
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**26)
    mallopt(mmap_max, 0)


def run(main, *errors):
    """Call main() as the whole of a script; on a CPU, with `keep_memory`.

    An exception of a type in `errors` becomes one line on stderr and exit status 1, Ctrl-C a line
    and 130. Of several processes one speaks for all.
    """
    print_anything()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' imports were without
    if not torch.cuda.is_available():
        keep_memory()
    several = "TORCHELASTIC_RUN_ID" in os.environ  # started by torchrun
    script = os.path.basename(sys.argv[0])
    code = 0
    try:
        main()
    except errors as e:
        code = f"{script}: error: {' '.join(str(e).splitlines())}"
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code or 0
    except Exception:
        if not several or not Voice().heard():  # else it is a consequence of another's error
            raise
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left that Ctrl-C could tell
    if dist.is_initialized() or (several and code):
        leave_group(code)
    if code:
        sys.exit(code)


@contextmanager
def first_speaks():
    """For argparse, which prints help and errors itself: only process 0 of several prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def print_anything():
    """A terminal that lacks a letter, such as the plus-minus sign, gets a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def leave_group(code):
    """End one process of several at once: gloo's threads sometimes abort Python's own way out."""
    if isinstance(code, str):
        voice = Voice()
        if spoke := voice.is_mine():
            print(code, file=sys.stderr, flush=True)
        code = voice.status(1, spoke)
    elif code == 2:  # argparse has said why
        code = Voice().status(code, spoke=os.environ.get("RANK") == "0")
    if dist.is_initialized():
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    os._exit(code)
