"""The diffusion against Gaussian algebra in plain numbers.

The samplers run on data whose best model is known.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from util import assert_close, normal

import dydilit
from dydilit import Diffusion, discretized_log_likelihood, generator, respace, with_guidance

f64 = torch.float64
T = 1000
BETAS = [1e-4 + (2e-2 - 1e-4) * t / (T - 1) for t in range(T)]
CHAINS = [None, 250, 7, 2]  # all timesteps, and respaced chains


def column(values):
    """Numbers as a batch of one-pixel images (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=f64).view(-1, 1, 1, 1)


def chain(steps):
    """[(abar, abar_previous, beta)] of every step, by products of single steps.

    No table and no formula for beta: a step of a short chain is all the steps it jumps over.
    """
    abar, products = 1.0, []
    for beta in BETAS:
        abar *= 1 - beta
        products.append(abar)
    kept = range(T) if steps is None else [round(i * (T - 1) / (steps - 1)) for i in range(steps)]
    out, previous, last = [], 1.0, -1
    for t in kept:
        alpha = 1.0
        for beta in BETAS[last + 1 : t + 1]:
            alpha *= 1 - beta
        out.append((products[t], previous, 1 - alpha))
        previous, last = products[t], t
    return out


def posterior_mean(x0, x_t, abar, previous, beta):
    """The mean of q(x_{t-1} | x_t, x_0), as printed by Ho et al."""
    from_x0 = math.sqrt(previous) * beta / (1 - abar)
    from_x_t = math.sqrt(1 - beta) * (1 - previous) / (1 - abar)
    return from_x0 * x0 + from_x_t * x_t


def stub(outputs, num_classes=10, channels=1, size=1):
    """The function `outputs(x, t, y)` as a model, with as much of a config as the samplers read."""
    outputs.config = SimpleNamespace(num_classes=num_classes, in_channels=channels, input_size=size)
    return outputs


# ----------------------------------------------------------------------------------------------
# The chain.


def test_betas_are_linear_between_their_ends():
    beta = Diffusion().tables["log_beta"].exp()
    assert beta.dtype == f64 and len(beta) == T
    assert_close("beta", beta, BETAS, atol=0, rtol=1e-10)
    assert_close("ends", beta[[0, -1]], [1e-4, 2e-2], atol=0, rtol=1e-10)


@pytest.mark.parametrize("steps", CHAINS)
def test_q_sample_is_the_chain_of_single_steps(steps):
    diffusion = Diffusion(steps)
    mean, variance, means, stds = 1.0, 0.0, [], []
    for _, _, beta in chain(steps):  # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise
        mean = math.sqrt(1 - beta) * mean
        variance = (1 - beta) * variance + beta
        means.append(mean)
        stds.append(math.sqrt(variance))
    t = torch.arange(len(means))
    one, zero = column([1.0] * len(t)), column([0.0] * len(t))
    assert_close("mean", diffusion.q_sample(one, t, zero).flatten(), means, atol=1e-12)
    assert_close("std", diffusion.q_sample(zero, t, one).flatten(), stds, atol=1e-12)


@pytest.mark.parametrize("steps", CHAINS)
def test_posterior_is_the_product_of_two_gaussians(steps):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    diffusion, rows = Diffusion(steps), chain(steps)
    x0, x_t = normal(len(rows), 1, 1, 1), normal(len(rows), 1, 1, 1, seed=1)
    mean, log_variance = diffusion.q_posterior(x0, x_t, torch.arange(len(rows)))
    for t, (_, previous, beta) in enumerate(rows):
        a, b = x0[t].item(), x_t[t].item()
        if t == 0:  # x_0 itself; its variance, 0, is replaced by that of the next step
            assert_close("mean at 0", mean[0].item(), a, atol=1e-10)
            continue
        from_x_t, from_x0 = (1 - beta) / beta, 1 / (1 - previous)
        variance = 1 / (from_x_t + from_x0)
        want = variance * (from_x_t * b / math.sqrt(1 - beta) + from_x0 * math.sqrt(previous) * a)
        assert mean[t].item() == pytest.approx(want, rel=1e-9, abs=1e-10)
        assert log_variance[t].item() == pytest.approx(math.log(variance), abs=1e-9)
    assert log_variance[0] == log_variance[1]


