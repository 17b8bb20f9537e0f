"""Models from files: those of this repository, and the weights of facebookresearch/DiT.

    from experiments import pretrained
    model = pretrained.load("out/DiT-digits/ckpt.pt")    # ready for sampling

For readers who want to sample from a compared model. Imports dydilit.py and baselines.py only.
"""

import argparse
import math
from pathlib import Path

import torch

from dydilit import Config, DyDiLiT
from experiments.baselines import Baseline

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT's own widths: S, B, L, XL
DIT_VAE = {"vae": "stabilityai/sd-vae-ft-ema", "scaling": 0.18215}


def load(path, heads=None):
    """A model in eval mode, with averaged weights where the file has them.

    path: a checkpoint of train_min.py or experiments/train.py, a folder of `--export`, or weights
    of DiT, bare or as its train.py keeps them. heads: how many attention heads DiT's weights have,
    if their width is none of DiT's own four. The model has `meta` and `step`, as after
    DyDiLiT.from_pretrained. FileNotFoundError or ValueError, one line, if it cannot be loaded.
    """
    try:
        return DyDiLiT.from_pretrained(path, kinds=(Config, Baseline))
    except ValueError:
        state = None if Path(path).is_dir() else dit_weights(path)
        if state is None:
            raise
    return dit_model(path, state, heads)


def dit_weights(path):
    """The state dict of a file with DiT's weights; None if the file is something else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # beside DiT's own checkpoints
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("ema", state)
        shape_of(state)
        return state
    except Exception:  # torch raises many kinds; from_pretrained has said what the file is not
        return None


def shape_of(state):
    """The fields of a Config that the shapes of DiT's weights show. KeyError if they are others."""
    D, channels, patch, _ = state["x_embedder.proj.weight"].shape
    N = state["pos_embed"].shape[1]
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    return {
        "input_size": math.isqrt(N) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": D,
        "depth": 1 + max(blocks),
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
    }


def dit_model(path, state, heads=None):
    """The model of DiT's weights, whose number of heads leaves no trace in the shapes."""
    fields = shape_of(state)
    D = fields["hidden_size"]
    heads = heads or DIT_HEADS.get(D)
    if heads is None:
        raise ValueError(
            f"{path}: a width of {D} is none of DiT's own; --heads must say how many heads it has"
        )
    model = Baseline(**fields, heads=heads).build()
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # a list of names over many lines
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{path}: the weights are not those of its model: {reason}") from e
    model.meta = {"classes": [str(i) for i in range(fields["num_classes"])]}
    if fields["in_channels"] == 4:
        model.meta |= DIT_VAE
    model.step = None
    return model.eval()
