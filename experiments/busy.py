"""How fast a training step is while other processes keep the cores busy, by OpenMP's way to wait.

    python -m experiments.busy                     the digits
    python -m experiments.busy --preset mnist      more tokens than channels

Images/s with 0, 1 and 2 other processes that never rest, medians of --repeats interleaved runs of
--seconds each. support.begin() sets the winner for every script. For users of laptops.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = {  # the environment of each
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
OTHERS = (0, 1, 2)
SET = {name for way in WAYS.values() for name in way}


def images_per_second(preset, duration):
    """Training steps of a preset's model and batch, on random images, for `duration` seconds."""
    from experiments import costs  # it imports torch, which the process that waits does not need
    from support.terminal import keep_memory

    keep_memory()
    config, training = costs.parse(["--preset", preset])
    step = costs.step_of(config, training.batch_size, "cpu", train=True)
    step()  # it is not counted
    steps, began = 0, time.time()
    while steps < 1 or time.time() - began < duration:
        step()
        steps += 1
    return steps * training.batch_size / (time.time() - began)


def one_run(way, others, preset, duration):
    """images_per_second in a process of its own, beside `others` busy ones."""
    environment = {k: v for k, v in os.environ.items() if k not in SET} | WAYS[way]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        command = [sys.executable, "-m", "experiments.busy", "--preset", preset]
        command += ["--seconds", str(duration), "--measure"]
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return float(run.stdout)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        return print(images_per_second(options.preset, options.seconds))
    speeds = {(way, others): [] for way in WAYS for others in OTHERS}
    for _ in range(options.repeats):
        for way, others in speeds:
            speeds[way, others].append(one_run(way, others, options.preset, options.seconds))
    print(f"{options.preset}, images/s beside", *(f"{n} busy" for n in OTHERS), sep="  ")
    for way in WAYS:
        print(f"{way:24}", *(f"{statistics.median(speeds[way, n]):8.1f}" for n in OTHERS))


if __name__ == "__main__":
    main(sys.argv[1:])
