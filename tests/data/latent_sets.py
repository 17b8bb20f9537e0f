"""What the tests of latents share: sizes, prepare.py in this process, stops at any moment of it."""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import util
from runs import ROOT, contents, load_prepare

folder = load_prepare("imagefolder")
import latents  # noqa: E402  (load_prepare has put its folder on the path)
import rows  # noqa: E402

SCRIPT = ROOT / "data" / "imagefolder" / "prepare.py"
SIZE, BATCH, C = 16, 4, 2  # latents are C x 8 x 8
N = 23  # images: a last block of three
save_vae = functools.partial(util.save_vae, latent_channels=C)


def prepare(root, out, vae, **options):
    """Prepare `root` into `out` in this process, and return the bytes of `out`."""
    folder.prepare(root, SIZE, out, **{"held_out": 0.2, "vae": vae, "batch": BATCH, **options})
    return contents(out)


def arguments(root, out, vae, workers=1):
    """The same for a process."""
    how = [f"--size={SIZE}", "--held-out=0.2", f"--batch={BATCH}", f"--workers={workers}"]
    return [root, *how, "--vae", vae, "--out", out]


def files_in_order(root, held_out=0.2):
    """The files of `root` in the order of the rows."""
    _, files, labels, _ = folder.find(root)
    return [files[i] for i in folder.shuffled(labels, folder.n_held_out(held_out, len(files)))]


def small(images, root):
    """Copy six of the images, two classes, into `root`: two blocks."""
    for name in ("a/00.png", "a/03.png", "a/06.png", "b/01.png", "b/04.png", "b/07.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, root / name)
    return root


def encode_directly(vae, x):
    """uint8 (n, 3, H, W) -> means and standard deviations (n, 2C, h, w), one image at a time."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    encoded = []
    with torch.no_grad():
        for image in x:
            pixels = torch.tensor(image[None] / 127.5 - 1, dtype=torch.float32)
            posterior = model.encode(pixels).latent_dist
            encoded.append(torch.cat([posterior.mean, posterior.std], 1))
    return torch.cat(encoded).numpy()


class Killed(BaseException):
    pass


def stop_at(monkeypatch, event):
    """Raise Killed before the event-th change on the disk; None stops nowhere.

    Returns two lists that grow: the names of the changes, and the files that are encoded.
    """
    seen, encoded, call = [], [], latents.Encoder.__call__

    def stopping(real, what):
        def action(*args, **options):
            seen.append(what)
            if len(seen) == event:
                raise Killed
            return real(*args, **options)

        return action

    def encode(self, x, files):
        encoded.extend(files.values())
        return call(self, x, files)

    monkeypatch.setattr(latents.Encoder, "__call__", encode)
    monkeypatch.setattr(rows.Rows, "put", stopping(rows.Rows.put, "put"))
    monkeypatch.setattr(os, "replace", stopping(os.replace, "replace"))
    monkeypatch.setattr(os, "fsync", stopping(os.fsync, "fsync"))
    monkeypatch.setattr(np, "save", stopping(np.save, "save"))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink, "unlink"))
    return seen, encoded


def missing(out):
    """How many rows of an unfinished set are still to be done."""
    return (np.load(out / rows.DONE)["size"] == 0).sum()
