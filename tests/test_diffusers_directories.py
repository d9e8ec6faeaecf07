"""diffusers directories: every variable once, every key used or named, or one error; and back to the disk."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from latentdiff.checkpoints import diffusers, diffusers_pipeline
from latentdiff.checkpoints.files import CheckpointError

TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 8,
    "eos_token_id": 9,
    "hidden_act": "gelu",
    "hidden_size": 4,
    "intermediate_size": 6,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 5,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 1,
    "projection_dim": 4,
    "torch_dtype": "float32",
    "transformers_version": "4.30.0",
    "vocab_size": 10,
}
TEXT_SHAPES = {
    "embeddings.token_embedding.weight": (10, 4),
    "embeddings.position_embedding.weight": (5, 4),
    "encoder.layers.0.layer_norm1.weight": (4,),
    "encoder.layers.0.layer_norm1.bias": (4,),
    "encoder.layers.0.self_attn.q_proj.weight": (4, 4),
    "encoder.layers.0.self_attn.q_proj.bias": (4,),
    "encoder.layers.0.self_attn.k_proj.weight": (4, 4),
    "encoder.layers.0.self_attn.k_proj.bias": (4,),
    "encoder.layers.0.self_attn.v_proj.weight": (4, 4),
    "encoder.layers.0.self_attn.v_proj.bias": (4,),
    "encoder.layers.0.self_attn.out_proj.weight": (4, 4),
    "encoder.layers.0.self_attn.out_proj.bias": (4,),
    "encoder.layers.0.layer_norm2.weight": (4,),
    "encoder.layers.0.layer_norm2.bias": (4,),
    "encoder.layers.0.mlp.fc1.weight": (6, 4),
    "encoder.layers.0.mlp.fc1.bias": (6,),
    "encoder.layers.0.mlp.fc2.weight": (4, 6),
    "encoder.layers.0.mlp.fc2.bias": (4,),
    "final_layer_norm.weight": (4,),
    "final_layer_norm.bias": (4,),
}
AUTOENCODER_CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "out_channels": 3,
    "sample_size": 16,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": [2, 4],
    "block_out_channels": [4, 8],
    "center_input_sample": False,
    "cross_attention_dim": 6,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 2,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 2,
    "out_channels": 2,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
CONFIGS = {"unet": UNET_CONFIG, "autoencoder": AUTOENCODER_CONFIG, "text_encoder": TEXT_CONFIG}


def text_tensors(prefix="text_model.", dtype=np.float32):
    rng = np.random.default_rng(0)
    return {prefix + key: rng.normal(size=shape).astype(dtype) for key, shape in TEXT_SHAPES.items()}


def save(directory, config, tensors, name="model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / name)
    return directory


def read_text(directory, **changes):
    return diffusers.read_component(directory, "text_encoder", **changes)


def refused_config(kind, **changes):
    """The error's text for a configuration with these changes."""
    with pytest.raises(CheckpointError) as caught:
        diffusers.KINDS[kind].module.read_config({**CONFIGS[kind], **changes}, "config.json")
    return str(caught.value)


def random_arrays(kind, config):
    rng = np.random.default_rng(1)
    return {entry.path: rng.normal(size=entry.shape).astype(np.float32) for entry in diffusers.key_map(kind, config)}


def test_text_encoder_is_read_under_our_names_and_layouts(tmp_path):
    tensors = text_tensors()
    component = read_text(save(tmp_path, TEXT_CONFIG, tensors))
    assert component.config == {
        "vocabulary_size": 10,
        "context_length": 5,
        "width": 4,
        "depth": 1,
        "heads": 2,
        "mlp_width": 6,
        "activation": "gelu",
        "norm_epsilon": 1e-5,
    }
    assert component.ignored == ()
    weights = component.weights
    assert len(weights) == len(tensors)
    embedding = tensors["text_model.embeddings.token_embedding.weight"]
    assert np.array_equal(weights["token_embedding/embeddings"], embedding)
    kernel = tensors["text_model.encoder.layers.0.mlp.fc1.weight"]
    assert np.array_equal(weights["layer_0/mlp_1/kernel"], kernel.T)
    assert np.array_equal(weights["final_norm/gamma"], tensors["text_model.final_layer_norm.weight"])
    assert weights.shape("layer_0/mlp_1/kernel") == (4, 6)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_new"])
