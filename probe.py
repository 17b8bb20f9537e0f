"""What the attention of a model does inside: the routes that its tokens take, and its attention matrix.

    with watched(model, matrices=True) as seen:
        model(x, t, y)
    seen[0]["routes"]["q_projector"]      # block 0: a list with one index (B, N) for every pass
    seen[0]["attention"]                  # and a list of (matrix (B, heads, N, M), values (B, heads, N or M, d))

Everything is read off the functions that compute it, on the Python path: nothing is computed in a second way. Any model
of dydilit.py and baselines.py will do. train_min.py logs `usage_at_evaluation`; ablate.py and figures.py use the rest.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import baselines
import dydilit
from baselines import GatedLinear, MoH, scan_order
from dydilit import Diffusion

KERNELS, DIFFERENCES = ("q_kernel", "k_kernel", "q_prime_kernel", "k_prime_kernel"), ("q_difference", "k_difference")


def routers(attn):
    """{name: router (D, n)} of one attention, in the order of the equations: (1), (6), (7). {} for one without."""
    found = {name: getattr(attn, f"{name}_router", None) for name in ("q_projector", "k_projector")}
    found |= zip(KERNELS, getattr(attn, "kernel_routers", ()))
    differences = getattr(attn, "difference_routers", ())
    found |= zip(DIFFERENCES if len(differences) == 2 else ("map_difference",), differences)  # Eq. 10 has one
    return {name: router for name, router in found.items() if router is not None}


@contextmanager
def replaced(functions):
    """{(module, name): value} in place of what is there, for a while."""
    originals = {key: getattr(*key) for key in functions}
    try:
        for key, value in functions.items(): setattr(*key, value)
        yield
    finally:
        for key, value in originals.items(): setattr(*key, value)


@contextmanager
def watched(model, matrices=False):
    """Yields a list with a dict for each block: "routes" {name: [index (B, N)]} and, if asked for, "attention".

    The attention is a list of pairs: a matrix (B, heads, N, M) and the values (B, heads, M, d) that it weighs; their
    product is what the attention gives before its convolution and projection (DiG: before norm and gate too). Row i is
    q_i k_j over the denominator of row i; of a softmax, its probabilities; of Eq. 10, the difference of its two.
    MoH's routes "heads" are those of the heads that are not shared, (B, N, routed).
    """
    seen = [{"routes": {name: [] for name in routers(block.attn)}, "attention": []} for block in model.blocks]
    lists = {router.data_ptr(): seen[b]["routes"][name]  # a router is known by where it lies
             for b, block in enumerate(model.blocks) for name, router in routers(block.attn).items()}
    parts = []  # of the attention that is being computed

    def route(z, router, router_grad=True, original=dydilit.route):
        index, gate = original(z, router, router_grad)
        lists[router.data_ptr()].append(index)
        return index, gate

    def linear(q, k, v, *args, original=dydilit.linear_attention, **how):
        parts.append((original(q, k, identity(k), *args, **how), v))
        return original(q, k, v, *args, **how)

    def scan(q, k, v, log_a, original=baselines.gated_scan):
        parts.append((original(q, k, identity(k), log_a), v))
        return original(q, k, v, log_a)

    def softmax(q, k, v, original=F.scaled_dot_product_attention):
        parts.append(((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), v))
        return original(q, k, v)

    def whole(attn, inputs, _):
        b = numbers[attn]
        for indices in seen[b]["routes"].values():  # routed_projection sees the tokens of all images in one row
            if indices: indices[-1] = indices[-1].view(inputs[0].shape[:2] + indices[-1].shape[2:])
        if isinstance(attn, MoH):
            gates = attn.gates(inputs[0])[0]                                                     # (B, N, heads)
            seen[b]["routes"].setdefault("heads", []).append(gates[..., attn.shared :].topk(attn.routed).indices)
        if not matrices: return
        a, v = parts[0]
        if isinstance(attn, MoH):
            a = a * gates.mT.unsqueeze(-1)
        elif isinstance(attn, GatedLinear):
            back = scan_order(inputs[1], attn.i).argsort().to(a.device)
            a, v = a[..., back, :][..., back], v[..., back, :]
        elif len(parts) == 2:  # Eq. 10
            a = a - attn.lam[seen[b]["routes"]["map_difference"][-1]].unsqueeze(-1) * parts[1][0]
        seen[b]["attention"].append((a, v) if a.dim() == 4 else (a.unsqueeze(1), v.unsqueeze(1)))
        parts.clear()

    numbers = {block.attn: b for b, block in enumerate(model.blocks)}
    hooks = [attn.register_forward_hook(whole) for attn in numbers]
    functions = {(dydilit, "route"): route, (dydilit, "FUSED_DEVICES"): ()}
    if matrices:
        functions |= {(dydilit, "linear_attention"): linear, (baselines, "linear_attention"): linear,
                      (baselines, "gated_scan"): scan, (F, "scaled_dot_product_attention"): softmax}
    try:
        with replaced(functions): yield seen
    finally:
        for hook in hooks: hook.remove()


def identity(k):
    """Unit matrices in place of the values for keys k (..., M, d): what an attention makes of them is its matrix."""
    return torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of what was seen.


def usage(index, n):
    """index (any shape) of n routes -> the share of the tokens that each of them got (n,)."""
    return torch.bincount(index.flatten(), minlength=n).double() / index.numel()


def usage_entropy(shares):
    """shares (n,) -> their entropy over log n: 1, all n routes are used alike; 0, one takes everything (collapse)."""
    return (torch.special.entr(shares).sum() / math.log(len(shares))).item() if len(shares) > 1 else 1.0


def entropies(model, seen):
    """{router's name: [usage entropy of every block]} of all that `watched` has seen."""
    table = {}
    for block, part in zip(model.blocks, seen):
        sizes = {name: router.shape[1] for name, router in routers(block.attn).items()}
        if isinstance(block.attn, MoH): sizes["heads"] = block.attn.heads - block.attn.shared
        for name, n in sizes.items():
            table.setdefault(name, []).append(usage_entropy(usage(torch.cat(part["routes"][name]), n)))
    return table


def noisy(model, held_out, most=64):
    """What model() takes, (x_t, t, y), from the first of the held-out images as `dydilit.Data.held_out` gives them."""
    x, y, t, noise = (z[:most].to(model.pos_embed.device) for z in held_out)
    return Diffusion().q_sample(x, t, noise), t, y


@torch.no_grad()
def usage_at_evaluation(model, held_out):
    """`on_eval` of dydilit.train: {"usage_entropy": {router's name: [every block's]}}; {} where nothing is routed.

    Over the first 64 held-out images, with the timesteps and the noise of the held-out loss, in float32.
    """
    with watched(model) as seen: model(*noisy(model, held_out))
    table = {name: [round(h, 4) for h in row] for name, row in entropies(model, seen).items()}
    return {"usage_entropy": table} if table else {}


@torch.no_grad()
def mean_lambda(model, held_out):
    """Fig. 7: the lambda that tokens are routed to, its mean over the tokens (of Q and K) in every block: [depth]."""
    with watched(model) as seen: model(*noisy(model, held_out))
    return [torch.cat([attn.lam[i] for name in (*DIFFERENCES, "map_difference") for i in part["routes"].get(name, [])])
            .mean().item() for attn, part in zip((block.attn for block in model.blocks), seen)]


def row_statistics(matrix):
    """matrix (..., M) -> entropy and variance of its rows, the mean over the rows that are not 0: two numbers.

    A difference has negative weights, and not every attention has a denominator: a row becomes p = |a| / sum |a|. Then
    entropy / log M is 1 where all keys weigh alike, 0 where one has it all; M^2 variance(p) is 0 and M - 1 there.
    """
    p = matrix.double().abs()
    p = p[p.sum(-1) > 0]
    p, M = p / p.sum(-1, keepdim=True), p.shape[-1]
    return (torch.special.entr(p).sum(-1).mean() / math.log(M)).item(), (M * p.square().sum(-1) - 1).mean().item()


@torch.no_grad()
def smoothness(model, held_out, most=16):
    """`row_statistics` of every block, (depth, 2)."""
    with watched(model, matrices=True) as seen: model(*noisy(model, held_out, most))
    return [row_statistics(part["attention"][0][0]) for part in seen]
