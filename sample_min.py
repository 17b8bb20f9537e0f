"""Sample from a model.

    python sample_min.py                                     a grid of every class from out/digits/ckpt.pt
    python sample_min.py out/digits/ckpt.pt --classes 3 7 --cfg 2 --steps 100 --sampler ddim --seed 1 --out grid.png
    torchrun --nproc_per_node=8 sample_min.py CKPT --images 50000 --labels random --steps 250 --out samples.npz
    python sample_min.py CKPT --export DIR                   its averaged weights, as model.safetensors and config.json
    python sample_min.py DiT-XL-2-256x256.pt --classes 207 --cfg 4                   weights of facebookresearch/DiT

Image i depends on the seed and on i, not on the number of processes. An .npz goes on where it stopped when the same
command is started again. Latents are decoded by the autoencoder that their data set names.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from dydilit import Diffusion, DyDiLA, distributed, generator
from load import Decoder, export, load_model

LABELS = 4  # a purpose of `generator`, beside those of dydilit.py
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Progress:
    """A bar on the terminal's last line; where stderr is no terminal, a line now and then."""

    def __init__(self, what, total, quiet=False):
        self.what, self.total, self.quiet, self.first, self.done = what, total, quiet, None, 0
        self.live, self.shown = sys.stderr.isatty(), 0.0

    def __call__(self, text="", done=None):
        self.done, now = self.done + 1 if done is None else done, time.time()
        if self.first is None: self.first, self.began = self.done, now  # a resumed run does not begin at 0
        end = self.done >= self.total
        if self.quiet or (not end and now - self.shown < (0.2 if self.live else 20)): return
        self.shown, rate = now, (self.done - self.first) / (now - self.began + 1e-9)
        left = f"{rate:.2f}/s  {(self.total - self.done) / rate:.0f} s left" if rate else ""
        line = f"{self.what} [{'#' * (24 * self.done // self.total):.<24}] {self.done}/{self.total}  {text}  {left}"
        sys.stderr.write(f"\r{line} {chr(10) * end}" if self.live else f"{line}\n")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Many images.


