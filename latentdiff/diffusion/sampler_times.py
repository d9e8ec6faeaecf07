"""Which noise levels a sampler visits, and which timestep the network is told at each.

Two ladders are in use. DDPM, DDIM, PNDM and LCM stop at whole times of the schedule; Euler, Heun, DPM-Solver++ and
UniPC choose a ratio of noise to signal, which may fall between two times (Karras et al. 2022, eq. 5, arXiv:2206.00364)
and is turned back into signal = 1 / sqrt(1 + ratio^2). Spacings: Lin et al. 2024, table 2, arXiv:2305.08891.
"""

from typing import NamedTuple

import numpy as np

from latentdiff.diffusion.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS = ("zero", "sigma_min")

# Where no signal is left the ratio is infinite, and samplers that step in it need a number. diffusers' own
# (alpha_bar = 2^-24) is taken, because a multistep sampler's second step still sees it.
STAND_IN_RATIO = float(np.sqrt(2.0**24 - 1))


class Level(NamedTuple):
    """A noise level and what the network is told there: x = signal * x0 + noise * eps."""

    timestep: float
    signal: float
    noise: float

    @property
    def ratio(self) -> float:
        """noise / signal, Karras' sigma."""
        return self.noise / self.signal

    @property
    def is_pure_noise(self) -> bool:
        """Whether no signal is left, be it written as 0 or as the stand-in ratio."""
        return self.signal == 0 or bool(np.isclose(self.ratio, STAND_IN_RATIO, rtol=1e-9, atol=0))

    @property
    def half_log_snr(self) -> float:
        """log(signal / noise), DPM-Solver's lambda; infinite when clean."""
        return float(np.log(self.signal) - np.log(self.noise)) if self.noise > 0 else float("inf")


CLEAN = Level(0.0, 1.0, 0.0)


def whole_time_levels(schedule: Schedule, timesteps: np.ndarray, set_alpha_to_one: bool) -> list[Level]:
    """The levels at whole timesteps, and the level where sampling ends.

    Args:
        schedule: the schedule, T noise levels.
        timesteps: (n,) whole numbers in 0..T-1, falling.
        set_alpha_to_one: whether the last step ends clean, as in DDIM's paper, or at the level of t = 1.

    Returns:
        n + 1 levels, the last one final.
    """
    # The networks of Stable Diffusion count from 0: at the papers' time t they are told t - 1.
    levels = [Level(float(k), float(schedule.signal[k + 1]), float(schedule.noise[k + 1])) for k in timesteps]
    # Stable Diffusion ends at t = 1 (alphas_cumprod[0]) and not at t = 0, where its network was never trained.
    final = CLEAN if set_alpha_to_one else Level(0.0, float(schedule.signal[1]), float(schedule.noise[1]))
    return [*levels, final]


def ratio_levels(
    schedule: Schedule,
    timesteps: np.ndarray,
    final_sigmas_type: str,
    karras: str | None = None,
    ends_unscaled: bool = False,
) -> list[Level]:
    """The levels at timesteps that need not be whole, by way of the ratio of noise to signal.

    Args:
        schedule: the schedule, T noise levels.
        timesteps: (n,) numbers in [0, T - 1], falling. The ratio is interpolated linearly between whole ones.
        final_sigmas_type: "zero" ends clean, "sigma_min" at the level of t = 1.
        karras: None keeps the ratios of `timesteps`. "visited" replaces them by Karras' between the first and the last
            of them, and tells the network the fractional timestep; "whole" by Karras' over the whole schedule, and
            tells the network the nearest whole timestep.
        ends_unscaled: whether a final "sigma_min" is x0 + ratio * eps rather than that times the signal, which is what
            diffusers' Euler, counting in x / signal, ends at.

    Returns:
        n + 1 levels, the last one final.

    Reference:
        Karras et al. 2022, eq. 5 with rho = 7, arXiv:2206.00364.
    """
    table = np.where(schedule.signal[1:] > 0, schedule.noise_to_signal[1:], STAND_IN_RATIO)
    ratios = np.interp(timesteps, np.arange(schedule.T), table)
    if karras is not None:
        largest, smallest = (ratios[0], ratios[-1]) if karras == "visited" else (table[-1], table[0])
        ratios = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), len(timesteps)) ** 7
        timesteps = np.interp(np.log(ratios), np.log(table), np.arange(schedule.T))
        # diffusers rounds here for DPM-Solver++ and UniPC, not for Euler and Heun.
        timesteps = timesteps if karras == "visited" else timesteps.round()
    if final_sigmas_type == "zero":
        final = CLEAN
    elif ends_unscaled:
        final = Level(0.0, 1.0, float(table[0]))
    else:
        final = _level_of_ratio(0.0, table[0])
    return [*map(_level_of_ratio, timesteps, ratios), final]


