"""Where a training step's memory goes.

    python bench.py --memory                 S/2, 256 tokens, 16 images, float32

"Saved" is what autograd keeps from the forward pass for the backward pass, counted storage by storage and credited to
the function or module that made autograd keep it.
"""

import argparse
import platform
import resource
from collections import Counter

import torch

import dydilit
from dydilit import PRESETS, Diffusion, DyDiLiT

GIB = 2**30


def peak():
    """Peak resident memory of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def saved_by(model, run):
    """Counter of bytes saved for backward while run() is computed: {innermost named part: bytes}."""
    stack, seen, saved = ["rest"], set(), Counter()

    def named(name, function):
        def wrapped(*args, **kwargs):
            stack.append(name)
            try: return function(*args, **kwargs)
            finally: stack.pop()
        return wrapped

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not tensor.is_leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved[stack[-1]] += storage.nbytes()
        return tensor

    parts = ("routed_projection", "measure", "difference", "linear_attention")
    originals = {name: getattr(dydilit, name) for name in parts}
    for name in parts: setattr(dydilit, name, named(f"{name}()", originals[name]))
    for module in model.modules():
        if type(module).__name__ in ("DyDiLA", "GLUMBConv", "Block", "DWC"):
            module.forward = named(f"{type(module).__name__}, itself", module.forward)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return run(), saved
    finally:
        for name in parts: setattr(dydilit, name, originals[name])


def memory(name, batch):
    config = PRESETS[name]
    model, size = DyDiLiT(config), (batch, config.in_channels, config.input_size, config.input_size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, noise, y, t = torch.randn(size), torch.randn(size), torch.arange(batch), torch.arange(batch) * 60 % 1000
    before = peak()
    loss, saved = saved_by(model, lambda: sum(Diffusion().loss(model, x, y, t, noise)).mean())
    forward = peak()
    loss.backward()
    optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, {(config.input_size // config.patch_size) ** 2} tokens, {batch} images, float32, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print("| peak resident | GiB |\n|---|---:|")
    print(f"| before the step (torch, {parameters / 1e6:.1f} M parameters) | {before:.2f} |")
    print(f"| after the forward pass | {forward:.2f} |\n| after the whole step | {peak():.2f} |\n")
    print("| saved for backward by | GiB | share |\n|---|---:|---:|")
    for part, n in saved.most_common(): print(f"| {part} | {n / GIB:.2f} | {n / saved.total():.0%} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory of one training step and what holds it")
    parser.add_argument("--preset", default="S/2", choices=PRESETS, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    args = parser.parse_args()
    if not args.memory:
        parser.error("nothing to do: --memory")
    memory(args.preset, args.batch)


if __name__ == "__main__":
    main()
