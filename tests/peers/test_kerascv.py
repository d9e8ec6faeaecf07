"""KerasCV's networks, in the layout of its published files, say the same here.

The image encoder and the decoder have their own sizes. Of the text encoders two layers are built, and the UNets with a
tenth (SD 1.x) or a fifth (SD 2.1) of the channels: their classes have no arguments for that, so the names that they
look up in their modules are replaced while they are built.
"""

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
from keras_cv.src.models import stable_diffusion as kcv
from keras_cv.src.models.stable_diffusion import diffusion_model, text_encoder
from keras_cv.src.models.stable_diffusion.diffusion_model import DiffusionModelV2
from keras_cv.src.models.stable_diffusion.text_encoder import TextEncoderV2

import latentdiff as ld
from latentdiff.checkpoints.kerascv import SETTINGS
from latentdiff.diffusion.samplers import make_table, sample
from latentdiff.presets import make_schedule

# Keras' own, when it reads a variable of TensorFlow under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VOCABULARY, LENGTH = 50, 7


class Seen:
    """A module as another one sees it: with some of its names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def build_unet(network_class, divisor):
    """A UNet of latents of 16 x 16 with channels divided by `divisor`; heads stay 8, or stay 64 wide."""
    scaled = {width: width // divisor for width in (320, 640, 1280)}

    def narrow(layer):
        return lambda width, *args, **kwargs: layer(scaled.get(width, width), *args, **kwargs)

    def transformer(heads, width, fully_connected):
        heads, width = (heads // divisor, width) if fully_connected else (heads, width // divisor)
        return own.SpatialTransformer(heads, width, fully_connected=fully_connected)

    def shaped(shape, **kwargs):
        return keras.layers.Input(tuple(scaled.get(width, width) for width in shape), **kwargs)

    own = Seen(None, **vars(diffusion_model))
    layers = Seen(keras.layers, Dense=narrow(keras.layers.Dense), Input=shaped)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PaddedConv2D", "ResBlock", "Upsample"):
            patch.setattr(diffusion_model, name, narrow(getattr(own, name)))
        patch.setattr(diffusion_model, "SpatialTransformer", transformer)
        patch.setattr(diffusion_model, "keras", Seen(keras, layers=layers))
        return network_class(128, 128, LENGTH, download_weights=False)


def build_text_encoder(network_class):
    """A text encoder of two layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "range", lambda depth: range(2), raising=False)
        return network_class(LENGTH, vocab_size=VOCABULARY, download_weights=False)


def randomise(network, seed):
    """Random kernels that keep the variance, norms about 1, everything else about 0."""
    random = np.random.default_rng(seed)
    for variable in network.trainable_weights:
        values = random.normal(size=variable.shape)
        if variable.path.endswith("gamma"):
            values = 1 + 0.2 * values
        elif len(variable.shape) == 1:
            values = 0.2 * values
        elif not variable.path.endswith("embeddings"):
            values = values / np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(values.astype("float32"))
    return network


def save(network, path):
    """The layout of the published files: that of `save_weights` in Keras 2."""
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, network)
    return path


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_near(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("network_class", "divisor", "name"),
    [(kcv.DiffusionModel, 10, "kcv_diffusion_model.h5"), (DiffusionModelV2, 5, "diffusion_model_v2_1.h5")],
)
def test_unet_says_the_same(network_class, divisor, name, tmp_path):
    theirs = randomise(build_unet(network_class, divisor), seed=1)
    ours = ld.UNet.from_preset(save(theirs, tmp_path / name), dtype="float32")
    assert sum(v.shape.num_elements() for v in theirs.weights) == ours.count_params()
    latent, context = numbers(2, 16, 16, 4), numbers(2, LENGTH, ours.config["context_dim"], seed=2)
    timestep = np.array([999.0, 20.0], "float32")
    angles = timestep[:, None] * np.exp(-np.log(10000) * np.arange(320 // divisor / 2) / (320 // divisor / 2))
    embedding = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")
    expected = theirs({"latent": latent, "timestep_embedding": embedding, "context": context})
    assert_near(ours({"latent": latent, "timestep": timestep, "context": context}), expected)


@pytest.mark.parametrize(
    ("network_class", "name"), [(kcv.TextEncoder, "kcv_encoder.h5"), (TextEncoderV2, "text_encoder_v2_1.h5")]
)
def test_text_encoder_says_the_same(network_class, name, tmp_path):
    theirs = randomise(build_text_encoder(network_class), seed=2)
    ours = ld.CLIPTextEncoder.from_preset(save(theirs, tmp_path / name), dtype="float32")
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(2, LENGTH)).astype("int32")
    expected = theirs({"tokens": tokens, "positions": np.arange(LENGTH, dtype="int32")[None].repeat(2, 0)})
    assert_near(ours(tokens), expected)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """KerasCV's image encoder and decoder, and the autoencoder of their files."""
    directory = tmp_path_factory.mktemp("autoencoder")
    encoder = randomise(kcv.ImageEncoder(download_weights=False), seed=3)
    decoder = randomise(kcv.Decoder(64, 64, download_weights=False), seed=4)
    save(encoder, directory / "vae_encoder.h5")
    save(decoder, directory / "kcv_decoder.h5")
    return encoder, decoder, ld.Autoencoder.from_preset(directory, dtype="float32")


def test_image_encoder_says_the_same(halves):
    encoder, _, ours = halves
    image = numbers(1, 64, 64, 3)
    assert_near(ours.encode(image), encoder(image))


def test_decoder_says_the_same(halves):
    _, decoder, ours = halves
    latent = numbers(1, 8, 8, 4)
    assert_near(ours.decode(latent), decoder(latent))


class Stub:
    """What KerasCV's loop asks a network, answered by a function."""

    def __init__(self, function):
        self.predict_on_batch = function


def said_eps(latent, time, context):
    """A made-up UNet that listens to all of its inputs: the latent, cos of the timestep, the context's mean."""
    return np.sin(np.asarray(latent)) * (1 + 0.1 * time) + 0.05 * np.mean(context)


@pytest.mark.parametrize("num_steps", [2, 25, 50])
def test_sampling_is_that_of_kerascv(num_steps):
    noise, context, scale = numbers(1, 16, 16, 4), numbers(77, 8, seed=1) + 1, 7.5
    theirs = kcv.StableDiffusion(128, 128, jit_compile=False)
    latents = []
    theirs._text_encoder = Stub(lambda inputs: np.zeros((1, 77, 8), "float32"))
    theirs._diffusion_model = Stub(
        lambda inputs: said_eps(inputs["latent"], np.asarray(inputs["timestep_embedding"])[0, 0], inputs["context"])
    )
    theirs._decoder = Stub(lambda latent: latents.append(np.asarray(latent)) or np.zeros((1, 128, 128, 3)))
    theirs.generate_image(
        context, num_steps=num_steps, unconditional_guidance_scale=scale, diffusion_noise=noise, batch_size=1
    )

    def denoise(x, timestep, signal, noise):
        conditional, unconditional = (said_eps(x, np.cos(timestep), each) for each in (context, 0.0))
        eps_hat = unconditional + scale * (conditional - unconditional)
        return (x - noise * eps_hat) / signal, eps_hat

    table = make_table(schedule=make_schedule(SETTINGS), num_steps=num_steps, **SETTINGS.table_arguments())
    # Theirs reads alpha_bar from a list of five digits.
    np.testing.assert_allclose(sample(denoise, table, noise, xp=np), latents[0], rtol=2e-3, atol=2e-3)
