"""`latentdiff export`, with the smallest model: what it writes, and what it refuses before a model is opened."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from latentdiff import cli
from latentdiff.checkpoints.diffusers_scheduler import SAMPLER_CLASSES

BFLOAT16_GREY_LEVELS = 12  # as the README says, up to a scale of 7.5: guidance multiplies what was rounded
ROOT = Path(__file__).resolve().parents[1]
tensorflow_only = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")


def refusal(capsys, *arguments):
    """The one line on standard error of an export that must be refused."""
    with pytest.raises(SystemExit) as exit:
        cli.main(["export", *map(str, arguments)])
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("latentdiff: error: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    return output.err


@pytest.fixture(scope="module")
def exported(tiny_directory, tmp_path_factory):
    """A version that the command wrote, with an argument of every kind."""
    directory = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(tiny_directory, directory)
    (directory / "LICENSES.md").write_text("Numbers that nobody owns.\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("models") / "tiny" / "7"
    chosen = """--dtype bfloat16 --height 8 4 --width 12 8 --samplers euler ddim --num-steps 2 --guidance-scale 3
        --max-batch 4 --max-steps 5 --max-prompt-bytes 64 --max-guidance-scale 20"""
    assert cli.main(["export", str(directory), "--output", str(output), *chosen.split()]) == 0
    return output


@tensorflow_only
def test_every_argument_reaches_the_model(exported):
    settings = json.loads((exported / "assets.extra" / "latentdiff.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["sizes"] == [[8, 12], [4, 8]]
    assert settings["samplers"] == ["euler", "ddim"]
    assert (settings["defaults"]["num_steps"], settings["defaults"]["guidance_scale"]) == (2, 3)
    limits = {"max_batch": 4, "max_steps": 5, "max_prompt_bytes": 64, "max_guidance_scale": 20}
    assert settings["limits"] == limits
    assert "Numbers that nobody owns." in (exported / "assets.extra" / "README.md").read_text()


@pytest.fixture(scope="module")
def served(exported):
    """The version in a process of TensorFlow's C API."""
    from c_api import ServedModel

    with ServedModel(exported) as model:
        yield model


@tensorflow_only
def test_several_sizes_are_several_signatures_and_answer_by_default(served):
    import tensorflow as tf

    assert {"serving_default", "generate", "generate_4x8", "decode_4x8"} <= set(served.signatures)
    for signature, shape in (("generate", (8, 12, 3)), ("generate_4x8", (4, 8, 3))):
        (file,) = served.run(signature, {"prompt": ["a cat"]})["image_bytes"]
        assert tf.io.decode_png(file).shape == shape


@tensorflow_only
def test_bfloat16_gives_pythons_pictures_within_its_bound(served, tiny_directory):
    """Rows of one call, each against Python's bfloat16 picture that was made alone."""
    import tensorflow as tf

    from latentdiff.pipeline import TextToImage

    pipe = TextToImage.from_preset(tiny_directory, dtype="bfloat16")
    differences = []
    for sampler, scales in itertools.product(["euler", "ddim"], [[1.0] * 4, [1.0, 3.0, 5.0, 7.5]]):
        inputs = {
            "prompt": ["a cat"],
            "negative_prompt": ["a red dog"],
            "seed": np.array([0, 1, 2, 3]),
            "num_steps": np.array([1, 2, 4, 5], "int32"),
            "guidance_scale": np.array(scales, "float32"),
            "sampler": [sampler],
        }
        files = served.run("generate", inputs)["image_bytes"]
        for file, seed, steps, scale in zip(files, range(4), [1, 2, 4, 5], scales, strict=True):
            chosen = {"num_steps": steps, "guidance_scale": scale, "seed": seed, "sampler": sampler}
            (image,) = pipe.generate("a cat", "a red dog", **chosen, progress=False)
            difference = np.abs(tf.io.decode_png(file).numpy().astype(int) - image).max()
            differences.append((int(difference), chosen))
    largest, chosen = max(differences, key=lambda each: each[0])
    assert largest <= BFLOAT16_GREY_LEVELS, chosen


