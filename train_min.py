"""Train DyDi-LiT, then sample from it and say how good the samples are.

    torchrun train_min.py                                        the digits, on whatever this machine has
    torchrun train_min.py --preset photos                        crops of two photographs: 256 tokens, as the paper has
    torchrun --nproc_per_node=8 train_min.py --preset S/2 --data data/NAME --out out/NAME --bf16
    torchrun train_min.py --preset DiT-digits                    another model of the same size (baselines.py)
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_min.py ...

`python train_min.py` works too. Every field of Config and Training is a flag; its default is the preset's.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import fields, is_dataclass, replace
from inspect import getsource
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from baselines import VARIANTS, preset
from dydilit import PRESETS, Training, distributed, train
from eval_min import report
from load import Decoder, load_model
from probe import usage_at_evaluation
from sample_min import Progress, run, sample_to, save_grid, settings_in, settings_of

# Goes with the model of the same name in PRESETS and with its variants; one that is not listed takes Training(), the
# paper's ImageNet-1K run.
RECIPES = {
    "digits": Training(data="data/digits", out="out/digits", steps=3000, batch_size=64, lr=2e-3, warmup=50, decay=0.3,
                       ema_decay=0.995, log_every=20, eval_every=200, ckpt_every=500),
    "photos": Training(data="data/photos", out="out/photos", steps=2000, batch_size=32, lr=1e-3, warmup=50, decay=0.3,
                       ema_decay=0.995, log_every=20, eval_every=200, ckpt_every=200),
}
BUNDLED = ("digits", "photos")  # data sets that need no download: prepared when they are missing


def override(config, **values):
    """config with the given fields replaced; an unknown field is a ValueError that lists the known ones."""
    known = [f.name for f in fields(config)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"unknown field {unknown[0]!r} of {type(config).__name__}; known: {', '.join(known)}")
    return replace(config, **values)


def help_lines(config_class):
    """{field: the comment behind it}, so that the command line says what the source says; inherited fields too."""
    sources = "".join(getsource(c) for c in config_class.__mro__ if is_dataclass(c))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", sources, re.MULTILINE))


def parse(argv):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="digits")
    name = first.parse_known_args(argv)[0].preset
    config, training = preset(name), RECIPES.get(name.rpartition("-")[2], Training())
    if name not in PRESETS:  # a variant does not train where the model that it is compared with does
        training = replace(training, out=f"out/{name.replace('/', '-')}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--preset", default="digits",
                        help=f"{', '.join(PRESETS)} (default digits); or one of these behind a variant of baselines.py "
                             f"and a hyphen, such as DiT-S/2: {', '.join(VARIANTS)}")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    for title, part in (("model", config), ("training", training)):
        group, texts = parser.add_argument_group(f"{title}, {name}"), help_lines(type(part))
        for field in fields(part):
            value = getattr(part, field.name)
            kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            group.add_argument(f"--{field.name.replace('_', '-')}", default=None, **kind,
                               help=f"{texts[field.name]} (default {value})")
    group = parser.add_argument_group("samples at the end")
    for name, value, text in (("--samples", 500, "images, all classes equally; 0 for none"),
                              ("--cfg", 1.5, "guidance scale, 1 is none"),
                              ("--sampling-steps", 50, "of the ancestral sampler")):
        group.add_argument(name, type=type(value), default=value, help=f"{text} (default {value})")
    args = vars(parser.parse_args(argv))
    given = {k: v for k, v in args.items() if v is not None}
    training = override(training, **{f.name: given[f.name] for f in fields(Training) if f.name in given})
    config = override(config, **{f.name: given[f.name] for f in fields(config) if f.name in given})
    if args["samples"] < 0 or args["samples"] == 1 or not 2 <= args["sampling_steps"] <= 1000:  # not after hours
        raise ValueError("--samples must be 0 or at least 2, --sampling-steps between 2 and 1000")
    return config, training, argparse.Namespace(**args)


def fit_to_data(config, training, given_classes):
    """Prepare a bundled set if it is missing; take the number of classes from the data unless it was given."""
    data, meta = Path(training.data), Path(training.data) / "meta.json"
    bundled = data.name in BUNDLED and data == Path("data") / data.name
    for rank in ("RANK", "LOCAL_RANK"):  # one process first: the machines may share the folder, or not
        if bundled and not meta.exists() and os.environ.get(rank, "0") == "0":
            runpy.run_path(str(Path(__file__).parent / data / "prepare.py"))["prepare"](data)
        if dist.is_initialized(): dist.barrier()
    if given_classes is None and meta.exists():
        config = override(config, num_classes=len(json.loads(meta.read_text())["classes"]))
    return config


def again(argv):
    """The command that continues a run, on as many processes and machines as this one has."""
    local, machines = (int(os.environ.get(key, 1)) for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    options = [f"--nnodes={machines}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"] if machines > 1 else []
    if local > 1: options.append(f"--nproc_per_node={local}")
    return shlex.join(["torchrun", *options, "train_min.py", *(a for a in argv if a != "--resume"), "--resume"])


def plot_loss(log_path, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], label="training", linewidth=1)
    held = [x for x in lines if "held_out_loss" in x]
    axes.plot([x["step"] for x in held], [x["held_out_loss"] for x in held], "o-", markersize=3,
              label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    for part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        part(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "1235" else "")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def train_and_sample(argv):
    """Train, and make the samples, as the command line says: (Training, where the samples are; None without any)."""
    config, training, args = parse(argv)
    rank, _, device = distributed()
    config = fit_to_data(config, training, args.num_classes)
    bar = Progress("train", training.steps, quiet=rank > 0)
    step = train(config, training, args.resume, lambda step, loss: bar(f"loss {loss:.4f}", step), usage_at_evaluation)
    out = Path(training.out)
    if step < training.steps:
        said = f"stopped at step {step} of {training.steps}, saved {out}/ckpt.pt; to go on: {again(argv)}"
        if rank == 0: print(f"\n{said}")
        sys.exit(130)
    if not args.samples:
        return training, None
    npz, (model, ckpt) = out / "samples.npz", load_model(out / "ckpt.pt")
    labels = torch.arange(args.samples) % config.num_classes
    settings = settings_of(model, ckpt, cfg=args.cfg, steps=args.sampling_steps, seed=training.seed)
    if settings_in(npz, labels) != settings:  # not made yet, or of other weights
        decode = Decoder(config, settings["vae"], ckpt["meta"].get("scaling"), device)
        sample_to(npz, model, labels, settings, decode)
    if rank == 0:
        columns = min(config.num_classes, 20)
        with np.load(npz) as made: save_grid(out / "samples.png", made["arr_0"][: 8 * columns], columns)
        plot_loss(out / "log.jsonl", out / "loss.png")
        print(f"wrote {out}/: ckpt.pt log.jsonl loss.png samples.npz samples.png")
    return training, npz


def main(argv):
    training, npz = train_and_sample(argv)
    if npz is None or distributed()[0] > 0:
        return
    if "scaling" in json.loads(Path(training.data, "meta.json").read_text()):
        print(f"how good they are: python eval_min.py {npz} REFERENCE.npz")
    else: print(report(npz, training.data))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), ValueError, OSError, FloatingPointError)
