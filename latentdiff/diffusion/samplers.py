"""Samplers as tables: each row is a linear map from the state, x0_hat, eps_hat and fresh noise to the next state.

Every sampler here is state_s = M [state_t, x0_hat(x_t), eps_hat(x_t), z], with a matrix M that depends on the schedule
alone (DDIM: Song et al. 2021, eq. 12, arXiv:2010.02502; the others are cited where their rows are made). NumPy makes
the table once, in float64; one `step` reads a row of it, whichever the sampler. So a compiled function that takes the
table as an argument serves every sampler and every number of steps.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from latentdiff.diffusion.sampler_multistep import dpmpp_2m_rows, pndm_rows, unipc_rows
from latentdiff.diffusion.sampler_onestep import ddim_rows, ddpm_rows, heun_rows, lcm_rows
from latentdiff.diffusion.sampler_rows import NOISE, NUM_COLUMNS, NUM_SLOTS, Row
from latentdiff.diffusion.sampler_times import (
    FINAL_SIGMAS,
    SPACINGS,
    Level,
    lcm_timesteps,
    linspace_timesteps,
    ratio_levels,
    spaced_timesteps,
    spaced_timesteps_without_last,
    whole_time_levels,
)
from latentdiff.diffusion.schedule import Schedule

SAMPLERS = (
    "ddpm",
    "ddim",
    "pndm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "unipc",
    "lcm",
)
PREDICTIONS = ("eps", "v", "x0")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler, ready to run: NumPy arrays, padded to R rows of which `num_rows` count.

    The state is a stack (4, B, ...) whose slot 0 is x_t = signal * x0 + noise * eps, in the schedule's own coordinates
    for every sampler, those of diffusers that carry x_t / signal included. After the last row slot 0 is the sample.
    Rows past `num_rows` leave the state as it is and repeat the last level, so that running them does no harm.

    Attributes:
        sampler: the sampler's name.
        num_steps: number of steps asked for.
        num_rows: number of rows, which is the number of evaluations of the network. Heun has up to 2 * num_steps - 1,
            PNDM num_steps + 1, the others num_steps.
        timestep: (R,) float32, what the network is told, in [0, T - 1]; not always whole.
        signal: (R,) float64, of the state's x at each row.
        noise: (R,) float64, of the state's x at each row; not the fresh noise's.
        input_scale: (R,) float64, by which a network expects x to be multiplied; all 1, since x keeps the variance.
        matrix: (R, 4, 7) float64, from [4 slots, x0_hat, eps_hat, fresh noise] to 4 slots.
        initial_scale: x starts as this times noise of unit variance. Usually 1; the noise level itself for Euler, Euler
            ancestral and Heun under trailing and linspace spacing, as diffusers has it.
        needs_noise: whether any row uses fresh noise.
    """

    sampler: str
    num_steps: int
    num_rows: int
    timestep: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    input_scale: np.ndarray
    matrix: np.ndarray
    initial_scale: float
    needs_noise: bool

    @property
    def bound(self) -> int:
        """Number of rows with the padding, R."""
        return len(self.timestep)


