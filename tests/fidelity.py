"""torch-fidelity for the tests, from .venv/inception, where `make setup` puts it with a torchvision without operators.

    python tests/fidelity.py eval_min.py samples.npz reference.npz      the script, with torch-fidelity importable

torch-fidelity imports torchvision, whose operators need the torch it was built for; importing it takes at least the
declarations of two, which nobody calls here. Only the tests need this, not whoever has both installed properly.
"""

import importlib.util
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "inception"
MISSING = ("no torch-fidelity in .venv/inception (make setup)" if not (FOLDER / "torch_fidelity").is_dir() else
           "torch-fidelity needs tqdm" if importlib.util.find_spec("tqdm") is None else None)
LIBRARIES = []  # a library's operators go when it does


@contextmanager
def importable():
    """torch_fidelity can be imported; afterwards neither it nor that torchvision is left for other tests to find."""
    if not LIBRARIES:
        LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        LIBRARIES[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(FOLDER))  # last: nothing in it may hide another package
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.split(".")[0] in ("torch_fidelity", "torchvision")]:
            del sys.modules[name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    with importable():
        runpy.run_path(sys.argv[0], run_name="__main__")
