"""What a step costs, for the table and Fig. 1 of ablate.py: time of all models in turn, memory of each by itself.

Time: one process does a step of each model, then again of each; medians. Memory: the most that a step needs beyond the
weights and the inputs that are there before it; on a CPU by the peak of a fresh process, as the peak never falls. What
does not fit in memory has neither, and without Linux's /proc a CPU has no figure of memory: None.
"""

import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import train_min
from bench import machine, seconds
from dydilit import Diffusion, distributed

S2 = {"DiT": ["--preset=DiT-S/2"], "Sana": ["--preset=Sana-S/2"], "DyDi-LiT": ["--preset=S/2"]}  # the models of Fig. 1
PROC = Path("/proc/self")


def step_of(config, batch, device, train, bf16=False):
    """A function that does one step: of training with a batch, or of sampling, which is one forward pass of it.

    bf16 is that of dydilit.Training. Sampling does not know it: train_min.py makes its samples in float32.
    """
    model, side = config.build().train(train).to(device), config.input_size
    x, noise = (torch.randn(batch, config.in_channels, side, side, device=device) for _ in range(2))
    y, t = torch.zeros(batch, dtype=torch.long, device=device), torch.arange(batch, device=device) * 999 // batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    diffusion = Diffusion()

    def training():
        with torch.autocast(device, torch.bfloat16, enabled=bf16): mse, vb = diffusion.loss(model, x, y, t, noise)
        (mse + vb).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sampling(): model(x, t, y)

    return training if train else sampling


def no_room(error):
    """Is it one of memory? torch has a class for a GPU's, for the CPU's only words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def times_of(configs, batch, device, train, repeats, bf16=False):
    """{name: median seconds of a step}: a round to warm up, then `repeats` rounds of all, on the same machine.

    Where there is no room for all of them at once they are taken one by one; None is one without room for itself.
    """
    def in_turn():  # a function, so that an error leaves nothing of it behind
        steps = {name: step_of(config, batch, device, train, bf16) for name, config in configs.items()}
        rounds = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(1 + repeats)][1:]
        return {name: statistics.median(times[name] for times in rounds) for name in steps}

    try: return in_turn()
    except (RuntimeError, MemoryError) as e:
        if not no_room(e): raise
    finally:  # what comes next is to find all of the memory, in this process or in another
        gc.collect()  # an optimizer refers to itself
        if device == "cuda": torch.cuda.empty_cache()
    if len(configs) == 1: return dict.fromkeys(configs)
    return {k: times_of({k: config}, batch, device, train, repeats, bf16)[k] for k, config in configs.items()}


def memory_of(argv, side, batch, train):
    """Peak MiB of the first step of train_min.py's model `argv`, its input so wide, in a fresh process.

    inf where it does not fit; nan where nobody counts.
    """
    code = "import sys, costs; costs.print_memory(sys.argv[4:], *map(int, sys.argv[1:3]), sys.argv[3] == 'True')"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, (side, batch, train)), *argv]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL: return math.inf  # Linux promises more memory than it has
    if done.returncode: raise OSError(f"measuring the memory of {argv[0]} failed:\n{done.stderr}")
    return float(done.stdout)


def print_memory(argv, side, batch, train):
    device, (config, training, _) = distributed()[2].type, train_min.parse(argv)
    try: print(peak_of(step_of(replace(config, input_size=side), batch, device, train, training.bf16), device))
    except (RuntimeError, MemoryError) as e:
        if not no_room(e): raise
        print(math.inf)


def peak_of(step, device):
    peak = torch.cuda.max_memory_allocated if device == "cuda" else resident
    try:
        if device == "cuda": torch.cuda.reset_peak_memory_stats()
        else: (PROC / "clear_refs").write_text("5")  # the same for resident memory
    except OSError: return math.nan
    before = peak()
    step()
    return (peak() - before) / 2**20


def resident():
    """Peak resident bytes of this process, as Linux counts them. (getrusage's would begin at the parent's.)"""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text())[1])


def costs_of(models, configs, batch, device, train, repeats, bf16=False):
    """{model: [seconds, MiB]} of a step of {model: its arguments}, None for what there is not.

    Memory first: what does not fit is better found out by a process that may be killed for it.
    """
    memory = {model: memory_of(argv, configs[model].input_size, batch, train) for model, argv in models.items()}
    fitting = {model: config for model, config in configs.items() if memory[model] != math.inf}
    times = times_of(fitting, batch, device, train, repeats, bf16)
    return {model: [times.get(model), mib if math.isfinite(mib) else None] for model, mib in memory.items()}


def once(file, how, measure):
    """What `measure` returned under the conditions `how`; kept in `file` for the next time that they are the same."""
    if file.exists() and (kept := json.loads(file.read_text()))["how"] == how: return kept["measured"]
    kept = {"how": how, "measured": measure()}
    file.write_text(json.dumps(kept))
    return kept["measured"]


def training_costs(models, file, nproc=1, repeats=9):
    """{model: [seconds, MiB] of a training step} of {model: arguments of its run}, and in words of what and where.

    A step with as many images as one of `nproc` processes takes at once, and without what they tell each other.
    """
    device, parsed = distributed()[2].type, {model: train_min.parse(argv)[:2] for model, argv in models.items()}
    configs = {model: config for model, (config, _) in parsed.items()}
    training = next(iter(parsed.values()))[1]
    batch = training.micro_batch or training.batch_size // nproc
    def measure(): return costs_of(models, configs, batch, device, True, repeats, training.bf16)

    images = f"{batch} images" + f" (of {training.batch_size}: what a process takes at once)" * (
        batch < training.batch_size)
    dtype = "bfloat16 autocast" if training.bf16 else "float32"
    where = f"{images}, {dtype}, {machine(device)}, torch {torch.__version__}"
    how = {"where": where, "models": {model: str(config) for model, config in configs.items()}}
    return once(file, how, measure), where


def sampling_costs(resolutions, file):
    """Fig. 1: {model: [[pixels, seconds, MiB] of a sampling step of one image]}, S/2 on latents; and where it was."""
    device = distributed()[2].type

    def measure():
        points = {model: [] for model in S2}
        for pixels in resolutions:
            configs = {m: replace(train_min.parse(argv)[0], input_size=pixels // 8) for m, argv in S2.items()}
            costs = costs_of(S2, configs, 1, device, False, 5 if device == "cuda" or pixels <= 1024 else 1)
            for model in S2: points[model].append([pixels, *costs[model]])
        return points

    where = f"float32, {machine(device)}, torch {torch.__version__}"
    return once(file, {"where": where, "resolutions": resolutions}, measure), where