def test_both_of_transformers_names_of_tanhs_gelu_are_read_and_the_first_is_written(name, tmp_path):
    component = read_text(save(tmp_path / "in", {**TEXT_CONFIG, "hidden_act": name}, text_tensors()))
    assert component.config["activation"] == "gelu_tanh"
    diffusers.write_component(tmp_path / "out", "text_encoder", component.config, component.weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"


def test_text_encoder_without_prefix_is_the_same(tmp_path):
    old = read_text(save(tmp_path / "old", TEXT_CONFIG, text_tensors("text_model.")))
    new = read_text(save(tmp_path / "new", TEXT_CONFIG, text_tensors("")))
    assert all(np.array_equal(old.weights[path], new.weights[path]) for path in old.weights)


def test_keys_without_a_use_are_named_as_ignored(tmp_path):
    tensors = text_tensors()
    tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]
    tensors["text_projection.weight"] = np.ones((4, 4), np.float32)
    component = read_text(save(tmp_path, TEXT_CONFIG, tensors))
    assert component.ignored == ("text_model.embeddings.position_ids", "text_projection.weight")


def test_one_error_lists_every_key_that_does_not_fit(tmp_path):
    tensors = text_tensors()
    del tensors["text_model.final_layer_norm.bias"]
    tensors["text_model.final_layer_norm.weight"] = np.ones(5, np.float32)
    tensors["text_model.encoder.layers.0.mlp.fc1.bias"] = np.ones(6, np.int32)
    tensors["text_model.encoder.layers.1.mlp.fc1.bias"] = np.ones(6, np.float32)
    with pytest.raises(CheckpointError) as caught:
        read_text(save(tmp_path, TEXT_CONFIG, tensors))
    assert str(caught.value).splitlines()[1:] == [
        "  dtype: text_model.encoder.layers.0.mlp.fc1.bias must be float16, bfloat16, float32 or float64, is I32",
        "  shape: text_model.final_layer_norm.weight must be (4,), is (5,)",
        "  missing: text_model.final_layer_norm.bias (4,)",
        "  left over: text_model.encoder.layers.1.mlp.fc1.bias (6,)",
    ]


