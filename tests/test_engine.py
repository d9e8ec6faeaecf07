"""The seam between a pipeline and what computes its networks, with Keras in OpenVINO's place, and what is refused."""

import keras
import numpy as np
import pytest

import latentdiff as ld
from latentdiff import engine, pipeline
from latentdiff.backend import Compiled, to_numpy

ARGUMENTS = {"prompt": ["a red heart", "the cat"], "num_steps": 3, "seed": 5, "progress": False, "output": "latent"}


class OtherNetwork:
    """Takes and gives NumPy's arrays, as OpenVINO does, and is Keras inside."""

    traces = 0

    def __init__(self, network, dtype):
        network, variables = network()
        for variable, other in zip(network.variables, variables, strict=True):
            variable.assign(other)
        self.compiled = Compiled(lambda *arrays: network(list(arrays) if len(arrays) > 1 else arrays[0]), [network])

    def __call__(self, *arrays):
        return to_numpy(self.compiled(*arrays))


@pytest.fixture(scope="module")
def other_pipe(tiny_pipe):
    """The tiny pipeline with its networks outside of the compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "check_engine", lambda *_: None)
        patch.setattr(pipeline, "OpenvinoNetwork", OtherNetwork)
        pipe = ld.TextToImage(tiny_pipe.parts, engine="openvino")
    return pipe


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0, 2), "guidance_rescale": 0.5, "batch_size": 1},
        {"sampler": "dpmpp_2m_sde", "negative_prompt": "green"},
    ],
)
def test_step_after_the_network_is_the_step_with_it_inside(arguments, other_pipe, tiny_pipe):
    expected = tiny_pipe.generate(**ARGUMENTS, **arguments)
    np.testing.assert_allclose(other_pipe.generate(**ARGUMENTS, **arguments), expected, atol=1e-4)


def test_picture_is_the_networks_own(other_pipe, tiny_pipe):
    arguments = {**ARGUMENTS, "output": "image"}
    difference = other_pipe.generate(**arguments).astype(int) - tiny_pipe.generate(**arguments)
    assert np.abs(difference).max() <= 1


def test_unknown_engine_is_told_before_a_file_is_opened():
    with pytest.raises(ValueError, match="`engine` must be one of keras, openvino. Received: engine='tensorrt'."):
        ld.TextToImage.from_preset("no/such/model", engine="tensorrt")


def test_missing_package_is_told_before_a_file_is_opened(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "latentdiff\[openvino\]"'):
        ld.TextToImage.from_preset("no/such/model", engine="openvino")


def test_openvino_takes_networks_of_tensorflow_alone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="needs KERAS_BACKEND=tensorflow. Received: jax."):
        engine.check_engine("openvino", "jax")
    engine.check_engine("openvino", "tensorflow")
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match="needs KERAS_BACKEND=tensorflow. Received: jax."):
            ld.TextToImage.from_preset("no/such/model", engine="openvino")


def test_deep_features_are_kerass_alone(other_pipe):
    with pytest.raises(ValueError, match='`cache_interval` must be 1 with engine="openvino". Received: 2.'):
        other_pipe.generate(**ARGUMENTS, cache_interval=2)


def test_strips_are_kerass_alone(other_pipe):
    with pytest.raises(ValueError, match='`tiled` must not be true with engine="openvino". Received: True.'):
        other_pipe.generate(**ARGUMENTS, tiled=True)