def make_table(
    sampler: str,
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: str = "leading",
    steps_offset: int = 1,
    prediction: str = "eps",
    eta: float = 0.0,
    set_alpha_to_one: bool = False,
    final_sigmas_type: str = "zero",
    karras: bool | None = None,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    original_steps: int = 50,
    bound: int | None = None,
) -> SamplerTable:
    """The table of a sampler. The defaults are Stable Diffusion's.

    Args:
        sampler: one of `SAMPLERS`.
        schedule: a variance-preserving schedule.
        num_steps: 1..T. LCM takes at most `original_steps`.
        spacing: "leading", "trailing" or "linspace". LCM has its own. Zero terminal SNR wants "trailing".
        steps_offset: what "leading" adds to each timestep, less where it would lead past T - 1.
        prediction: "eps", "v" or "x0", what the network predicts. PNDM alone asks: see `pndm_rows`.
        eta: DDIM's share of DDPM's noise, in [0, 1]; 1 is DDPM. 0 for the other samplers.
        set_alpha_to_one: whether DDIM and PNDM end clean, at t = 0, rather than at the level of t = 1.
        final_sigmas_type: whether Euler, DPM-Solver++ and UniPC end clean ("zero") or at the level of t = 1
            ("sigma_min").
        karras: whether Euler, Heun, DPM-Solver++ and UniPC space the levels as Karras does. None: as the name says.
        lower_order_final: whether DPM-Solver++ (below 15 steps) and UniPC make the last step of first order.
        euler_at_final: whether DPM-Solver++ makes the last step of first order.
        original_steps: number of steps that LCM was distilled at.
        bound: number of rows to pad to. None: the next power of two at or above 2 T, which holds every sampler at every
            number of steps, so that shapes depend on the schedule alone.

    Returns:
        The table.

    Raises:
        ValueError: for an unknown name, or a number out of range.
    """
    _check_arguments(sampler, schedule, num_steps, spacing, steps_offset, prediction, eta, final_sigmas_type, karras)
    family = sampler.removesuffix("_karras")
    karras = sampler.endswith("_karras") if karras is None else karras
    T = schedule.T

    if family == "lcm":
        original_steps = min(original_steps, T)
        if num_steps > original_steps:
            raise ValueError(
                f"`num_steps` of lcm must be at most `original_steps`, the number that its network was distilled at. "
                f"Received: num_steps={num_steps}, original_steps={original_steps}."
            )
        timesteps = lcm_timesteps(T, num_steps, original_steps)
        rows = lcm_rows(whole_time_levels(schedule, timesteps, set_alpha_to_one=True))
    elif family in ("ddpm", "ddim", "pndm"):
        timesteps = spaced_timesteps(T, num_steps, spacing, steps_offset)
        # Ho's sampler ends at x0 itself; diffusers has no choice there either.
        levels = whole_time_levels(schedule, timesteps, set_alpha_to_one or family == "ddpm")
        if family == "ddpm":
            rows = ddpm_rows(levels)
        elif family == "ddim":
            rows = ddim_rows(levels, eta)
        else:
            rows = pndm_rows(levels, prediction)
    elif family in ("euler", "euler_ancestral", "heun"):
        fractional = spacing == "linspace"
        timesteps = (
            linspace_timesteps(T, num_steps) if fractional else spaced_timesteps(T, num_steps, spacing, steps_offset)
        )
        # diffusers gives Euler alone a choice of where to end.
        final = final_sigmas_type if family == "euler" else "zero"
        levels = ratio_levels(schedule, timesteps, final, "visited" if karras else None, ends_unscaled=True)
        rows = heun_rows(levels) if family == "heun" else ddim_rows(levels, float(family == "euler_ancestral"))
    else:
        timesteps = spaced_timesteps_without_last(T, num_steps, spacing, steps_offset)
        levels = ratio_levels(schedule, timesteps, final_sigmas_type, "whole" if karras else None)
        if family == "unipc":
            rows = unipc_rows(levels, lower_order_final)
        else:
            rows = dpmpp_2m_rows(levels, lower_order_final, euler_at_final, stochastic=family == "dpmpp_2m_sde")

    starts_at_noise_level = family in ("euler", "euler_ancestral", "heun") and spacing != "leading"
    initial_scale = rows[0].level.noise if starts_at_noise_level else 1.0
    return _padded_table(sampler, num_steps, rows, initial_scale, bound or 1 << (2 * T - 1).bit_length())


def initial_state(x_init: Any, xp: Any = ops) -> Any:
    """The stack (4, B, ...) that a run begins with: x in slot 0, zeros in the others.

    Args:
        x_init: (B, ...) a table's `initial_scale` times noise of unit variance.
        xp: `keras.ops`, or `numpy` for float64 on any backend.

    Returns:
        (4, B, ...) the state.
    """
    empty = xp.zeros_like(x_init)
    return xp.stack([x_init] + [empty] * (NUM_SLOTS - 1))


def step(row: Any, state: Any, x0_hat: Any, eps_hat: Any, fresh_noise: Any = None, xp: Any = ops) -> Any:
    """The next state, by one row of a table, whichever the sampler.

    Args:
        row: (4, 7) `table.matrix[i]`, in the state's dtype; may be a tensor, as in a compiled loop. Or (4, 7, B), a row
            for each item.
        state: (4, B, ...) the state before.
        x0_hat: (B, ...) the network's estimate of x0 at x = state[0].
        eps_hat: (B, ...) the network's estimate of eps at x = state[0].
        fresh_noise: (B, ...) of unit variance; None counts as zeros.
        xp: `keras.ops`, or `numpy` for float64 on any backend.

    Returns:
        (4, B, ...) the state after.
    """
    if fresh_noise is None:
        fresh_noise = xp.zeros_like(x0_hat)
    columns = xp.concatenate([state, xp.stack([x0_hat, eps_hat, fresh_noise])])  # (7, B, ...)
    coefficients = xp.reshape(row, (NUM_SLOTS, NUM_COLUMNS, -1) + (1,) * (len(state.shape) - 2))  # (4, 7, 1 or B, ...)
    # A product and a sum rather than a matrix product: accelerators round the factors of those to ten bits or seven,
    # and this way an element does not depend on the batch around it.
    return xp.sum(coefficients * columns[None], axis=1)


