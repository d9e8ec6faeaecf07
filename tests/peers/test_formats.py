"""The networks as ONNX and OpenVINO files say in the fields' own runtimes what they say in Keras."""

import numpy as np
import onnxruntime
import openvino
import pytest
from tiny_models import numbers, relative_error

from latentdiff import cli

LENGTH = 77


class OnnxNetwork:
    """One ONNX file in onnxruntime."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
        self.inputs = [(each.name, each.shape) for each in self.session.get_inputs()]

    def __call__(self, *arrays):
        names = [name for name, _ in self.inputs]
        (output,) = self.session.run(None, dict(zip(names, arrays, strict=True)))
        return output


class OpenvinoNetwork:
    """One OpenVINO file, compiled for the processor in full precision."""

    def __init__(self, path):
        model = openvino.Core().compile_model(path.with_suffix(".xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.model = model
        self.inputs = [(each.any_name, each.partial_shape) for each in model.inputs]

    def __call__(self, *arrays):
        (output,) = self.model(list(arrays)).values()
        return output


RUNTIMES = {"onnx": OnnxNetwork, "openvino": OpenvinoNetwork}


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, tiny_directory, tmp_path_factory):
    """The directory that the command wrote, and what runs a file of it."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    assert cli.main(["export", str(tiny_directory), "--output", str(directory), "--format", request.param]) == 0
    return directory, RUNTIMES[request.param]


def asked(batch):
    """The inputs of each network, in the order of its file."""
    rng = np.random.default_rng(batch)
    latent, context = numbers(batch, 4, 6, 4, seed=1), numbers(batch, LENGTH, 8, seed=2)
    return {
        "text_encoder": (rng.integers(0, 624, (batch, LENGTH)).astype("int32"),),
        "unet": (latent, rng.integers(0, 1000, batch).astype("float32"), context),
        "vae_encoder": (numbers(batch, 8, 12, 3, seed=3),),
        "vae_decoder": (latent,),
    }


def keras_networks(pipe):
    def unet(latent, timestep, context):
        return pipe.unet({"latent": latent, "timestep": timestep, "context": context})

    autoencoder = pipe.autoencoder
    return dict(zip(asked(1), (pipe.text_encoder, unet, autoencoder.encoder, autoencoder.decoder), strict=True))


@pytest.mark.parametrize("name", asked(1))
def test_network_says_the_same_in_another_runtime(exported, name, tiny_pipe):
    directory, runtime = exported
    network = runtime(directory / name)
    for batch in (1, 3):
        inputs = asked(batch)[name]
        expected = keras_networks(tiny_pipe)[name](*inputs)
        assert relative_error(network(*inputs), expected) < 1e-4, batch
