"""The paper's ablations and comparisons, re-run on the data at hand: one table, and the figures.

    python ablate.py                            every rung on the digits, three seeds, with the recipe of train_min.py
    python ablate.py --preset-size photos --models DiT ladder-0-sana DyDi-LiT no-normalize
    python ablate.py --preset-size S/2 --data data/NAME --out out/NAME --nproc 8 --bf16

Every run is one of train_min.py, with the same data, seeds and budget, in a folder of its own, OUT/<model>/<seed>;
flags that are not listed here are train_min.py's. Finished runs are not repeated, an interrupted one goes on where it
stopped. Once all are there, results.json and ablate.md (the tables) are written, costs measured and the figures drawn.
Of latents no samples are made unless --samples asks for them: eval_min.py has to compare those.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import figures
import train_min
from baselines import VARIANTS
from costs import sampling_costs, training_costs
from dydilit import PRESETS, Data, distributed
from eval_min import evaluate
from load import load_model
from probe import DIFFERENCES, mean_lambda, routers, smoothness
from sample_min import run

# DyDi-LiT, and DyDi-LiT with one choice of ours (NOTES.md) taken otherwise: a variant of baselines.py or none, flags.
ALTERNATIVES = {
    "DyDi-LiT": ("", []), "no-normalize": ("", ["--no-normalize"]), "no-router-grad": ("", ["--no-router-grad"]),
    "batch-norm": ("ladder-5-dwc-", ["--batch-norm"]),
}
REDUCED = ["DiT", *(name for name in VARIANTS if name.startswith("ladder") and name != "ladder-5-dwc"), "DyDi-LiT",
           "map-wise", "rising-lambda", "no-normalize", "no-router-grad", "batch-norm"]
ONE = "--one-run"  # then train_min.py's arguments: a run. torchrun reads them too, and takes --run for one of its own
COLUMNS = {"held_out_loss": "held-out loss", "held_out_mse": "noise error", "class_accuracy": "class accuracy",
           "frechet_distance": "Frechet distance", "kid": "KID", "precision": "precision", "recall": "recall"}
PERCENT = ("class_accuracy", "precision", "recall")
SIZES = ("depth", "heads", "shared_heads", "routed_heads")  # of a variant; its name means the rest


def arguments(model, size):
    """What makes train_min.py train `model`, a name of ALTERNATIVES or VARIANTS, at the size of a preset."""
    if model not in ALTERNATIVES and model not in VARIANTS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join([*ALTERNATIVES, *VARIANTS])}")
    if size not in PRESETS: raise ValueError(f"unknown preset {size!r}; known: {', '.join(PRESETS)}")
    variant, flags = ALTERNATIVES.get(model, (f"{model}-", []))
    return [f"--preset={variant}{size}", *flags]


def changed(model, size, config):
    """The fields of `config` that are not what the name `model` means; those of the plain preset it does not mean."""
    plain, named = vars(PRESETS[size]), vars(train_min.parse(arguments(model, size))[0])
    return [k for k, value in named.items() if k not in SIZES and plain.get(k) != value != getattr(config, k)]


def plan(args, rest):
    """{(model, seed): the arguments of its run}, tried on train_min.py's parser: a wrong one is an error now."""
    given = {a.partition("=")[0] for a in rest}
    for flag, ours in (("--preset", "--preset-size and --models"), ("--seed", "--seeds")):
        if flag in given: raise ValueError(f"ablate.py has no {flag}: {ours} instead")
    rest, shared, configs = [a for a in rest if a != "--resume"], {}, {}  # every run has that anyway
    for model in dict.fromkeys(args.models):
        begin = [*arguments(model, args.size), *([f"--data={args.data}"] if args.data else [])]
        config, training, _ = train_min.parse([*begin, *rest])
        if fields := changed(model, args.size, config):
            raise ValueError(f"{model} would not be what its name says: flags change its {', '.join(fields)}")
        if same := [other for other in configs if configs[other] == config]:
            raise ValueError(f"with these flags {same[0]} and {model} are one and the same model")
        configs[model], share = config, training.batch_size // args.nproc
        if training.batch_size % args.nproc or share % (training.micro_batch or share):
            raise ValueError(f"batch_size {training.batch_size} for --nproc {args.nproc}: not divisible, or not by "
                             f"micro_batch {training.micro_batch}")
        every, meta = max(1, training.steps // 100), Path(training.data, "meta.json")
        latents = meta.exists() and "scaling" in json.loads(meta.read_text())
        if latents and "--samples" not in given and given & {"--cfg", "--sampling-steps"}:
            raise ValueError("--cfg and --sampling-steps do nothing without --samples, where the data are latents")
        shared[model] = [*begin, f"--log-every={every}", f"--eval-every={5 * every}",
                         f"--ckpt-every={min(10 * every, training.ckpt_every)}", *["--samples=0"] * latents, *rest,
                         "--resume"]
    return {(model, seed): [*shared[model], f"--seed={seed}", f"--out={Path(args.out, model, str(seed))}"]
            for seed in range(args.seeds) for model in args.models}  # by seeds: what is there early compares all models


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


def work(argv):
    """One run, in a process of its own (or several): train, sample, evaluate; result.json in its folder is the outcome.

    A run that diverges is a result too. A run whose parent was killed may be alive still: the lock waits for its end.
    """
    (rank, _, device), out = distributed(), folder_of(argv)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        if rank == 0: fcntl.flock(lock, fcntl.LOCK_EX)
        result = {"arguments": argv}
        try:
            training, npz = train_min.train_and_sample(argv)
        except FloatingPointError as e:
            result["diverged"] = str(e)
        if rank == 0:
            if "diverged" not in result: result |= measured(out, training.data, npz, device)
            (out / "result.json.tmp").write_text(json.dumps(result))
            os.replace(out / "result.json.tmp", out / "result.json")


def measured(out, data_dir, npz, device):
    """What the table and the figures need to know of a finished run, from its log, its weights and its samples."""
    (model, ckpt), log = load_model(out / "ckpt.pt"), read_log(out)
    result = {"blocks": model.config.depth, "parameters": sum(p.numel() for p in model.parameters()),
              "held_out_loss": log[-1].get("held_out_loss"), "held_out_mse": log[-1].get("held_out_mse"),
              "usage_entropy": log[-1].get("usage_entropy", {})}
    if held_out := Data(data_dir, model.config).held_out(64):
        model.to(device)
        result["smoothness"] = smoothness(model, held_out)
        if {*DIFFERENCES, "map_difference"} & routers(model.blocks[0].attn).keys():
            result["lambda"] = mean_lambda(model, held_out)
    if npz and "scaling" in ckpt["meta"]:  # eval_min.py has better figures than those of pixels
        result["not_evaluated"] = "Samples of latents are not evaluated here: eval_min.py compares a run's samples.npz."
    elif npz:
        try:
            with np.load(npz) as made: result |= evaluate(made["arr_0"], made["labels"], data_dir)
        except ValueError as e: result["not_evaluated"] = str(e)  # images too large
    return result


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def folder_of(argv):
    return Path(next(a for a in argv if a.startswith("--out=")).removeprefix("--out="))


def result_of(argv):
    """result.json of a run; None if it is not there yet. ValueError if the folder's run had other arguments."""
    file = folder_of(argv) / "result.json"
    if not file.exists(): return None
    result = json.loads(file.read_text())
    now, then = ([a for a in z if not a.startswith("--out=")] for z in (argv, result["arguments"]))  # it may have moved
    if now != then:
        raise ValueError(f"{file.parent} holds another run, {shlex.join(then)}, not {shlex.join(now)}; choose another "
                         "--out")
    return result


def complete(runs, jobs, nproc):
    """Bring every run to its end, `jobs` at a time: {(model, seed): result}. OSError if some of them failed."""
    todo, active, failed = [key for key in runs if result_of(runs[key]) is None], {}, []
    total, began = len(todo), time.time()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // (jobs * nproc)))} | os.environ
    try:
        while todo or active:
            while todo and len(active) < jobs:
                key = todo.pop(0)
                folder_of(runs[key]).mkdir(parents=True, exist_ok=True)
                with open(folder_of(runs[key]) / "output.txt", "a") as output:
                    active[key] = subprocess.Popen([sys.executable, *torchrun, __file__, ONE, *runs[key]],
                                                   env=threads, stdout=output, stderr=output)
            for key in [key for key, process in active.items() if process.poll() is not None]:
                code, done = active.pop(key).returncode, total - len(todo) - len(active)
                if code: failed.append(f"{folder_of(runs[key])} (exit status {code}; output.txt says why)")
                said = f"exit status {code}" if code else outcome(result_of(runs[key]))
                print(f"{time.time() - began:6.0f} s  {done}/{total}  {key[0]}, seed {key[1]}: {said}", flush=True)
            time.sleep(0.1)
    finally:  # of an interruption: they save, and end
        for process in active.values(): process.terminate()
        for process in active.values(): process.wait()
    if failed: raise OSError(f"not finished: {', '.join(failed)}")
    return {key: result_of(argv) for key, argv in runs.items()}


def outcome(result):
    if "diverged" in result: return result["diverged"]
    return "done" if result["held_out_loss"] is None else f"held-out loss {result['held_out_loss']:.4f}"


# ---------------------------------------------------------------------------------------------------------------------
# The table.


def spread(values, percent=False):
    """Numbers, one a seed -> "mean ± standard deviation", with four digits of the mean; "-" where there are none."""
    values = [100 * v if percent else v for v in values if v is not None]
    if not values: return "-"
    shown = [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    digits = 3 - math.floor(math.log10(abs(shown[0]) or 1))
    how = ".1f" if percent else ".1e" if digits < -3 else f".{min(5, max(0, digits))}f"
    return " ± ".join(f"{z:{how}}" for z in shown) + (" %" if percent else "")


def markdown(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]))