def sample(
    denoise: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    table: SamplerTable,
    x_init: Any,
    noise_fn: Callable[[int], Any] | None = None,
    xp: Any = ops,
) -> Any:
    """The sample that a table makes of a starting point: the loop for reading and for tests, uncompiled.

    Args:
        denoise: (x_t, timestep, signal, noise) -> (x0_hat, eps_hat), a `Denoiser` or any function. timestep is (B,)
            float32, signal and noise are numbers.
        table: the sampler.
        x_init: (B, ...) the table's `initial_scale` times noise of unit variance.
        noise_fn: k -> (B, ...) of unit variance, the fresh noise of row k - 1. Needed where `table.needs_noise`.
        xp: `keras.ops`, or `numpy` for float64 on any backend.

    Returns:
        (B, ...) the sample.

    Raises:
        ValueError: if the table needs noise and there is none.
    """
    if table.needs_noise and noise_fn is None:
        raise ValueError(f"The sampler {table.sampler} needs fresh noise at each row. Received: noise_fn=None.")
    state = initial_state(x_init, xp)
    for i in range(table.num_rows):
        timestep = xp.full((x_init.shape[0],), table.timestep[i], dtype="float32")
        x0_hat, eps_hat = denoise(state[0], timestep, float(table.signal[i]), float(table.noise[i]))
        fresh_noise = noise_fn(i + 1) if table.needs_noise and noise_fn else None
        row = xp.asarray(table.matrix[i], dtype=x_init.dtype) if xp is np else ops.cast(table.matrix[i], x_init.dtype)
        state = step(row, state, x0_hat, eps_hat, fresh_noise, xp)
    return state[0]


def per_row_noise(table: SamplerTable, noise_fn: Callable[[int], Any]) -> list[Any]:
    """The fresh noise of a run in the order in which it is consumed, one entry for each row.

    Handed to diffusers, the k-th entry is its k-th draw: `variance_noise` of DDIM's and DPM-Solver++'s `step`, the k-th
    call of `randn_tensor` in DDPM's, Euler ancestral's and LCM's. (Draws that do not matter, since their coefficient is
    0, are listed too. LCM makes no last one.)

    Args:
        table: the sampler.
        noise_fn: k -> (B, ...), as for `sample`.

    Returns:
        `num_rows` arrays (B, ...), be they needed or not.
    """
    return [noise_fn(i + 1) for i in range(table.num_rows)]


def _padded_table(sampler: str, num_steps: int, rows: list[Row], initial_scale: float, bound: int) -> SamplerTable:
    num_rows = len(rows)
    if bound < num_rows:
        raise ValueError(
            f"`bound` must be at least the number of rows. Received: bound={bound}, and {sampler} with "
            f"{num_steps} steps has {num_rows} rows."
        )
    levels: list[Level] = [row.level for row in rows] + [rows[-1].level] * (bound - num_rows)
    matrix = np.tile(np.eye(NUM_SLOTS, NUM_COLUMNS), (bound, 1, 1))
    matrix[:num_rows] = [row.matrix for row in rows]
    arrays = {
        "timestep": np.array([level.timestep for level in levels], dtype=np.float32),
        "signal": np.array([level.signal for level in levels]),
        "noise": np.array([level.noise for level in levels]),
        "input_scale": np.ones(bound),
        "matrix": matrix,
    }
    for array in arrays.values():
        array.setflags(write=False)
    return SamplerTable(
        sampler=sampler,
        num_steps=num_steps,
        num_rows=num_rows,
        initial_scale=float(initial_scale),
        needs_noise=bool(matrix[:, :, NOISE].any()),
        **arrays,
    )


def _check_arguments(
    sampler: str,
    schedule: Schedule,
    num_steps: int,
    spacing: str,
    steps_offset: int,
    prediction: str,
    eta: float,
    final_sigmas_type: str,
    karras: bool | None,
) -> None:
    _check_choice("sampler", sampler, SAMPLERS)
    _check_choice("spacing", spacing, SPACINGS)
    _check_choice("prediction", prediction, PREDICTIONS)
    _check_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    T = schedule.T
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or not 1 <= num_steps <= T:
        raise ValueError(
            f"`num_steps` must be a whole number from 1 to T={T}, the schedule's number of noise levels. "
            f"Received: num_steps={num_steps!r}."
        )
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, (int, np.integer)) or steps_offset < 0:
        raise ValueError(f"`steps_offset` must be a whole number, at least 0. Received: steps_offset={steps_offset!r}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be from 0 (deterministic) to 1 (DDPM). Received: eta={eta}.")
    if eta and sampler != "ddim":
        raise ValueError(f"`eta` belongs to the sampler ddim alone. Received: eta={eta}, sampler={sampler!r}.")
    if karras and sampler in ("ddpm", "ddim", "pndm", "euler_ancestral", "lcm"):
        raise ValueError(
            "Karras' noise levels are for euler, heun, dpmpp_2m, dpmpp_2m_sde and unipc. "
            f"Received: karras=True, sampler={sampler!r}."
        )
    if not schedule.is_variance_preserving:
        raise ValueError("Samplers need a variance-preserving schedule: signal^2 + noise^2 = 1. Received: another.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}.{hint}")