def spaced_timesteps(T: int, num_steps: int, spacing: str, steps_offset: int) -> np.ndarray:
    """The whole timesteps of DDPM, DDIM and PNDM, and of Euler and Heun unless the spacing is linspace.

    Args:
        T: number of noise levels.
        num_steps: 1..T.
        spacing: "leading" counts up from 0 by T // num_steps and adds the offset, "trailing" down from T - 1,
            "linspace" spreads from T - 1 to 0, both ends included.
        steps_offset: what "leading" adds.

    Returns:
        (num_steps,) whole numbers in 0..T-1, falling.
    """
    if spacing == "linspace":
        return linspace_timesteps(T, num_steps).round().astype(np.int64)
    if spacing == "trailing":
        return _trailing_timesteps(T, num_steps)
    return _leading_timesteps(T, np.arange(num_steps) * (T // num_steps), steps_offset)


def spaced_timesteps_without_last(T: int, num_steps: int, spacing: str, steps_offset: int) -> np.ndarray:
    """The whole timesteps of DPM-Solver++ and UniPC, which divide by num_steps + 1 and leave the lowest one out.

    Args:
        T: number of noise levels.
        num_steps: 1..T.
        spacing: "leading", "trailing" (as for the other samplers) or "linspace".
        steps_offset: what "leading" adds.

    Returns:
        (num_steps,) whole numbers in 0..T-1, falling.
    """
    if num_steps == T or spacing == "trailing":
        return _trailing_timesteps(T, num_steps)
    if spacing == "linspace":
        return np.linspace(0, T - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
    return _leading_timesteps(T, np.arange(1, num_steps + 1) * (T // (num_steps + 1)), steps_offset)


def linspace_timesteps(T: int, num_steps: int) -> np.ndarray:
    """Timesteps from T - 1 down to 0, both included and evenly spaced: Euler's and Heun's under linspace.

    Args:
        T: number of noise levels.
        num_steps: 1..T.

    Returns:
        (num_steps,) numbers in [0, T - 1], falling.
    """
    # A single step starts where there is noise. (diffusers starts it at 0, where there is none.)
    return np.linspace(0, T - 1, num_steps)[::-1] if num_steps > 1 else np.array([T - 1.0])


def lcm_timesteps(T: int, num_steps: int, original_steps: int) -> np.ndarray:
    """The timesteps of latent consistency models: some of the `original_steps` that the model was distilled at.

    Args:
        T: number of noise levels.
        num_steps: 1..original_steps.
        original_steps: 1..T.

    Returns:
        (num_steps,) whole numbers in 0..T-1, falling.

    Reference:
        Luo et al. 2023, section 4.3, arXiv:2310.04378.
    """
    distilled = np.arange(original_steps, 0, -1) * (T // original_steps) - 1
    return distilled[np.arange(num_steps) * original_steps // num_steps]


def _leading_timesteps(T: int, rising: np.ndarray, steps_offset: int) -> np.ndarray:
    # The offset shrinks where it would lead past T - 1. (diffusers runs out of range: 1000 steps with offset 1.)
    return rising[::-1] + min(steps_offset, T - 1 - int(rising[-1]))


def _trailing_timesteps(T: int, num_steps: int) -> np.ndarray:
    return (T - np.arange(num_steps) * (T / num_steps)).round().astype(np.int64) - 1


def _level_of_ratio(timestep: float, ratio: float) -> Level:
    signal = 1 / np.sqrt(1 + ratio**2)
    return Level(float(timestep), float(signal), float(ratio * signal))
