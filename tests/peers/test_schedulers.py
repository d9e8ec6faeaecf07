"""The tables against diffusers' schedulers, live, with an analytic function in place of a network."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import (  # noqa: E402
    scheduling_ddpm,
    scheduling_euler_ancestral_discrete,
    scheduling_lcm,
)

from latentdiff.diffusion.samplers import make_table, per_row_noise, sample  # noqa: E402
from latentdiff.diffusion.schedule import (  # noqa: E402
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    with_zero_terminal_snr,
)

# diffusers' own business with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 3, 5)
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
CLASSES = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
# diffusers computes alphas_cumprod and its ratios in float32.
TOLERANCE = 3e-5


def network(x, t):
    """Any smooth function will do: nonlinear in x and in t, of the size of eps."""
    shift = np.linspace(-1, 1, x.size).reshape(x.shape)
    return 0.6 * np.tanh(1.3 * x + 0.4 * shift) + 0.3 * x * np.cos(t / 300) + 0.2 * np.sin(t / 150 + shift)


def noise_fn(k):
    return np.random.default_rng(100 + k).standard_normal(SHAPE)


def our_sample(table, prediction):
    def denoise(x, timestep, signal, noise):
        output = network(x, float(timestep[0]))
        if prediction == "eps":
            return (x - noise * output) / signal, output
        if prediction == "v":
            return signal * x - noise * output, noise * x + signal * output
        return output, (x - signal * output) / noise

    return sample(denoise, table, table.initial_scale * noise_fn(0), noise_fn, xp=np)


def peer_scheduler(sampler, prediction="eps", spacing="leading", **settings):
    name, own = CLASSES[sampler]
    settings = {**STABLE_DIFFUSION, **own, **settings}
    return getattr(diffusers, name)(prediction_type=PREDICTION_TYPES[prediction], timestep_spacing=spacing, **settings)


def peer_sample(scheduler, num_steps, monkeypatch, step_noise=(), **step_arguments):
    """What diffusers' pipelines do, with the given noise in place of each draw."""
    draws = iter(step_noise)
    for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete, scheduling_lcm):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(draws)))
    takes_noise = scheduler.config.get("algorithm_type") == "sde-dpmsolver++" or step_arguments.get("eta")
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(noise_fn(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(network(scaled.numpy().astype(np.float64), float(t)))
        if takes_noise:
            step_arguments["variance_noise"] = torch.from_numpy(next(draws))
        x = scheduler.step(output, t, x, **step_arguments).prev_sample
    return SimpleNamespace(x=x.numpy(), timesteps=scheduler.timesteps.numpy())


def assert_equal(table, peer, prediction="eps", tolerance=TOLERANCE):
    np.testing.assert_allclose(table.timestep[: table.num_rows], peer.timesteps, rtol=1e-5, atol=1e-3)
    ours = our_sample(table, prediction)
    assert np.abs(ours - peer.x).max() <= tolerance * np.abs(peer.x).max()


def compare(sampler, prediction, num_steps, monkeypatch, schedule=None, peer=None, tolerance=TOLERANCE, **ours):
    table = make_table(sampler, schedule or scaled_linear_schedule(), num_steps, prediction=prediction, **ours)
    scheduler = peer_scheduler(sampler, prediction, ours.get("spacing", "leading"), **(peer or {}))
    eta = {"eta": ours["eta"]} if "eta" in ours else {}
    assert_equal(
        table,
        peer_sample(scheduler, num_steps, monkeypatch, per_row_noise(table, noise_fn), **eta),
        prediction,
        tolerance,
    )


@pytest.mark.parametrize("num_steps", [1, 2, 12, 20])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", CLASSES)
def test_stable_diffusion_settings_agree_with_diffusers(sampler, prediction, num_steps, monkeypatch):
    if prediction == "x0" and sampler in ("pndm", "euler_ancestral"):
        pytest.skip("diffusers does not implement it")
    compare(sampler, prediction, num_steps, monkeypatch)


@pytest.mark.parametrize("num_steps", [10, 12])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("sampler", [s for s in CLASSES if s not in ("ddim", "pndm", "lcm")])
def test_other_spacings_agree_with_diffusers(sampler, spacing, num_steps, monkeypatch):
    compare(sampler, "eps", num_steps, monkeypatch, spacing=spacing)


@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_ddim_and_pndm_trailing_agree_with_diffusers_where_steps_divide_the_schedule(sampler, num_steps, monkeypatch):
    compare(sampler, "eps", num_steps, monkeypatch, spacing="trailing")


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_ddim_and_pndm_step_to_the_next_visited_time_where_diffusers_does_not(sampler, spacing, monkeypatch):
    """diffusers steps from t to t - T // n, whatever comes next (its issues 11347 and 12633)."""
    scheduler = peer_scheduler(sampler, spacing=spacing)
    peer = peer_sample(scheduler, 12, monkeypatch)
    table = make_table(sampler, scaled_linear_schedule(), 12, spacing=spacing)
    assert np.abs(our_sample(table, "eps") - peer.x).max() > 10 * TOLERANCE * np.abs(peer.x).max()

    alphas_cumprod = scheduler.alphas_cumprod.numpy().astype(np.float64)
    timesteps = sorted({int(t) for t in peer.timesteps}, reverse=True)
    if sampler == "pndm":
        next_signal, next_noise = np.sqrt(alphas_cumprod[timesteps[1]]), np.sqrt(1 - alphas_cumprod[timesteps[1]])
        np.testing.assert_allclose(table.matrix[0, 0, 4:6], [next_signal, next_noise], rtol=1e-5)
        return
    x = noise_fn(0)
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):  # Song et al. 2021, eq. 12
        eps_hat = network(x, t)
        x0_hat = (x - np.sqrt(1 - alphas_cumprod[t]) * eps_hat) / np.sqrt(alphas_cumprod[t])
        x = np.sqrt(alphas_cumprod[s]) * x0_hat + np.sqrt(1 - alphas_cumprod[s]) * eps_hat
    np.testing.assert_allclose(our_sample(table, "eps"), x, atol=TOLERANCE * np.abs(x).max())


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta_agrees_with_diffusers(eta, set_alpha_to_one, monkeypatch):
    settings = {"set_alpha_to_one": set_alpha_to_one}
    compare("ddim", "eps", 12, monkeypatch, eta=eta, peer=settings, **settings)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_set_alpha_to_one_agrees_with_diffusers(sampler, monkeypatch):
    compare(sampler, "eps", 12, monkeypatch, peer={"set_alpha_to_one": True}, set_alpha_to_one=True)


@pytest.mark.parametrize("num_steps", [12, 20])
@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "unipc"]
)
def test_final_sigma_min_agrees_with_diffusers(sampler, num_steps, monkeypatch):
    settings = {"final_sigmas_type": "sigma_min"}
    compare(sampler, "eps", num_steps, monkeypatch, peer=settings, **settings)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_karras_levels_of_other_samplers_agree_with_diffusers(sampler, spacing, monkeypatch):
    compare(sampler, "eps", 12, monkeypatch, peer={"use_karras_sigmas": True}, karras=True, spacing=spacing)


