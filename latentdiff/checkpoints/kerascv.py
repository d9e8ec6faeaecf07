"""KerasCV's Stable Diffusion: four HDF5 files, one for each network, as a source.

They name nothing that lasts, so position is all there is. KerasCV computes unlike everybody else: every norm has an
epsilon of 1e-5, and GELU is tanh's, in the UNet and in the text encoder of SD 2.1. So do the networks that come from
its files, and a diffusers directory cannot hold them as they are.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
from latentdiff.checkpoints.diffusers import Component, key_map
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.h5_files import open_layers
from latentdiff.checkpoints.kerascv_networks import CONFIGS, Groups, Network, layers_of, network_of
from latentdiff.checkpoints.key_map import Entry, Weights, as_dtype
from latentdiff.checkpoints.safetensors_files import StoredTensor

# The names that KerasCV publishes: SD 1.4's and SD 2.1's; the autoencoder is one and the same.
FILES = {
    "text_encoder": ("kcv_encoder.h5", "text_encoder_v2_1.h5"),
    "unet": ("kcv_diffusion_model.h5", "diffusion_model_v2_1.h5"),
    "encoder": ("vae_encoder.h5",),
    "decoder": ("kcv_decoder.h5",),
}
# The halves of a kind.
HALVES = {"text_encoder": ("text_encoder",), "unet": ("unet",), "autoencoder": ("encoder", "decoder")}

# DDIM from the last timestep down to 0, both told to the network, ending clean. Both ages predict eps, and pad with the
# end token.
SETTINGS = SamplerSettings(sampler="ddim", spacing="linspace", steps_offset=0, set_alpha_to_one=True)

# What Stable Diffusion was trained with, and diffusers computes with, where KerasCV differs.
_TRAINED = {
    "unet": {"entry_epsilon": {1e-5: 1e-6}, "gelu": {"tanh": "exact"}},
    "autoencoder": {"norm_epsilon": {1e-5: 1e-6}},
    "text_encoder": {"activation": {"gelu_tanh": "gelu"}},
}
_LEAVES = ("kernel", "bias", "gamma", "beta", "embeddings")


def is_kerascv(path: Path) -> bool:
    """Whether `path` is a file named `.h5`, or a directory with one of KerasCV's names and no configuration."""
    if path.is_file():
        return path.suffix.lower() == ".h5"
    names = [name for published in FILES.values() for name in published]
    configured = any((path / name).exists() for name in ("model_index.json", "config.json"))
    return not configured and any((path / name).is_file() for name in names)


def as_trained(component: Component) -> Component:
    """A component of KerasCV's whose configuration is Stable Diffusion's own, which a diffusers directory can say.

    A warning says what the network then computes otherwise than in KerasCV.
    """
    config = component.config
    trained = _TRAINED[component.kind]
    changes = {name: values[config[name]] for name, values in trained.items() if config[name] in values}
    if changes:
        theirs = ", ".join(f"{name}={config[name]!r}" for name in changes)
        ours = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        warnings.warn(
            f"KerasCV's {component.kind} computes with {theirs}. What is written says {ours}, as Stable Diffusion was"
            " trained, and its numbers differ a little from KerasCV's.",
            stacklevel=3,  # the caller of `convert`
        )
    return replace(component, config={**config, **changes})


