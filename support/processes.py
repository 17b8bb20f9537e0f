"""The processes that torchrun starts for one run: how they join, agree, and end.

For the scripts; imports torch and support/lock.py.
"""

import os
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from support.lock import one_writer


def join():
    """Join the process group that torchrun's environment describes, once; alone it does nothing.

    After a restart torchrun's store still holds the keys of the killed process group, so each start
    takes a prefix of its own. ValueError where several machines would hang after a restart.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        several_machines = int(os.environ["GROUP_WORLD_SIZE"]) > 1
        if several_machines and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
            raise ValueError("several machines restart only with "
                             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun")
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def by_rank_0(action):
    """action(), called in process 0 alone. What it returns, or its OSError or ValueError, reaches
    every process."""
    answer = [None, None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            answer[0] = action()
        except (OSError, ValueError) as e:
            answer[1] = e
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    value, error = answer
    if error:
        raise error
    return value


@contextmanager
def one_run(path):
    """`one_writer(path)` for all processes of a run; a BlockedError is raised in every process."""
    with ExitStack() as held:
        by_rank_0(lambda: held.enter_context(one_writer(path)))  # which returns None
        yield


class Voice:
    """One process speaks for all: a mistake of the user is printed once, not once per process.

    It works by torchrun's store, which every process reaches before there is a group. Where there
    is none, each process speaks for itself.
    """

    def __init__(self):
        self.store = None
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with suppress(RuntimeError):  # torchrun itself is gone
                store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=10))
                attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
                self.store = dist.PrefixStore(f"voice/{attempt}", store)

    def heard(self):
        """Whether a process of this run has spoken."""
        return self.store is not None and self.store.add("spoken", 0) > 0

    def is_mine(self, patience=2.0):
        """Whether this process shall speak: process 0, or one that waits for it in vain."""
        if self.store is None:
            return True
        end = time.monotonic() + (patience if self.rank else 0)
        while not self.heard() and time.monotonic() < end:
            time.sleep(0.02)
        return self.store.add("spoken", 1) == 1

    def status(self, code, spoke, patience=3.0):
        """The exit status of this process, `code` or 0, once it is its turn to end.

        torchrun reports on every process that fails and on every one that it has to end. So the
        speaker alone fails, and ends last.
        """
        if self.store is None:
            return code
        left = self.store.add("left", 1)
        if not spoke:
            # the torchrun of another machine would take 0 for the end of the whole run
            return 0 if os.environ["GROUP_WORLD_SIZE"] == "1" else code
        end = time.monotonic() + patience
        while left < self.world and time.monotonic() < end:
            time.sleep(0.02)
            left = self.store.add("left", 0)
        time.sleep(0.2)  # for the others' last instructions
        return code
