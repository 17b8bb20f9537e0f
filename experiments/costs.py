"""What a step costs: time, memory and multiply-adds of the model and of every compared model.

    python -m experiments.costs --flops      multiply-adds beside the paper's GFLOPs
    python -m experiments.costs --step       a training step of S/2, with and without the fused op
    python -m experiments.costs --compile    a training step of S/2 and of Sana, eager and compiled
    python -m experiments.costs --memory     what a training step of S/2 keeps in memory
    python -m experiments.costs --sampling   sampling steps of S/2, without guidance and with it

All but --flops run on the CPU and take every --preset, those of baselines.py too. --compile counts
CPU seconds: with --threads 1 other work on the machine is left out. --no-fused puts the Python path
in place of the fused op.

ablate.py measures its models with `training_costs` and, for Fig. 1, `sampling_costs`:

Time: one process does a step of each model, then again of each; medians. Memory: the most that a
step needs beyond the weights and inputs that are there before it. On a CPU that is read from the
peak of a fresh process, because a process's peak never falls. A model that does not fit in memory
has neither figure; without Linux's /proc, models on a CPU have no figure of memory.

Imports train_min.py for its command line, dydilit.py, support/ and this folder.
"""

import argparse
import gc
import json
import math
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import dydilit
import train_min
from dydilit import Diffusion, distributed
from experiments import flops
from experiments.baselines import preset
from experiments.probe import replaced
from support.terminal import keep_memory
from support.timing import machine, seconds

ROOT = Path(__file__).parent.parent
PROC = Path("/proc/self")
GIB = 2**30
S2 = {  # the models of Fig. 1: arguments of train_min.parse
    "DiT": ["--preset=DiT-S/2"],
    "Sana": ["--preset=Sana-S/2"],
    "DyDi-LiT": ["--preset=S/2"],
}


def parse(argv):
    """(config, training) of arguments of train_min.py, with the presets of baselines.py."""
    config, training, _ = train_min.parse(argv, preset=preset)
    return config, training


# --------------------------------------------------------------------------------------------------
# One step.


def random_batch(config, batch, device):
    """Images, labels, timesteps and noise, as Diffusion.loss takes them."""
    side = config.input_size
    shape = (batch, config.in_channels, side, side)
    x, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    t = torch.arange(batch, device=device) * 999 // batch
    return x, y, t, noise


def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, fused=True)


def step_of(config, batch, device, train, bf16=False, compiled=False):
    """A function that does one step of `batch` images: of training, or one forward pass (sampling).

    bf16 is that of dydilit.Training. Sampling is always in float32, as train_min.py does it.
    compiled: by torch.compile, in the first step.
    """
    model = config.build().train(train).to(device)
    if compiled:
        model.compile(fullgraph=True)
    x, y, t, noise = random_batch(config, batch, device)
    optimizer = optimizer_of(model)
    diffusion = Diffusion()

    def training():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            mse, vb = diffusion.loss(model, x, y, t, noise)
        (mse + vb).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sampling():
        model(x, t, y)

    return training if train else sampling