@tensorflow_only
def test_nothing_is_left_beside_the_version(exported):
    assert [path.name for path in exported.parent.iterdir()] == ["7"]


def test_version_that_is_there_is_never_replaced(tmp_path, capsys, monkeypatch, tiny_directory):
    monkeypatch.setattr(cli, "start_keras", lambda: pytest.fail("Keras was started"))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"served")
    said = refusal(capsys, tiny_directory, "--output", tmp_path / "1")
    assert "--output must not exist yet: a version is never replaced" in said
    assert (tmp_path / "1" / "saved_model.pb").read_bytes() == b"served"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: preset, --output"),
        ("emoji", "the following arguments are required: --output"),
        ("emojis --output 1", "Did you mean 'emoji'?"),
        ("model.ckpt --output 1", "a pickle can run any program"),
        ("emoji --output models", "--output must end in a version's number: models/emoji/1. Received: 'models'"),
        ("emoji --output 1 --format tflite", "invalid choice: 'tflite'"),
        ("emoji --output 1 --dtype int8", "invalid choice: 'int8'"),
        ("emoji --output 1 --dtype bfloat16 --format onnx", "--format onnx writes float32. Received: --dtype bfloat16"),
        ("emoji --output 1 --height 64 128", "must name equally many sizes. Received: [64, 128], [None]"),
        ("emoji --output x --format openvino --height 64 8 --width 64 8", "one size. Received: 2 sizes"),
        ("emoji --output 1 --height 0", "argument --height: must be a whole number, at least 1. Received: '0'"),
        ("emoji --output 1 --samplers ddim dpmpp_3m", "argument --samplers: invalid choice: 'dpmpp_3m'"),
        ("emoji --output 1 --num-steps 51", "--num-steps must be at most --max-steps, 50. Received: 51"),
        ("emoji --output 1 --guidance-scale 101", "--guidance-scale must lie in 0 .. --max-guidance-scale, 100"),
        ("emoji --output 1 --guidance-scale nan", "argument --guidance-scale: must be a finite number"),
        ("emoji --output 1 --max-batch 0", "argument --max-batch: must be a whole number, at least 1"),
        ("emoji --output 1 --max 2", "unrecognized arguments: --max"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_keras_starts(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setattr(cli, "start_keras", lambda: pytest.fail("Keras was started"))
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").write_bytes(b"\x80\x04.")
    assert said in refusal(capsys, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@tensorflow_only
def test_size_that_does_not_fit_the_model_is_refused_and_leaves_nothing(capsys, tiny_directory, tmp_path):
    said = refusal(capsys, tiny_directory, "--output", tmp_path / "1", "--height", 7)
    assert "`height` must be a positive multiple of 2. Received: height=7" in said
    assert list(tmp_path.iterdir()) == []


@tensorflow_only
def test_format_without_its_package_names_the_extra(capsys, monkeypatch, tiny_directory, tmp_path):
    find = importlib.util.find_spec
    absent = ("tf2onnx", "onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))
    said = refusal(capsys, tiny_directory, "--output", tmp_path / "x", "--format", "onnx")
    assert 'needs tf2onnx and onnx: pip install "latentdiff[onnx]"' in said
    assert list(tmp_path.iterdir()) == []


def test_help_tells_every_argument_without_keras():
    program = """
import sys
from latentdiff.cli import main
try:
    main(["export", "emoji", "--help"])
finally:
    assert not {"keras", "tensorflow", "jax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--output", "--format", "--dtype", "--height", "--samplers", "--max-prompt-bytes", "--jit-compile"):
        assert option in done.stdout
    assert all(name in done.stdout for name in SAMPLER_CLASSES)
    assert "latentdiff export emoji --output models/emoji/1" in done.stdout
