"""Against diffusers and transformers: what they save is read to the last key, what is written they open in silence."""

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from silence import Silence

from latentdiff.checkpoints import diffusers_scheduler
from latentdiff.checkpoints.diffusers import KINDS, VERSION, read_component, write_component
from latentdiff.checkpoints.diffusers_pipeline import write_pipeline_index
from latentdiff.checkpoints.diffusers_scheduler import (
    SAMPLER_CLASSES,
    SamplerSettings,
    read_scheduler,
    write_scheduler,
)

LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "sample_size": 8,
}
UNETS = {
    "sd1": {**LEVELS, "attention_head_dim": 4, "cross_attention_dim": 12},
    "sd2": {**LEVELS, "attention_head_dim": (2, 4, 6), "cross_attention_dim": 12, "use_linear_projection": True},
    "deep": {
        **LEVELS,
        "attention_head_dim": 2,
        "cross_attention_dim": 10,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 3),
        "in_channels": 9,
    },
}
AUTOENCODERS = {
    "sd": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
    },
    "plain": {"block_out_channels": (8,), "norm_num_groups": 2, "mid_block_add_attention": False, "shift_factor": 0.1},
}
TEXT_ENCODERS = {
    "sd1": {"hidden_act": "quick_gelu", "num_hidden_layers": 2},
    "sd2": {"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": 7},
}
TEXT_SIZES = {
    "vocab_size": 60,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 0,
}
MODELS = (
    [("unet", name) for name in UNETS]
    + [("autoencoder", name) for name in AUTOENCODERS]
    + [("text_encoder", name) for name in TEXT_ENCODERS]
)
CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "autoencoder": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
}


def make_model(kind, name):
    torch.manual_seed(0)
    if kind == "unet":
        return diffusers.UNet2DConditionModel(**UNETS[name])
    if kind == "autoencoder":
        return diffusers.AutoencoderKL(**AUTOENCODERS[name])
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_SIZES, **TEXT_ENCODERS[name]))


