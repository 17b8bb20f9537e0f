"""Train a compared model, or DyDi-LiT with its routers watched; then sample from it.

    torchrun -m experiments.train --preset DiT-digits
    torchrun -m experiments.train --preset ladder-2-measure-S/2 --data data/NAME --out out/NAME

train_min.py with the presets of baselines.py. Beside train_min.py's own figures, log.jsonl has the
usage entropy of every router at each evaluation (probe.py). For readers who repeat a comparison.
"""

import sys

import support

if __name__ == "__main__":
    support.begin()

import train_min
from experiments import baselines, probe
from support.terminal import run

OPTIONS = {"preset": baselines.preset, "on_eval": probe.usage_at_evaluation}


def train_and_sample(argv):
    """train_min.train_and_sample of one run: (Training, path of its samples or None)."""
    return train_min.train_and_sample(argv, command="-m experiments.train", **OPTIONS)


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(f"--preset takes these before a hyphen too: {', '.join(baselines.VARIANTS)}")
        print("All other options are those of train_min.py:\n")
    train_min.main(argv, command="-m experiments.train", **OPTIONS)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), ValueError, OSError, FloatingPointError)
