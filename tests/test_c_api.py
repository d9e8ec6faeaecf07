"""A SavedModel answers through TensorFlow's C API, without TensorFlow in Python, as the function that it came from."""

import keras
import numpy as np
import pytest

from latentdiff.catalogue import resolve_preset
from latentdiff.models.tokenizer import CLIPTokenizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is TensorFlow's", allow_module_level=True)

import tensorflow as tf
from c_api import INVALID_ARGUMENT, CApiError, ServedModel, run_signature

from latentdiff.export.tokenizer import GraphTokenizer

PROMPTS = ["a red heart, noto style", "", "It's the E\u0301TUDE 7 \U0001f600", "a\0b", "<|endoftext|> x"]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_directory(resolve_preset("emoji"))


@pytest.fixture(scope="module")
def saved_model_dir(tokenizer, tmp_path_factory):
    """The tokenizer, and a second signature of numbers with defaults."""
    module = tf.Module()
    module.tokenizer = GraphTokenizer(tokenizer, 100)
    specs = {
        "image": tf.TensorSpec([None, 2], tf.uint8),
        "scale": tf.TensorSpec([None], tf.float32),
        "names": tf.TensorSpec([None], tf.string),
        "count": tf.TensorSpec([None], tf.int64),
    }
    scales, texts, large = tf.constant([2.0, 0.5]), tf.constant(["x"] * 3), tf.constant([1, 2**40], tf.int64)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompt")])
    def tokenize(prompt):
        return {"tokens": module.tokenizer(prompt)}

    @tf.function(input_signature=list(specs.values()))
    def scale(image, scale=scales, names=texts, count=large):
        return {
            "scaled": tf.cast(image, tf.float32) * scale,
            "joined_bytes": tf.strings.reduce_join(names, keepdims=True),
            "count": count,
            "half": tf.cast(scale, tf.bfloat16),
            "positive": scale > 1,
        }

    signatures = {"serving_default": tokenize, "scale": scale}
    directory = tmp_path_factory.mktemp("model") / "1"
    tf.saved_model.save(module, str(directory), signatures=signatures)
    return directory


@pytest.fixture(scope="module")
def served(saved_model_dir):
    with ServedModel(saved_model_dir) as model:
        yield model


def test_tokens_are_those_of_python(served, tokenizer):
    for prompts in (PROMPTS, PROMPTS[:1], []):
        tokens = served.run("serving_default", {"prompt": prompts})["tokens"]
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, tokenizer(prompts))
    replaced = served.run("serving_default", {"prompt": [b"a \xff heart"]})["tokens"]
    np.testing.assert_array_equal(replaced, tokenizer("a \ufffd heart"))


def test_the_loaded_model_gives_the_same_tokens_in_python(saved_model_dir, tokenizer):
    tokens = tf.saved_model.load(str(saved_model_dir)).signatures["serving_default"](prompt=tf.constant(PROMPTS))
    np.testing.assert_array_equal(tokens["tokens"], tokenizer(PROMPTS))


def test_a_prompt_that_is_too_long_is_an_invalid_argument(served, tokenizer):
    assert served.run("serving_default", {"prompt": ["é" * 50]})["tokens"].shape == (1, 32)
    with pytest.raises(CApiError) as raised:
        served.run("serving_default", {"prompt": ["fine", "é" * 50 + "a"]})
    assert raised.value.code == INVALID_ARGUMENT
    assert "a prompt must have at most 100 bytes" in raised.value.message
    np.testing.assert_array_equal(served.run("serving_default", {"prompt": PROMPTS})["tokens"], tokenizer(PROMPTS))


@pytest.mark.parametrize("prompt", ["a", [["a"]], [["a", "b"], ["c", "d"]], [[]]])
def test_another_rank_is_an_invalid_argument(served, prompt):
    with pytest.raises(CApiError, match="prompts must have the shape") as raised:
        served.run("serving_default", {"prompt": prompt})
    assert raised.value.code == INVALID_ARGUMENT


def test_inputs_left_out_take_the_defaults_of_the_signature(served):
    image = np.array([[1, 2], [3, 255]], "uint8")
    out = served.run("scale", {"image": image})
    np.testing.assert_array_equal(out["scaled"], np.array([[2, 1], [6, 127.5]], "float32"))
    assert out["joined_bytes"].tolist() == [b"xxx"]
    assert out["count"].tolist() == [1, 2**40]
    assert out["half"].astype("float32").tolist() == [2, 0.5]
    assert out["positive"].tolist() == [True, False]
    inputs = {"image": image, "scale": [1.0, 0.0], "names": [b"\x00" * 40, b"\xff", "é"], "count": [7, 8]}
    out = served.run("scale", inputs)
    assert out["scaled"].tolist() == [[1, 0], [3, 0]]
    assert out["joined_bytes"].tolist() == [b"\x00" * 40 + b"\xff\xc3\xa9"]
    assert out["count"].tolist() == [7, 8]


def test_signatures_say_what_they_take(served):
    assert served.signatures["serving_default"]["inputs"] == {"prompt": ("string", [-1])}
    assert served.signatures["serving_default"]["outputs"] == {"tokens": ("int32", [-1, 32])}
    scale = served.signatures["scale"]
    assert scale["inputs"]["image"] == ("uint8", [-1, 2])
    assert {name: value.tolist() for name, value in scale["defaults"].items()} == {
        "scale": [2.0, 0.5],
        "names": [b"x"] * 3,
        "count": [1, 2**40],
    }


def test_inputs_that_are_missing_or_unknown_are_refused(served):
    for inputs, rule in (({}, r"missing inputs \['image'\]"), ({"image": [[1, 2]], "x": 1}, r"unknown inputs \['x'\]")):
        with pytest.raises(CApiError, match=rule):
            served.run("scale", inputs)


def test_nothing_of_tensorflow_but_messages_is_imported(served):
    assert served.modules
    assert [name for name in served.modules if not name.startswith("tensorflow.core")] == []


def test_a_directory_without_a_model_is_an_error_of_the_c_api(tmp_path, saved_model_dir):
    with pytest.raises(CApiError, match="Could not find SavedModel"):
        ServedModel(tmp_path)
    tokens = run_signature(saved_model_dir, "serving_default", {"prompt": ["a"]})["tokens"]
    assert tokens.shape == (1, 32)
