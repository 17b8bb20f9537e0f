"""A script as a program: a progress bar, errors in one line, memory that it keeps.

For whoever writes a script; readers of the paper need none of it. Imports torch and nothing else.
"""

import ctypes
import os
import sys
import time

import torch
import torch.distributed as dist


class Progress:
    """A bar in the last line of the terminal. Where stderr is a file: a line every 20 seconds."""

    def __init__(self, what: str, total: int, quiet: bool = False):
        self.what = what
        self.total = total
        self.quiet = quiet
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
        line = self.line(text, now - self.began)
        if self.live:
            sys.stderr.write(f"\r{line} \n" if finished else f"\r{line} ")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def line(self, text, elapsed):
        bar = "#" * (24 * self.done // self.total)
        rate = (self.done - self.first) / (elapsed + 1e-9)
        left = f"{rate:.2f}/s  {(self.total - self.done) / rate:.0f} s left" if rate else ""
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

    An exception of a type in `errors` becomes one line on stderr and exit status 1.
    """
    if not torch.cuda.is_available():
        keep_memory()
    code = 0
    try:
        main()
    except errors as e:
        code = f"{os.path.basename(sys.argv[0])}: error: {e}"
    except SystemExit as e:
        code = e.code or 0
    if dist.is_initialized():
        leave_group(code)
    if code:
        sys.exit(code)


def leave_group(code):
    """End a process of a group at once: gloo's threads sometimes abort Python's own way out."""
    dist.destroy_process_group()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
