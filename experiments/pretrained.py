"""Models from files: those of this repository, and the weights of facebookresearch/DiT.

    from experiments import pretrained
    model = pretrained.load("out/DiT-digits/ckpt.pt")    # ready for sampling

For readers who want to sample from a compared model. Imports dydilit.py, support/ and
baselines.py only.
"""

import math

from dydilit import Config
from experiments.baselines import Baseline
from support import pretrained

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT's own widths: S, B, L, XL
DIT_VAE = {"vae": "stabilityai/sd-vae-ft-ema", "scaling": 0.18215}


def load(path, heads=None):
    """A model in eval mode, with averaged weights where the file has them.

    path: a checkpoint of train_min.py or experiments/train.py, a folder of `--export`, or weights
    of DiT, bare or as its train.py keeps them. heads: how many attention heads DiT's weights have,
    if their width is none of DiT's own four. The model has `meta` and `step`, as after
    DyDiLiT.from_pretrained. FileNotFoundError or ValueError, one line, if it cannot be loaded.
    """
    saved = pretrained.read(path)
    if "config" in saved or not is_dit(saved["ema"]):
        return pretrained.build(path, saved, kinds=(Config, Baseline))
    return dit_model(path, saved["ema"], heads)


def is_dit(state):
    """Whether these are weights of facebookresearch/DiT, or of its kind."""
    try:
        shape_of(state)
    except (KeyError, ValueError, IndexError):
        return False
    return any(name.endswith("mlp.fc1.weight") for name in state)


def shape_of(state):
    """The fields of a Config that the shapes of DiT's weights show. KeyError, ValueError or
    IndexError if they are others."""
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