def generate(model, labels, index, decode, *, cfg, cfg_channels, steps, sampler, seed, dtype="float32", on_step=None):
    """Images number `index` (a range) of the set whose labels are (n,): uint8 (len(index), H, W, C)."""
    y = labels[index.start : index.stop].to(next(model.parameters()).device)
    with torch.autocast(y.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        x = Diffusion(steps).sample(model, y, index, seed=seed, cfg=cfg, cfg_channels=cfg_channels, sampler=sampler,
                                    clip=decode.vae is None, on_step=on_step)
    return decode(x).cpu().numpy()


@contextmanager
def unfinished(out, settings, n, shape, batch):
    """The folder `out`.partial, laid out by the first process: settings.json, images (n rows), done (a byte a chunk).

    ValueError if other settings began it. OSError if the disk has no room.
    """
    rank, world, _ = distributed()
    folder, error = Path(f"{out}.partial"), [None]
    if rank == 0:
        try:
            then = json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").exists() else None
            if then is None:
                folder.mkdir(parents=True, exist_ok=True)
                need, free = 2 * n * math.prod(shape), shutil.disk_usage(folder).free
                if need > free: raise OSError(f"{out} needs {need / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
                (folder / "done").write_bytes(bytes(-(-n // batch)))
                np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, *shape))  # zeros, no room yet
                (folder / "settings.json").write_text(json.dumps(settings))
            elif then != settings:
                differing = ", ".join(f"{k} {then.get(k)!r} (now {settings.get(k)!r})" for k in then | settings
                                      if then.get(k) != settings.get(k))
                raise ValueError(f"{folder} was begun with other settings: {differing}; delete it or choose another "
                                 "--out")
        except (OSError, ValueError) as e: error = [e]
    if world > 1: dist.broadcast_object_list(error)
    if error[0]: raise error[0]
    done = np.frombuffer((folder / "done").read_bytes(), np.uint8)
    if world > 1: dist.barrier()  # nobody marks before all have looked
    with open(folder / "images.npy", "r+b") as images, open(folder / "done", "r+b") as flags:
        offset = np.load(folder / "images.npy", mmap_mode="r").offset
        def put(chunk, x):  # by ordinary writes: on a full disk they raise, a memory map would end the process
            images.seek(offset + chunk * batch * math.prod(shape))
            images.write(x.tobytes())
            images.flush()
            os.fsync(images.fileno())
            flags.seek(chunk)
            flags.write(b"\1")
            flags.flush()
        yield np.flatnonzero(done == 0), put


def sample_to(out, model, labels, settings, decode, batch=250):
    """Images for the labels (n,) into the .npz `out`: arr_0 uint8 (n, H, W, C), labels, and the settings as JSON.

    The unit of work is a chunk of `batch` images, made by one process. So neither the number of processes nor an
    interruption, after which it goes on, changes a byte; another batch may, by rounding: a grey level here and there.
    """
    rank, world, device = distributed()
    n, model = len(labels), model.to(device)
    how = {k: settings[k] for k in ("cfg", "cfg_channels", "steps", "sampler", "seed", "dtype")}
    record = settings | {"n": n, "batch": batch, "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]}
    with unfinished(out, record, n, decode.shape, batch) as (todo, put):
        mine = todo[rank::world].tolist()
        progress = Progress("sample", max(1, settings["steps"] * len(mine)), quiet=rank > 0)
        for chunk in mine:
            index = range(chunk * batch, min(n, (chunk + 1) * batch))
            put(chunk, generate(model, labels, index, decode, **how, on_step=progress))
    if rank > 0:
        return
    folder, beside = Path(f"{out}.partial"), Path(f"{out}.tmp.npz")
    while 0 in (folder / "done").read_bytes(): time.sleep(0.5)  # not a barrier: the others may take hours yet
    try:  # the memory map is copied piece by piece
        np.savez(beside, arr_0=np.load(folder / "images.npy", mmap_mode="r"), labels=labels.numpy(),
                 settings=np.array(json.dumps(settings)))
        os.replace(beside, out)
    finally: beside.unlink(missing_ok=True)
    shutil.rmtree(folder)


def settings_in(npz, labels):
    """The settings that a file of sample_to's was made with, if it holds images of these labels (n,); or None."""
    try:
        with np.load(npz) as made:
            return json.loads(str(made["settings"])) if np.array_equal(made["labels"], labels.numpy()) else None
    except (OSError, ValueError, KeyError): return None


def save_grid(path, images, columns):
    """(n, H, W, C) uint8 as one PNG, row by row; small images are enlarged so that a person can see them."""
    n, H, W, C = images.shape
    scale, rows = max(1, 48 // H), -(-n // columns)
    sheet = np.full((rows * columns, H + 1, W + 1, C), 255, np.uint8)  # a line between them
    sheet[:n, :H, :W] = images
    sheet = sheet.reshape(rows, columns, H + 1, W + 1, C).swapaxes(1, 2).reshape(rows * (H + 1), columns * (W + 1), C)
    picture = Image.fromarray(sheet[..., 0] if C == 1 else sheet[..., :3])
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def labels_for(classes, names):
    """Label numbers for what was asked: numbers or names; all classes for an empty list."""
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    if unknown := [c for c in classes if c not in known]:
        raise ValueError(f"unknown class {unknown[0]!r}; there are {len(names)}: {', '.join(names[:20])}")
    return [known[c] for c in classes] or list(range(len(names)))


def many_labels(classes, num, how, seed):
    """`num` labels out of `classes`: each in turn ("balanced"), or drawn, label i from (seed, i) alone ("random")."""
    if how == "balanced":
        return torch.tensor(classes)[torch.arange(num) % len(classes)]
    return torch.tensor([classes[generator(seed, LABELS, i).integers(len(classes))] for i in range(num)])


def settings_of(model, ckpt, *, cfg, steps, seed, sampler="ddpm", cfg_channels=None, vae=None, dtype="float32",
                attention_dtype=None):
    """What decides the images, but for the labels: a dict for JSON, kept beside them. Defaults depend on the model."""
    digest, latents = hashlib.sha256(), "scaling" in ckpt["meta"]
    for _, z in sorted(ckpt["ema"].items()): digest.update(z.cpu().flatten().view(torch.uint8).numpy())
    return {"model": getattr(model.config, "attention", "dydila"), "weights": digest.hexdigest()[:16],
            "step": ckpt["step"], "data": ckpt["meta"].get("name"), "cfg": cfg,
            "cfg_channels": cfg_channels or (min(3, model.config.in_channels) if latents else None),
            "steps": steps, "sampler": sampler,
            "seed": seed, "dtype": dtype, "attention_dtype": attention_dtype,
            "vae": (vae or ckpt["meta"]["vae"]) if latents else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="out/digits/ckpt.pt",
                        help="of train_min.py, or a folder of --export, or DiT's weights (default: %(default)s)")
    parser.add_argument("--out", default="samples.png",
                        help="a .png grid, or .npz: arr_0 (N, H, W, C), labels, settings (default %(default)s)")
    parser.add_argument("--classes", nargs="+", default=[],
                        help="names, or numbers that are no names; default: every class")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class (default %(default)s)")
    parser.add_argument("--images", type=int, help="images in all, instead of --per-class")
    parser.add_argument("--labels", choices=("balanced", "random"), default="balanced",
                        help="of --images images: every class in turn, or drawn evenly (default %(default)s)")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale, 1 is none (default %(default)s)")
    parser.add_argument("--cfg-channels", type=int,
                        help="how many channels to guide (default: 3 of 4 for latents, as DiT does, or else all)")
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default %(default)s)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=250, help="images at a time (default %(default)s)")
    parser.add_argument("--vae", help="hub id or folder that decodes latents (default: what encoded the training data)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the network's products, by autocast (default %(default)s)")
    parser.add_argument("--attention-dtype", choices=DTYPES,
                        help="of what the attention reads (default: what the projections give)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--heads", type=int, help="of a DiT's state dict of another width than DiT's own four")
    parser.add_argument("--export", metavar="DIR", help="write the averaged weights there, and sample nothing")
    args = parser.parse_args()
    if min(args.per_class, args.batch, 1 if args.images is None else args.images) < 1:
        raise ValueError("--per-class, --images and --batch must be at least 1")
    if args.seed < 0: raise ValueError("--seed must be at least 0")
    if Path(args.out).suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {args.out}")
    if args.labels == "random" and not args.images: raise ValueError("--labels random needs --images")
    model, ckpt = load_model(args.checkpoint, args.heads)
    if args.export:
        export(ckpt, Path(args.export))
        return print(f"{args.export}: model.safetensors, config.json of step {ckpt['step']}")
    if not 1 <= (args.cfg_channels or 1) <= model.config.in_channels:
        raise ValueError(f"--cfg-channels must be between 1 and the model's {model.config.in_channels}")
    if args.attention_dtype and not any(isinstance(module, DyDiLA) for module in model.modules()):
        raise ValueError("--attention-dtype is for DyDiLA; this model has another attention")
    Diffusion(args.steps)  # a wrong number is an error now
    classes = labels_for(args.classes, ckpt["meta"]["classes"])
    labels = many_labels(classes, args.images or args.per_class * len(classes), args.labels, args.seed)
    given = ("cfg", "steps", "seed", "sampler", "cfg_channels", "vae", "dtype", "attention_dtype")
    settings = settings_of(model, ckpt, **{k: getattr(args, k) for k in given})
    rank, _, device = distributed()
    npz = args.out if args.out.endswith(".npz") else f"{args.out}.npz"  # a grid is made of one, which does not stay
    if Path(args.out).exists() and npz == args.out:
        if settings_in(npz, labels) != settings:
            raise FileExistsError(f"{npz} exists, and not by this command; delete it, or choose another --out")
        if rank > 0: return
        shutil.rmtree(f"{npz}.partial", ignore_errors=True)  # of a run that was killed after its last rename
        return print(f"{npz}: already there")
    decode = Decoder(model.config, settings["vae"], ckpt["meta"].get("scaling"), device)
    for module in model.modules():
        if isinstance(module, DyDiLA): module.dtype = DTYPES.get(args.attention_dtype)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sample_to(npz, torch.compile(model.to(device)) if args.compile else model, labels, settings, decode, args.batch)
    if rank > 0:
        return
    if npz != args.out:
        with np.load(npz) as made: images = made["arr_0"]
        if not args.images:  # each class in a row of its own
            images = images[np.arange(len(images)).reshape(args.per_class, -1).T.ravel()]
        save_grid(args.out, images, args.per_class)
        Path(npz).unlink()
    print(f"{args.out}: {len(labels)} images from step {ckpt['step']}, {args.sampler} {args.steps} steps, "
          f"cfg {args.cfg}, seed {args.seed}")


def keep_memory():
    """Have glibc keep what is freed for the next step. It would give it back to the system, and a step on a CPU would
    spend a fifth of its time on page faults (NOTES.md)."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_... of malloc.h
        for option, value in ((trim_threshold, -1), (top_pad, 2**26), (mmap_max, 0)): mallopt(option, value)


def run(main, *errors):
    """main(), with `errors` as one line and exit status 1; on a CPU, with memory kept."""
    if not torch.cuda.is_available(): keep_memory()
    code = 0
    try: main()
    except errors as e: code = f"{os.path.basename(sys.argv[0])}: error: {e}"
    except SystemExit as e: code = e.code or 0
    if dist.is_initialized():
        dist.destroy_process_group()
        if isinstance(code, str): print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(code, str) else code)  # gloo's threads now and then abort Python's own way out
    if code: sys.exit(code)


if __name__ == "__main__":
    run(main, ValueError, OSError)