@pytest.mark.parametrize("steps", CHAINS)
def test_x0_and_noise_determine_each_other(steps):
    diffusion, n = Diffusion(steps), len(chain(steps))
    x0, noise, t = normal(n, 2, 3, 3), normal(n, 2, 3, 3, seed=1), torch.arange(n)
    x_t = diffusion.q_sample(x0, t, noise)
    assert_close("x0", diffusion.predict_x0(noise, x_t, t), x0, atol=1e-10)


def test_respacing_keeps_both_ends_and_spaces_evenly():
    kept = respace(1000, 250)
    assert kept[:4] == [0, 4, 8, 12] and kept[-2:] == [995, 999]
    gaps = np.diff(kept).tolist()
    assert gaps.count(4) == 246 and gaps.count(5) == 3 and len(gaps) == 249
    assert respace(1000, 1000) == list(range(1000))
    assert respace(1000, 2) == [0, 999] and respace(5, 3) == [0, 2, 4]


def test_a_diffusion_takes_the_timesteps_of_respace():
    assert Diffusion(250).timesteps.tolist() == respace(1000, 250)
    assert Diffusion().timesteps.tolist() == list(range(1000))


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_too_few_or_too_many_steps_are_an_error(steps):
    with pytest.raises(ValueError, match=f"between 2 and 1000, got {steps}"):
        respace(1000, steps)
    with pytest.raises(ValueError, match=f"between 2 and 1000, got {steps}"):
        Diffusion(steps)


@pytest.mark.parametrize("steps", CHAINS)
def test_v_moves_the_log_variance_from_beta_tilde_to_beta(steps):
    diffusion, rows = Diffusion(steps), chain(steps)
    t, n = torch.arange(len(rows)), len(rows)
    x_t, eps = normal(n, 1, 1, 1), normal(n, 1, 1, 1, seed=1)
    low = [math.log((1 - previous) / (1 - abar) * beta) for abar, previous, beta in rows[1:]]
    low, high = np.array([low[0], *low]), np.log([beta for _, _, beta in rows])
    for v in (-1.0, 0.0, 0.3, 1.0, 1.5):  # v is not clamped
        _, log_variance = diffusion.p_mean_variance(eps, torch.full_like(x_t, v), x_t, t)
        want = low + (v + 1) / 2 * (high - low)
        assert_close(f"log variance at v = {v}", log_variance.flatten(), want, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
def test_model_mean_is_the_posterior_of_the_predicted_x0(clip):
    diffusion, t = Diffusion(), torch.tensor([0, 1, 500, 999])
    x_t, eps = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    mean, _ = diffusion.p_mean_variance(eps, torch.zeros_like(eps), x_t, t, clip)
    rows = chain(None)
    for b in range(4):
        abar = rows[t[b]][0]
        x0 = (x_t[b].numpy() - math.sqrt(1 - abar) * eps[b].numpy()) / math.sqrt(abar)
        assert abs(x0).max() > 1, "there is something to clip"
        x0 = np.clip(x0, -1, 1) if clip else x0
        want = posterior_mean(x0, x_t[b].numpy(), *rows[t[b]])
        assert_close(f"mean at {t[b]}", mean[b], want, atol=1e-9)


def test_tables_are_float64_and_their_products_are_of_the_datas_type():
    diffusion = Diffusion()
    assert all(table.dtype == f64 for table in diffusion.tables.values())
    for dtype in (torch.float32, f64):
        x = torch.ones(2, 1, 2, 2, dtype=dtype)
        assert diffusion.q_sample(x, torch.tensor([3, 999]), x).dtype == dtype


# ----------------------------------------------------------------------------------------------
# The loss.


@pytest.mark.parametrize("t", [1, 17, 500, 999])
def test_the_variational_term_is_the_integral_of_q_log_q_over_p(t):
    _, previous, beta = chain(None)[t]
    x0, x_t = 0.3, -0.8
    from_x_t, from_x0 = math.sqrt(1 - beta) / beta, math.sqrt(previous) / (1 - previous)
    variance = 1 / ((1 - beta) / beta + 1 / (1 - previous))
    true_mean = variance * (from_x_t * x_t + from_x0 * x0)
    sigma = math.sqrt(variance)
    x, dx = np.linspace(true_mean - 12 * sigma, true_mean + 12 * sigma, 20001, retstep=True)

    def log_density(mean, variance):
        return -0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)

    # nine models, one a pixel: mean and variance of p
    models = [
        (true_mean + shift * sigma, variance * scale)
        for shift in (0, 0.5, -3)
        for scale in (0.3, 1, 2)
    ]
    want = 0
    for model in models:
        log_q, log_p = log_density(true_mean, variance), log_density(*model)
        want += (np.exp(log_q) * (log_q - log_p)).sum() * dx / math.log(2) / len(models)
    means, variances = torch.tensor(models, dtype=f64).T.reshape(2, 1, 1, 3, 3)
    whole = torch.ones(1, 1, 3, 3, dtype=f64)
    got = Diffusion().variational_term(
        x0 * whole, x_t * whole, torch.tensor([t]), means, variances.log()
    )
    assert_close("KL in bits", got, [want], atol=1e-7, rtol=1e-7)


def cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def tanh_cdf(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bin_mass(k, mean, sigma, cdf):
    """The mass of N(mean, sigma^2) in the bin of grey level k, half way to the next levels."""
    upper = cdf(((k + 0.5) / 127.5 - 1 - mean) / sigma) if k < 255 else 1.0
    lower = cdf(((k - 0.5) / 127.5 - 1 - mean) / sigma) if k > 0 else 0.0
    return upper - lower


@pytest.mark.parametrize("mean, sigma", [(0.2, 0.005), (-0.99, 0.02), (0.999, 0.3), (0.1, 2.0)])
def test_at_t_0_the_term_is_the_likelihood_of_the_grey_level(mean, sigma):
    levels = column([k / 127.5 - 1 for k in range(256)])
    t = torch.zeros(256, dtype=torch.int64)
    args = torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(sigma))
    bits = Diffusion().variational_term(levels, levels, t, *args)
    want = [max(bin_mass(k, mean, sigma, tanh_cdf), 1e-12) for k in range(256)]
    assert_close("bits", bits, -np.log2(want), atol=1e-6)
    mass = 2**-bits
    exact = [bin_mass(k, mean, sigma, cdf) for k in range(256)]
    assert_close("mass", mass, exact, atol=4e-4)  # the tanh is within 2e-4 of the normal cdf
    assert mass.sum().item() == pytest.approx(1, abs=1e-6), "the end bins are open"


def test_likelihood_of_an_impossible_level_is_finite():
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    mean, log_scale = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([-6.0, -6.0, -6.0])
    out = discretized_log_likelihood(x, mean, log_scale)
    out.sum().backward()
    assert_close("log mass", out, [math.log(1e-12)] * 3, atol=1e-5)
    assert x.grad.isfinite().all()


def kl_in_bits(mean, log_variance, true_mean, true_variance):
    """KL(N(true_mean, true_variance) || N(mean, exp(log_variance))), the mean over the pixels."""
    ratio = (true_variance + (true_mean - mean) ** 2) / log_variance.exp()
    kl = (log_variance - math.log(true_variance) + ratio - 1) / 2
    return kl.mean() / math.log(2)


def test_the_term_is_a_likelihood_at_t_0_and_a_divergence_everywhere_else():
    diffusion, rows = Diffusion(250), chain(250)
    x0, x_t, mean, log_variance = (normal(3, 2, 3, 3, seed=s) for s in range(4))
    t = torch.tensor([0, 1, 249])
    together = diffusion.variational_term(x0, x_t, t, mean, log_variance)
    nll = -discretized_log_likelihood(x0[0], mean[0], log_variance[0] / 2).mean() / math.log(2)
    assert_close("t = 0", together[0], nll, atol=1e-12)
    for b in (1, 2):
        abar, previous, beta = rows[t[b]]
        true_variance = (1 - previous) / (1 - abar) * beta
        true_mean = posterior_mean(x0[b], x_t[b], abar, previous, beta)
        want = kl_in_bits(mean[b], log_variance[b], true_mean, true_variance)
        assert_close(f"t = {t[b]}", together[b], want, atol=1e-9)


