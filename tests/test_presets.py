"""Directories -> parts, and back."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import LATENT, PICTURE, numbers, relative_error, run, to_numpy

import latentdiff as ld
from latentdiff import backend, catalogue, pipeline, presets
from latentdiff.checkpoints import diffusers
from latentdiff.checkpoints.files import CheckpointError

FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
CLASSES = {"unet": "UNet", "autoencoder": "Autoencoder", "text_encoder": "CLIPTextEncoder"}


@pytest.fixture
def copied(tiny_directory, tmp_path):
    """A copy of the directory, to be spoilt."""
    return shutil.copytree(tiny_directory, tmp_path / "copy")


@pytest.fixture
def no_networks(monkeypatch):
    """Fails where a network is built."""

    def refuse(*arguments, **changes):
        raise AssertionError("a network was built")

    monkeypatch.setattr(presets, "network_of", refuse)


def weights(network):
    return {path: to_numpy(variable) for path, variable in presets.named_variables(network)}


def test_saved_pipeline_is_the_same(tiny_directory, tiny_pipe):
    loaded = ld.TextToImage.from_preset(tiny_directory, dtype="float32")
    assert loaded.settings == tiny_pipe.settings
    assert loaded.parts.sample_size == tiny_pipe.parts.sample_size == LATENT[:2]
    assert loaded.tokenizer.vocabulary == tiny_pipe.tokenizer.vocabulary
    for kind in FOLDERS:
        ours, theirs = getattr(loaded, kind), getattr(tiny_pipe, kind)
        assert ours.config == theirs.config
        found = weights(ours)
        for path, array in weights(theirs).items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_component_loads_alone(kind, tiny_directory, tiny_pipe):
    expected = getattr(tiny_pipe, kind)
    network = getattr(ld, CLASSES[kind]).from_preset(tiny_directory / FOLDERS[kind], dtype="float32")
    assert network.config == expected.config
    ours, theirs = weights(network), weights(expected)
    assert all((ours[path] == theirs[path]).all() for path in theirs)


def test_component_is_found_in_a_pipelines_directory(tiny_directory, tiny_pipe):
    network = ld.CLIPTextEncoder.from_preset(tiny_directory, dtype="float32")
    assert network.config == tiny_pipe.text_encoder.config


@pytest.mark.parametrize("folder", ["", "tokenizer"])
def test_tokenizer_loads_alone(folder, tiny_directory, tiny_pipe):
    tokenizer = ld.CLIPTokenizer.from_preset(tiny_directory / folder)
    np.testing.assert_array_equal(tokenizer("a red heart"), tiny_pipe.tokenizer("a red heart"))


def test_autoencoder_takes_another_epsilon(tiny_directory, tiny_pipe):
    network = ld.Autoencoder.from_preset(tiny_directory, norm_epsilon=1e-2, dtype="float32")
    assert tiny_pipe.autoencoder.config["norm_epsilon"] == 1e-6
    assert network.config["norm_epsilon"] == 1e-2
    image = numbers(1, *PICTURE)
    assert relative_error(*(run(net.encode, image, model=net) for net in (network, tiny_pipe.autoencoder))) > 1e-4


def test_weights_are_held_in_the_dtype_that_was_asked_for(tiny_directory, tiny_pipe):
    network = ld.CLIPTextEncoder.from_preset(str(tiny_directory), dtype="bfloat16")
    assert {variable.dtype for variable in network.variables} == {"bfloat16"}
    tokens = tiny_pipe.tokenizer("a red heart")
    context = keras.ops.cast(run(network, tokens), "float32")
    assert 1e-5 < relative_error(context, run(tiny_pipe.text_encoder, tokens)) < 0.1


@pytest.mark.skipif(keras.backend.backend() != "tensorflow" or backend.has_gpu(), reason="a choice for oneDNN")
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("avx2 avx512_bf16", "bfloat16"), ("avx2 amx_bf16", "bfloat16"), ("avx2 avx512f", "float32"), (None, "float32")],
)
def test_networks_are_in_bfloat16_where_the_processor_multiplies_it(flags, dtype, tmp_path, monkeypatch):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    monkeypatch.setattr(backend, "CPUINFO", tmp_path / "cpuinfo")
    assert backend.default_dtype.__wrapped__() == dtype


def test_a_gpu_computes_in_bfloat16_by_xla_and_loops_inside(tiny_directory, monkeypatch):
    """As far as a machine without one can tell: what is chosen, not how fast it is."""
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    assert backend.default_dtype.__wrapped__() == "bfloat16"
    assert backend.fit_compilation() == "auto"
    monkeypatch.setattr(pipeline, "has_gpu", lambda: True)
    assert ld.TextToImage.from_preset(tiny_directory, dtype="float32").loops_inside
    if keras.backend.backend() == "tensorflow":
        compiled = backend.Compiled(lambda x: x + 1, [])._run.get_concrete_function(keras.ops.ones(3))
        assert compiled.function_def.attr["_XlaMustCompile"].b


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_load_makes_no_wider_copy_of_the_weights(dtype):
    """NumPy's memory, in which the file's tensors are turned to our layout, of a file of float16."""
    tracemalloc.start()
    try:
        unet = ld.UNet.from_preset("emoji", dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * unet.count_params()  # two bytes of each, and Keras' layers


@pytest.mark.parametrize("dtype", ["int32", "float64", "int8", "flaot32", ""])
def test_unknown_dtype_is_told_before_a_file_is_opened(dtype):
    for load in (presets.load_pipeline, presets.load_text_encoder):
        with pytest.raises(ValueError, match=f"`dtype` must be one of float32, .* Received: dtype='{dtype}'"):
            load("no such directory", dtype=dtype)


def rename_weights(directory, *variants):
    """Leaves each component's weights under the names of variants alone."""
    for path in directory.rglob("*.safetensors"):
        for variant in variants:
            shutil.copy(path, path.with_name(f"{path.stem}.{variant}.safetensors"))
        path.unlink()


