"""How a router can learn: two rules beside the straight-through gradient of dydilit.route.

For readers who ask whether the choice of that rule matters; the paper does not state its own. With
p = softmax(logits) over n choices and the winner i:

    ratio   what i gives, times p_i / stop(p_i)       dydilit.py: the value of Eqs. 1, 6, 7, and
                                                      the gradient of log p_i
    score   what i gives, times p_i                   another value; as in mixtures of experts
    dense   sum_u g_u (what u gives)                  the value of Eqs. 1, 6, 7, and a gradient that
            g = one_hot(i) + p - stop(p)              sees all n choices; costs n products

What a projector gives is a product x W_u, what a gamma gives is phi(z), what a lambda gives is
lambda_u z~'. Only `dense` weighs gammas before phi: n powers of every token would cost n times the
memory. Imports dydilit.py only.
"""

import torch
import torch.nn.functional as F

import dydilit
from dydilit import at_least_float32, power_kernel, project

RULES = ("ratio", "score", "dense")


def choose(z, router):
    """z (..., D), router (D, n) -> the winner (...) and p (..., n), as dydilit.route has them."""
    with torch.autocast(z.device.type, enabled=False):
        logits = at_least_float32(z) @ at_least_float32(router)
        return logits.argmax(-1), logits.softmax(-1)


def scored(z, router):
    """The winner (...) and its score p_i (..., 1)."""
    index, p = choose(z, router)
    return index, p.gather(-1, index.unsqueeze(-1))


def one_hot(z, router):
    """g (..., n): one_hot(i), with the gradient of p."""
    index, p = choose(z, router)
    return F.one_hot(index, p.shape[-1]) + (p - p.detach())


def chosen(bank, z, router, rule, router_grad=True):
    """The factor of a bank (n,) that z (..., D) is routed to: (..., 1)."""
    bank = at_least_float32(bank)
    if rule == "dense":
        return (one_hot(z, router) * bank).sum(-1, keepdim=True)
    if rule == "score":
        index, gate = scored(z, router)
    else:
        index, gate = dydilit.route(z, router, router_grad)
    return bank[index].unsqueeze(-1) * gate


def routed_projection(x, projectors, router, rule, router_grad=True):
    """dydilit.routed_projection (Eqs. 1 and 2) by a rule: (B, N, D)."""
    if rule == "ratio":
        return dydilit.routed_projection(x, projectors, router, router_grad)
    rows = x.flatten(0, 1)  # (B N, D)
    if rule == "score":
        index, score = scored(rows, router)
        projected = project(rows, projectors, index)
        return (projected * score.to(projected.dtype)).view_as(x)
    products = rows @ projectors  # (n_P, B N, D)
    weights = one_hot(rows, router).mT.unsqueeze(-1)  # (n_P, B N, 1)
    return (weights.to(products.dtype) * products).sum(0).view_as(x)


def measure(z, gamma, router, rule, router_grad=True):
    """dydilit.measure (Eq. 6) by a rule: (B, N, D)."""
    if rule == "score":
        index, score = scored(z, router)
        return power_kernel(z, at_least_float32(gamma)[index].unsqueeze(-1)) * score
    return power_kernel(z, chosen(gamma, z, router, rule, router_grad))


def difference(z_t, zp_t, lam, router, rule, router_grad=True):
    """dydilit.difference (Eqs. 7 and 8) by a rule: (B, N, D)."""
    both = torch.cat([z_t, zp_t], dim=-1)
    return z_t - chosen(lam, both, router, rule, router_grad) * zp_t
