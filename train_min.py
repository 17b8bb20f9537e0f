r"""Train DyDi-LiT, sample from it, and say how good the samples are.

For whoever wants a model. It reads: command line -> dydilit.train -> samples. Imports dydilit.py,
support/ and sample_min.py; Pillow, matplotlib and eval_min.py only at the end of a run.

    torchrun train_min.py                    the digits, on a CPU or a GPU
    torchrun train_min.py --preset mnist     larger digits: 196 tokens of 64 channels
    torchrun train_min.py --preset photos    crops of two photographs: 256 tokens, as in the paper
    torchrun --nproc_per_node=8 train_min.py --preset S/2 --data data/NAME --out out/NAME --bf16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_min.py ...                     on each of two machines; both see --data and --out

`python train_min.py` works too. Every field of Config and Training is a flag; its default is that
of the preset. The samples and their figures lie in --out: samples.png, samples.npz, samples.md.

One run at a time writes to a folder: a second one ends with a line that says which process writes.
Ctrl-C and SIGTERM end the step and save; --resume goes on exactly there. torchrun waits 30 seconds
for that; where a step takes longer, start it with --shutdown-timeout=300. With torchrun's
--max-restarts=3 and --resume a killed process is restarted from the last checkpoint; on several
machines this needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment.
"""

import support

if __name__ == "__main__":
    support.begin()

import argparse
import math
import os
import re
import runpy
import shlex
import sys
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dydilit import PRESETS, Config, DyDiLiT, Training, distributed, train
from sample_min import add_compile, sample_to, settings_in, settings_of
from support.decoder import Decoder
from support.fused import check_fused
from support.lock import one_writer
from support.pictures import plot_loss, save_grid, written_whole
from support.prepared import check_set, read_meta
from support.pretrained import mappable
from support.processes import by_rank_0, join, one_run
from support.runs import prepare_resume
from support.shards import need_room
from support.speed import in_words, mfu_of_an_image, profiled
from support.terminal import Progress, first_speaks, run

# The runs of the presets of the same name. Others take Training(), the paper's ImageNet-1K run.
RECIPES = {
    "digits": Training(
        data="data/digits",
        out="out/digits",
        steps=3000,
        batch_size=64,
        lr=2e-3,
        warmup=50,
        decay=0.3,
        ema_decay=0.995,
        log_every=20,
        eval_every=200,
        ckpt_every=500,
    ),
    "photos": Training(
        data="data/photos",
        out="out/photos",
        steps=2000,
        batch_size=32,
        lr=1e-3,
        warmup=50,
        decay=0.3,
        ema_decay=0.995,
        log_every=20,
        eval_every=200,
        ckpt_every=200,
    ),
    "mnist": Training(
        data="data/mnist",
        out="out/mnist",
        steps=7000,
        batch_size=16,
        lr=2e-3,
        warmup=50,
        decay=0.3,
        ema_decay=0.999,
        log_every=50,
        eval_every=500,
        ckpt_every=500,
    ),
}
BUNDLED = ("digits", "photos", "mnist")  # data sets that are prepared where they are missing


