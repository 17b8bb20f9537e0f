"""From what the diffusion makes to images of bytes; latents through a diffusers.AutoencoderKL.

For train_min.py and sample_min.py. Imports torch; diffusers only where latents have to be decoded.
"""

import math
import warnings

import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, with DiT's rounding."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Decoder:
    """Samples (B, C, H, W) -> images, uint8 (B, H, W, C). `shape` is the (H, W, C) of an image.

    config: of the model that makes the samples. vae: hub id or folder of an AutoencoderKL, None
    for pixels. scaling: what the latents were multiplied by. ValueError, one line, if the
    autoencoder cannot be loaded or does not fit the samples, or the scaling is no number above 0.
    """

    def __init__(self, config, vae, scaling, device, batch=16):
        self.vae = None
        self.scaling = scaling
        self.batch = batch
        self.shape = (config.input_size, config.input_size, config.in_channels)
        if vae is not None:
            if not isinstance(scaling, int | float) or not 0 < scaling < math.inf:
                raise ValueError(f"the scaling of the latents is {scaling!r}, not a number above 0")
            self.vae = load_autoencoder(vae, config.in_channels).to(device)
            side = config.input_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
            self.shape = (side, side, 3)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if self.vae is not None:
            # float32, and a few images at a time: decoding takes far more memory than the model
            with torch.autocast(x.device.type, enabled=False):
                parts = x.split(self.batch)
                x = torch.cat([self.vae.decode(z / self.scaling).sample for z in parts])
        if not x.isfinite().all():
            raise ValueError("the samples are not finite numbers")
        return to_uint8(x)


def load_autoencoder(vae, channels):
    """The AutoencoderKL `vae` for latents of so many channels. ValueError, one line."""
    try:
        from diffusers import AutoencoderKL, logging
    except ImportError as e:
        raise ValueError(
            f"these are latents; to decode them: pip install diffusers safetensors ({e})"
        ) from e
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            model, found = AutoencoderKL.from_pretrained(
                vae, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
            )
    except Exception as e:  # of many types, with texts of many lines
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(
            f"cannot load the autoencoder {vae!r} (offline? --vae names another): {reason}"
        ) from e
    missing = found["missing_keys"]
    if missing:
        raise ValueError(
            f"the autoencoder {vae!r} lacks {len(missing)} weights, {min(missing)} among them"
        )
    config = model.config
    if config.shift_factor or config.latents_mean or config.latents_std:
        raise ValueError(
            f"the autoencoder {vae!r} also shifts its latents; only a scaling is supported"
        )
    if config.latent_channels != channels:
        raise ValueError(
            f"the autoencoder {vae!r} decodes {config.latent_channels} channels, "
            f"the model makes {channels}"
        )
    if config.out_channels != 3:
        raise ValueError(f"the autoencoder {vae!r} makes {config.out_channels} channels, not RGB")
    return model


def check_autoencoder(vae, channels):
    """ValueError, one line, unless `load_autoencoder` can be relied on after a training run.

    It loads the autoencoder, which leaves a download in the cache, looks for weights that are not
    finite, and drops it.
    """
    for name, weight in load_autoencoder(vae, channels).state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"the autoencoder {vae!r} has weights that are no numbers, in {name}")
