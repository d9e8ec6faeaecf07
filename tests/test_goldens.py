"""Two tiny models against what diffusers and transformers said with them; scripts/make_goldens.py made the arrays."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import latentdiff as ld
from latentdiff.backend import to_numpy
from latentdiff.models.tokenizer import TruncationWarning

GOLDENS = Path(__file__).parent / "goldens"
DETERMINISTIC = ["ddim", "pndm", "euler", "heun", "dpmpp_2m", "dpmpp_2m_karras", "unipc"]
NOISY = ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm"]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def goldens(kind):
    with np.load(GOLDENS / f"{kind}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def pipe(kind):
    return ld.TextToImage.from_preset(str(GOLDENS / kind), dtype="float32")


def relative_error(ours, theirs):
    ours = to_numpy(ours, "float32")
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_tokens_are_those_of_transformers(pipe, goldens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        tokens = pipe.tokenizer([str(text) for text in goldens["texts"]])
    np.testing.assert_array_equal(tokens, goldens["tokens"])


def test_context_is_that_of_transformers(pipe, goldens):
    tokens = pipe.tokenizer([str(prompt) for prompt in goldens["prompts"]])
    assert relative_error(pipe.text_encoder(tokens), goldens["context"]) < 1e-4


def test_unet_output_is_that_of_diffusers(pipe, goldens):
    inputs = {"latent": goldens["noise"][0], "timestep": goldens["timestep"], "context": goldens["context"]}
    assert relative_error(pipe.unet(inputs), goldens["unet"]) < 1e-4


def test_encoded_image_is_that_of_diffusers(pipe, goldens):
    assert relative_error(pipe.autoencoder.encode(goldens["image"]), goldens["encoded"]) < 1e-4


def test_decoded_latent_is_that_of_diffusers(pipe, goldens):
    assert relative_error(pipe.autoencoder.decode(goldens["noise"][0]), goldens["decoded"]) < 1e-4


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *NOISY])
def test_picture_is_that_of_diffusers(sampler, pipe, goldens):
    noise = goldens["noise"] if sampler in NOISY else goldens["noise"][0]
    factor = pipe.autoencoder.factor
    latents = []

    def keep(step, latent):
        latents.append(latent)

    images = pipe.generate(
        [str(prompt) for prompt in goldens["prompts"]],
        sampler=sampler,
        num_steps=int(goldens["num_steps"]),
        guidance_scale=float(goldens["guidance_scale"]),
        noise=noise,
        height=noise.shape[-3] * factor,
        width=noise.shape[-2] * factor,
        progress=False,
        callback=keep,
    )
    expected = goldens[f"picture_{sampler}"]
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).max() <= 2
    # A picture's grey levels are coarse; the latent sees a wrong coefficient that they would let pass.
    assert relative_error(latents[-1], goldens[f"latent_{sampler}"]) < 1e-4


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_every_sampler_has_a_picture_of_its_own(sampler, goldens):
    """What the comparison above rests on: by its latent, no golden sampler could pass for another."""
    own = goldens[f"latent_{sampler}"]
    others = [goldens[f"latent_{name}"] for name in DETERMINISTIC + NOISY if name != sampler]
    assert min(np.abs(own - other).max() / np.abs(own).max() for other in others) > 2e-3
