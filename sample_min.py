"""Sample from a model: a picture, an animation, or an .npz of any size.

For whoever has a trained model. Imports dydilit.py and support/.

    python sample_min.py                      a grid of every class from out/digits/ckpt.pt
    python sample_min.py --out digits.gif     the same grid coming out of noise
    python sample_min.py CKPT --classes 3 7 --cfg 2 --steps 100 --seed 1 --out grid.png
    torchrun --nproc_per_node=8 sample_min.py CKPT --images 50000 --labels random --out samples.npz
    python sample_min.py CKPT --export DIR    averaged weights as model.safetensors, config.json

Image i depends on the seed and on i, not on the number of processes. An .npz goes on where it
stopped when the same command is started again. Latents are decoded by the autoencoder that their
data set names. A second process with the same --out ends with a line that says which one writes.
"""

import support

if __name__ == "__main__":
    support.begin()

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from dydilit import Diffusion, DyDiLA, distributed, generator
from support.decoder import Decoder
from support.fused import check_fused
from support.pictures import save_animation, save_grid
from support.pretrained import load as load_pretrained
from support.processes import by_rank_0, join, one_run
from support.shards import finish, folder_of, is_whole, need_room, unfinished
from support.terminal import Progress, first_speaks, run

LABELS = 4  # a purpose of `generator`, beside those of dydilit.py
FRAMES = 50  # of an animation, at most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOW = ("cfg", "cfg_channels", "steps", "sampler", "seed", "dtype")  # settings that `generate` takes


# --------------------------------------------------------------------------------------------------
# Images.


def generate(
    model,
    labels,
    index,
    decode,
    *,
    cfg,
    cfg_channels,
    steps,
    sampler,
    seed,
    dtype="float32",
    on_step=None,
):
    """Images number `index` (a range) of a set with the labels (n,): uint8 (len(index), H, W, C).

    on_step(x) is called after every sampling step.
    """
    y = labels[index.start : index.stop].to(next(model.parameters()).device)
    with torch.autocast(y.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        x = Diffusion(steps).sample(
            model,
            y,
            index,
            seed=seed,
            cfg=cfg,
            cfg_channels=cfg_channels,
            sampler=sampler,
            clip=decode.vae is None,
            on_step=on_step,
        )
    return decode(x).cpu().numpy()


def sample_to(out, model, labels, settings, decode, batch=250, anew=False):
    """Images for the labels (n,) into the .npz `out`: arr_0 uint8 (n, H, W, C), labels, settings.

    The settings, a dict, are stored as JSON. The unit of work is a chunk of `batch` images, made by
    one process. So neither the number of processes nor an interruption changes a byte. Another
    `batch` rounds differently, which may move a pixel by a grey level. An unfinished file of other
    settings is a ValueError, or is thrown away with `anew`. BlockedError, an OSError, while another
    process makes the file.
    """
    rank, world, device = distributed()
    n = len(labels)
    model = model.to(device)
    how = {key: settings[key] for key in HOW}
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]
    record = settings | {"n": n, "batch": batch, "labels": digest}
    with one_run(out):
        with unfinished(out, record, n, decode.shape, batch, anew) as (todo, put):
            mine = todo[rank::world].tolist()
            progress = Progress("sample", max(1, settings["steps"] * len(mine)), quiet=rank > 0)
            for chunk in mine:
                index = range(chunk * batch, min(n, (chunk + 1) * batch))
                images = generate(model, labels, index, decode, **how, on_step=lambda x: progress())
                put(chunk, images)
        if rank == 0:
            finish(out, labels=labels.numpy(), settings=np.array(json.dumps(settings)))


def steps_to_show(steps):
    """Up to FRAMES of the steps 1 .. steps, more of them towards the end, where images appear."""
    if steps <= FRAMES:
        return range(1, steps + 1)
    to_go = np.linspace(1, 0, FRAMES) ** 2
    return {round(steps - (steps - 1) * share) for share in to_go}


def animate(out, model, labels, settings, decode, order, columns):
    """Images for the labels (n,), coming out of noise, as the .gif `out`; `order` is their place.

    One batch. A frame shows x_t as if it were an image.
    """
    progress = Progress("sample", settings["steps"])
    shown = steps_to_show(settings["steps"])
    frames = []

    def on_step(x):
        progress()
        if progress.done in shown:
            frames.append(decode(x).cpu().numpy()[order])

    how = {key: settings[key] for key in HOW}
    generate(model, labels, range(len(labels)), decode, **how, on_step=on_step)
    save_animation(out, frames, columns)


# --------------------------------------------------------------------------------------------------
# Labels and settings.


