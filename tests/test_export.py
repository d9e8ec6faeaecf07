"""The exported SavedModel: its signatures answer as `generate` does, and say what a request may not ask for."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny_models import LATENT, numbers, relative_error

from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.diffusion.samplers import SAMPLERS, make_table
from latentdiff.models.tokenizer import TruncationWarning
from latentdiff.pipeline import TextToImage

if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is TensorFlow's", allow_module_level=True)

import tensorflow as tf
from c_api import INVALID_ARGUMENT, CApiError, ServedModel

from latentdiff.export import export_saved_model
from latentdiff.export.arrow import Arrow
from latentdiff.export.sampler_book import make_book

PROMPTS = ["a cat", "a red dog", ""]


@pytest.fixture(scope="module")
def exported(tiny_saved_model):
    return tiny_saved_model


@pytest.fixture(scope="module")
def loaded(exported):
    return tf.saved_model.load(str(exported))


@pytest.fixture(scope="module")
def generate(loaded):
    """`generate` with every input by name: images uint8 (B, H, W, 3), seeds."""
    defaults = {"negative_prompt": [""], "seed": [0], "num_steps": [3], "guidance_scale": [2.0], "sampler": ["ddim"]}
    types = {"seed": tf.int64, "num_steps": tf.int32, "guidance_scale": tf.float32}

    def run(prompt, signature="generate", **inputs):
        inputs = {"prompt": prompt, **defaults, **inputs}
        tensors = {name: tf.constant(value, types.get(name, tf.string)) for name, value in inputs.items()}
        out = loaded.signatures[signature](**tensors)
        return decoded(out["image_bytes"]), out["seed"].numpy()

    return run


def decoded(image_bytes):
    return np.stack([tf.io.decode_png(file).numpy() for file in image_bytes.numpy()])


def grey_levels(first, second):
    assert first.shape == second.shape
    return np.abs(first.astype(int) - second).max()


def nodes(directory):
    """Every node of the graph, those of its functions too."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((directory / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    return itertools.chain(graph.node, *(function.node_def for function in graph.library.function))


def test_book_holds_the_rows_of_every_table(tiny_pipe):
    settings = SamplerSettings(sampler="ddim", clip_range=1.5)
    book = make_book(settings, tiny_pipe.schedule, ("ddim", "heun", "lcm", "ddpm"), 60)
    for k, name in enumerate(book.samplers):
        for steps in (1, 2, 17, 60):
            if name == "lcm" and steps > 50:
                assert book.num_rows[k, steps] == 0
                continue
            own = settings.with_sampler(name)
            table = make_table(schedule=tiny_pipe.schedule, num_steps=steps, **own.table_arguments())
            rows = slice(book.first[k, steps], book.first[k, steps] + book.num_rows[k, steps])
            np.testing.assert_array_equal(book.matrix[rows], table.matrix[: table.num_rows].astype("float32"))
            np.testing.assert_array_equal(book.timestep[rows], table.timestep[: table.num_rows])
            assert book.initial_scale[k, steps] == np.float32(table.initial_scale)
            assert book.needs_noise[k] == (name in ("lcm", "ddpm"))
            assert book.clip[k] == (np.inf if own.clip is None else np.float32(own.clip))


@pytest.mark.parametrize(("samplers", "max_steps"), [(SAMPLERS, 9), (("ddim",), 1)])
def test_every_row_finds_its_matrix(samplers, max_steps, tiny_pipe):
    book = make_book(SamplerSettings(sampler="ddim"), tiny_pipe.schedule, samplers, max_steps)
    arrow = Arrow(tiny_pipe, book)
    np.testing.assert_array_equal(arrow._matrix(arrow.rows["place"]), book.matrix)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_signature_gives_the_pictures_of_python(sampler, generate, tiny_pipe):
    """A batch of rows with steps, scales and seeds of their own, against each picture alone."""
    steps, scales, seeds = [1, 9, 4], [1.0, 7.5, 0.0], [5, 2**40 + 3, 2**63 - 1]
    images, used = generate(
        PROMPTS, sampler=[sampler], num_steps=steps, guidance_scale=scales, seed=seeds, negative_prompt=["bad"]
    )
    assert used.tolist() == seeds
    for i, prompt in enumerate(PROMPTS):
        expected = tiny_pipe.generate(
            prompt, "bad", num_steps=steps[i], guidance_scale=scales[i], seed=seeds[i], sampler=sampler, progress=False
        )
        assert grey_levels(images[i], expected[0]) <= 1, (sampler, i)