def quality(of, costs):
    """The table of {model: {seed: result}} and {model: [seconds, MiB]}, what there is of these. The runs that diverged
    are counted, no more."""
    base = {seed: r["held_out_loss"] for seed, r in of.get("DyDi-LiT", {}).items() if r.get("held_out_loss")}
    rows = [["model", "blocks", "parameters", *COLUMNS.values(), "loss minus DyDi-LiT's", "step, ms", "memory, MiB"]]
    for model, runs in of.items():
        fine = {seed: r for seed, r in runs.items() if "diverged" not in r}
        lost, some = len(runs) - len(fine), next(iter(fine.values()), None)
        gaps = [r["held_out_loss"] - base[seed] for seed, r in fine.items() if seed in base and model != "DyDi-LiT"]
        seconds, mib = costs.get(model, (None, None))
        rows.append([model + (f" ({lost} diverged)" if lost else ""),
                     *([str(some["blocks"]), f"{some['parameters'] / 1e6:.2f} M"] if some else "--"),
                     *(spread([r.get(key) for r in fine.values()], key in PERCENT) for key in COLUMNS), spread(gaps),
                     "-" if seconds is None else f"{1e3 * seconds:.0f}", "-" if mib is None else f"{mib:.0f}"])
    halves = {key: f"{key.removesuffix('_distance')}_halves" for key in COLUMNS}  # as eval_min.evaluate names them
    if real := next((r for runs in of.values() for r in runs.values() if "frechet_halves" in r), None):
        rows.append(["half of the real images", "", "", *(spread([real.get(halves[key])], key in PERCENT)
                                                          for key in COLUMNS), "", "", ""])
    return markdown(rows)


