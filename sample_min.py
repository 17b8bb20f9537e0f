"""Sample from a checkpoint.

    python sample_min.py                                     a grid of every class from out/digits/ckpt.pt
    python sample_min.py out/digits/ckpt.pt --classes 3 7 --cfg 2 --steps 100 --sampler ddim --seed 1 --out grid.png
    torchrun --nproc_per_node=2 sample_min.py --per-class 100 --out samples.npz      the work is shared
    python sample_min.py DiT-XL-2-256x256.pt --classes 207 --cfg 4                   weights of facebookresearch/DiT

Image i depends on the seed and on i, not on the batch size or the number of processes.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from baselines import Baseline
from dydilit import Config, Diffusion, distributed, load_checkpoint

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


def dit_checkpoint(path, heads=None):
    """A bare state dict with the names of DiT (Peebles & Xie) as a checkpoint, its config from the shapes; or None.

    Only the number of heads leaves no trace in the shapes: None takes that of DiT's own four widths.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        (D, channels, patch, _), N = state["x_embedder.proj.weight"].shape, state["pos_embed"].shape[1]
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
    except Exception:  # load_checkpoint has said it better
        return None
    heads = heads or {384: 6, 768: 12, 1024: 16, 1152: 16}.get(D)  # S, B, L, XL
    if heads is None:
        raise ValueError(f"{path}: a width of {D} is none of DiT's own; --heads must say how many heads it has")
    config = Baseline(input_size=math.isqrt(N) * patch, patch_size=patch, in_channels=channels, hidden_size=D,
                      depth=depth, num_classes=classes, heads=heads)
    return {"ema": state, "step": "?", "config": asdict(config), "meta": {"classes": [str(i) for i in range(classes)]}}


def load_model(path, heads=None):
    """A checkpoint's averaged weights as a model ready for sampling, and the checkpoint.

    It may also be a state dict of DiT's; that is what `heads` is for.
    """
    try:
        ckpt = load_checkpoint(path)
    except ValueError:
        ckpt = dit_checkpoint(path, heads)
        if ckpt is None: raise
    kind = Baseline if "attention" in ckpt["config"] else Config
    model = kind(**ckpt["config"]).build()
    try:
        model.load_state_dict(ckpt["ema"])
    except RuntimeError as e:  # a list of names over many lines
        raise ValueError(f"{path}: the weights are not those of its model: {' '.join(str(e).split())[:200]}") from e
    return model.eval(), ckpt


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, with DiT's rounding."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def generate(model, labels, *, steps, batch=250, cfg_channels=None, **how):
    """Images (n, H, W, C) uint8 for the labels (n,), shared among the processes; None on all ranks but the first.

    steps is the number of sampling steps; `how` goes to Diffusion.sample (seed, cfg, sampler). Four channels are taken
    for latents: guided on three of them (cfg_channels=None) and not clipped, as in DiT.
    """
    latents = model.config.in_channels == 4
    how |= {"clip": not latents, "cfg_channels": cfg_channels or (3 if latents else None)}
    rank, world, device = distributed()
    mine = torch.arange(len(labels))[rank::world]
    model, diffusion = model.to(device), Diffusion(steps)
    progress = Progress("sample", steps * -(-len(mine) // batch), quiet=rank > 0)
    images = np.empty((len(mine), model.config.input_size, model.config.input_size, model.config.in_channels), np.uint8)
    for first in range(0, len(mine), batch):
        index = mine[first : first + batch]
        x = diffusion.sample(model, labels[index].to(device), index.tolist(), on_step=progress, **how)
        images[first : first + batch] = to_uint8(x).cpu().numpy()
    if world == 1:
        return images
    parts = [None] * world if rank == 0 else None
    dist.gather_object(images, parts)
    if rank > 0:
        return None
    whole = np.empty((len(labels), *images.shape[1:]), np.uint8)
    for r, part in enumerate(parts):
        whole[r::world] = part
    return whole


def save_grid(path, images, columns):
    """(n, H, W, C) uint8 as one PNG, row by row; small images are enlarged so that a person can see them."""
    n, H, W, C = images.shape
    scale, rows = max(1, 48 // H), -(-n // columns)
    sheet = np.full((rows * columns, H + 1, W + 1, C), 255, np.uint8)  # a line between them
    sheet[:n, :H, :W] = images
    sheet = sheet.reshape(rows, columns, H + 1, W + 1, C).swapaxes(1, 2).reshape(rows * (H + 1), columns * (W + 1), C)
    picture = Image.fromarray(sheet[..., 0] if C == 1 else sheet[..., :3])
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def labels_for(classes, names):
    """Label numbers for what was asked: numbers or names; all classes for an empty list."""
    known = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    if unknown := [c for c in classes if c not in known]:
        raise ValueError(f"unknown class {unknown[0]!r}; there are {len(names)}: {', '.join(names[:20])}")
    return [known[c] for c in classes] or list(range(len(names)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="out/digits/ckpt.pt", help="default: %(default)s")
    parser.add_argument("--classes", nargs="+", default=[], help="numbers or names; default: every class")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class (default %(default)s)")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale, 1 is none (default %(default)s)")
    parser.add_argument("--cfg-channels", type=int,
                        help="how many channels to guide (default: 3 of 4 for latents, as DiT does, or else all)")
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default %(default)s)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=250, help="images at a time (default %(default)s)")
    parser.add_argument("--heads", type=int, help="of a DiT's state dict of another width than DiT's own four")
    parser.add_argument("--out", default="samples.png",
                        help="a .png grid, or .npz: arr_0 (N, H, W, C) and labels (default %(default)s)")
    args = parser.parse_args()
    if args.per_class < 1 or args.batch < 1:
        raise ValueError("--per-class and --batch must be at least 1")
    if Path(args.out).suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {args.out}")
    model, ckpt = load_model(args.checkpoint, args.heads)
    if not 1 <= (args.cfg_channels or 1) <= model.config.in_channels:
        raise ValueError(f"--cfg-channels must be between 1 and the model's {model.config.in_channels}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    labels = torch.tensor(labels_for(args.classes, ckpt["meta"]["classes"])).repeat_interleave(args.per_class)
    images = generate(model, labels, steps=args.steps, batch=args.batch, seed=args.seed, cfg=args.cfg,
                      cfg_channels=args.cfg_channels, sampler=args.sampler)
    if images is None:
        return
    if args.out.endswith(".npz"):
        np.savez(args.out, arr_0=images, labels=labels.numpy())
    else:
        save_grid(args.out, images, args.per_class)
    print(f"{args.out}: {len(images)} images from step {ckpt['step']}, {args.sampler} {args.steps} steps, "
          f"cfg {args.cfg}, seed {args.seed}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"{os.path.basename(__file__)}: error: {e}")
    finally:
        if dist.is_initialized(): dist.destroy_process_group()
