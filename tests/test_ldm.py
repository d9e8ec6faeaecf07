"""Single files in LDM's layout: the same tensors as the directory's, whatever was wrapped around them."""

import warnings

import ldm_files
import numpy as np
import pytest
from ldm_files import CONFIGS, DTYPES, prefixed, save

from latentdiff import cli
from latentdiff.checkpoints import diffusers
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.sources import open_source
from latentdiff.pictures import Settings

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
KINDS = ("unet", "autoencoder", "text_encoder")
TINY = {"x": np.zeros(1, "float32")}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def age(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(age, tmp_path_factory):
    """(directory of each component, diffusers' tensors of each component)"""
    root = tmp_path_factory.mktemp(age)
    tensors = {
        kind: ldm_files.component(root / kind, kind, config, seed)
        for seed, (kind, config) in enumerate(CONFIGS[age].items())
    }
    return root, tensors


@pytest.fixture(scope="module")
def ldm(age, theirs):
    """The tensors of the single file."""
    return ldm_files.whole_file(theirs[1], age)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """The tensors of an SD 1.x file; for what is the same in both ages."""
    root = tmp_path_factory.mktemp("sd1-alone")
    tensors = {kind: ldm_files.component(root / kind, kind, config) for kind, config in CONFIGS["sd1"].items()}
    return ldm_files.whole_file(tensors, "sd1")


def assert_same(component, directory):
    """A component's arrays and constructor's arguments are those of the directory, bit by bit."""
    expected = diffusers.read_component(directory, component.kind)
    assert component.config == expected.config
    assert set(component.weights) == set(expected.weights)
    for path, array in expected.weights.items():
        found = component.weights[path]
        assert np.array_equal(found.astype("float32"), array), path


def opened(tmp_path, tensors, metadata=None, **choices):
    return open_source(save(tmp_path / "model.safetensors", tensors, metadata), **choices)


@pytest.mark.parametrize("stored", [*DTYPES, "mixed"])
def test_every_tensor_is_the_directorys(stored, age, theirs, ldm, tmp_path):
    cycle = list(DTYPES.values())
    tensors = {
        name: array.astype(cycle[i % 3] if stored == "mixed" else DTYPES[stored]) if array.dtype.kind == "f" else array
        for i, (name, array) in enumerate(ldm.items())
    }
    source = opened(tmp_path, tensors)
    assert source.kinds == KINDS
    for kind in KINDS:
        component = source.component(kind)
        assert_same(component, theirs[0] / kind)
        stored_as = {array.dtype for array in component.weights.values()}
        assert stored_as == {np.dtype(d) for d in (cycle if stored == "mixed" else [DTYPES[stored]])}
        weights = source.component(kind, dtype="bfloat16").weights
        assert {array.dtype for array in weights.values()} == {np.dtype("bfloat16")}


def test_what_training_leaves_is_named_as_ignored_and_nothing_else_is(age, theirs, ldm, tmp_path):
    more = ldm_files.schedule() | {"global_step": np.array(5), "logvar": np.zeros(1000, "float32")}
    more["model_ema.decay"] = np.array(0.9)
    source = opened(tmp_path, {**ldm, **more})
    for kind in KINDS:
        assert_same(source.component(kind), theirs[0] / kind)
    assert source.component("unet").ignored == ("model_ema.decay",)
    assert source.component("autoencoder").ignored == ()
    bare = {name.removeprefix(COND_STAGE) for name in source.component("text_encoder").ignored}
    assert bare == (
        {"transformer.text_model.embeddings.position_ids"}
        if age == "sd1"
        else {"model.text_projection", "model.logit_scale", "model.attn_mask"}
    )


def test_names_under_state_dict_are_the_same(theirs, ldm, tmp_path):
    source = opened(tmp_path, prefixed("state_dict.", ldm) | {"epoch": np.array(3)})
    for kind in KINDS:
        assert_same(source.component(kind), theirs[0] / kind)


def test_averaged_weights_are_read_only_when_they_are_asked_for(theirs, ldm, tmp_path):
    tensors = {**ldm, **ldm_files.averaged(ldm)}
    plain, ema = opened(tmp_path, tensors), opened(tmp_path, tensors, ema=True)
    for kind in KINDS:
        assert_same(plain.component(kind), theirs[0] / kind)
    for kind in ("autoencoder", "text_encoder"):
        assert_same(ema.component(kind), theirs[0] / kind)
    usual, averaged = plain.component("unet"), ema.component("unet")
    assert averaged.config == usual.config
    assert all(np.array_equal(averaged.weights[path], array + 1) for path, array in usual.weights.items())
    assert len(usual.ignored) == len(averaged.ignored) == len(usual.weights) + 2
    assert all(name.startswith("model_ema.") for name in usual.ignored)
    assert sum(name.startswith("model_ema.") for name in averaged.ignored) == 2


def test_averaged_weights_that_are_not_there_are_told(sd1, tmp_path):
    with pytest.raises(CheckpointError, match="`ema` needs averaged weights"):
        opened(tmp_path, sd1 | {"model_ema.decay": np.array(0.9)}, ema=True)
    averaged = ldm_files.averaged(sd1)
    del averaged["model_ema.diffusion_modelout2bias"]
    with pytest.raises(CheckpointError, match="missing: model_ema.diffusion_modelout2bias"):
        opened(tmp_path, sd1 | averaged, ema=True).component("unet")


@pytest.mark.parametrize("prefix", ["", FIRST_STAGE, "state_dict."])
def test_autoencoder_alone_is_read(prefix, theirs, tmp_path):
    bare = ldm_files.autoencoder(theirs[1]["autoencoder"])
    training = {"loss.logvar": np.zeros(()), "loss.discriminator.main.0.weight": np.zeros((2, 3, 4, 4), "float32")}
    source = opened(tmp_path, prefixed(prefix, bare) | training)
    assert source.kinds == ("autoencoder",)
    assert_same(source.component("autoencoder"), theirs[0] / "autoencoder")
    with pytest.raises(FileNotFoundError, match="holds no unet; it holds autoencoder"):
        source.component("unet")
    with pytest.raises(FileNotFoundError, match="no whole pipeline. It lacks: unet, text_encoder"):
        source.settings()
    with pytest.raises(FileNotFoundError, match="stands for no tokenizer"):
        source.tokenizer()


def test_averaged_autoencoder_alone_is_read(theirs, tmp_path):
    bare = ldm_files.autoencoder(theirs[1]["autoencoder"])
    shadow = {"model_ema." + name.replace(".", ""): array + 1 for name, array in bare.items()}
    weights = opened(tmp_path, bare | shadow, ema=True).component("autoencoder").weights
    plain = diffusers.read_component(theirs[0] / "autoencoder", "autoencoder").weights
    assert all(np.array_equal(weights[path], array + 1) for path, array in plain.items())


@pytest.mark.parametrize("prefix", ["", UNET])
def test_unet_alone_is_read(prefix, theirs, ldm, tmp_path):
    bare = {name.removeprefix(UNET): array for name, array in ldm.items() if name.startswith(UNET)}
    source = opened(tmp_path, prefixed(prefix, bare))
    assert source.kinds == ("unet",)
    assert_same(source.component("unet"), theirs[0] / "unet")


def test_text_encoder_without_its_second_word_is_the_same(sd1, tmp_path):
    short = {name.replace("transformer.text_model.", "transformer."): array for name, array in sd1.items()}
    assert short.keys() != sd1.keys()
    expected = opened(tmp_path, sd1).component("text_encoder").weights
    found = opened(tmp_path, short).component("text_encoder").weights
    assert all(np.array_equal(found[path], array) for path, array in expected.items())


def test_of_open_clips_24_layers_23_are_used(tmp_path):
    config = {**CONFIGS["sd2"]["text_encoder"], "vocabulary_size": 50, "depth": 23}
    tensors = ldm_files.component(tmp_path / "theirs", "text_encoder", config)
    component = opened(tmp_path, ldm_files.open_clip(tensors, more_layers=1)).component("text_encoder")
    assert_same(component, tmp_path / "theirs")
    last = [name for name in component.ignored if "resblocks.23." in name]
    assert len(last) == 12 and COND_STAGE + "model.transformer.resblocks.23.attn.in_proj_weight" in last


def test_every_key_without_a_place_is_told(sd1, tmp_path):
    spoilt = dict(sd1)
    del spoilt[UNET + "out.2.bias"]
    spoilt[UNET + "out.3.bias"] = np.zeros(4, "float32")
    spoilt[UNET + "out.0.bias"] = np.zeros(5, "float32")
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, spoilt).component("unet")
    assert str(caught.value).splitlines()[1:] == [
        f"  shape: {UNET}out.0.bias must be (32,), is (5,)",
        f"  missing: {UNET}out.2.bias (4,)",
        f"  left over: {UNET}out.3.bias (4,)",
    ]
    with pytest.raises(CheckpointError, match="nothing else. Left over:\n  embedding_manager.x\n  x"):
        opened(tmp_path, sd1 | TINY | {"embedding_manager.x": TINY["x"]}).component("unet")