def test_rows_may_have_different_samplers(generate, tiny_pipe):
    chosen = ["heun", "lcm", "unipc"]
    images, _ = generate(PROMPTS, sampler=chosen, num_steps=[6])
    for i, prompt in enumerate(PROMPTS):
        expected = tiny_pipe.generate(prompt, num_steps=6, guidance_scale=2, seed=0, sampler=chosen[i], progress=False)
        assert grey_levels(images[i], expected[0]) <= 1


def test_many_steps_with_guidance(generate, tiny_pipe):
    images, _ = generate(["a cat"], num_steps=[50], guidance_scale=[3.0])
    expected = tiny_pipe.generate("a cat", num_steps=50, guidance_scale=3, seed=0, progress=False)
    assert grey_levels(images, expected) <= 1


def test_image_does_not_depend_on_its_batch(generate):
    alone, _ = generate(["a cat"], seed=[3])
    among, _ = generate(["a dog"] * 7 + ["a cat"], seed=[*range(10, 17), 3])
    assert grey_levels(alone[0], among[7]) <= 1


def test_one_entry_serves_the_whole_batch(generate):
    one, seeds = generate(["a cat"], seed=[1, 2, 3])
    each, _ = generate(["a cat"] * 3, seed=[1, 2, 3], num_steps=[3, 3, 3], negative_prompt=[""] * 3)
    assert grey_levels(one, each) <= 1
    assert seeds.tolist() == [1, 2, 3]


def test_second_size_is_over_the_same_weights(generate, tiny_pipe):
    images, _ = generate(["a cat"], signature="generate_4x8")
    expected = tiny_pipe.generate(
        "a cat", num_steps=3, guidance_scale=2, seed=0, sampler="ddim", height=4, width=8, progress=False
    )
    assert grey_levels(images, expected) <= 1


def test_default_signature_draws_fresh_seeds_and_says_them(loaded, generate):
    serve = loaded.signatures["serving_default"]
    first, second = (serve(prompt=tf.constant(["a cat", "a cat"])) for _ in range(2))
    seeds = [*first["seed"].numpy().tolist(), *second["seed"].numpy().tolist()]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    again, _ = generate(["a cat", "a cat"], seed=seeds[:2])
    assert grey_levels(decoded(first["image_bytes"]), again) <= 1


def test_inputs_have_the_defaults_of_the_export(exported):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["generate"]
    defaults = {name: tf.make_ndarray(value).tolist() for name, value in signature.defaults.items()}
    assert defaults == {
        "negative_prompt": [b""],
        "seed": [-1],
        "num_steps": [3],
        "guidance_scale": [2.0],
        "sampler": [b"ddim"],
    }
    assert set(signature.inputs) == {"prompt", *defaults}


def test_parts_put_together_are_the_arrow(loaded, generate, tiny_pipe):
    text = loaded.signatures["encode_text"](prompt=tf.constant(PROMPTS))
    np.testing.assert_array_equal(text["tokens"], tiny_pipe.tokenizer(PROMPTS))
    latent = numbers(3, 4, 6, 4)
    timestep = np.array([951, 1, 500], "float32")
    prediction = loaded.signatures["denoise"](
        latent=tf.constant(latent), timestep=tf.constant(timestep), context=text["context"]
    )["prediction"]
    inputs = {"latent": latent, "timestep": timestep, "context": text["context"].numpy()}
    np.testing.assert_allclose(prediction, tiny_pipe.unet(inputs), atol=1e-5)
    made = tiny_pipe.generate(PROMPTS, num_steps=3, guidance_scale=2, seed=[0, 0, 0], output="latent", progress=False)
    images = decoded(loaded.signatures["decode"](latent=tf.constant(made))["image_bytes"])
    assert grey_levels(images, generate(PROMPTS)[0]) <= 1


