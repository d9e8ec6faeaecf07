"""A CLIPModel directory of transformers: text encoder, image encoder, projections and temperature, read and written.

`config.json` holds both configurations, `model.safetensors` all tensors, `preprocessor_config.json` how an image comes
to the image encoder; the tokenizer's files lie beside them.

Reference: Radford et al. 2021, arXiv:2103.00020, fig. 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints import diffusers_image_encoder, diffusers_text_encoder
from latentdiff.checkpoints.diffusers import FILE_DTYPES, Component, check_arrays, write_arrays
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.fields import Fields
from latentdiff.checkpoints.files import CheckpointError, read_json, write_json
from latentdiff.checkpoints.key_map import Entry, LazyArrays, Weights, as_dtype, dtype_of, match, shape_of
from latentdiff.checkpoints.safetensors_files import WeightsOpener, open_weights
from latentdiff.checkpoints.shards import parse_size
from latentdiff.checkpoints.tokenizer_files import read_tokenizer

STEM = "model"
PREPROCESSOR_FILE = "preprocessor_config.json"
IGNORED_KEYS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

_DEFAULTS = {"model_type": "clip", "projection_dim": 512, "text_config": None, "vision_config": None}
_LEGACY_END = 2  # transformers reads an `eos_token_id` of 2, which old files have by mistake, as "the highest id"


@dataclass(frozen=True)
class Pair:
    """A CLIP pair as it was found, or as it is to be written.

    Attributes:
        text, image: The encoders, of kinds "text_encoder" and "image_encoder".
        end_id: The token whose context stands for the caption.
        weights: What belongs to both: "text_projection/kernel" (D, E) and "logit_scale" ().
    """

    text: Component
    image: Component
    end_id: int
    weights: Mapping[str, np.ndarray]


def is_clip(path: Path) -> bool:
    """Whether a directory is a CLIPModel's."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "clip"


class CLIPDirectory:
    """See `sources.Source`; also `pair`, and components of the kind "image_encoder".

    Args:
        path, ema, prediction: As for `sources.open_source`.
        open_weights: What opens the tensors; see `safetensors_files.open_weights`.
    """

    form = "CLIPModel directory"
    kinds = ("text_encoder",)

    def __init__(
        self,
        path: Path,
        *,
        ema: bool = False,
        prediction: str | None = None,
        open_weights: WeightsOpener = open_weights,
    ):
        if ema or prediction:
            received = f"ema={ema}, prediction={prediction!r} for `{path}`"
            raise CheckpointError(f"A CLIPModel has no averaged weights and predicts no noise. Received: {received}.")
        self.path = path
        self._open_weights = open_weights

    def pair(self, *, dtype: str | np.dtype | None = None, variant: str | None = None) -> Pair:
        """Configurations and weights; all keys and shapes have been checked, the numbers are read when asked for.

        Args:
            dtype: What the arrays, but for the temperature, are converted to; None leaves them as they are stored.
            variant: Of the weights' files.

        Raises:
            FileNotFoundError: If files are missing.
            CheckpointError: If the configuration cannot be expressed here, a file is damaged or a pickle, or keys are
                missing, left over or misshapen.
        """
        text_config, details, image_config = read_config(self.path)
        tensors = self._open_weights(self.path, STEM, variant)
        ignored = {name for name in IGNORED_KEYS if name in tensors}
        sources = match(key_map(text_config, image_config), tensors, ignored, str(self.path))
        target = as_dtype(dtype)

        def part(kind: str) -> Weights:
            mine = {path.removeprefix(f"{kind}/"): value for path, value in sources.items() if path.startswith(kind)}
            return Weights(mine, target)

        end_id = details["eos_token_id"]
        return Pair(
            Component("text_encoder", self.path, text_config, details, part("text_encoder"), tuple(sorted(ignored))),
            Component("image_encoder", self.path, image_config, {}, part("image_encoder"), ()),
            text_config["vocabulary_size"] - 1 if end_id == _LEGACY_END else end_id,
            Weights({name: sources[name] for name in ("text_projection/kernel", "logit_scale")}, np.dtype(np.float32)),
        )

    def component(self, kind: str, *, dtype: str | np.dtype | None = None, variant: str | None = None) -> Component:
        if kind not in ("text_encoder", "image_encoder"):
            raise FileNotFoundError(f"`{self.path}` is a CLIPModel's directory and holds no {kind}.")
        pair = self.pair(dtype=dtype, variant=variant)
        return pair.text if kind == "text_encoder" else pair.image

    def settings(self) -> SamplerSettings:
        raise FileNotFoundError(f"`{self.path}` is a CLIPModel's directory and no whole pipeline.")

    def tokenizer(self) -> dict[str, Any]:
        return read_tokenizer(self.path)

    def sample_size(self) -> None:
        return None