def test_fused_projection_of_another_height_is_told(tmp_path):
    tensors = ldm_files.open_clip(
        ldm_files.component(
            tmp_path / "theirs", "text_encoder", {**CONFIGS["sd2"]["text_encoder"], "vocabulary_size": 50}
        )
    )
    name = COND_STAGE + "model.transformer.resblocks.1.attn.in_proj_weight"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(CheckpointError, match=r"left over: .*resblocks.1.attn.in_proj_weight \(47, 16\)"):
        opened(tmp_path, tensors).component("text_encoder")


def zeros(*shape):
    return np.zeros(shape, "float16")


@pytest.mark.parametrize(
    ("tensors", "metadata", "name"),
    [
        ({UNET + "input_blocks.0.0.weight": zeros(32, 9, 3, 3)}, {}, "an inpainting model"),
        ({"input_blocks.0.0.weight": zeros(32, 8, 3, 3)}, {}, "an instruct-pix2pix model"),
        ({UNET + "input_blocks.0.0.weight": zeros(32, 5, 3, 3)}, {}, "depth"),
        ({UNET + "input_blocks.0.0.weight": zeros(32, 7, 3, 3)}, {}, "an upscaling model"),
        ({UNET + "label_emb.0.0.weight": zeros(8, 2816)}, {}, "Stable Diffusion XL"),
        ({UNET + "label_emb.0.0.weight": zeros(8, 2560)}, {}, "the refiner of Stable Diffusion XL"),
        ({UNET + "label_emb.0.0.weight": zeros(8, 1536)}, {}, "unCLIP"),
        ({"conditioner.embedders.1.model.ln_final.weight": zeros(2)}, {}, "Stable Diffusion XL"),
        ({"conditioner.embedders.0.model.ln_final.weight": zeros(2)}, {}, "the refiner of Stable Diffusion XL"),
        ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": zeros(2)}, {}, "Stable Diffusion 3"),
        ({"joint_blocks.37.x_block.mlp.fc1.weight": zeros(2)}, {}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": zeros(2)}, {}, "Flux"),
        ({"control_model.time_embed.0.weight": zeros(2)}, {}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": zeros(2)}, {}, "a ControlNet"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": zeros(2)}, {}, "a LoRA"),
        ({"unet.up_blocks.0.attn1.processor.to_q_lora.up.weight": zeros(2)}, {}, "a LoRA"),
        ({"base_model.model.conv_in.lora_A.weight": zeros(2)}, {}, "a LoRA"),
        ({"lora_te_text_model.hada_w1_a": zeros(2)}, {}, "a LoRA"),
        ({"emb_params": zeros(1, 768)}, {}, "a textual inversion"),
        ({UNET + "input_blocks.1.0.time_stack.in_layers.0.bias": zeros(2)}, {}, "a video model"),
        ({"quantize.embedding.weight": zeros(2), "decoder.conv_in.weight": zeros(2, 2, 3, 3)}, {}, "codebook"),
        ({"decoder.conv_in.weight": zeros(32, 16, 3, 3)}, {}, "16 channels"),
        ({"down_blocks.0.resnets.0.conv1.weight": zeros(2)}, {}, "diffusers' layout"),
        ({"text_model.final_layer_norm.weight": zeros(2)}, {}, "diffusers' layout"),
        (
            {"decoder.conv_in.weight": zeros(32, 4, 3, 3)},
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"},
            "Stable Diffusion XL",
        ),
    ],
)
def test_what_is_not_opened_is_refused_by_its_name(tensors, metadata, name, tmp_path):
    with pytest.raises(CheckpointError, match="Received: `.*model.safetensors`, ") as caught:
        opened(tmp_path, tensors, metadata)
    assert name in str(caught.value)


