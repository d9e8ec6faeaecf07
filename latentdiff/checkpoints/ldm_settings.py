"""What an LDM file says of schedule and prediction: little, and Stable Diffusion's own numbers stand for the rest.

The schedule is that of the `betas` in the file, where there are any. The prediction is the first of these that is said:

1. the caller's choice,
2. the header's `modelspec.prediction_type`, or a tensor named `v_pred`, as newer trainers write them,
3. eps for Stable Diffusion 1.x,
4. for 2.x, whose weights do not say it, eps after 875,000 steps (`global_step`, that of 2-base), as in diffusers,
5. and otherwise v, with a warning: 2.0 and 2.1 predict v, their "base" editions eps.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.safetensors_files import FLOATS, StoredTensor

SETTINGS_KEYS = ("betas", "scale_factor", "v_pred", "ztsnr")
BASE_STEPS = 875_000

_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}


def read_settings(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], is_v2: bool, prediction: str | None, source: str
) -> SamplerSettings:
    """Schedule, prediction and sampler of a whole file.

    Args:
        tensors: The file's.
        metadata: The header's.
        is_v2: Whether it is Stable Diffusion 2.x.
        prediction: The caller's choice, or None.
        source: The file's name.

    Raises:
        CheckpointError: If its `betas` are no schedule.
    """
    zero_terminal_snr = "ztsnr" in tensors  # beside `v_pred`, by the same trainers
    return SamplerSettings(
        sampler="ddim" if is_v2 else "pndm",
        prediction=prediction or _read_prediction(tensors, metadata, is_v2, source),
        spacing="trailing" if zero_terminal_snr else "leading",
        spacing_is_default=not zero_terminal_snr,
        zero_terminal_snr=zero_terminal_snr,
        **_read_schedule(tensors, source),
    )


def read_scaling(tensors: Mapping[str, StoredTensor], default: float, source: str) -> float:
    """What latents are multiplied by: the file's `scale_factor`, where training measured it.

    Raises:
        CheckpointError: If it is not one positive number.
    """
    if "scale_factor" not in tensors:
        return default
    values = _numbers(tensors["scale_factor"], source)
    if values.size != 1 or not 1e-6 <= values.item() <= 1e6:
        raise CheckpointError(f"`scale_factor` must be a positive number. Received: {values!r:.80} in `{source}`.")
    return values.item()


def _read_prediction(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], is_v2: bool, source: str) -> str:
    stated = metadata.get("modelspec.prediction_type", "").lower()
    if stated in _PREDICTIONS:
        return _PREDICTIONS[stated]
    if "v_pred" in tensors:
        return "v"
    if not is_v2:
        return "eps"
    if _steps(tensors) == BASE_STEPS:
        return "eps"
    warnings.warn(
        f"`{source}` does not say what its UNet predicts; v is assumed, as for Stable Diffusion 2.0 and 2.1."
        ' Choose with prediction="v", or prediction="eps" for the base editions.',
        stacklevel=2,
    )
    return "v"


def _read_schedule(tensors: Mapping[str, StoredTensor], source: str) -> dict:
    """`SamplerSettings`' schedule: one that has a name, where the file's betas are its, to the file's precision."""
    if "betas" not in tensors:
        return {}
    tensor = tensors["betas"]
    betas = _numbers(tensor, source)
    if betas.ndim != 1 or not 1 <= betas.size <= 10**5 or not (betas > 0).all() or not (betas <= 1).all():
        raise CheckpointError(f"`betas` must be numbers in (0, 1]. Received: {betas!r:.80} in `{source}`.")
    count, first, last = betas.size, float(betas[0]), float(betas[-1])
    precision = 4 * 2.0 ** -{"F16": 10, "BF16": 7}.get(tensor.code, 22)
    own = (SamplerSettings.beta_start, SamplerSettings.beta_end)
    for schedule, start, end in (("scaled_linear", *own), ("scaled_linear", first, last), ("linear", first, last)):
        root = 0.5 if schedule == "scaled_linear" else 1.0
        if np.allclose(np.linspace(start**root, end**root, count) ** (1 / root), betas, rtol=precision, atol=0):
            return {"schedule": schedule, "num_timesteps": count, "beta_start": start, "beta_end": end}
    return {"schedule": "betas", "num_timesteps": count, "betas": tuple(betas.tolist())}


def _steps(tensors: Mapping[str, StoredTensor]) -> int | None:
    """The optimizer's steps, which some files carry."""
    tensor = tensors.get("global_step")
    return None if tensor is None else tensor.integer()


def _numbers(tensor: StoredTensor, source: str) -> np.ndarray:
    """A small tensor's numbers, in float64."""
    if tensor.code not in FLOATS:
        raise CheckpointError(f"`{tensor.name}` must be floats. Received: {tensor.code} in `{source}`.")
    return tensor.view().astype(np.float64)