def loss_of(diffusion, outputs, seed=0):
    """The losses of a model that returns `outputs`, its inputs, and the calls of the model."""
    n = len(outputs)
    x0, noise = normal(n, 2, 3, 3, seed=seed), normal(n, 2, 3, 3, seed=seed + 1)
    t, y = torch.arange(n) * (len(diffusion.timesteps) // n), torch.arange(n)
    calls = []
    losses = diffusion.loss(lambda *args: calls.append(args) or outputs, x0, y, t, noise)
    return losses, (x0, noise, t, y), calls


@pytest.mark.parametrize("steps", [None, 250])
def test_the_model_is_called_once_on_x_t_the_timestep_and_the_label(steps):
    _, (x0, noise, t, y), calls = loss_of(Diffusion(steps), normal(4, 4, 3, 3, seed=5))
    ((x_t, told, labels),) = calls
    assert torch.equal(labels, y)
    rows = chain(steps)
    for b in range(4):
        abar = rows[t[b]][0]
        want = math.sqrt(abar) * x0[b] + math.sqrt(1 - abar) * noise[b]
        assert_close("x_t", x_t[b], want, atol=1e-12)
        of_all_timesteps = t[b] if steps is None else round(t[b].item() * 999 / 249)
        assert told[b] == of_all_timesteps


@pytest.mark.parametrize("steps", [None, 250])
def test_the_loss_is_mean_square_plus_variational_term(steps):
    diffusion, outputs = Diffusion(steps), normal(4, 4, 3, 3, seed=5)
    (mse, vb), (_, noise, t, _), _ = loss_of(diffusion, outputs)
    assert mse.shape == vb.shape == (4,)
    rows = chain(steps)
    for b in range(4):
        eps, v = outputs[b, :2], outputs[b, 2:]
        assert_close("mse", mse[b], ((noise[b] - eps) ** 2).mean(), atol=1e-12)
        if t[b] == 0:
            continue  # the likelihood has its own test
        abar, previous, beta = rows[t[b]]
        variance = (1 - previous) / (1 - abar) * beta
        log_variance = math.log(variance) + (v + 1) / 2 * (math.log(beta) - math.log(variance))
        # two posteriors of the same x_t: their means differ by the share of x_0
        share = math.sqrt(previous) * beta / (1 - abar)
        shift = share * math.sqrt((1 - abar) / abar) * (noise[b] - eps)
        want = kl_in_bits(torch.zeros_like(shift), log_variance, shift, variance)
        assert_close("vb", vb[b], want, atol=1e-9)


def test_the_variational_term_trains_the_variance_only():
    outputs = normal(4, 4, 3, 3, seed=5).requires_grad_()
    (mse, vb), *_ = loss_of(Diffusion(), outputs)
    (from_vb,) = torch.autograd.grad(vb.sum(), outputs, retain_graph=True)
    (from_mse,) = torch.autograd.grad(mse.sum(), outputs)
    assert (from_vb[:, :2] == 0).all() and (from_vb[:, 2:] != 0).any((1, 2, 3)).all()
    assert (from_mse[:, 2:] == 0).all() and (from_mse[:, :2] != 0).all()


def test_a_perfect_model_has_no_loss():
    x0, noise, t = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), torch.tensor([1, 50, 999])
    perfect = torch.cat([noise, -torch.ones_like(noise)], 1)
    mse, vb = Diffusion().loss(lambda *_: perfect, x0, t, t, noise)
    assert_close("mse", mse, torch.zeros(3), atol=1e-12)
    assert_close("vb", vb, torch.zeros(3), atol=1e-9)