def test_a_whole_model_with_nine_channels_is_refused_as_inpainting(sd1, tmp_path):
    first = UNET + "input_blocks.0.0.weight"
    with pytest.raises(CheckpointError, match="an inpainting model"):
        opened(tmp_path, sd1 | {first: np.zeros((32, 9, 3, 3), "float32")})


def test_an_unknown_file_is_refused_with_some_of_its_names(tmp_path):
    with pytest.raises(CheckpointError, match="must be Stable Diffusion in LDM's layout. .*1 tensors.*'x'"):
        opened(tmp_path, TINY)
    with pytest.raises(CheckpointError, match="0 tensors"):
        opened(tmp_path, {})


@pytest.mark.parametrize("variant", ["fp16", ""])
def test_a_single_file_has_no_variants(variant, sd1, tmp_path):
    with pytest.raises(CheckpointError, match="has no variants"):
        opened(tmp_path, sd1).component("unet", variant=variant)


def test_channels_that_no_norm_of_ldms_divides_are_told(tmp_path):
    tensors = {f"encoder.down.0.block.0.conv1.{leaf}": zeros(48, 48, 3, 3) for leaf in ("weight",)}
    with pytest.raises(CheckpointError, match=r"multiples of the 32 groups of LDM's norms. Received: \(48,\)"):
        opened(tmp_path, tensors | {"decoder.conv_in.weight": zeros(48, 4, 3, 3)}).component("autoencoder")


