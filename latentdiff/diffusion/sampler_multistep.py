"""Samplers that remember earlier outputs: PNDM, DPM-Solver++ 2M, its SDE form, and UniPC.

DPM-Solver++ and UniPC step in lambda = log(signal / noise) and interpolate x0_hat in it: with h = lambda_s - lambda_t,
x_s = (noise_s / noise_t) x_t + signal_s (1 - e^-h) D, where D is x0_hat extrapolated to the middle of the step.
Lu et al. 2022, eq. 9 and algorithm 2, arXiv:2211.01095; Zhao et al. 2023, eqs. 3 and 9, arXiv:2302.04867.
"""

from itertools import pairwise

import numpy as np

from latentdiff.diffusion.sampler_rows import EPS, NOISE, X0, A, B, C, Row, X, combination, row
from latentdiff.diffusion.sampler_times import CLEAN, Level

# Adams-Bashforth of orders 2, 3 and 4, the present output first.
_ADAMS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm_rows(levels: list[Level], prediction: str) -> list[Row]:
    """Pseudo linear multistep without Runge-Kutta steps, as Stable Diffusion uses it: n + 1 rows for n > 1 steps.

    Outputs of up to four rows are combined with the weights of Adams-Bashforth and stand in for eps_hat in DDIM's
    step. To begin, the first step is made twice, the second time with the mean of both ends' outputs, so the network
    is asked about the second level twice. Slots a, b, c hold earlier outputs; c holds x meanwhile.

    Args:
        levels: those visited, and the final one.
        prediction: "v" combines v and then makes eps_hat of it, as diffusers does for networks that predict v (its
            issue 14816: the order of convergence falls to 1). "eps" and "x0" combine eps_hat, as the paper does.

    Returns:
        The rows.

    Reference:
        Liu et al. 2022, eqs. 9 to 13 and algorithm 2, arXiv:2202.09778.
    """
    first, second = levels[:2]
    ddim = combination((X0, second.signal), (EPS, second.noise))
    rows = [row(first, ddim, a=_output_at(first, prediction), c=combination((X, 1.0)))]
    if len(levels) == 2:
        return rows
    mean = (combination((A, 1.0)) + _output_at(second, prediction)) / 2
    again = _step_with_output(first, second, C, mean, prediction)
    rows.append(row(second, again))
    for i, (t, s) in enumerate(pairwise(levels[1:])):
        present = _output_at(t, prediction)
        weights = _ADAMS[min(i, 2)]
        output = weights[0] * present + combination(*zip((A, B, C), weights[1:], strict=False))
        x_s = _step_with_output(t, s, X, output, prediction)
        rows.append(row(t, x_s, a=present, b=combination((A, 1.0)), c=combination((B, 1.0))))
    return rows


def _output_at(t: Level, prediction: str) -> np.ndarray:
    """What PNDM combines, at the present row: v or eps_hat."""
    if prediction == "v":
        return combination((EPS, t.signal), (X0, -t.noise))
    return combination((EPS, 1.0))


def _step_with_output(t: Level, s: Level, x_column: int, output: np.ndarray, prediction: str) -> np.ndarray:
    """DDIM's step from the x in `x_column` with `output` in place of eps_hat, or of v."""
    if prediction == "v":
        x_coefficient = s.signal * t.signal + s.noise * t.noise
        output_coefficient = s.noise * t.signal - s.signal * t.noise
    elif t.is_pure_noise:
        # Without signal eps says nothing about x0, and a mean of two of them no more: the step stays as it was made.
        return combination((X, 1.0))
    else:
        x_coefficient = s.signal / t.signal
        output_coefficient = s.noise - t.noise * s.signal / t.signal
    return combination((x_column, x_coefficient)) + output_coefficient * output