def test_one_of_several_variants_is_opened_when_it_is_asked_for(copied, tiny_pipe, monkeypatch):
    rename_weights(copied, "fp16", "non_ema")
    with pytest.raises(ValueError, match="ask for one with `variant`: fp16, non_ema"):
        ld.CLIPTextEncoder.from_preset(copied)
    network = ld.CLIPTextEncoder.from_preset(copied, dtype="float32", variant="fp16")
    assert all((weights(network)[path] == array).all() for path, array in weights(tiny_pipe.text_encoder).items())

    asked = []
    monkeypatch.setattr(presets, "network_of", lambda component, *_, **__: asked.append(component.kind))
    ld.UNet.from_preset(copied, variant="fp16")
    ld.Autoencoder.from_preset(copied, variant="fp16")
    presets.load_pipeline(copied, variant="non_ema")
    assert asked == ["unet", "autoencoder", *FOLDERS]
    with pytest.raises(FileNotFoundError, match="model.fp32.safetensors"):
        ld.TextToImage.from_preset(copied, variant="fp32")


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    ],
)
def test_missing_file_is_told_before_a_network_is_built(file, copied, no_networks):
    if (copied / file).is_dir():
        shutil.rmtree(copied / file)
    else:
        (copied / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        ld.TextToImage.from_preset(copied)
    assert Path(file).name.partition(".")[0] in str(error.value) or Path(file).parent.name in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("autoencoder", {"latent_channels": 2}, "The UNet's latent must have as many channels as the autoencoder's"),
        ("autoencoder", {"image_channels": 1}, "The autoencoder's image .* an RGB image. Received: 1, 3."),
        ("unet", {"out_channels": 8}, "The UNet's output must have as many channels as its latent. Received: 8, 4."),
    ],
)
def test_networks_that_do_not_fit_are_told_before_one_is_built(kind, changes, message, copied, no_networks, tiny_pipe):
    config = {**getattr(tiny_pipe, kind).config, **changes}
    arrays = {entry.path: np.zeros(entry.shape, "float32") for entry in diffusers.key_map(kind, config)}
    diffusers.write_component(copied / FOLDERS[kind], kind, config, arrays, overwrite=True)
    with pytest.raises(ValueError, match=message):
        ld.TextToImage.from_preset(copied)


@pytest.mark.parametrize(
    "fields",
    [{"beta_start": 0.0}, {"beta_end": 0.0}, {"num_train_timesteps": 1, "rescale_betas_zero_snr": True}],
)
def test_schedule_that_cannot_be_is_told_with_its_file_before_a_weight_is_read(fields, copied, monkeypatch):
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    monkeypatch.setattr(diffusers, "read_component", lambda *a, **k: pytest.fail("weights were opened"))
    with pytest.raises(CheckpointError, match="copy` must describe a schedule. .*Received"):
        ld.TextToImage.from_preset(copied)


