"""What `TextToImage.generate` was told: each function checks arguments before any work, and gives them in one form.

An error is a TypeError where a prompt is no text or a seed no integer, and otherwise a ValueError.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.diffusion.noise import MAX_SEED, split_seeds
from latentdiff.diffusion.samplers import SamplerTable, make_table
from latentdiff.diffusion.schedule import Schedule

OUTPUTS = ("image", "latent")


def read_prompts(prompt: Any, negative_prompt: Any, num_images: Any) -> tuple[list[str], list[str]]:
    """The prompts, P of them, and the negative ones, P or 1."""
    if not is_whole(num_images) or num_images < 1:
        raise ValueError(f"`num_images` must be a whole number, at least 1. Received: num_images={num_images!r}.")
    lists = []
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
            raise TypeError(f"`{name}` must be text, or a list of texts. Received: {name}={value!r}.")
        lists.append(list(values))
    prompts, negatives = lists
    if not prompts:
        raise ValueError("`prompt` must hold at least one prompt. Received: an empty list.")
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(
            "`negative_prompt` must be one text, or one for each prompt. "
            f"Received: {len(negatives)} for {len(prompts)} prompts."
        )
    return prompts, negatives


def read_size(
    height: int | None, width: int | None, sample_size: tuple[int, int], channels: Sequence[int]
) -> tuple[int, int]:
    """(h, w) of the latent of a picture of so many pixels.

    Args:
        height, width: of the picture; None is the model's own.
        sample_size: (h, w) of the latents that the model was trained on.
        channels: of the autoencoder's levels, each of which but one halves a picture.

    Raises:
        ValueError: a number of pixels is no positive multiple of the autoencoder's factor.
    """
    factor = 2 ** (len(channels) - 1)
    sizes = []
    for name, pixels, own in zip(("height", "width"), (height, width), sample_size, strict=True):
        pixels = own * factor if pixels is None else pixels
        if not is_whole(pixels) or pixels < factor or pixels % factor:
            raise ValueError(f"`{name}` must be a positive multiple of {factor}. Received: {name}={pixels!r}.")
        sizes.append(int(pixels) // factor)
    return sizes[0], sizes[1]


def read_table(
    sampler: str | None, num_steps: int, eta: float, settings: SamplerSettings, schedule: Schedule
) -> SamplerTable:
    """The rows of a run by a sampler, None being the settings' own, over a model's schedule and in its prediction."""
    if sampler is not None and sampler != settings.sampler:
        make_table(sampler, schedule, 1)  # names the samplers that are near, where there is none of this name
        settings = settings.with_sampler(sampler)
    return make_table(schedule=schedule, num_steps=num_steps, eta=eta, **settings.table_arguments())


def read_seeds(seed: Any, total: int) -> list[int]:
    """One seed for each image; random ones for None."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if is_whole(seed):
        seeds = [int(seed) + i for i in range(total)]
    elif not isinstance(seed, list | tuple | range | np.ndarray):
        raise TypeError(f"`seed` must be one int, or one for each image. Received: seed={seed!r}.")
    else:
        seeds = list(seed)
        if len(seeds) != total:
            raise ValueError(f"`seed` must be one int, or one for each of the {total} images. Received: {len(seeds)}.")
    if any(isinstance(s, int) and not 0 <= s <= MAX_SEED for s in seeds):
        raise ValueError(f"`seed` must lie in 0 .. 2**63 - 1, for every image. Received: seed={seed!r}.")
    split_seeds(seeds)
    return seeds


def read_noise(noise: Any, total: int, shape: tuple[int, ...], table: SamplerTable) -> np.ndarray | None:
    """The noise that was handed in, as float32 (1 or 1 + R, B, h, w, c)."""
    if noise is None:
        return None
    noise = np.asarray(noise, "float32")
    initial = (total, *shape)
    whole = (1 + table.num_rows, *initial)
    if noise.shape not in (initial, whole):
        raise ValueError(
            f"`noise` must be (B, h, w, c), here {initial}, or (1 + R, B, h, w, c), here {whole}. "
            f"Received: {noise.shape}."
        )
    if not np.isfinite(noise).all():
        raise ValueError("`noise` must be finite. Received: NaN or infinity in it.")
    return noise.reshape(-1, *initial)


def check_choices(
    scale: Any, rescale: Any, interval: Any, cache_interval: Any, batch_size: Any, tiled: Any, output: Any
) -> None:
    """Raises ValueError at the first that is out of range."""
    if not _is_number(scale) or not np.isfinite(scale):
        raise ValueError(f"`guidance_scale` must be a finite number. Received: guidance_scale={scale!r}.")
    if not _is_number(rescale) or not 0 <= rescale <= 1:
        raise ValueError(f"`guidance_rescale` must lie in 0 .. 1. Received: guidance_rescale={rescale!r}.")
    if interval is not None and not _is_interval(interval):
        raise ValueError(f"`guidance_interval` must be (low, high), 0 <= low <= high. Received: {interval!r}.")
    if not is_whole(cache_interval) or cache_interval < 1:
        raise ValueError(f"`cache_interval` must be a whole number, at least 1. Received: {cache_interval!r}.")
    if batch_size is not None and (not is_whole(batch_size) or batch_size < 1):
        raise ValueError(f"`batch_size` must be a whole number, at least 1. Received: batch_size={batch_size!r}.")
    if tiled is not None and not isinstance(tiled, bool):
        raise ValueError(f"`tiled` must be True, False or None. Received: tiled={tiled!r}.")
    if output not in OUTPUTS:
        raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}. Received: output={output!r}.")


def is_whole(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating)


def _is_interval(value) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(end) for end in value)
    return is_pair and 0 <= value[0] <= value[1]
