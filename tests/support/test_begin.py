"""support.begin(): how OpenMP's threads wait in a script; a user's own choice stands."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

from experiments import busy

SPIN = "GOMP_SPINCOUNT = "


def spin_count(script, **chosen):
    """What OpenMP's runtime says it has read in the process of `script --help`."""
    environment = {k: v for k, v in os.environ.items() if k not in busy.SET}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | chosen
    run = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, env=environment,
                         check=True, capture_output=True, text=True)
    lines = [line for line in run.stderr.splitlines() if SPIN in line]
    if not lines:
        pytest.skip("this torch does not use GNU's OpenMP")
    return lines[0].partition(SPIN)[2].strip("'")


@pytest.mark.parametrize("script", [["train_min.py"], ["sample_min.py"],
                                    ["-m", "experiments.train"]])
def test_threads_of_a_script_spin_briefly(script):
    assert spin_count(script) == "1000"


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_the_user_has_set_wins(chosen):
    expected = {"GOMP_SPINCOUNT": "77", "OMP_WAIT_POLICY": "0"}
    assert spin_count(["train_min.py"], **chosen) == expected[next(iter(chosen))]


def test_every_way_to_wait_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(busy, "OTHERS", (1,))
    monkeypatch.setattr(busy, "WAYS", {"OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}})
    busy.main(["--repeats", "1", "--seconds", "0.01"])
    title, row = capsys.readouterr().out.splitlines()
    assert "digits" in title and "1 busy" in title
    speeds = [float(word) for word in row.split()[1:]]
    assert len(speeds) == 1 and speeds[0] > 0
