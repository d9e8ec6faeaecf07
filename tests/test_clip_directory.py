"""CLIPModel directories: the golden pair against what transformers said with it, files, errors, and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from test_clip_training import END, IMAGE, TEXT, batch, pair, paths
from tiny_models import TOKENIZER, make, relative_error, run, to_numpy

import latentdiff as ld
from latentdiff import presets_clip
from latentdiff.checkpoints import clip_directory, diffusers_image_encoder, hub
from latentdiff.checkpoints.clip_directory import CLIPDirectory
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import count_parameters
from latentdiff.checkpoints.sources import open_source
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.presets import named_variables
from latentdiff.training import CLIPTraining

GOLDENS = Path(__file__).parent / "goldens" / "clip"
LARGE = {  # CLIP ViT-L/14
    "image_size": 224,
    "patch_size": 14,
    "width": 1024,
    "depth": 24,
    "mlp_width": 4096,
    "projection_dim": 768,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS.with_suffix(".npz"), allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def training():
    return CLIPTraining.from_preset(GOLDENS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pair of this package's, and the directory that it was saved to."""
    training = pair(temperature=0.3)
    directory = tmp_path_factory.mktemp("clip") / "model"
    training.save_to_preset(directory)
    return training, directory


@pytest.fixture
def copied(tmp_path):
    """A copy of the golden directory, to be spoilt."""
    return shutil.copytree(GOLDENS, tmp_path / "copy")


def change(directory, file="config.json", **fields):
    path = directory / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **fields}))


def test_embeddings_and_logits_are_those_of_transformers(training, golden):
    image, text = run(training, {"image": golden["image"], "tokens": golden["tokens"]})
    assert relative_error(image, golden["image_embedding"]) < 1e-4
    assert relative_error(text, golden["text_embedding"]) < 1e-4
    assert relative_error(training.logits(image, text), golden["logits"]) < 1e-4


