"""Latents of an autoencoder, for `prepare.py --vae`; needs torch and diffusers."""

import hashlib
import os
import warnings

import numpy as np
import torch


class Encoder:
    """Images -> means and standard deviations of their posterior, in float32.

    name: a diffusers.AutoencoderKL, as hub id or folder. It runs on the GPU if there is one.
    shape: that of the latents of one image. about: what training and decoding must know of them.
    weights: a fingerprint of the encoder. ValueError if there is no such autoencoder, or if it
    does not fit the images.
    """

    def __init__(self, name, size, flip):
        vae = load_autoencoder(name)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        check_fits(vae.config, name, size, factor)
        self.flip = flip
        side = size // factor
        self.shape = (1 + flip, 2 * vae.config.latent_channels, side, side)
        self.about = {"vae": name, "scaling": vae.config.scaling_factor}
        self.weights = fingerprint(vae)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.device = torch.device("cpu")
        if gpus:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        else:
            torch.set_num_threads(1)  # the number of threads decides the rounding
        self.vae = vae.to(self.device)

    def __call__(self, images, files):
        """uint8 (B, 3, size, size) -> float16 (B, F, 2C, h, w).

        F = 0: the images as they are; F = 1, with flip: mirrored. 2C: C means, then C standard
        deviations. files: {index: file}, of the images to check. ValueError if the latents of one
        of them are not finite, or if the memory of the GPU does not suffice.
        """
        # contiguous: the layout of the memory decides the rounding
        x = torch.from_numpy(np.ascontiguousarray(images))
        x = x.to(self.device).float() / 127.5 - 1
        views = [x, x.flip(-1)] if self.flip else [x]
        latents = torch.stack([self.encode(view) for view in views], dim=1)
        latents = latents.half().cpu().numpy()
        for i, file in files.items():
            if not np.isfinite(latents[i]).all():
                raise ValueError(f"the latents of {file} are not finite")
        return latents

    @torch.inference_mode()
    def encode(self, x):
        """Images (B, 3, H, W) in -1 .. 1 -> means and standard deviations (B, 2C, h, w)."""
        exact = {"enabled": True, "deterministic": True, "allow_tf32": False}
        no_autocast = torch.autocast(x.device.type, enabled=False)
        with no_autocast, torch.backends.cudnn.flags(**exact):  # in 16 bits some VAEs give NaN
            try:
                posterior = self.vae.encode(x).latent_dist
            except torch.OutOfMemoryError as e:
                message = f"the GPU cannot take {len(x)} images at once; --batch says how many"
                raise ValueError(message) from e
            return torch.cat([posterior.mean, posterior.std], dim=1)


def load_autoencoder(name):
    """The diffusers.AutoencoderKL in float32; ValueError, one line, if it cannot be loaded."""
    try:
        from diffusers import AutoencoderKL, logging
    except ImportError as e:
        message = f"latents need diffusers: pip install diffusers safetensors ({e})"
        raise ValueError(message) from e
    logging.set_verbosity_error()  # the errors below say it in one line
    how = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        with warnings.catch_warnings(action="ignore"):
            vae, found = AutoencoderKL.from_pretrained(name, **how)
    except Exception as e:  # diffusers raises many kinds, with long texts
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(
            f"cannot load the autoencoder {name!r}, neither as a folder with config.json and "
            f"weights nor as a hub id (offline?): {reason}"
        ) from e
    if missing := found["missing_keys"]:
        lacks = f"lacks {len(missing)} weights, {min(missing)} among them"
        raise ValueError(f"the autoencoder {name!r} {lacks}")
    return vae


def check_fits(config, name, size, factor):
    """ValueError unless the autoencoder takes RGB images of this size and only scales latents."""
    if size % factor:
        what = f"a multiple of {factor}, the factor of the autoencoder {name!r}"
        raise ValueError(f"size {size} is not {what}")
    if config.in_channels != 3:
        takes = f"takes {config.in_channels} channels, images have 3"
        raise ValueError(f"the autoencoder {name!r} {takes}")
    if config.shift_factor or config.latents_mean or config.latents_std:
        shifts = "also shifts its latents; only a scaling is provided for"
        raise ValueError(f"the autoencoder {name!r} {shifts}")


def fingerprint(vae):
    """A digest of the encoder's weights; the decoder does not change the latents."""
    digest = hashlib.sha256()
    for key, weight in vae.state_dict().items():
        if not key.startswith(("decoder", "post_quant")):
            digest.update(weight.numpy())
    return digest.hexdigest()[:16]