def test_image_comes_back_as_its_latent(loaded, tiny_pipe):
    image = (numbers(2, 8, 12, 3) * 50 + 128).clip(0, 255).astype("uint8")
    files = tf.constant([tf.io.encode_png(one).numpy() for one in image])
    latent = loaded.signatures["encode_image"](image_bytes=files)["latent"]
    np.testing.assert_allclose(latent, tiny_pipe.autoencoder.encode(image / np.float32(127.5) - 1), atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        ({"prompt": ["a"] * 9}, "1 to 8 pictures"),
        ({"seed": list(range(9))}, "1 to 8 pictures"),
        ({"prompt": []}, "one entry, or one for each"),
        ({"prompt": ["x" * 101]}, "100 bytes"),
        ({"negative_prompt": ["x" * 101]}, "100 bytes"),
        ({"prompt": ["a"] * 3, "seed": [1, 2]}, "`seed` must have one entry"),
        ({"num_steps": [0]}, "`num_steps` must lie in 1 .. 60"),
        ({"num_steps": [61]}, "`num_steps` must lie in 1 .. 60"),
        ({"num_steps": [-(2**31)]}, "`num_steps` must lie in 1 .. 60"),
        ({"num_steps": [51], "sampler": ["lcm"]}, "more than its sampler takes"),
        ({"sampler": ["no such"]}, "`sampler` must be one of ddpm, ddim"),
        ({"sampler": [""]}, "`sampler` must be one of"),
        ({"guidance_scale": [float("nan")]}, "`guidance_scale` must lie in 0 .. 100"),
        ({"guidance_scale": [float("inf")]}, "`guidance_scale` must lie in 0 .. 100"),
        ({"guidance_scale": [-0.1]}, "`guidance_scale` must lie in 0 .. 100"),
        ({"guidance_scale": [100.1]}, "`guidance_scale` must lie in 0 .. 100"),
        ({"seed": [-2]}, "`seed` must lie in 0"),
        ({"seed": [-(2**63)]}, "`seed` must lie in 0"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_request_beyond_a_limit_is_invalid(inputs, rule, generate):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        generate(**{"prompt": ["a cat"], **inputs})
    assert rule in str(raised.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latent_that_is_not_finite_is_invalid(value, loaded):
    latent = numbers(1, 4, 6, 4)
    latent[0, 1, 2, 3] = value
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be finite"):
        loaded.signatures["decode"](latent=tf.constant(latent))


def test_picture_of_another_size_or_format_is_refused_before_it_is_unpacked(loaded):
    encode = loaded.signatures["encode_image"]
    right = tf.io.encode_png(np.zeros((8, 12, 3), "uint8")).numpy()
    wide = tf.io.encode_png(np.zeros((12, 8, 3), "uint8")).numpy()
    for file in (wide, tf.io.encode_jpeg(np.zeros((8, 12, 3), "uint8")).numpy(), b"", right + bytes(10**6)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="12 x 8 pixels"):
            encode(image_bytes=tf.constant([right, file]))
    with pytest.raises(tf.errors.InvalidArgumentError):
        encode(image_bytes=tf.constant([right[:40]]))


@pytest.fixture(scope="module")
def without_keras(exported, tmp_path_factory):
    """What another process says in which neither Keras nor latentdiff can be imported, and a picture that it made."""
    code = """
import json, sys
for name in ("keras", "latentdiff", "tf_keras"):
    sys.modules[name] = None
import numpy as np, tensorflow as tf
from tensorflow.python.framework import op_def_registry
unknown = [name for name in sys.argv[3:] if op_def_registry.get(name) is None]
signatures = tf.saved_model.load(sys.argv[1]).signatures
one = lambda value, dtype: tf.constant([value], dtype)
out = signatures["generate"](prompt=tf.constant(["a cat"]), negative_prompt=tf.constant([""]), seed=one(3, tf.int64),
    num_steps=one(3, tf.int32), guidance_scale=one(2, tf.float32), sampler=tf.constant(["ddim"]))
np.save(sys.argv[2], tf.io.decode_png(out["image_bytes"][0]).numpy())
text = signatures["encode_text"](prompt=tf.constant(["a cat"]))
latent = signatures["encode_image"](image_bytes=out["image_bytes"])["latent"]
signatures["denoise"](latent=latent, timestep=one(9, tf.float32), context=text["context"])
signatures["decode"](latent=latent)
signatures["serving_default"](prompt=tf.constant(["a cat"]))
print(json.dumps({"signatures": list(signatures), "unknown": unknown}))
"""
    file = tmp_path_factory.mktemp("without_keras") / "image.npy"
    environment = {**os.environ, "PYTHONPATH": "", "TF_ENABLE_ONEDNN_OPTS": "1"}
    operations = {"StatefulPartitionedCall", "PartitionedCall", *(node.op for node in nodes(exported))}
    done = subprocess.run(
        [sys.executable, "-c", code, exported, file, *sorted(operations)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), np.load(file)


def test_graph_has_no_python_and_core_operations_alone(exported, without_keras):
    names = {node.op for node in nodes(exported)}
    assert not [name for name in names if "PyFunc" in name or "Python" in name]
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    own = {function.signature.name for function in saved.meta_graphs[0].graph_def.library.function}
    # In a process that imports TensorFlow alone, every operation that is known is TensorFlow's own.
    assert set(without_keras[0]["unknown"]) <= own


def test_keras_and_latentdiff_are_not_needed(without_keras, generate):
    """Another process, in which neither can be imported, answers every signature."""
    said, image = without_keras
    parts_of = {"generate", "decode", "encode_image", "denoise"}
    expected = {"serving_default", "encode_text", *parts_of, *(f"{name}_4x8" for name in parts_of)}
    assert set(said["signatures"]) == expected
    assert grey_levels(image[None], generate(["a cat"], seed=[3])[0]) <= 1


@pytest.fixture(scope="module")
def served(exported):
    """The model in a process without TensorFlow's Python, as a server has it."""
    with ServedModel(exported) as model:
        yield model


def pictures(out):
    return decoded(tf.constant(list(out["image_bytes"])))


def test_server_gives_the_same_pixels(served, generate):
    out = served.run("generate", {"prompt": PROMPTS, "seed": np.array([3, 4, 5])})  # the rest are defaults
    images, _ = generate(PROMPTS, seed=[3, 4, 5])
    assert out["seed"].tolist() == [3, 4, 5]
    assert grey_levels(pictures(out), images) <= 1
    out = served.run("serving_default", {"prompt": ["a cat"]})
    assert grey_levels(pictures(out), generate(["a cat"], seed=out["seed"])[0]) <= 1
    assert [name for name in served.modules if name.startswith("tensorflow.python")] == []


def malformed(rng):
    """A request of `generate` that is wrong in one way, or only odd."""
    inputs = {"prompt": ["a cat"], "seed": np.array([1]), "num_steps": np.array([1], "int32")}
    inputs["guidance_scale"] = np.array([1.0], "float32")
    kind = rng.integers(8)
    if kind == 0:
        inputs["num_steps"] = rng.integers(-(2**31), 2**31, 1, "int32")
    elif kind == 1:
        inputs["guidance_scale"] = rng.choice([np.nan, np.inf, -np.inf, -1, 1e38, 100.5], 1).astype("float32")
    elif kind == 2:
        inputs["seed"] = rng.integers(-(2**63), 2**63 - 1, 1)
    elif kind == 3:
        name = rng.choice(["seed", "num_steps", "guidance_scale"])
        inputs[name] = np.repeat(inputs[name], rng.choice([0, 2, 3, 9, 1000]))
    elif kind == 4:
        name = rng.choice(["seed", "num_steps", "guidance_scale"])
        inputs[name] = inputs[name].reshape(rng.choice([0, 2, 3]) * (1,))
    elif kind == 5:
        inputs["prompt"] = ["x" * int(n) for n in rng.integers(0, 300, rng.integers(0, 12))]
    elif kind == 6:
        inputs["prompt"] = [rng.bytes(rng.integers(0, 120)) for _ in range(rng.integers(1, 4))]
    else:
        inputs["sampler"] = [rng.bytes(rng.integers(0, 12))]
    return inputs


def asked_in_every_wrong_way(served, seed):
    """How many of 200 malformed requests gave pictures, and how many were refused."""
    rng = np.random.default_rng(seed)
    answers = {"pictures": 0, "refused": 0}
    for _ in range(200):
        try:
            out = served.run("generate", malformed(rng))
        except CApiError as error:
            assert error.code == INVALID_ARGUMENT, error.message
            answers["refused"] += 1
        else:
            assert all(file.startswith(b"\x89PNG") for file in out["image_bytes"])
            answers["pictures"] += 1
    return answers


def test_server_survives_its_clients(served):
    assert min(asked_in_every_wrong_way(served, 0).values()) > 20
    assert served.run("serving_default", {"prompt": ["a cat"]})["seed"].shape == (1,)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux writes it")
def test_server_does_not_grow_under_its_clients(served):
    """The first round may fill caches and pools; after it, 200 requests leave less than 20 kB each behind."""
    asked_in_every_wrong_way(served, 0)
    before = served.resident_bytes()
    asked_in_every_wrong_way(served, 1)
    assert served.resident_bytes() - before < 200 * 20_000


def test_any_bytes_have_tokens(served, tiny_pipe):
    rng = np.random.default_rng(1)
    prompts = [rng.bytes(rng.integers(0, 101)) for _ in range(1000)]
    for start in range(0, len(prompts), 8):
        part = prompts[start : start + 8]
        tokens = served.run("encode_text", {"prompt": part})["tokens"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            expected = tiny_pipe.tokenizer([prompt.decode(errors="replace") for prompt in part])
        np.testing.assert_array_equal(tokens, expected)


def test_weights_are_on_disk_once(exported, tiny_pipe):
    held = sum(v.value.shape.num_elements() * 4 for n in networks(tiny_pipe) for v in n.variables)
    reader = tf.train.load_checkpoint(str(exported / "variables" / "variables"))
    shapes = reader.get_variable_to_shape_map()
    stored = sum(int(np.prod(shape)) * 4 for name, shape in shapes.items() if name.startswith("raw/"))
    assert stored == held


def networks(pipe):
    return pipe.text_encoder, pipe.unet, pipe.autoencoder


def test_warmup_requests_are_those_of_a_server(exported, loaded):
    """The file's requests parse as TensorFlow Serving's own messages, and the model answers them."""
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    file = exported / "assets.extra" / "tf_serving_warmup_requests"
    logs = [prediction_log_pb2.PredictionLog.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]
    asked = [log.predict_log.request.model_spec.signature_name for log in logs]
    assert asked == ["serving_default", "generate", "generate_4x8"]
    for log in logs:
        request = log.predict_log.request
        assert request.model_spec.name == "tiny"
        signature = loaded.signatures[request.model_spec.signature_name]
        given = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        missing = set(signature.structured_input_signature[1]) - set(given)
        defaults = {"negative_prompt": [""], "guidance_scale": [2.0], "sampler": ["ddim"]}
        given |= {
            name: tf.constant([1], tf.int64) if name == "seed" else tf.constant(defaults[name]) for name in missing
        }
        assert signature(**given)["image_bytes"].shape == (1,)


def test_command_line_tool_of_tensorflow_shows_every_signature(exported, capsys, monkeypatch):
    from tensorflow.python.tools import saved_model_cli

    monkeypatch.setattr(sys, "argv", ["saved_model_cli", "show", "--dir", str(exported), "--all"])
    with pytest.raises(SystemExit) as exit:
        saved_model_cli.main()
    assert not exit.value.code
    shown = capsys.readouterr().out
    for line in ("signature_def['generate']", "inputs['guidance_scale']", "shape: (-1)", "outputs['image_bytes']"):
        assert line in shown


def test_card_and_settings_say_what_was_exported(exported):
    extra = exported / "assets.extra"
    settings = json.loads((extra / "latentdiff.json").read_text())
    assert settings["limits"]["max_batch"] == 8
    assert settings["sizes"] == [[8, 12], [4, 8]]
    card = (extra / "README.md").read_text()
    assert "Made of random numbers." in card and "`max_prompt_bytes` | 100" in card


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"directory": "one"}, "version's number"),
        ({"sizes": [(7, 12)]}, "`height` must be a positive multiple of 2"),
        ({"sizes": [(8, 12), (8, 12)]}, "`sizes` must differ"),
        ({"samplers": []}, "one name or more"),
        ({"samplers": ["dim"]}, "ddim"),
        ({"max_steps": 0}, "`max_steps` must be a positive number"),
        ({"max_steps": 1001}, "from 1 to 1000"),
        ({"num_steps": 51}, "`num_steps` must lie in 1 .. max_steps=50"),
        ({"guidance_scale": -1}, "`guidance_scale` must lie in 0"),
        ({"max_batch": 1.5}, "`max_batch` must be a positive number"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_wrong_export_is_refused_before_anything_is_written(changes, rule, tiny_pipe, tmp_path):
    changes = dict(changes)
    directory = tmp_path / changes.pop("directory", "1")
    with pytest.raises(ValueError, match=rule):
        export_saved_model(tiny_pipe, directory, **changes)
    assert list(tmp_path.iterdir()) == []


def test_version_that_is_there_stays(exported, tiny_pipe):
    before = (exported / "saved_model.pb").read_bytes()
    with pytest.raises(FileExistsError):
        export_saved_model(tiny_pipe, exported)
    assert (exported / "saved_model.pb").read_bytes() == before


def test_samplers_that_clip_do_so_beside_others(tiny_pipe):
    """Rows of a sampler that clips x0 and of one that does not, in the loop that is exported."""
    pipe = TextToImage(replace(tiny_pipe.parts, settings=SamplerSettings(sampler="ddim", clip_range=0.5)))
    arrow = Arrow(pipe, make_book(pipe.settings, pipe.schedule, ["ddim", "euler"], 4))
    context = arrow.encode(np.repeat(pipe.tokenizer(["a cat"]), 2, axis=0))
    rows = {"sampler": [0, 1], "num_steps": [4, 4], "scale": [1.0, 1.0]}
    rows = {name: tf.constant(values) for name, values in rows.items()}
    latents = arrow.sample(context, context, tf.constant([1, 1], tf.int64), **rows, shape=LATENT)
    chosen = {"num_steps": 4, "guidance_scale": 1, "seed": 1, "output": "latent", "progress": False}
    for latent, sampler in zip(latents, ("ddim", "euler"), strict=True):
        assert relative_error(latent, pipe.generate("a cat", sampler=sampler, **chosen)[0]) < 1e-4
    unclipped = tiny_pipe.generate("a cat", sampler="ddim", **chosen)[0]
    assert relative_error(latents[0], unclipped) > 1e-2
