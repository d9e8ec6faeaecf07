"""diffusers' `scheduler_config.json`: which schedule, prediction and sampler a directory stands for.

A file says only what its class knows, and another class's defaults fill the rest when it changes hands. Here a file
that does not mention `clip_sample` or `set_alpha_to_one` does not clip and does not end at 1, whatever the class's
default says: latents are not in [-1, 1], and Stable Diffusion's files were made for neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.fields import Fields
from latentdiff.checkpoints.files import CheckpointError, read_json, write_json

SAMPLER_CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde_karras": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
CLIPPING_SAMPLERS = ("ddpm", "ddim", "heun", "lcm")
DPM_SAMPLERS = ("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_karras")
DPM_ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}

_LEADING_CLASSES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler")  # the others default to linspace
_COMMON_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "euler_at_final": False,
    "original_inference_steps": 50,
}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_small"},
    "PNDMScheduler": {"skip_prk_steps": False},
    "EulerDiscreteScheduler": {"interpolation_type": "linear", "timestep_type": "discrete"},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverMultistepScheduler": {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    "UniPCMultistepScheduler": {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
    "LCMScheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_scaling": 10.0,
    },
}
# What changes a class's computation, with the only values that the samplers here have.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log"), "thresholding": (None, False)},
    "DDIMScheduler": {"thresholding": (None, False)},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "EulerDiscreteScheduler": {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "use_exponential_sigmas": (None, False),
        "use_beta_sigmas": (None, False),
        "sigma_min": (None,),
        "sigma_max": (None,),
    },
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"use_exponential_sigmas": (None, False), "use_beta_sigmas": (None, False)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "thresholding": (None, False),
        "use_exponential_sigmas": (None, False),
        "use_beta_sigmas": (None, False),
        "use_lu_lambdas": (None, False),
        "use_flow_sigmas": (None, False),
        "use_dynamic_shifting": (None, False),
        "lambda_min_clipped": (None, -float("inf")),
        "variance_type": (None,),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2",),
        "predict_x0": (True,),
        "disable_corrector": ([],),
        "solver_p": (None,),
        "thresholding": (None, False),
        "use_exponential_sigmas": (None, False),
        "use_beta_sigmas": (None, False),
        "use_flow_sigmas": (None, False),
        "use_dynamic_shifting": (None, False),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "shift_terminal": (None,),
    },
    "LCMScheduler": {"timestep_scaling": (10,), "thresholding": (None, False)},
}
# Parameters of options that are off, and fields that a file carries along for other classes.
_WITHOUT_EFFECT = {name for fixed in _FIXED.values() for name in fixed} | {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "algorithm_type",
    "tensor_format",
    "timestep_values",
    "stochastic_sampling",
}


@dataclass(frozen=True)
class SamplerSettings:
    """The sampler that a model directory asks for, and the schedule its network was trained on.

    The defaults are Stable Diffusion 1.x's.

    Attributes:
        sampler: One of `SAMPLER_CLASSES`.
        schedule: "linear", "scaled_linear", "cosine", or "betas" (then `betas` holds them).
        num_timesteps: T.
        beta_start: The first beta of the linear schedules.
        beta_end: Their last beta.
        betas: T numbers in (0, 1], or None.
        prediction: "eps", "v" or "x0".
        spacing: "leading", "trailing" or "linspace".
        spacing_is_default: Whether the file left the spacing to its class; another sampler then has its own.
        steps_offset: What "leading" adds to each timestep.
        set_alpha_to_one: Whether DDIM and PNDM end clean, rather than at t = 1.
        clip_range: What x0 is clipped to, or None; see `clip`.
        zero_terminal_snr: Whether the schedule is rescaled to end in pure noise.
        karras: Whether the noise levels are spaced as Karras does; DPM-Solver++'s names say it themselves.
        final_sigmas_type: "zero" or "sigma_min".
        lower_order_final: Whether multistep solvers end at first order.
        euler_at_final: Whether DPM-Solver++ ends in Euler's step.
        original_steps: The number of steps that LCM was distilled at.
    """

    sampler: str = "pndm"
    schedule: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: tuple[float, ...] | None = None
    prediction: str = "eps"
    spacing: str = "leading"
    spacing_is_default: bool = False
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip_range: float | None = None
    zero_terminal_snr: bool = False
    karras: bool = False
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_steps: int = 50

    def __post_init__(self) -> None:
        _check_sampler(self.sampler)
        if self.sampler in DPM_SAMPLERS:  # their names say it, so the name decides
            object.__setattr__(self, "karras", self.sampler.endswith("_karras"))
        for name, value, choices in (
            ("schedule", self.schedule, (*SCHEDULES.values(), "betas")),
            ("prediction", self.prediction, tuple(PREDICTIONS.values())),
            ("spacing", self.spacing, tuple(SPACINGS)),
            ("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}")
        if (self.schedule == "betas") != (self.betas is not None):
            raise ValueError(f'`betas` belong to schedule="betas". Received: schedule={self.schedule!r}')

    @property
    def clip(self) -> float | None:
        """What this sampler clips x0 to: [-clip, clip]; None for no clipping, and for samplers that never clip."""
        return self.clip_range if self.sampler in CLIPPING_SAMPLERS else None

    def with_sampler(self, sampler: str) -> SamplerSettings:
        """The same schedule, prediction, spacing and offset, for another sampler; as diffusers' `from_config`.

        Where the file left the spacing to its class, the other sampler has its own class's. Whether the levels are
        Karras' is the new name's to say.

        Raises:
            ValueError: If there is no such sampler.
        """
        _check_sampler(sampler)
        if sampler == self.sampler:
            return self
        spacing = _default_spacing(SAMPLER_CLASSES[sampler]) if self.spacing_is_default else self.spacing
        return replace(self, sampler=sampler, spacing=spacing, karras=sampler.endswith("_karras"))

    def table_arguments(self) -> dict[str, Any]:
        """What `make_table` is told beside the schedule and the number of steps."""
        return {
            "sampler": self.sampler,
            "spacing": self.spacing,
            "steps_offset": self.steps_offset,
            "prediction": self.prediction,
            "set_alpha_to_one": self.set_alpha_to_one,
            "karras": self.karras,
            "final_sigmas_type": self.final_sigmas_type,
            "lower_order_final": self.lower_order_final,
            "euler_at_final": self.euler_at_final,
            "original_steps": self.original_steps,
        }


def find_scheduler(directory: str | os.PathLike) -> Path:
    """`scheduler_config.json` of a pipeline's directory, or of the scheduler's own.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    directory = Path(directory)
    for path in (directory / "scheduler" / "scheduler_config.json", directory / "scheduler_config.json"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"A model directory must have `scheduler/scheduler_config.json`. Received: `{directory}`")