def read_config(directory: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """CLIPTextEncoder's arguments, the token ids among them `eos_token_id`, and CLIPImageEncoder's arguments.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        CheckpointError: If it is another model's, or asks for what cannot be done here.
    """
    path = directory / "config.json"
    fields = Fields(read_json(path), _DEFAULTS, str(path))
    fields.require("model_type", "clip")
    fields.require("quantization_config", None)
    projection_dim = fields.count("projection_dim", high=2**16)
    text, vision = (_part(fields, name) for name in ("text_config", "vision_config"))
    fields.finish(strict=False)
    text_config, details = diffusers_text_encoder.read_config(text, f"{path}: text_config")
    details = {"eos_token_id": 49407, **details, "projection_dim": projection_dim}
    if type(details["eos_token_id"]) is not int or not 0 <= details["eos_token_id"] < text_config["vocabulary_size"]:
        rule = f"`eos_token_id` must be one token, in 0..{text_config['vocabulary_size'] - 1}"
        raise CheckpointError(f"{rule}. Received: eos_token_id={details['eos_token_id']!r:.80} in `{path}`")
    # Each part has a field of this name too, of which a CLIPModel makes nothing.
    image_config = diffusers_image_encoder.read_config(
        {**vision, "projection_dim": projection_dim}, f"{path}: vision_config"
    )
    file = directory / PREPROCESSOR_FILE
    preprocessor = read_json(file) if file.is_file() else {}
    return text_config, details, {**image_config, **diffusers_image_encoder.read_preprocessor(preprocessor, str(file))}


def key_map(text_config: Mapping[str, Any], image_config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the pair; paths begin with the encoder's kind."""
    text = diffusers_text_encoder.key_map(text_config)
    image = diffusers_image_encoder.key_map(image_config)
    return [
        *(replace(entry, path=f"text_encoder/{entry.path}", keys=entry.keys[:1]) for entry in text),
        *(replace(entry, path=f"image_encoder/{entry.path}") for entry in image),
        Entry(
            "text_projection/kernel",
            ("text_projection.weight",),
            "dense",
            (text_config["width"], image_config["projection_dim"]),
        ),
        Entry("logit_scale", ("logit_scale",), "same", ()),
    ]


def write_config(pair: Pair) -> dict[str, Any]:
    """What `config.json` says of a pair.

    Raises:
        ValueError: If transformers cannot express it.
    """
    projection_dim = pair.image.config["projection_dim"]
    if pair.end_id == _LEGACY_END != pair.text.config["vocabulary_size"] - 1:
        raise ValueError(
            f"`end_id` must not be {_LEGACY_END}, which transformers takes for the highest token. "
            f"Received: end_id={pair.end_id}."
        )
    details = {**pair.text.details, "eos_token_id": pair.end_id, "projection_dim": projection_dim}
    text = diffusers_text_encoder.write_config(pair.text.config, details)
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection_dim,
        "text_config": {name: value for name, value in text.items() if name not in ("architectures", "torch_dtype")},
        "torch_dtype": text["torch_dtype"],
        "vision_config": diffusers_image_encoder.write_config(pair.image.config),
    }


def check_pair(pair: Pair, dtype: str | None, max_shard_size: int | str | None) -> None:
    """Checks what `write_pair` will be asked, before anything is written.

    Raises:
        ValueError: If transformers cannot express the pair, or there is no such dtype or size.
    """
    if dtype not in (None, *FILE_DTYPES):
        raise ValueError(f"`dtype` must be one of {', '.join(FILE_DTYPES)}. Received: dtype={dtype!r}")
    if max_shard_size is not None:
        parse_size(max_shard_size)
    write_config(pair)


def write_pair(
    directory: Path, pair: Pair, dtype: str | None = "float32", max_shard_size: int | str | None = None
) -> None:
    """Writes configuration, weights and preprocessing; the tokenizer is the caller's.

    Args:
        directory: An empty one, such as `replaced_directory` gives.
        pair: What is written.
        dtype, max_shard_size: As for `diffusers.write_component`.

    Raises:
        ValueError: As `check_pair`, or if the arrays are not the pair's.
        CheckpointError: If an array holds NaN, infinity, or a number too large for `dtype`.
    """
    check_pair(pair, dtype, max_shard_size)
    entries = sorted(key_map(pair.text.config, pair.image.config), key=lambda entry: entry.keys[0])
    arrays = _Joined({"text_encoder/": pair.text.weights, "image_encoder/": pair.image.weights, "": pair.weights})
    check_arrays(entries, arrays)
    write_json(directory / "config.json", write_config(pair))
    write_json(directory / PREPROCESSOR_FILE, diffusers_image_encoder.write_preprocessor(pair.image.config))
    write_arrays(directory, STEM, entries, arrays, dtype, max_shard_size)


class _Joined(LazyArrays):
    """Several mappings as one, their paths behind a prefix each; an array is made when it is asked for."""

    def __init__(self, parts: Mapping[str, Mapping[str, np.ndarray]]):
        self._places = {prefix + path: (arrays, path) for prefix, arrays in parts.items() for path in arrays}

    def __getitem__(self, path: str) -> np.ndarray:
        arrays, inner = self._places[path]
        return arrays[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, path: str) -> tuple[int, ...]:
        return shape_of(*self._places[path])

    def dtype(self, path: str) -> np.dtype:
        return dtype_of(*self._places[path])


def _part(fields: Fields, name: str) -> dict[str, Any]:
    """One encoder's fields. Where old files have them twice, the `_dict` ones count, as they do in transformers."""
    for field in (f"{name}_dict", name):
        value = fields.take(field)
        if isinstance(value, dict):
            return value
        if value is not None:
            raise CheckpointError(f"`{field}` must be an object. Received: {value!r:.80} in `{fields.source}`")
    return {}
