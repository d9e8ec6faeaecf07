"""Laws of the variational bound: divergences against integrals, probabilities that sum to one, an exact model."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.likelihood import (
    bits_per_dimension,
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_log_likelihood,
    prior_kl,
    variational_bound,
    vlb_term,
)
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import cosine_schedule, linear_schedule, scaled_linear_schedule

SHAPES = [(2, 32, 32, 3), (2, 8, 8, 4), (2, 16000), (2, 64, 128)]


def array(tensor):
    return ops.convert_to_numpy(tensor)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


@pytest.mark.parametrize("mean_1", [0.0, -1.5])
@pytest.mark.parametrize("log_variance_1", [-3.0, 0.7])
@pytest.mark.parametrize("log_variance_2", [-1.0, 0.7])
def test_kl_of_gaussians_agrees_with_its_integral(mean_1, log_variance_1, log_variance_2):
    mean_2 = 0.4
    x = np.linspace(-20, 20, 200001)
    log_p = -0.5 * ((x - mean_1) ** 2 * np.exp(-log_variance_1) + log_variance_1)
    log_q = -0.5 * ((x - mean_2) ** 2 * np.exp(-log_variance_2) + log_variance_2)
    density = np.exp(log_p) / np.sqrt(2 * np.pi)
    expected = (density * (log_p - log_q)).sum() * (x[1] - x[0])
    kl = array(gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2))
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_kl_of_almost_equal_gaussians_is_not_rounded_away():
    # (exp(d) - 1 - d) / 2 = d^2 / 4 + ...
    np.testing.assert_allclose(array(gaussian_kl(0.0, 1e-3, 0.0, 0.0)), 2.5008e-7, rtol=1e-3)
    assert array(gaussian_kl(0.3, -2.0, 0.3, -2.0)).item() == 0


def test_gaussian_density_integrates_to_one():
    x = np.linspace(-12, 12, 24001)
    density = np.exp(array(gaussian_log_likelihood(x, 0.5, -1.0)).astype(np.float64))
    np.testing.assert_allclose(density.sum() * (x[1] - x[0]), 1, rtol=1e-5)
    # log N(0; 0, 1) = -log(2 pi) / 2
    np.testing.assert_allclose(array(gaussian_log_likelihood(0.0, 0.0, 0.0)), -0.9189385, rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 0.3, -0.999, 1.0, 1.4, -3.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 5.0])
def test_discretised_gaussian_sums_to_one(mean, std):
    values = 2 * np.arange(256) / 255 - 1
    log_likelihood = array(discretised_gaussian_log_likelihood(values, mean, 2 * math.log(std)))
    assert np.isfinite(log_likelihood).all()
    np.testing.assert_allclose(np.exp(log_likelihood.astype(np.float64)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("bins", [2, 5, 256])
def test_discretised_gaussian_agrees_with_differences_of_the_distribution(bins):
    values = 2 * np.arange(bins) / (bins - 1) - 1
    mean, std = 0.2, 0.25
    edges = [-math.inf, *((values[1:] + values[:-1]) / 2), math.inf]
    expected = []
    for lower, upper in zip(edges[:-1], edges[1:], strict=True):
        lower, upper = (lower - mean) / std, (upper - mean) / std
        # The smaller tail is the exact one.
        probability = normal_cdf(-lower) - normal_cdf(-upper) if lower > 0 else normal_cdf(upper) - normal_cdf(lower)
        expected.append(math.log(probability))
    log_likelihood = array(discretised_gaussian_log_likelihood(values, mean, 2 * math.log(std), bins))
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-4, atol=1e-4)


def test_discretised_gaussian_is_exact_far_out_in_the_tails():
    # Thirty standard deviations away: log P(Z > 30) = -454.3212 (Abramowitz and Stegun, eq. 26.2.12).
    lower_edge = 1 - 1 / 255
    last = discretised_gaussian_log_likelihood(1.0, lower_edge - 30 * 0.01, 2 * math.log(0.01))
    np.testing.assert_allclose(array(last), -454.3212, rtol=1e-5)
    first = discretised_gaussian_log_likelihood(-1.0, -lower_edge + 30 * 0.01, 2 * math.log(0.01))
    np.testing.assert_allclose(array(first), -454.3212, rtol=1e-5)


def test_discretised_gaussian_with_narrow_bins_is_the_density_times_the_width():
    values = np.array([-0.5, 0.0, 0.25])
    log_likelihood = discretised_gaussian_log_likelihood(values, 0.1, -1.0, bins=257)
    expected = array(gaussian_log_likelihood(values, 0.1, -1.0)) + math.log(2 / 256)
    np.testing.assert_allclose(array(log_likelihood), expected, atol=1e-4)


def test_discretised_gaussian_has_finite_gradients():
    values = ops.convert_to_tensor(np.array([-1.0, -0.2, 1 / 255, 0.9, 1.0], np.float32))

    def total(log_variance):
        return ops.sum(discretised_gaussian_log_likelihood(values, 0.003, log_variance))

    at = ops.convert_to_tensor(np.array([-14.0, -9.0, -3.0, 0.0, 3.0], np.float32))
    if keras.backend.backend() == "jax":
        import jax

        slope = jax.grad(total)(at)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(at)
            value = total(at)
        slope = tape.gradient(value, at)
    step = 0.02
    expected = [
        (
            array(discretised_gaussian_log_likelihood(x, 0.003, float(v) + step)).item()
            - array(discretised_gaussian_log_likelihood(x, 0.003, float(v) - step)).item()
        )
        / (2 * step)
        for x, v in zip(array(values), array(at), strict=True)
    ]
    np.testing.assert_allclose(array(slope), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_prior_term_of_the_ddpm_schedule_is_almost_nothing(shape):
    x0 = np.clip(draw(shape) * 0.5, -1, 1)
    nats = array(prior_kl(GaussianDiffusion(linear_schedule()), x0))
    assert nats.shape == (2,)
    # "approximately 1e-5 bits per dimension", Ho et al. 2020, section 4.
    bits = array(bits_per_dimension(nats, math.prod(shape[1:])))
    assert (0 < bits).all() and (bits < 2e-5).all()


def test_prior_term_agrees_with_kl_of_gaussians():
    schedule = scaled_linear_schedule()  # alpha_bar at the end 0.0046601
    x0 = draw((3, 7))
    expected = array(gaussian_kl(math.sqrt(0.0046600983) * x0, math.log1p(-0.0046600983), 0.0, 0.0)).sum(axis=1)
    np.testing.assert_allclose(array(prior_kl(GaussianDiffusion(schedule), x0)), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_term_of_the_simple_loss_is_its_weighted_square(shape):
    # Ho et al. 2020, eq. 12: KL = beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps - eps_hat|^2, with sigma^2 = beta.
    process = GaussianDiffusion(linear_schedule())
    t = 300
    betas = np.linspace(1e-4, 0.02, 1000)
    beta, alpha_bar = betas[t - 1], np.cumprod(1 - betas)[t - 1]
    x0, eps, error = 0.3 * draw(shape), draw(shape, 1), 0.2 * draw(shape, 2)
    x_t = process.q_sample(x0, t, eps)
    x0_hat = process.x0_from_eps(x_t, t, eps + error)
    term = array(vlb_term(process, x0, x_t, t, x0_hat, log_variance=math.log(beta)))
    of_means = beta / (2 * (1 - beta) * (1 - alpha_bar)) * (error.astype(np.float64) ** 2).reshape(2, -1).sum(axis=1)
    posterior_variance = (1 - np.cumprod(1 - betas)[t - 2]) / (1 - alpha_bar) * beta
    ratio = posterior_variance / beta
    of_variances = 0.5 * (ratio - 1 - math.log(ratio)) * math.prod(shape[1:])
    np.testing.assert_allclose(term, of_means + of_variances, rtol=1e-3)


def test_a_perfect_estimate_costs_nothing_but_the_last_step():
    process = GaussianDiffusion(linear_schedule())
    x0 = np.round((draw((2, 8, 8, 4)) * 40).clip(-127, 127) + 127.5 - 0.5) * 2 / 255 - 1
    x_t = process.q_sample(x0, np.array([1, 700]), draw(x0.shape, 1))
    terms = array(vlb_term(process, x0, x_t, np.array([1, 700]), x0))
    assert terms[1] == 0
    # The bin of x0 is +- 1/255 wide, its standard deviation sqrt(5.45318766e-5), the middle of 0.405 of the mass.
    probability = 1 - 2 * normal_cdf(-(1 / 255) / math.sqrt(5.45318766e-5))
    np.testing.assert_allclose(terms[0], -math.log(probability) * 256, rtol=1e-3)


@pytest.mark.parametrize("make_schedule", [cosine_schedule, lambda T: linear_schedule(T, 1e-3, 0.3)])
def test_bound_of_an_exact_gaussian_model_is_the_negative_log_likelihood(make_schedule):
    """Data N(mean, std^2) has Gaussian reverse steps, so that the bound's expectation has only the prior's error left:

    E[bound] = entropy of the data + KL(q(x_T) || N(0, 1))
    """
    mean, std = 0.4, 0.7
    schedule = make_schedule(20)
    process = GaussianDiffusion(schedule)
    # Each term is a quadratic in (x0, eps), which three nodes for each of them integrate exactly.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    x0 = (mean + std * np.repeat(nodes, 3)).reshape(9, 1)
    eps = np.tile(nodes, 3).reshape(9, 1)
    weight = np.repeat(weights, 3) * np.tile(weights, 3)

    total = weight @ array(prior_kl(process, x0)).astype(np.float64)
    for t in range(1, schedule.T + 1):
        signal, noise, signal_s, noise_s = (
            table[index] for index in (t, t - 1) for table in (schedule.signal, schedule.noise)
        )
        marginal = signal**2 * std**2 + noise**2
        x_t = process.q_sample(x0, t, eps)
        x0_hat = mean + signal * std**2 / marginal * (array(x_t) - signal * mean)
        # Var[x_s | x_t]: that of x_s less what x_t explains of it.
        gain = signal / signal_s
        marginal_s = signal_s**2 * std**2 + noise_s**2
        log_variance = math.log(marginal_s - (gain * marginal_s) ** 2 / marginal)
        term = vlb_term(process, x0, x_t, np.full(9, t), x0_hat, log_variance=log_variance, bins=None)
        total += weight @ array(term).astype(np.float64)

    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    end_mean, end_variance = schedule.signal[-1] * mean, schedule.signal[-1] ** 2 * std**2 + schedule.noise[-1] ** 2
    of_the_end = 0.5 * (end_mean**2 + end_variance - 1 - math.log(end_variance))
    np.testing.assert_allclose(total, entropy + of_the_end, rtol=1e-4)


def test_bound_is_the_sum_of_its_terms():
    process = GaussianDiffusion(linear_schedule(6, 0.01, 0.5))
    x0 = np.array([[-1.0, 0.2, 1.0], [0.6, -0.6, -0.2]])
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        return 0.5 * x_t

    def noise(t):
        return draw(x0.shape, t)

    bound = variational_bound(process, denoise, x0, noise, bins=11)
    assert [list(t) for t in seen] == [[t, t] for t in range(1, 7)]
    terms = array(bound["terms"])
    assert terms.shape == (6, 2)
    np.testing.assert_allclose(array(bound["prior"]), array(prior_kl(process, x0)), rtol=1e-6)
    np.testing.assert_allclose(array(bound["total"]), array(bound["prior"]) + terms.sum(axis=0), rtol=1e-5)
    for t in range(1, 7):
        x_t = process.q_sample(x0, t, noise(t))
        expected = vlb_term(process, x0, x_t, t, 0.5 * array(x_t), bins=11)
        np.testing.assert_allclose(terms[t - 1], array(expected), rtol=1e-5)


def test_bound_is_no_less_than_the_negative_log_likelihood():
    # Data that is +1 or -1 with equal chance, its exact denoiser tanh: nothing codes it in less than one bit.
    process = GaussianDiffusion(cosine_schedule(50))
    schedule = process.schedule
    x0 = np.sign(draw((1500, 1)))

    def denoise(x_t, t):
        signal, noise = schedule.signal[t][:, None], schedule.noise[t][:, None]
        return np.tanh(signal / noise**2 * array(x_t))

    bound = variational_bound(process, denoise, x0, lambda t: draw(x0.shape, t), bins=2)
    bits = array(bits_per_dimension(bound["total"], 1)).mean()
    # Not far above it either, since 50 steps are many for one number.
    assert 1 - 0.03 < bits < 1.2


def test_bits_are_nats_over_log_two_and_dimensions():
    np.testing.assert_allclose(array(bits_per_dimension(np.array([math.log(2), 6 * math.log(2)]), 3)), [1 / 3, 2])
    # A uniform guess over 256 values is 8 bits.
    np.testing.assert_allclose(bits_per_dimension(3072 * math.log(256), 3072), 8)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="`num_dimensions` must be at least 1"):
        bits_per_dimension(1.0, 0)
    with pytest.raises(ValueError, match="`bins` must be at least 2"):
        discretised_gaussian_log_likelihood(0.0, 0.0, 0.0, bins=1)
