"""Samplers that need only the present sample: DDPM, DDIM, Euler, Euler ancestral, LCM, and Heun's two-row step.

All but DDPM and LCM are one formula. From t to s < t, with the new noise's standard deviation sigma,
x_s = signal_s * x0_hat + sqrt(noise_s^2 - sigma^2) * eps_hat + sigma * z.  Song et al. 2021, eq. 12, arXiv:2010.02502.
Euler's step in x / signal, x_s / signal_s = x_t / signal_t + (ratio_s - ratio_t) * eps_hat, is the same thing for
sigma = 0 once x_t is written out (Karras et al. 2022, eq. 81 and algorithm 1, arXiv:2206.00364).
"""

from itertools import pairwise

import numpy as np

from latentdiff.diffusion.sampler_rows import EPS, NOISE, X0, A, B, Row, X, combination, row
from latentdiff.diffusion.sampler_times import Level


def ddim_rows(levels: list[Level], eta: float) -> list[Row]:
    """DDIM from level to level: eta 0 is deterministic, eta 1 is DDPM.

    The same rows are Euler's for eta 0 and Euler ancestral's for eta 1.

    Args:
        levels: those visited, and the final one.
        eta: share of DDPM's standard deviation, in [0, 1].

    Returns:
        One row per visited level.

    Reference:
        Song et al. 2021, eqs. 12 and 16, arXiv:2010.02502.
    """
    rows = []
    for t, s in pairwise(levels):
        sigma = eta * np.sqrt(_posterior_variance(t, s))
        direction = np.sqrt(max(s.noise**2 - sigma**2, 0.0))
        x_s = combination((X0, s.signal), (EPS, direction), (NOISE, sigma))
        rows.append(row(t, x_s))
    return rows


def ddpm_rows(levels: list[Level]) -> list[Row]:
    """Ancestral sampling with the smaller of Ho's two variances, from level to level.

    Args:
        levels: those visited, and the final one.

    Returns:
        One row per visited level.

    Reference:
        Ho et al. 2020, eqs. 6 and 7, arXiv:2006.11239.
    """
    rows = []
    for t, s in pairwise(levels):
        step_signal = t.signal / s.signal
        x0_coefficient = s.signal * (1 - step_signal**2) / t.noise**2
        x_coefficient = step_signal * s.noise**2 / t.noise**2
        sigma = np.sqrt(_posterior_variance(t, s))
        x_s = combination((X0, x0_coefficient), (X, x_coefficient), (NOISE, sigma))
        rows.append(row(t, x_s))
    return rows


def heun_rows(levels: list[Level]) -> list[Row]:
    """Heun's second-order step: Euler's to s (kept: x_t in slot a, eps_hat in slot b), then again with the mean slope.

    The step to a clean end has no slope at its end, and a step from a level without signal no finite difference of
    ratios at its start; both are Euler's, one row.

    Args:
        levels: those visited, and the final one.

    Returns:
        Two rows per visited level, less those of the steps that are Euler's.

    Reference:
        Karras et al. 2022, algorithm 1 without churn, arXiv:2206.00364.
    """
    rows = []
    for t, s in pairwise(levels):
        euler = combination((X0, s.signal), (EPS, s.noise))
        rows.append(row(t, euler, a=combination((X, 1.0)), b=combination((EPS, 1.0))))
        if s.noise == 0 or t.is_pure_noise:
            continue
        half_step = s.signal * (s.ratio - t.ratio) / 2
        x_s = combination((A, s.signal / t.signal), (B, half_step), (EPS, half_step))
        rows.append(row(s, x_s))
    return rows


def lcm_rows(levels: list[Level], timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> list[Row]:
    """Multistep consistency sampling: to x0 in one go, then back up to the next level with fresh noise.

    The consistency function c_skip * x_t + c_out * x0_hat is linear in both, so it is in the row.

    Args:
        levels: those visited, and the final one, which is not used: the last row ends at x0.
        timestep_scaling: multiplies the timestep in c_skip and c_out.
        sigma_data: standard deviation of the data in c_skip and c_out.

    Returns:
        One row per visited level.

    Reference:
        Luo et al. 2023, eqs. 8 to 10 and algorithm 3, arXiv:2310.04378.
    """
    rows = []
    visited = levels[:-1]
    for t, s in zip(visited, [*visited[1:], None], strict=True):
        scaled = t.timestep * timestep_scaling
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
        signal, noise = (s.signal, s.noise) if s else (1.0, 0.0)
        x_s = combination((X, signal * c_skip), (X0, signal * c_out), (NOISE, noise))
        rows.append(row(t, x_s))
    return rows


def _posterior_variance(t: Level, s: Level) -> float:
    """Variance of x_s given x_t and x0. Ho et al. 2020, eq. 7; DDIM's sigma^2 at eta 1."""
    beta = 1 - (t.signal / s.signal) ** 2
    return max(s.noise**2 / t.noise**2 * beta, 0.0)
