"""What a training run is asked for: a flat TOML file, whose every value an option of the command line overrides."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.files import read_json

HISTORY = 256  # batches whose losses a model remembers


@dataclass(frozen=True)
class Config:
    """What all trainings share.

    Attributes:
        data: sources of captioned pictures; see `latentdiff.data.index_source`.
        steps: batches of the whole run.
        batch_size: pictures of a batch, of all devices together.
        start: a model directory to go on from; "" begins with random weights.
        size: pixels; pictures have about size squared.
        max_ratio: of a picture's sides; above 1 pictures keep their shape, in buckets.
        max_broken: share of broken pictures at which the run stops.
        validation: share of the pictures that is not trained on, drawn by the seed.
        validation_data: sources of such pictures, in place of the share.
        optimizer: "adamw" or "muon".
        learning_rate, warmup, decay: of `WarmupStableDecay`, in updates; `decay` is the share of the way down.
        weight_decay, clipnorm: the optimizer's; a `clipnorm` of 0 does not clip.
        gradient_accumulation_steps: batches of an update.
        ema_decay: of the weights' average, which is what is saved; 0 keeps none.
        dtype: Keras' policy of the networks: "float32", "mixed_bfloat16", "mixed_float16".
        rematerialize: whether activations are computed again rather than kept (JAX).
        distribution: "none", "data" or "model" (JAX), "mirrored" (TensorFlow); see `training.distributed`.
        mesh: of "model": parts of a batch, parts of a weight.
        hosts: whether other hosts run the same command (JAX); see `training.join_hosts`.
        seed: of weights, order, crops and noise.
        steps_per_execution: batches that are trained on without a return to Python.
        checkpoint_every, log_every, keep: see `Run`.
    """

    data: list[str]
    steps: int
    batch_size: int = 16
    start: str = ""
    size: int = 256
    max_ratio: float = 1.0
    max_broken: float = 0.01
    validation: float = 0.02
    validation_data: list[str] = typing.cast(Any, ())
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup: int = 100
    decay: float = 0.2
    weight_decay: float = 1e-2
    clipnorm: float = 1.0
    gradient_accumulation_steps: int = 1
    ema_decay: float = 0.9999
    dtype: str = "float32"
    rematerialize: bool = False
    distribution: str = "none"
    mesh: list[int] = typing.cast(Any, ())
    hosts: bool = False
    seed: int = 0
    steps_per_execution: int = 1
    checkpoint_every: int = 500
    log_every: int = 50
    keep: int = 2

    def __post_init__(self):
        at_least = {"steps": 1, "batch_size": 1, "size": 8, "warmup": 1, "gradient_accumulation_steps": 1}
        at_least |= {"steps_per_execution": 1, "checkpoint_every": 1, "log_every": 1, "keep": 1, "seed": 0}
        at_least |= {"max_ratio": 1, "learning_rate": 0, "weight_decay": 0, "clipnorm": 0}
        for name, least in at_least.items():
            self._require(getattr(self, name) >= least, name, f"at least {least}")
        for name in ("steps_per_execution", "log_every"):
            self._require(getattr(self, name) <= HISTORY, name, f"at most {HISTORY}")
        for name in ("validation", "max_broken", "decay", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self._require(bool(self.data), "data", "one source or more")
        self._choose("optimizer", "adamw", "muon")
        self._choose("dtype", "float32", "bfloat16", "mixed_bfloat16", "mixed_float16")
        self._choose("distribution", "none", "data", "model", "mirrored")
        self._require(len(self.mesh) == (2 if self.distribution == "model" else 0), "mesh", 'two numbers for "model"')

    def _choose(self, name: str, *values: str) -> None:
        self._require(getattr(self, name) in values, name, f"one of {', '.join(values)}")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` must be {rule}. Received: {name}={getattr(self, name)!r}.")


@dataclass(frozen=True)
class PicturesConfig(Config):
    """What the trainings on pictures share.

    Attributes:
        crop, zoom, flip: see `latentdiff.data.CaptionedImages`.
    """

    crop: str = "random"
    zoom: float = 1.0
    flip: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._require(self.zoom >= 1, "zoom", "at least 1")
        self._choose("crop", "random", "centre")


@dataclass(frozen=True)
class AutoencoderConfig(PicturesConfig):
    """What the autoencoder's training is asked for.

    Attributes:
        channels, blocks_per_level, latent_channels, groups: `Autoencoder`'s; without effect where `start` has them.
        kl_weight, l1_weight, l2_weight, discriminator_weight, discriminator_start: see `AutoencoderTraining`; a
            `discriminator_weight` of 0 trains without one.
        train_encoder: whether the encoder is trained; otherwise `start`'s latents stay what they are, and a UNet of
            theirs gets a better decoder.
        discriminator_width, discriminator_depth: `PatchDiscriminator`'s.
    """

    channels: list[int] = typing.cast(Any, (64, 128, 256, 256))
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    kl_weight: float = 1e-6
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    discriminator_weight: float = 0.0
    discriminator_start: int = 10000
    discriminator_width: int = 64
    discriminator_depth: int = 3
    train_encoder: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._require(self.train_encoder or bool(self.start), "train_encoder", "true where `start` is none")


@dataclass(frozen=True)
class CLIPConfig(PicturesConfig):
    """What the CLIP pair's training is asked for.

    Attributes:
        tokenizer: a model directory that has one; "" is CLIP's own vocabulary.
        width, depth, heads, mlp_width: `CLIPTextEncoder`'s; without effect, as what follows, where `start` has them.
        image_width, image_depth, image_heads, image_mlp_width, patch_size, projection_dim: `CLIPImageEncoder`'s.
    """

    tokenizer: str = ""
    width: int = 512
    depth: int = 8
    heads: int = 8
    mlp_width: int = 2048
    image_width: int = 512
    image_depth: int = 8
    image_heads: int = 8
    image_mlp_width: int = 2048
    patch_size: int = 16
    projection_dim: int = 512


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """What latent diffusion's training is asked for. Its latents are those of the pictures' middles, made once.

    Attributes:
        autoencoder: a directory with an autoencoder; needed where `start` is "".
        text_encoder: a directory with a text encoder and its tokenizer; "" makes one of the sizes below.
        tokenizer, width, depth, heads, mlp_width: as `CLIPConfig`'s.
        train_text_encoder: whether it is trained along; otherwise its contexts are computed once.
        channels, blocks_per_level, attention, unet_heads, unet_groups: `UNet`'s.
        prediction: "eps", "v" or "x0"; `start`'s own where there is one.
        zero_terminal_snr: whether the last step is pure noise (Lin et al. 2023, arXiv:2305.08891); needs "v" or "x0".
        caption_dropout, loss_weight, offset_noise: see `DiffusionTraining`.
        flip: whether every other picture is mirrored, where its caption names no side.
        prior: sources of pictures of the subject's class, mixed half and half into each batch, so that the model
            does not forget them (Ruiz et al. 2023, eq. 2, arXiv:2208.12242); with `prior_weight`.
        prompts, num_steps, guidance_scale: of the samples.
        cache: where latents are kept; "" is beside the run's directory, DIR.cache.
    """

    autoencoder: str = ""
    text_encoder: str = ""
    tokenizer: str = ""
    width: int = 512
    depth: int = 6
    heads: int = 8
    mlp_width: int = 2048
    train_text_encoder: bool = True
    channels: list[int] = typing.cast(Any, (128, 256, 384))
    blocks_per_level: int = 1
    attention: list[bool] = typing.cast(Any, (False, True, True))
    unet_heads: int = 8
    unet_groups: int = 32
    prediction: str = "v"
    zero_terminal_snr: bool = True
    caption_dropout: float = 0.1
    loss_weight: str = "uniform"
    offset_noise: float = 0.0
    flip: bool = False
    prior: list[str] = typing.cast(Any, ())
    prior_weight: float = 1.0
    prompts: list[str] = typing.cast(Any, ())
    num_steps: int = 25
    guidance_scale: float = 5.0
    cache: str = ""

    def __post_init__(self):
        super().__post_init__()
        self._choose("prediction", "eps", "v", "x0")
        self._choose("loss_weight", "uniform", "min_snr")
        self._require(bool(self.start or self.autoencoder), "autoencoder", "a directory, where `start` is none")
        self._require(0 <= self.caption_dropout <= 1, "caption_dropout", "in [0, 1]")
        bad = self.zero_terminal_snr and self.prediction == "eps" and not self.start
        self._require(not bad, "prediction", "v or x0 where `zero_terminal_snr`")
        self._require(not self.prior or self.batch_size % 2 == 0, "batch_size", "even where there is a `prior`")
        self._require(not self.prior or self.max_ratio == 1, "max_ratio", "1 where there is a `prior`")


KINDS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderConfig,
    "clip": CLIPConfig,
    "diffusion": DiffusionConfig,
}


def read_config(kind: str, path: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """A kind's configuration: the file's values, and in their place those of `overrides`.

    Raises:
        ValueError: the file is no TOML, a name is unknown or missing, a value is of another type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"A configuration must be a TOML file. Received: {path} ({error}).") from error
    known = field_types(kind)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"A configuration of {kind} has the names {', '.join(known)}. Received: {', '.join(unknown)}.")
    values |= overrides
    for name, value in values.items():
        values[name] = _checked(name, value, known[name])
    missing = [f.name for f in fields(KINDS[kind]) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"A configuration must have {', '.join(f'`{name}`' for name in missing)}.")
    return KINDS[kind](**values)


def run_config(kind: str, directory: str | Path) -> Config:
    """A run's configuration, from its directory; names that are newer than the run are what they are by default.

    Raises:
        ValueError: `config.json` is not that of a run of this kind.
        FileNotFoundError: there is none.
    """
    known = field_types(kind)
    kept = read_json(Path(directory) / "config.json")
    return read_config(kind, None, {name: value for name, value in kept.items() if name in known})


def field_types(kind: str) -> dict[str, Any]:
    """The type of each name of a kind's configuration."""
    return typing.get_type_hints(KINDS[kind])


def defaults(kind: type[Config]) -> dict[str, Any]:
    """What each name is where nothing is said, of those that need not be said, as JSON says it."""
    return _plain({f.name: f.default for f in fields(kind) if f.default is not MISSING})


def as_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON says it."""
    return _plain(asdict(config))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _checked(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        values = value if isinstance(value, list | tuple) else [value]
        return [_checked(name, each, item) for each in values]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"`{name}` must be of type {kind.__name__}. Received: {name}={value!r}.")
    return value