def preset(name: str) -> Config:
    """The Config of that name. ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


# --------------------------------------------------------------------------------------------------
# The command line.


def override(config, **values):
    """config with these fields replaced. ValueError for an unknown field lists the known ones."""
    known = [field.name for field in fields(config)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"unknown field {name!r} of {type(config).__name__}; known: {', '.join(known)}"
            )
    return replace(config, **values)


def with_given(config, given):
    """config with those of its fields replaced that are in the dict `given`."""
    return replace(config, **{f.name: given[f.name] for f in fields(config) if f.name in given})


def help_lines(config_class):
    """{field: the comment behind it in the source}, inherited fields included."""
    sources = [getsource(c) for c in config_class.__mro__ if is_dataclass(c)]
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", "".join(sources), re.MULTILINE))


def add_fields(group, config):
    """A flag for every field of a Config or a Training."""
    texts = help_lines(type(config))
    for field in fields(config):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=None,
            help=f"{texts[field.name]} (default {getattr(config, field.name)})",
            **kind,
        )


def defaults_of(name, preset):
    """Config and Training of a preset, or of a variant: DiT-digits has the recipe of digits."""
    config = preset(name)
    training = RECIPES.get(name.rpartition("-")[2], Training())
    if name not in PRESETS:  # a folder of its own, beside that of the plain preset
        training = replace(training, out=f"out/{name.replace('/', '-')}")
    return config, training


def parse(argv, preset=preset):
    """The command line -> Config, Training, and a namespace of all options. ValueError, one line.

    preset(name) -> Config: what --preset may name.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="digits")
    name = first.parse_known_args(argv)[0].preset
    config, training = defaults_of(name, preset)

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        default="digits",
        help=f"{', '.join(PRESETS)} (default digits); `-m experiments.train` takes the models that "
        "the paper compares as well, such as DiT-S/2",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out, if there is one"
    )
    add_compile(parser)
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="write a trace of so many steps, after the first ten, to profile.json in --out, for "
        "https://ui.perfetto.dev (default 0: none)",
    )
    add_fields(parser.add_argument_group(f"model, {name}"), config)
    add_fields(parser.add_argument_group(f"training, {name}"), training)
    group = parser.add_argument_group("samples at the end")
    group.add_argument(
        "--samples",
        type=int,
        default=500,
        help="images, all classes equally; 0 for none (default 500)",
    )
    group.add_argument(
        "--cfg", type=float, default=1.5, help="guidance scale, 1 is none (default 1.5)"
    )
    group.add_argument(
        "--sampling-steps", type=int, default=50, help="of the ancestral sampler (default 50)"
    )
    args = parser.parse_args(argv)

    given = {key: value for key, value in vars(args).items() if value is not None}
    config = with_given(config, given)
    training = with_given(training, given)
    if args.samples < 0 or args.samples == 1 or not 2 <= args.sampling_steps <= 1000:
        raise ValueError("--samples must be 0 or at least 2, --sampling-steps between 2 and 1000")
    if args.profile < 0:
        raise ValueError("--profile must be at least 0")
    if not math.isfinite(args.cfg):
        raise ValueError(f"--cfg must be a finite number, got {args.cfg}")
    for part in (config, training, args):
        check_integers(part)
    return config, training, args


def check_integers(part):
    """ValueError for a number that no tensor can hold."""
    for name, value in vars(part).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be less than {2**63}, got {value}")


def path_of(script):
    """The path of a script beside the one that was started, as the shell's folder needs it."""
    path = Path(sys.argv[0]).with_name(script)
    if not path.exists():  # the process was not started by one of them
        return script
    inside = os.path.relpath(path)
    return str(path) if inside.startswith("..") else inside


def again(argv, command="train_min.py"):
    """The shell command that continues a run, on as many processes and machines as this one has."""
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # started by torchrun
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        launcher = ["torchrun"]
        if machines > 1:
            launcher += [f"--nnodes={machines}", "--rdzv_backend=c10d"]
            launcher += ["--rdzv_endpoint=HOST:29500"]
        if processes > 1:
            launcher.append(f"--nproc_per_node={processes}")
    arguments = [a for a in argv if a != "--resume"]
    script = [path_of(command)] if command.endswith(".py") else command.split()
    return shlex.join([*launcher, *script, *arguments, "--resume"])


# --------------------------------------------------------------------------------------------------
# Before training: whatever the run needs until its last line.


def missing(module):
    return find_spec(module) is None


def is_bundled(training):
    data = Path(training.data)
    return data.name in BUNDLED and data == Path("data") / data.name


def meta_of(training):
    """meta.json of the data, every field checked; {} where it is not there yet."""
    there = (Path(training.data) / "meta.json").exists()
    return read_meta(training.data) if there else {}


def check_packages(training, samples):
    """Packages that a run needs after its training, checked before it.

    ValueError for one that it cannot do without; returns a line for each part that will be left
    out. `samples` is the number of images that will be made.
    """
    meta = meta_of(training)
    of_sklearn = is_bundled(training) and Path(training.data).name != "mnist"
    if of_sklearn and not meta and (missing("sklearn") or missing("PIL")):
        raise ValueError(
            f"to prepare {training.data}: pip install scikit-learn pillow (data/README.md)"
        )
    if not samples:
        return []
    if missing("PIL"):
        raise ValueError("samples.png needs Pillow: pip install pillow (or --samples 0)")
    latents = "scaling" in meta
    if latents and missing("diffusers"):
        raise ValueError("decoding samples needs diffusers: pip install diffusers (or --samples 0)")
    left_out = []
    if missing("matplotlib"):
        left_out.append("no matplotlib: loss.png will not be drawn (pip install matplotlib)")
    if missing("sklearn") and not latents:
        left_out.append("no scikit-learn: no figures of the samples (pip install scikit-learn)")
    return left_out


