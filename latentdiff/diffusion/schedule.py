"""How much signal and how much noise a sample holds at each time: x_t = signal(t) * x0 + noise(t) * eps.

Variance-preserving schedules have signal(t)^2 = alpha_bar(t) and noise(t)^2 = 1 - alpha_bar(t), where alpha_bar is the
running product of 1 - beta. Ho et al. 2020, eq. 4, arXiv:2006.11239.
"""

from collections.abc import Sequence

import numpy as np


class Schedule:
    """Two tables, signal and noise, over the times t = 0..T; t = 0 is clean and t = 1..T are the papers'.

    The arrays are float64 and read-only. They are cast once, where they meet a network.

    Args:
        signal: (T + 1,) scale of x0 at each time, 1 at t = 0, never negative. 0 at t = T is a zero terminal SNR.
        noise: (T + 1,) standard deviation of the noise at each time, 0 at t = 0, positive after.

    Raises:
        ValueError: if the tables are not two finite vectors of one length that start clean, or if the ratio of noise
            to signal ever falls.
    """

    def __init__(self, signal: np.ndarray | Sequence[float], noise: np.ndarray | Sequence[float]):
        signal = np.array(signal, dtype=np.float64)
        noise = np.array(noise, dtype=np.float64)
        if signal.ndim != 1 or signal.shape != noise.shape or len(signal) < 2:
            raise ValueError(
                "`signal` and `noise` must be vectors of one length, T + 1, with T at least 1. "
                f"Received: shapes {signal.shape} and {noise.shape}."
            )
        if not (np.isfinite(signal).all() and np.isfinite(noise).all()):
            raise ValueError("`signal` and `noise` must be finite. Received: NaN or infinity.")
        if signal[0] != 1 or noise[0] != 0:
            raise ValueError(
                f"Time 0 must be clean: signal 1, noise 0. Received: signal={signal[0]}, noise={noise[0]}."
            )
        if (signal < 0).any() or (noise[1:] <= 0).any():
            raise ValueError(
                "`signal` must not be negative and `noise` must be positive after time 0. "
                f"Received: least signal {signal.min()}, least noise {noise[1:].min()}."
            )
        if (signal[1:] * noise[:-1] > signal[:-1] * noise[1:]).any():
            raise ValueError("The ratio of noise to signal must not fall with time. Received: one that does.")
        signal.setflags(write=False)
        noise.setflags(write=False)
        self.signal = signal
        self.noise = noise

    def __repr__(self) -> str:
        return f"Schedule(T={self.T}, signal {self.signal[1]:.6g} to {self.signal[-1]:.6g})"

    @property
    def T(self) -> int:
        """Number of noise levels, not counting the clean one."""
        return len(self.signal) - 1

    @property
    def alpha_bar(self) -> np.ndarray:
        """(T + 1,) signal squared: Ho's alpha_bar (and diffusers' `alphas_cumprod`, shifted by one) when preserving."""
        return self.signal**2

    @property
    def noise_to_signal(self) -> np.ndarray:
        """(T + 1,) noise / signal, Karras' sigma (not DDIM's); infinite where the signal is 0."""
        with np.errstate(divide="ignore"):
            return self.noise / self.signal

    @property
    def log_snr(self) -> np.ndarray:
        """(T + 1,) log(signal^2 / noise^2): +inf at t = 0, -inf where the signal is 0."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.signal) - np.log(self.noise))

    @property
    def is_variance_preserving(self) -> bool:
        """Whether signal^2 + noise^2 is 1 at every time."""
        return bool(np.allclose(self.signal**2 + self.noise**2, 1, rtol=0, atol=1e-9))


def schedule_from_betas(betas: np.ndarray | Sequence[float]) -> Schedule:
    """The variance-preserving schedule of the betas.

    Args:
        betas: (T,) variance added at each of the times 1..T, in (0, 1]; only the last may be 1.

    Returns:
        The schedule with T + 1 times.

    Raises:
        ValueError: if the betas are not a vector of numbers in that range.

    Reference:
        Ho et al. 2020, eq. 4, arXiv:2006.11239.
    """
    betas = np.array(betas, dtype=np.float64)
    if betas.ndim != 1 or len(betas) < 1:
        raise ValueError(f"`betas` must be a vector of at least one number. Received: shape {betas.shape}.")
    if not ((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
        raise ValueError(
            "`betas` must lie in (0, 1), and the last in (0, 1]. "
            f"Received: least {betas.min()}, greatest {betas.max()}."
        )
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    return _schedule_from_alpha_bar(alpha_bar)


def linear_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas that rise evenly from `beta_start` to `beta_end`: Ho's schedule.

    Args:
        T: number of noise levels, at least 1.
        beta_start: beta at t = 1, in (0, 1).
        beta_end: beta at t = T, in (0, 1].

    Returns:
        The schedule with T + 1 times.

    Raises:
        ValueError: if `T` or a beta is out of range.

    Reference:
        Ho et al. 2020, section 4, arXiv:2006.11239.
    """
    _check_num_times(T)
    return schedule_from_betas(np.linspace(beta_start, beta_end, T))