def dpmpp_2m_rows(levels: list[Level], lower_order_final: bool, euler_at_final: bool, stochastic: bool) -> list[Row]:
    """DPM-Solver++ of second order (midpoint), the earlier x0_hat kept in slot a; or its SDE form.

    The first step is of first order (DDIM's, or DDPM's when stochastic), and so is the last where it ends clean, with
    `euler_at_final`, or with `lower_order_final` and fewer than 15 steps.

    Args:
        levels: those visited, and the final one.
        lower_order_final: as above.
        euler_at_final: as above.
        stochastic: whether fresh noise takes part, "2M SDE".

    Returns:
        One row per visited level.

    Reference:
        Lu et al. 2022, algorithm 2 and appendix B, arXiv:2211.01095.
    """
    rows = []
    num_steps = len(levels) - 1
    for i, (t, s) in enumerate(pairwise(levels)):
        drops = i == num_steps - 1 and (s == CLEAN or euler_at_final or (lower_order_final and num_steps < 15))
        slope = 0.0 if i == 0 or drops else _extrapolation(levels[i - 1], t, s)
        if stochastic:
            shrink = _shrink(t, s)  # e^-h
            x_coefficient = s.noise / t.noise * shrink
            x0_coefficient = s.signal * (1 - shrink**2)
            sigma = s.noise * np.sqrt(max(1 - shrink**2, 0.0))
        else:
            x_coefficient = s.noise / t.noise
            x0_coefficient = _x0_coefficient(t, s)
            sigma = 0.0
        x_s = combination(
            (X, x_coefficient),
            (X0, x0_coefficient * (1 + slope)),
            (A, -x0_coefficient * slope),
            (NOISE, sigma),
        )
        rows.append(row(t, x_s, a=combination((X0, 1.0))))
    return rows


def unipc_rows(levels: list[Level], lower_order_final: bool) -> list[Row]:
    """UniPC of second order with B2(h), predicting x0: each row corrects the sample with its new output, then predicts.

    Slot a holds the last corrected sample, b and c the last two x0_hat. The output at the corrected sample's level is
    the one that the network gave for the uncorrected, so a row costs one evaluation.

    Args:
        levels: those visited, and the final one.
        lower_order_final: whether the last prediction is of first order; it is in any case where it ends clean.

    Returns:
        One row per visited level.

    Reference:
        Zhao et al. 2023, algorithms 5 to 8, arXiv:2302.04867.
    """
    rows = []
    num_steps = len(levels) - 1
    corrected = combination((X, 1.0))
    for i, (t, s) in enumerate(pairwise(levels)):
        if i > 0:
            corrected = _unipc_correction(levels[i - 2] if i > 1 else None, levels[i - 1], t)
        drops = i == num_steps - 1 and (s == CLEAN or lower_order_final)
        slope = 0.0 if i == 0 or drops else _extrapolation(levels[i - 1], t, s)
        x0_coefficient = _x0_coefficient(t, s)
        x_s = s.noise / t.noise * corrected
        x_s = x_s + combination((X0, x0_coefficient * (1 + slope)), (B, -x0_coefficient * slope))
        rows.append(row(t, x_s, a=corrected, b=combination((X0, 1.0)), c=combination((B, 1.0))))
    return rows


def _unipc_correction(r: Level | None, t: Level, s: Level) -> np.ndarray:
    """UniC: x_s again, from the corrected x_t (slot a), x0_hat at t (slot b), at r before it (slot c), and now at s."""
    x0_coefficient = _x0_coefficient(t, s)
    h = s.half_log_snr - t.half_log_snr
    if r is None:
        weight_r, weight_s = 0.0, 1 / 2
    else:
        ratio_r = (r.half_log_snr - t.half_log_snr) / h
        B_h = np.expm1(-h)
        phi_1 = B_h / -h - 1
        phi_2 = phi_1 / -h - 1 / 2
        weights = np.linalg.solve([[1.0, 1.0], [ratio_r, 1.0]], [phi_1 / B_h, 2 * phi_2 / B_h])
        weight_r, weight_s = weights[0] / ratio_r, weights[1]
    return combination(
        (A, s.noise / t.noise),
        (B, x0_coefficient * (1 - weight_r - weight_s)),
        (C, x0_coefficient * weight_r),
        (X0, x0_coefficient * weight_s),
    )


def _shrink(t: Level, s: Level) -> float:
    """e^-h, the ratio of noise to signal at s over that at t."""
    return s.noise * t.signal / (s.signal * t.noise)


def _x0_coefficient(t: Level, s: Level) -> float:
    """signal_s * (1 - e^-h), written so that it needs no logarithm."""
    return s.signal - t.signal * s.noise / t.noise


def _extrapolation(r: Level, t: Level, s: Level) -> float:
    """How far the middle of the step t to s lies beyond t, in units of the step r to t before it."""
    before = t.half_log_snr - r.half_log_snr
    # Two steps at one level (the last Karras sigma and a final "sigma_min") leave nothing to extrapolate.
    return (s.half_log_snr - t.half_log_snr) / before / 2 if before > 0 else 0.0
