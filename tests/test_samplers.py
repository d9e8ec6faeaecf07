"""Samplers: exact denoisers of simple data go in, and the data must come out."""

from statistics import NormalDist

import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.samplers import (
    SAMPLERS,
    initial_state,
    make_table,
    per_row_noise,
    sample,
    step,
)
from latentdiff.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    with_zero_terminal_snr,
)

STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm")
SECOND_ORDER = ("pndm", "heun", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "dpmpp_2m_sde", "dpmpp_2m_sde_karras")
SHAPES = [(2, 32, 32, 3), (3, 8, 8, 4), (2, 16000), (2, 64, 128)]
MEAN, VARIANCE = 0.7, 0.09


def gaussian_denoiser(mean=MEAN, variance=VARIANCE, consistent=False):
    """The exact denoiser of data from N(mean, variance): the mean of x0 given x_t.

    LCM's network answers another question, and `consistent` is the exact answer to it: where the probability flow ODE
    ends that passes through x_t.
    """

    def denoise(x, timestep, signal, noise):
        variance_t = signal**2 * variance + noise**2
        gain = (variance / variance_t) ** 0.5 if consistent else signal * variance / variance_t
        x0_hat = mean + gain * (x - signal * mean)
        return x0_hat, (x - signal * x0_hat) / noise

    return denoise


def propagate(table, mean=MEAN, variance=VARIANCE):
    """Mean and variance of what a table makes of N(0, 1) with the exact denoiser, without drawing anything.

    The denoiser is affine, so each row maps the state's mean and covariance exactly.
    """
    denoise = gaussian_denoiser(mean, variance, consistent=table.sampler == "lcm")
    state_mean, covariance = np.zeros(4), np.zeros((4, 4))
    covariance[0, 0] = table.initial_scale**2
    for i in range(table.num_rows):
        offset = np.array(denoise(0.0, None, table.signal[i], table.noise[i]))
        gain = np.array(denoise(1.0, None, table.signal[i], table.noise[i])) - offset
        outputs = np.zeros((7, 4))
        outputs[:4] = np.eye(4)
        outputs[4:6, 0] = gain
        linear = table.matrix[i] @ outputs
        state_mean = linear @ state_mean + table.matrix[i][:, 4:6] @ offset
        covariance = linear @ covariance @ linear.T + np.outer(table.matrix[i][:, 6], table.matrix[i][:, 6])
    return state_mean[0], covariance[0, 0]


def normals(shape, seed=0):
    return lambda k: np.random.default_rng((seed, k)).standard_normal(shape)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "lcm"])
def test_gaussian_data_keeps_its_mean_and_variance(sampler, spacing):
    """Ho's and Euler's samplers come as 1 / steps, the second-order ones sooner."""
    error = {}
    for num_steps in (50, 1000):
        mean, variance = propagate(make_table(sampler, linear_schedule(), num_steps, spacing=spacing))
        assert mean == pytest.approx(MEAN, abs=0.005)
        error[num_steps] = abs(variance / VARIANCE - 1)
    assert error[1000] < (0.002 if sampler in SECOND_ORDER else 0.03)
    assert error[50] < (0.06 if sampler in SECOND_ORDER else 0.32)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_lcm_with_the_exact_consistency_function_is_exact_in_any_number_of_steps(num_steps):
    mean, variance = propagate(make_table("lcm", linear_schedule(), num_steps))
    assert mean == pytest.approx(MEAN, abs=0.005)
    assert variance == pytest.approx(VARIANCE, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_every_shape_have_the_propagated_mean_and_variance(sampler, shape):
    table = make_table(sampler, linear_schedule(), 8)
    noise_fn = normals(shape)
    x_init = ops.convert_to_tensor((table.initial_scale * noise_fn(0)).astype("float32"))
    drawn = sample(
        gaussian_denoiser(consistent=sampler == "lcm"),
        table,
        x_init,
        lambda k: ops.convert_to_tensor(noise_fn(k).astype("float32")),
    )
    drawn = ops.convert_to_numpy(drawn)
    assert drawn.shape == shape and drawn.dtype == np.float32
    mean, variance = propagate(table)
    count = np.prod(shape)
    assert drawn.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / count))
    assert drawn.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / count))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_on_the_backend_agrees_with_float64_in_numpy(sampler):
    shape = (2, 8, 8, 4)
    table = make_table(sampler, scaled_linear_schedule(), 12, spacing="trailing")
    noise_fn, denoise = normals(shape), gaussian_denoiser(consistent=sampler == "lcm")
    x_init = table.initial_scale * noise_fn(0)
    exact = sample(denoise, table, x_init, noise_fn, xp=np)
    single = sample(denoise, table, ops.cast(x_init, "float32"), lambda k: ops.cast(noise_fn(k), "float32"))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(ops.convert_to_numpy(single), exact, atol=1e-5)