def scaled_linear_schedule(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Betas whose square roots rise evenly from `beta_start` to `beta_end`: Stable Diffusion's schedule.

    Args:
        T: number of noise levels, at least 1.
        beta_start: beta at t = 1, in (0, 1).
        beta_end: beta at t = T, in (0, 1].

    Returns:
        The schedule with T + 1 times.

    Raises:
        ValueError: if `T` or a beta is out of range.

    Reference:
        Rombach et al. 2022, arXiv:2112.10752, with the values of its code's Stable Diffusion configuration.
    """
    _check_num_times(T)
    if not (0 < beta_start and 0 < beta_end):
        raise ValueError(f"Betas must be positive. Received: beta_start={beta_start}, beta_end={beta_end}.")
    return schedule_from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha_bar that falls as a squared cosine, with each beta cut at `max_beta`.

    Args:
        T: number of noise levels, at least 1.
        s: offset that keeps the first betas from vanishing.
        max_beta: largest beta, in (0, 1]; 1 leaves no signal at t = T.

    Returns:
        The schedule with T + 1 times.

    Raises:
        ValueError: if `T` or `max_beta` is out of range.

    Reference:
        Nichol and Dhariwal 2021, eq. 17, arXiv:2102.09672.
    """
    _check_num_times(T)
    times = np.arange(T + 1) / T
    alpha_bar = np.cos((times + s) / (1 + s) * np.pi / 2) ** 2
    return schedule_from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with its signal shifted and scaled so that none is left at t = T and t = 1 stays as it was.

    A network for it must not predict eps, which says nothing about x0 where there is no signal; and the sampler must
    visit t = T, which `trailing` spacing does.

    Args:
        schedule: a variance-preserving schedule with at least two noise levels.

    Returns:
        A schedule of the same length whose last signal is exactly 0.

    Raises:
        ValueError: if the schedule is not variance-preserving, or is too short.

    Reference:
        Lin et al. 2024, algorithm 1, arXiv:2305.08891.
    """
    if not schedule.is_variance_preserving or schedule.T < 2:
        raise ValueError(
            "Zero terminal SNR needs a variance-preserving schedule with T at least 2. "
            f"Received: T={schedule.T}, variance-preserving: {schedule.is_variance_preserving}."
        )
    first, last = schedule.signal[1], schedule.signal[-1]
    signal = (schedule.signal - last) * first / (first - last)
    signal[0] = 1.0
    signal[-1] = 0.0
    return _schedule_from_alpha_bar(signal**2)


def _schedule_from_alpha_bar(alpha_bar: np.ndarray) -> Schedule:
    return Schedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def _check_num_times(T: int) -> None:
    if isinstance(T, bool) or not isinstance(T, (int, np.integer)) or T < 1:
        raise ValueError(f"`T` must be a whole number, at least 1. Received: T={T!r}.")
