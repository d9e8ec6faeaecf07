"""Pictures as PNG files that carry the settings they were made with, so that they can be made again; imports no Keras.

The settings are one JSON object in an iTXt chunk with the keyword `latentdiff` (PNG, Third Edition, 11.3.3.4).
"""

from __future__ import annotations

import json
import math
import os
import secrets
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from latentdiff import __version__
from latentdiff.checkpoints.files import parse_json

KEYWORD = "latentdiff"
MAX_SEED = 2**63 - 1
MAX_SETTINGS = 65_536
"""The most characters of JSON that `read_settings` parses."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one picture was made with.

    Attributes:
        prompt: any text.
        negative_prompt: any text.
        preset: as it was given: a name in `weights/`, or a directory.
        seed: of this picture, 0 .. 2**63 - 1.
        num_steps: at least 1.
        guidance_scale: finite.
        guidance_interval: [low, high], 0 <= low <= high, the levels of noise_to_signal at which guidance acts; a high
            of None is no bound, and None is every level.
        cache_interval: at least 1, see `TextToImage.generate`.
        sampler: its name; None is the model's own.
        height: in pixels, at least 1; None is the model's own, as for the next.
        width: in pixels, at least 1.
        dtype: that the networks computed in, such as "float32"; None is chosen by the device.
        ema: whether the averaged weights of a single file were read.
        prediction: that the UNet was told to have, such as "v"; None is what the model's files say.
        engine: what computed the networks: "keras" or "openvino".
        backend: Keras' backend, such as "tensorflow".
        version: of latentdiff.

    Raises:
        ValueError: if a value has another type or range, naming every such field.
    """

    prompt: str
    negative_prompt: str = ""
    preset: str
    seed: int
    num_steps: int = 25
    guidance_scale: float = 5.0
    guidance_interval: list[float | None] | None = None
    cache_interval: int = 1
    sampler: str | None = None
    height: int | None = None
    width: int | None = None
    dtype: str | None = None
    ema: bool = False
    prediction: str | None = None
    engine: str = "keras"
    backend: str | None = None
    version: str = __version__

    def __post_init__(self) -> None:
        rules = {
            "prompt": _is_text,
            "negative_prompt": _is_text,
            "preset": _is_text,
            "seed": lambda value: _is_int(value) and 0 <= value <= MAX_SEED,
            "num_steps": lambda value: _is_int(value) and value >= 1,
            "guidance_scale": _is_finite,
            "guidance_interval": lambda value: value is None or _is_interval(value),
            "cache_interval": lambda value: _is_int(value) and value >= 1,
            "sampler": lambda value: value is None or _is_text(value),
            "height": lambda value: value is None or _is_int(value) and value >= 1,
            "width": lambda value: value is None or _is_int(value) and value >= 1,
            "dtype": lambda value: value is None or _is_text(value),
            "ema": lambda value: isinstance(value, bool),
            "prediction": lambda value: value is None or _is_text(value),
            "engine": _is_text,
            "backend": lambda value: value is None or _is_text(value),
            "version": _is_text,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, rule in rules.items() if not rule(getattr(self, name))]
        if wrong:
            raise ValueError(f"settings must have their types and ranges. Received: {', '.join(wrong)}.")


def write_png(path: str | os.PathLike[str], image: np.ndarray, settings: Settings | None = None) -> None:
    """Writes a picture, whole or not at all: an existing file stays as it is until the new one is complete.

    Args:
        path: of the file.
        image: uint8 (H, W, 3) in 0 .. 255.
        settings: what it was made with; the same picture and settings make the same bytes.

    Raises:
        ValueError: if `image` has another dtype or shape.
        OSError: if the file cannot be written.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
        raise ValueError(f"`image` must be uint8 (H, W, 3). Received: {image.dtype} {image.shape}.")
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        chunks.add_itxt(KEYWORD, json.dumps(asdict(settings), ensure_ascii=False, allow_nan=False))
    path = Path(path)
    # Beside the target, because only within one file system is the replacement atomic.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """The settings that a picture was made with; its pixels are not decoded.

    The file may come from anywhere: it is parsed within limits and its values are checked.

    Args:
        path: of a PNG file that `write_png` has written with settings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no PNG, holds no settings, or holds some that are malformed.
    """
    text = _read_chunk(path)
    if len(text) > MAX_SETTINGS:
        raise ValueError(
            f"settings must have at most {MAX_SETTINGS} characters. Received: {len(text)} in {str(path)!r}."
        )
    values = parse_json(text.encode(), f"the settings in {path}")
    names = {field.name for field in fields(Settings)}
    missing = [name for name in ("prompt", "preset", "seed") if name not in values]
    if missing:
        raise ValueError(f"settings must have a prompt, a preset and a seed. Missing: {missing} in {str(path)!r}.")
    # A later version may write more than is known here.
    return Settings(**{name: value for name, value in values.items() if name in names})


def _read_chunk(path: str | os.PathLike[str]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as picture:
                text = picture.info.get(KEYWORD)
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"a picture must be a PNG file of reasonable size. Received: {str(path)!r}.") from error
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a picture must be an intact PNG file. Received: {str(path)!r} ({error}).") from error
    if not isinstance(text, str):
        raise ValueError(f"a picture must have a text chunk {KEYWORD!r}. Received: {str(path)!r}, which has none.")
    return text


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_interval(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _is_finite(value[0]) or value[0] < 0:
        return False
    return value[1] is None or _is_finite(value[1]) and value[0] <= value[1]