def read_scheduler(directory: str | os.PathLike) -> SamplerSettings:
    """The settings of a pipeline's directory, or of a scheduler's own.

    Raises:
        FileNotFoundError: If there is no `scheduler_config.json`.
        CheckpointError: If its class is not known, or it asks for what the samplers here cannot do.
    """
    path = find_scheduler(directory)
    return settings_from_fields(read_json(path), str(path))


def settings_from_fields(values: Mapping[str, Any], source: str) -> SamplerSettings:
    """The settings that diffusers' fields stand for; `source` is the file's name, for errors.

    Raises:
        CheckpointError: If the class is not known, or a field asks for what the samplers here cannot do.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _FIXED:
        raise CheckpointError(f"A scheduler must be one of {', '.join(_FIXED)}. Received: {name!r:.80} in `{source}`")
    fields = Fields(values, {**_COMMON_DEFAULTS, **_CLASS_DEFAULTS.get(name, {})}, source)
    for field, allowed in _FIXED[name].items():
        fields.require(field, *allowed)
    fields.require("predict_epsilon", None, True)  # False was x0, before there was `prediction_type`
    betas = _read_betas(fields)
    schedule = fields.take("beta_schedule") if betas is not None else fields.choice("beta_schedule", SCHEDULES)
    states_spacing = fields.states("timestep_spacing")
    karras = _read_flag(fields, "use_karras_sigmas")
    clip = fields.number("clip_sample_range", low=1e-6) if _read_flag(fields, "clip_sample") else None
    settings = SamplerSettings(
        sampler=_read_sampler(name, fields, karras),
        schedule="betas" if betas is not None else schedule,
        num_timesteps=fields.count("num_train_timesteps", high=10**5) if betas is None else len(betas),
        beta_start=fields.number("beta_start", high=1.0),
        beta_end=fields.number("beta_end", high=1.0),
        betas=betas,
        prediction=fields.choice("prediction_type", PREDICTIONS),
        spacing=fields.choice("timestep_spacing", SPACINGS) if states_spacing else _default_spacing(name),
        spacing_is_default=not states_spacing,
        steps_offset=fields.count("steps_offset", low=0),
        set_alpha_to_one=_read_flag(fields, "set_alpha_to_one"),
        clip_range=clip,
        zero_terminal_snr=_read_flag(fields, "rescale_betas_zero_snr"),
        karras=karras,
        final_sigmas_type=fields.choice("final_sigmas_type", {"zero": "zero", "sigma_min": "sigma_min"}),
        lower_order_final=_read_flag(fields, "lower_order_final"),
        euler_at_final=_read_flag(fields, "euler_at_final"),
        original_steps=fields.count("original_inference_steps", high=10**5),
    )
    fields.ignore(_WITHOUT_EFFECT | {"clip_sample_range"})
    fields.finish()
    return settings


def fields_from_settings(settings: SamplerSettings) -> dict[str, Any]:
    """diffusers' fields for `settings`.

    Clipping, the last level and PNDM's start are always said, as in Stable Diffusion's own files, so that diffusers'
    `from_config` carries them to any other scheduler.
    """
    name = SAMPLER_CLASSES[settings.sampler]
    kinds = {ours: theirs for theirs, ours in SCHEDULES.items()}
    fields: dict[str, Any] = {
        "_class_name": name,
        "beta_end": settings.beta_end,
        "beta_schedule": kinds.get(settings.schedule, "linear"),
        "beta_start": settings.beta_start,
        "clip_sample": settings.clip_range is not None,
        "num_train_timesteps": settings.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[settings.prediction],
        "set_alpha_to_one": settings.set_alpha_to_one,
        "steps_offset": settings.steps_offset,
        "trained_betas": None if settings.betas is None else list(settings.betas),
    }
    if not settings.spacing_is_default:
        fields["timestep_spacing"] = settings.spacing
    if settings.clip_range is not None:
        fields["clip_sample_range"] = settings.clip_range
    if settings.zero_terminal_snr:
        fields["rescale_betas_zero_snr"] = True
    if settings.karras:
        fields["use_karras_sigmas"] = True
    if settings.final_sigmas_type != "zero":
        fields["final_sigmas_type"] = settings.final_sigmas_type
    if not settings.lower_order_final:
        fields["lower_order_final"] = False
    if settings.euler_at_final:
        fields["euler_at_final"] = True
    if settings.sampler == "ddpm":
        fields["variance_type"] = "fixed_small"
    if settings.sampler == "lcm":
        fields["original_inference_steps"] = settings.original_steps
    else:
        fields["skip_prk_steps"] = True  # the one class that warns of fields of the others is LCM's
    if name == "DPMSolverMultistepScheduler":
        fields["algorithm_type"] = "sde-dpmsolver++" if "sde" in settings.sampler else "dpmsolver++"
        fields["solver_order"] = 2
        fields["solver_type"] = "midpoint"
    return fields


def write_scheduler(directory: str | os.PathLike, settings: SamplerSettings, version: str) -> None:
    """Writes `scheduler_config.json` into the scheduler's own directory, which is made where it is missing.

    Args:
        directory: The scheduler's directory.
        settings: What it says.
        version: The diffusers version that the file names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "scheduler_config.json", {**fields_from_settings(settings), "_diffusers_version": version})


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLER_CLASSES:
        raise ValueError(f"`sampler` must be one of {', '.join(SAMPLER_CLASSES)}. Received: sampler={sampler!r}")


