"""What the tests share: one comparison, gradients, inputs for the op, and the equations once more, token by token.

Nothing here calls dydilit: the loops are the paper's formulas in numpy float64, written to be checked by eye.
"""

import numpy as np
import torch

def assert_close(name, got, want, atol, rtol=0.0):
    """|got - want| <= atol + rtol |want| everywhere; shape and NaN come first, name and worst errors are printed."""
    got, want = (torch.as_tensor(z, dtype=torch.float64).detach().cpu() for z in (got, want))
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    for which, z in (("got", got), ("expected", want)):
        assert not z.isnan().any(), f"{name}: {which} {int(z.isnan().sum())} NaN among {z.numel()} values"
    error = (got - want).abs()
    worst, relative = (e.max().item() if e.numel() else 0.0 for e in (error, error / want.abs().clamp_min(1e-300)))
    line = f"{name}: max abs error {worst:.2e}, max rel error {relative:.2e} (atol {atol:.0e}, rtol {rtol:.0e})"
    print(line)
    assert (error <= atol + rtol * want.abs()).all(), line


def grads_of(fn, inputs, cotangent):
    """fn(**inputs) and {name: gradient of <fn, cotangent>}; an input that fn does not use gets zeros."""
    leaves = {name: z.detach().clone().requires_grad_() for name, z in inputs.items()}
    out = fn(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
    return out.detach(), dict(zip(leaves, grads))


# ---------------------------------------------------------------------------------------------------------------------
# The equations.


def power(z, gamma):
    """Eq. 5 for one token z (D,)."""
    r = np.maximum(z, 0.0)
    if not r.any():
        return np.zeros_like(r)
    p = r**gamma
    return p / np.sqrt((p**2).sum()) * np.sqrt((r**2).sum())


def choose(z, router):
    """The arg max of Eqs. 1, 6 and 7 for one token z (D,): the first of the largest logits."""
    best, largest = 0, -np.inf
    for u in range(router.shape[1]):
        logit = (z * router[:, u]).sum()
        if logit > largest:
            best, largest = u, logit
    return best


def attend(q, k, v, normalize, eps):
    """Eq. 4 with its guarded denominator, or without one (Eq. 8); one image, q, k, v (N, D): a loop over i and j."""
    out = []
    for q_i in q:
        numerator, denominator, lengths = np.zeros(v.shape[1]), 0.0, 0.0
        for k_j, v_j in zip(k, v):
            similarity = (q_i * k_j).sum()
            numerator = numerator + similarity * v_j
            denominator += similarity
            lengths += np.sqrt((k_j**2).sum())
        floor = 1e-3 * np.sqrt((q_i**2).sum()) * lengths
        out.append(numerator / (max(denominator, floor) + eps) if normalize else numerator)
    return np.stack(out)


def attention_loop(
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers, normalize=True, eps=1e-6
):
    """dydila_attention, one token at a time; tensors in, numpy float64 (B, N, D) out."""
    q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers = (
        z.detach().double().numpy()
        for z in (q, k, q_prime, k_prime, v, gamma, lam, kernel_routers, difference_routers)
    )
    out = []
    for b in range(len(q)):
        dq, dk = [], []
        for i in range(q.shape[1]):
            q_t, k_t, qp_t, kp_t = (
                power(z[b, i], gamma[choose(z[b, i], router)])
                for z, router in zip((q, k, q_prime, k_prime), kernel_routers)
            )
            dq.append(q_t - lam[choose(np.concatenate([q_t, qp_t]), difference_routers[0])] * qp_t)
            dk.append(k_t - lam[choose(np.concatenate([k_t, kp_t]), difference_routers[1])] * kp_t)
        out.append(attend(np.stack(dq), np.stack(dk), v[b], normalize, eps))
    return np.stack(out)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs for dydila_attention.


def top2_margin(z, router):
    """Largest minus second largest logit of every token, z (..., D); infinite where there is nothing to choose."""
    logits = np.sort(z @ router, axis=-1)
    return logits[..., -1] - logits[..., -2] if router.shape[1] > 1 else np.full(logits.shape[:-1], np.inf)


def side_margin(z, z_prime, gamma, router, router_prime, difference_router):
    """The smallest of the three margins that one token of Q (with Q'), or of K (with K'), has. z, z_prime (D,)."""
    z_t, zp_t = (power(a, gamma[choose(a, r)]) for a, r in ((z, router), (z_prime, router_prime)))
    return min(top2_margin(z, router), top2_margin(z_prime, router_prime),
               top2_margin(np.concatenate([z_t, zp_t]), difference_router))


def random_op_inputs(
    B, N, D, n_F, n_D, dtype=torch.float32, seed=0, *, margin=0.0, away=0.0, dead=0, gammas=(1.5, 4), lams=(0.05, 0.6)
):
    """{argument: tensor} for dydila_attention, in its order, from `seed` alone.

    margin: tokens are drawn again until every choice of a factor is won by more than this (logits are of order 1), so
        that an implementation that rounds otherwise, or a finite difference, cannot route otherwise.
    away: no entry of q, k, q', k' is nearer to 0, the kink of relu, than this.
    dead: so many tokens of every image have no positive entry in q and k.
    """
    rng = np.random.default_rng(seed)

    def rounded(z):  # margins hold for the values that the implementation will see
        return torch.tensor(z).to(dtype).double().numpy()

    def draw(all_negative):
        z = rng.normal(size=D)
        z = -abs(z) if all_negative else z
        return rounded(z + np.sign(z) * away)

    gamma, lam = rounded(rng.uniform(*gammas, n_F)), rounded(rng.uniform(*lams, n_D))
    kernel_routers = rounded(rng.normal(size=(4, D, n_F)) / D**0.5)
    difference_routers = rounded(rng.normal(size=(2, 2 * D, n_D)) / D**0.5)
    q, k, q_prime, k_prime = (np.empty((B, N, D)) for _ in range(4))
    for b, i in np.ndindex(B, N):
        for s, (z, z_prime) in enumerate(((q, q_prime), (k, k_prime))):
            for _ in range(1000):
                z[b, i], z_prime[b, i] = draw(i < dead), draw(False)
                if side_margin(z[b, i], z_prime[b, i], gamma, kernel_routers[s], kernel_routers[s + 2],
                               difference_routers[s]) >= margin:
                    break
            else:
                raise ValueError(f"no token with a margin of {margin} in 1000 draws")
    arrays = {"q": q, "k": k, "q_prime": q_prime, "k_prime": k_prime, "v": rng.normal(size=(B, N, D)), "gamma": gamma,
              "lam": lam, "kernel_routers": kernel_routers, "difference_routers": difference_routers}
    return {name: torch.tensor(z).to(dtype) for name, z in arrays.items()}


# ---------------------------------------------------------------------------------------------------------------------
# An autoencoder.


def save_vae(path, seed=0, **config):
    """A tiny diffusers.AutoencoderKL with random weights, which halves the size, saved as the folder `path`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    two = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
           "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
           "scaling_factor": 0.3}
    AutoencoderKL(**(two | config)).save_pretrained(path)
    return str(path)
