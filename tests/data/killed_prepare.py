"""What test_latents_resume.py starts: killed_prepare.py BLOCKS RANK ARGUMENTS

It runs data/imagefolder/prepare.py with the arguments. Rank RANK is killed when it has written the
rows of so many blocks, before it marks the last of them as done.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "data" / "imagefolder"
sys.path.insert(0, str(FOLDER))

import rows  # noqa: E402

blocks, rank, *arguments = sys.argv[1:]
synced, sync = [], rows.Rows.sync


def count(self):
    sync(self)
    synced.append(self)
    if len(synced) == int(blocks) and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), signal.SIGKILL)


rows.Rows.sync = count
script = str(FOLDER / "prepare.py")
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
