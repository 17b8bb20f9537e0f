"""What is checked before dydilit.train goes on with a run; imports dydilit.py, torch, support/."""

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist

from dydilit import Config, Data, Training, distributed, load_checkpoint, write_whole
from support.pretrained import check_tensors, mappable, on_meta, short

# --resume accepts a new value for these fields only: they do not change what a training step
# computes. (A new `steps` moves the decay.) All that meta.json says of the data must agree too.
RESUMABLE = ("data", "vae", "out", "steps", "micro_batch", "log_every", "eval_every", "ckpt_every")
ENTRIES = {"model": dict, "ema": dict, "optimizer": dict, "step": int, "kind": str, "config": dict,
           "training": dict, "meta": dict}  # of a checkpoint


def prepare_resume(config: Config, training: Training):
    """For every process, before train(..., resume=True). The checkpoint in training.out, if there
    is one, must be whole and of this model, training and data, and all processes must see the same;
    the log is cut back to it. ValueError with what differs."""
    rank, world, _ = distributed()
    path = Path(training.out, "ckpt.pt")
    step = 0
    if path.exists():
        ckpt = load_checkpoint(path, mmap=mappable(path))  # its tensors stay in the file
        check_entries(path, ckpt)
        check_same_run(path, ckpt, config, training)
        check_state(path, ckpt, config)
        step = ckpt["step"]
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the processes find checkpoints of steps {steps}: all machines must "
                             f"share {training.out}")
    if rank == 0:
        cut_log(Path(training.out, "log.jsonl"), step)


# --------------------------------------------------------------------------------------------------
# The checkpoint.


def check_entries(path: Path, ckpt):
    """ValueError unless it has a checkpoint's entries, those on the run in plain words."""
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} holds a {type(ckpt).__name__}, not the checkpoint of a run")
    for name, kind in ENTRIES.items():
        if not isinstance(ckpt.get(name), kind) or isinstance(ckpt[name], bool):
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got "
                             f"{short(ckpt.get(name))}")
    for name in ("config", "training", "meta"):
        try:
            json.dumps(ckpt[name])
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: {name} must hold texts and numbers: {e}") from e


def check_same_run(path: Path, about: dict, config: Config, training: Training):
    """ValueError unless it is a checkpoint of this model, training and data."""
    meta = Data(training.data, config).meta
    # a checkpoint that is older than a field had the field's default
    then = {f.name: f.default for part in (Config, Training) for f in fields(part)}
    then |= {"kind": about["kind"]} | about["config"] | about["training"] | about["meta"]
    now = {"kind": type(config).__name__} | asdict(config) | asdict(training) | meta
    known = [k for k in then | now if k not in (*RESUMABLE, "crc32")]
    differing = [k for k in known if now.get(k) != then.get(k)]
    if differing:
        listed = (f"{k} {short(then.get(k))} (now {short(now.get(k))})" for k in differing)
        raise ValueError(f"{path} belongs to another configuration: {', '.join(listed)}")
    if then.get("crc32", now["crc32"]) != now["crc32"]:  # older checkpoints have none
        raise ValueError(f"{path} was trained on other images or labels than {training.data} holds "
                         f"(crc32 {then['crc32']}, now {now['crc32']})")


def check_state(path: Path, ckpt: dict, config: Config):
    """ValueError for the first tensor that is not as the training of this model leaves it. AdamW
    compares no shapes: it would read and write beyond the end of a short one."""
    model = on_meta(config)
    weights = model.state_dict()
    trained = [p for p in model.parameters() if p.requires_grad]
    for part in ("model", "ema", "optimizer"):
        try:
            if part == "optimizer":
                check_optimizer(ckpt[part], trained, ckpt["step"])
            else:
                check_tensors(ckpt[part], weights)
        except ValueError as e:
            raise ValueError(f"{path}, {part}: {e}") from e


def check_optimizer(found: dict, trained: list, step: int):
    """ValueError unless it is the state of dydilit.train's AdamW after `step` steps."""
    fresh = torch.optim.AdamW([torch.zeros(1)], lr=1.0, weight_decay=0.0, fused=True).state_dict()
    numbers = list(range(len(trained)))
    groups, moments = found.get("param_groups"), found.get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError(f"param_groups must be a list of one dict, got {short(groups)}")
    group = groups[0]
    expected = fresh["param_groups"][0] | {"params": numbers}
    for name in {"lr", "betas", "eps", "weight_decay", "params"} | group.keys():
        if name not in group:
            raise ValueError(f"{name} is missing in param_groups")
        same = type(group[name]) is type(expected.get(name)) and group[name] == expected.get(name)
        if name in expected and name != "lr" and not same:  # each step sets lr
            raise ValueError(f"{name} is {short(group[name])}, but training has "
                             f"{short(expected[name])}")
    if not isinstance(moments, dict) or set(moments) != set(numbers):
        raise ValueError(f"it has not a state for each of the model's {len(numbers)} parameters")
    count = torch.zeros(())
    for i, p in enumerate(trained):
        like = {"step": count, "exp_avg": p, "exp_avg_sq": p}
        if not isinstance(moments[i], dict):
            raise ValueError(f"state {i} is {short(moments[i])}")
        check_tensors({f"state {i} {k}": z for k, z in moments[i].items()},
                      {f"state {i} {k}": z for k, z in like.items()})
        if moments[i]["step"].item() != step:
            raise ValueError(f"state {i} step is {moments[i]['step'].item():g}, but step is {step}")


# --------------------------------------------------------------------------------------------------
# The log.


def cut_log(path: Path, step: int):
    """Remove the lines after `step`, which the continued run will write again, and a torn line.

    The log decides nothing: one that cannot be read is put aside under another name, and goes on
    with the lines that can.
    """
    if not os.path.lexists(path):
        return
    try:
        raw = path.read_bytes()
    except OSError as e:  # a folder, say
        put_aside(path, e.strerror)
        return
    *lines, _torn = raw.split(b"\n")
    kept, unreadable = [], []
    for number, line in enumerate(lines, 1):
        there = step_of(line)
        if there is None:
            unreadable.append(number)
        elif there <= step:
            kept.append(line + b"\n")
    whole = b"".join(kept)
    if unreadable:
        put_aside(path, f"line {unreadable[0]} is not one of a log")
    elif raw.startswith(whole):
        os.truncate(path, len(whole))
        return
    write_whole(path, whole)


def step_of(line: bytes) -> int | None:
    """The step of a line of the log; None if it is none."""
    try:
        entry = json.loads(line.decode())
        readable = type(entry["step"]) is int and type(entry["loss"]) in (int, float)
        return entry["step"] if readable else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def put_aside(path: Path, why: str):
    number = 1
    while os.path.lexists(f"{path}.{number}"):
        number += 1
    os.replace(path, f"{path}.{number}")
    print(f"{path} cannot be read ({why}): put aside as {path.name}.{number}", file=sys.stderr,
          flush=True)
