"""`generate` with OpenVINO's networks makes the pictures that it makes with Keras' own."""

import tempfile

import numpy as np
import pytest
from tiny_models import LATENT, numbers, relative_error

import latentdiff as ld

ARGUMENTS = {"prompt": ["a red heart", "the cat"], "num_steps": 3, "seed": 5, "progress": False}


def grey_levels(first, second):
    """The largest difference of two pictures."""
    assert first.dtype == second.dtype == np.uint8
    assert first.shape == second.shape
    return np.abs(first.astype(int) - second).max()


@pytest.fixture(scope="module")
def fast_pipe(tiny_pipe):
    """The tiny pipeline, the same weights, in OpenVINO."""
    return ld.TextToImage(tiny_pipe.parts, engine="openvino")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0, 2), "guidance_rescale": 0.5, "negative_prompt": ["green", "blue"]},
        {"num_images": 2, "batch_size": 3, "sampler": "euler_ancestral"},
        {"height": 6, "width": 10, "sampler": "dpmpp_2m"},
        {"noise": numbers(2, *LATENT), "eta": 0.5},
    ],
)
def test_engines_make_the_same_picture(arguments, fast_pipe, tiny_pipe):
    theirs = fast_pipe.generate(**ARGUMENTS, **arguments)
    assert len(np.unique(theirs)) > 50
    assert grey_levels(theirs, tiny_pipe.generate(**ARGUMENTS, **arguments)) <= 1


def test_engines_make_the_same_latents(fast_pipe, tiny_pipe):
    seen = []
    latent = fast_pipe.generate(**ARGUMENTS, output="latent", callback=lambda step, latent: seen.append(latent))
    np.testing.assert_array_equal(seen[-1], latent)
    np.testing.assert_allclose(latent, tiny_pipe.generate(**ARGUMENTS, output="latent"), atol=1e-3)


def test_networks_are_converted_once_compiled_for_each_size_and_leave_no_file(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pipe = ld.TextToImage(tiny_pipe.parts, engine="openvino")
    pipe.generate(**ARGUMENTS)
    networks, traces = (pipe._encode, pipe._predict, pipe._decode), pipe.traces
    assert [(network.traces, network.compiled) for network in networks] == [(1, 1)] * 3
    pipe.generate(**{**ARGUMENTS, "seed": 6, "num_steps": 2, "guidance_scale": 2.0})
    assert [(network.traces, network.compiled) for network in networks] == [(1, 1)] * 3
    assert pipe.traces == traces
    pipe.generate(**ARGUMENTS, height=6)
    pipe.generate(**ARGUMENTS)
    assert [(network.traces, network.compiled) for network in networks] == [(1, 1), (1, 2), (1, 2)]
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_network_is_told_the_timestep_in_full(tiny_directory, tiny_pipe):
    """At 951 and at 952, which are one number in bfloat16, the tiny UNet's outputs are nine percent apart."""
    pipe = ld.TextToImage.from_preset(tiny_directory, dtype="bfloat16", engine="openvino")
    arguments = {**ARGUMENTS, "num_steps": 20, "output": "latent"}  # of which one is 951
    assert relative_error(pipe.generate(**arguments), tiny_pipe.generate(**arguments)) < 0.05
