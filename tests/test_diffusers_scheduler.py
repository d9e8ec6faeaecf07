"""Scheduler files: what they stand for, what is refused, and how a sampler changes."""

import json

import pytest

from latentdiff.checkpoints.diffusers_scheduler import (
    SAMPLER_CLASSES,
    SamplerSettings,
    fields_from_settings,
    read_scheduler,
    settings_from_fields,
    write_scheduler,
)
from latentdiff.checkpoints.files import CheckpointError

SD1_FILE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD2_FILE = {
    **SD1_FILE,
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
}


def settings(**fields):
    return settings_from_fields(fields, "scheduler_config.json")


def test_file_of_stable_diffusion_1_is_the_default():
    assert settings(**SD1_FILE, timestep_spacing="leading") == SamplerSettings()


def test_file_of_stable_diffusion_2_is_ddim_that_predicts_v_without_clipping():
    result = settings(**SD2_FILE)
    assert (result.sampler, result.prediction, result.spacing, result.steps_offset) == ("ddim", "v", "leading", 1)
    assert (result.clip, result.set_alpha_to_one) == (None, False)


@pytest.mark.parametrize("name", sorted(set(SAMPLER_CLASSES.values())))
def test_file_that_does_not_mention_clipping_does_not_clip(name):
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    result = settings(_class_name=name, **more)
    assert result.clip_range is None
    assert result.set_alpha_to_one is False
    assert result.with_sampler("ddim").clip is None


def test_clipping_reaches_only_the_samplers_that_clip():
    result = settings(_class_name="DDIMScheduler", clip_sample=True, clip_sample_range=2.0)
    assert result.clip == 2.0
    assert result.with_sampler("ddpm").clip == 2.0
    assert result.with_sampler("euler").clip is None
    assert result.with_sampler("euler").with_sampler("ddim").clip == 2.0


@pytest.mark.parametrize(
    ("fields", "sampler"),
    [
        ({"_class_name": "DDPMScheduler"}, "ddpm"),
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm"),
        ({"_class_name": "EulerDiscreteScheduler"}, "euler"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_ancestral"),
        ({"_class_name": "HeunDiscreteScheduler"}, "heun"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_karras_sigmas": True,
                "lambda_min_clipped": -float("inf"),
            },
            "dpmpp_2m_sde_karras",
        ),
        ({"_class_name": "UniPCMultistepScheduler"}, "unipc"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
    ],
)
def test_every_sampler_is_known_by_its_class(fields, sampler):
    assert settings(**fields).sampler == sampler


def test_defaults_are_those_of_the_files_own_class():
    for name, spacing in (("DDIMScheduler", "leading"), ("EulerDiscreteScheduler", "linspace")):
        result = settings(_class_name=name)
        assert (result.schedule, result.beta_start, result.beta_end) == ("linear", 0.0001, 0.02)
        assert (result.spacing, result.steps_offset, result.prediction) == (spacing, 0, "eps")
    heun = settings(_class_name="HeunDiscreteScheduler")
    assert (heun.schedule, heun.beta_start, heun.beta_end) == ("linear", 0.00085, 0.012)
    assert settings(_class_name="LCMScheduler").schedule == "scaled_linear"


def test_another_sampler_keeps_schedule_spacing_offset_and_prediction():
    mine = settings(**{**SD2_FILE, "timestep_spacing": "trailing", "steps_offset": 3})
    other = mine.with_sampler("dpmpp_2m_karras")
    assert other.sampler == "dpmpp_2m_karras"
    assert other.karras
    for name in ("schedule", "beta_start", "beta_end", "spacing", "steps_offset", "prediction", "set_alpha_to_one"):
        assert getattr(other, name) == getattr(mine, name)
    assert mine.with_sampler("ddim") is mine


def test_spacing_that_no_file_states_is_each_samplers_own():
    unstated = settings(**SD1_FILE)
    assert unstated.spacing == "leading"
    assert unstated.with_sampler("euler").spacing == "linspace"
    assert unstated.with_sampler("euler").with_sampler("ddim").spacing == "leading"
    assert settings(**SD1_FILE, timestep_spacing="leading").with_sampler("euler").spacing == "leading"


def test_karras_levels_are_the_names_to_say():
    euler = settings(_class_name="EulerDiscreteScheduler", use_karras_sigmas=True)
    assert euler.karras
    assert not euler.with_sampler("heun").karras
    assert SamplerSettings(sampler="dpmpp_2m_karras").karras
    assert not SamplerSettings(sampler="dpmpp_2m", karras=True).karras


@pytest.mark.parametrize("theirs", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_translated(theirs):
    ours = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}[theirs]
    assert settings(_class_name="DDIMScheduler", beta_schedule=theirs).schedule == ours


def test_trained_betas_stand_before_the_schedule():
    result = settings(_class_name="DDIMScheduler", trained_betas=[0.1, 0.2, 0.5], num_train_timesteps=3)
    assert (result.schedule, result.betas, result.num_timesteps) == ("betas", (0.1, 0.2, 0.5), 3)


@pytest.mark.parametrize("betas", [[], [0.1], [0.1, 2.0, 0.1], [0.1, 0.0, 0.1], ["a"] * 3, "abc", [True] * 3])
def test_unsound_betas_are_refused(betas):
    with pytest.raises(CheckpointError, match="trained_betas"):
        settings(_class_name="DDIMScheduler", trained_betas=betas, num_train_timesteps=3)


@pytest.mark.parametrize(
    "name", ["LMSDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", None, 3, ["PNDMScheduler"]]
)
def test_unknown_class_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match="PNDMScheduler.*Received"):
        settings(_class_name=name)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("PNDMScheduler", "skip_prk_steps", False),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("DDIMScheduler", "prediction_type", "flow_prediction"),
        ("DDIMScheduler", "timestep_spacing", "random"),
        ("DDIMScheduler", "predict_epsilon", False),
        ("DDIMScheduler", "unheard_of", 1),
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True),
        ("HeunDiscreteScheduler", "use_exponential_sigmas", True),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("LCMScheduler", "timestep_scaling", 1.0),
    ],
)
def test_what_the_samplers_cannot_do_is_refused_by_the_fields_name(name, field, value):
    with pytest.raises(CheckpointError, match=f"\n  {field}="):
        settings(**{"_class_name": name, "skip_prk_steps": True, field: value})


