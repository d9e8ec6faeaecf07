"""Classifier-free guidance: a denoiser that wraps a denoiser.

    guided = unconditional + scale (conditional - unconditional)

Ho and Salimans 2022, eq. 6, arXiv:2207.12598, with scale = 1 + w as in Imagen and Stable Diffusion, so that scale 1 is
the conditional model. Rescaling is Lin et al. 2023, section 3.4, arXiv:2305.08891; the interval is Kynkaanniemi et al.
2024, arXiv:2404.07724.
"""

from typing import Any

from keras import ops

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.process import as_float32, per_example


class Guided:
    """A denoiser whose network is asked twice, with the prompt and without, in one batch.

    Its network must answer for 2 B examples, the first B of them unconditional: the context it holds is
    [unconditional, conditional]. Scale, rescale and interval may be tensors, and then change without a new trace.

    Args:
        denoiser: the denoiser of that network.
        scale: scalar or (B,). 1 is the conditional model, 0 the unconditional one.
        rescale: scalar or (B,) in 0..1, see `guide`. A plain 0 costs nothing.
        interval: (low, high), the levels of noise_to_signal (Karras' sigma, not the time) at which guidance acts, both
            ends included. At any other level the conditional prediction alone counts. None is every level.
        conditional: the denoiser of a network that answers for B conditional examples. If given, and if signal and
            noise are scalars, a level outside of the interval costs B evaluations in place of 2 B.

    Raises:
        ValueError: if `interval` is not a pair, if its plain numbers are out of order, or if a plain `rescale` is
            outside of 0..1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: Any,
        *,
        rescale: Any = 0.0,
        interval: tuple[Any, Any] | None = None,
        conditional: Denoiser | None = None,
    ):
        if isinstance(rescale, (int, float)) and not 0 <= rescale <= 1:
            raise ValueError(f"`rescale` must lie in 0..1. Received: {rescale}.")
        if interval is not None:
            if len(interval) != 2:
                raise ValueError(f"`interval` must be a pair, (low, high). Received: {interval}.")
            is_plain = all(isinstance(end, (int, float)) for end in interval)
            if is_plain and not 0 <= interval[0] <= interval[1]:
                raise ValueError(f"`interval` must be (low, high) with 0 <= low <= high. Received: {interval}.")
        self.denoiser = denoiser
        self.scale = scale
        self.rescale = rescale
        self.interval = interval
        self.conditional = conditional

    def __call__(self, x_t: Any, timestep: Any, signal: Any, noise: Any) -> tuple[Any, Any]:
        """Estimates of the clean data and of the noise under guidance.

        Args:
            x_t: (B, ...) float32.
            timestep: scalar or (B,), as the network is told it.
            signal: scalar, (B,) or (B, 1, ...).
            noise: scalar, (B,) or (B, 1, ...).

        Returns:
            x0_hat: (B, ...) float32.
            eps_hat: (B, ...) float32.
        """
        x_t = as_float32(x_t)
        signal = per_example(signal, x_t)
        noise = per_example(noise, x_t)
        output = self._output(x_t, timestep, signal, noise)
        return self.denoiser.x0_and_eps(output, x_t, signal, noise)

    def _output(self, x_t: Any, timestep: Any, signal: Any, noise: Any) -> Any:
        if self.interval is None:
            return self._guided(x_t, timestep)

        is_inside = _is_inside(self.interval, signal, noise)
        skip_to = self.conditional
        if skip_to is not None and len(is_inside.shape) == 0:
            return ops.cond(is_inside, lambda: self._guided(x_t, timestep), lambda: skip_to.output(x_t, timestep))
        unconditional, conditional = self._both(x_t, timestep)
        return ops.where(is_inside, guide(conditional, unconditional, self.scale, self.rescale), conditional)

    def _guided(self, x_t: Any, timestep: Any) -> Any:
        unconditional, conditional = self._both(x_t, timestep)
        return guide(conditional, unconditional, self.scale, self.rescale)

    def _both(self, x_t: Any, timestep: Any) -> tuple[Any, Any]:
        timestep = ops.broadcast_to(ops.cast(timestep, "float32"), (ops.shape(x_t)[0],))
        twice = ops.concatenate([x_t, x_t], axis=0)  # (2 B, ...)
        output = self.denoiser.output(twice, ops.concatenate([timestep, timestep], axis=0))
        unconditional, conditional = ops.split(output, 2, axis=0)
        return unconditional, conditional


def guide(conditional: Any, unconditional: Any, scale: Any, rescale: Any = 0.0) -> Any:
    """The network's output, moved along the difference that the prompt makes.

    Args:
        conditional: (B, ...) raw output with the prompt: eps, v or x0.
        unconditional: (B, ...) raw output without it.
        scale: scalar or (B,). 1 is the conditional output, 0 the unconditional one.
        rescale: scalar or (B,) in 0..1. At 1 the result has the standard deviation of the conditional output, over all
            axes but the first; at 0.7 it has been moved most of the way there, against overexposed pictures.

    Returns:
        (B, ...) float32.

    Reference:
        Ho and Salimans 2022, eq. 6, arXiv:2207.12598; Lin et al. 2023, eqs. 15 and 16, arXiv:2305.08891.
    """
    conditional = as_float32(conditional)
    unconditional = as_float32(unconditional)
    guided = unconditional + per_example(scale, conditional) * (conditional - unconditional)
    if isinstance(rescale, (int, float)) and rescale == 0:
        return guided

    axes = tuple(range(1, len(guided.shape)))
    std_conditional = ops.std(conditional, axis=axes, keepdims=True)  # (B, 1, ...)
    std_guided = ops.std(guided, axis=axes, keepdims=True)  # (B, 1, ...)
    # A constant output has no spread to rescale.
    std_safe = ops.where(std_guided > 0, std_guided, ops.ones_like(std_guided))
    factor = ops.where(std_guided > 0, std_conditional / std_safe, ops.ones_like(std_guided))
    rescale = per_example(rescale, guided)
    return rescale * (factor * guided) + (1.0 - rescale) * guided


def _is_inside(interval: tuple[Any, Any], signal: Any, noise: Any) -> Any:
    low, high = (as_float32(end) for end in interval)
    has_signal = signal > 0
    ratio = noise / ops.where(has_signal, signal, ops.ones_like(signal))
    level = ops.where(has_signal, ratio, float("inf"))
    return ops.logical_and(low <= level, level <= high)
