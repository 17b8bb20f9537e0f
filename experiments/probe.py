"""What the attention of a model does inside: the routes of its tokens, and its attention matrix.

    with watched(model, matrices=True) as seen:
        model(x, t, y)
    seen[0]["routes"]["q_projector"]      # block 0: a list, one index (B, N) for every forward pass
    seen[0]["attention"]                  # and a list of (matrix (B, heads, N, M), values)

Takes any model of dydilit.py and baselines.py. experiments/train.py logs `usage_at_evaluation`;
ablate.py and figures.py use the rest. Imports dydilit.py, baselines.py and routing.py only.

How: while `watched` is active, the functions that route and attend are replaced by functions that
do the same and note what passes. The attentions find them as globals of their modules (dydilit,
baselines, routing), so the model's own forward pass, on the Python path, is what is watched; no
equation is written a second time here.
"""

import math
from contextlib import contextmanager

import torch

import dydilit
from dydilit import Diffusion
from experiments import baselines, routing
from experiments.baselines import GatedHeads, GatedLinear, MoH, scan_order

KERNELS = ("q_kernel", "k_kernel", "q_prime_kernel", "k_prime_kernel")
DIFFERENCES = ("q_difference", "k_difference")


def routers(attn):
    """{name: router (D, n)} of one attention, in the order in which its forward pass uses them.

    {} for an attention without routers.
    """
    found = {}
    for name in ("q_projector", "k_projector"):
        router = getattr(attn, f"{name}_router", None)
        if router is not None:
            found[name] = router
    found |= zip(KERNELS, getattr(attn, "kernel_routers", ()))
    differences = getattr(attn, "difference_routers", ())
    names = DIFFERENCES if len(differences) == 2 else ("map_difference",)  # Eq. 10 has one
    found |= zip(names, differences)
    return found


@contextmanager
def replaced(functions):
    """While active, every (module, name) of the dict holds the dict's value."""
    originals = {(module, name): getattr(module, name) for module, name in functions}
    try:
        for (module, name), value in functions.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in originals.items():
            setattr(module, name, value)


@contextmanager
def watched(model, matrices=False):
    """Yields a list with a dict for each block, filled by every forward pass.

    "routes" is {name: [index (B, N)]} with the names of `routers`. MoH has "heads": the routed
    heads (B, N, K) of every token, shared heads not counted.

    "attention", filled if `matrices`, is a list of pairs: a matrix (B, heads, N, M) and the values
    (B, heads, M, d) that it weighs. Their product is the attention before its convolution and
    projection (DiG: before its norm and gate). Row i holds q_i k_j over the denominator of row i;
    of a softmax, its probabilities; of Eq. 10, the difference of its two matrices.
    """
    calls = Calls()
    seen, hooks = [], []

    def note_into(part):
        def after_forward(attn, inputs, output):
            x, grid = inputs
            routes = routes_of(attn, x, calls.indices)
            for name, index in routes.items():
                part["routes"][name].append(index)
            if matrices:
                part["attention"].append(matrix_of(attn, x, grid, calls.parts, routes))
            calls.clear()

        return after_forward

    for block in model.blocks:
        names = [*routers(block.attn), *(["heads"] if isinstance(block.attn, MoH) else [])]
        seen.append({"routes": {name: [] for name in names}, "attention": []})
        hooks.append(block.attn.register_forward_hook(note_into(seen[-1])))
    functions = {
        (dydilit, "route"): calls.route,
        (routing, "choose"): calls.choose,
        (dydilit, "FUSED_DEVICES"): (),
    }
    if matrices:
        functions |= {
            (dydilit, "linear_attention"): calls.linear_attention,
            (baselines, "linear_attention"): calls.linear_attention,
            (baselines, "block_attention"): calls.block_attention,
            (baselines, "gated_scan"): calls.gated_scan,
            (baselines, "softmax_attention"): calls.softmax_attention,
        }
    try:
        with replaced(functions):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Calls:
    """The routes and the attention matrices of the attention that is being computed.

    Each method takes the place of the function of its name and calls it.
    """

    def __init__(self):
        self.indices = []  # of `route`, in the order of the calls
        self.parts = []  # (matrix, values) of each attention function
        self.originals = {
            "route": dydilit.route,
            "choose": routing.choose,
            "linear_attention": dydilit.linear_attention,
            "block_attention": baselines.block_attention,
            "gated_scan": baselines.gated_scan,
            "softmax_attention": baselines.softmax_attention,
        }

    def clear(self):
        self.indices.clear()
        self.parts.clear()

    def route(self, z, router, router_grad=True):
        index, gate = self.originals["route"](z, router, router_grad)
        self.indices.append(index)
        return index, gate

    def choose(self, z, router):
        index, p = self.originals["choose"](z, router)
        self.indices.append(index)
        return index, p

    def linear_attention(self, q, k, v, *args, **options):
        original = self.originals["linear_attention"]
        self.parts.append((original(q, k, identity(k), *args, **options), v))
        return original(q, k, v, *args, **options)

    def block_attention(self, q, k, v, *args):
        original = self.originals["block_attention"]
        self.parts.append((original(q, k, identity(k), *args), v))
        return original(q, k, v, *args)

    def gated_scan(self, q, k, v, log_a):
        original = self.originals["gated_scan"]
        self.parts.append((original(q, k, identity(k), log_a), v))
        return original(q, k, v, log_a)

    def softmax_attention(self, q, k, v):
        matrix = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        self.parts.append((matrix, v))
        return self.originals["softmax_attention"](q, k, v)