WEIGHTS, CENTRES, WIDTH = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), 0.2


def mixture_denoiser(x, timestep, signal, noise):
    """The exact denoiser of 0.3 N(-1, 0.2^2) + 0.7 N(1.5, 0.2^2)."""
    variance_t = signal**2 * WIDTH**2 + noise**2
    offset = x[..., None] - signal * CENTRES
    log_weight = np.log(WEIGHTS) - offset**2 / (2 * variance_t)
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    x0_hat = (weight * (CENTRES + signal * WIDTH**2 / variance_t * offset)).sum(-1)
    return x0_hat, (x - signal * x0_hat) / noise


def mixture_consistency(x, timestep, signal, noise):
    """Where the probability flow takes x: in one dimension, to the same quantile of the data."""
    grid = np.linspace(-6, 6, 2001)

    def quantiles(signal, noise):
        width = np.sqrt(signal**2 * WIDTH**2 + noise**2)
        density = (WEIGHTS / width * np.exp(-(((grid[:, None] - signal * CENTRES) / width) ** 2) / 2)).sum(-1)
        return np.cumsum(density) / density.sum()

    x0_hat = np.interp(np.interp(x, grid, quantiles(signal, noise)), quantiles(1, 0), grid)
    return x0_hat, (x - signal * x0_hat) / noise


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_modes_of_a_mixture_keep_their_weights(sampler):
    count = 4000
    table = make_table(sampler, linear_schedule(), 4 if sampler == "lcm" else 60, spacing="trailing")
    quantiles = NormalDist()
    x_init = np.array([quantiles.inv_cdf((i + 0.5) / count) for i in range(count)]) * table.initial_scale
    denoise = mixture_consistency if sampler == "lcm" else mixture_denoiser
    drawn = sample(denoise, table, x_init, normals((count,)), xp=np)
    # Four standard errors of a draw; the deterministic ones start from evenly spaced quantiles.
    tolerance = 4 * np.sqrt(0.3 * 0.7 / count) if sampler in STOCHASTIC else 0.006
    assert (drawn < 0.25).mean() == pytest.approx(0.3, abs=tolerance)
    assert (np.abs(drawn[:, None] - CENTRES).min(-1) < 5 * WIDTH).all()


def smooth_schedule(T=4096):
    """A schedule in whose time the ratio of noise to signal is smooth down to its end, so that orders show."""
    ratio = np.linspace(0.1 ** (1 / 7), 20 ** (1 / 7), T) ** 7
    return Schedule(np.r_[1, 1 / np.sqrt(1 + ratio**2)], np.r_[0, ratio / np.sqrt(1 + ratio**2)])


def error_before_the_last_step(sampler, num_steps, **settings):
    """Distance from the exact solution of the probability flow ODE (the last step, to x0, does not shrink)."""
    table = make_table(sampler, smooth_schedule(), num_steps, steps_offset=0, **settings)
    denoise = gaussian_denoiser()
    x_init = np.full((1,), 1.3)
    state = initial_state(x_init, np)
    for i in range(table.num_rows - 1):
        x0_hat, eps_hat = denoise(state[0], None, table.signal[i], table.noise[i])
        state = step(table.matrix[i], state, x0_hat, eps_hat, xp=np)
    t, s = 0, table.num_rows - 1
    variance_t, variance_s = (table.signal[i] ** 2 * VARIANCE + table.noise[i] ** 2 for i in (t, s))
    exact = table.signal[s] * MEAN + np.sqrt(variance_s / variance_t) * (x_init - table.signal[t] * MEAN)
    return abs(state[0, 0] - exact[0])


