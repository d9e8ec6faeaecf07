"""The smallest Stable Diffusion there is: random weights, latents of 4 x 6, pictures of 8 x 12 pixels."""

import functools
from pathlib import Path

import keras
import numpy as np

from latentdiff.backend import Compiled
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.layers import blank_weights
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.presets import Parts, named_variables

TOKENIZER = Path(__file__).parent / "goldens" / "sd1" / "tokenizer"
LATENT = (4, 6, 4)
PICTURE = (8, 12, 3)

UNET = {
    "channels": (8, 16),
    "blocks_per_level": 1,
    "attention": (True, False),
    "heads": (2, 4),
    "context_dim": 8,
    "groups": 4,
}
AUTOENCODER = {"channels": (8, 16), "blocks_per_level": 1, "groups": 4}
TEXT_ENCODER = {"vocabulary_size": 624, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16}


def numbers(*shape, seed=0, scale=1.0):
    """float32 normals."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype("float32")


def to_numpy(array):
    """A copy of a tensor or a variable; `convert_to_numpy` of a variable makes NumPy 2 warn."""
    return np.array(np.asarray(array) if isinstance(array, keras.Variable) else keras.ops.convert_to_numpy(array))


def relative_error(ours, theirs):
    """The largest difference over the largest magnitude."""
    ours, theirs = to_numpy(ours).astype("float64"), to_numpy(theirs).astype("float64")
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def randomize(network, seed=0):
    """Gives every variable random numbers: kernels that keep the variance, norms about one, biases and shifts small."""
    random = np.random.default_rng(seed)
    for path, variable in named_variables(network):
        values = random.normal(size=variable.shape)
        if path.endswith("gamma"):
            values = 1 + 0.2 * values
        elif len(variable.shape) == 1:
            values = 0.2 * values
        elif not path.endswith("embeddings"):
            values = values / np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(values.astype("float32"))
    return network


def make(network_class, config, seed=0, **changes):
    """A network with random weights in float32."""
    with blank_weights():
        network = network_class(**{**config, "dtype": "float32", **changes})
    return randomize(network, seed)


def parts():
    """The parts of the tiny pipeline, of the age of SD 1.x."""
    return Parts(
        tokenizer=CLIPTokenizer.from_directory(TOKENIZER),
        text_encoder=make(CLIPTextEncoder, TEXT_ENCODER, seed=1),
        unet=make(UNet, UNET, seed=2),
        autoencoder=make(Autoencoder, AUTOENCODER, seed=3),
        settings=SamplerSettings(sampler="ddim"),
        sample_size=LATENT[:2],
    )


def run(function, *inputs, model=None):
    """What a layer says, or a function of `model`; compiled on JAX, where every first call of an operation takes long.

    Args:
        function: a built layer, or a function that calls `model`.
        inputs: arrays, or one dict of them.
        model: the layer whose weights `function` uses; None is `function` itself.
    """
    names = tuple(inputs[0]) if isinstance(inputs[0], dict) else None
    arrays = inputs[0].values() if names else inputs
    return _compiled(function, model or function, names)(*arrays)


@functools.cache
def _compiled(function, model, names):
    def call(*arrays):
        return function(dict(zip(names, arrays, strict=True))) if names else function(*arrays)

    return Compiled(call, [model]) if keras.backend.backend() == "jax" else call