def is_out_of_memory(error):
    """torch has a class for a GPU without memory; the CPU's allocator says it in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


# --------------------------------------------------------------------------------------------------
# Time.


def times_of(configs, batch, device, train, repeats, bf16=False):
    """{name: median seconds of a step} of {name: config}, measured in turn.

    One round to warm up, then `repeats` rounds of all models. Models that do not fit in memory
    together are measured one by one; a model that does not fit alone has None.
    """
    try:
        return times_in_turn(configs, batch, device, train, repeats, bf16)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    finally:  # free all of it, for the next measurement in this process or in another
        gc.collect()  # an optimizer refers to itself
        if device == "cuda":
            torch.cuda.empty_cache()
    if len(configs) == 1:
        return dict.fromkeys(configs)
    times = {}
    for name, config in configs.items():
        times |= times_of({name: config}, batch, device, train, repeats, bf16)
    return times


def times_in_turn(configs, batch, device, train, repeats, bf16):
    """A function of its own, so that an error leaves no model of it in memory."""
    steps = {}
    for name, config in configs.items():
        steps[name] = step_of(config, batch, device, train, bf16)
    times = {name: [] for name in steps}
    for _ in range(1 + repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return {name: statistics.median(rounds[1:]) for name, rounds in times.items()}


# --------------------------------------------------------------------------------------------------
# Memory.


def memory_of(argv, side, batch, train):
    """Peak MiB of the first step of train_min.py's model `argv` with inputs side x side.

    In a fresh process. inf where the step does not fit; nan where the platform reports no peak.
    """
    code = (
        "import sys; from experiments import costs; side, batch, train = sys.argv[1:4]; "
        "costs.print_memory(sys.argv[4:], int(side), int(batch), train == 'True')"
    )
    command = [sys.executable, "-c", code, str(side), str(batch), str(train), *argv]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:  # Linux promises more memory than it has, then kills
        return math.inf
    if done.returncode:
        raise OSError(f"measuring the memory of {argv[0]} failed:\n{done.stderr}")
    return float(done.stdout)


def print_memory(argv, side, batch, train):
    """`memory_of`, in this process; prints the number."""
    device = distributed()[2].type
    config, training = parse(argv)
    config = replace(config, input_size=side)
    try:
        print(peak_of(step_of(config, batch, device, train, training.bf16), device))
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        print(math.inf)


def peak_of(step, device):
    """MiB that step() needs at its peak beyond what is there before it.

    nan where the platform reports no peak.
    """
    peak = torch.cuda.max_memory_allocated if device == "cuda" else resident
    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            (PROC / "clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return math.nan
    before = peak()
    step()
    return (peak() - before) / 2**20


def resident():
    """Peak resident bytes of this process, as Linux counts them.

    (getrusage's would begin at the parent's peak.)
    """
    status = (PROC / "status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


# --------------------------------------------------------------------------------------------------
# For ablate.py.


def costs_of(models, configs, batch, device, train, repeats, bf16=False):
    """{model: [seconds, MiB]} of a step of {model: arguments}; None for a figure that is missing.

    Memory first: a model that does not fit is better found in a process that may be killed for it.
    """
    memory = {}
    for model, argv in models.items():
        memory[model] = memory_of(argv, configs[model].input_size, batch, train)
    fitting = {model: config for model, config in configs.items() if memory[model] != math.inf}
    times = times_of(fitting, batch, device, train, repeats, bf16)
    costs = {}
    for model, mib in memory.items():
        costs[model] = [times.get(model), mib if math.isfinite(mib) else None]
    return costs


def once(file, how, measure):
    """What measure() returned under the conditions `how`.

    Kept in `file` for the next call with the same conditions.
    """
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["how"] == how:
            return kept["measured"]
    measured = measure()
    file.write_text(json.dumps({"how": how, "measured": measured}))
    return measured


def training_costs(models, file, nproc=1, repeats=9):
    """Costs of a training step of {model: arguments of its run}, and under which conditions.

    Returns {model: [seconds, MiB]} and a text. A step has as many images as one of `nproc`
    processes takes at once; the communication between processes is not included.
    """
    device = distributed()[2].type
    configs, trainings = {}, []
    for model, argv in models.items():
        configs[model], training = parse(argv)
        trainings.append(training)
    training = trainings[0]
    batch = training.micro_batch or training.batch_size // nproc

    def measure():
        return costs_of(models, configs, batch, device, True, repeats, training.bf16)

    images = f"{batch} images"
    if batch < training.batch_size:
        images += f" (of {training.batch_size}: what a process takes at once)"
    dtype = "bfloat16 autocast" if training.bf16 else "float32"
    where = f"{images}, {dtype}, {machine(device)}, torch {torch.__version__}"
    how = {"where": where, "models": {model: str(config) for model, config in configs.items()}}
    return once(file, how, measure), where


def sampling_costs(resolutions, file):
    """Fig. 1: costs of a sampling step of one image, S/2 on latents, and under which conditions.

    Returns {model: [[pixels, seconds, MiB]]} and a text.
    """
    device = distributed()[2].type

    def measure():
        points = {model: [] for model in S2}
        for pixels in resolutions:
            configs = {}
            for model, argv in S2.items():
                configs[model] = replace(parse(argv)[0], input_size=pixels // 8)
            repeats = 5 if device == "cuda" or pixels <= 1024 else 1
            costs = costs_of(S2, configs, 1, device, False, repeats)
            for model in S2:
                points[model].append([pixels, *costs[model]])
        return points

    where = f"float32, {machine(device)}, torch {torch.__version__}"
    return once(file, {"where": where, "resolutions": resolutions}, measure), where


# --------------------------------------------------------------------------------------------------
# The command line.


def peak_gib():
    """Peak resident memory of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def saved_by(model, run):
    """run() and a Counter {innermost named part: bytes that it saved for the backward pass}.

    Named parts are the equations of dydilit.py and the modules of the network.
    """
    stack = ["rest"]  # the parts that are being computed
    seen = set()  # storages that are counted already
    saved = Counter()

    def named(name, function):
        def wrapped(*args, **kwargs):
            stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                stack.pop()

        return wrapped

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not tensor.is_leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved[stack[-1]] += storage.nbytes()
        return tensor

    def unpack(tensor):
        return tensor

    functions = {}
    for name in ("routed_projection", "measure", "difference", "linear_attention"):
        functions[dydilit, name] = named(f"{name}()", getattr(dydilit, name))
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("DyDiLA", "GLUMBConv", "Block", "DWC"):
            module.forward = named(f"{kind}, itself", module.forward)
    with replaced(functions), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return run(), saved