def fit_to_data(config, training, given_classes):
    """Prepare a bundled set if it is missing; take the number of classes from the data unless it
    was given."""
    prepare = Path(__file__).parent / training.data / "prepare.py"
    for rank in ("RANK", "LOCAL_RANK"):  # one process first: the machines may share the folder
        if is_bundled(training) and not meta_of(training) and os.environ.get(rank, "0") == "0":
            runpy.run_path(str(prepare))["prepare"](Path(training.data))
        if dist.is_initialized():
            dist.barrier()
    classes = meta_of(training).get("classes")
    if given_classes is None and isinstance(classes, list):
        config = override(config, num_classes=len(classes))
    return config


def prepare_end(config, training, args):
    """What the end of a run needs: room on the disk, and the decoder of its samples, or None.

    OSError or ValueError, one line.
    """
    decode, room = None, 0
    if args.samples:
        meta = meta_of(training)
        latents = "scaling" in meta
        decode = Decoder(config, meta["vae"] if latents else None, meta.get("scaling"), "cpu")
        if not Path(training.out, "samples.npz").exists():
            room += 2 * args.samples * math.prod(decode.shape)  # see support/shards.py
    ckpt = Path(training.out, "ckpt.pt")
    done = 0
    if args.resume and ckpt.exists():  # `prepare_resume` has checked it
        done = torch.load(ckpt, "cpu", mmap=mappable(ckpt), weights_only=True)["step"]
    if done < training.steps:
        with torch.device("meta"):
            numbers = sum(p.numel() for p in config.build().parameters())
        # weights, averages and AdamW's two moments; a new checkpoint is written beside the old one
        room += 4 * 4 * numbers * (1 if ckpt.exists() else 2)
    by_rank_0(lambda: need_room(training.out, room))
    return decode


# --------------------------------------------------------------------------------------------------
# Training, sampling, judging.


def train_and_sample(argv, preset=preset, on_eval=None, command="train_min.py"):
    """Train, and make the samples: (Training, path of samples.npz or None).

    preset: see `parse`. on_eval: see dydilit.train. command: what torchrun starts, for the line
    that says how to go on after an interruption.
    """
    with first_speaks():
        config, training, args = parse(argv, preset)
    join()
    rank, world, device = distributed()
    for line in check_packages(training, args.samples):
        if rank == 0:
            print(line, file=sys.stderr, flush=True)
    config = fit_to_data(config, training, args.num_classes)
    check_set(training.data, config)
    with folder_of(training):
        if args.resume:
            prepare_resume(config, training)
        decode = prepare_end(config, training, args)
        if getattr(config, "attention", "ladder") == "ladder":  # others have no DyDiLA
            line = check_fused(device, torch.bfloat16 if training.bf16 else torch.float32)
            if rank == 0:
                print(line, file=sys.stderr, flush=True)
        mfu = mfu_of_an_image(config, training, device, world)

        def speed(steps_per_s):
            return in_words(steps_per_s * training.batch_size, mfu)

        progress = Progress("train", training.steps, quiet=rank > 0, speed=speed)
        if args.compile:
            progress.compiling()
        profile = Path(training.out, "profile.json")
        with profiled(args.profile if rank == 0 else 0, profile) as step_is_done:

            def on_step(step, loss):
                progress(f"loss {loss:.4f}", step)
                step_is_done()

            step = train(config, training, args.resume, on_step, on_eval, args.compile, mfu)
        if step < training.steps:
            if rank == 0:
                print(
                    f"\nstopped at step {step} of {training.steps}, saved {training.out}/ckpt.pt; "
                    f"to go on: {again(argv, command)}"
                )
            sys.exit(130)
        if not args.samples:
            return training, None
        return training, samples_of(config, training, args, decode)