def test_fields_of_other_classes_change_nothing():
    """EulerDiscreteScheduler files carry what their earlier classes left in them."""
    left = {"thresholding": True, "skip_prk_steps": False, "sample_max_value": 1.0, "algorithm_type": "dpmsolver"}
    assert settings(_class_name="EulerDiscreteScheduler", **left) == settings(_class_name="EulerDiscreteScheduler")


@pytest.mark.parametrize(
    ("field", "value"), [("num_train_timesteps", 0), ("beta_end", "big"), ("steps_offset", -1), ("clip_sample", "no")]
)
def test_field_of_the_wrong_kind_is_an_error_that_names_it(field, value):
    with pytest.raises(CheckpointError, match=field):
        settings(_class_name="DDIMScheduler", **{field: value})


def test_zero_terminal_snr_is_read_for_every_prediction():
    """diffusers opens such files, whatever their network predicts."""
    for theirs, ours in (("epsilon", "eps"), ("v_prediction", "v")):
        result = settings(_class_name="DDIMScheduler", rescale_betas_zero_snr=True, prediction_type=theirs)
        assert (result.zero_terminal_snr, result.prediction) == (True, ours)


ROUND_TRIPS = [
    SamplerSettings(),
    SamplerSettings(sampler="ddim", prediction="v", zero_terminal_snr=True, spacing="trailing", clip_range=1.5),
    SamplerSettings(sampler="ddpm", schedule="cosine", prediction="x0", num_timesteps=200),
    SamplerSettings(sampler="ddim", schedule="betas", betas=(0.1, 0.2), num_timesteps=2, set_alpha_to_one=True),
    SamplerSettings(sampler="euler", karras=True, final_sigmas_type="sigma_min", spacing="linspace"),
    SamplerSettings(sampler="unipc", lower_order_final=False, spacing="linspace", spacing_is_default=True),
    SamplerSettings(sampler="dpmpp_2m_sde_karras", euler_at_final=True),
    SamplerSettings(sampler="lcm", original_steps=25),
    *(SamplerSettings(sampler=name) for name in SAMPLER_CLASSES),
]


@pytest.mark.parametrize("mine", ROUND_TRIPS, ids=lambda mine: mine.sampler)
def test_what_is_written_is_read_again(tmp_path, mine):
    write_scheduler(tmp_path / "scheduler", mine, "0.42.1")
    assert read_scheduler(tmp_path) == mine
    assert read_scheduler(tmp_path / "scheduler") == mine
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_diffusers_version"] == "0.42.1"


def test_stable_diffusions_file_is_written_as_it_was():
    fields = fields_from_settings(settings(**SD1_FILE))
    assert {**fields, "_diffusers_version": "0.6.0"} == {**SD1_FILE, "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    "arguments",
    [{"sampler": "plms"}, {"prediction": "epsilon"}, {"schedule": "betas"}, {"betas": (0.1,)}, {"spacing": "even"}],
)
def test_settings_are_checked_when_they_are_made(arguments):
    with pytest.raises(ValueError, match="Received"):
        SamplerSettings(**arguments)


def test_missing_scheduler_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler/scheduler_config.json"):
        read_scheduler(tmp_path)