def print_saved(name, batch):
    """--memory: peak memory of one training step, and what holds it."""
    config = preset(name)
    model = config.build()
    images = random_batch(config, batch, "cpu")
    optimizer = optimizer_of(model)
    print_setup(name, config, batch)

    def loss():
        return sum(Diffusion().loss(model, *images)).mean()

    before = peak_gib()
    value, saved = saved_by(model, loss)
    forward = peak_gib()
    value.backward()
    optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    print("| peak resident | GiB |\n|---|---:|")
    print(f"| before the step (torch, {parameters / 1e6:.1f} M parameters) | {before:.2f} |")
    print(f"| after the forward pass | {forward:.2f} |")
    print(f"| after the whole step | {peak_gib():.2f} |\n")
    print("| saved for backward by | GiB | share |\n|---|---:|---:|")
    for part, n in saved.most_common():
        print(f"| {part} | {n / GIB:.2f} | {n / saved.total():.0%} |")


def print_setup(name, config, batch, dtype="float32"):
    tokens = (config.input_size // config.patch_size) ** 2
    print(f"{name}, {tokens} tokens, {batch} images, {dtype}\n")


def print_step(name, batch, repeats):
    """--step: time of a training step with and without the fused op, in turn, and where it goes."""
    config = preset(name)
    step = step_of(config, batch, "cpu", train=True)
    print_setup(name, config, batch)
    devices = {"Python path": (), "fused op": dydilit.FUSED_DEVICES}

    def step_with(path):
        with replaced({(dydilit, "FUSED_DEVICES"): devices[path]}):
            step()

    times = {path: [] for path in devices}
    for _ in range(repeats + 1):
        for path in devices:
            times[path].append(seconds(lambda path=path: step_with(path), "cpu"))
    times = {path: rounds[1:] for path, rounds in times.items()}  # the first is a warm-up
    print("| a training step | s: median (fastest) | ratio of medians |\n|---|---:|---:|")
    for path, t in times.items():
        ratio = statistics.median(times["Python path"]) / statistics.median(t)
        print(f"| {path} | {statistics.median(t):.3f} ({min(t):.3f}) | {ratio:.2f} |")

    with torch.profiler.profile() as profile:
        step_with("fused op")
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print("\n| operator, fused op | share of its time |\n|---|---:|")
    for e in events[:12]:
        print(f"| `{e.key}` | {e.self_cpu_time_total / total:.1%} |")


def print_compiled(name, batch, repeats):
    """--compile: CPU seconds of a training step of a preset and of Sana's, in turn."""
    models = {name: preset(name), f"Sana-{name}": preset(f"Sana-{name}")}
    ways = [(bf16, compiled) for bf16 in (False, True) for compiled in (False, True)]
    times = {}
    for config in models.values():
        for way in ways:
            times[config, way] = (step_of(config, batch, "cpu", True, *way), [])
    for _ in range(repeats + 2):
        for step, taken in times.values():
            began = time.process_time()
            step()
            taken.append(time.process_time() - began)
    print_setup(name, models[name], batch, "float32 and bfloat16 autocast")
    print("| a training step, CPU s: median (fastest) | eager | compiled | bf16 | bf16, compiled |")
    print("|---|---:|---:|---:|---:|")
    best = {}
    for model, config in models.items():
        taken = [times[config, way][1][2:] for way in ways]  # the first compiles, the second warms
        cells = [f"{statistics.median(t):.3f} ({min(t):.3f})" for t in taken]
        print(f"| {model} | {' | '.join(cells)} |")
        medians = [statistics.median(t) for t in taken]
        best[model] = min(medians[:2]), min(medians[2:])
    ratios = [a / b for a, b in zip(*best.values())]
    print(f"\nbest over best: float32 {ratios[0]:.2f}, bfloat16 {ratios[1]:.2f}")


def print_sampling(name, batch, steps=20):
    """--sampling: steps a second, and the share of the time that is not the network's."""
    config = preset(name)
    model = config.build().eval()
    print_setup(name, config, batch)
    spent = [0.0]  # seconds in the network

    def timed(x, t, y):
        began = time.perf_counter()
        out = model(x, t, y)
        spent[0] += time.perf_counter() - began
        return out

    timed.config = config
    labels = torch.arange(batch) % config.num_classes
    print("| guidance | steps/s | not the network |\n|---:|---:|---:|")
    for cfg in (1.0, 1.5, 1.0, 1.5):
        spent[0] = 0.0
        began = time.perf_counter()
        Diffusion(steps).sample(timed, labels, range(batch), seed=0, cfg=cfg)
        total = time.perf_counter() - began
        print(f"| {cfg} | {steps / total:.2f} | {1 - spent[0] / total:.1%} |")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--flops", action="store_true", help="multiply-adds and the paper's GFLOPs")
    what.add_argument("--step", action="store_true", help="time of a training step")
    what.add_argument("--compile", action="store_true", help="the same, compiled, beside Sana's")
    what.add_argument("--memory", action="store_true", help="memory of a training step")
    what.add_argument("--sampling", action="store_true", help="time of sampling")
    option = parser.add_argument
    option("--preset", default="S/2", help="default: %(default)s")
    option("--batch", type=int, help="images (default: 16; of --sampling 8, --compile 4)")
    option("--repeats", type=int, default=15, help="of --step, --compile (default: %(default)s)")
    option("--threads", type=int, help="CPU threads (default: torch's)")
    option("--no-fused", action="store_true", help="as if the fused op had not been built")
    args = parser.parse_args()
    if args.flops:
        print(flops.table())
        return
    try:
        preset(args.preset)
    except ValueError as e:
        parser.error(str(e))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.no_fused:
        dydilit.FUSED_DEVICES = ()
    elif not dydilit.FUSED_DEVICES:
        print("the fused op is not built: python setup.py build_ext --inplace", file=sys.stderr)
    print(f"{machine('cpu')}; torch {torch.__version__}")
    if args.memory:
        print_saved(args.preset, args.batch or 16)
        return
    keep_memory()  # as train_min.py does; page faults would fall on one path or the other by chance
    if args.compile:
        print_compiled(args.preset, args.batch or 4, args.repeats)
    elif args.sampling:
        print_sampling(args.preset, args.batch or 8)
    else:
        print_step(args.preset, args.batch or 16, args.repeats)


if __name__ == "__main__":
    main()
