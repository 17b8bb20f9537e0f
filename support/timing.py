"""Which machine this is, and how long a call takes on it.

For csrc/bench.py and experiments/costs.py. Imports torch only.
"""

import os
import platform
import time
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def seconds(run, device: str) -> float:
    """Wall-clock seconds of run() on a CPU; on a GPU the time between two of its events."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
