"""The paper's ablations and comparisons, trained on the data at hand: tables and figures.

    python -m experiments.ablate      every row on the digits, three seeds, train_min.py's recipe
    python -m experiments.ablate --preset-size photos --models DiT ladder-0-sana:1 DyDi-LiT
    python -m experiments.ablate --preset-size S/2 --data data/NAME --out out/NAME --nproc 8 --bf16

Every run is one of experiments/train.py with the same data, seeds and budget, in a folder of its
own, OUT/<model>/<seed>. NAME:N in --models is N seeds of that model. Flags that are not listed here
are train_min.py's. A finished run is not repeated; an interrupted run continues where it stopped.
After the last run results.json and ablate.md (the tables) are written, costs measured and the
figures drawn.

Of latents no samples are made unless --samples asks for them: eval_min.py has to compare those.

For readers who check the paper's claims. Imports the scripts at the root and this folder.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import train_min
from dydilit import PRESETS, Data, distributed
from eval_min import evaluate
from experiments import classifier, figures, pretrained, tables
from experiments.baselines import LADDER, VARIANTS, preset
from experiments.costs import sampling_costs, training_costs
from experiments.probe import DIFFERENCES, mean_lambda, routers, smoothness
from experiments.train import train_and_sample
from support.lock import one_writer
from support.processes import join
from support.terminal import run

ROOT = Path(__file__).parent.parent

# DyDi-LiT, and DyDi-LiT with one choice of ours (NOTES.md) taken otherwise; last, Sana-1.5, and DiT
# with DyDi-LiT's feed-forward, so that the attentions alone differ. The prefix of the preset (a
# variant of baselines.py or none), and flags.
ALTERNATIVES = {
    "DyDi-LiT": ("", []),
    "no-normalize": ("", ["--no-normalize"]),
    "no-router-grad": ("", ["--no-router-grad"]),
    "router-score": ("ladder-5-dwc-", ["--router-rule=score"]),
    "router-dense": ("ladder-5-dwc-", ["--router-rule=dense"]),
    "batch-norm": ("ladder-5-dwc-", ["--batch-norm"]),
    "Sana-1.5": ("Sana-", ["--qk-norm"]),
    "DiT-glumbconv": ("DiT-", ["--feed-forward=glumbconv"]),
}
RUNGS = [name for name in LADDER if name.startswith("ladder") and name != "ladder-5-dwc"]
DEFAULT = [  # ladder-5-dwc is DyDi-LiT
    "DiT",
    *RUNGS,
    "DyDi-LiT",
    "map-wise",
    "rising-lambda",
    "no-normalize",
    "no-router-grad",
    "batch-norm",
]
ONE = "--one-run"  # then the arguments of one run. (torchrun would take --run for one of its own.)
SIZES = ("depth", "heads", "shared_heads", "routed_heads")  # a variant's name leaves them open


def parse(argv):
    """(config, training, settings of the samples) of the arguments of one run."""
    return train_min.parse(argv, preset=preset)


# --------------------------------------------------------------------------------------------------
# Which runs.


def arguments(model, size):
    """The arguments that make experiments/train.py train `model` at the size of a preset.

    model is a name of ALTERNATIVES or VARIANTS; ValueError lists them.
    """
    if model not in ALTERNATIVES and model not in VARIANTS:
        known = ", ".join([*ALTERNATIVES, *VARIANTS])
        raise ValueError(f"unknown model {model!r}; known: {known}")
    if size not in PRESETS:
        raise ValueError(f"unknown preset {size!r}; known: {', '.join(PRESETS)}")
    prefix, flags = ALTERNATIVES.get(model, (f"{model}-", []))
    return [f"--preset={prefix}{size}", *flags]


def contradicted(model, size, config):
    """The fields that the name `model` sets and that `config` has otherwise.

    A field that the plain preset has like the named model is not set by the name.
    """
    plain = vars(PRESETS[size])
    named = vars(parse(arguments(model, size))[0])
    fields = []
    for field, value in named.items():
        set_by_name = field not in SIZES and plain.get(field) != value
        if set_by_name and getattr(config, field) != value:
            fields.append(field)
    return fields


def counted(names, seeds):
    """NAME or NAME:N of --models -> {NAME: N}, N = seeds where it is not given.

    ValueError for an N that is no positive number.
    """
    counts = {}
    for name in names:
        model, colon, count = name.partition(":")
        if colon and not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"--models {name}: the number of seeds must be at least 1")
        counts[model] = int(count) if colon else seeds
    return counts


def plan(args, rest):
    """{(model, seed): arguments of its run}; `rest` are flags of train_min.py.

    Each is parsed once, so that a wrong argument is an error before anything runs. ValueError also
    for a model that the flags turn into another one.
    """
    given = {a.partition("=")[0] for a in rest}
    for flag, ours in (("--preset", "--preset-size and --models"), ("--seed", "--seeds")):
        if flag in given:
            raise ValueError(f"ablate.py has no {flag}: {ours} instead")
    rest = [a for a in rest if a != "--resume"]  # every run has it anyway
    counts = counted(args.models, args.seeds)
    shared = {}  # {model: arguments that all seeds share}
    configs = {}
    for model in counts:
        first = arguments(model, args.size)
        if args.data:
            first.append(f"--data={args.data}")
        config, training, _ = parse([*first, *rest])
        check_model(model, args.size, config, configs)
        check_batch(training, args.nproc)
        configs[model] = config
        every = max(1, training.steps // 100)
        defaults = [
            f"--log-every={every}",
            f"--eval-every={5 * every}",
            f"--ckpt-every={min(10 * every, training.ckpt_every)}",
        ]
        if is_latents(training.data):
            check_latents(given)
            defaults.append("--samples=0")
        shared[model] = [*first, *defaults, *rest, "--resume"]
    runs = {}
    for seed in range(max(counts.values())):  # seed by seed: the first results compare all models
        for model, count in counts.items():
            if seed < count:
                out = Path(args.out, model, str(seed))
                runs[model, seed] = [*shared[model], f"--seed={seed}", f"--out={out}"]
    return runs


def check_model(model, size, config, others):
    """ValueError if `config` is not what the name says, or is one of `others` {name: config}."""
    if fields := contradicted(model, size, config):
        raise ValueError(
            f"{model} would not be what its name says: flags change its {', '.join(fields)}"
        )
    for other in others:
        if others[other] == config:
            raise ValueError(f"with these flags {other} and {model} are one and the same model")


def check_batch(training, nproc):
    """ValueError if the batch cannot be divided among the processes and into micro-batches."""
    share = training.batch_size // nproc
    micro = training.micro_batch or share
    if training.batch_size % nproc or share % micro:
        raise ValueError(
            f"batch_size {training.batch_size} for --nproc {nproc}: not divisible, or not by "
            f"micro_batch {training.micro_batch}"
        )


def is_latents(data_dir):
    meta = Path(data_dir, "meta.json")
    return meta.exists() and "scaling" in json.loads(meta.read_text())


def check_latents(given):
    """ValueError for flags of samples that are not made."""
    if "--samples" not in given and given & {"--cfg", "--sampling-steps"}:
        raise ValueError(
            "--cfg and --sampling-steps do nothing without --samples, where the data are latents"
        )


# --------------------------------------------------------------------------------------------------
# Runs.


def work(argv):
    """One run, in a process of its own (or several): train, sample, evaluate, write result.json.

    Divergence is a result too. The lock waits for the end of an earlier process of the same run,
    which may outlive a parent that was killed.
    """
    join()
    rank, _, device = distributed()
    out = folder_of(argv)
    out.mkdir(parents=True, exist_ok=True)
    with one_writer(out, wait=True):
        result = {"arguments": argv}
        try:
            training, npz = train_and_sample(argv)
        except FloatingPointError as e:
            result["diverged"] = str(e)
        if rank > 0:
            return
        if "diverged" not in result:
            result |= measured(out, training.data, npz, device)
        beside = out / "result.json.tmp"
        beside.write_text(json.dumps(result))
        os.replace(beside, out / "result.json")


def measured(out, data_dir, npz, device):
    """The figures of a finished run for the tables, from its log, its weights and its samples."""
    model = pretrained.load(out / "ckpt.pt")
    last = read_log(out)[-1]
    result = {
        "blocks": model.config.depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": last.get("held_out_loss"),
        "held_out_mse": last.get("held_out_mse"),
        "usage_entropy": last.get("usage_entropy", {}),
    }
    held_out = Data(data_dir, model.config).held_out(64)
    if held_out:
        model.to(device)
        result["smoothness"] = smoothness(model, held_out)
        if {*DIFFERENCES, "map_difference"} & routers(model.blocks[0].attn).keys():
            result["lambda"] = mean_lambda(model, held_out)
    if npz is None:
        return result
    if "scaling" in model.meta:
        result["not_evaluated"] = (
            "Samples of latents are not evaluated here: eval_min.py compares a run's samples.npz."
        )
        return result
    try:
        with np.load(npz) as made:
            result |= evaluate(made["arr_0"], made["labels"], data_dir)
            result |= classifier.judge(made["arr_0"], made["labels"], data_dir)
    except ValueError as e:  # the images are too large for figures of pixels
        result["not_evaluated"] = str(e)
    return result


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def folder_of(argv):
    for a in argv:
        if a.startswith("--out="):
            return Path(a.removeprefix("--out="))
    raise ValueError("a run needs --out=FOLDER")


def result_of(argv):
    """result.json of a run; None if the run has not finished.

    ValueError if the folder's run had other arguments. The folder itself may have moved.
    """
    file = folder_of(argv) / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    now, then = without_out(argv), without_out(result["arguments"])
    if now != then:
        raise ValueError(
            f"{file.parent} holds another run, {shlex.join(then)}, not {shlex.join(now)}; choose "
            "another --out"
        )
    return result


def without_out(argv):
    return [a for a in argv if not a.startswith("--out=")]


def start(argv, jobs, nproc):
    """The process of one run. Its output goes to output.txt in the run's folder."""
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command += ["-m", "experiments.ablate", ONE, *argv]
    threads = max(1, os.cpu_count() // (jobs * nproc))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    folder_of(argv).mkdir(parents=True, exist_ok=True)
    with open(folder_of(argv) / "output.txt", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def complete(runs, jobs, nproc):
    """Finish all runs {(model, seed): arguments}, `jobs` at a time: {(model, seed): result}.

    OSError names the runs that failed, after the others have finished.
    """
    todo = [key for key in runs if result_of(runs[key]) is None]
    total = len(todo)
    active = {}  # {(model, seed): process}
    failed = []
    began = time.time()
    try:
        while todo or active:
            while todo and len(active) < jobs:
                key = todo.pop(0)
                active[key] = start(runs[key], jobs, nproc)
            ended = [key for key, process in active.items() if process.poll() is not None]
            for key in ended:
                code = active.pop(key).returncode
                if code:
                    outcome = f"exit status {code}"
                    failed.append(f"{folder_of(runs[key])} ({outcome}; output.txt says why)")
                else:
                    outcome = outcome_of(result_of(runs[key]))
                done = total - len(todo) - len(active)
                model, seed = key
                elapsed = f"{time.time() - began:6.0f} s"
                print(f"{elapsed}  {done}/{total}  {model}, seed {seed}: {outcome}", flush=True)
            time.sleep(0.1)
    finally:  # an interruption: the runs save a checkpoint and end
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
    if failed:
        raise OSError(f"not finished: {', '.join(failed)}")
    return {key: result_of(argv) for key, argv in runs.items()}


def outcome_of(result):
    """One line of a finished run."""
    if "diverged" in result:
        return result["diverged"]
    if result["held_out_loss"] is None:
        return "done"
    return f"held-out loss {result['held_out_loss']:.4f}"


# --------------------------------------------------------------------------------------------------
# The report.


def report(args, runs, results, command):
    """Write results.json, ablate.md (the tables) and the PNGs of finished runs; return the tables.

    The runs' own figures, which may have taken days, are written first. Costs and figures are added
    when they are there, so an error in them costs no result.
    """
    out = Path(args.out)
    _, training, settings = parse(next(iter(runs.values())))
    by_model = {}  # {model: {seed: result}}
    for (model, seed), result in results.items():
        by_model.setdefault(model, {})[seed] = result
    (out / "results.json").write_text(json.dumps(by_model, indent=1))
    name = json.loads(Path(training.data, "meta.json").read_text())["name"]
    samples = "no samples"
    if settings.samples:
        samples = (
            f"{settings.samples} samples, {settings.sampling_steps} steps, guidance {settings.cfg}"
        )
    not_evaluated = sorted({r["not_evaluated"] for r in results.values() if "not_evaluated" in r})
    judge = ""
    for result in results.values():
        if accuracy := result.get("classifier_accuracy"):  # the same in every run
            judge = (
                " Features are those of classifier.py, which recognises "
                f"{100 * accuracy:.1f} % of the held-out images."
            )

    def write(costs, where, drawn=()):
        conditions = (
            f"{name}: {training.steps} steps of {training.batch_size} images; {samples}. "
            f"Mean ± standard deviation over the seeds.{judge} A training step: {where}."
        )
        shown = [
            tables.quality(by_model, costs),
            tables.differences(by_model),
            tables.behaviour(by_model),
        ]
        text = [f"`{command}`", conditions, *filter(None, shown), *not_evaluated]
        pictures = [f"![{file}]({file})" for file in drawn]
        (out / "ablate.md").write_text("\n\n".join([*text, *pictures]) + "\n")
        return "\n\n".join(text)

    write({}, "not measured")
    first_seed = {model: argv for (model, seed), argv in runs.items() if seed == 0}
    costs, where = training_costs(first_seed, out / "costs.json", args.nproc)
    write(costs, where)
    points, there = {}, ""
    if args.resolutions:
        points, there = sampling_costs(args.resolutions, out / "resolutions.json")
    folders = {}
    for key, argv in runs.items():
        if "diverged" not in results[key]:
            folders[key] = folder_of(argv)
    drawn = figures.draw(out, by_model, folders, training.data, points, there)
    return write(costs, where, drawn)


# --------------------------------------------------------------------------------------------------
# The command line.


def parse_command(argv):
    """(options of this file, flags of train_min.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option(
        "--preset-size",
        dest="size",
        metavar="SIZE",
        default="digits",
        help="a preset of dydilit.py (default: %(default)s)",
    )
    option(
        "--models",
        nargs="+",
        default=DEFAULT,
        metavar="MODEL[:SEEDS]",
        help=f"of {', '.join([*ALTERNATIVES, *VARIANTS])} (default: {' '.join(DEFAULT)})",
    )
    option("--data", help="prepared folder (default: that of the preset's recipe)")
    option("--out", help="folder of all runs (default: out/ablate-SIZE)")
    option("--seeds", type=int, default=3, help="runs of each model (default: %(default)s)")
    option(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time; they share the CPU (default: 1 on a GPU, else one for each thread)",
    )
    option("--nproc", type=int, default=1, help="processes of a run (default: %(default)s)")
    option(
        "--resolutions",
        type=int,
        nargs="*",
        default=[256, 512, 1024],
        metavar="PIXELS",
        help="of Fig. 1; without a number, no such figure (default: 256 512 1024)",
    )
    args, rest = parser.parse_known_args(argv)
    args.out = args.out or f"out/ablate-{args.size.replace('/', '-')}"
    if min(args.seeds, args.jobs, args.nproc) < 1:
        raise ValueError("--seeds, --jobs and --nproc must be at least 1")
    if any(p < 16 or p % 16 for p in args.resolutions):  # 8 pixels a latent, 2 latents a patch
        raise ValueError("--resolutions must be multiples of 16")
    return args, rest


def main(argv):
    if argv[:1] == [ONE]:
        work(argv[1:])
        return
    args, rest = parse_command(argv)
    runs = plan(args, rest)
    config, training, _ = parse(next(iter(runs.values())))
    train_min.fit_to_data(config, training, None)  # prepares the data before two runs do it at once
    began = time.time()
    results = complete(runs, args.jobs, args.nproc)
    command = shlex.join(["python", "-m", "experiments.ablate", *argv])
    print(report(args, runs, results, command))
    minutes = (time.time() - began) / 60
    print(f"\nwrote {args.out}/: ablate.md results.json and the figures; {minutes:.1f} minutes")


if __name__ == "__main__":
    # SystemExit passes through `complete`, which ends the runs that it has started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(lambda: main(sys.argv[1:]), ValueError, OSError, FloatingPointError)