def _default_spacing(class_name: str) -> str:
    return "leading" if class_name in _LEADING_CLASSES else "linspace"


def _read_sampler(class_name: str, fields: Fields, karras: bool) -> str:
    if class_name == "DPMSolverMultistepScheduler":
        return fields.choice("algorithm_type", DPM_ALGORITHMS) + ("_karras" if karras else "")
    return next(name for name, known in SAMPLER_CLASSES.items() if known == class_name)


def _read_flag(fields: Fields, name: str) -> bool:
    """A flag that some files leave null."""
    return fields.take(name) is not None and fields.flag(name)


def _read_betas(fields: Fields) -> tuple[float, ...] | None:
    values = fields.take("trained_betas")
    if values is None:
        return None
    sound = isinstance(values, list) and 1 <= len(values) <= 10**5
    if not sound or not all(type(beta) in (int, float) and 0 < beta <= 1 for beta in values):
        raise CheckpointError(f"`trained_betas` must be numbers in (0, 1]. Received: {values!r:.80}")
    if len(values) != fields.take("num_train_timesteps"):
        raise CheckpointError(
            f"`trained_betas` must be as many as `num_train_timesteps`. Received: {len(values)} and"
            f" {fields.take('num_train_timesteps')!r:.40} in `{fields.source}`"
        )
    return tuple(float(beta) for beta in values)