class KerasCV:
    """See `sources.Source`; the arguments are those of `sources.open_source`.

    A directory's files are found by their published names, a single file is told by its content.
    """

    form = "KerasCV weights"

    def __init__(self, path: Path, *, ema: bool = False, prediction: str | None = None):
        if ema:
            raise CheckpointError(f"KerasCV's files hold one kind of weights. Received: ema=True for `{path}`.")
        self.path = path
        self._prediction = prediction
        self._files: dict[str, Path] = {}
        if path.is_file():
            self._files[network_of(open_layers(path), path)] = path
            return
        for network, names in FILES.items():
            present = [name for name in names if (path / name).is_file()]
            if len(present) > 1:
                raise CheckpointError(
                    f"A directory must hold one model. Received: {' and '.join(present)} in `{path}`. Move or link one"
                    " model's files, with kcv_decoder.h5 and vae_encoder.h5, to a directory of its own."
                )
            if present:
                self._files[network] = path / present[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind, halves in HALVES.items() if all(half in self._files for half in halves))

    def component(self, kind: str, *, dtype: str | np.dtype | None = None, variant: str | None = None) -> Component:
        target = as_dtype(dtype)
        if kind not in HALVES:
            raise ValueError(f"`kind` must be one of {', '.join(HALVES)}. Received: kind={kind!r}")
        if variant is not None:
            raise ValueError(f"KerasCV's files have no variants. Received: variant={variant!r}")
        self._check_present([kind])
        networks = {half: self._open(half) for half in HALVES[kind]}
        config = CONFIGS[kind](networks)
        entries = key_map(kind, config)
        sources: dict[str, tuple[Entry, StoredTensor]] = {}
        for network in networks.values():
            sources |= _match(layers_of(entries, network.name), network)
        return Component(kind, self.path, config, {}, Weights(sources, target), ())

    def settings(self) -> SamplerSettings:
        self._check_present(list(HALVES))
        return replace(SETTINGS, prediction=self._prediction) if self._prediction else SETTINGS

    def tokenizer(self) -> dict[str, Any]:
        return clip_tokenizer()

    def sample_size(self) -> tuple[int, int] | None:
        return None

    def _check_present(self, kinds: list[str]) -> None:
        missing = [half for kind in kinds for half in HALVES[kind] if half not in self._files]
        if missing:
            names = ", ".join(" or ".join(FILES[half]) for half in missing)
            place = f"`{self.path}`" + (f", {next(iter(self._files))}'s file" if self.path.is_file() else "")
            raise FileNotFoundError(
                f"KerasCV keeps the {' and '.join(kinds)} in files of one directory. {place} lacks: {names}"
            )

    def _open(self, name: str) -> Network:
        path = self._files[name]
        layers = open_layers(path)
        found = network_of(layers, path)
        if found != name:
            raise CheckpointError(f"`{path}` must be KerasCV's {name}. Received: its {found}.")
        return Network(name, path, layers)


def _match(groups: Groups, network: Network) -> dict[str, tuple[Entry, StoredTensor]]:
    """Each variable with the array at its place.

    Raises:
        CheckpointError: If arrays are missing, left over, misshapen or of another name; one error lists them all.
    """
    problems: list[str] = []
    sources: dict[str, tuple[Entry, StoredTensor]] = {}
    for (name, entries), layer in zip(groups.items(), network.layers, strict=True):
        if len(entries) != len(layer.weights):
            problems.append(f"arrays: {layer.name} ({name}) must have {len(entries)}, has {len(layer.weights)}")
            continue
        for entry, tensor in zip(entries, layer.weights, strict=True):
            if entry.layout == "dense" and tensor.shape == (
                1,
                1,
                *entry.shape,
            ):  # a 1 x 1 convolution there, dense here
                tensor = replace(tensor, shape=entry.shape)
            if tensor.shape != entry.shape:
                problems.append(f"shape: {tensor.name} ({entry.path}) must be {entry.shape}, is {tensor.shape}")
            said, wanted = (text.rpartition("/")[2].partition(":")[0] for text in (tensor.name, entry.path))
            if said in _LEAVES and said != wanted:
                problems.append(f"place: {tensor.name} ({entry.path}) must be a {wanted}")
            sources[entry.path] = (replace(entry, layout="same"), tensor)
    if problems:
        raise CheckpointError(
            f"`{network.path}` must hold KerasCV's {network.name}. {len(problems)} things do not fit:\n  "
            + "\n  ".join(problems)
        )
    return sources
