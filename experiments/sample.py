"""Sample from a compared model, or from DiT's own weights.

    python -m experiments.sample out/DiT-digits/ckpt.pt
    python -m experiments.sample DiT-XL-2-256x256.pt --classes 207 --cfg 4

sample_min.py, and all of its options, with the models that experiments/pretrained.py can load.
For readers who want to look at a compared model.
"""

import argparse
import functools
import sys

import sample_min
from experiments import pretrained
from support.terminal import run


def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--heads", type=int)
    args, rest = parser.parse_known_args(argv)
    if "-h" in rest or "--help" in rest:
        print("--heads N: attention heads of DiT weights whose width is none of DiT's own four")
        print("All other options are those of sample_min.py:\n")
    sample_min.main(rest, load=functools.partial(pretrained.load, heads=args.heads))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), ValueError, OSError)