def test_image_encoder_loads_alone(training, golden):
    encoder = ld.CLIPImageEncoder.from_preset(GOLDENS, dtype="float32")
    assert encoder.config == training.image_encoder.config
    for mine, theirs in zip(encoder.variables, training.image_encoder.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


def test_text_encoder_loads_alone(training):
    encoder = ld.CLIPTextEncoder.from_preset(GOLDENS, dtype="float32")
    assert encoder.config == training.text_encoder.config
    for mine, theirs in zip(encoder.variables, training.text_encoder.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


def test_directory_is_recognised():
    source = open_source(GOLDENS)
    assert isinstance(source, CLIPDirectory)
    assert source.kinds == ("text_encoder",)
    for ask in (source.settings, lambda: source.component("unet")):
        with pytest.raises(FileNotFoundError, match="is a CLIPModel's directory and"):
            ask()


@pytest.mark.parametrize("changes", [{}, {"depth": 2, "image_size": 12, "projection_dim": 5}])
def test_every_variable_has_its_key(changes):
    network = make(CLIPImageEncoder, {**IMAGE, **changes})
    ours = {path: tuple(variable.shape) for path, variable in named_variables(network)}
    assert ours == {entry.path: entry.shape for entry in diffusers_image_encoder.key_map(network.config)}


def test_defaults_are_clips_large_one():
    assert count_parameters(diffusers_image_encoder.key_map(LARGE)) == 303_179_776 + 1024 * 768
    assert {name: CLIPImageEncoder.__init__.__kwdefaults__.get(name, LARGE[name]) for name in LARGE} == LARGE
    assert CLIPImageEncoder.__init__.__defaults__ == (LARGE["image_size"], LARGE["patch_size"])


def test_saved_pair_is_the_same(saved):
    training, directory = saved
    again = CLIPTraining.from_preset(directory)
    assert (again.end_id, again.image_encoder.config) == (END, training.image_encoder.config)
    for (path, mine), (_, theirs) in zip(paths(again), paths(training), strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs), err_msg=path)
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_normalization_goes_with_the_image_encoder(tmp_path):
    encoder = make(CLIPImageEncoder, {**IMAGE, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    CLIPTraining(make(CLIPTextEncoder, TEXT), encoder, END).save_to_preset(tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert (fields["image_mean"], fields["image_std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert fields["size"] == {"shortest_edge": 8}
    assert ld.CLIPImageEncoder.from_preset(tmp_path / "model", dtype="float32").config == encoder.config


def test_tokenizer_goes_with_the_pair(tmp_path):
    tokenizer = ld.CLIPTokenizer.from_directory(TOKENIZER)
    text_encoder = make(CLIPTextEncoder, {**TEXT, "vocabulary_size": 624, "context_length": 77})
    training = CLIPTraining(text_encoder, make(CLIPImageEncoder, IMAGE), tokenizer.end_id)
    training.save_to_preset(tmp_path / "model", tokenizer)
    parts = presets_clip.load_clip(tmp_path / "model", dtype="float32")
    np.testing.assert_array_equal(parts.tokenizer("a red heart"), tokenizer("a red heart"))
    assert parts.end_id == tokenizer.end_id
    fields = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (tokenizer.start_id, tokenizer.end_id)
    other = CLIPTraining(text_encoder, training.image_encoder, tokenizer.end_id - 1)
    with pytest.raises(ValueError, match="The tokenizer must be the text encoder's.* Received: 604, 603"):
        other.save_to_preset(tmp_path / "other", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_directory_is_overwritten_only_where_that_is_asked_for(saved, tmp_path):
    training, directory = saved
    copy = shutil.copytree(directory, tmp_path / "copy")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        training.save_to_preset(copy)
    training.save_to_preset(copy, dtype="float16", overwrite=True)
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    assert {array.dtype.name for array in tensors.values()} == {"float16"}


def test_half_precision_weights_are_warned_of(saved, tmp_path):
    half = CLIPTraining.from_preset(saved[1], dtype="bfloat16")
    with pytest.warns(UserWarning, match="float32 files will hold weights that were rounded to bfloat16") as caught:
        half.save_to_preset(tmp_path / "model")
    assert caught[0].filename == __file__


def test_old_files_end_token_is_the_highest(copied, training, golden):
    """transformers reads 2, which OpenAI's files have by mistake, so."""
    config = json.loads((copied / "config.json").read_text())
    change(copied, text_config={**config["text_config"], "eos_token_id": 2})
    assert CLIPDirectory(copied).pair().end_id == training.end_id == 31


def test_end_token_that_transformers_would_misread_is_refused(saved, tmp_path):
    training = CLIPTraining(saved[0].text_encoder, saved[0].image_encoder, end_id=2)
    with pytest.raises(ValueError, match="`end_id` must not be 2, which transformers takes for the highest token"):
        training.save_to_preset(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_positions_of_old_files_are_ignored_by_name(copied):
    tensors = safetensors.numpy.load_file(copied / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    safetensors.numpy.save_file(tensors, copied / "model.safetensors")
    assert CLIPDirectory(copied).component("text_encoder").ignored == clip_directory.IGNORED_KEYS


def test_old_files_second_configurations_count(copied):
    """transformers lets `text_config_dict` stand for `text_config` where both are there."""
    config = json.loads((copied / "config.json").read_text())
    broken = {**config["text_config"], "num_hidden_layers": 7}
    change(copied, text_config=broken, text_config_dict=config["text_config"], vision_config_dict=None)
    assert clip_directory.read_config(copied)[0]["depth"] == 2


def test_one_error_lists_every_key_that_does_not_fit(copied):
    tensors = safetensors.numpy.load_file(copied / "model.safetensors")
    del tensors["logit_scale"]
    tensors["visual_projection.weight"] = np.ones((10, 15), "float32")
    tensors["vision_model.head.weight"] = np.ones(3, "float32")
    safetensors.numpy.save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        CLIPDirectory(copied).pair()
    assert str(caught.value).splitlines()[1:] == [
        "  shape: visual_projection.weight must be (10, 16), is (10, 15)",
        "  missing: logit_scale ()",
        "  left over: vision_model.head.weight (3,)",
    ]


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_config", {"patch_size": 5}, "`patch_size` must divide `image_size`. Received: 5 for 12 in"),
        ("vision_config", {"num_channels": 4}, "num_channels=4 (only 3)"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act='relu' (only quick_gelu or"),
        ("vision_config", {"num_attention_heads": 3}, "`num_attention_heads` must divide the channels"),
        ("vision_config", {"image_size": [12, 16]}, "`image_size` must be a whole number"),
        ("text_config", {"eos_token_id": 32}, "`eos_token_id` must be one token, in 0..31. Received: eos_token_id=32"),
        ("text_config", {"eos_token_id": [3, 4]}, "Received: eos_token_id=[3, 4]"),
        ("", {"projection_dim": 0}, "`projection_dim` must be a whole number"),
        ("", {"text_config": 3}, "`text_config` must be an object. Received: 3"),
        ("", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (only None)"),
    ],
)
def test_configuration_that_cannot_be_is_told(part, fields, message, copied):
    config = json.loads((copied / "config.json").read_text())
    change(copied, **({part: {**config[part], **fields}} if part else fields))
    with pytest.raises(CheckpointError) as caught:
        clip_directory.read_config(copied)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "`image_mean` must be three numbers. Received: image_mean=[0.5, 0.5]"),
        ({"image_std": [1, 1, 0]}, "`image_std` must be positive"),
        ({"image_std": [1, True, 1]}, "`image_std` must be three numbers"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 (only 1/255)"),
        ({"do_rescale": False}, "do_rescale=False (only True)"),
    ],
)
def test_preprocessing_that_cannot_be_is_told(fields, message, copied):
    change(copied, "preprocessor_config.json", **fields)
    with pytest.raises(CheckpointError) as caught:
        clip_directory.read_config(copied)
    assert message in str(caught.value)


def test_images_that_are_not_normalized_are_told_so(copied):
    change(copied, "preprocessor_config.json", do_normalize=False)
    config = clip_directory.read_config(copied)[2]
    assert (config["image_mean"], config["image_std"]) == ([0, 0, 0], [1, 1, 1])


def test_other_directories_are_refused(tmp_path):
    change(tmp_path, model_type="clip_text_model")
    for load in (presets_clip.load_clip, presets_clip.load_image_encoder):
        with pytest.raises(CheckpointError, match="`preset` must be a CLIPModel's directory"):
            load(tmp_path)


def test_of_a_hub_a_whole_clip_model_is_asked_for():
    files = hub.wanted_files(["clip"])
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "merges.txt"} <= set(files)
    assert not any("/" in file for file in files)


def test_training_goes_on_from_a_saved_pair(saved):
    again = CLIPTraining.from_preset(saved[1])
    for ours, theirs in zip(run(again, batch()), run(saved[0], batch()), strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), atol=1e-6)
