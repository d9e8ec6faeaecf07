"""Laws of the forward process: Bayes' rule, the chain, the conversions, and the loss."""

import keras
import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.process import GaussianDiffusion, per_example
from latentdiff.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    with_zero_terminal_snr,
)

SHAPES = [(3, 32, 32, 3), (3, 8, 8, 4), (3, 16000), (3, 64, 128)]
SCHEDULES = {
    "linear": linear_schedule(),
    "scaled_linear": scaled_linear_schedule(),
    "cosine": cosine_schedule(),
    "zero_terminal_snr": with_zero_terminal_snr(scaled_linear_schedule()),
    "variance_exploding": Schedule(np.ones(101), np.concatenate([[0], np.geomspace(0.01, 50, 100)])),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compiled(function):
    """The function as the backend of this process compiles it."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_is_signal_times_x0_plus_noise_times_eps(shape):
    process = GaussianDiffusion(linear_schedule())
    x0, eps = draw(shape), draw(shape, 1)
    x_t = array(process.q_sample(x0, np.array([1, 500, 1000]), eps))
    # alpha_bar of Ho's schedule, from its betas in decimal arithmetic.
    for i, alpha_bar in enumerate((0.9999, 0.0785872429, 4.03582977e-5)):
        expected = np.sqrt(alpha_bar) * x0[i] + np.sqrt(1 - alpha_bar) * eps[i]
        np.testing.assert_allclose(x_t[i], expected, rtol=1e-5, atol=2e-6)


def test_time_may_be_a_scalar_a_vector_or_a_tensor():
    process = GaussianDiffusion(linear_schedule())
    x0, eps = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    expected = array(process.q_sample(x0, np.array([7, 7]), eps))
    for t in (7, np.int64(7), np.array(7), ops.convert_to_tensor([7, 7]), ops.convert_to_tensor(7)):
        np.testing.assert_array_equal(array(process.q_sample(x0, t, eps)), expected)


def test_time_may_be_a_list():
    process = GaussianDiffusion(linear_schedule())
    x0, x_t = draw((2, 5)), draw((2, 5), 1)
    for ours, expected in zip(
        process.q_posterior(x0, x_t, [3, 700]), process.q_posterior(x0, x_t, np.array([3, 700])), strict=True
    ):
        np.testing.assert_array_equal(array(ours), array(expected))


def test_half_precision_data_is_computed_in_float32():
    process = GaussianDiffusion(linear_schedule())
    x0, eps = ops.cast(draw((2, 9)), "bfloat16"), ops.cast(draw((2, 9), 1), "bfloat16")
    x_t = process.q_sample(x0, 3, eps)
    assert keras.backend.standardize_dtype(x_t.dtype) == "float32"
    expected = process.q_sample(ops.cast(x0, "float32"), 3, ops.cast(eps, "float32"))
    np.testing.assert_array_equal(array(x_t), array(expected))


def times(schedule, count=3):
    """Early, middle and last pairs s < t, neighbours and far apart."""
    T = schedule.T
    return [(2, 1), (T // 2, T // 2 - 1), (T, T - 1), (T, 1), (T // 2, T // 10), (1, 0), (T, 0)]


def bayes_rule(schedule, x0, x_t, t, s):
    """Mean and variance of q(x_s | x_t, x0), by integrating q(x_t | x_s) q(x_s | x0) over a grid of x_s."""
    signal, noise = schedule.signal, schedule.noise
    gain = signal[t] / signal[s]
    step_variance = noise[t] ** 2 - gain**2 * noise[s] ** 2
    precision = 1 / noise[s] ** 2 + gain**2 / step_variance
    # Any grid wide and fine enough would do; this one follows the peak of the product.
    peak = (signal[s] * x0 / noise[s] ** 2 + gain * x_t / step_variance) / precision
    x_s = peak + np.linspace(-12, 12, 4001) / np.sqrt(precision)
    log_density = -0.5 * (x_s - signal[s] * x0) ** 2 / noise[s] ** 2 - 0.5 * (x_t - gain * x_s) ** 2 / step_variance
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * x_s).sum()
    return mean, (density * (x_s - mean) ** 2).sum()


def test_posterior_agrees_with_bayes_rule(schedule):
    process = GaussianDiffusion(schedule, "v")
    for t, s in times(schedule):
        for x0, x_t in ((0.3, -0.8), (-1.0, 2.0)):
            mean, variance, log_variance = process.q_posterior(np.full((1, 2), x0), np.full((1, 2), x_t), t, s)
            assert array(variance).size == 1
            if s == 0:
                np.testing.assert_allclose(array(mean), x0, rtol=1e-6)
                assert array(variance).item() == 0
                continue
            expected_mean, expected_variance = bayes_rule(schedule, x0, x_t, t, s)
            np.testing.assert_allclose(array(mean), expected_mean, rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(array(variance).item(), expected_variance, rtol=1e-5)
            np.testing.assert_allclose(array(log_variance).item(), np.log(expected_variance), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_posterior_is_that_of_ho(shape):
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    t = np.array([2, 400, 1000])
    beta, now, before = betas[t - 1], alpha_bar[t - 1], alpha_bar[t - 2]
    x0, x_t = draw(shape), draw(shape, 1)
    mean, variance, log_variance = GaussianDiffusion(linear_schedule()).q_posterior(x0, x_t, t)
    column = (3,) + (1,) * (len(shape) - 1)
    expected = (np.sqrt(before) * beta / (1 - now)).reshape(column) * x0
    expected = expected + (np.sqrt(1 - beta) * (1 - before) / (1 - now)).reshape(column) * x_t
    np.testing.assert_allclose(array(mean), expected, rtol=1e-5, atol=2e-6)
    assert array(variance).shape == array(log_variance).shape == column
    np.testing.assert_allclose(array(variance).ravel(), (1 - before) / (1 - now) * beta, rtol=1e-5)


def test_posterior_over_many_steps_is_the_chain_of_single_steps(schedule):
    process = GaussianDiffusion(schedule, "v")
    x0, t, s = 0.7, schedule.T, schedule.T - 9
    # x_s = offset + gain x_t + noise of this variance, one step after the other, in float64 from the float32 steps.
    offset, gain, variance = 0.0, 1.0, 0.0
    for time in range(t, s, -1):
        at_zero, step_variance, _ = process.q_posterior(np.full((1, 1), x0), np.zeros((1, 1)), time)
        at_one, _, _ = process.q_posterior(np.full((1, 1), x0), np.ones((1, 1)), time)
        at_zero, at_one = array(at_zero).item(), array(at_one).item()
        step_gain = at_one - at_zero
        offset = at_zero + step_gain * offset
        gain = step_gain * gain
        variance = step_gain**2 * variance + array(step_variance).item()
    for x_t in (-1.0, 2.0):
        mean, many, _ = process.q_posterior(np.full((1, 1), x0), np.full((1, 1), x_t), t, s)
        np.testing.assert_allclose(array(mean).item(), offset + gain * x_t, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(many).item(), variance, rtol=1e-4)


def test_posterior_in_a_trace_is_that_outside(schedule):
    process = GaussianDiffusion(schedule, "v")
    t, s = (np.array(values, dtype=np.int32) for values in zip(*times(schedule), strict=True))
    x0, x_t = draw((len(t), 5)), draw((len(t), 5), 1)
    inside = compiled(process.q_posterior)(*map(ops.convert_to_tensor, (x0, x_t, t, s)))
    for traced, expected in zip(inside, process.q_posterior(x0, x_t, t, s), strict=True):
        np.testing.assert_allclose(array(traced), array(expected), rtol=1e-5, atol=1e-6)
    by_default = compiled(process.q_posterior)(*map(ops.convert_to_tensor, (x0, x_t, t)))
    for traced, expected in zip(by_default, process.q_posterior(x0, x_t, t), strict=True):
        np.testing.assert_allclose(array(traced), array(expected), rtol=1e-5, atol=1e-6)


def test_log_variance_of_the_last_step_is_that_of_the_step_before():
    process = GaussianDiffusion(linear_schedule())
    x = draw((2, 4))
    _, variance, log_variance = process.q_posterior(x, x, np.array([1, 2]))
    assert array(variance)[0] == 0
    # beta_2 (1 - alpha_bar_1) / (1 - alpha_bar_2) with beta_1 = 1e-4, beta_2 = 1.1991992e-4.
    np.testing.assert_allclose(array(log_variance).ravel(), np.log(5.45318766e-5), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_x0_eps_and_v_come_back_from_each_other(shape, schedule):
    process = GaussianDiffusion(schedule, "v")
    x0, eps = draw(shape), draw(shape, 1)
    t = np.array([1, schedule.T // 2, schedule.T - 1])
    x_t = process.q_sample(x0, t, eps)
    v = process.v_from_x0_eps(x0, eps, t)
    # Rounding of x_t is divided by what the answer counts for in it.
    signal = schedule.signal[t].reshape((3,) + (1,) * (len(shape) - 1))
    noise = schedule.noise[t].reshape(signal.shape)
    size = 6 * 2.0**-23 * (np.abs(array(x_t)) + 10 * noise + 10)
    assert (np.abs(array(process.x0_from_eps(x_t, t, eps)) - x0) <= size / signal).all()
    assert (np.abs(array(process.eps_from_x0(x_t, t, x0)) - eps) <= size / noise).all()
    assert (np.abs(array(process.x0_from_v(x_t, t, v)) - x0) <= size).all()
    assert (np.abs(array(process.eps_from_v(x_t, t, v)) - eps) <= size / np.minimum(1, np.hypot(signal, noise))).all()


def test_v_is_the_derivative_of_x_t_by_the_angle():
    # signal = cos(angle), noise = sin(angle): Salimans and Ho 2022, appendix D.
    angle = np.pi / 3
    process = GaussianDiffusion(Schedule([1, np.cos(angle)], [0, np.sin(angle)]), "v")
    x0, eps = draw((2, 6)).astype(np.float64), draw((2, 6), 1).astype(np.float64)
    h = 1e-6
    derivative = (np.cos(angle + h) - np.cos(angle - h)) * x0 + (np.sin(angle + h) - np.sin(angle - h)) * eps
    np.testing.assert_allclose(array(process.v_from_x0_eps(x0, eps, 1)), derivative / (2 * h), rtol=1e-5, atol=1e-6)


def test_zero_terminal_snr_keeps_every_conversion_finite():
    process = GaussianDiffusion(SCHEDULES["zero_terminal_snr"], "v")
    x0, eps = draw((2, 5)), draw((2, 5), 1)
    T = process.schedule.T
    x_t = process.q_sample(x0, T, eps)
    v = process.v_from_x0_eps(x0, eps, T)
    np.testing.assert_array_equal(array(x_t), eps)
    np.testing.assert_array_equal(array(v), -x0)
    np.testing.assert_allclose(array(process.x0_from_v(x_t, T, v)), x0, rtol=1e-6)
    np.testing.assert_allclose(array(process.eps_from_v(x_t, T, v)), eps, rtol=1e-6)
    np.testing.assert_array_equal(array(process.x0_from_eps(x_t, T, eps)), np.zeros((2, 5)))
    np.testing.assert_allclose(array(process.eps_from_x0(x_t, T, x0)), eps, rtol=1e-6)


def test_target_is_what_the_network_predicts():
    x0, eps = draw((2, 8, 8, 4)), draw((2, 8, 8, 4), 1)
    for prediction, expected in (("eps", eps), ("x0", x0), ("v", np.sqrt(0.75) * eps - 0.5 * x0)):
        process = GaussianDiffusion(Schedule([1, np.sqrt(0.75)], [0, 0.5]), prediction)
        np.testing.assert_allclose(array(process.target(x0, eps, 1)), expected, rtol=1e-6, atol=1e-6)


def test_min_snr_weights_are_those_of_hang():
    # snr 9 at t = 1, 3 at t = 2, 0 or 1/3 at t = 3.
    alpha_bar = np.array([1, 0.9, 0.75, 0])
    schedule = Schedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    alpha_bar = np.array([1, 0.9, 0.75, 0.25])
    ends_with_signal = Schedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    t = np.array([1, 2, 3])
    for prediction, of, expected in (
        ("eps", ends_with_signal, [5 / 9, 1, 1]),
        ("v", schedule, [5 / 10, 3 / 4, 0]),
        ("x0", schedule, [5, 3, 0]),
    ):
        process = GaussianDiffusion(of, prediction)
        np.testing.assert_allclose(array(process.loss_weight(t, "min_snr")), expected, rtol=1e-6)
        np.testing.assert_array_equal(array(process.loss_weight(t)), [1, 1, 1])
        np.testing.assert_array_equal(
            array(process.loss_weight(ops.convert_to_tensor(t), "min_snr")), array(process.loss_weight(t, "min_snr"))
        )
    weights = array(GaussianDiffusion(schedule, "x0").loss_weight(t, "min_snr", gamma=2.0))
    np.testing.assert_allclose(weights, [2, 2, 0], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction):
    # An error in x0 alone, at fixed x_t, costs min(snr, gamma) of its square whatever the network predicts.
    schedule = linear_schedule()
    process = GaussianDiffusion(schedule, prediction)
    t = np.array([1, 200, 900])
    x0, eps, error = draw((3, 20)), draw((3, 20), 1), 0.01 * draw((3, 20), 2)
    x_t = process.q_sample(x0, t, eps)
    output = process.target(x0 + error, process.eps_from_x0(x_t, t, x0 + error), t)
    weight = process.loss_weight(t, "min_snr")
    expected = np.minimum(schedule.signal[t] ** 2 / schedule.noise[t] ** 2, 5) * (error**2).mean(axis=1)
    np.testing.assert_allclose(array(process.loss(output, x0, eps, t, weight)), expected, rtol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_loss_is_the_weighted_mean_square_of_each_example(shape, prediction):
    process = GaussianDiffusion(linear_schedule(), prediction)
    x0, eps, t = draw(shape), draw(shape, 1), np.array([1, 500, 1000])
    target = array(process.target(x0, eps, t))
    offset = np.array([0.5, 1.0, 2.0]).reshape((3,) + (1,) * (len(shape) - 1))
    np.testing.assert_allclose(array(process.loss(target + offset, x0, eps, t)), [0.25, 1.0, 4.0], rtol=1e-5)
    weighted = process.loss(target + offset, x0, eps, t, np.array([4.0, 1.0, 0.5]))
    np.testing.assert_allclose(array(weighted), [1.0, 1.0, 2.0], rtol=1e-5)
    np.testing.assert_array_equal(array(process.loss(target, x0, eps, t)), [0, 0, 0])


def test_loss_of_a_half_precision_output_is_float32():
    process = GaussianDiffusion(linear_schedule())
    loss = process.loss(ops.cast(draw((2, 9)), "bfloat16"), draw((2, 9)), draw((2, 9), 1), 3)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"


def test_one_value_for_each_example_broadcasts_over_the_rest():
    like = ops.zeros((2, 3, 4))
    assert tuple(per_example(np.array([1.0, 2.0]), like).shape) == (2, 1, 1)
    assert tuple(per_example(0.5, like).shape) == ()
    assert tuple(per_example(np.ones((2, 1, 1)), like).shape) == (2, 1, 1)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="`prediction` must be one of eps, v, x0. Received: 'epsilon'"):
        GaussianDiffusion(linear_schedule(), "epsilon")


def test_eps_is_refused_where_it_says_nothing_about_the_data():
    schedule = SCHEDULES["zero_terminal_snr"]
    with pytest.raises(ValueError, match='`prediction` must be "v" or "x0".* Received: prediction=\'eps\''):
        GaussianDiffusion(schedule)
    for prediction in ("v", "x0"):
        assert GaussianDiffusion(schedule, prediction).prediction == prediction


def test_unknown_loss_weight_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of uniform, min_snr. Received: 'snr'"):
        GaussianDiffusion(linear_schedule()).loss_weight(1, "snr")


@pytest.mark.parametrize("t", [-1, 1001, np.array([1, 1001]), np.array([5, -1])])
def test_a_time_out_of_range_is_refused(t):
    process = GaussianDiffusion(linear_schedule())
    with pytest.raises(ValueError, match=r"Times must lie in 0 \.\. 1000"):
        process.q_sample(np.zeros((2, 3)), t, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"Times must lie in 1 \.\. 1000"):
        process.loss_weight(t)


def test_a_time_that_is_no_integer_is_refused():
    with pytest.raises(ValueError, match="Times must be integers"):
        GaussianDiffusion(linear_schedule()).q_sample(np.zeros((2, 3)), np.array([0.5, 1]), np.zeros((2, 3)))


def test_a_posterior_at_a_later_time_is_refused():
    x = np.zeros((2, 3))
    process = GaussianDiffusion(linear_schedule())
    with pytest.raises(ValueError, match="`s` must be before `t`"):
        process.q_posterior(x, x, np.array([5, 5]), np.array([4, 5]))
    with pytest.raises(ValueError, match=r"Times must lie in 1 \.\. 1000"):
        process.q_posterior(x, x, 0)
