"""This package beside diffusers and transformers, live, on tiny pipelines: the same numbers and the same pictures."""

import json
import logging
import shutil
import warnings
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import reference  # noqa: E402
import tiny_pipelines  # noqa: E402
from reference import GUIDANCE_SCALE, NOISY, NUM_STEPS, PROMPTS, SAMPLERS, TEXTS  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import latentdiff as ld  # noqa: E402
from latentdiff import fused  # noqa: E402
from latentdiff.backend import Compiled, to_numpy  # noqa: E402
from latentdiff.checkpoints.diffusers import KINDS  # noqa: E402
from latentdiff.checkpoints.sources import open_source  # noqa: E402
from latentdiff.models import attention, layers  # noqa: E402
from latentdiff.models.tokenizer import TruncationWarning  # noqa: E402
from latentdiff.presets import named_variables  # noqa: E402

# diffusers' and torch's own business.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DETERMINISTIC = [name for name in SAMPLERS if name not in NOISY]
# Sizes of latents; those that the UNet's levels do not halve evenly too, since a picture need only fit the autoencoder.
SIZES = [(8, 12), (9, 14), (10, 7), (5, 6)]


@pytest.fixture(scope="session")
def noise():
    shape = (1 + NUM_STEPS, len(PROMPTS), *tiny_pipelines.LATENT_SIZE, 4)
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def assert_close(ours, theirs, tolerance=1e-4):
    ours = to_numpy(ours, "float32")
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"relative error {error:.2e}, from {theirs.min():.3g} to {theirs.max():.3g}"


def assert_same_picture(images, latent, their_latent, theirs):
    assert_close(latent, their_latent)
    their_images = reference.picture(theirs, their_latent)
    assert images.dtype == np.uint8
    assert images.shape == their_images.shape
    assert np.abs(images.astype(int) - their_images).max() <= 2


def generate(pipe, noise, prompts=PROMPTS, num_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE, **arguments):
    """(images, their latents)"""
    factor = pipe.autoencoder.factor
    latents = []

    def keep(step, latent):
        latents.append(latent)

    images = pipe.generate(
        prompts,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        noise=noise,
        height=noise.shape[-3] * factor,
        width=noise.shape[-2] * factor,
        progress=False,
        callback=keep,
        **arguments,
    )
    return images, latents[-1]


