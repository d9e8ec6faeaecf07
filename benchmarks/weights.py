"""The model that every system loads: a diffusers directory with random weights in float16, written once."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

POOL = 1_000_003  # a prime: no row of a kernel is another's


def write(size: str, directory: Path) -> None:
    """Writes the directory of a size of `cases.SIZES`, whole or not at all; one that exists stays.

    Args:
        size: "sd15" is Stable Diffusion 1.5's, "tiny" the tests'; "emoji" the model that ships.
        directory: the pipeline's.
    """
    if directory.exists():
        return
    if size == "emoji":
        directory.symlink_to(Path(__file__).resolve().parents[1] / "weights" / "emoji", target_is_directory=True)
        return
    from latentdiff.pipeline import TextToImage

    if size == "tiny":
        import tiny_models

        parts = tiny_models.parts()
    else:
        parts = _stable_diffusion()
    TextToImage(parts).save_to_preset(directory, dtype="float16")


def _stable_diffusion():
    """The parts of Stable Diffusion 1.5, with DDIM for its sampler: as many evaluations as steps."""
    from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
    from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.layers import blank_weights
    from latentdiff.models.text_encoder import CLIPTextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer
    from latentdiff.models.unet import UNet
    from latentdiff.presets import Parts, assign, named_variables

    networks = {}
    for name, network_class in (("text_encoder", CLIPTextEncoder), ("unet", UNet), ("autoencoder", Autoencoder)):
        with blank_weights():
            networks[name] = network_class(dtype="float16")
        draws = numbers(seed=len(networks))
        for path, variable in named_variables(networks[name]):
            values = next(draws)(math.prod(variable.shape)).reshape(variable.shape)
            if path.endswith("gamma"):
                values = 1 + 0.2 * values
            elif len(variable.shape) == 1:
                values = 0.1 * values
            elif not path.endswith("embeddings"):
                values = values / math.sqrt(math.prod(variable.shape[:-1]))  # keeps the variance
            assign(variable, values.astype("float16"))
    return Parts(
        tokenizer=CLIPTokenizer(**clip_tokenizer()),
        settings=SamplerSettings(sampler="ddim"),
        sample_size=(64, 64),
        **networks,
    )


def numbers(seed: int) -> Iterator:
    """Functions of a count that give so many float32 normals, each from another place of a fixed sequence on."""
    pool = np.random.default_rng(seed).standard_normal(POOL).astype("float32")
    for i in itertools.count(1):
        rolled = np.roll(pool, i * 7919)
        yield lambda count, rolled=rolled: np.resize(rolled, count)


def inputs(directory: Path, pixels: int | None = None) -> dict[str, np.ndarray]:
    """What every system is given, by the directory's own configuration.

    Args:
        directory: the pipeline's.
        pixels: height and width of the picture; None is one latent's worth.

    Returns:
        tokens (1, S), latent (1, h, w, c), timestep (2,), context (2, S, D).
    """
    text, vae = (json.loads((directory / part / "config.json").read_text()) for part in ("text_encoder", "vae"))
    length, end = text["max_position_embeddings"], text["vocab_size"] - 1
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = (pixels or factor) // factor
    rng = np.random.default_rng(0)
    tokens = np.full((1, length), end, "int32")
    tokens[0, : length // 4] = rng.integers(end, size=length // 4)
    return {
        "tokens": tokens,
        "latent": rng.standard_normal((1, side, side, vae["latent_channels"])).astype("float32"),
        "timestep": np.full(2, 501, "float32"),
        "context": rng.standard_normal((2, length, text["hidden_size"])).astype("float32"),
    }


def read_through(directory: Path) -> None:
    """Brings every file into the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass
