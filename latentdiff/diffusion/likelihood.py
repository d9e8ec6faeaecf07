"""How likely the data is under a diffusion model: its variational bound, term by term, in nats and in bits.

    -log p(x0) <= L_T + L_{T-1} + ... + L_0
    L_T = KL(q(x_T | x0) || N(0, 1)),  L_{t-1} = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  L_0 = -log p(x0 | x_1)

Ho et al. 2020, eqs. 5 and 13, arXiv:2006.11239.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from latentdiff.diffusion.process import GaussianDiffusion, as_float32

# erfc(z) = u exp(-z^2 + P(u)), u = 1 / (1 + z / 2), z >= 0, to 1.2e-7 of its value: Press et al. 1992, "Numerical
# recipes", section 6.2. Constant term first.
_ERFC_COEFFICIENTS = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def gaussian_kl(mean_1: Any, log_variance_1: Any, mean_2: Any, log_variance_2: Any) -> Any:
    """KL divergence of two Gaussians, element by element: KL(N(mean_1, ...) || N(mean_2, ...)).

    Args:
        mean_1, log_variance_1, mean_2, log_variance_2: broadcastable.

    Returns:
        Nats, of the broadcast shape, never negative beyond rounding.
    """
    mean_1, log_variance_1, mean_2, log_variance_2 = map(as_float32, (mean_1, log_variance_1, mean_2, log_variance_2))
    change = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * ops.exp(-log_variance_2)
    # exp(change) - 1 - change, without the cancellation where the variances are almost equal.
    return 0.5 * (ops.expm1(change) - change + distance)


def gaussian_log_likelihood(x: Any, mean: Any, log_variance: Any) -> Any:
    """Log density of a Gaussian, element by element.

    Args:
        x, mean, log_variance: broadcastable.

    Returns:
        Nats, of the broadcast shape.
    """
    x, mean, log_variance = map(as_float32, (x, mean, log_variance))
    distance = (x - mean) ** 2 * ops.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + distance)


def discretised_gaussian_log_likelihood(x: Any, mean: Any, log_variance: Any, bins: int = 256) -> Any:
    """Log probability that a Gaussian gives to the bin around x, element by element. Ho et al. 2020, eq. 13.

    The bins are 2 / (bins - 1) wide around -1 .. 1; the outermost reach to infinity, so that they sum to one. Accurate
    in the tails too: nothing is cut off at a smallest probability, as Ho's code does at 1e-12.

    Args:
        x: one of `bins` values in [-1, 1], evenly spaced: 2 k / (bins - 1) - 1.
        mean, log_variance: broadcastable with x.
        bins: number of values, at least 2.

    Returns:
        Nats, of the broadcast shape.

    Raises:
        ValueError: if `bins` is less than 2.
    """
    if bins < 2:
        raise ValueError(f"`bins` must be at least 2. Received: {bins}.")
    x, mean, log_variance = map(as_float32, (x, mean, log_variance))
    half = 1.0 / (bins - 1)
    inverse_std = ops.exp(-0.5 * log_variance)
    lower = (x - half - mean) * inverse_std
    upper = (x + half - mean) * inverse_std
    is_first = x < -1 + half
    is_last = x > 1 - half

    # A bin right of the mean is looked at in the mirror, since small probabilities are exact on the left alone.
    is_right = lower + upper > 0
    left = ops.where(is_right, -upper, lower)
    right = ops.where(is_right, -lower, upper)
    log_right = _log_normal_cdf(right)
    inside = log_right + _log1mexp(log_right - _log_normal_cdf(left))
    outermost = _log_normal_cdf(ops.where(is_first, upper, -lower))
    return ops.where(ops.logical_or(is_first, is_last), outermost, inside)


def prior_kl(process: GaussianDiffusion, x0: Any) -> Any:
    """L_T: how far the end of the forward process is from standard normal noise.

    Args:
        process: the diffusion process.
        x0: (B, ...) clean data.

    Returns:
        Nats (B,), the sum over all axes but the first.
    """
    x0 = as_float32(x0)
    signal = float(process.schedule.signal[-1])
    log_variance = 2 * math.log(process.schedule.noise[-1])
    # The variance's share in float64; its difference from 1 may be 1e-5.
    variance_kl = 0.5 * (math.expm1(log_variance) - log_variance)
    return _sum(0.5 * (signal * x0) ** 2 + variance_kl)


def vlb_term(
    process: GaussianDiffusion,
    x0: Any,
    x_t: Any,
    t: Any,
    x0_hat: Any,
    log_variance: Any = None,
    bins: int | None = 256,
) -> Any:
    """L_{t-1}: what one step of the reverse process adds to the bound.

    p(x_{t-1} | x_t) has the posterior's mean for x0_hat. For t >= 2 the term is its KL divergence from the posterior
    for x0; for t = 1 it is -log p(x0 | x_1).

    Args:
        process: the diffusion process.
        x0: (B, ...) clean data; with `bins`, of its values in [-1, 1].
        x_t: (B, ...) sample of q(x_t | x0).
        t: (B,) int in 1..T.
        x0_hat: (B, ...) the model's estimate of x0.
        log_variance: of p(x_{t-1} | x_t), broadcastable to x_t; None is the posterior's, "fixed small" in the papers.
        bins: number of values that data has in [-1, 1]; None takes the density of continuous data.

    Returns:
        Nats (B,), the sum over all axes but the first.

    Reference:
        Ho et al. 2020, eqs. 5 and 13, arXiv:2006.11239.
    """
    x0 = as_float32(x0)
    mean, _, posterior_log_variance = process.q_posterior(x0, x_t, t)
    model_mean, _, _ = process.q_posterior(x0_hat, x_t, t)
    log_variance = posterior_log_variance if log_variance is None else as_float32(log_variance)
    kl = _sum(gaussian_kl(mean, posterior_log_variance, model_mean, log_variance))
    if bins is None:
        log_likelihood = gaussian_log_likelihood(x0, model_mean, log_variance)
    else:
        log_likelihood = discretised_gaussian_log_likelihood(x0, model_mean, log_variance, bins)
    return ops.where(ops.equal(t, 1), -_sum(log_likelihood), kl)


def variational_bound(
    process: GaussianDiffusion,
    denoise: Callable[[Any, Any], Any],
    x0: Any,
    noise: Callable[[int], Any],
    bins: int | None = 256,
) -> dict[str, Any]:
    """The bound of -log p(x0), with one sample of x_t for each of its T terms.

    Args:
        process: the diffusion process.
        denoise: takes x_t (B, ...) and t int (B,) in 1..T, and gives x0_hat (B, ...).
        x0: (B, ...) clean data; with `bins`, of its values in [-1, 1].
        noise: takes t and gives standard normal noise (B, ...), new for each t.
        bins: number of values that data has in [-1, 1]; None takes the density of continuous data.

    Returns:
        In nats, "total": (B,), "prior": (B,) and "terms": (T, B), whose row t - 1 is L_{t-1}.
    """
    x0 = as_float32(x0)
    terms = []
    for time in range(1, process.schedule.T + 1):
        t = np.full((x0.shape[0],), time, dtype=np.int32)
        x_t = process.q_sample(x0, t, noise(time))
        terms.append(vlb_term(process, x0, x_t, t, denoise(x_t, t), bins=bins))
    terms = ops.stack(terms)  # (T, B)
    prior = prior_kl(process, x0)
    return {"total": prior + ops.sum(terms, axis=0), "prior": prior, "terms": terms}


def bits_per_dimension(nats: Any, num_dimensions: int) -> Any:
    """A negative log likelihood in bits for each number of the data.

    Args:
        nats: any shape, of a whole example.
        num_dimensions: how many numbers an example has, for example H * W * C.

    Returns:
        nats / (num_dimensions log 2), of the same shape.

    Raises:
        ValueError: if `num_dimensions` is less than 1.
    """
    if num_dimensions < 1:
        raise ValueError(f"`num_dimensions` must be at least 1. Received: {num_dimensions}.")
    return nats / (num_dimensions * math.log(2))


def _sum(values: Any) -> Any:
    return ops.sum(values, axis=tuple(range(1, len(values.shape))))


def _log_normal_cdf(z: Any) -> Any:
    """log P(Z <= z), to about 1e-7 of the probability for z <= 0 however small."""
    distance = ops.abs(z) * math.sqrt(0.5)
    u = 1.0 / (1.0 + 0.5 * distance)
    polynomial = _ERFC_COEFFICIENTS[-1] * ops.ones_like(u)
    for coefficient in reversed(_ERFC_COEFFICIENTS[:-1]):
        polynomial = polynomial * u + coefficient
    log_tail = ops.log(0.5 * u) - distance**2 + polynomial
    return ops.where(z <= 0, log_tail, ops.log1p(-ops.exp(log_tail)))


def _log1mexp(x: Any) -> Any:
    """log(1 - exp(-x)) for x > 0."""
    # Each branch is kept where it is finite, since a gradient flows through both.
    small = ops.log(-ops.expm1(-ops.clip(x, 1e-30, math.log(2))))
    large = ops.log1p(-ops.exp(-ops.maximum(x, math.log(2))))
    return ops.where(x < math.log(2), small, large)