@pytest.mark.parametrize(
    "sampler, settings, order",
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("pndm", {}, 2),
        ("pndm", {"prediction": "v"}, 1),  # as in diffusers; see pndm_rows
        ("heun", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_karras", {}, 2),
        ("unipc", {}, 3),  # the corrector adds one to the predictor's 2
    ],
)
def test_deterministic_samplers_converge_at_their_order(sampler, settings, order):
    fewer = sampler.startswith(("dpmpp", "unipc"))  # they divide by num_steps + 1
    errors = [error_before_the_last_step(sampler, num_steps - fewer, **settings) for num_steps in (128, 256)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_with_eta_one_is_ddpm(spacing):
    schedule, shape = scaled_linear_schedule(), (3, 5)
    settings = {"spacing": spacing, "num_steps": 12}
    ddim = make_table("ddim", schedule, eta=1.0, set_alpha_to_one=True, **settings)
    ddpm = make_table("ddpm", schedule, **settings)
    noise_fn = normals(shape)
    drawn = [sample(gaussian_denoiser(), table, noise_fn(0), noise_fn, xp=np) for table in (ddim, ddpm)]
    np.testing.assert_allclose(*drawn, atol=1e-12)


@pytest.mark.parametrize("sampler, eta", [("euler", 0.0), ("euler_ancestral", 1.0)])
def test_euler_is_ddim_and_euler_ancestral_is_ddim_with_eta_one(sampler, eta):
    schedule = scaled_linear_schedule()
    ddim = make_table("ddim", schedule, 12, eta=eta, set_alpha_to_one=True)
    np.testing.assert_allclose(make_table(sampler, schedule, 12).matrix, ddim.matrix, atol=1e-12)


@pytest.mark.parametrize("sampler, eta", [("dpmpp_2m", 0.0), ("unipc", 0.0), ("dpmpp_2m_sde", 1.0)])
def test_multistep_solvers_begin_with_a_step_of_ddim_or_ddpm(sampler, eta):
    schedule = scaled_linear_schedule()
    table = make_table(sampler, schedule, 12)
    t, s = (int(k) + 1 for k in table.timestep[:2])
    x, fresh_noise = np.array([1.3, -0.4]), np.array([0.2, 0.9])
    x0_hat, eps_hat = gaussian_denoiser()(x, None, schedule.signal[t], schedule.noise[t])
    x_s = step(table.matrix[0], initial_state(x, np), x0_hat, eps_hat, fresh_noise, np)[0]
    # Song et al. 2021, eqs. 12 and 16.
    sigma = eta * schedule.noise[s] / schedule.noise[t] * np.sqrt(1 - schedule.alpha_bar[t] / schedule.alpha_bar[s])
    direction = np.sqrt(schedule.noise[s] ** 2 - sigma**2)
    expected = schedule.signal[s] * x0_hat + direction * eps_hat + sigma * fresh_noise
    np.testing.assert_allclose(x_s, expected, atol=1e-12)


def test_stable_diffusion_visits_its_published_timesteps():
    schedule = scaled_linear_schedule()
    for sampler in ("ddpm", "ddim", "euler", "euler_ancestral"):
        table = make_table(sampler, schedule, 20)
        assert table.timestep[:20].tolist() == list(range(951, 0, -50))
    pndm = make_table("pndm", schedule, 20)
    assert pndm.num_rows == 21
    assert pndm.timestep[:21].tolist() == [951, 901, *range(901, 0, -50)]
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        assert make_table(sampler, schedule, 20).timestep[:20].tolist() == list(range(941, 47, -47))
    heun = make_table("heun", schedule, 20)
    assert heun.num_rows == 39
    assert heun.timestep[:4].tolist() == [951, 901, 901, 851]
    lcm = make_table("lcm", schedule, 4)
    assert lcm.timestep[:4].tolist() == [999, 759, 499, 259]


def test_timesteps_of_the_other_spacings():
    schedule = scaled_linear_schedule()
    assert make_table("ddim", schedule, 4, spacing="trailing").timestep[:4].tolist() == [999, 749, 499, 249]
    assert make_table("ddim", schedule, 4, spacing="linspace").timestep[:4].tolist() == [999, 666, 333, 0]
    assert make_table("euler", schedule, 5, spacing="linspace").timestep[:5].tolist() == [999, 749.25, 499.5, 249.75, 0]
    assert make_table("dpmpp_2m", schedule, 4, spacing="linspace").timestep[:4].tolist() == [999, 749, 500, 250]


def test_initial_scale_is_that_of_diffusers_in_our_coordinates():
    schedule = scaled_linear_schedule()
    euler = make_table("euler", schedule, 20)
    assert euler.initial_scale == 1
    assert euler.initial_scale / euler.signal[0] == pytest.approx(11.0736, abs=1e-4)
    trailing = make_table("euler", schedule, 20, spacing="trailing")
    assert trailing.initial_scale / trailing.signal[0] == pytest.approx(14.614647, abs=2e-5)
    assert make_table("ddim", schedule, 20, spacing="trailing").initial_scale == 1


def test_karras_levels_span_the_schedule():
    table = make_table("dpmpp_2m_karras", scaled_linear_schedule(), 20)
    ratio = table.noise[:20] / table.signal[:20]
    assert ratio[0] == pytest.approx(14.614647, abs=2e-5)
    assert ratio[-1] == pytest.approx(0.029168, abs=1e-6)
    np.testing.assert_allclose(np.diff(ratio ** (1 / 7)), np.diff(ratio ** (1 / 7))[0])
    assert table.timestep[0] == 999 and table.timestep[19] == 0


def test_stable_diffusion_ends_at_the_first_level_unless_told_to_end_clean():
    schedule = scaled_linear_schedule()
    for sampler in ("ddim", "pndm"):
        last = make_table(sampler, schedule, 1).matrix[0, 0]
        assert last[4] ** 2 == pytest.approx(0.99914998, abs=3e-8)
        clean = make_table(sampler, schedule, 1, set_alpha_to_one=True).matrix[0, 0]
        np.testing.assert_allclose(clean[4:6], [1, 0])
    for sampler in ("dpmpp_2m", "unipc"):
        last = make_table(sampler, schedule, 1, final_sigmas_type="sigma_min").matrix[0, 0]
        assert last[0] * make_table(sampler, schedule, 1).noise[0] == pytest.approx(np.sqrt(1 - 0.99914998), abs=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 999, 1000])
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "lcm"])
def test_every_number_of_steps_stays_in_range_and_descends(sampler, num_steps):
    """1000 steps with offset 1 run out of range in diffusers (its issue 10003)."""
    for spacing in ("leading", "trailing", "linspace"):
        table = make_table(sampler, scaled_linear_schedule(), num_steps, spacing=spacing)
        timestep = table.timestep[: table.num_rows]
        assert timestep.min() >= 0 and timestep.max() <= 999
        assert (np.diff(timestep) <= 0).all()
        assert len(np.unique(timestep)) == num_steps or sampler.endswith("karras")  # those round
        assert np.isfinite(table.matrix).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [scaled_linear_schedule(), cosine_schedule()])