def labels_for(classes, names):
    """The labels of `classes`, each a name or an index; all labels for an empty list."""
    known = {str(i): i for i in range(len(names))}
    known |= {name: i for i, name in enumerate(names)}  # a name wins over an index
    for c in classes:
        if c not in known:
            few = ", ".join(names[:20])
            raise ValueError(f"unknown class {c!r}; there are {len(names)}: {few}")
    return [known[c] for c in classes] or list(range(len(names)))


def many_labels(classes, num, how, seed):
    """`num` labels out of `classes`, int64 (num,).

    "balanced": each class in turn. "random": drawn evenly, label i from (seed, i) alone.
    """
    if how == "balanced":
        return torch.tensor(classes)[torch.arange(num) % len(classes)]
    drawn = [generator(seed, LABELS, i).integers(len(classes)) for i in range(num)]
    return torch.tensor([classes[k] for k in drawn])


def digest_of(model):
    """Sixteen hexadecimal digits that stand for the weights."""
    digest = hashlib.sha256()
    for _, z in sorted(model.state_dict().items()):
        digest.update(z.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def settings_of(
    model,
    *,
    cfg,
    steps,
    seed,
    sampler="ddpm",
    cfg_channels=None,
    vae=None,
    dtype="float32",
    attention_dtype=None,
):
    """What decides the images, except the labels: a dict for JSON, kept beside the images.

    Of latents three channels are guided by default, as in DiT, and of pixels all (None).
    """
    latents = "scaling" in model.meta
    if not cfg_channels:
        cfg_channels = min(3, model.config.in_channels) if latents else None
    return {
        "model": getattr(model.config, "attention", "dydila"),
        "weights": digest_of(model),
        "step": model.step,
        "data": model.meta.get("name"),
        "cfg": cfg,
        "cfg_channels": cfg_channels,
        "steps": steps,
        "sampler": sampler,
        "seed": seed,
        "dtype": dtype,
        "attention_dtype": attention_dtype,
        "vae": (vae or model.meta["vae"]) if latents else None,
    }


def settings_in(npz, labels):
    """The settings that a file of `sample_to` was made with; None if it holds other labels (n,),
    or is no such file, or is damaged. It reads the whole file."""
    try:
        with open(npz, "rb") as f, np.load(f) as made:
            same = np.array_equal(made["labels"], labels.numpy()) and "arr_0" in made.files
            settings = json.loads(str(made["settings"]))
        return settings if same and is_whole(npz) else None
    except Exception:  # numpy, zipfile and zlib raise many kinds on a damaged file
        return None


# --------------------------------------------------------------------------------------------------
# The command line.


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "checkpoint",
        nargs="?",
        default="out/digits/ckpt.pt",
        help="ckpt.pt of train_min.py, or a folder of --export (default: %(default)s)",
    )
    option(
        "--out",
        default="samples.png",
        help="a .png grid, a .gif of the grid coming out of noise, or an .npz with arr_0 "
        "(N, H, W, C), labels, settings (default %(default)s)",
    )
    option("--classes", nargs="+", default=[], help="class names or indices; default: every class")
    option(
        "--per-class",
        type=int,
        default=8,
        help="images of each class, which share a row of the grid (default %(default)s)",
    )
    option(
        "--images",
        type=int,
        help="images in all, instead of images of each class; --per-class is then the number of "
        "columns of the grid",
    )
    option(
        "--labels",
        choices=("balanced", "random"),
        default="balanced",
        help="labels of --images images: every class in turn, or drawn evenly "
        "(default %(default)s)",
    )
    option("--cfg", type=float, default=1.5, help="guidance scale, 1 is none (default %(default)s)")
    option(
        "--cfg-channels",
        type=int,
        help="how many channels are guided (default: of latents 3 of 4, as in DiT; of pixels all)",
    )
    option("--steps", type=int, default=100, help="sampling steps (default %(default)s)")
    option("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    option("--batch", type=int, default=250, help="images at a time (default %(default)s)")
    option(
        "--vae",
        help="hub id or folder of the autoencoder that decodes latents (default: the one that "
        "encoded the training data)",
    )
    option(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the network's products, by autocast (default %(default)s)",
    )
    option(
        "--attention-dtype",
        choices=DTYPES,
        help="of the attention's inputs (default: that of the projections' outputs)",
    )
    add_compile(parser)
    option(
        "--export",
        metavar="DIR",
        help="write the averaged weights there instead of sampling (model.save_pretrained)",
    )
    return parser


def add_compile(parser):
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="torch.compile the network (default: on a GPU)",
    )