@pytest.mark.parametrize("settings", [{"euler_at_final": True}, {"lower_order_final": False}])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_order_of_the_last_step_agrees_with_diffusers(sampler, settings, monkeypatch):
    settings = {"final_sigmas_type": "sigma_min", **settings}
    compare(sampler, "eps", 12, monkeypatch, peer=settings, **settings)


@pytest.mark.parametrize("sampler", [s for s in CLASSES if s not in ("pndm", "heun")])
def test_zero_terminal_snr_agrees_with_diffusers(sampler, monkeypatch):
    schedule = with_zero_terminal_snr(scaled_linear_schedule())
    compare(
        sampler, "v", 10, monkeypatch, schedule, {"rescale_betas_zero_snr": True}, tolerance=1e-4, spacing="trailing"
    )


@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_other_schedules_agree_with_diffusers(name, sampler, monkeypatch):
    if name == "squaredcos_cap_v2" and sampler.endswith("karras"):
        pytest.skip("diffusers visits timestep 999 twice there, starts at the second visit, and runs out of range")
    schedule = linear_schedule() if name == "linear" else cosine_schedule()
    peer = {"beta_schedule": name, "beta_start": 1e-4, "beta_end": 0.02}
    # The cosine's last alphas_cumprod is 2e-9: float32 has few digits of it left.
    compare(sampler, "v", 12, monkeypatch, schedule, peer, tolerance=1e-4)


def test_a_thousand_steps_stay_in_range_where_diffusers_do_not(monkeypatch):
    """Offset 1 with 1000 steps asks diffusers for alphas_cumprod[1000] (its issue 10003); the offset gives way here."""
    with pytest.raises(IndexError):
        peer_sample(peer_scheduler("ddim"), 1000, monkeypatch)
    table = make_table("ddim", scaled_linear_schedule(), 1000)
    assert_equal(table, peer_sample(peer_scheduler("ddim", steps_offset=0), 1000, monkeypatch))