def test_tokens_are_equal(ours, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        np.testing.assert_array_equal(ours.tokenizer(TEXTS), reference.tokens(theirs, TEXTS))


def test_context_is_equal(ours, theirs):
    tokens = reference.tokens(theirs, [*PROMPTS, ""])
    assert_close(ours.text_encoder(tokens), reference.context(theirs, tokens))


@pytest.mark.parametrize("size", SIZES)
def test_unet_output_is_equal(size, ours, theirs):
    rng = np.random.default_rng(2)
    x_t = rng.standard_normal((4, *size, 4)).astype("float32")
    timestep = np.array([0, 1, 500, 999], "float32")
    context = reference.context(theirs, reference.tokens(theirs, [*PROMPTS, "", "a cat"]))
    output = ours.unet({"latent": x_t, "timestep": timestep, "context": context})
    assert_close(output, reference.unet_output(theirs.unet, x_t, timestep, context))


@pytest.mark.parametrize("size", SIZES)
def test_encoded_image_is_equal(size, ours, theirs):
    image = np.random.default_rng(3).uniform(-1, 1, (2, 4 * size[0], 4 * size[1], 3)).astype("float32")
    assert_close(ours.autoencoder.encode(image), reference.encoded(theirs.vae, image))


@pytest.mark.parametrize("size", SIZES)
def test_decoded_latent_is_equal(size, ours, theirs):
    latent = np.random.default_rng(4).standard_normal((2, *size, 4)).astype("float32")
    assert_close(ours.autoencoder.decode(latent), reference.decoded(theirs.vae, latent))


@pytest.fixture
def as_if_large(monkeypatch):
    """What large arrays alone are computed by: fused passes, attention in pieces, dense layers as convolutions."""
    monkeypatch.setattr(fused, "LARGE", 1)
    monkeypatch.setattr(attention, "SCORES", 256)
    monkeypatch.setattr(attention, "SCORES_OF_HEAD", 64)
    monkeypatch.setattr(attention, "FEWEST", 2)
    monkeypatch.setattr(layers, "MANY_POSITIONS", 1)


def test_networks_are_equal_in_the_graphs_that_large_pictures_have(as_if_large, ours, theirs):
    rng = np.random.default_rng(5)
    x_t, timestep = rng.standard_normal((2, 8, 12, 4)).astype("float32"), np.array([3, 800], "float32")
    context = reference.context(theirs, reference.tokens(theirs, PROMPTS[:2]))
    decode = Compiled(ours.autoencoder.decode, [ours.autoencoder])
    unet = Compiled(lambda x, t, c: ours.unet({"latent": x, "timestep": t, "context": c}), [ours.unet])
    assert_close(unet(x_t, timestep, context), reference.unet_output(theirs.unet, x_t, timestep, context))
    assert_close(decode(x_t), reference.decoded(theirs.vae, x_t))
    definition = str(unet._run.get_concrete_function(x_t, timestep, context).graph.as_graph_def())
    assert definition.count("_XlaMustCompile") > 10 and definition.count('op: "Softmax"') > 10


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_picture_of_a_deterministic_sampler_is_equal(sampler, ours, theirs, noise):
    images, latent = generate(ours, noise[0], sampler=sampler)
    assert_same_picture(images, latent, reference.final_latent(theirs, noise[0], sampler=sampler), theirs)


@pytest.mark.parametrize("sampler", NOISY)
def test_picture_of_a_noisy_sampler_is_equal_with_the_same_noise(sampler, ours, theirs, noise):
    images, latent = generate(ours, noise, sampler=sampler)
    assert_same_picture(images, latent, reference.final_latent(theirs, noise, sampler=sampler), theirs)


def test_default_sampler_is_the_directorys_own(ours, theirs, noise):
    images, latent = generate(ours, noise[0])
    assert_same_picture(images, latent, reference.final_latent(theirs, noise[0]), theirs)


def test_negative_prompts_guide_away_as_theirs(ours, theirs, noise):
    negative = ["blue, noto style", "rain"]
    images, latent = generate(ours, noise[0], sampler="dpmpp_2m", negative_prompt=negative)
    expected = reference.final_latent(theirs, noise[0], sampler="dpmpp_2m", negative_prompt=negative)
    assert_same_picture(images, latent, expected, theirs)


def test_guidance_scale_one_is_their_unguided_picture(ours, theirs, noise):
    images, latent = generate(ours, noise[0], sampler="ddim", guidance_scale=1.0)
    expected = reference.final_latent(theirs, noise[0], sampler="ddim", guidance_scale=1.0)
    assert_same_picture(images, latent, expected, theirs)


@pytest.mark.parametrize(("sampler", "num_steps"), [("dpmpp_2m", 17), ("unipc", 7), ("pndm", 3), ("ddim", 1)])
def test_picture_is_equal_at_other_numbers_of_steps(sampler, num_steps, ours, theirs, noise):
    """DPM-Solver++ takes its last step otherwise from 15 steps on; 1000 is no multiple of 17, 7 and 3."""
    images, latent = generate(ours, noise[0], sampler=sampler, num_steps=num_steps)
    expected = reference.final_latent(theirs, noise[0], sampler=sampler, num_steps=num_steps)
    assert_same_picture(images, latent, expected, theirs)


def test_picture_is_equal_at_a_size_that_the_unet_does_not_halve(ours, theirs):
    noise = np.random.default_rng(5).standard_normal((2, 10, 14, 4)).astype("float32")
    images, latent = generate(ours, noise, sampler="dpmpp_2m")
    assert_same_picture(images, latent, reference.final_latent(theirs, noise, sampler="dpmpp_2m"), theirs)


# The other way: written here, opened there.


class Complaints(logging.Handler):
    """What the peers' loggers say at the level of a warning or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def no_complaints():
    """Neither a warning nor a line in the peers' logs."""
    handler = Complaints()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [*handler.messages, *(str(warning.message) for warning in caught)] == []


@pytest.fixture(scope="module")
def changed(kind, directory):
    """A pipeline of ours whose every weight has moved, so that what it writes cannot be the file that it read."""
    pipe = ld.TextToImage.from_preset(str(directory), dtype="float32")
    rng = np.random.default_rng(6)
    for network in (pipe.text_encoder, pipe.unet, pipe.autoencoder):
        for _, variable in named_variables(network):
            value = to_numpy(variable, "float32")
            variable.assign(value + 0.02 * rng.standard_normal(value.shape).astype("float32"))
    return pipe


@pytest.fixture(scope="module", params=["float32", "float16"])
def saved(request, changed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / request.param
    changed.save_to_preset(str(directory), dtype=request.param)
    return directory, request.param


def test_diffusers_opens_what_is_saved_without_a_warning(saved):
    directory, _ = saved
    with no_complaints():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(directory)
    assert pipe.safety_checker is None


def test_diffusers_computes_the_same_with_what_is_saved(saved, changed):
    directory, dtype = saved
    # float16 rounds each weight, by up to 2^-11 of it.
    tolerance = {"float32": 1e-4, "float16": 2e-2}[dtype]
    theirs = reference.open_pipeline(directory)
    tokens = reference.tokens(theirs, PROMPTS)
    np.testing.assert_array_equal(changed.tokenizer(PROMPTS), tokens)
    context = reference.context(theirs, tokens)
    assert_close(changed.text_encoder(tokens), context, tolerance)
    rng = np.random.default_rng(7)
    x_t = rng.standard_normal((2, 6, 8, 4)).astype("float32")
    timestep = np.array([3, 777], "float32")
    output = changed.unet({"latent": x_t, "timestep": timestep, "context": context})
    assert_close(output, reference.unet_output(theirs.unet, x_t, timestep, context), tolerance)
    image = rng.uniform(-1, 1, (1, 24, 40, 3)).astype("float32")
    assert_close(changed.autoencoder.encode(image), reference.encoded(theirs.vae, image), tolerance)
    assert_close(changed.autoencoder.decode(x_t), reference.decoded(theirs.vae, x_t), tolerance)


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m"])
def test_diffusers_makes_the_same_picture_of_what_is_saved(sampler, changed, noise, tmp_path):
    changed.save_to_preset(str(tmp_path / "saved"))
    theirs = reference.open_pipeline(tmp_path / "saved")
    images, latent = generate(changed, noise[0], sampler=sampler)
    assert_same_picture(images, latent, reference.final_latent(theirs, noise[0], sampler=sampler), theirs)


def test_each_part_of_what_is_saved_opens_alone_without_a_warning(saved):
    from transformers import CLIPTextModel, CLIPTokenizer

    directory, _ = saved
    with no_complaints():
        diffusers.UNet2DConditionModel.from_pretrained(directory / "unet")
        diffusers.AutoencoderKL.from_pretrained(directory / "vae")
        CLIPTextModel.from_pretrained(directory / "text_encoder")
        CLIPTokenizer.from_pretrained(directory / "tokenizer")


# The many forms in which directories come.


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def rewrite(path, change):
    """Reads a safetensors file, and writes what `change` makes of its tensors."""
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def rewrite_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def assert_is_the_directorys(found, directory, *kinds):
    """The same arguments and the same weights, bit for bit; that those of `directory` agree with the peers is above."""
    for kind in kinds:
        mine, expected = open_source(found).component(kind), open_source(directory).component(kind)
        assert mine.config == expected.config
        assert mine.weights.keys() == expected.weights.keys()
        for path, array in expected.weights.items():
            np.testing.assert_array_equal(mine.weights[path].astype("float32"), array.astype("float32"), err_msg=path)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_opens_with_and_without_the_old_prefix(prefix, copy, directory):
    def rename(tensors):
        tensors.pop("text_model.embeddings.position_ids", None)
        return {prefix + key.removeprefix("text_model."): value for key, value in tensors.items()}

    rewrite(copy / "text_encoder" / "model.safetensors", rename)
    assert_is_the_directorys(copy, directory, "text_encoder")


@pytest.mark.parametrize("form", ["dense", "convolution"])
def test_autoencoder_opens_with_the_attention_keys_of_old(form, copy, directory):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for key, value in tensors.items():
            for new, old in names.items():
                if f"attentions.0.{new}." in key:
                    key = key.replace(new, old)
                    if form == "convolution" and value.ndim == 2:
                        value = value[:, :, None, None]
            renamed[key] = value
        assert renamed.keys() != tensors.keys()
        return renamed

    rewrite(copy / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert_is_the_directorys(copy, directory, "autoencoder")


def test_float16_variants_open(directory, tmp_path):
    """Every weight of the tiny pipelines is a number of float16, so nothing is lost."""
    half = diffusers.StableDiffusionPipeline.from_pretrained(directory, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_is_the_directorys(tmp_path / "half", directory, *KINDS)


def test_sharded_weights_open(copy, directory, theirs):
    for folder, model in (("unet", theirs.unet), ("vae", theirs.vae), ("text_encoder", theirs.text_encoder)):
        shutil.rmtree(copy / folder)
        model.save_pretrained(copy / folder, max_shard_size="100KB")
        assert list((copy / folder).glob("*.safetensors.index.json"))
    assert_is_the_directorys(copy, directory, *KINDS)


def test_component_opens_from_its_own_directory(directory, theirs):
    x_t = np.random.default_rng(8).standard_normal((1, 6, 8, 4)).astype("float32")
    tokens = reference.tokens(theirs, PROMPTS[:1])
    context, timestep = reference.context(theirs, tokens), np.array([321], "float32")
    text_encoder = ld.CLIPTextEncoder.from_preset(str(directory / "text_encoder"), dtype="float32")
    assert_close(text_encoder(tokens), context)
    unet = ld.UNet.from_preset(str(directory / "unet"), dtype="float32")
    output = unet({"latent": x_t, "timestep": timestep, "context": context})
    assert_close(output, reference.unet_output(theirs.unet, x_t, timestep, context))
    autoencoder = ld.Autoencoder.from_preset(str(directory / "vae"), dtype="float32")
    image = np.random.default_rng(10).uniform(-1, 1, (1, 24, 32, 3)).astype("float32")
    assert_close(autoencoder.decode(x_t), reference.decoded(theirs.vae, x_t))
    assert_close(autoencoder.encode(image), reference.encoded(theirs.vae, image))


def test_configurations_as_short_as_those_of_old_stand_for_diffusers_defaults(copy, directory):
    """Stable Diffusion 1.5's files name far fewer fields than those that diffusers writes today."""
    old_unet = {
        "_class_name", "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample",
        "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels",
        "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size",
        "up_block_types", "use_linear_projection",
    }  # fmt: skip
    old_autoencoder = {
        "_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
        "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types",
    }  # fmt: skip
    for folder, names in (("unet", old_unet), ("vae", old_autoencoder)):
        rewrite_json(
            copy / folder / "config.json", lambda config, names=names: {k: v for k, v in config.items() if k in names}
        )
    assert_is_the_directorys(copy, directory, "unet", "autoencoder")


def test_one_number_of_heads_stands_for_every_level(tmp_path):
    """Stable Diffusion 1.x says `attention_head_dim: 8` and means eight heads, whatever their width."""
    settings = {**tiny_pipelines.UNET["sd1"], "attention_head_dim": 4}
    unet = diffusers.UNet2DConditionModel(**settings, sample_size=8, norm_num_groups=8).eval()
    tiny_pipelines.randomise(unet, torch.Generator().manual_seed(3))
    unet.save_pretrained(tmp_path / "unet")
    rng = np.random.default_rng(11)
    x_t = rng.standard_normal((2, 8, 6, 4)).astype("float32")
    context = rng.standard_normal((2, 7, 32)).astype("float32")
    timestep = np.array([0, 999], "float32")
    output = ld.UNet.from_preset(str(tmp_path / "unet"), dtype="float32")(
        {"latent": x_t, "timestep": timestep, "context": context}
    )
    assert_close(output, reference.unet_output(unet, x_t, timestep, context))


def test_directory_that_diffusers_writes_anew_gives_the_same_picture(
    directory, ours, theirs, noise, tmp_path, monkeypatch
):
    """Today's diffusers names every field: the scheduler's spacing, the safety checker that is not there."""
    theirs.save_pretrained(tmp_path / "anew")
    assert_is_the_directorys(tmp_path / "anew", directory, *KINDS)
    source, anew = open_source(tmp_path / "anew"), reference.open_pipeline(tmp_path / "anew")
    monkeypatch.setattr(ours, "settings", source.settings())  # the networks are the same, and compiled
    np.testing.assert_array_equal(ld.CLIPTokenizer(**source.tokenizer())(PROMPTS), reference.tokens(anew, PROMPTS))
    for sampler in (None, "euler"):
        images, latent = generate(ours, noise[0], sampler=sampler)
        assert_same_picture(images, latent, reference.final_latent(anew, noise[0], sampler=sampler), theirs)