def settings(tmp_path, tensors, metadata=None, **choices):
    return opened(tmp_path, tensors, metadata, **choices).settings()


@pytest.mark.parametrize(
    ("more", "metadata", "prediction", "expected"),
    [
        ({}, {}, None, "eps"),
        ({}, {}, "v", "v"),
        ({}, {}, "x0", "x0"),
        ({"v_pred": np.array(0.0)}, {}, None, "v"),
        ({"v_pred": np.array(0.0)}, {}, "eps", "eps"),
        ({}, {"modelspec.prediction_type": "v"}, None, "v"),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, "eps"),
        ({"global_step": np.array(875000)}, {}, None, "eps"),
    ],
)
def test_prediction_is_what_is_chosen_or_said(age, ldm, tmp_path, more, metadata, prediction, expected):
    says = bool(more or metadata or prediction or age == "sd1")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if says else "ignore")
        found = settings(tmp_path, ldm | more, metadata, prediction=prediction)
    assert found.prediction == (expected if says else "v")


def test_prediction_that_nobody_says_is_assumed_with_a_warning(tmp_path):
    source = opened_sd2(tmp_path)
    with pytest.warns(UserWarning, match='does not say what its UNet predicts; v is assumed.*prediction="eps"'):
        assert source.settings().prediction == "v"
    assert source.sample_size() == (96, 96)  # and no second warning
    assert opened_sd2(tmp_path, prediction="eps").sample_size() == (64, 64)


def test_the_commands_first_look_leaves_what_is_assumed_to_the_load(ldm, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli._check_run(opened(tmp_path, ldm), Settings(prompt="a cat", preset="x", seed=0))


def opened_sd2(tmp_path, **choices):
    """As little as is needed to be taken for SD 2.x."""
    names = [UNET + "x", FIRST_STAGE + "x", COND_STAGE + "model.x"]
    return opened(tmp_path, {name: TINY["x"] for name in names}, **choices)


def test_prediction_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="`prediction` must be one of eps, v, x0. Received: prediction='epsilon'"):
        opened(tmp_path, TINY, prediction="epsilon")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1000, 0.00085, 0.012), ("scaled_linear", 1000, 0.00085, 0.012)),
        ((500, 0.0015, 0.0195), ("scaled_linear", 500, 0.0015, 0.0195)),
    ],
)
def test_schedule_is_that_of_the_files_betas(arguments, expected, dtype, sd1, tmp_path):
    betas = {"betas": ldm_files.schedule(*arguments)["betas"].astype(dtype)}
    found = settings(tmp_path, sd1 | betas)
    name, T, start, end = expected
    assert (found.schedule, found.num_timesteps) == (name, T)
    assert (found.beta_start, found.beta_end) == pytest.approx((start, end), rel=1e-3)
    if expected[1] == 1000:
        assert (found.beta_start, found.beta_end) == (start, end)


