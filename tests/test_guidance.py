"""Classifier-free guidance: its formula, its ends, rescaling, and the interval of noise levels."""

import keras
import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.denoiser import Denoiser, to_x0_eps
from latentdiff.diffusion.guidance import Guided, guide

SHAPES = [(2, 32, 32, 3), (2, 8, 8, 4), (2, 16000), (2, 64, 128)]
SIGNAL, NOISE = 0.6, 0.8  # noise_to_signal 4/3


def array(tensor):
    return ops.convert_to_numpy(tensor)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Network:
    """Puts out -x for the unconditional half of a batch of 2 B and 2 x + timestep for the conditional one."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, timestep):
        self.batches.append(x.shape[0])
        count = x.shape[0] // 2
        return ops.concatenate([-x[:count], conditional_output(x[count:], timestep[count:])], axis=0)


def conditional_output(x, timestep):
    return 2 * x + ops.reshape(timestep, (-1, *(1 for _ in x.shape[1:])))


def estimates_of(output, x_t, signal=SIGNAL, noise=NOISE):
    return map(array, to_x0_eps(output, x_t, signal, noise, "eps"))


def compiled(function):
    """The function as the backend of this process compiles it, and how often it was traced."""
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return function(*arguments)

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(counted), traces
    import tensorflow as tf

    return tf.function(counted), traces


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 7.5])
def test_guide_goes_along_the_difference(shape, scale):
    conditional, unconditional = draw(shape), draw(shape, 1)
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(array(guide(conditional, unconditional, scale)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_scale_one_is_conditional(rescale):
    conditional, unconditional = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    np.testing.assert_allclose(array(guide(conditional, unconditional, 1.0, rescale)), conditional, atol=2e-6)


def test_guidance_scale_zero_is_unconditional():
    conditional, unconditional = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    np.testing.assert_array_equal(array(guide(conditional, unconditional, 0.0)), unconditional)


def test_each_example_may_have_its_own_scale_and_rescale():
    conditional, unconditional = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    together = array(guide(conditional, unconditional, np.array([2.0, 9.0]), np.array([0.0, 0.7])))
    for i, (scale, rescale) in enumerate(((2.0, 0.0), (9.0, 0.7))):
        alone = array(guide(conditional[i : i + 1], unconditional[i : i + 1], scale, rescale))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rescale_has_the_spread_of_the_conditional_output(shape):
    conditional, unconditional = draw(shape) * 0.5, draw(shape, 1)
    rescaled = array(guide(conditional, unconditional, 7.5, 1.0))
    for i in range(2):
        np.testing.assert_allclose(rescaled[i].std(), conditional[i].std(), rtol=1e-4)


def test_rescale_agrees_with_the_paper():
    # Worked by hand: guided = (2, 6), standard deviation 2; conditional (1, 3), standard deviation 1; factor 1/2.
    conditional, unconditional = np.array([[1.0, 3.0]]), np.array([[0.0, 0.0]])
    np.testing.assert_allclose(array(guide(conditional, unconditional, 2.0, 1.0)), [[1.0, 3.0]], rtol=1e-6)
    # 0.75 (1, 3) + 0.25 (2, 6)
    np.testing.assert_allclose(array(guide(conditional, unconditional, 2.0, 0.75)), [[1.25, 3.75]], rtol=1e-6)


def test_rescale_of_a_constant_output_is_finite():
    assert np.isfinite(array(guide(np.ones((2, 3)), np.zeros((2, 3)), 3.0, 0.7))).all()


def test_half_precision_outputs_are_guided_in_float32():
    conditional = ops.cast(ops.full((1, 4), 1.0078125), "bfloat16")
    unconditional = ops.ones((1, 4), "bfloat16")
    # 1 + 3.1 / 128 is no bfloat16.
    guided = guide(conditional, unconditional, 3.1)
    assert keras.backend.standardize_dtype(guided.dtype) == "float32"
    np.testing.assert_allclose(array(guided), 1 + 3.1 / 128, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_guided_asks_once_with_the_unconditional_half_first(shape):
    network, x_t = Network(), draw(shape)
    x0_hat, eps_hat = map(array, Guided(Denoiser(network), 3.0)(x_t, 5.0, SIGNAL, NOISE))
    assert network.batches == [4]
    expected = estimates_of(-x_t + 3 * (2 * x_t + 5 + x_t), x_t)
    for estimate, wanted in zip((x0_hat, eps_hat), expected, strict=True):
        np.testing.assert_allclose(estimate, wanted, rtol=1e-5, atol=1e-4)


def test_guided_keeps_the_timesteps_of_its_examples():
    x_t = draw((2, 6))
    _, eps_hat = Guided(Denoiser(Network()), 1.0)(x_t, np.array([3.0, 40.0]), SIGNAL, NOISE)
    np.testing.assert_allclose(array(eps_hat), 2 * x_t + np.array([[3.0], [40.0]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_guided_with_scale_one_is_the_conditional_denoiser(prediction):
    x_t = draw((2, 8, 8, 4))
    guided = Guided(Denoiser(Network(), prediction, clip=1.5), 1.0)(x_t, 5.0, SIGNAL, NOISE)
    alone = Denoiser(conditional_output, prediction, clip=1.5)(x_t, 5.0, SIGNAL, NOISE)
    for estimate, expected in zip(guided, alone, strict=True):
        np.testing.assert_allclose(array(estimate), array(expected), rtol=1e-5, atol=1e-5)


def test_guidance_comes_before_clipping():
    x_t = draw((2, 50))
    x0_hat, _ = Guided(Denoiser(Network(), "x0", clip=0.5), 3.0)(x_t, 0.0, SIGNAL, NOISE)
    np.testing.assert_allclose(array(x0_hat), np.clip(8 * x_t, -0.5, 0.5), rtol=1e-5)


def test_learned_variance_is_not_guided():
    def network(x, timestep):
        return ops.concatenate([Network()(x, timestep), 1000 + x], axis=-1)

    x_t = draw((2, 8, 8, 4))
    with_variance = Guided(Denoiser(network, learned_variance=True), 3.0)(x_t, 5.0, SIGNAL, NOISE)
    without = Guided(Denoiser(Network()), 3.0)(x_t, 5.0, SIGNAL, NOISE)
    for estimate, expected in zip(with_variance, without, strict=True):
        np.testing.assert_allclose(array(estimate), array(expected), rtol=1e-6, atol=1e-5)


LEVELS = [
    ((1.0, 2.0), True),
    ((0.0, 1.3), False),
    ((1.4, 9.0), False),
    ((0.0, float("inf")), True),
]


@pytest.mark.parametrize(("interval", "acts"), LEVELS)
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_guidance_acts_inside_of_its_interval_alone(interval, acts, as_tensors, skips):
    x_t = draw((2, 8, 8, 4))
    ends = tuple(map(ops.convert_to_tensor, interval)) if as_tensors else interval
    conditional = Denoiser(conditional_output) if skips else None
    _, eps_hat = Guided(Denoiser(Network()), 3.0, interval=ends, conditional=conditional)(x_t, 5.0, SIGNAL, NOISE)
    expected = 8 * x_t + 15 if acts else 2 * x_t + 5
    np.testing.assert_allclose(array(eps_hat), expected, rtol=1e-5, atol=1e-5)


def test_ends_of_the_interval_belong_to_it():
    x_t = draw((1, 6))
    for interval in ((2.0, 5.0), (0.5, 2.0), (2.0, 2.0)):
        _, eps_hat = Guided(Denoiser(Network()), 3.0, interval=interval)(x_t, 0.0, 0.25, 0.5)
        np.testing.assert_allclose(array(eps_hat), 8 * x_t, rtol=1e-5)


def test_no_signal_is_the_highest_level():
    x_t = draw((1, 6))
    for interval, factor in (((1.0, 1e30), 2), ((1.0, float("inf")), 8)):
        _, v = Guided(Denoiser(Network()), 3.0, interval=interval)(x_t, 0.0, 0.0, 1.0)
        np.testing.assert_allclose(array(v), factor * x_t, rtol=1e-5)


def test_each_example_has_its_own_level():
    x_t = draw((2, 8, 8, 4))
    signal, noise = np.array([0.6, 0.8]), np.array([0.8, 0.6])
    _, eps_hat = Guided(Denoiser(Network()), 3.0, interval=(1.0, 2.0))(x_t, 0.0, signal, noise)
    np.testing.assert_allclose(array(eps_hat), np.stack([8 * x_t[0], 2 * x_t[1]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skips", [False, True])
def test_scale_rescale_interval_and_level_change_without_a_new_trace(skips):
    network = Network()

    def step(x_t, scale, rescale, low, high, signal, noise):
        conditional = Denoiser(conditional_output) if skips else None
        guided = Guided(Denoiser(network), scale, rescale=rescale, interval=(low, high), conditional=conditional)
        return guided(x_t, 5.0, signal, noise)[1]

    function, traces = compiled(step)
    x_t = draw((2, 8, 8, 4))
    for numbers in ((3.0, 0.0, 0.0, 9.0, 0.6, 0.8), (5.0, 0.7, 0.0, 9.0, 0.6, 0.8), (5.0, 0.7, 0.0, 1.0, 0.6, 0.8)):
        scale, rescale, low, high, signal, noise = numbers
        arguments = [ops.convert_to_tensor(np.float32(number)) for number in numbers]
        eps_hat = array(function(ops.convert_to_tensor(x_t), *arguments))
        expected = conditional_output(x_t, np.array([5.0, 5.0], np.float32))
        if low <= noise / signal <= high:
            expected = guide(expected, -x_t, scale, rescale)
        np.testing.assert_allclose(eps_hat, array(expected), rtol=1e-5, atol=1e-4)
    assert len(traces) == 1


def test_outside_of_the_interval_a_conditional_denoiser_saves_half():
    # In eager mode only the branch that is taken runs.
    if keras.backend.backend() == "jax":
        import jax

        context = jax.disable_jit()
    else:
        import contextlib

        context = contextlib.nullcontext()
    network = Network()
    guided = Guided(Denoiser(network), 3.0, interval=(5.0, 9.0), conditional=Denoiser(conditional_output))
    with context:
        guided(draw((2, 6)), 5.0, SIGNAL, NOISE)
    assert network.batches == []


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (1.0,), (1.0, 2.0, 3.0)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(ValueError, match="`interval` must be"):
        Guided(Denoiser(Network()), 3.0, interval=interval)


@pytest.mark.parametrize("rescale", [-0.1, 1.5])
def test_rescale_out_of_range_is_refused(rescale):
    with pytest.raises(ValueError, match=r"`rescale` must lie in 0\.\.1"):
        Guided(Denoiser(Network()), 3.0, rescale=rescale)
