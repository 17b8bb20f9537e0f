"""Which attention runs here, and whether it is right: one line for the start of a run.

`python -m dydilit` prints it for every device and the usual dtypes.
"""

import math
import sys

import torch

import dydilit

SLACK = {torch.float64: 1e-9, torch.float32: 3e-6}  # 16 bits: 1e-4; the tests' tolerances


def example(N, D, device, dtype):
    """The nine tensors, the same on every machine. No route is a close call: in every router the
    best logit leads by 0.07 at least, so a product in TF32 takes the same routes."""
    shapes = [(2, N, D)] * 5 + [(3,), (3,), (4, D, 3), (2, 2 * D, 3)]
    counts = (torch.arange(1, 1 + math.prod(shape)).double() for shape in shapes)
    waves = [torch.sin((278 + i) * n.square()) for i, n in enumerate(counts)]
    waves = [1.4 * w for w in waves[:5]] + [2 + waves[5], 0.1 + 0.05 * waves[6], *waves[7:]]
    return [w.view(shape).to(device, dtype) for w, shape in zip(waves, shapes)]


def out_and_gradients(tensors, backend):
    """([out, nine gradients], whether the op computed them)"""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        out = dydilit.dydila_attention(*leaves, backend=backend)
        results = [out, *torch.autograd.grad(out, leaves, tensors[4])]
    return [x.detach().double().cpu() for x in results], "dydilit" in out.grad_fn.name()


def compare(device, dtype):
    """(whether backend="auto" takes the op, its largest difference from the Python path, whether
    it is within the tolerance). Differences are relative to the largest entry of each result."""
    slack = SLACK.get(dtype, 1e-4)
    if device.type == "cuda" and dtype == torch.bfloat16:
        slack = 0.1  # the op rounds more there (csrc/README.md, "Precision")
    differences, right = [], True
    for N, D in ((5, 16), (24, 8)):  # both orders of the products
        tensors = example(N, D, device, dtype)
        exact, _ = out_and_gradients([x.double().cpu() for x in tensors], "reference")
        python, _ = out_and_gradients(tensors, "reference")
        auto, by_op = out_and_gradients(tensors, "auto")
        for x, p, a in zip(exact, python, auto):
            size = x.abs().max()
            differences.append((a - p).abs().max() / size)
            # `all` of comparisons with NaN is False
            right &= bool((a - x).abs().max() <= 2 * (p - x).abs().max() + slack * size)
    return by_op, torch.stack(differences).max().item(), right


def check_fused(device="cpu", dtype=torch.float32):
    """One line: which path backend="auto" takes on this device in this dtype, and its largest
    difference from the Python path, forward and backward, on a small input.

    If they disagree beyond the tolerance of the tests, or the op fails, the Python path is taken on
    this device from now on, and a warning on stderr says so. It takes a fraction of a second.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu" and dydilit.BUILD:
        name += " " + dydilit.BUILD["isa"]
    where = f"{name}, {str(dtype).removeprefix('torch.')}"
    if not dydilit.FUSED_DEVICES:
        return f"attention: Python path ({dydilit.NO_OP or 'no extension built'}), {where}"
    if device.type not in dydilit.FUSED_DEVICES:
        return f"attention: Python path (the extension has no kernels for it), {where}"
    try:
        by_op, difference, right = compare(device, dtype)
        wrong = "" if right else f"the fused op differs from it by {difference:.0e}"
    except RuntimeError as e:  # such as a GPU that no kernel was built for
        wrong = "the fused op fails: " + str(e).partition("\n")[0]
    if wrong:
        others = (kind for kind in dydilit.FUSED_DEVICES if kind != device.type)
        dydilit.FUSED_DEVICES = tuple(others)
        print(f"dydilit: warning: {wrong}; the Python path instead, {where}", file=sys.stderr)
        return f"attention: Python path ({wrong}), {where}"
    if not by_op:
        return f"attention: Python path (the fused op does not take this), {where}"
    return f"attention: fused op, {where}, largest difference {difference:.0e} of the Python path"


def main():
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            print(check_fused(device, dtype))
