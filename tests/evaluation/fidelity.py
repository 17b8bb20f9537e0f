"""Makes torch-fidelity importable for the tests, from .venv/inception, where `make setup` puts it.

    python tests/evaluation/fidelity.py eval_min.py samples.npz reference.npz

runs a script with torch-fidelity importable. torch-fidelity imports torchvision, whose operators
need the torch that it was built for. The torchvision in .venv/inception lacks them; declarations of
two of them, which nothing calls, are enough to import it. An ordinary installation of both packages
needs none of this.
"""

import importlib.util
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "inception"
MISSING = None  # why it cannot be imported
if not (FOLDER / "torch_fidelity").is_dir():
    MISSING = "no torch-fidelity in .venv/inception (make setup)"
elif importlib.util.find_spec("tqdm") is None:
    MISSING = "torch-fidelity needs tqdm"
LIBRARIES = []  # kept, since a torch.library.Library takes its operators with it


@contextmanager
def importable():
    """torch_fidelity can be imported within this; at its end it and torchvision are unloaded."""
    if not LIBRARIES:
        LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        LIBRARIES[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(FOLDER))  # last: nothing in it may hide another package
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in list(sys.modules):
            if name.split(".")[0] in ("torch_fidelity", "torchvision"):
                del sys.modules[name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    with importable():
        runpy.run_path(sys.argv[0], run_name="__main__")
