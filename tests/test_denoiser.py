"""A network's output as (x0_hat, eps_hat): every prediction, every end of the schedule."""

import keras
import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.denoiser import Denoiser, to_x0_eps

SHAPES = [(3, 32, 32, 3), (3, 8, 8, 4), (3, 16000), (3, 64, 128)]
PREDICTIONS = ["eps", "v", "x0"]


def array(tensor):
    return ops.convert_to_numpy(tensor)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def perfect_output(prediction, x0, eps, signal, noise):
    return {"eps": eps, "v": signal * eps - noise * x0, "x0": x0}[prediction]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_output_gives_the_data_and_the_noise(shape, prediction):
    x0, eps = draw(shape), draw(shape, 1)
    signal, noise = 0.8, 0.6
    output = perfect_output(prediction, x0, eps, signal, noise)
    x0_hat, eps_hat = to_x0_eps(output, signal * x0 + noise * eps, signal, noise, prediction)
    np.testing.assert_allclose(array(x0_hat), x0, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(array(eps_hat), eps, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_may_be_one_for_each_example(shape, prediction):
    output, x_t = draw(shape), draw(shape, 1)
    signal, noise = np.array([0.96, 0.8, 0.28]), np.array([0.28, 0.6, 0.96])
    column = (3,) + (1,) * (len(shape) - 1)
    forms = [
        (signal, noise),
        (signal.reshape(column), noise.reshape(column)),
        (ops.convert_to_tensor(signal, "float32"), ops.convert_to_tensor(noise, "float32")),
    ]
    for form in forms:
        x0_hat, eps_hat = map(array, to_x0_eps(output, x_t, *form, prediction))
        for i in range(3):
            alone = to_x0_eps(output[i : i + 1], x_t[i : i + 1], signal[i], noise[i], prediction)
            np.testing.assert_allclose(x0_hat[i : i + 1], array(alone[0]), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(eps_hat[i : i + 1], array(alone[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [(0.8, 0.6), (1.0, 7.0), (0.3, 0.7)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimates_make_up_x_t_on_any_schedule(prediction, levels):
    # Variance preserving, variance exploding, flow matching.
    signal, noise = levels
    x_t = draw((2, 50), 1)
    for clip in (None, 0.5):
        x0_hat, eps_hat = to_x0_eps(draw((2, 50)), x_t, signal, noise, prediction, clip)
        np.testing.assert_allclose(signal * array(x0_hat) + noise * array(eps_hat), x_t, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_both_ends_of_the_schedule_are_finite(prediction, levels, clip):
    x_t, output = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    for form in (levels, tuple(map(ops.convert_to_tensor, levels))):
        for estimate in to_x0_eps(output, x_t, *form, prediction, clip):
            assert np.isfinite(array(estimate)).all()


def test_v_without_signal_is_minus_the_data_and_x_t_is_the_noise():
    x_t, v = draw((2, 5)), draw((2, 5), 1)
    x0_hat, eps_hat = to_x0_eps(v, x_t, 0.0, 1.0, "v")
    np.testing.assert_array_equal(array(x0_hat), -v)
    np.testing.assert_array_equal(array(eps_hat), x_t)


def test_without_noise_x_t_is_the_data():
    x_t, output = draw((2, 5)), draw((2, 5), 1)
    np.testing.assert_array_equal(array(to_x0_eps(output, x_t, 1.0, 0.0, "v")[0]), x_t)
    np.testing.assert_array_equal(array(to_x0_eps(output, x_t, 1.0, 0.0, "eps")[0]), x_t)


def test_gradients_are_finite_at_both_ends():
    for prediction in PREDICTIONS:
        for levels in ((0.0, 1.0), (1.0, 0.0)):

            def total(output, prediction=prediction, levels=levels):
                signal, noise = (ops.convert_to_tensor(level) for level in levels)
                x0_hat, eps_hat = to_x0_eps(output, ops.ones((2, 3)), signal, noise, prediction)
                return ops.sum(x0_hat) + ops.sum(eps_hat)

            assert np.isfinite(array(gradient(total, ops.ones((2, 3))))).all()


def gradient(function, at):
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(function)(at)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(at)
        value = function(at)
    return tape.gradient(value, at)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_keeps_x0_in_range_and_the_noise_follows(prediction):
    signal, noise = 0.6, 0.8
    x_t, output = 2 * draw((2, 200)), 2 * draw((2, 200), 1)
    free, _ = map(array, to_x0_eps(output, x_t, signal, noise, prediction))
    x0_hat, eps_hat = map(array, to_x0_eps(output, x_t, signal, noise, prediction, clip=1.0))
    assert np.abs(free).max() > 1.5
    np.testing.assert_allclose(x0_hat, np.clip(free, -1, 1), rtol=1e-6)
    np.testing.assert_allclose(eps_hat, (x_t - signal * x0_hat) / noise, rtol=1e-5, atol=1e-5)


def test_half_precision_output_becomes_float32():
    output = ops.cast(draw((2, 6)), "bfloat16")
    for estimate in to_x0_eps(output, draw((2, 6), 1), 0.8, 0.6, "eps"):
        assert keras.backend.standardize_dtype(estimate.dtype) == "float32"


@pytest.mark.parametrize("shape", SHAPES)
def test_network_sees_x_t_and_one_float32_timestep_for_each_example(shape):
    seen = []

    def network(x, timestep):
        seen.append((x, timestep))
        return ops.zeros_like(x)

    x_t = draw(shape)
    x0_hat, eps_hat = Denoiser(network)(x_t, 951, 0.5, np.sqrt(0.75))
    ((x, timestep),) = seen
    np.testing.assert_array_equal(array(x), x_t)
    assert keras.backend.standardize_dtype(timestep.dtype) == "float32"
    np.testing.assert_array_equal(array(timestep), [951, 951, 951])
    np.testing.assert_allclose(array(x0_hat), 2 * x_t, rtol=1e-6)
    np.testing.assert_array_equal(array(eps_hat), np.zeros(shape))

    Denoiser(network)(x_t, np.array([1.0, 2.0, 3.0]), 0.5, np.sqrt(0.75))
    np.testing.assert_array_equal(array(seen[1][1]), [1, 2, 3])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_is_the_network_and_the_conversion(prediction):
    x_t = draw((2, 8, 8, 4))
    estimates = Denoiser(lambda x, timestep: 0.5 * x, prediction, clip=0.9)(x_t, 3, 0.8, 0.6)
    for estimate, expected in zip(estimates, to_x0_eps(0.5 * x_t, x_t, 0.8, 0.6, prediction, 0.9), strict=True):
        np.testing.assert_array_equal(array(estimate), array(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_variance_is_split_off(shape):
    x_t = draw(shape)
    denoiser = Denoiser(lambda x, _: ops.concatenate([2 * x, 100 + x], axis=-1), learned_variance=True)
    np.testing.assert_array_equal(array(denoiser(x_t, 1, 0.8, 0.6)[1]), 2 * x_t)


def test_learned_variance_needs_twice_the_channels():
    with pytest.raises(ValueError, match="twice the channels of x_t. Received: 4 channels for 4"):
        Denoiser(lambda x, _: x, learned_variance=True)(draw((2, 8, 8, 4)), 1, 0.8, 0.6)


def test_unknown_prediction_is_refused_at_construction():
    with pytest.raises(ValueError, match="`prediction` must be one of eps, v, x0"):
        Denoiser(lambda x, _: x, "noise")
    with pytest.raises(ValueError, match="`prediction` must be one of eps, v, x0"):
        to_x0_eps(np.zeros((1, 2)), np.zeros((1, 2)), 0.8, 0.6, "noise")


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_clip_must_be_positive(clip):
    with pytest.raises(ValueError, match="`clip` must be positive"):
        Denoiser(lambda x, _: x, clip=clip)