def test_key_that_is_there_under_two_names_is_left_over(tmp_path):
    tensors = {**text_tensors(), "final_layer_norm.bias": np.ones(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"left over: final_layer_norm.bias \(4,\)"):
        read_text(save(tmp_path, TEXT_CONFIG, tensors))


def test_nan_in_weights_is_an_error_that_names_the_tensor(tmp_path):
    tensors = text_tensors()
    tensors["text_model.encoder.layers.0.mlp.fc1.weight"][3, 2] = np.nan
    weights = read_text(save(tmp_path, TEXT_CONFIG, tensors)).weights
    with pytest.raises(CheckpointError, match="text_model.encoder.layers.0.mlp.fc1.weight"):
        weights["layer_0/mlp_1/kernel"]


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_weights_arrive_in_the_dtype_that_is_asked_for(tmp_path, stored, dtype):
    tensors = text_tensors(dtype=stored)
    weights = read_text(save(tmp_path, TEXT_CONFIG, tensors), dtype=dtype).weights
    wanted = np.dtype(stored) if dtype is None else diffusers.as_dtype(dtype)
    for array in weights.values():
        assert array.dtype == wanted
    kernel = tensors["text_model.encoder.layers.0.mlp.fc2.weight"]
    assert np.array_equal(weights["layer_0/mlp_2/kernel"], kernel.T.astype(wanted))


def test_variant_is_read_when_it_stands_alone_or_is_asked_for(tmp_path):
    save(tmp_path, TEXT_CONFIG, text_tensors(dtype=np.float16), "model.fp16.safetensors")
    assert read_text(tmp_path).weights["final_norm/beta"].dtype == np.float16
    save(tmp_path, TEXT_CONFIG, text_tensors(), "model.safetensors")
    assert read_text(tmp_path).weights["final_norm/beta"].dtype == np.float32
    assert read_text(tmp_path, variant="fp16").weights["final_norm/beta"].dtype == np.float16


def test_component_is_found_in_a_pipeline_and_alone(tmp_path):
    save(tmp_path / "text_encoder", TEXT_CONFIG, text_tensors())
    assert diffusers.find_component(tmp_path, "text_encoder") == tmp_path / "text_encoder"
    assert diffusers.find_component(tmp_path / "text_encoder", "text_encoder") == tmp_path / "text_encoder"
    with pytest.raises(FileNotFoundError, match="unet/config.json"):
        diffusers.find_component(tmp_path, "unet")
    with pytest.raises(FileNotFoundError, match="no model directory"):
        diffusers.find_component(tmp_path / "gone", "unet")
    with pytest.raises(ValueError, match="kind"):
        diffusers.find_component(tmp_path, "vae")


def test_component_of_another_class_is_refused(tmp_path):
    save(tmp_path, TEXT_CONFIG, text_tensors())
    with pytest.raises(CheckpointError, match="UNet2DConditionModel.*CLIPTextModel"):
        diffusers.read_component(tmp_path, "unet")


@pytest.mark.parametrize(
    "names", [("query", "key", "value", "proj_attn", "group_norm"), ("q", "k", "v", "proj_out", "norm")]
)
@pytest.mark.parametrize("axes", [0, 2])
def test_attention_keys_of_every_age_are_read(tmp_path, names, axes):
    config, _ = diffusers.KINDS["autoencoder"].module.read_config(AUTOENCODER_CONFIG, "config.json")
    arrays = random_arrays("autoencoder", config)
    diffusers.write_component(tmp_path / "new", "autoencoder", config, arrays)
    tensors = safetensors.numpy.load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    renames = dict(zip(("to_q", "to_k", "to_v", "to_out.0", "group_norm"), names, strict=True))
    old = {}
    for key, array in tensors.items():
        for new_name, old_name in renames.items():
            if f"attentions.0.{new_name}." in key:
                key = key.replace(new_name, old_name)
                array = array.reshape(array.shape + (1,) * axes) if array.ndim == 2 else array
        old[key] = array
    assert set(old) != set(tensors)
    save(tmp_path / "old", AUTOENCODER_CONFIG, old, "diffusion_pytorch_model.safetensors")
    weights = diffusers.read_component(tmp_path / "old", "autoencoder").weights
    assert set(weights) == set(arrays)
    assert all(np.array_equal(weights[path], arrays[path]) for path in arrays)


def test_configuration_of_stable_diffusion_1_is_read():
    """The fields of the published file, which is older than most of diffusers' fields."""
    fields = {
        **UNET_CONFIG,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    config, details = diffusers.KINDS["unet"].module.read_config(fields, "config.json")
    assert config == {
        "in_channels": 4,
        "out_channels": 4,
        "channels": (320, 640, 1280, 1280),
        "blocks_per_level": 2,
        "attention": (True, True, True, False),
        "heads": (8, 8, 8, 8),
        "transformer_depth": (1, 1, 1, 1),
        "context_dim": 768,
        "dense_projection": False,
        "groups": 32,
        "norm_epsilon": 1e-5,
        "entry_epsilon": 1e-6,
        "gelu": "exact",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_attention": True,
    }
    assert details == {"sample_size": 64}


def test_attention_head_dim_is_the_number_of_heads_unless_another_field_says_it():
    read = diffusers.KINDS["unet"].module.read_config
    assert read(UNET_CONFIG, "")[0]["heads"] == (2, 4)
    assert read({**UNET_CONFIG, "num_attention_heads": [4, 2]}, "")[0]["heads"] == (4, 2)


def test_fields_that_change_nothing_are_accepted():
    read = diffusers.KINDS["unet"].module.read_config
    harmless = {"upcast_attention": True, "dropout": 0.1, "_anything": 1, "class_embed_type": None, "unheard_of": None}
    same = {"layers_per_block": [1, 1], "cross_attention_dim": [6, 6], "only_cross_attention": [False, False]}
    assert read({**UNET_CONFIG, **harmless, **same}, "") == read(UNET_CONFIG, "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("addition_embed_type", "text_time"),
        ("attention_type", "gated"),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("conv_in_kernel", 5),
        ("cross_attention_dim", [6, 7]),
        ("cross_attention_norm", "layer_norm"),
        ("downsample_padding", 0),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("down_block_types", ["DownBlock2D"]),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 4096),
        ("layers_per_block", [1, 2]),
        ("mid_block_scale_factor", 1.4),
        ("mid_block_type", "UNetMidBlock2D"),
        ("mid_block_type", None),
        ("num_class_embeds", 10),
        ("only_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("reverse_transformer_layers_per_block", [1, 2]),
        ("time_cond_proj_dim", 256),
        ("time_embedding_dim", 99),
        ("time_embedding_type", "fourier"),
        ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("quantization_config", {"bits": 4}),
        ("unheard_of", "yes"),
    ],
)
def test_unet_that_cannot_be_expressed_is_refused_by_the_fields_name(field, value):
    assert f"\n  {field}=" in refused_config("unet", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("latents_mean", [0.0, 0.1]),
        ("out_channels", 4),
        ("use_quant_conv", False),
        ("use_post_quant_conv", False),
        ("unheard_of", 3),
    ],
)
def test_autoencoder_that_cannot_be_expressed_is_refused_by_the_fields_name(field, value):
    assert f"\n  {field}=" in refused_config("autoencoder", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "relu"), ("model_type", "clip"), ("use_attention_mask", True), ("quantization_config", {})],
)
def test_text_encoder_that_cannot_be_expressed_is_refused_by_the_fields_name(field, value):
    assert f"\n  {field}=" in refused_config("text_encoder", **{field: value})


