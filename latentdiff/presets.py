"""Names, directories and files -> networks with their weights, and back; `latentdiff.checkpoints` knows the files."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import numpy as np

from latentdiff.backend import assign, default_dtype, on_cpu, release, to_numpy
from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints import diffusers, diffusers_pipeline
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import CheckpointError, replaced_directory
from latentdiff.checkpoints.key_map import DTYPES as ARRAY_DTYPES
from latentdiff.checkpoints.key_map import LazyArrays
from latentdiff.checkpoints.sources import Source, check_fit, open_source
from latentdiff.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    schedule_from_betas,
    with_zero_terminal_snr,
)
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.layers import blank_weights
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet

DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
_PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24}  # bits of the significand
READERS = 2  # threads that turn a file's tensors to our layout
SAMPLE_SIZE = 64  # latents of models whose files do not say: Stable Diffusion's

_NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "unet": UNet,
    "autoencoder": Autoencoder,
    "text_encoder": CLIPTextEncoder,
}
_CLASSES = {**_NETWORKS, "image_encoder": CLIPImageEncoder}


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts.

    Attributes:
        tokenizer, text_encoder, unet, autoencoder: the arrow, in its order.
        settings: schedule, prediction and sampler.
        sample_size: (h, w) of the latents that the UNet was trained on.
        files: of "text_encoder", "unet" and "autoencoder" those that hold no weights, and where these are; see `fill`.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    autoencoder: Autoencoder
    settings: SamplerSettings
    sample_size: tuple[int, int]
    files: Mapping[str, diffusers.Component] = field(default_factory=dict)


def load_pipeline(
    preset: str | os.PathLike,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    free: Collection[str] = (),
) -> Parts:
    """The parts of a pipeline.

    Args:
        preset: a name in `weights/`, a pipeline's directory, or a single `.safetensors` file of LDM's layout.
        dtype: what the networks hold and compute in, one of `DTYPES`; None chooses by the device.
        variant: of the weights' files, for example "fp16", which every network must have; None takes the plain files,
            or the only variant that there is.
        ema: whether a single file's averaged weights are read, where it holds both kinds.
        prediction: "eps", "v" or "x0", what the UNet was trained to predict, where the files do not say it or say it
            wrongly.
        free: the networks that are left without weights, of "text_encoder", "unet" and "autoencoder".

    Raises:
        ValueError: the name or the dtype is unknown, or the files are malformed or ask for what cannot be done here.
        FileNotFoundError: a file is missing.
    """
    dtype = chosen_dtype(dtype)
    source = open_source(resolve_preset(preset, variant=variant), ema=ema, prediction=prediction)
    settings, _ = settings_of(source)
    tokenizer = CLIPTokenizer(**source.tokenizer())
    # All files are opened and checked before the first network is built.
    held = held_dtype(dtype)
    components = {kind: source.component(kind, dtype=held, variant=variant) for kind in _NETWORKS}
    check_fit({kind: component.config for kind, component in components.items()}, tokenizer.vocabulary_size)
    longest = components["text_encoder"].config["context_length"]
    if tokenizer.context_length > longest:
        tokenizer = CLIPTokenizer(**{**source.tokenizer(), "context_length": longest})
    files = {kind: component for kind, component in components.items() if kind in free}
    networks = {}
    for kind, component in components.items():
        networks[kind] = _emptied(component, dtype) if kind in files else network_of(component, dtype)
        if kind == "autoencoder" and kind in files:
            for path in component.weights:  # are used last; what is wrong with them is told first
                component.weights[path]
    return Parts(tokenizer, settings=settings, sample_size=sample_size_of(source), files=files, **networks)


def load_unet(
    preset: str | os.PathLike, dtype: str | None = None, *, variant: str | None = None, ema: bool = False
) -> UNet:
    """The UNet of a pipeline, or of a directory or a file of its own. Arguments and errors as `load_pipeline`'s."""
    return _load("unet", preset, dtype, variant, ema)  # pyright: ignore[reportReturnType]


def load_autoencoder(
    preset: str | os.PathLike,
    norm_epsilon: float | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    ema: bool = False,
) -> Autoencoder:
    """The autoencoder of a pipeline, or of a directory or a file of its own. Raises as `load_pipeline`.

    Args:
        preset: a name in `weights/`, a directory, or a single file.
        norm_epsilon: another epsilon of its norms than the 1e-6 of diffusers' files; the documents' code has 1e-5.
        dtype, variant, ema: as for `load_pipeline`.
    """
    changes = {} if norm_epsilon is None else {"norm_epsilon": norm_epsilon}
    return _load("autoencoder", preset, dtype, variant, ema, **changes)  # pyright: ignore[reportReturnType]