@contextmanager
def folder_of(training):
    """Hold the folder of the run, made if it is missing; removed again if nothing is in it."""
    out = Path(training.out)
    new = not out.exists()
    by_rank_0(lambda: out.mkdir(parents=True, exist_ok=True))
    try:
        with one_run(out):
            if distributed()[0] == 0:
                for left in out.glob("ckpt.pt.*.tmp"):  # by a run that was killed
                    left.unlink(missing_ok=True)
            yield
    finally:
        if new and distributed()[0] == 0:
            with suppress(OSError):  # not empty
                out.rmdir()


def samples_of(config, training, args, decode):
    """Make samples.npz, unless it is there, and its pictures: its path."""
    rank, _, device = distributed()
    out = Path(training.out)
    model = DyDiLiT.from_pretrained(out / "ckpt.pt", kinds=(type(config),))
    npz = out / "samples.npz"
    labels = torch.arange(args.samples) % config.num_classes
    settings = settings_of(model, cfg=args.cfg, steps=args.sampling_steps, seed=training.seed)
    if not by_rank_0(lambda: settings_in(npz, labels) == settings):  # none, damaged, or others
        if decode.vae is not None:
            decode.vae.to(device)
        sample_to(npz, model, labels, settings, decode, anew=True)  # the folder is this run's
    if rank == 0:
        draw(out, columns=min(config.num_classes, 20))
    return npz


def decorate(what, action):
    """action(), which draws or judges: if it fails, a line says what is left out, and why."""
    try:
        return action()
    except Exception as e:  # whatever the libraries of pictures and figures raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        line = f"{what}: left out ({reason:.300})"
        print(line, file=sys.stderr, flush=True)
        return None


def draw(out, columns):
    """samples.png, eight rows with a class in each column, and loss.png."""

    def grid():
        with np.load(out / "samples.npz") as made:
            images = made["arr_0"][: 8 * columns]
        save_grid(out / "samples.png", images, columns)

    decorate("samples.png", grid)
    if not missing("matplotlib"):
        decorate("loss.png", lambda: plot_loss(out / "log.jsonl", out / "loss.png"))


def judge(npz, training):
    """How good the samples are, in a few lines; all figures and settings go into samples.md."""
    if "scaling" in meta_of(training):
        return f"How good they are:\n  python eval_min.py {shlex.quote(str(npz))} REFERENCE.npz"
    if missing("sklearn"):
        return "No figures of them: scikit-learn is missing."
    from eval_min import compare, in_short, markdown

    found = compare(npz, training.data)
    table = npz.with_suffix(".md")
    with one_writer(npz.parent), written_whole(table) as beside:
        beside.write_text(f"{markdown(found)}\n", encoding="utf-8")
    return f"{in_short(found)}\n  all figures and settings: {table}"


def next_steps(training, command):
    """Commands to go on with."""
    # train_min.py is followed by sample_min.py, -m experiments.train by -m experiments.sample
    sample = command.replace("train", "sample")
    if sample.endswith(".py"):
        sample = shlex.quote(path_of(sample))
    ckpt = shlex.quote(f"{training.out}/ckpt.pt")
    lines = [f"  python {sample} {ckpt} --out samples.gif"]
    if Path(training.data).name == "digits":
        lines.append(f"  torchrun {shlex.quote(path_of('train_min.py'))} --preset photos")
    return "\n".join([*lines, "  your own images: data/README.md"])


def main(argv, preset=preset, on_eval=None, command="train_min.py"):
    """`train_and_sample`, then what there is to see, how good it is, and how to go on."""
    training, npz = train_and_sample(argv, preset, on_eval, command)
    if npz is None or distributed()[0] > 0:
        return
    others = "ckpt.pt log.jsonl samples.npz"
    if (npz.parent / "loss.png").exists():
        others += " loss.png"
    print(f"\nSamples, a class in each column:\n  {training.out}/samples.png")
    print(f"  beside it: {others}\n")
    if text := decorate("figures of the samples", lambda: judge(npz, training)):
        print(text)
    print(f"\nGo on:\n{next_steps(training, command)}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), ValueError, OSError, FloatingPointError)