def test_linear_and_unnamed_schedules_are_read(sd1, tmp_path):
    assert settings(tmp_path, sd1).schedule == "scaled_linear"
    linear = np.linspace(1e-4, 0.02, 100).astype("float32")
    assert settings(tmp_path, sd1 | {"betas": linear}).schedule == "linear"
    other = np.sqrt(linear) / 2
    found = settings(tmp_path, sd1 | {"betas": other})
    assert (found.schedule, found.betas) == ("betas", tuple(other.astype(float)))
    assert settings(tmp_path, sd1 | {"ztsnr": np.array(0.0)}).zero_terminal_snr


@pytest.mark.parametrize("betas", [np.zeros(3, "float32"), np.full(3, np.nan, "float32"), zeros(2, 2), np.arange(1, 3)])
def test_betas_that_are_no_schedule_are_told(betas, sd1, tmp_path):
    with pytest.raises(CheckpointError, match="`betas` must be"):
        settings(tmp_path, sd1 | {"betas": betas})


def test_scale_that_training_measured_is_used(sd1, tmp_path):
    def scaling(value):
        source = opened(tmp_path, sd1 | {"scale_factor": np.array(value, "float32")})
        return source.component("autoencoder").config["scaling_factor"]

    assert scaling(0.25) == 0.25
    for value in (0.0, -1.0, np.inf, np.nan, [1.0, 2.0]):
        with pytest.raises(CheckpointError, match="`scale_factor` must be a positive number"):
            scaling(value)


def test_tokenizer_is_clips(age, ldm, tmp_path):
    from latentdiff.models.tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer(**opened(tmp_path, ldm).tokenizer())
    assert tokenizer.vocabulary_size == 49408
    # CLIP's own tokens of this prompt, of OpenAI's and of every tokenizer since.
    tokens = [49406, 320, 1125, 539, 320, 2368, 49407]
    pad = 49407 if age == "sd1" else 0
    assert tokenizer("a photo of a cat").tolist() == [tokens + [pad] * 70]
    assert CLIPTokenizer.from_preset(tmp_path / "model.safetensors").vocabulary == tokenizer.vocabulary


def test_weights_are_mapped_and_read_when_they_are_asked_for(sd1, tmp_path):
    path = save(tmp_path / "model.safetensors", sd1 | {UNET + "out.2.bias": np.full(4, np.nan, "float32")})
    component = open_source(path).component("unet")
    assert component.weights["conv_out/kernel"].shape == (3, 3, 32, 4)
    with pytest.raises(CheckpointError, match="Weights must be finite. .*model.diffusion_model.out.2.bias"):
        component.weights["conv_out/bias"]


def test_pipeline_of_a_file_is_that_of_its_directory(sd1, tmp_path):
    import latentdiff as ld
    from latentdiff.presets import named_variables

    path = save(tmp_path / "model.safetensors", sd1)
    pipe = ld.TextToImage.from_preset(path, dtype="float32")
    assert pipe.parts.sample_size == (64, 64)
    assert pipe.tokenizer.pad_id == 49407
    source = open_source(path)
    for kind in KINDS:
        weights = source.component(kind).weights
        for name, variable in named_variables(getattr(pipe, kind)):
            assert np.array_equal(np.asarray(variable), weights[name]), name
    pipe.save_to_preset(tmp_path / "directory")
    again = open_source(tmp_path / "directory")
    assert again.settings() == pipe.settings
    assert again.sample_size() == source.sample_size()
    for kind in KINDS:
        assert_same(source.component(kind), tmp_path / "directory")
