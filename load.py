"""Models from files, and their samples to images.

    from load import load_model
    model, about = load_model("out/digits/ckpt.pt")   # ready for sampling; about: its config, step, meta (of the data)

A file of train_min.py's, a folder of `sample_min.py --export`, or weights of facebookresearch/DiT.
"""

import argparse
import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from baselines import Baseline
from dydilit import Config, load_checkpoint

def dit_checkpoint(path, heads=None):
    """Weights with the names of DiT (Peebles & Xie) as a checkpoint, its config from the shapes; or None.

    Only the number of heads leaves no trace in the shapes: None takes that of DiT's own four widths.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # which its train.py puts beside the weights
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("ema", state)
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
    meta = {"classes": [str(i) for i in range(classes)]}
    meta |= {"vae": "stabilityai/sd-vae-ft-ema", "scaling": 0.18215} if channels == 4 else {}
    return {"ema": state, "step": None, "config": asdict(config), "meta": meta}


def exported(folder):
    """What --export wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((folder / "config.json").read_text())
        return {"ema": load_file(folder / "model.safetensors")} | {k: about[k] for k in ("step", "config", "meta")}
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise ValueError(f"{folder} holds no model.safetensors and config.json as --export writes them: {e}") from e


def export(ckpt, folder):
    """The averaged weights and what they are, for others to load: model.safetensors, config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: z.contiguous() for name, z in ckpt["ema"].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: ckpt[k] for k in ("config", "meta", "step")}, indent=1) + "\n")


def load_model(path, heads=None):
    """A model with averaged weights, ready for sampling, and a dict of its ema, config, meta (of its data) and step.

    path: a checkpoint of train_min.py, a folder of --export, or weights of DiT's, bare or as its train.py keeps them;
    `heads` is for those.
    """
    if Path(path).is_dir():
        ckpt = exported(Path(path))
    else:
        try:
            ckpt = load_checkpoint(path)
        except ValueError:
            ckpt = dit_checkpoint(path, heads)
            if ckpt is None: raise
    kind = Baseline if "attention" in ckpt["config"] else Config
    try:
        model = kind(**ckpt["config"]).build()
        model.load_state_dict(ckpt["ema"])
    except TypeError as e:  # a field that this version does not know
        raise ValueError(f"{path}: its config is not one of this version's models: {e}") from e
    except RuntimeError as e:  # a list of names over many lines
        raise ValueError(f"{path}: the weights are not those of its model: {' '.join(str(e).split())[:200]}") from e
    return model.eval(), ckpt


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, with DiT's rounding."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Decoder:
    """Samples (B, C, H, W) to images, uint8 (B, H, W, C): pixels as they are, latents by a diffusers.AutoencoderKL.

    vae: hub id or folder, None for pixels. ValueError if there is no such autoencoder, or it does not fit the samples.
    """

    def __init__(self, config, vae, scaling, device, batch=16):
        self.vae, self.scaling, self.batch, side = None, scaling, batch, config.input_size
        self.shape = (side, side, config.in_channels)
        if vae is None:
            return
        try:
            from diffusers import AutoencoderKL, logging
        except ImportError as e:
            raise ValueError(f"these are latents; to decode them: pip install diffusers safetensors ({e})") from e
        logging.set_verbosity_error()
        try:
            with warnings.catch_warnings(action="ignore"):
                self.vae, found = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32, low_cpu_mem_usage=False,
                                                                output_loading_info=True)
        except Exception as e:  # of many kinds, and pages long
            reason = str(e).strip().partition("\n")[0]
            raise ValueError(f"cannot load the autoencoder {vae!r} (offline? --vae names another): {reason}") from e
        about = self.vae.to(device).config
        if missing := found["missing_keys"]:
            raise ValueError(f"the autoencoder {vae!r} lacks {len(missing)} weights, {min(missing)} among them")
        if about.shift_factor or about.latents_mean or about.latents_std:
            raise ValueError(f"the autoencoder {vae!r} also shifts its latents; only a scaling is provided for")
        if self.vae.config.latent_channels != config.in_channels:
            raise ValueError(f"the autoencoder {vae!r} decodes {self.vae.config.latent_channels} channels, the model "
                             f"makes {config.in_channels}")
        side *= 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.shape = (side, side, 3)

    @torch.no_grad()
    def __call__(self, x):
        if self.vae is not None:  # in float32, a few at a time: it needs far more memory than the model
            with torch.autocast(x.device.type, enabled=False):
                x = torch.cat([self.vae.decode(z / self.scaling).sample for z in x.split(self.batch)])
        if not x.isfinite().all(): raise ValueError("the samples are not finite numbers")
        return to_uint8(x)