def check(args):
    """ValueError for options that are wrong whatever the model is."""
    images = 1 if args.images is None else args.images
    if min(args.per_class, args.batch, images) < 1:
        raise ValueError("--per-class, --images and --batch must be at least 1")
    for option in ("seed", "images", "per_class", "batch"):
        if (getattr(args, option) or 0) >= 2**63:
            raise ValueError(f"--{option.replace('_', '-')} must be less than {2**63}")
    if args.seed < 0:
        raise ValueError("--seed must be at least 0")
    if not math.isfinite(args.cfg):
        raise ValueError(f"--cfg must be a finite number, got {args.cfg}")
    suffix = Path(args.out).suffix
    if suffix not in (".png", ".gif", ".npz"):
        raise ValueError(f"--out must end in .png, .gif or .npz, got {args.out}")
    if args.labels == "random" and not args.images:
        raise ValueError("--labels random needs --images")
    if suffix == ".gif" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a .gif is made by one process; start it without torchrun")
    Diffusion(args.steps)  # raises ValueError for a wrong number


def check_for(model, args):
    """ValueError for options that this model does not take."""
    channels = model.config.in_channels
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= channels:
        raise ValueError(f"--cfg-channels must be between 1 and the model's {channels}")
    if args.attention_dtype and not any(isinstance(m, DyDiLA) for m in model.modules()):
        raise ValueError("--attention-dtype is for DyDiLA; this model has another attention")


def main(argv=None, load=load_pretrained):
    """load(path) -> the model; experiments/sample.py has one for more kinds of models."""
    with first_speaks():
        args = command_line().parse_args(argv)
    check(args)
    join()
    model = load(args.checkpoint)
    if args.export:
        export(model, args.export)
        return
    check_for(model, args)
    classes = labels_for(args.classes, model.meta["classes"])
    number = args.images or args.per_class * len(classes)
    if args.out.endswith(".gif") and number > args.batch:
        raise ValueError(
            f"a .gif is made in one batch, of at most {args.batch} images, not {number}; "
            "fewer --classes or --per-class, or a larger --batch"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    config = model.config
    need_room(out, number * config.in_channels * config.input_size**2)  # latents: before decoding
    labels = many_labels(classes, number, args.labels, args.seed)
    given = ("cfg", "steps", "seed", "sampler", "cfg_channels", "vae", "dtype", "attention_dtype")
    settings = settings_of(model, **{key: getattr(args, key) for key in given})
    with one_run(out):
        if not by_rank_0(lambda: is_there(out, labels, settings)):
            sample(model, args, labels, settings)


def export(model, folder):
    """The averaged weights, by one process."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with one_run(folder):
        if distributed()[0] == 0:
            model.save_pretrained(folder)
            print(f"{folder}: model.safetensors, config.json of step {model.step}")


def sample(model, args, labels, settings):
    """Make --out."""
    rank, _, device = distributed()
    decode = Decoder(model.config, settings["vae"], model.meta.get("scaling"), device)
    attentions = [module for module in model.modules() if isinstance(module, DyDiLA)]
    for module in attentions:
        module.dtype = DTYPES.get(args.attention_dtype)
    if attentions:
        line = check_fused(device, DTYPES[args.attention_dtype or args.dtype])
        if rank == 0:
            print(line, file=sys.stderr, flush=True)
    model = model.to(device)
    if args.compile:
        model.compile(fullgraph=True)
        Progress("sample", 1, quiet=rank > 0).compiling()
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions is True
    number = len(labels)
    if args.out.endswith(".npz"):
        sample_to(args.out, model, labels, settings, decode, args.batch)
    else:
        order = np.arange(number)
        if not args.images:
            order = order.reshape(args.per_class, -1).T.ravel()  # a row for each class
        draw(args, model, labels, settings, decode, order)
    if rank == 0:
        print(
            f"{args.out}: {number} images from step {model.step}, {args.sampler} {args.steps} "
            f"steps, cfg {args.cfg}, seed {args.seed}"
        )


def draw(args, model, labels, settings, decode, order):
    """The .png or .gif of the images, in rows of --per-class."""
    if args.out.endswith(".gif"):
        animate(args.out, model, labels, settings, decode, order, args.per_class)
        return
    npz = f"{args.out}.npz"
    sample_to(npz, model, labels, settings, decode, args.batch)
    if distributed()[0] == 0:
        with np.load(npz) as made:
            images = made["arr_0"]
        save_grid(args.out, images[order], args.per_class)
        Path(npz).unlink()


def is_there(out, labels, settings):
    """Whether the .npz is there, which is then said. FileExistsError if another command made it."""
    if out.suffix != ".npz" or not out.exists():
        return False
    if settings_in(out, labels) != settings:
        raise FileExistsError(
            f"{out} exists, and not by this command; delete it, or choose another --out"
        )
    shutil.rmtree(folder_of(out), ignore_errors=True)  # left by a kill just before the end
    print(f"{out}: already there")
    return True


if __name__ == "__main__":
    run(main, ValueError, OSError)