def test_zero_terminal_snr_starts_from_noise_alone_without_nan(sampler, schedule):
    table = make_table(sampler, with_zero_terminal_snr(schedule), 20, spacing="trailing", prediction="v")
    assert table.timestep[0] == 999
    assert table.signal[0] < 1e-3
    assert np.isfinite(table.matrix).all()
    mean, variance = propagate(table)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert variance == pytest.approx(VARIANCE, rel=0.6)


def test_pndm_of_eps_survives_a_start_without_signal():
    table = make_table("pndm", with_zero_terminal_snr(scaled_linear_schedule()), 20, spacing="trailing")
    assert table.signal[0] == 0 and np.isfinite(table.matrix).all()
    assert propagate(table)[0] == pytest.approx(MEAN, abs=0.01)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_tables_have_one_shape_and_padding_changes_nothing(sampler):
    schedule = linear_schedule(T=50, beta_start=0.002, beta_end=0.3)
    for num_steps in (1, 7, 50):
        table = make_table(sampler, schedule, num_steps)
        assert table.matrix.shape == (128, 4, 7)
        assert table.timestep.shape == table.signal.shape == table.noise.shape == table.input_scale.shape == (128,)
        assert (table.matrix[table.num_rows :] == np.eye(4, 7)).all()
        np.testing.assert_array_equal(table.noise[table.num_rows :], table.noise[table.num_rows - 1])
    state = np.random.default_rng(0).standard_normal((4, 2, 3))
    np.testing.assert_array_equal(step(table.matrix[-1], state, state[1], state[2], state[3], np), state)


