"""Training of the CLIP pair: the loss against NumPy, a pair that learns, and a run that goes on."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import make, numbers, run, to_numpy

from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.presets import named_variables
from latentdiff.training import CLIPTraining
from latentdiff.training.state import read_state, write_state

JIT = keras.backend.backend() == "jax"
START, END, PAD = 10, 11, 0
TEXT = {"vocabulary_size": 12, "context_length": 6, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "width": 8,
    "depth": 1,
    "heads": 2,
    "mlp_width": 16,
    "projection_dim": 8,
}


def pair(seed=0, dtype="float32", **changes):
    text_encoder = make(CLIPTextEncoder, TEXT, seed=seed, dtype=dtype)
    image_encoder = make(CLIPImageEncoder, IMAGE, seed=seed + 1, dtype=dtype)
    keras.utils.set_random_seed(seed)
    return CLIPTraining(text_encoder, image_encoder, END, **changes)


def batch(count=4, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 10, (count, 6)).astype("int32")
    tokens[:, 0] = START
    for i, row in enumerate(tokens):
        row[2 + i % 4 :] = PAD
        row[2 + i % 4] = END
    return {"image": np.tanh(numbers(count, 8, 8, 3, seed=seed)), "tokens": tokens}


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tiny():
    return pair()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_is_the_mean_of_both_cross_entropies(temperature):
    training = pair(temperature=temperature)
    image, text = (unit(numbers(5, 8, seed=seed).astype("float64")) for seed in (1, 2))
    logits = image @ text.T / temperature
    expected = -(np.trace(log_softmax(logits)) + np.trace(log_softmax(logits.T))) / 2 / 5
    tensors = [ops.convert_to_tensor(array.astype("float32")) for array in (image, text)]
    np.testing.assert_allclose(float(training.compute_loss(None, None, tensors)), expected, rtol=1e-5)
    own = np.arange(5)
    shares = [(scores.argmax(axis=1) == own).mean() for scores in (logits, logits.T)]
    assert shares[0] != shares[1]
    metrics = [float(metric.result()) for metric in (training.image_to_text, training.text_to_image)]
    np.testing.assert_allclose(metrics, shares, rtol=1e-6)


def test_pair_that_tells_nothing_has_the_logarithm_of_the_batch_as_loss(tiny):
    same = ops.ones((7, 8)) / math.sqrt(8)
    np.testing.assert_allclose(float(tiny.compute_loss(None, None, [same, same])), math.log(7), rtol=1e-5)


def test_embeddings_are_of_unit_length_and_float32(tiny):
    image, text = run(tiny, batch())
    for embedding in (image, text):
        assert keras.backend.standardize_dtype(embedding.dtype) == "float32"
        np.testing.assert_allclose(np.linalg.norm(to_numpy(embedding), axis=1), 1, rtol=1e-5)


def test_caption_is_taken_at_its_first_end_token(tiny):
    """So what fills up after it, the end token itself in Stable Diffusion 1.x, changes nothing."""
    captions = [[3, END, END, END, END], [3, END, PAD, 5, END], [3, 4, END, END, END], [3, 4, END, END, END]]
    tokens = np.array([[START, *caption] for caption in captions], "int32")
    first, second, longer, _ = to_numpy(run(tiny, {**batch(), "tokens": tokens})[1])
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.abs(longer - first).max() > 1e-2
    context = to_numpy(run(tiny.text_encoder, tokens))
    expected = unit(context[[0, 2], [2, 3]] @ to_numpy(tiny.text_projection.kernel))
    np.testing.assert_allclose([first, longer], expected, atol=1e-5)


def test_temperature_begins_at_the_papers(tiny):
    assert float(tiny.logit_scale) == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    image, text = run(tiny, batch())
    expected = to_numpy(image) @ to_numpy(text).T / 0.07
    np.testing.assert_allclose(to_numpy(tiny.logits(image, text)), expected, rtol=1e-4, atol=1e-4)


def compiled(training, optimizer, run_eagerly=not JIT):
    """Ready for a few steps, which on TensorFlow take less time than tracing them; on JAX it is the other way."""
    training.compile(optimizer=optimizer, jit_compile=JIT, run_eagerly=run_eagerly)
    return training


class Told(CLIPTraining):
    """Is handed embeddings, so that the temperature alone is trained."""

    def call(self, batch, training=False):
        return batch["image"], batch["tokens"]


def test_temperature_is_cut_at_a_hundredth_and_comes_back(tiny):
    training = Told(tiny.text_encoder, tiny.image_encoder, END, temperature=0.5)
    own, wrong = np.eye(4, 8, dtype="float32"), np.eye(4, 8, 1, dtype="float32")
    for part in (training.text_encoder, training.image_encoder, training.text_projection):
        part.trainable = False
    compiled(training, keras.optimizers.SGD(1e4)).fit({"image": own, "tokens": own}, verbose=0)
    assert float(training.logit_scale) == pytest.approx(math.log(100), rel=1e-6)
    compiled(training, keras.optimizers.SGD(0.01)).fit({"image": own, "tokens": wrong}, verbose=0)
    assert 3 < float(training.logit_scale) < math.log(100) - 0.1
    for part in (training.text_encoder, training.image_encoder):
        part.trainable = True


def test_gradients_reach_both_encoders_projections_and_temperature():
    training = compiled(pair(), keras.optimizers.SGD(0.5))
    before = {path: to_numpy(variable) for path, variable in paths(training)}
    history = training.fit(batch(), validation_data=batch(seed=1), verbose=0).history
    metrics = {"loss", "image_to_text", "text_to_image"}
    assert set(history) == metrics | {f"val_{name}" for name in metrics}
    still = [path for path, variable in paths(training) if (to_numpy(variable) == before[path]).all()]
    # A constant added to every key changes no softmax; its gradient is rounding alone.
    assert [path for path in still if "attention/key/bias" not in path] == []


def paths(training):
    for name in ("text_encoder", "image_encoder"):
        yield from ((f"{name}/{path}", variable) for path, variable in named_variables(getattr(training, name)))
    yield "text_projection", training.text_projection.kernel
    yield "logit_scale", training.logit_scale


def pictures_and_captions(count, seed=0):
    """Noise in one of nine colours, and captions that name the colour's two levels among words that say nothing."""
    random = np.random.default_rng(seed)
    kinds = np.arange(count) % 9
    red, green = kinds // 3, kinds % 3
    image = 0.2 * random.normal(size=(count, 8, 8, 3))
    image[..., 0] += (red - 1)[:, None, None] * 0.8
    image[..., 1] += (green - 1)[:, None, None] * 0.8
    filler = random.integers(7, 10, count)
    tokens = np.stack([np.full(count, START), 1 + red, filler, 4 + green, np.full(count, END), np.zeros(count)], axis=1)
    return {"image": image.astype("float32"), "tokens": tokens.astype("int32")}