def identity(k):
    """For keys k (..., M, d): unit matrices (..., M, M).

    An attention of these values returns its matrix.
    """
    return torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)


def routes_of(attn, x, indices):
    """{name: index (B, N)} of one forward pass of `attn` on x (B, N, D).

    `indices` come in the order of `routers`. routed_projection routes the tokens of all images in
    one row, (B N,).
    """
    routes = {}
    for name, index in zip(routers(attn), indices, strict=True):
        routes[name] = index.view(x.shape[:2])
    if isinstance(attn, MoH):
        routed_gates = attn.gates(x)[0][..., attn.shared :]  # (B, N, E)
        routes["heads"] = routed_gates.topk(attn.routed).indices
    return routes


def matrix_of(attn, x, grid, parts, routes):
    """The matrix (B, heads, N, M) and the values (B, heads, M, d) of one forward pass on x."""
    a, v = parts[0]
    if isinstance(attn, GatedHeads):
        a = a * attn.gates(x)[0].mT.unsqueeze(-1)
    elif isinstance(attn, GatedLinear):  # from the order of the scan to that of the image
        back = scan_order(grid, attn.i).argsort().to(a.device)
        a, v = a[..., back, :][..., back], v[..., back, :]
    elif len(parts) == 2:  # Eq. 10
        lam = attn.lam[routes["map_difference"]].unsqueeze(-1)
        a = a - lam * parts[1][0]
    if a.dim() == 3:  # an attention without heads
        return a.unsqueeze(1), v.unsqueeze(1)
    return a, v


# --------------------------------------------------------------------------------------------------
# Figures of what was seen.


def usage(index, n):
    """index (any shape) of n routes -> the share of the tokens of each route (n,)."""
    return torch.bincount(index.flatten(), minlength=n).double() / index.numel()


def usage_entropy(shares):
    """shares (n,) -> their entropy / log n: 1 if all routes have equal shares, 0 if one has all."""
    if len(shares) == 1:
        return 1.0
    return (torch.special.entr(shares).sum() / math.log(len(shares))).item()


def entropies(model, seen):
    """{router's name: [usage entropy of every block]} of all that `watched` has seen."""
    table = {}
    for block, part in zip(model.blocks, seen):
        sizes = {name: router.shape[1] for name, router in routers(block.attn).items()}
        if isinstance(block.attn, MoH):
            sizes["heads"] = block.attn.heads - block.attn.shared
        for name, n in sizes.items():
            shares = usage(torch.cat(part["routes"][name]), n)
            table.setdefault(name, []).append(usage_entropy(shares))
    return table


def noisy(model, held_out, most=64):
    """The arguments (x_t, t, y) of model() for the first held-out images.

    held_out is what `dydilit.Data.held_out` returns.
    """
    x, y, t, noise = (z[:most].to(model.pos_embed.device) for z in held_out)
    return Diffusion().q_sample(x, t, noise), t, y


@torch.no_grad()
def usage_at_evaluation(model, held_out):
    """`on_eval` of dydilit.train: {"usage_entropy": {router's name: [one number a block]}}.

    Over the first 64 held-out images, with the timesteps and the noise of the held-out loss, in
    float32. {} for a model that routes nothing.
    """
    with watched(model) as seen:
        model(*noisy(model, held_out))
    table = {}
    for name, row in entropies(model, seen).items():
        table[name] = [round(h, 4) for h in row]
    return {"usage_entropy": table} if table else {}


@torch.no_grad()
def mean_lambda(model, held_out):
    """Fig. 7: the mean over the tokens (of Q and K) of the lambda they are routed to: [depth]."""
    with watched(model) as seen:
        model(*noisy(model, held_out))
    means = []
    for block, part in zip(model.blocks, seen):
        chosen = []
        for name in (*DIFFERENCES, "map_difference"):
            chosen += [block.attn.lam[index] for index in part["routes"].get(name, [])]
        means.append(torch.cat(chosen).mean().item())
    return means


def row_statistics(matrix):
    """matrix (..., M) -> (entropy, variance) of its rows, the mean over the rows that are not 0.

    A row a becomes p = |a| / sum |a|: a difference has negative weights, and not every attention
    has a denominator. entropy / log M is 1 where all keys weigh alike and 0 where one key has all
    the weight; M^2 variance(p) is 0 and M - 1 there.
    """
    p = matrix.double().abs()
    p = p[p.sum(-1) > 0]
    p = p / p.sum(-1, keepdim=True)
    M = p.shape[-1]
    entropy = torch.special.entr(p).sum(-1).mean() / math.log(M)
    variance = (M * p.square().sum(-1) - 1).mean()
    return entropy.item(), variance.item()


@torch.no_grad()
def smoothness(model, held_out, most=16):
    """`row_statistics` of every block, (depth, 2)."""
    with watched(model, matrices=True) as seen:
        model(*noisy(model, held_out, most))
    return [row_statistics(part["attention"][0][0]) for part in seen]
