"""What test_processes.py starts: torchrun tests/train/under_torchrun.py together|killed DATA OUT"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from runs import CONFIG, RUN, at_step, resume  # noqa: E402

from dydilit import train  # noqa: E402
from support import processes  # noqa: E402


def together(data, out, rank):
    """Five runs in one launch.

    plain: the run of runs.py. compiled: the same by torch.compile. accumulated: the same in
    micro-batches; the reductions between processes are counted. stopped: rank 1 gets a signal, then
    the run is resumed. apart: only rank 0 finds a checkpoint.
    """
    run = replace(RUN, data=data)
    train(CONFIG, replace(run, out=f"{out}/plain"))

    compile_ = torch.compile
    torch.compile = partial(compile_, backend="aot_eager")  # Inductor takes minutes
    train(CONFIG, replace(run, out=f"{out}/compiled"), compiled=True)
    torch.compile = compile_

    reductions = []
    DDP = torch.nn.parallel.DistributedDataParallel

    class Counting(DDP):
        def __init__(self, model):
            super().__init__(model)
            self.register_comm_hook(None, self.count)

        def count(self, state, bucket):
            if bucket.is_last():
                reductions.append(1)
            return allreduce_hook(state, bucket)

    torch.nn.parallel.DistributedDataParallel = Counting
    train(CONFIG, replace(run, out=f"{out}/accumulated", micro_batch=2))
    torch.nn.parallel.DistributedDataParallel = DDP

    stopped = []

    def stop_rank_1(step):
        if (step, rank) == (1, 1) and not stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(stop_rank_1)
    stopped.append(train(CONFIG, replace(run, out=f"{out}/stopped")))
    resume(CONFIG, replace(run, out=f"{out}/stopped"))

    if rank == 0:
        shutil.copytree(f"{out}/plain", f"{out}/apart0")
    try:
        resume(CONFIG, replace(run, out=f"{out}/apart{rank}"))
        message = "trained"
    except ValueError as e:
        message = str(e)
    found = {"reductions": len(reductions), "stopped": stopped[0], "apart": message}
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))


def killed(data, out, rank):
    """Rank 1 is killed at step 4 of the first attempt. Each attempt files its first step."""
    attempt = len(list(Path(out).glob(f"first_step_*_{rank}")))
    first = []

    def action(step):
        if not first:
            first.append(step)
            Path(out, f"first_step_{attempt}_{rank}").write_text(str(step))
        if (step, rank, attempt) == (4, 1, 0):
            os.kill(os.getpid(), signal.SIGKILL)

    at_step(action)
    resume(CONFIG, replace(RUN, data=data, out=f"{out}/run"))


if __name__ == "__main__":
    processes.join()
    action = {"together": together, "killed": killed}[sys.argv[1]]
    action(*sys.argv[2:4], int(os.environ["RANK"]))
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    # gloo's threads may still hold the hook's callbacks: releasing them while Python ends aborts
    os._exit(0)