def load_text_encoder(
    preset: str | os.PathLike, dtype: str | None = None, *, variant: str | None = None
) -> CLIPTextEncoder:
    """The text encoder of a pipeline, or of a CLIPModel's directory, or of a directory or a file of its own.

    Raises as `load_pipeline`.
    """
    return _load("text_encoder", preset, dtype, variant)  # pyright: ignore[reportReturnType]


def load_tokenizer(preset: str | os.PathLike) -> CLIPTokenizer:
    """The tokenizer of a pipeline, or of a directory of its own. Raises as `load_pipeline`."""
    return CLIPTokenizer(**open_source(resolve_preset(preset, ["tokenizer"])).tokenizer())


def save_pipeline(
    parts: Parts,
    directory: str | os.PathLike,
    dtype: str | None = "float32",
    overwrite: bool = False,
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a diffusers directory, which appears whole or not at all.

    Args:
        parts: what is written.
        directory: the pipeline's directory.
        dtype: of the files: "float32", "float16" or "bfloat16"; None is what each weight is held in. Files are as exact
            as the weights are held: those of `load_pipeline` in bfloat16 are rounded, and a warning says so where the
            files are wider.
        overwrite: whether an existing model directory may be replaced.
        max_shard_size: bytes of a weights file, or "2GB" and the like; larger networks are written in shards with an
            index. None writes one file for each network.

    Raises:
        FileExistsError: the directory has files and `overwrite` is false.
        ValueError: diffusers cannot express the configuration, there is no such dtype or size, or a weight is not
            finite in `dtype`.
    """
    networks = {kind: getattr(parts, kind) for kind in _NETWORKS}
    details = diffusers_pipeline.component_details(
        parts.sample_size,
        parts.autoencoder.factor,
        parts.tokenizer.start_id,
        parts.tokenizer.end_id,
        parts.tokenizer.pad_id,
    )
    components = {
        kind: diffusers.Component(
            kind,
            Path(directory),
            network.config,
            details[kind],
            HeldArrays(network),
            (),
        )
        for kind, network in networks.items()
    }
    diffusers_pipeline.check_pipeline(components, dtype, max_shard_size)
    warn_of_rounding(networks.values(), dtype, stacklevel=4)  # the caller of `save_to_preset`
    with replaced_directory(directory, overwrite) as fresh:
        diffusers_pipeline.write_pipeline(fresh, components, parts.settings, dtype, max_shard_size)
        parts.tokenizer.save(fresh / "tokenizer")


def warn_of_rounding(networks: Iterable[keras.Model], dtype: str | None, stacklevel: int) -> None:
    """Warns where files of `dtype` would be wider than the weights that they are made of."""
    held = {keras.backend.standardize_dtype(v.dtype) for net in networks for _, v in named_variables(net)}
    precision = 0 if dtype is None else _PRECISION[dtype]
    narrower = sorted(held & {name for name, bits in _PRECISION.items() if bits < precision})
    if narrower:
        warnings.warn(
            f"{dtype} files will hold weights that were rounded to {', '.join(narrower)}. "
            'To keep them whole, open the model with dtype="float32" before it is saved.',
            stacklevel=stacklevel,
        )


def settings_of(source: Source) -> tuple[SamplerSettings, Schedule]:
    """Sampler, prediction and the rest that a source says, and the schedule that it stands for.

    Raises:
        FileNotFoundError, CheckpointError: it is no whole pipeline, or describes no schedule.
    """
    settings = source.settings()
    try:
        return settings, make_schedule(settings)
    except ValueError as error:
        raise CheckpointError(f"`{source.path}` must describe a schedule. {error}") from error


def sample_size_of(source: Source) -> tuple[int, int]:
    """(h, w) of the latents that a source's UNet was trained on; Stable Diffusion's where no file says it."""
    return source.sample_size() or (SAMPLE_SIZE, SAMPLE_SIZE)


def make_schedule(settings: SamplerSettings) -> Schedule:
    """The schedule that a directory's settings stand for.

    Raises:
        ValueError: a beta is out of range, or there are too few of them.
    """
    T = settings.num_timesteps
    if settings.schedule == "betas":
        schedule = schedule_from_betas(settings.betas or ())
    elif settings.schedule == "cosine":
        schedule = cosine_schedule(T)
    else:
        make = linear_schedule if settings.schedule == "linear" else scaled_linear_schedule
        schedule = make(T, settings.beta_start, settings.beta_end)
    return with_zero_terminal_snr(schedule) if settings.zero_terminal_snr else schedule


def named_variables(network: keras.Model) -> Iterator[tuple[str, Any]]:
    """(path, variable) of a network; the autoencoder's paths begin with "encoder/" or "decoder/"."""
    if isinstance(network, Autoencoder):
        for half in (network.encoder, network.decoder):
            yield from ((f"{half.name}/{variable.path}", variable) for variable in half.variables)
    else:
        yield from ((variable.path, variable) for variable in network.variables)


class HeldArrays(LazyArrays):
    """A network's variables as arrays, each copied when it is asked for."""

    def __init__(self, network: keras.Model):
        self._network = network

    @cached_property
    def _variables(self) -> dict[str, Any]:
        return dict(named_variables(self._network))

    def __getitem__(self, path: str) -> np.ndarray:
        return to_numpy(self._variables[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self._variables[path].shape)

    def dtype(self, path: str) -> np.dtype:
        return ARRAY_DTYPES[keras.backend.standardize_dtype(self._variables[path].dtype)]


def _load(
    kind: str, preset: str | os.PathLike, dtype: str | None, variant: str | None, ema: bool = False, **changes: Any
) -> keras.Model:
    dtype = chosen_dtype(dtype)
    source = open_source(resolve_preset(preset, [kind], variant), ema=ema)
    component = source.component(kind, dtype=held_dtype(dtype), variant=variant)
    return network_of(component, dtype, **changes)


def chosen_dtype(dtype: str | None) -> str:
    """The policy that is asked for, or the device's."""
    if dtype is None:
        return default_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}.")
    return dtype


def held_dtype(dtype: str) -> str:
    """What a policy's variables are held in; weights are read as that, and checked to fit it."""
    return keras.DTypePolicy(dtype).variable_dtype


def network_of(component: diffusers.Component, dtype: str, **changes: Any) -> keras.Model:
    """The network of a component's kind with its weights, whose configuration `changes` changes."""
    # Where variables hold nothing until they are assigned, no array that waits is a second one.
    ahead = len(component.weights) if keras.backend.backend() == "tensorflow" and on_cpu() else READERS
    with _reading(component.weights, ahead) as arrays:
        network = _unfilled(component, dtype, **changes)
        _assign(network, component.weights, arrays)
    return network


def _unfilled(component: diffusers.Component, dtype: str, **changes: Any) -> keras.Model:
    with blank_weights():
        return _CLASSES[component.kind](**{**component.config, **changes}, dtype=dtype)


def _emptied(component: diffusers.Component, dtype: str) -> keras.Model:
    network = _unfilled(component, dtype)
    release(network.variables)
    return network


def fill(network: keras.Model, component: diffusers.Component) -> None:
    """Gives a network the weights of a component."""
    with _reading(component.weights, READERS) as arrays:
        _assign(network, component.weights, arrays)


def _assign(network: keras.Model, weights: Mapping[str, Any], arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    variables = dict(named_variables(network))
    if variables.keys() != weights.keys():
        differing = sorted(variables.keys() ^ weights.keys())
        raise ValueError(f"Every variable must have one array in the file. These do not: {', '.join(differing)}.")
    for path, array in arrays:
        assign(variables[path], array)


@contextmanager
def _reading(weights: Mapping[str, np.ndarray], ahead: int) -> Iterator[Iterator[tuple[str, np.ndarray]]]:
    """(path, array) of a file, of which other threads make up to `ahead` in the time of a network's layers."""
    pool, paths = ThreadPoolExecutor(READERS), iter(weights)

    def submitted(count: int) -> list[tuple[str, Future[np.ndarray]]]:
        return [(path, pool.submit(weights.__getitem__, path)) for path in islice(paths, count)]

    def taken(waiting: deque[tuple[str, Future[np.ndarray]]]) -> Iterator[tuple[str, np.ndarray]]:
        while waiting:
            path, future = waiting.popleft()
            array = future.result()
            waiting.extend(submitted(1))
            yield path, array

    try:
        yield taken(deque(submitted(ahead)))
    finally:
        pool.shutdown(cancel_futures=True)


def in_policy(network: Any, policy: str) -> Any:
    """A network of this package with the same weights, computing in another dtype policy: itself, or a copy."""
    if network.get_config()["dtype"] == policy:
        return network
    copy = blank_copy(network, policy)
    for variable, other in zip(copy.variables, network.variables, strict=True):
        variable.assign(to_numpy(other).astype("float32"))
    return copy


def blank_copy(network: Any, policy: str) -> Any:
    """A network of this package with the same configuration but for the dtype policy, and no weights yet."""
    with blank_weights():
        return type(network)(**{**network.get_config(), "dtype": policy})
