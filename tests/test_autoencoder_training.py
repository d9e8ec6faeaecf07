"""The autoencoder's terms against NumPy and the finite differences of their definitions."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import make, numbers, to_numpy
from toy_training import JIT

from latentdiff.models.autoencoder import Autoencoder
from latentdiff.training import AutoencoderTraining, PatchDiscriminator
from latentdiff.training.discriminator import hinge_loss
from latentdiff.training.perceptual import perceptual_distance


@pytest.fixture(scope="module")
def autoencoder():
    config = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}
    return make(Autoencoder, config, latent_channels=2)


@pytest.fixture(scope="module")
def discriminator():
    return make(PatchDiscriminator, {}, width=4, depth=1, groups=2)


def test_perceptual_distance_is_lpips():
    x, y = (
        [numbers(2, 3, 4, 5), numbers(2, 2, 2, 3, seed=1)],
        [numbers(2, 3, 4, 5, seed=2), numbers(2, 2, 2, 3, seed=3)],
    )
    w = [np.abs(numbers(5, seed=4)), np.abs(numbers(3, seed=5))]
    expected = 0.0
    for a, b, weight in zip(x, y, w, strict=True):
        a, b = (f / np.linalg.norm(f, axis=-1, keepdims=True) for f in (a, b))
        expected = expected + (weight * (a - b) ** 2).sum(-1).mean((1, 2))
    tensors = [[ops.convert_to_tensor(f) for f in maps] for maps in (x, y)]
    np.testing.assert_allclose(to_numpy(perceptual_distance(*tensors, w)), expected, rtol=1e-5)
    np.testing.assert_allclose(to_numpy(perceptual_distance(tensors[0], tensors[0])), 0, atol=1e-7)
    with pytest.raises(ValueError, match="as many feature maps"):
        perceptual_distance(tensors[0], tensors[1][:1])


def test_hinge_loss_is_zero_beyond_the_margin_and_linear_within():
    real = np.array([2.0, 0.5, -1.0], "float32").reshape(3, 1, 1, 1)
    fake = np.array([-2.0, -0.5, 1.0], "float32").reshape(3, 1, 1, 1)
    np.testing.assert_allclose(to_numpy(hinge_loss(real, fake)), [0.0, 0.5, 2.0])


def test_discriminator_sees_patches(discriminator):
    assert discriminator.compute_output_shape((2, 32, 48, 3)) == (2, 16, 24, 1)
    image = numbers(1, 32, 32, 3)
    other = image.copy()
    other[:, -4:, -4:] += 0.001
    alone, both = to_numpy(discriminator(image)), to_numpy(discriminator(np.concatenate([image, other])))
    np.testing.assert_allclose(both[:1], alone, atol=1e-5)  # whatever the batch
    with pytest.raises(ValueError, match="Received: groups=32, width=20"):
        PatchDiscriminator(width=20)


def step(training, images):
    training.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=JIT, run_eagerly=not JIT)
    training.build()
    networks = {"drawn": training.autoencoder, "judge": training.discriminator}
    variables = {kind: network.trainable_variables for kind, network in networks.items() if network}
    before = {kind: [to_numpy(v) for v in part] for kind, part in variables.items()}
    training.train_on_batch(images)
    return {
        kind: [to_numpy(v) - old for v, old in zip(part, before[kind], strict=True)] for kind, part in variables.items()
    }


def fresh(discriminator_weight, start=0, dtype="float32", **arguments):
    """The same autoencoder and discriminator each time, in a training of their own."""
    config = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}
    autoencoder = make(Autoencoder, config, latent_channels=2, dtype=dtype)
    discriminator = make(PatchDiscriminator, {}, width=4, depth=1, groups=2, dtype=dtype)
    return AutoencoderTraining(
        autoencoder,
        discriminator=discriminator,
        discriminator_weight=discriminator_weight,
        discriminator_start=start,
        **arguments,
    )


def test_discriminators_opinion_moves_the_autoencoder_and_not_the_discriminator():
    images = np.tanh(numbers(2, 8, 8, 3))
    without, with_it = step(fresh(0.0), images), step(fresh(1.0), images)
    for mine, theirs in zip(without["judge"], with_it["judge"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert max(np.abs(value).max() for value in without["judge"]) > 1e-4
    differences = [np.abs(a - b).max() for a, b in zip(without["drawn"], with_it["drawn"], strict=True)]
    assert max(differences) > 1e-4


def test_discriminators_learning_leaves_the_autoencoder_alone():
    images = np.tanh(numbers(2, 8, 8, 3))
    judged = step(fresh(0.0), images)
    config = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}
    alone = step(AutoencoderTraining(make(Autoencoder, config, latent_channels=2)), images)
    for mine, theirs in zip(judged["drawn"], alone["drawn"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1])
def test_loss_with_a_discriminator_is_its_definition(start):
    """L = L_without + [n >= start] (w lambda (-mean D(y)) + (max(0, 1 - D(x)) + max(0, 1 + D(y))) / 2), n = 0."""
    training = fresh(0.7, start=start)
    training.build()
    image = ops.convert_to_tensor(np.tanh(numbers(2, 8, 8, 3)))
    y, mean, log_variance, features = training(image)
    without = AutoencoderTraining(training.autoencoder).compute_loss(image, None, [y, mean, log_variance])
    real, fake = (to_numpy(training.discriminator(picture)) for picture in (image, y))
    factor = float(training.adaptive_weight(image, features, lambda p: -ops.mean(training.discriminator(p), (1, 2, 3))))
    hinge = (np.maximum(0, 1 - real) + np.maximum(0, 1 + fake)).mean() / 2
    added = 0.7 * factor * -fake.mean() + hinge
    assert abs(0.7 * factor * fake.mean()) > 1e-3 and abs(real.mean() - fake.mean()) > 1e-3  # each of them is seen
    found = training.compute_loss(image, None, [y, mean, log_variance, features])
    assert float(found) == pytest.approx(float(without) + (added if start == 0 else 0), rel=1e-4)


def test_discriminator_waits_for_its_step():
    images = np.tanh(numbers(2, 8, 8, 3))
    training = fresh(1.0, start=1)
    steps = step(training, images)
    assert max(np.abs(value).max() for value in steps["judge"]) == 0
    before = [to_numpy(v).copy() for v in training.discriminator.trainable_variables]
    training.train_on_batch(images)
    after = [to_numpy(v) for v in training.discriminator.trainable_variables]
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1e-5


def test_adaptive_weight_makes_both_gradients_of_the_last_kernel_alike():
    training = fresh(1.0)
    last = training.autoencoder.decoder.layers[-1]
    image, features = np.tanh(numbers(2, 8, 8, 3)), numbers(2, 8, 8, 4, seed=1)

    def opinion(picture):
        return ops.mean(picture**3, axis=(1, 2, 3))

    weight = float(training.adaptive_weight(ops.convert_to_tensor(image), ops.convert_to_tensor(features), opinion))
    padded = np.pad(features.astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)], -2)  # (B, H, W, 9, c)
    kernel, bias = to_numpy(last.kernel).reshape(9, 4, 3), to_numpy(last.bias)
    picture = np.einsum("bhwkc,kcd->bhwd", patches, kernel) + bias
    error = picture - image
    by_reconstruction = np.einsum("bhwkc,bhwd->kcd", patches, np.sign(error) + 2 * error)
    by_opinion = np.einsum("bhwkc,bhwd->kcd", patches, 3 * picture**2)
    n = error.size
    expected = np.linalg.norm(by_reconstruction / n) / (np.linalg.norm(by_opinion / n) + 1e-4)
    assert weight == pytest.approx(expected, rel=1e-3)


def test_perceptual_term_is_added_by_its_weight(autoencoder):
    image = keras.Input((None, None, 3))
    features = keras.Model(image, [keras.layers.Conv2D(4, 3, name="first")(image), keras.layers.Conv2D(2, 1)(image)])
    x, y = ops.convert_to_tensor(numbers(2, 4, 6, 3)), ops.convert_to_tensor(numbers(2, 4, 6, 3, seed=1))
    plain = AutoencoderTraining(autoencoder).reconstruction_loss(x, y)
    seen = AutoencoderTraining(autoencoder, features=features, perceptual_weight=0.3)
    np.testing.assert_allclose(
        to_numpy(seen.reconstruction_loss(x, y) - plain),
        0.3 * to_numpy(perceptual_distance(features(x), features(y))),
        rtol=1e-4,
    )
    assert not any(v.path.startswith("first") for v in seen.trainable_variables)


def test_negative_weights_are_told(autoencoder):
    for name in ("kl_weight", "l1_weight", "perceptual_weight", "discriminator_start"):
        with pytest.raises(ValueError, match=f"Received: {name}=-1"):
            AutoencoderTraining(autoencoder, **{name: -1})


def test_autoencoder_with_a_discriminator_trains():
    training = fresh(0.5, ema_decay=0.9)
    training.compile(optimizer=keras.optimizers.Adam(1e-3), jit_compile=JIT)
    images = np.tanh(numbers(16, 8, 8, 3))
    history = training.fit(images, batch_size=4, epochs=4, verbose=0).history
    assert history["psnr"][-1] > history["psnr"][0]
    assert set(history) == {"loss", "psnr", "logits_real", "logits_fake"}
    paths = [average.path for average in training.averages]
    assert paths and not any("patch" in path for path in paths)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_float32_variables_to_like_losses(policy):
    """With all terms: the reconstruction, the perceptual distance, KL and the discriminator's."""
    images, losses = np.tanh(numbers(4, 8, 8, 3)), []
    for dtype in ("float32", policy):
        image = keras.Input((None, None, 3))
        features = keras.Model(image, keras.layers.Conv2D(4, 3, kernel_initializer="ones", dtype=dtype)(image))
        training = fresh(0.5, dtype=dtype, features=features)
        step(training, images)
        assert {v.dtype for v in training.trainable_variables} == {"float32"}
        losses.append(training.last_losses(1)[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
