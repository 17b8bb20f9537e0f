"""A comparison of two tiny models by ablate.py, as the tests start it."""

import sys
from types import SimpleNamespace

from runs import ROOT

from experiments import ablate

TINY = [
    "--hidden-size=16",
    "--n-kernels=3",
    "--n-lambdas=3",
    "--depth=2",
    "--batch-size=8",
    "--steps=40",
    "--warmup=2",
    "--samples=40",
    "--sampling-steps=3",
]
TWO = ["--models", "ladder-0-sana", "DyDi-LiT", "--seeds=2", "--resolutions"]
MODELS = ("ladder-0-sana", "DyDi-LiT")


class Here:
    """subprocess.Popen for a run of ablate.py: it runs at once, in this process."""

    def __init__(self, command, cwd, env, stdout, stderr):
        assert command[:4] == [sys.executable, "-m", "experiments.ablate", "--one-run"]
        assert cwd == ROOT and env["OMP_NUM_THREADS"]
        assert stdout is stderr and stdout.writable()
        self.returncode = None
        try:
            ablate.main(command[3:])
            self.code = 0
        except SystemExit as e:
            self.code = e.code

    def poll(self):
        self.returncode = self.code
        return self.code


def runs_started_by(popen, patch):
    """Give ablate.py, and nobody else, `popen` for subprocess.Popen: scikit-learn starts lscpu."""
    patch.setattr(ablate, "subprocess", SimpleNamespace(Popen=popen))


def memory_of(argv, side, batch, train):
    """costs.memory_of without a process."""
    return 12.0
