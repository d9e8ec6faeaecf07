"""A network's output as (x0_hat, eps_hat), whatever the network predicts.

    x_t = signal x0_hat + noise eps_hat

Ho et al. 2020, eq. 15, arXiv:2006.11239; for v, Salimans and Ho 2022, appendix D, arXiv:2202.00512.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from latentdiff.diffusion.process import as_float32, check_prediction, per_example, x0_and_eps


class Denoiser:
    """A network that is asked for the clean data and the noise in x_t.

    Args:
        network: takes x_t (B, ...) and the timestep float32 (B,) as it was trained to be told it, and gives its
            prediction (B, ...) in any float dtype. What else it needs, such as the context, it holds itself.
        prediction: what the network predicts, "eps", "v" or "x0".
        clip: x0_hat is kept in [-clip, clip], and eps_hat follows it; None leaves it as it is.
        learned_variance: whether the output has twice the channels (last axis), of which the second half speaks of the
            variance (Nichol and Dhariwal 2021, eq. 15, arXiv:2102.09672) and is split off.

    Raises:
        ValueError: if `prediction` is none of these or `clip` is not positive.
    """

    def __init__(
        self,
        network: Callable[[Any, Any], Any],
        prediction: str = "eps",
        *,
        clip: float | None = None,
        learned_variance: bool = False,
    ):
        check_prediction(prediction)
        if clip is not None and not clip > 0:
            raise ValueError(f"`clip` must be positive, or None. Received: {clip}.")
        self.network = network
        self.prediction = prediction
        self.clip = clip
        self.learned_variance = learned_variance

    def __call__(self, x_t: Any, timestep: Any, signal: Any, noise: Any) -> tuple[Any, Any]:
        """Estimates of the clean data and of the noise.

        Args:
            x_t: (B, ...) float32.
            timestep: scalar or (B,), as the network is told it.
            signal: scalar, (B,) or broadcastable to x_t.
            noise: scalar, (B,) or broadcastable to x_t.

        Returns:
            x0_hat: (B, ...) float32.
            eps_hat: (B, ...) float32.
        """
        return self.x0_and_eps(self.output(x_t, timestep), x_t, signal, noise)

    def output(self, x_t: Any, timestep: Any) -> Any:
        """The network's prediction (B, ...) in float32, without what it says about the variance."""
        x_t = as_float32(x_t)
        # float32, since bfloat16 turns 951 into 952.
        timestep = ops.broadcast_to(ops.cast(timestep, "float32"), (ops.shape(x_t)[0],))
        output = as_float32(self.network(x_t, timestep))
        if self.learned_variance:
            channels = x_t.shape[-1]
            if output.shape[-1] != 2 * channels:
                raise ValueError(
                    "With `learned_variance` the network's output must have twice the channels of x_t. "
                    f"Received: {output.shape[-1]} channels for {channels}."
                )
            output = output[..., :channels]
        return output

    def x0_and_eps(self, output: Any, x_t: Any, signal: Any, noise: Any) -> tuple[Any, Any]:
        """(x0_hat, eps_hat), each (B, ...), of a prediction that `output` gave."""
        return to_x0_eps(output, x_t, signal, noise, self.prediction, self.clip)


def to_x0_eps(
    output: Any, x_t: Any, signal: Any, noise: Any, prediction: str, clip: float | None = None
) -> tuple[Any, Any]:
    """A network's output as estimates of the clean data and of the noise.

    Always x_t = signal x0_hat + noise eps_hat, also after clipping (diffusers' DDIM keeps the eps of before, unless
    told `use_clipped_model_output`). Finite at signal 0, where an eps prediction cannot say anything about x0 and
    x0_hat is 0, and at noise 0, where x0 leaves eps open and eps_hat is 0.

    Args:
        output: (B, ...) eps, v or x0 in any float dtype.
        x_t: (B, ...) noisy data.
        signal: scalar, (B,) or broadcastable to x_t.
        noise: scalar, (B,) or broadcastable to x_t.
        prediction: what `output` is, "eps", "v" or "x0".
        clip: x0_hat is kept in [-clip, clip]; None leaves it as it is.

    Returns:
        x0_hat: (B, ...) float32.
        eps_hat: (B, ...) float32.

    Raises:
        ValueError: if `prediction` is none of these.
    """
    check_prediction(prediction)
    x_t = as_float32(x_t)
    output = as_float32(output)
    signal = per_example(signal, x_t)
    noise = per_example(noise, x_t)
    x0_hat, eps_hat = x0_and_eps(x_t, output, signal, noise, prediction)
    if clip is None:
        return x0_hat, eps_hat
    return x0_and_eps(x_t, ops.clip(x0_hat, -clip, clip), signal, noise, "x0")