def test_timesteps_are_float32_and_coefficients_float64():
    table = make_table("euler", scaled_linear_schedule(), 7, spacing="linspace")
    assert table.timestep.dtype == np.float32
    assert table.matrix.dtype == table.signal.dtype == table.noise.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        table.matrix[0] = 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_stochastic_samplers_need_noise(sampler):
    table = make_table(sampler, scaled_linear_schedule(), 5)
    assert table.needs_noise == (sampler in STOCHASTIC)
    assert make_table("ddim", scaled_linear_schedule(), 5, eta=0.5).needs_noise
    if sampler in STOCHASTIC:
        with pytest.raises(ValueError, match="needs fresh noise"):
            sample(gaussian_denoiser(), table, np.zeros((1, 2)), xp=np)


def test_noise_is_consumed_row_by_row_from_one():
    table = make_table("ddpm", scaled_linear_schedule(), 5)
    asked = []
    noises = per_row_noise(table, lambda k: asked.append(k) or np.full((2, 3), float(k)))
    assert asked == [1, 2, 3, 4, 5]
    taken = []
    sample(gaussian_denoiser(), table, np.zeros((2, 3)), lambda k: taken.append(k) or noises[k - 1], xp=np)
    assert taken == asked


def test_network_is_told_a_float32_timestep_for_each_image():
    table = make_table("ddim", scaled_linear_schedule(), 3)
    told = []

    def denoise(x, timestep, signal, noise):
        told.append((tuple(timestep.shape), ops.convert_to_numpy(timestep)[0]))
        return gaussian_denoiser()(x, timestep, signal, noise)

    sample(denoise, table, ops.zeros((5, 2, 2, 4)))
    assert told == [((5,), 667.0), ((5,), 334.0), ((5,), 1.0)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampler": "dpmpp_2m_karas"}, "`sampler` must be one of .* Did you mean dpmpp_2m_karras"),
        ({"sampler": "eular"}, "Did you mean euler"),
        ({"num_steps": 0}, r"`num_steps` must be a whole number from 1 to T=1000.* Received: num_steps=0\."),
        ({"num_steps": 1001}, "Received: num_steps=1001"),
        ({"num_steps": 2.0}, "`num_steps` must be a whole number"),
        ({"num_steps": True}, "`num_steps` must be a whole number"),
        ({"sampler": "lcm", "num_steps": 51}, "`num_steps` of lcm must be at most `original_steps`"),
        ({"spacing": "trailling"}, "Did you mean trailing"),
        ({"prediction": "epsilon"}, "`prediction` must be one of eps, v, x0"),
        ({"final_sigmas_type": "none"}, "`final_sigmas_type` must be one of zero, sigma_min"),
        ({"steps_offset": -1}, "`steps_offset` must be a whole number, at least 0"),
        ({"eta": 1.5}, "`eta` must be from 0"),
        ({"sampler": "pndm", "eta": 0.5}, "`eta` belongs to the sampler ddim alone"),
        ({"karras": True}, "Karras' noise levels are for"),
        ({"bound": 3}, "`bound` must be at least the number of rows"),
        ({"schedule": Schedule([1, 1, 1], [0, 0.1, 10]), "num_steps": 2}, "variance-preserving schedule"),
    ],
)
def test_bad_arguments_are_refused_with_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_table(**{"sampler": "ddim", "schedule": scaled_linear_schedule(), "num_steps": 20, **arguments})