def test_the_loss_is_of_the_datas_type_whatever_the_model_returns():
    outputs, t = normal(2, 2, 3, 3).bfloat16(), torch.tensor([0, 400])
    x0 = normal(2, 1, 3, 3, dtype=torch.float32)
    losses = Diffusion().loss(lambda *_: outputs, x0, t, t, x0)
    assert all(z.dtype == torch.float32 for z in losses)


# ----------------------------------------------------------------------------------------------
# Guidance.


@stub
def labelled(x, t, y):
    """4 + 4 channels that all differ, and differ by label, timestep and place."""
    channel = torch.arange(1, 9).view(1, 8, 1, 1)
    label, time = (y + 1).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    return x.repeat(1, 2, 1, 1) * channel + label * channel**2 + time


@pytest.mark.parametrize("channels", [4, 3, 1])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_moves_the_first_channels_of_the_noise_away_from_no_label(scale, channels):
    x, t, y = normal(2, 4, 3, 3), torch.tensor([7, 900]), torch.tensor([3, 0])
    out = with_guidance(labelled, scale, channels)(x, t, y)
    conditional, unconditional = labelled(x, t, y), labelled(x, t, torch.tensor([10, 10]))
    for c in range(8):
        want = conditional[:, c]
        if c < channels:
            want = unconditional[:, c] + scale * (want - unconditional[:, c])
        assert_close(f"channel {c}", out[:, c], want, atol=1e-10)


def test_a_guidance_scale_of_one_is_the_model_itself():
    assert with_guidance(labelled, 1.0, 3) is labelled


def test_guidance_is_continuous_at_one():
    x, t, y = normal(2, 4, 3, 3), torch.tensor([7, 900]), torch.tensor([3, 0])
    nearly = with_guidance(labelled, 1 + 1e-9, 4)(x, t, y)
    assert_close("output", nearly, labelled(x, t, y), atol=1e-5)


# ----------------------------------------------------------------------------------------------
# Sampling. If x_0 ~ N(mu, s^2) in every pixel, the best noise prediction is known, and every x_t
# is Gaussian.


def oracle(diffusion, mu=0.0, s=1.0):
    """The best model of N(mu, s^2).

    eps = E[noise | x_t], and v is that of the true variance of x_{t-1} given x_t.
    """
    rows = chain(len(diffusion.timesteps))
    steps = {t.item(): row for t, row in zip(diffusion.timesteps, rows)}

    def best(x, t, y):
        eps, v = torch.empty_like(x), torch.empty_like(x)
        for b in range(len(x)):
            abar, previous, beta = steps[t[b].item()]
            spread = abar * s**2 + 1 - abar  # of x_t
            eps[b] = math.sqrt(1 - abar) * (x[b] - math.sqrt(abar) * mu) / spread
            if previous < 1:
                low = (1 - previous) / (1 - abar) * beta
                uncertainty = s**2 * (1 - abar) / spread  # of x_0 given x_t
                true = low + previous * (beta / (1 - abar)) ** 2 * uncertainty
                v[b] = 2 * (math.log(true) - math.log(low)) / (math.log(beta) - math.log(low)) - 1
            else:
                v[b] = 0
        return torch.cat([eps, v], 1)

    return stub(best, size=96)  # 96 x 96 draws an image, from few generators


# Ancestral steps are exact with this model; a ddim step makes the error of an Euler step, which
# is given as a share of s.
RUNS = [("ddpm", 1000, 0), ("ddpm", 50, 0), ("ddim", 250, 0.02), ("ddim", 20, 0.15)]


