"""Latents of an autoencoder, for `prepare.py --vae`."""
import hashlib
import os
import warnings

import numpy as np
import torch

class Encoder:
    """images -> means and standard deviations of their posterior, by the diffusers.AutoencoderKL `name`, a hub id or a
    folder; in float32, on the GPU if there is one.

    shape: of the latents of one image; about: what training and decoding must know of them; weights: a fingerprint.
    ValueError if there is no such autoencoder, or if it does not fit the images.
    """
    def __init__(self, name, size, flip):
        try:
            from diffusers import AutoencoderKL, logging
        except ImportError as e:
            raise ValueError(f"latents need diffusers: pip install diffusers safetensors ({e})") from e
        logging.set_verbosity_error()           # what matters is said below, in one line
        try:
            with warnings.catch_warnings(action="ignore"):
                vae, found = AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, low_cpu_mem_usage=False,
                                                           output_loading_info=True)
        except Exception as e:                  # of many kinds, and pages long
            reason = str(e).strip().partition("\n")[0]
            raise ValueError(f"cannot load the autoencoder {name!r}, neither as a folder with config.json and weights "
                             f"nor as a hub id (offline?): {reason}") from e
        if missing := found["missing_keys"]:
            raise ValueError(f"the autoencoder {name!r} lacks {len(missing)} weights, {min(missing)} among them")
        config, factor = vae.config, 2 ** (len(vae.config.block_out_channels) - 1)
        if size % factor:
            raise ValueError(f"size {size} is not a multiple of {factor}, the factor of the autoencoder {name!r}")
        if config.in_channels != 3:
            raise ValueError(f"the autoencoder {name!r} takes {config.in_channels} channels, images have 3")
        if config.shift_factor or config.latents_mean or config.latents_std:
            raise ValueError(f"the autoencoder {name!r} also shifts its latents; only a scaling is provided for")
        self.flip, self.shape = flip, (1 + flip, 2 * config.latent_channels, size // factor, size // factor)
        self.about = {"vae": name, "scaling": config.scaling_factor}
        digest = hashlib.sha256()
        for key, weight in vae.state_dict().items():
            if not key.startswith(("decoder", "post_quant")): digest.update(weight.numpy())
        self.weights = digest.hexdigest()[:16]
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus) if gpus else torch.device("cpu")
        if not gpus: torch.set_num_threads(1)   # their number decides the rounding; torchrun makes use of more
        self.vae = vae.to(self.device)

    def __call__(self, images, files):
        """uint8 (B, 3, size, size) -> float16 (B, F, 2C, h, w): F = 0 as they are, F = 1 (with flip) mirrored; C means,
        then C standard deviations. ValueError if those of one of `files`, {index: file}, are not finite, or for want of
        memory."""
        x = torch.from_numpy(np.ascontiguousarray(images))  # another layout of the memory would be another rounding
        x = x.to(self.device).float() / 127.5 - 1
        views, latents = (x, x.flip(-1))[: 1 + self.flip], []
        # float32 and nothing less: in 16 bits some autoencoders give NaN
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False), \
             torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for view in views:                  # one after the other: half the memory
                try: posterior = self.vae.encode(view).latent_dist
                except torch.OutOfMemoryError as e:
                    raise ValueError(f"the GPU cannot take {len(x)} images at once; --batch says how many") from e
                latents.append(torch.cat([posterior.mean, posterior.std], dim=1))
        latents = torch.stack(latents, dim=1).half().cpu().numpy()
        for i, file in files.items():
            if not np.isfinite(latents[i]).all():
                raise ValueError(f"the latents of {file} are not finite")
        return latents
