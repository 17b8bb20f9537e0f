"""What is checked before dydilit.train goes on with a run; imports dydilit.py, torch."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from dydilit import Config, Data, Training, distributed, load_checkpoint

# --resume accepts a new value for these fields only: they do not change what a training step
# computes. (A new `steps` moves the decay.) All that meta.json says of the data must agree too.
RESUMABLE = ("data", "vae", "out", "steps", "micro_batch", "log_every", "eval_every", "ckpt_every")


def prepare_resume(config: Config, training: Training):
    """For every process, before train(..., resume=True). The checkpoint in training.out, if there
    is one, must be of this model, training and data, and all processes must see the same; the log
    is cut back to it. ValueError with what differs."""
    rank, world, _ = distributed()
    path = Path(training.out, "ckpt.pt")
    about = describe(path)
    if about:
        check_same_run(path, about, config, training)
    step = about.get("step", 0)
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the processes find checkpoints of steps {steps}: all machines must "
                             f"share {training.out}")
    if rank == 0:
        cut_log(Path(training.out, "log.jsonl"), step)


def describe(checkpoint: Path) -> dict:
    """step, kind, config, training and meta of a checkpoint, without reading its tensors; {} if
    there is none. ValueError if it cannot be read."""
    if not checkpoint.exists():
        return {}
    try:
        ckpt = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return {name: ckpt[name] for name in ("step", "kind", "config", "training", "meta")}
    except Exception:  # torch raises many kinds on a damaged file
        load_checkpoint(checkpoint)  # which says what is wrong with it
        raise


def check_same_run(path: Path, about: dict, config: Config, training: Training):
    meta = Data(training.data, config).meta
    then = {"kind": about["kind"]} | about["config"] | about["training"] | about["meta"]
    now = {"kind": type(config).__name__} | asdict(config) | asdict(training) | meta
    differing = [k for k in then | now if k not in RESUMABLE and now.get(k) != then.get(k)]
    if differing:
        listed = (f"{k} {then.get(k)!r:.60} (now {now.get(k)!r:.60})" for k in differing)
        raise ValueError(f"{path} belongs to another configuration: {', '.join(listed)}")


def cut_log(path: Path, step: int):
    """Remove the lines after `step`, which the continued run will write again, and a torn line."""
    if not path.exists():
        return
    with open(path, "r+") as f:
        kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        f.truncate(sum(map(len, kept)))