@pytest.mark.parametrize("sampler, steps, error", RUNS)
@pytest.mark.parametrize("mu, s", [(0.7, 0.4), (-0.2, 1e-3), (0.0, 1.0)])
def test_samplers_draw_from_the_data(sampler, steps, error, mu, s):
    diffusion = Diffusion(steps)
    model = oracle(diffusion, mu, s)
    x = diffusion.sample(model, torch.tensor([0]), [0], seed=0, sampler=sampler).double()
    # the last step gives the mean of x_0 given x_1, which spreads less
    s = s**2 / math.sqrt(s**2 + 1e-4 / (1 - 1e-4))
    print(f"mean {x.mean():.5f} of {mu}, std {x.std():.6f} of {s:.6f}")
    assert x.mean().item() == pytest.approx(mu, abs=4 * s / x.numel() ** 0.5)
    assert x.std().item() == pytest.approx(s, rel=4 / (2 * x.numel()) ** 0.5 + error)
    z = (x - x.mean()) / x.std()
    assert abs((z**3).mean().item()) < 0.15, "no skew, as of a Gaussian"
    assert abs((z**4).mean().item() - 3) < 0.3, "the tails of a Gaussian"


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_its_recursion(clip):
    """x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) eps.

    x_0 is the model's, clipped if asked, and eps the noise that fits it.
    """
    diffusion, seen = Diffusion(12), []

    @stub
    def model(x, t, y):
        seen.append(x.clone())
        return torch.cat([0.3 * x + 0.1, torch.zeros_like(x)], 1)

    out = diffusion.sample(model, torch.tensor([0, 0]), [0, 1], seed=3, sampler="ddim", clip=clip)
    for (abar, previous, _), x, after in zip(reversed(chain(12)), seen, [*seen[1:], out]):
        x, eps = x.double(), 0.3 * x.double() + 0.1
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        want = math.sqrt(previous) * x0 + math.sqrt(1 - previous) * eps
        assert_close("x", after, want, atol=1e-4, rtol=1e-4)
    assert not clip or out.abs().max() <= 1


@stub
def silent(x, t, y):
    """A model that predicts no noise."""
    return torch.zeros(len(x), 2, 1, 1)


def test_the_model_is_told_timesteps_from_last_to_first_and_the_labels():
    calls = []

    @stub
    def model(x, t, y):
        calls.append((t.tolist(), y.tolist()))
        return silent(x, t, y)

    Diffusion(5).sample(model, torch.tensor([3, 9]), [0, 1], seed=0)
    assert calls == [([t, t], [3, 9]) for t in (999, 749, 500, 250, 0)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_on_step_gets_the_images_after_every_step(sampler):
    seen, calls = [], []

    @stub
    def model(x, t, y):
        calls.append(x.clone())
        return silent(x, t, y)

    how = {"seed": 0, "sampler": sampler, "on_step": lambda x: seen.append(x.clone())}
    out = Diffusion(5).sample(model, torch.tensor([3, 9]), [0, 1], **how)
    assert len(seen) == 5 and torch.equal(seen[-1], out)
    assert all(torch.equal(after, before) for after, before in zip(seen, calls[1:]))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    "cfg, cfg_channels, want",
    [(1.0, None, [1, 1, 1, 1]), (2.0, None, [2, 2, 2, 2]), (2.0, 3, [2, 2, 2, 1])],
)
def test_guidance_reaches_the_sampler(sampler, cfg, cfg_channels, want):
    """Labels shift the mean of the data: guidance by 2 doubles the shift of the guided channels."""
    diffusion = Diffusion(100)
    steps = {t.item(): row for t, row in zip(diffusion.timesteps, chain(100))}

    def model(x, t, y):
        abar, *_ = steps[t[0].item()]
        mu = torch.where(y == 10, 0.0, 0.1 * y).view(-1, 1, 1, 1)
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * mu) / (abar * 0.01**2 + 1 - abar)
        return torch.cat([eps, -torch.ones_like(eps)], 1)

    stub(model, channels=4, size=8)
    y = torch.tensor([2, 5])
    how = {"seed": 0, "cfg": cfg, "cfg_channels": cfg_channels, "sampler": sampler}
    x = diffusion.sample(model, y, [0, 1], **how)
    assert_close("means", x.mean((2, 3)), 0.1 * y.view(2, 1) * torch.tensor(want), atol=0.01)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_image_i_depends_on_the_seed_and_i_alone(sampler):
    def model(x, t, y):
        return torch.cat([torch.tanh(x) * (1 + 0.1 * y.view(-1, 1, 1, 1)), x.cos()], 1)

    stub(model, channels=2, size=4)
    diffusion, y = Diffusion(6), torch.tensor([4, 1, 7, 0, 9, 2, 2, 5])

    def sample(index, seed=5):
        return diffusion.sample(model, y[index], index, seed=seed, sampler=sampler)

    together = sample(list(range(8)))
    assert torch.equal(sample([3]), together[[3]])
    shuffled = [6, 0, 3, 7, 1, 5, 4, 2]
    assert torch.equal(sample(shuffled), together[shuffled])
    assert torch.equal(sample([5, 5]), together[[5, 5]])
    assert (together[5] - together[6]).abs().min() > 0, "the label is the same, the image is not"
    assert (sample([3], seed=6) - together[[3]]).abs().min() > 0


