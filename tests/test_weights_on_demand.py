"""Weights that are in memory only while they are used: the same pictures, and no more held than is said."""

import shutil

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import numbers, to_numpy

import latentdiff as ld
from latentdiff import backend, presets
from latentdiff.engine import NETWORKS, check_free
from latentdiff.presets import named_variables

ARGUMENTS = {"prompt": ["a red heart", "the cat", "the cat"], "num_steps": 3, "seed": 5, "progress": False}


def numbers_held(pipe):
    """How many numbers the variables of each network hold."""
    networks = {kind: getattr(pipe.parts, kind) for kind in NETWORKS}
    return {kind: sum(to_numpy(v).size for _, v in named_variables(network)) for kind, network in networks.items()}


def whole_networks(pipe):
    """Those whose variables hold all that they should."""
    held = numbers_held(pipe)
    return {kind for kind in NETWORKS if held[kind] == getattr(pipe.parts, kind).count_params()}


@pytest.fixture(scope="module")
def pipe(tiny_directory):
    return ld.TextToImage.from_preset(tiny_directory, dtype="float32", free=NETWORKS)


def test_pictures_are_the_same_and_nothing_is_traced_again(pipe, tiny_pipe):
    expected = tiny_pipe.generate(**ARGUMENTS)
    np.testing.assert_array_equal(pipe.generate(**ARGUMENTS), expected)
    assert pipe.traces == 4  # noise, text encoder, a step, decoder
    np.testing.assert_array_equal(pipe.generate(**ARGUMENTS), expected)
    assert pipe.traces == 4
    assert np.abs(pipe.generate(**ARGUMENTS, tiled=True).astype(int) - expected).max() <= 1


def test_each_network_holds_its_weights_while_it_is_used_and_reads_them_once(pipe, monkeypatch):
    read, seen = [], []
    monkeypatch.setattr(
        "latentdiff.weights_on_demand.fill",
        lambda network, component: (read.append(component.kind), presets.fill(network, component)),
    )
    variables = sum(len(list(named_variables(getattr(pipe.parts, kind)))) for kind in NETWORKS)
    assert sum(numbers_held(pipe).values()) == variables  # a number of each, in place of its array
    pipe.generate(**ARGUMENTS, batch_size=1, callback=lambda *_: seen.append(whole_networks(pipe)))
    assert seen == [{"unet"}] * 9
    assert read == list(NETWORKS)
    assert sum(numbers_held(pipe).values()) == variables
    pipe.generate(**ARGUMENTS, output="latent")
    assert read == [*NETWORKS, "text_encoder", "unet"]


def test_what_is_wrong_with_weights_that_are_used_last_is_told_at_the_load(tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    arrays["decoder.conv_out.bias"][0] = np.nan
    save_file(arrays, path)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*decoder\.conv_out\.bias"):
        ld.TextToImage.from_preset(tmp_path / "broken", dtype="float32", free=NETWORKS)


def test_weights_are_freed_after_an_error(pipe):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate(**ARGUMENTS, callback=stop)
    assert whole_networks(pipe) == set()


def test_stopped_run_gives_the_parts_that_were_made(pipe):
    latents = pipe.generate(**ARGUMENTS, batch_size=1, output="latent")
    stopped = pipe.generate(**ARGUMENTS, batch_size=1, output="latent", callback=lambda row, _: row < 3)
    np.testing.assert_array_equal(stopped, latents[:1])


def test_what_is_saved_is_whole(pipe, tiny_directory, tmp_path):
    pipe.save_to_preset(tmp_path / "again")
    files = sorted(path.relative_to(tiny_directory) for path in tiny_directory.rglob("*.safetensors"))
    assert len(files) == len(NETWORKS)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tiny_directory / file).read_bytes()
    assert whole_networks(pipe) == set()


def test_network_that_is_taken_has_its_weights_and_keeps_them(pipe, tiny_pipe):
    pipe = ld.TextToImage(pipe.parts)
    for mine, other in zip(pipe.unet.variables, tiny_pipe.unet.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(other))
    bias = pipe.unet.get_layer("conv_out").bias
    bias.assign(to_numpy(bias) + 1)
    latent = pipe.generate(**ARGUMENTS, output="latent")
    assert np.abs(latent - tiny_pipe.generate(**ARGUMENTS, output="latent")).max() > 0.1
    assert whole_networks(pipe) == {"unet"}


def test_only_what_is_named_is_freed(tiny_directory):
    parts = presets.load_pipeline(tiny_directory, dtype="float32", free=["text_encoder"])
    assert whole_networks(ld.TextToImage(parts)) == {"unet", "autoencoder"}


def test_variable_that_was_freed_is_assigned_anew():
    variable = keras.Variable(np.zeros((5, 3), "float32"))
    backend.release([variable])
    assert to_numpy(variable).size == 1
    array = numbers(5, 3)
    backend.assign(variable, array)
    np.testing.assert_array_equal(to_numpy(variable), array)


@pytest.mark.parametrize("free", ["unet", ["vae"], ["unet", "tokenizer"]])
def test_unknown_network_is_told_before_a_file_is_opened(free):
    with pytest.raises(ValueError, match="`free` must hold names of text_encoder, unet, autoencoder. Received: free="):
        ld.TextToImage.from_preset("no/such/model", free=free)


def test_openvino_has_copies_of_its_own():
    with pytest.raises(ValueError, match='`free` must be empty with engine="openvino". Received: unet.'):
        check_free("openvino", ["unet"])
