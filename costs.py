"""What a step costs, for the table and Fig. 1 of ablate.py: time of all models in turn, memory of each by itself.

Time: one process does a step of each model, then again of each; medians. Memory: the most that a step needs beyond the
weights and the inputs that are there before it; on a CPU by the peak of a fresh process, as the peak never falls.
"""

import json
import os
import re
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


def step_of(config, batch, device, train):
    """A function that does one step: of training with a batch, or of sampling, which is one forward pass of it."""
    model, side = config.build().train(train).to(device), config.input_size
    x, noise = (torch.randn(batch, config.in_channels, side, side, device=device) for _ in range(2))
    y, t = torch.zeros(batch, dtype=torch.long, device=device), torch.arange(batch, device=device) * 999 // batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    diffusion = Diffusion()

    def training():
        sum(diffusion.loss(model, x, y, t, noise)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sampling(): model(x, t, y)

    return training if train else sampling


def times_of(configs, batch, device, train, repeats):
    """{name: median seconds of a step}: a round to warm up, then `repeats` rounds of all, on the same machine."""
    steps = {name: step_of(config, batch, device, train) for name, config in configs.items()}
    rounds = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(1 + repeats)][1:]
    return {name: statistics.median(times[name] for times in rounds) for name in steps}


def memory_of(argv, side, batch, train):
    """Peak MiB of the first step of train_min.py's model `argv`, its input so wide, in a fresh process."""
    code = "import sys, costs; costs.print_memory(sys.argv[4:], *map(int, sys.argv[1:3]), sys.argv[3] == 'True')"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, (side, batch, train)), *argv]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode: raise OSError(f"measuring the memory of {argv[0]} failed:\n{done.stderr}")
    return float(done.stdout)


def print_memory(argv, side, batch, train):
    device = distributed()[2].type
    step = step_of(replace(train_min.parse(argv)[0], input_size=side), batch, device, train)
    peak = torch.cuda.max_memory_allocated if device == "cuda" else resident
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    else: Path("/proc/self/clear_refs").write_text("5")  # the same for resident memory
    before = peak()
    step()
    print((peak() - before) / 2**20)


def resident():
    """Peak resident bytes of this process, as Linux counts them. (getrusage's would begin at the parent's.)"""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def once(file, how, measure):
    """What `measure` returned under the conditions `how`; kept in `file` for the next time that they are the same."""
    if file.exists() and (kept := json.loads(file.read_text()))["how"] == how: return kept["measured"]
    kept = {"how": how, "measured": measure()}
    file.write_text(json.dumps(kept))
    return kept["measured"]


def training_costs(models, file, repeats=9):
    """{model: [seconds, MiB] of a training step} of {model: arguments of its run}, and in words of what and where."""
    device, parsed = distributed()[2].type, {model: train_min.parse(argv)[:2] for model, argv in models.items()}
    configs = {model: config for model, (config, _) in parsed.items()}
    training = next(iter(parsed.values()))[1]
    batch = training.micro_batch or training.batch_size

    def measure():
        times = times_of(configs, batch, device, True, repeats)
        return {model: [times[model], memory_of(argv, configs[model].input_size, batch, True)]
                for model, argv in models.items()}

    where = f"{batch} images, {machine(device)}, torch {torch.__version__}"
    how = {"where": where, "models": {model: str(config) for model, config in configs.items()}}
    return once(file, how, measure), where


def sampling_costs(resolutions, file):
    """Fig. 1: {model: [[pixels, seconds, MiB] of a sampling step of one image]}, S/2 on latents; and where it was."""
    device = distributed()[2].type

    def measure():
        points = {model: [] for model in S2}
        for pixels in resolutions:
            configs = {m: replace(train_min.parse(argv)[0], input_size=pixels // 8) for m, argv in S2.items()}
            times = times_of(configs, 1, device, False, 5 if device == "cuda" or pixels <= 1024 else 1)
            for model, argv in S2.items():
                points[model].append([pixels, times[model], memory_of(argv, pixels // 8, 1, False)])
        return points

    where = f"{machine(device)}, torch {torch.__version__}"
    return once(file, {"where": where, "resolutions": resolutions}, measure), where