def test_everything_that_is_refused_is_named_at_once():
    message = refused_config("unet", class_embed_type="timestep", conv_in_kernel=5, unheard_of=[1])
    assert all(f"\n  {name}=" in message for name in ("class_embed_type", "conv_in_kernel", "unheard_of"))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("unet", "in_channels", "4"),
        ("unet", "in_channels", 0),
        ("unet", "in_channels", True),
        ("unet", "layers_per_block", 10**9),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", [4, -8]),
        ("unet", "block_out_channels", [4] * 100),
        ("unet", "block_out_channels", [4, 7]),
        ("unet", "attention_head_dim", [3, 4]),
        ("unet", "transformer_layers_per_block", [[1], [2]]),
        ("unet", "norm_eps", float("nan")),
        ("unet", "norm_eps", "small"),
        ("unet", "sample_size", "large"),
        ("unet", "use_linear_projection", 1),
        ("unet", "down_block_types", "DownBlock2D"),
        ("autoencoder", "scaling_factor", 0.0),
        ("autoencoder", "norm_num_groups", 3),
        ("text_encoder", "num_attention_heads", 3),
        ("text_encoder", "num_hidden_layers", 10**6),
        ("text_encoder", "eos_token_id", "last"),
    ],
)
def test_field_of_the_wrong_kind_is_an_error_that_names_it(kind, field, value):
    message = refused_config(kind, **{field: value})
    assert "Received" in message
    assert "config.json" in message


@pytest.mark.parametrize("content", ["", "[]", "{", '{"in_channels": 4, "in_channels": 3}', "\x00", "{}" * 2])
def test_broken_configuration_is_an_error(tmp_path, content):
    save(tmp_path, TEXT_CONFIG, text_tensors())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        read_text(tmp_path)


def test_huge_configuration_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{" + " " * (16 * 2**20) + "}")
    with pytest.raises(CheckpointError, match="at most"):
        read_text(tmp_path)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_again(tmp_path, kind, dtype):
    config, details = diffusers.KINDS[kind].module.read_config(CONFIGS[kind], "config.json")
    arrays = random_arrays(kind, config)
    diffusers.write_component(tmp_path / "x", kind, config, arrays, dtype=dtype, details=details)
    component = diffusers.read_component(tmp_path / "x", kind)
    assert component.config == config
    assert component.details == details
    assert set(component.weights) == set(arrays)
    for path, array in arrays.items():
        assert np.array_equal(component.weights[path], array.astype(diffusers.as_dtype(dtype)))


def test_unusual_arguments_survive_the_round_trip(tmp_path):
    unet, _ = diffusers.KINDS["unet"].module.read_config(UNET_CONFIG, "")
    unet |= {"heads": (1, 2), "transformer_depth": (1, 2), "dense_projection": True, "norm_epsilon": 1e-4}
    unet |= {"flip_sin_to_cos": False, "freq_shift": 1, "attention": (False, True), "in_channels": 5}
    autoencoder, _ = diffusers.KINDS["autoencoder"].module.read_config(AUTOENCODER_CONFIG, "")
    autoencoder |= {"scaling_factor": 1.5, "shift_factor": 0.1, "mid_attention": False}
    for kind, config in (("unet", unet), ("autoencoder", autoencoder)):
        diffusers.write_component(tmp_path / kind, kind, config, random_arrays(kind, config))
        assert diffusers.read_config(tmp_path / kind, kind)[0] == config


def test_keras_own_arguments_and_lists_are_welcome(tmp_path):
    config, _ = diffusers.KINDS["unet"].module.read_config(UNET_CONFIG, "")
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    lists |= {"name": "unet", "dtype": "float32"}
    diffusers.write_component(tmp_path / "x", "unet", lists, random_arrays("unet", config))
    assert diffusers.read_config(tmp_path / "x", "unet")[0] == config