def test_pair_learns_to_match():
    """Nine kinds in each batch: chance finds one in nine, log(9) = 2.2 is the loss of a pair that tells nothing."""
    keras.utils.set_random_seed(1)
    training = CLIPTraining(CLIPTextEncoder(**TEXT), CLIPImageEncoder(**IMAGE), END)
    compiled(training, keras.optimizers.Adam(1e-2), run_eagerly=False)
    history = training.fit(pictures_and_captions(9 * 30), batch_size=9, epochs=4, shuffle=False, verbose=0).history
    assert history["loss"][-1] < 1.0
    assert min(history["image_to_text"][-1], history["text_to_image"][-1]) > 0.7
    image, text = (to_numpy(embedding) for embedding in run(training, pictures_and_captions(9 * 5, seed=1)))
    cosines = (image @ text.T).reshape(5, 9, 5, 9)
    told = np.concatenate([cosines[i, :, i].argmax(axis=1) == np.arange(9) for i in range(5)])
    assert told.mean() > 0.7  # of pictures and captions that it never saw


def losses(training, **changes):
    """Of two steps."""
    data = pictures_and_captions(8)
    return training.fit(data, batch_size=4, shuffle=False, verbose=0, **changes).history["loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pair after two steps, their losses, and the file that keeps it."""
    training = compiled(pair(), keras.optimizers.Adam(1e-3))
    file = tmp_path_factory.mktemp("run") / "state.npz"
    said = losses(training)
    write_state(file, training)
    return training, said, file


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_float32_variables(dtype, trained):
    training = compiled(pair(dtype=dtype), keras.optimizers.Adam(1e-3))
    if dtype == "mixed_float16":
        assert isinstance(training.optimizer, keras.optimizers.LossScaleOptimizer)
    assert {variable.dtype for variable in training.trainable_variables} == {"float32"}
    np.testing.assert_allclose(losses(training), trained[1], rtol=0.05)
    assert float(training.logit_scale) != pytest.approx(math.log(1 / 0.07), rel=1e-7)


def test_run_goes_on_from_its_checkpoint(trained):
    training, _, file = trained
    again = compiled(pair(seed=5), keras.optimizers.Adam(1e-3))
    read_state(file, again)
    assert int(again.steps) == 2
    for (path, mine), (_, theirs) in zip(paths(again), paths(training), strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs), err_msg=path)
    np.testing.assert_allclose(losses(again), losses(training), rtol=1e-6)


def test_accumulation_contrasts_within_each_small_batch():
    """Two batches of two, twice the same, are one step of either: not one of a batch of four."""
    x = pictures_and_captions(2)
    twice = {name: np.concatenate([array, array]) for name, array in x.items()}
    once = compiled(pair(), keras.optimizers.SGD(0.1))
    accumulated = compiled(pair(), keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    once.fit(x, batch_size=2, verbose=0)
    accumulated.fit(twice, batch_size=2, shuffle=False, verbose=0)
    for (path, mine), (_, theirs) in zip(paths(accumulated), paths(once), strict=True):
        np.testing.assert_allclose(to_numpy(mine), to_numpy(theirs), atol=1e-5, err_msg=path)


def test_frozen_text_encoder_is_not_trained():
    training = pair()
    training.text_encoder.trainable = False
    trained = {id(variable) for variable in training.trainable_variables}
    assert not trained & {id(variable) for variable in training.text_encoder.variables}
    assert id(training.text_projection.kernel) in trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_dim": 7}, "`projection_dim` must be the image encoder's. Received: projection_dim=7, 8."),
        ({"temperature": 0.001}, "`temperature` must be at least 0.01. Received: temperature=0.001."),
        ({"end_id": 12}, "`end_id` must be in 0..11. Received: end_id=12."),
    ],
)
def test_bad_argument_is_told(changes, message, tiny):
    with pytest.raises(ValueError) as error:
        CLIPTraining(tiny.text_encoder, tiny.image_encoder, **{"end_id": END, **changes})
    assert message in str(error.value)
