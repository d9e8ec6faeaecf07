"""A pipeline as one SavedModel: a prompt goes in, a PNG comes out, and TensorFlow's own operations are all it needs.

The directory is a version as TensorFlow Serving polls for it: `models/emoji/1`. It appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras

from latentdiff import __version__
from latentdiff.checkpoints.files import replaced_directory
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.pipeline import TextToImage

MODEL_CARD = Path("assets.extra", "README.md")
SETTINGS_FILE = Path("assets.extra", "latentdiff.json")


def export_saved_model(
    pipeline: TextToImage,
    directory: str | os.PathLike,
    *,
    sizes: Sequence[tuple[int | None, int | None]] = (),
    samplers: Sequence[str] = SAMPLERS,
    num_steps: int = 25,
    guidance_scale: float = 5.0,
    max_batch: int = 16,
    max_steps: int = 50,
    max_prompt_bytes: int = 2048,
    max_guidance_scale: float = 100.0,
    jit_compile: bool = False,
    licences: str = "",
) -> None:
    """Writes a pipeline as a SavedModel for TensorFlow Serving.

    Args:
        pipeline: in the dtype that it is to compute in.
        directory: of one version, whose name is its number: `models/emoji/1`.
        sizes: (height, width) in pixels; none is the model's own. The first is the default, each other one has
            signatures of its own: `generate_512x768`.
        samplers: names that a request may choose from.
        num_steps: of a request that names none.
        guidance_scale: of a request that names none.
        max_batch: pictures that one request may ask for.
        max_steps: steps that one request may ask for.
        max_prompt_bytes: of one prompt, in UTF-8.
        max_guidance_scale: the highest that a request may ask for.
        jit_compile: whether XLA compiles the networks' evaluations, as a GPU wants it.
        licences: what the model card says of the weights and of the pictures that they were trained on.

    Raises:
        ValueError: a number, a size or a sampler's name is wrong, or Keras' backend is not TensorFlow; before any work.
        FileExistsError: there is such a version already.
    """
    directory = Path(directory)
    if not directory.name.isdecimal():
        raise ValueError(f"`directory` must end in a version's number: models/emoji/1. Received: {str(directory)!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"A SavedModel needs KERAS_BACKEND=tensorflow. Received: {keras.backend.backend()}.")
    import tensorflow as tf

    from latentdiff.export.arrow import Arrow
    from latentdiff.export.requests import Limits
    from latentdiff.export.sampler_book import make_book
    from latentdiff.export.signatures import SERVING_DEFAULT, Signatures
    from latentdiff.export.tokenizer import GraphTokenizer
    from latentdiff.export.warmup import write_warmup

    limits = Limits(
        max_batch=max_batch,
        max_steps=max_steps,
        max_prompt_bytes=max_prompt_bytes,
        max_guidance_scale=max_guidance_scale,
    )
    if not 1 <= num_steps <= max_steps:
        raise ValueError(f"`num_steps` must lie in 1 .. max_steps={max_steps}. Received: num_steps={num_steps!r}.")
    if not 0 <= guidance_scale <= max_guidance_scale:
        rule = f"`guidance_scale` must lie in 0 .. max_guidance_scale={max_guidance_scale}"
        raise ValueError(f"{rule}. Received: guidance_scale={guidance_scale!r}.")
    shapes = [pipeline.latent_shape(*size) for size in sizes or [(None, None)]]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"`sizes` must differ from one another. Received: sizes={list(sizes)!r}.")
    factor = pipeline.autoencoder.factor
    pixels = [(height * factor, width * factor) for height, width, _ in shapes]
    book = make_book(pipeline.settings, pipeline.schedule, samplers, max_steps)
    with replaced_directory(directory) as fresh:
        signatures = Signatures(
            Arrow(pipeline, book, jit_compile),
            GraphTokenizer(pipeline.tokenizer, max_prompt_bytes),
            limits,
            pixels,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
        tf.saved_model.save(signatures.module, str(fresh), signatures=signatures.functions)
        prompt = tf.constant(["a red heart"])
        one = {"prompt": prompt, "num_steps": tf.constant([1])}
        warm = [(f"generate_{h}x{w}" if i else "generate", one) for i, (h, w) in enumerate(pixels)]
        write_warmup(fresh, directory.parent.name, [(SERVING_DEFAULT, {"prompt": prompt}), *warm])
        settings: dict[str, Any] = {
            "latentdiff": __version__,
            "tensorflow": tf.__version__,
            "dtype": pipeline.dtype,
            "sizes": pixels,
            "samplers": book.samplers,
            "defaults": {name: _plain(value) for name, value in signatures.defaults.items()},
            "limits": asdict(limits),
            "prediction": pipeline.settings.prediction,
            "parameters": {
                "text_encoder": pipeline.text_encoder.count_params(),
                "unet": pipeline.unet.count_params(),
                "autoencoder": pipeline.autoencoder.count_params(),
            },
        }
        _write(fresh / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        _write(fresh / MODEL_CARD, _card(directory.parent.name, settings, licences))


def _plain(value: Any) -> Any:
    item = value.numpy()[0]
    return item.decode() if isinstance(item, bytes) else item.item()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _card(name: str, settings: dict[str, Any], licences: str) -> str:
    limits = "\n".join(f"| `{limit}` | {value:g} |" for limit, value in settings["limits"].items())
    defaults = "\n".join(f"| `{field}` | `{value!r}` |" for field, value in settings["defaults"].items())
    counts = ", ".join(f"{part} {count:,}" for part, count in settings["parameters"].items())
    sizes = ", ".join(f"{width} x {height}" for height, width in settings["sizes"])
    return f"""# {name or "A latent diffusion model"}

Text to image by latent diffusion, exported by latentdiff {settings["latentdiff"]}, TensorFlow {settings["tensorflow"]}.
A prompt goes in (`prompt`, strings in UTF-8), a PNG comes out (`image_bytes`), with the seed that it was made from.

Parameters: {counts}. Computes in {settings["dtype"]}. Pictures (width x height): {sizes}.
Samplers: {", ".join(settings["samplers"])}.

| input of `generate` | default |
|---|---|
{defaults}

`seed` -1 is a fresh one for each picture.

| limit of a request | |
|---|---|
{limits}

What is beyond a limit is answered with INVALID_ARGUMENT.

## Licences

{licences.strip() or "The exporter was told nothing of the weights' licence."}
"""