def behaviour(of):
    """A table of what the attentions do (probe.py): the mean over the blocks, of {model: {seed: result}}."""
    routed = {"projectors": "projector", "kernels": "kernel", "lambdas": "difference"}
    rows = [["model", "row entropy", "row variance", *(f"usage entropy, {kind}" for kind in routed), "mean lambda"]]
    for model, runs in of.items():
        fine = [r for r in runs.values() if "diverged" not in r]
        smooth = [[statistics.fmean(x) for x in zip(*r["smoothness"])] for r in fine if "smoothness" in r]
        uses = [[[h for name, row in r["usage_entropy"].items() if name.endswith(ends) for h in row] for r in fine]
                for ends in routed.values()]
        rows.append([model, *(spread([row[i] for row in smooth]) for i in (0, 1)),
                     *(spread([statistics.fmean(row) for row in use if row]) for use in uses),
                     spread([statistics.fmean(r["lambda"]) for r in fine if "lambda" in r])])
    return markdown(rows)


def report(args, runs, results, command):
    """Of finished runs: writes results.json, ablate.md (the tables) and the PNGs; returns the tables.

    What took days to compute is written first; the costs and the figures, where more can go wrong, are added to it.
    """
    out, (_, training, settings) = Path(args.out), train_min.parse(next(iter(runs.values())))
    of = {model: {seed: results[model, seed] for seed in range(args.seeds)} for model in args.models}
    (out / "results.json").write_text(json.dumps(of, indent=1))
    name = json.loads(Path(training.data, "meta.json").read_text())["name"]
    samples = (f"{settings.samples} samples, {settings.sampling_steps} steps, guidance {settings.cfg}"
               if settings.samples else "no samples")

    def write(costs, where, drawn=()):
        text = [f"`{command}`",
                f"{name}: {training.steps} steps of {training.batch_size} images, {args.seeds} seeds; {samples}. "
                f"Mean ± standard deviation over the seeds. A training step: {where}.",
                quality(of, costs), behaviour(of),
                *sorted({r["not_evaluated"] for r in results.values() if "not_evaluated" in r})]
        (out / "ablate.md").write_text("\n\n".join([*text, *(f"![{file}]({file})" for file in drawn)]) + "\n")
        return "\n\n".join(text)

    write({}, "not measured")
    first = {model: argv for (model, seed), argv in runs.items() if seed == 0}
    costs, where = training_costs(first, out / "costs.json", args.nproc)
    write(costs, where)
    points, there = sampling_costs(args.resolutions, out / "resolutions.json") if args.resolutions else ({}, "")
    folders = {key: folder_of(argv) for key, argv in runs.items() if "diverged" not in results[key]}
    return write(costs, where, figures.draw(out, of, folders, training.data, points, there))