def ours(key, array):
    """A torch array in our layout, by its name and rank alone."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and "embedding.weight" not in key else array


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def saved(request, tmp_path_factory):
    """(kind, their model, the directory that they saved it in)"""
    directory = tmp_path_factory.mktemp("theirs")
    model = make_model(*request.param)
    model.save_pretrained(directory)
    return request.param[0], model, directory


def test_import_consumes_every_key(saved):
    kind, model, directory = saved
    component = read_component(directory, kind)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert component.ignored == ()
    assert len(component.weights) == len(state)
    read = sorted((array.shape, array.tobytes()) for array in component.weights.values())
    assert read == sorted((a.shape, np.ascontiguousarray(a).tobytes()) for a in (ours(*item) for item in state.items()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_files_of_diffusers_are_read(tmp_path, dtype):
    model = make_model("unet", "sd1").to(dtype)
    model.save_pretrained(tmp_path)
    weights = read_component(tmp_path, "unet", dtype="float32").weights
    expected = model.state_dict()["conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
    assert np.array_equal(weights["conv_in/kernel"], expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", ["unet", "text_encoder"])
def test_shards_and_variants_of_their_own_saving_are_read(tmp_path, kind, variant):
    model = make_model(kind, "sd1")
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "unet" else "4KB", variant=variant)
    assert not list(tmp_path.glob("*model.safetensors"))
    weights = read_component(tmp_path, kind).weights
    assert len(weights) == len(model.state_dict())
    assert sum(array.size for array in weights.values()) == sum(v.numel() for v in model.state_dict().values())


def test_what_is_written_opens_in_silence_and_is_the_same_model(saved, tmp_path):
    kind, model, directory = saved
    component = read_component(directory, kind)
    write_component(tmp_path / "ours", kind, component.config, component.weights, details=component.details)
    with Silence():
        opened, report = CLASSES[kind].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for key, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value)
    # Everything that their configurations say, but where the model came from.
    ignored = {"_name_or_path", "_use_default_values", "_diffusers_version", "transformers_version", "architectures"}
    ignored |= {"dtype", "torch_dtype"}
    before, after = ({**(m.config.to_dict() if kind == "text_encoder" else m.config)} for m in (model, opened))
    for field in set(before) - ignored:
        assert listed(after[field]) == listed(before[field]), field
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert set(written) - {"torch_dtype"} <= set(json.loads((directory / "config.json").read_text()))


def test_written_keys_shapes_and_dtypes_are_those_of_their_own_saving(saved, tmp_path):
    kind, _, directory = saved
    component = read_component(directory, kind)
    write_component(tmp_path / "ours", kind, component.config, component.weights)
    described = []
    for folder in (directory, tmp_path / "ours"):
        with safe_open(folder / f"{KINDS[kind].stem}.safetensors", "numpy") as file:
            slices = {key.removeprefix("text_model."): file.get_slice(key) for key in file.keys()}
            described.append({key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()})
            assert file.metadata() == {"format": "pt"}
    assert described[0] == described[1]


def listed(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("sampler", SAMPLER_CLASSES)
@pytest.mark.parametrize("clip_range", [None, 1.0])
def test_scheduler_opens_in_silence_and_says_the_same(tmp_path, sampler, clip_range):
    mine = SamplerSettings(sampler=sampler, prediction="v", spacing="trailing", clip_range=clip_range)
    write_scheduler(tmp_path / "ours", mine, VERSION)
    with Silence():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # their NumPy calls
        scheduler = getattr(diffusers, SAMPLER_CLASSES[sampler]).from_pretrained(tmp_path / "ours")
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.beta_schedule == "scaled_linear"
    if mine.clip is not None:
        assert scheduler.config.clip_sample
    scheduler.save_pretrained(tmp_path / "theirs")
    assert read_scheduler(tmp_path / "theirs") == mine


@pytest.mark.parametrize("sampler", SAMPLER_CLASSES)
@pytest.mark.parametrize("stated", [{}, {"timestep_spacing": "trailing"}])
def test_changing_the_sampler_keeps_what_from_config_keeps(tmp_path, sampler, stated):
    fields = {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    fields |= {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, **stated}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(fields))
    mine = read_scheduler(tmp_path).with_sampler(sampler)
    more = {"use_karras_sigmas": True} if mine.karras else {}
    if "sde" in sampler:
        more["algorithm_type"] = "sde-dpmsolver++"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        config = diffusers.PNDMScheduler.from_pretrained(tmp_path).config
        scheduler = getattr(diffusers, SAMPLER_CLASSES[sampler]).from_config(config, **more)
    scheduler.save_pretrained(tmp_path / "theirs")
    theirs = read_scheduler(tmp_path / "theirs")
    for name in ("sampler", "schedule", "beta_start", "beta_end", "spacing", "steps_offset", "prediction", "karras"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert (mine.clip, mine.set_alpha_to_one) == (theirs.clip, theirs.set_alpha_to_one)


@pytest.mark.parametrize("name", sorted(set(SAMPLER_CLASSES.values())))
def test_defaults_are_their_classes_own(tmp_path, name):
    """Beside clipping and the last level, which are taken from the file alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        scheduler = getattr(diffusers, name)(**more)
    scheduler.save_pretrained(tmp_path)
    stated = read_scheduler(tmp_path)
    unstated = diffusers_scheduler.settings_from_fields({"_class_name": name, **more}, "")
    for field in ("sampler", "schedule", "beta_start", "beta_end", "num_timesteps", "prediction", "spacing"):
        assert getattr(stated, field) == getattr(unstated, field), field
    for field in ("steps_offset", "karras", "final_sigmas_type", "lower_order_final", "euler_at_final"):
        assert getattr(stated, field) == getattr(unstated, field), field
    known = diffusers_scheduler._FIXED[name].keys() | diffusers_scheduler._COMMON_DEFAULTS.keys()
    known |= {"timestep_spacing", "algorithm_type", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift"}
    assert {field for field in scheduler.config if not field.startswith("_")} <= known | {"time_shift_type"}


def test_half_precision_pipeline_opens_in_silence_and_runs_in_float32(tmp_path):
    unet = {**UNETS["sd2"], "cross_attention_dim": TEXT_SIZES["hidden_size"]}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet),
        "autoencoder": make_model("autoencoder", "sd"),
        "text_encoder": make_model("text_encoder", "sd2"),
    }
    for kind, model in parts.items():
        model.save_pretrained(tmp_path / "theirs" / kind)
        component = read_component(tmp_path / "theirs" / kind, kind)
        folder = tmp_path / "ours" / KINDS[kind].folder
        write_component(folder, kind, component.config, component.weights, dtype="float16", details=component.details)
    write_scheduler(tmp_path / "ours" / "scheduler", SamplerSettings(), VERSION)
    write_pipeline_index(tmp_path / "ours", SAMPLER_CLASSES["pndm"])
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"), *"012345"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    tokenizer.save_pretrained(tmp_path / "ours" / "tokenizer")
    with Silence():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipe.set_progress_bar_config(disable=True)
    result = pipe("a b", num_inference_steps=2, height=16, width=8, output_type="np")
    assert result.images.shape == (1, 16, 8, 3)
