"""Schedules: literals of the papers and of Stable Diffusion, and what every schedule must keep."""

import numpy as np
import pytest

from latentdiff.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    schedule_from_betas,
    with_zero_terminal_snr,
)

SCHEDULES = {
    "linear": linear_schedule(),
    "scaled_linear": scaled_linear_schedule(),
    "cosine": cosine_schedule(),
    "zero_terminal": with_zero_terminal_snr(scaled_linear_schedule()),
    "short": linear_schedule(T=3, beta_start=0.1, beta_end=0.5),
}


def test_stable_diffusion_has_its_published_levels():
    schedule = scaled_linear_schedule()
    assert schedule.T == 1000
    assert schedule.alpha_bar[1] == pytest.approx(0.99914998, abs=3e-8)  # alphas_cumprod[0]
    assert schedule.alpha_bar[1000] == pytest.approx(0.00466010, abs=1e-8)  # alphas_cumprod[999]
    assert schedule.noise_to_signal[1] == pytest.approx(0.029168, abs=1e-6)
    assert schedule.noise_to_signal[1000] == pytest.approx(14.614647, abs=2e-5)


def test_linear_schedule_is_that_of_ddpm():
    schedule = linear_schedule()
    assert schedule.alpha_bar[1] == pytest.approx(0.9999)
    assert schedule.alpha_bar[2] == pytest.approx(0.9999 * (1 - 1e-4 - 0.0199 / 999))
    assert schedule.alpha_bar[1000] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_schedule_follows_its_formula_and_cuts_beta():
    schedule = cosine_schedule()
    assert schedule.alpha_bar[500] == pytest.approx(0.49384, abs=1e-5)  # cos^2 at t = 0.5 over cos^2 at 0
    assert schedule.alpha_bar[1000] / schedule.alpha_bar[999] == pytest.approx(0.001)


def test_betas_multiply_up():
    schedule = schedule_from_betas([0.5, 0.2, 0.1])
    np.testing.assert_allclose(schedule.alpha_bar, [1, 0.5, 0.4, 0.36])
    np.testing.assert_allclose(schedule.noise**2, [0, 0.5, 0.6, 0.64])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_clean_keeps_variance_and_loses_signal(name):
    schedule = SCHEDULES[name]
    assert schedule.signal[0] == 1 and schedule.noise[0] == 0
    assert len(schedule.signal) == len(schedule.noise) == schedule.T + 1
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1, rtol=0, atol=1e-12)
    assert (np.diff(schedule.signal) < 0).all() and (np.diff(schedule.noise) > 0).all()
    assert schedule.is_variance_preserving
    assert schedule.signal.dtype == schedule.noise.dtype == np.float64


@pytest.mark.parametrize("name", SCHEDULES)
def test_snr_and_ratio_are_the_same_thing_said_twice(name):
    schedule = SCHEDULES[name]
    np.testing.assert_allclose(schedule.log_snr[1:-1], -2 * np.log(schedule.noise_to_signal[1:-1]))
    assert schedule.log_snr[0] == np.inf and schedule.noise_to_signal[0] == 0


def test_zero_terminal_snr_leaves_no_signal_and_keeps_the_first_level():
    plain = scaled_linear_schedule()
    schedule = with_zero_terminal_snr(plain)
    assert schedule.signal[-1] == 0 and schedule.noise[-1] == 1
    assert schedule.signal[1] == pytest.approx(plain.signal[1], abs=1e-15)
    assert schedule.noise_to_signal[-1] == np.inf and schedule.log_snr[-1] == -np.inf
    # Lin et al. 2024, algorithm 1: signals are shifted and scaled, so their differences keep their proportions.
    shrink = np.diff(schedule.signal[1:]) / np.diff(plain.signal[1:])
    np.testing.assert_allclose(shrink, 0.99957490 / (0.99957490 - 0.06826492), rtol=1e-6)


def test_tables_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        scaled_linear_schedule().signal[3] = 0


def test_variance_exploding_tables_fit_too():
    schedule = Schedule([1, 1, 1], [0, 0.1, 10])
    assert not schedule.is_variance_preserving
    np.testing.assert_allclose(schedule.noise_to_signal, [0, 0.1, 10])
    with pytest.raises(ValueError, match="variance-preserving"):
        with_zero_terminal_snr(schedule)


@pytest.mark.parametrize(
    "signal, noise, rule",
    [
        ([1, 0.5], [0, 0.1, 0.2], "one length"),
        ([1], [0], "one length"),
        ([1, np.nan], [0, 1], "finite"),
        ([0.9, 0.5], [0, 1], "Time 0 must be clean"),
        ([1, -0.5], [0, 1], "negative"),
        ([1, 0.5], [0, 0], "positive"),
        ([1, 0.5, 0.8], [0, 0.8, 0.5], "must not fall"),
    ],
)
def test_impossible_tables_are_refused_with_the_rule(signal, noise, rule):
    with pytest.raises(ValueError, match=rule):
        Schedule(signal, noise)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.1], [1.0, 0.1], [0.1, np.nan]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="`betas` must"):
        schedule_from_betas(betas)


@pytest.mark.parametrize("T", [0, -1, 2.5, True])
@pytest.mark.parametrize("make", [linear_schedule, scaled_linear_schedule, cosine_schedule])
def test_impossible_lengths_are_refused(make, T):
    with pytest.raises(ValueError, match="`T` must be a whole number"):
        make(T)
