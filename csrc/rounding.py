"""What bfloat16 inside the op costs: the figures of csrc/README.md, "Precision".

    python -m csrc.rounding            # two Markdown tables, a minute on one thread

A model of the op rounds to bfloat16 in chosen places and is exact elsewhere, so that it tells what
a place costs before there is a kernel for it:

d       Dq and Dk as operands of the products     results  the products themselves, as cuBLAS
attn    A or S, and its gradient                           rounds them
g       G = dO / den                              den      Dq and Dk of the denominator

The tokens are bfloat16 numbers. For whoever changes the precision. Imports dydilit.py.
"""

import statistics

import torch

import dydilit

PRODUCTS = frozenset(("d", "attn", "g"))
CUDA = PRODUCTS | {"results"}
# what the kernels do, and what else they could do
CUDA_CHOICES = {
    "denominators of rounded Dq, Dk": CUDA | {"den"},
    "of Dq, Dk before rounding": CUDA,
    "and products of float32 Dq, Dk": CUDA - {"d"},
}
CPU_CHOICES = {
    "float32 products": frozenset(),
    "bfloat16, float32 sums": PRODUCTS,
    "only G rounded": frozenset("g"),
}


class Rounded(torch.autograd.Function):
    """linear_attention and its backward as csrc/README.md derives it, rounded in `places`."""

    @staticmethod
    def forward(ctx, dq, dk, v, eps, places):
        def rounded(x, place):
            return x.bfloat16().to(x.dtype) if place in places else x

        tokens_first = dq.shape[-2] <= dq.shape[-1]
        q, k = rounded(dq, "d"), rounded(dk, "d")
        attn = rounded(q @ k.mT if tokens_first else k.mT @ v, "attn")
        num = rounded(attn @ v if tokens_first else q @ attn, "results")
        dq, dk = rounded(dq, "den"), rounded(dk, "den")
        K, M = dk.sum(-2, keepdim=True), dydilit.norm(dk).sum(-2, keepdim=True)
        dot, floor = dq @ K.mT, 1e-3 * dydilit.norm(dq) * M
        den = torch.maximum(dot, floor) + eps
        ctx.save_for_backward(q, k, v, attn, K, M, dot >= floor, den)
        ctx.rounded, ctx.tokens_first = rounded, tokens_first
        return num / den

    @staticmethod
    def backward(ctx, dout):
        q, k, v, attn, K, M, is_open, den = ctx.saved_tensors
        rounded = ctx.rounded
        g = rounded(dout / den, "g")
        if ctx.tokens_first:
            dattn = rounded(g @ v.mT, "attn")
            dq, dk, dv = dattn @ k, dattn.mT @ q, attn.mT @ g
        else:
            dattn = rounded(q.mT @ g, "attn")
            dq, dk, dv = g @ attn.mT, v @ dattn.mT, k @ dattn
        dq, dk, dv = (rounded(z, "results") for z in (dq, dk, dv))
        dden = -(dq * q).sum(-1, keepdim=True) / den
        along_q, along_k = (z / dydilit.norm(z).clamp_min(1e-30) for z in (q, k))
        through_dot, through_floor = torch.where(is_open, dden, 0), torch.where(is_open, 0, dden)
        dq = dq + through_dot * K + 1e-3 * through_floor * M * along_q
        c = (through_dot * q).sum(-2, keepdim=True)
        c_norm = 1e-3 * (through_floor * dydilit.norm(q)).sum(-2, keepdim=True)
        dk = dk + c + c_norm * along_k
        return rounded(dq, "results"), rounded(dk, "results"), dv, None, None


def attention(places):
    """dydila_reference with these roundings."""

    def attend(q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers):
        tokens = zip((q, k, q_prime, k_prime), kernel_routers)
        q_t, k_t, qp_t, kp_t = (dydilit.measure(z, gamma, router) for z, router in tokens)
        dq = dydilit.difference(q_t, qp_t, lam, difference_routers[0])
        dk = dydilit.difference(k_t, kp_t, lam, difference_routers[1])
        return Rounded.apply(dq, dk, dydilit.at_least_float32(v), 1e-6, places).to(v.dtype)

    return attend


def inputs(N, D, n, lambdas, seed):
    """The nine tensors and a cotangent, float64; the tokens are not rounded."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    low, high = lambdas
    gamma = 1 + 2 * torch.rand(n, generator=g, dtype=torch.float64)
    lam = low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)
    tokens = [normal(1, N, D) for _ in range(5)]
    routers = [normal(4, D, n) / D**0.5, normal(2, 2 * D, n) / D**0.5]
    return [*tokens, gamma, lam, *routers], normal(1, N, D)


def rounded_tokens(tensors):
    return [x.bfloat16().double() for x in tensors[:5]] + tensors[5:]


def results(places, tensors, dout):
    """[out, nine gradients]"""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(places)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def error_of_gradients(got, want):
    """The largest of nine: |got - want| / |want|."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got[1:], want[1:]))


def share_of_allowed(got, low, want):
    """The error over what tests/test_fused.py allows, the worst of ten results; 1 is the limit.

    It allows twice the error of `low`, the Python path in bfloat16, and 1e-4 of the largest entry.
    """
    worst = 0.0
    for a, b, c in zip(got, low, want):
        size = c.abs().max()
        error, usual = ((x.double() - c).abs().max() / size for x in (a, b))
        worst = max(worst, (error / (2 * usual + 1e-4)).item())
    return worst


def cuda_errors(N, D, lambdas, seed):
    """{choice: error of the gradients}, in float64 but for the roundings."""
    exact_tokens, dout = inputs(N, D, 9, lambdas, seed)
    tensors = rounded_tokens(exact_tokens)
    want = results(frozenset(), tensors, dout)
    errors = {"the tokens alone": results(frozenset(), exact_tokens, dout)}
    errors |= {name: results(places, tensors, dout) for name, places in CUDA_CHOICES.items()}
    return {name: error_of_gradients(got, want) for name, got in errors.items()}


def cpu_shares(N, D, lambdas, seed):
    """{choice: share of the allowed error}; tokens, parameters and results are bfloat16."""
    tensors, dout = inputs(N, D, 9, lambdas, seed)
    low, dout = [x.bfloat16() for x in tensors], dout.bfloat16()
    want = results(frozenset(), [x.double() for x in low], dout.double())
    usual = results(frozenset(), low, dout)
    choices = {name: results(places, low, dout) for name, places in CPU_CHOICES.items()}
    return {name: share_of_allowed(got, usual, want) for name, got in choices.items()}


def table(title, measure, seeds=10):
    """A row for each size and range of lambda: median and worst over the seeds."""
    names = list(measure(4, 4, (0.0, 0.1), 0))
    print(f"\n| {title} | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for N, D in ((64, 64), (256, 64), (256, 384)):
        for lambdas in ((0.0, 0.02), (0.01, 0.1), (0.1, 0.9)):
            found = [measure(N, D, lambdas, seed) for seed in range(seeds)]
            cells = [f"N {N}, D {D}, lambda {lambdas[0]:g} to {lambdas[1]:g}"]
            for name in names:
                values = [each[name] for each in found]
                cells.append(f"{statistics.median(values):.2g}, {max(values):.2g}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    table("CUDA: error of the gradients", cuda_errors)
    table("CPU: error over what is allowed", cpu_shares)
