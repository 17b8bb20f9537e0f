"""What the scripts share and no reader of the paper needs. Imports dydilit.py and libraries."""

import os
import signal


def begin():
    """A script's first call, before it imports torch.

    Ctrl-C during the imports, which take seconds, ends without a traceback. OpenMP's threads wait
    for each other by spinning; beside another busy process that costs most of the speed, so they
    spin briefly, unless the user has said how they shall wait (experiments/busy.py measures it).
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