def test_what_diffusers_cannot_say_is_refused_by_name(tmp_path):
    unet, _ = diffusers.KINDS["unet"].module.read_config(UNET_CONFIG, "")
    autoencoder, _ = diffusers.KINDS["autoencoder"].module.read_config(AUTOENCODER_CONFIG, "")
    for kind, config, message in (
        ("unet", {**unet, "mid_attention": False}, "mid_attention"),
        ("unet", {**unet, "gelu": "tanh"}, "must have gelu='exact'. Received: gelu='tanh'"),
        ("unet", {**unet, "entry_epsilon": 1e-5}, "must have entry_epsilon=1e-06. Received: entry_epsilon=1e-05"),
        ("unet", {**unet, "learned_variance": True}, "learned_variance"),
        ("autoencoder", {**autoencoder, "norm_epsilon": 1e-5}, "norm_epsilon=1e-05"),
        ("autoencoder", {"channels": (4, 8)}, "missing .*blocks_per_level"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusers.write_component(tmp_path / "x", kind, config, {})
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_are_not_the_components_are_all_named(tmp_path):
    config, _ = diffusers.KINDS["text_encoder"].module.read_config(TEXT_CONFIG, "")
    arrays = random_arrays("text_encoder", config)
    arrays["more"] = arrays.pop("final_norm/beta")
    arrays["final_norm/gamma"] = np.ones(5)
    with pytest.raises(ValueError) as caught:
        diffusers.write_component(tmp_path / "x", "text_encoder", config, arrays)
    for line in ("missing: final_norm/beta (4,)", "left over: more", "shape: final_norm/gamma must be (4,), is (5,)"):
        assert line in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "message"), [(1e6, "must fit float16. Received: 1e"), (np.nan, "NaN")])
def test_number_that_cannot_be_stored_is_refused_by_name_and_nothing_is_written(tmp_path, value, message):
    config, _ = diffusers.KINDS["text_encoder"].module.read_config(TEXT_CONFIG, "")
    arrays = random_arrays("text_encoder", config)
    arrays["layer_0/mlp_1/kernel"][0, 0] = value
    with pytest.raises(CheckpointError, match=f"{message}.*layer_0/mlp_1/kernel"):
        diffusers.write_component(tmp_path / "x", "text_encoder", config, arrays, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_written_configuration_has_only_fields_that_old_versions_know(tmp_path):
    config, details = diffusers.KINDS["unet"].module.read_config(UNET_CONFIG, "")
    diffusers.write_component(tmp_path / "x", "unet", config, random_arrays("unet", config), details=details)
    fields = json.loads((tmp_path / "x" / "config.json").read_text())
    assert set(fields) == set(UNET_CONFIG) | {"use_linear_projection"}
    assert {**fields, "_diffusers_version": "0.6.0"} == {**UNET_CONFIG, "use_linear_projection": False}


@pytest.fixture
def pipeline(tmp_path):
    save(tmp_path / "text_encoder", TEXT_CONFIG, text_tensors())
    for folder, config in (("unet", UNET_CONFIG), ("vae", AUTOENCODER_CONFIG), ("tokenizer", {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    diffusers_pipeline.write_pipeline_index(tmp_path, "PNDMScheduler")
    return tmp_path


def change_index(directory, **changes):
    path = directory / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_safety_checker_is_named_as_ignored(pipeline):
    assert diffusers_pipeline.read_pipeline_index(pipeline).ignored == ()
    change_index(
        pipeline,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
    )
    assert diffusers_pipeline.read_pipeline_index(pipeline).ignored == ("safety_checker", "feature_extractor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ({"unet": [None, None]}, "lacks: unet"),
        ({"unet": ["my_module", []]}, "my_module"),
        ({"unet": []}, r"`unet` must be \[library, class\]. Received: \[\]"),
        ({"scheduler": ["diffusers"]}, "`scheduler` must be"),
        ({"tokenizer": [None, "CLIPTokenizer"]}, "`tokenizer` must be"),
    ],
)
def test_other_pipelines_are_refused_by_name(pipeline, changes, message):
    change_index(pipeline, **changes)
    with pytest.raises(CheckpointError, match=message):
        diffusers_pipeline.read_pipeline_index(pipeline)


def test_parts_that_lack_are_all_named(pipeline):
    shutil.rmtree(pipeline / "vae")
    shutil.rmtree(pipeline / "tokenizer")
    with pytest.raises(FileNotFoundError, match="lacks: vae/config.json, tokenizer/"):
        diffusers_pipeline.read_pipeline_index(pipeline)
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        diffusers_pipeline.read_pipeline_index(pipeline / "unet")


def test_component_is_not_written_over_a_whole_pipeline(pipeline):
    config, _ = diffusers.KINDS["text_encoder"].module.read_config(TEXT_CONFIG, "")
    arrays = random_arrays("text_encoder", config)
    before = sorted(pipeline.rglob("*"))
    with pytest.raises(FileExistsError, match="whole pipeline's, with `text_encoder`"):
        diffusers.write_component(pipeline, "text_encoder", config, arrays, overwrite=True)
    assert sorted(pipeline.rglob("*")) == before
