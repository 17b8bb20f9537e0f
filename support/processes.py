"""Joining torchrun's process group, for the scripts; imports torch only."""

import os

import torch
import torch.distributed as dist


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