def test_weights_that_are_not_numbers_are_told(copied, tiny_pipe):
    arrays = weights(tiny_pipe.text_encoder)
    spoilt = {**arrays, "final_norm/beta": np.full(8, np.nan, "float32")}
    path = copied / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    (name,) = [name for name in tensors if name.endswith("final_layer_norm.bias")]
    safetensors.numpy.save_file({**tensors, name: spoilt["final_norm/beta"]}, path)
    with pytest.raises(ValueError, match="Weights must be finite"):
        ld.CLIPTextEncoder.from_preset(copied)


def test_weights_too_large_for_the_dtype_are_told(copied):
    path = copied / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    (name,) = [name for name in tensors if name.endswith("final_layer_norm.bias")]
    safetensors.numpy.save_file({**tensors, name: np.full(8, 1e6, "float32")}, path)
    with pytest.raises(ValueError, match=f"Weights must fit float16. Received: 1e.06 in `{name}`"):
        ld.CLIPTextEncoder.from_preset(copied, dtype="float16")
    assert weights(ld.CLIPTextEncoder.from_preset(copied, dtype="mixed_float16"))["final_norm/beta"].max() == 1e6


def test_unknown_name_is_told_with_the_near_ones(tmp_path, monkeypatch):
    (tmp_path / "emoji").mkdir()
    monkeypatch.setattr(catalogue, "weights_directory", lambda: tmp_path)
    with pytest.raises(ValueError, match="Received: 'emojy'. Did you mean 'emoji'?"):
        ld.TextToImage.from_preset("emojy")


def test_preset_that_is_no_path_is_told():
    with pytest.raises(TypeError, match="`preset` must be a name or a path. Received: 7."):
        ld.TextToImage.from_preset(7)


@pytest.mark.parametrize("name", ["model.ckpt", "model.BIN", "model.pickle"])
def test_pickle_is_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"pickle.*never opened.*{name}.*latentdiff convert"):
        ld.TextToImage.from_preset(tmp_path / name)


def test_existing_directory_is_kept(tiny_pipe, copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        tiny_pipe.save_to_preset(copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_existing_directory_is_replaced_where_that_is_asked_for(tiny_pipe, copied, tiny_directory):
    (copied / "unet" / "config.json").write_text("{}")
    tiny_pipe.save_to_preset(copied, overwrite=True)
    for path in tiny_directory.rglob("*"):
        if path.is_file():
            assert (copied / path.relative_to(tiny_directory)).read_bytes() == path.read_bytes()
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_directory_in_half_precision_is_half_as_large(tiny_pipe, tiny_directory, tmp_path):
    tiny_pipe.save_to_preset(tmp_path / "half", dtype="float16")
    name = "text_encoder/model.safetensors"
    whole, half = ((directory / name).stat().st_size for directory in (tiny_directory, tmp_path / "half"))
    assert half < 0.6 * whole
    network = ld.CLIPTextEncoder.from_preset(tmp_path / "half", dtype="float32")
    found = weights(network)
    for path, array in weights(tiny_pipe.text_encoder).items():
        np.testing.assert_array_equal(found[path], array.astype("float16"))


def test_files_wider_than_the_weights_are_warned_of(tiny_directory, tiny_pipe, tmp_path):
    rounded = ld.CLIPTextEncoder.from_preset(tiny_directory, dtype="bfloat16")
    parts = dataclasses.replace(tiny_pipe.parts, text_encoder=rounded)
    for dtype in ("float32", "float16"):
        with pytest.warns(UserWarning, match=f'{dtype} files .* rounded to bfloat16. .* dtype="float32"'):
            presets.save_pipeline(parts, tmp_path / dtype, dtype=dtype)
    presets.save_pipeline(parts, tmp_path / "bfloat16", dtype="bfloat16")  # warnings are errors


def test_nothing_is_left_of_a_directory_that_could_not_be_written(tiny_pipe, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        tiny_pipe.save_to_preset(tmp_path / "model", dtype="float8")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_told_before_a_file_is(tiny_pipe, tmp_path, monkeypatch):
    autoencoder = SimpleNamespace(config={**tiny_pipe.autoencoder.config, "norm_epsilon": 1e-5}, factor=2)
    monkeypatch.setattr(diffusers, "write_component", lambda *a, **k: pytest.fail("a file was written"))
    with pytest.raises(ValueError, match="norm_epsilon"):
        presets.save_pipeline(dataclasses.replace(tiny_pipe.parts, autoencoder=autoencoder), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
