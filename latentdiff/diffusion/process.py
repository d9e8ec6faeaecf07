"""The forward process, its posterior, and the loss that a network is trained with.

    x_t = signal_t x0 + noise_t eps        v = signal_t eps - noise_t x0
    q(x_s | x_t, x0) is a Gaussian for every s < t

Ho et al. 2020, eqs. 4, 7 and 14, arXiv:2006.11239; v is Salimans and Ho 2022, appendix D, arXiv:2202.00512; the
posterior for any s < t is Kingma et al. 2021, appendix A.2, arXiv:2107.00630.
"""

from typing import Any

import numpy as np
from keras import ops

from latentdiff.diffusion.schedule import Schedule

PREDICTIONS = ("eps", "v", "x0")
LOSS_WEIGHTS = ("uniform", "min_snr")


class GaussianDiffusion:
    """A schedule as a diffusion process, with what a network shall predict in it.

    Data is any float array (B, ...), and results are float32 whatever its dtype. Times `t` are integers in 1..T, (B,)
    or a scalar. NumPy's and Python's are checked; tensors, which may be traced, are not.

    Args:
        schedule: signal and noise at the times 0..T.
        prediction: "eps", "v" or "x0".

    Raises:
        ValueError: if `prediction` is none of these; if it is "eps" where the schedule leaves no signal at T, as eps
            says nothing about x0 there.
    """

    def __init__(self, schedule: Schedule, prediction: str = "eps"):
        check_prediction(prediction)
        if prediction == "eps" and schedule.signal[-1] == 0:
            raise ValueError(
                '`prediction` must be "v" or "x0" where no signal is left at the last time. '
                f"Received: prediction={prediction!r}, {schedule}."
            )
        self.schedule = schedule
        self.prediction = prediction

    def q_sample(self, x0: Any, t: Any, eps: Any) -> Any:
        """x_t, the noisy data. Ho et al. 2020, eq. 4.

        Args:
            x0: (B, ...) clean data.
            t: (B,) int in 1..T.
            eps: (B, ...) standard normal noise.

        Returns:
            (B, ...).
        """
        x0 = as_float32(x0)
        signal, noise = self._signal_and_noise(t, x0)
        return signal * x0 + noise * as_float32(eps)

    def q_posterior(self, x0: Any, x_t: Any, t: Any, s: Any = None) -> tuple[Any, Any, Any]:
        """The Gaussian q(x_s | x_t, x0). Ho et al. 2020, eqs. 6 and 7, where s = t - 1.

        Args:
            x0: (B, ...) clean data.
            x_t: (B, ...) noisy data.
            t: (B,) int in 1..T.
            s: (B,) int in 0..t-1; None is t - 1.

        Returns:
            mean: (B, ...).
            variance: (B, 1, ...), 0 where s = 0.
            log_variance: (B, 1, ...), where s = 0 that of t = 2, s = 1, as in Ho's code: a finite stand-in.

        Raises:
            ValueError: if a time is out of range, or `s` is not before `t`.
        """
        x0, x_t = as_float32(x0), as_float32(x_t)
        self._check_times(t, 1)
        if s is None:
            s = (np.asarray(t) if _is_concrete(t) else t) - 1
        self._check_times(s, 0)
        if _is_concrete(t) and _is_concrete(s) and not np.all(np.asarray(s) < np.asarray(t)):
            raise ValueError(f"`s` must be before `t`. Received: s={s}, t={t}.")

        signal_t, noise_t = self._signal_and_noise(t, x_t)
        signal_s, noise_s = self._signal_and_noise(s, x_t)
        gain = per_example(self._snr_gain(t, s), x_t)
        mean = gain * signal_s * x0 + signal_t / signal_s * (noise_s / noise_t) ** 2 * x_t
        variance = gain * noise_s**2
        is_clean = variance == 0
        log_variance = ops.log(ops.where(is_clean, ops.ones_like(variance), variance))
        stand_in = ops.full_like(log_variance, self._smallest_log_variance())
        return mean, variance, ops.where(is_clean, stand_in, log_variance)

    def x0_from_eps(self, x_t: Any, t: Any, eps: Any) -> Any:
        """x0 (B, ...) of x_t and eps (B, ...); 0 where the signal is 0."""
        return self._x0_and_eps(x_t, t, eps, "eps")[0]

    def eps_from_x0(self, x_t: Any, t: Any, x0: Any) -> Any:
        """eps (B, ...) of x_t and x0 (B, ...)."""
        return self._x0_and_eps(x_t, t, x0, "x0")[1]

    def x0_from_v(self, x_t: Any, t: Any, v: Any) -> Any:
        """x0 (B, ...) of x_t and v (B, ...)."""
        return self._x0_and_eps(x_t, t, v, "v")[0]

    def eps_from_v(self, x_t: Any, t: Any, v: Any) -> Any:
        """eps (B, ...) of x_t and v (B, ...)."""
        return self._x0_and_eps(x_t, t, v, "v")[1]

    def v_from_x0_eps(self, x0: Any, eps: Any, t: Any) -> Any:
        """v (B, ...) of x0 and eps (B, ...). Salimans and Ho 2022, appendix D, arXiv:2202.00512."""
        x0 = as_float32(x0)
        signal, noise = self._signal_and_noise(t, x0)
        return signal * as_float32(eps) - noise * x0

    def target(self, x0: Any, eps: Any, t: Any) -> Any:
        """What the network shall put out for x_t: eps, v or x0 (B, ...), as `prediction` says.

        Args:
            x0: (B, ...) clean data.
            eps: (B, ...) the noise in x_t.
            t: (B,) int in 1..T.

        Returns:
            (B, ...).
        """
        if self.prediction == "v":
            return self.v_from_x0_eps(x0, eps, t)
        return as_float32(eps if self.prediction == "eps" else x0)

    def loss_weight(self, t: Any, kind: str = "uniform", gamma: float = 5.0) -> Any:
        """Weight of an example's loss at its time.

        Args:
            t: (B,) int in 1..T.
            kind: "uniform" is 1 (Ho's simple loss, eq. 14, where eps is predicted). "min_snr" is min(snr, gamma) in
                terms of x0: divided by snr for eps, by snr + 1 for v. Where the signal is 0 that is 0 for both
                of v and x0.
            gamma: where the signal-to-noise ratio is cut, positive.

        Returns:
            float32 (B,).

        Raises:
            ValueError: if `kind` or a time is not one of those.

        Reference:
            Hang et al. 2023, section 3.4, arXiv:2303.09556.
        """
        self._check_times(t, 1)
        if kind not in LOSS_WEIGHTS:
            raise ValueError(f"`kind` must be one of {', '.join(LOSS_WEIGHTS)}. Received: {kind!r}.")
        snr = (self.schedule.signal[1:] / self.schedule.noise[1:]) ** 2
        if kind == "uniform":
            table = np.ones_like(snr)
        elif self.prediction == "x0":
            table = np.minimum(snr, gamma)
        elif self.prediction == "v":
            table = np.minimum(snr, gamma) / (snr + 1)
        else:
            table = gamma / np.maximum(snr, gamma)
        return _look_up(np.concatenate([[np.nan], table]), t)

    def loss(self, output: Any, x0: Any, eps: Any, t: Any, weight: Any = None) -> Any:
        """Mean squared error of the network's output, one number for each example.

        Args:
            output: (B, ...) what the network predicted for x_t.
            x0: (B, ...) clean data.
            eps: (B, ...) the noise in x_t.
            t: (B,) int in 1..T.
            weight: (B,), for example of `loss_weight`; None is 1.

        Returns:
            (B,), the mean over all axes but the first.

        Reference:
            Ho et al. 2020, eq. 14, arXiv:2006.11239.
        """
        error = (as_float32(output) - self.target(x0, eps, t)) ** 2
        loss = ops.mean(error, axis=tuple(range(1, len(error.shape))))
        return loss if weight is None else loss * as_float32(weight)

    def _x0_and_eps(self, x_t: Any, t: Any, output: Any, prediction: str) -> tuple[Any, Any]:
        x_t = as_float32(x_t)
        signal, noise = self._signal_and_noise(t, x_t)
        return x0_and_eps(x_t, as_float32(output), signal, noise, prediction)

    def _signal_and_noise(self, t: Any, like: Any) -> tuple[Any, Any]:
        self._check_times(t, 0)
        signal = _look_up(self.schedule.signal, t)
        noise = _look_up(self.schedule.noise, t)
        return per_example(signal, like), per_example(noise, like)

    def _snr_gain(self, t: Any, s: Any) -> Any:
        """1 - snr_t / snr_s in 0..1, exact to float32 also where the two times are neighbours."""
        log_snr = self.schedule.log_snr
        if _is_concrete(t) and _is_concrete(s):
            return -np.expm1(log_snr[np.asarray(t)] - log_snr[np.asarray(s)])
        # The difference of two float32 would keep three digits; the rest of each logarithm brings the others back.
        high = log_snr.astype(np.float32)
        low = np.zeros_like(log_snr)
        np.subtract(log_snr, high, out=low, where=np.isfinite(log_snr))
        high_change = _look_up(high, t) - _look_up(high, s)
        low_change = _look_up(low, t) - _look_up(low, s)
        return -ops.expm1(high_change + low_change)

    def _smallest_log_variance(self) -> float:
        log_noise = 2 * np.log(self.schedule.noise[1])
        if self.schedule.T == 1:
            return float(log_noise)
        return float(log_noise + np.log(self._snr_gain(2, 1)))

    def _check_times(self, t: Any, first: int) -> None:
        if not _is_concrete(t):
            return
        t = np.asarray(t)
        if t.dtype.kind not in "iu" or t.ndim > 1:
            raise ValueError(
                f"Times must be integers, one for each example. Received: dtype={t.dtype}, shape={t.shape}."
            )
        if t.size and not (first <= t.min() and t.max() <= self.schedule.T):
            raise ValueError(
                f"Times must lie in {first} .. {self.schedule.T}. Received: values in {t.min()} .. {t.max()}."
            )


def x0_and_eps(x_t: Any, output: Any, signal: Any, noise: Any, prediction: str) -> tuple[Any, Any]:
    """x0 and eps of a network's output, so that x_t = signal x0 + noise eps.

    Where the signal is 0, x_t and eps say nothing about x0, and it is 0; likewise eps of x0 where the noise is 0.

    Args:
        x_t: (B, ...) noisy data.
        output: (B, ...) eps, v or x0.
        signal: broadcastable to x_t.
        noise: broadcastable to x_t.
        prediction: what `output` is, "eps", "v" or "x0".

    Returns:
        x0: (B, ...).
        eps: (B, ...).
    """
    if prediction == "eps":
        return (x_t - noise * output) * _reciprocal(signal), output
    if prediction == "x0":
        return output, (x_t - signal * output) * _reciprocal(noise)
    # The norm is 1 where variance is preserved, up to rounding; dividing by it serves every other schedule.
    norm = signal**2 + noise**2
    x0 = (signal * x_t - noise * output) / norm
    eps = (noise * x_t + signal * output) / norm
    return x0, eps


def per_example(values: Any, like: Any) -> Any:
    """One value for each example, float32, in a shape that broadcasts with `like`.

    Args:
        values: a scalar, (B,), or anything that has as many axes as `like`.
        like: (B, ...).

    Returns:
        The scalar, (B, 1, ...), or `values`.
    """
    values = as_float32(values)
    if len(values.shape) == 1:
        return ops.reshape(values, (-1, *(1 for _ in like.shape[1:])))
    return values


def as_float32(x: Any) -> Any:
    """The array as a float32 tensor."""
    return ops.cast(ops.convert_to_tensor(x), "float32")


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless `prediction` is "eps", "v" or "x0"."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"`prediction` must be one of {', '.join(PREDICTIONS)}. Received: {prediction!r}.")


def _reciprocal(values: Any) -> Any:
    """1 / values, and 0 where they are 0."""
    is_zero = values == 0
    return ops.where(is_zero, ops.zeros_like(values), 1.0 / ops.where(is_zero, ops.ones_like(values), values))


def _look_up(table: np.ndarray, t: Any) -> Any:
    if _is_concrete(t):
        return ops.convert_to_tensor(table[np.asarray(t)], dtype="float32")
    return ops.take(ops.convert_to_tensor(table, dtype="float32"), t, axis=0)


def _is_concrete(t: Any) -> bool:
    return not ops.is_tensor(t)