def test_image_i_is_the_same_in_any_batch_of_the_network():
    config = dydilit.Config(
        input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_classes=3
    )
    model = dydilit.DyDiLiT(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    diffusion, y = Diffusion(5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    # without clip, x_0 = x_t / 0.006 at the first step magnifies rounding
    how = {"seed": 1, "cfg": 1.5, "clip": True}
    together = diffusion.sample(model, y, range(8), **how)
    assert together.dtype == torch.float32 and (together[3].abs() < 1).any()
    alone = diffusion.sample(model, y[[3]], [3], **how)
    assert_close("image 3", alone, together[[3]], atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clip_keeps_pixels_in_range(sampler):
    def wild(x, t, y):
        return torch.cat([-3 * torch.ones_like(x), torch.zeros_like(x)], 1)

    stub(wild, size=4)
    how = {"seed": 0, "sampler": sampler}
    clipped = Diffusion(10).sample(wild, torch.tensor([0]), [0], clip=True, **how)
    free = Diffusion(10).sample(wild, torch.tensor([0]), [0], clip=False, **how)
    assert clipped.abs().max() <= 1 and free.abs().max() > 2


def test_sampling_makes_no_graph():
    weight = torch.ones(1, requires_grad=True)
    model = stub(lambda x, t, y: weight * torch.cat([x, x], 1))
    assert not Diffusion(2).sample(model, torch.tensor([0]), [0], seed=0).requires_grad


@pytest.mark.parametrize("labels", [[10], [0, -1], [3, 11]])
def test_a_label_outside_the_classes_is_an_error(labels):
    index = range(len(labels))
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 9"):
        Diffusion(2).sample(silent, torch.tensor(labels), index, seed=0)


def test_an_unknown_sampler_is_an_error():
    with pytest.raises(ValueError, match="'ddpm' or 'ddim', got 'euler'"):
        Diffusion(2).sample(silent, torch.tensor([0]), [0], seed=0, sampler="euler")


# ----------------------------------------------------------------------------------------------
# Randomness by address.


def test_the_streams_of_two_addresses_do_not_overlap_not_even_shifted():
    words = [
        generator(seed, purpose, a, b).bit_generator.random_raw(32)
        for seed in range(4)
        for purpose in range(4)
        for a in (0, 1, 2, 1000)
        for b in (0, 1, 2, 255)
    ]
    assert len(np.unique(np.concatenate(words))) == 32 * len(words)


def test_an_address_gives_the_same_stream_every_time():
    one, again = (generator(3, 1, 2, 4).bit_generator.random_raw(32) for _ in range(2))
    assert (one == again).all()


LINES = {
    "a": lambda i: generator(0, 1, i),
    "b": lambda i: generator(0, 1, 7, i),
    "seed": lambda i: generator(i, 3),
}


@pytest.mark.parametrize("line", LINES)
def test_neighbouring_addresses_are_as_random_as_neighbouring_draws(line):
    """The first number of each address on a line of them."""
    first = np.array([LINES[line](i).standard_normal() for i in range(4000)])
    assert abs(first.mean()) < 5 / 4000**0.5 and abs(first.std() - 1) < 5 / 8000**0.5
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / 4000**0.5


def test_purposes_differ():
    purposes = {dydilit.ORDER, dydilit.STEP, dydilit.HELD_OUT, dydilit.SAMPLE}
    assert len(purposes) == 4