def main(argv):
    if argv[:1] == [ONE]: return work(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--preset-size", dest="size", metavar="SIZE", default="digits",
                        help="a preset of dydilit.py (default %(default)s)")
    parser.add_argument("--models", nargs="+", default=REDUCED, metavar="MODEL",
                        help=f"of {', '.join([*ALTERNATIVES, *VARIANTS])} (default: {' '.join(REDUCED)})")
    parser.add_argument("--data", help="prepared folder (default: that of the preset's recipe)")
    parser.add_argument("--out", help="folder of everything (default: out/ablate-SIZE)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
                        help="runs at a time; they share the CPU's threads (default: 1 on a GPU, else one a thread)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run, by torchrun (default %(default)s)")
    parser.add_argument("--resolutions", type=int, nargs="*", default=[256, 512, 1024], metavar="PIXELS",
                        help="of Fig. 1; none: no such figure (default 256 512 1024)")
    args, rest = parser.parse_known_args(argv)
    args.out = args.out or f"out/ablate-{args.size.replace('/', '-')}"
    if min(args.seeds, args.jobs, args.nproc) < 1: raise ValueError("--seeds, --jobs and --nproc must be at least 1")
    if any(p < 16 or p % 16 for p in args.resolutions):  # 8 a latent, 2 latents a patch
        raise ValueError("--resolutions must be multiples of 16")
    runs = plan(args, rest)
    train_min.fit_to_data(*train_min.parse(next(iter(runs.values())))[:2], None)  # before two runs do it at once
    began = time.time()
    results = complete(runs, args.jobs, args.nproc)
    print(report(args, runs, results, shlex.join(["python", "ablate.py", *argv])))
    print(f"\nwrote {args.out}/: ablate.md results.json and the figures; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `complete`, which ends what it has started
    run(lambda: main(sys.argv[1:]), ValueError, OSError, FloatingPointError)
