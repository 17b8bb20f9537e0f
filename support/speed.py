"""How fast a run is: images a second, the share of the GPUs' peak (MFU), and a profile of steps.

For train_min.py. Imports torch only.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense products, 10^12 operations a second, as NVIDIA's data sheets print them (half of "with
# sparsity"): float32, TF32, bfloat16. A name is matched from its start; the first match counts.
PEAKS = {
    "A10G": (35.0, 35.0, 70.0),
    "A10": (31.2, 62.5, 125.0),
    "A100": (19.5, 156.0, 312.0),
    "A40": (37.4, 74.8, 149.7),
    "B200": (75.0, 1125.0, 2250.0),
    "GeForce RTX 3090": (35.6, 35.6, 71.0),
    "GeForce RTX 4090": (82.6, 82.6, 165.2),
    "H100 NVL": (60.0, 417.5, 835.5),
    "H100 PCIe": (51.0, 378.0, 756.0),
    "H100": (67.0, 494.7, 989.4),
    "H200": (67.0, 494.7, 989.4),
    "L40S": (91.6, 183.0, 362.0),
    "L4": (30.3, 60.0, 121.0),
}
SKIPPED = 10  # steps before a profile, in which the first compiles and caches fill


def peak_of(name: str, bf16: bool = False, tf32: bool = False) -> float | None:
    """Operations a second of a GPU, by torch's name for it; None for one that is not in PEAKS."""
    name = name.removeprefix("NVIDIA ")
    for start, (float32, reduced, bfloat16) in PEAKS.items():
        if f"{name} ".startswith((f"{start} ", f"{start}-")):
            return 1e12 * (bfloat16 if bf16 else reduced if tf32 else float32)
    return None


def flops_of(config) -> int:
    """Operations of the products of one training step of one image: twice its multiply-adds.

    The backward pass has two products for each of the forward pass.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        number = torch.zeros(1, dtype=torch.long)
        side = config.input_size
        config.build()(torch.zeros(1, config.in_channels, side, side), number, number)
    return 3 * counter.get_total_flops()


def mfu_of_an_image(config, training, device: torch.device, world: int) -> float:
    """The share of the peak of `world` such devices that one image a second takes; 0.0 if the peak
    is not known."""
    if device.type != "cuda":
        return 0.0
    peak = peak_of(torch.cuda.get_device_name(device), training.bf16, training.tf32)
    return flops_of(config) / (peak * world) if peak else 0.0


def in_words(images_per_s: float, mfu: float) -> str:
    """"213 images/s, 31 % of peak"; without the second half for mfu 0.0."""
    share = f", {images_per_s * mfu:.0%} of peak" if mfu else ""
    return f"{images_per_s:.3g} images/s{share}"


@contextmanager
def profiled(steps: int, path: Path):
    """A function to call after each step. The steps after the first SKIPPED ones, `steps` of them,
    become a trace at `path`, for https://ui.perfetto.dev; none for 0 steps."""
    if not steps:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)

    def write(profile):
        profile.export_chrome_trace(str(path))

    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
