"""Speed of whole models on a GPU: DyDi-LiT beside DiT with flash attention, and Sana.

    python -m experiments.on_gpu        # a Markdown table; each row is printed when it is known

training    a step without data: loss, backward, AdamW
sampling    one evaluation of the network; a sample needs as many as its sampler has steps
compiled    torch.compile(model, fullgraph=True); CUDA graphs: with mode="reduce-overhead" too

The model runs under bfloat16 autocast; its weights are float32, its inputs random. A time is the
median of --repeats calls. The first call, which compiles, has a column of its own. GiB is the peak
of all that torch holds. The rows come in the order of their value, so that a run that is stopped
has the first of them; a model that fails, or does not fit, is one line of them.

For whoever has a GPU. Imports dydilit.py, support/ and the compared models of experiments/.
"""

import argparse
import gc
import math
import statistics
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dydilit import Diffusion
from experiments.baselines import preset
from experiments.costs import optimizer_of, random_batch
from support.timing import machine, seconds

MODES = {  # name: arguments of torch.compile
    "eager": None,
    "compiled": {"fullgraph": True},
    "CUDA graphs": {"fullgraph": True, "mode": "reduce-overhead"},
}
HEADER = """\
| | model | tokens | images | | ms | images/s | GiB | first call, s |
|---|---|---:|---:|---|---:|---:|---:|---:|"""


class Case(NamedTuple):
    """One row."""

    what: str  # training or sampling
    model: str  # a preset of experiments/baselines.py
    tokens: int
    images: int
    mode: str  # of MODES


def cases():
    """All of them, the most valuable first."""

    def of_all(what, size, tokens, images, mode):
        return [Case(what, name + size, tokens, images, mode) for name in ("", "DiT-", "Sana-")]

    rows = of_all("training", "S/2", 256, 64, "eager")
    rows += of_all("sampling", "S/2", 256, 1, "eager")
    rows += of_all("sampling", "S/2", 256, 64, "eager")
    rows += of_all("training", "S/2", 1024, 16, "eager")
    rows += of_all("training", "S/2", 4096, 4, "eager")
    rows += of_all("training", "B/2", 256, 64, "eager")
    rows += of_all("training", "L/2", 256, 64, "eager")
    rows += of_all("training", "S/2", 256, 64, "compiled")
    rows += of_all("sampling", "S/2", 256, 1, "CUDA graphs")
    rows += of_all("training", "S/2", 256, 256, "compiled")
    rows += of_all("sampling", "S/2", 256, 64, "CUDA graphs")
    for size, tokens, images in (("S/2", 4096, 4), ("S/2", 1024, 16), ("L/2", 256, 64)):
        rows += of_all("training", size, tokens, images, "compiled")
    return rows + of_all("training", "B/2", 256, 64, "compiled")


def call_of(case, device):
    """A function that does one step of the case."""
    config = preset(case.model)
    side = config.patch_size * math.isqrt(case.tokens)
    config = replace(config, input_size=side)
    with torch.device(device):  # draws the initial values there
        model = config.build().train(case.what == "training")
    options = MODES[case.mode]
    net = model if options is None else torch.compile(model, **options)
    x, y, t, noise = random_batch(config, case.images, device)
    diffusion = Diffusion()
    optimizer = optimizer_of(model)

    def training():
        with torch.autocast(device, torch.bfloat16):
            mse, vb = diffusion.loss(net, x, y, t, noise)
        (mse + vb).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sampling():
        if case.mode == "CUDA graphs":  # the last output is no longer needed
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            net(x, t, y)

    return training if case.what == "training" else sampling


def measured(case, device, repeats):
    """[ms, images/s, GiB, seconds of the first call], as text."""
    on_gpu = device == "cuda"
    # DiT's softmax attention by this kernel or not at all
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_gpu else nullcontext()
    with flash:
        call = call_of(case, device)
        first = seconds(call, device)
        for _ in range(2):  # CUDA graphs are recorded
            call()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        median = statistics.median(seconds(call, device) for _ in range(repeats))
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else "-"
    return [f"{1e3 * median:.2f}", f"{case.images / median:.0f}", gib, f"{first:.1f}"]


def row(case, device, repeats):
    """The case and its figures, or why it has none."""
    try:
        figures = measured(case, device, repeats)
    except Exception as e:  # of a compiler, it can be of any class
        why = f"{type(e).__name__}: {e}".strip().split("\n")[0][:100]
        figures = [f"failed: {why}".replace("|", "/"), "", "", ""]
    torch.compiler.reset()  # after eight compilations torch would silently run eagerly
    gc.collect()  # an optimizer refers to itself
    if device == "cuda":
        torch.cuda.empty_cache()
    return "".join(f"| {cell} " if cell else "| " for cell in [*map(str, case), *figures]) + "|"


def table(rows, device, repeats):
    print(f"{machine(device)}; torch {torch.__version__}, bfloat16 autocast\n\n{HEADER}")
    for case in rows:
        print(row(case, device, repeats), flush=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU")
    table(cases(), "cuda", args.repeats)


if __name__ == "__main__":
    main()
