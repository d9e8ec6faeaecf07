"""KerasCV's Stable Diffusion: four HDF5 files, one for each network, as a source.

They name nothing that lasts, so position is all there is. Layers come in the model's order, which is that of our key
maps but for the UNet's beginning, where the first convolution stands between the timestep's two dense layers, by its
depth in the graph. Sizes are read from the arrays; heads, epsilons and activations, which no array tells, are those of
KerasCV 0.9 under Keras 3, and differ from everybody else's: every norm has 1e-5, and GELU is tanh's, in the UNet and in
the text encoder of SD 2.1. So the networks say what KerasCV's say, and a diffusers directory cannot hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
from latentdiff.checkpoints.diffusers import Component, key_map
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.h5_files import StoredLayer, open_layers
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

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (32, 32, 32, 32),
    "blocks_per_level": 2,
    "attention": (True, True, True, False),
    "heads": (8, 8, 8, 8),
    "transformer_depth": (1, 1, 1, 1),
    "context_dim": 768,
    "dense_projection": False,
    "groups": 32,
    "norm_epsilon": 1e-5,
    "entry_epsilon": 1e-5,
    "gelu": "tanh",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_attention": True,
}
_AUTOENCODER = {
    "channels": (32, 32, 32, 32),
    "blocks_per_level": 2,
    "latent_channels": 4,
    "image_channels": 3,
    "groups": 32,
    "norm_epsilon": 1e-5,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "mid_attention": True,
}
_TEXT_WIDTHS = {768: "quick_gelu", 1024: "gelu_tanh"}
_HEAD_WIDTH = 64  # of the text encoders and of SD 2.1's UNet; SD 1.x's has 8 heads everywhere
_LEAVES = ("kernel", "bias", "gamma", "beta", "embeddings")

Groups = dict[str, list[Entry]]  # a layer's name here -> its variables


def is_kerascv(path: Path) -> bool:
    """Whether `path` is a file named `.h5`, or a directory with one of KerasCV's names and no configuration."""
    if path.is_file():
        return path.suffix.lower() == ".h5"
    names = [name for published in FILES.values() for name in published]
    configured = any((path / name).exists() for name in ("model_index.json", "config.json"))
    return not configured and any((path / name).is_file() for name in names)


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
            self._files[_network_of(open_layers(path), path)] = path
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
        config = _CONFIGS[kind](networks)
        entries = key_map(kind, config)
        sources: dict[str, tuple[Entry, StoredTensor]] = {}
        for network in networks.values():
            sources |= _match(_layers_of(entries, network.name), network)
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

    def _open(self, name: str) -> _Network:
        path = self._files[name]
        layers = open_layers(path)
        found = _network_of(layers, path)
        if found != name:
            raise CheckpointError(f"`{path}` must be KerasCV's {name}. Received: its {found}.")
        return _Network(name, path, layers)


@dataclass(frozen=True)
class _Network:
    """One file: which network it is, and its layers."""

    name: str
    path: Path
    layers: list[StoredLayer]

    def shapes(self, groups: Groups) -> dict[str, tuple[int, ...]]:
        """The shapes by our paths, for a key map of the same layers and other sizes.

        Raises:
            CheckpointError: If there is another number of layers; those that are too many or too few are named.
        """
        absent = list(groups)[len(self.layers) :]
        surplus = [layer.name for layer in self.layers[len(groups) :]]
        if absent or surplus:
            raise CheckpointError(
                f"`{self.path}` must have the {len(groups)} layers of KerasCV's {self.name}. Received:"
                f" {len(self.layers)}; missing: {', '.join(absent) or 'none'};"
                f" left over: {', '.join(surplus) or 'none'}"
            )
        return {
            entry.path: tensor.shape
            for entries, layer in zip(groups.values(), self.layers, strict=True)
            for entry, tensor in zip(entries, layer.weights, strict=False)
        }

    def size(self, shapes: Mapping[str, tuple[int, ...]], path: str, axis: int) -> int:
        """One axis of an array, of at least 1."""
        shape = shapes.get(path, ())
        if not shape or not -len(shape) <= axis < len(shape) or shape[axis] < 1:
            raise CheckpointError(f"`{self.path}` is no {self.name} of KerasCV: {path} is {shape} in it.")
        return shape[axis]


def _network_of(layers: list[StoredLayer], path: Path) -> str:
    """Which of the four networks begins like that."""
    first = [weight.shape for weight in layers[0].weights] if layers else []
    ranks = [len(shape) for shape in first]
    if ranks == [2, 2]:
        return "text_encoder"
    if ranks == [2, 1]:
        return "unet"
    if ranks == [4, 1] and first[0][:2] in ((1, 1), (3, 3)):
        return "decoder" if first[0][0] == 1 else "encoder"
    raise CheckpointError(
        f"`{path}` is none of KerasCV's networks: its first layer has arrays of {first or 'no'} shape."
    )


def _layers_of(entries: list[Entry], network: str) -> Groups:
    """The key map of a network, layer by layer, in KerasCV's order."""
    within = f"{network}/" if network in ("encoder", "decoder") else ""

    def layer(entry: Entry) -> str:
        name = entry.path.removeprefix(within).partition("/")[0]
        return "embeddings" if name.endswith("_embedding") else name

    own = [entry for entry in entries if entry.path.startswith(within)]
    groups = {name: list(group) for name, group in groupby(own, layer)}
    if network == "unet":
        groups = {name: groups[name] for name in ("time_mlp_1", "conv_in")} | groups
    return groups


def _unet_config(networks: Mapping[str, _Network]) -> dict[str, Any]:
    unet = networks["unet"]
    shapes = unet.shapes(_layers_of(key_map("unet", _UNET), "unet"))
    channels = tuple(unet.size(shapes, f"down_{i}_resnet_0/conv_1/bias", 0) for i in range(4))
    dense_projection = len(shapes.get("mid_attention/proj_in/kernel", ())) == 2
    _check_channels(channels, _HEAD_WIDTH if dense_projection else _UNET["groups"], unet.path)
    return {
        **_UNET,
        "in_channels": unet.size(shapes, "conv_in/kernel", 2),
        "out_channels": unet.size(shapes, "conv_out/bias", 0),
        "channels": channels,
        "heads": tuple(width // _HEAD_WIDTH for width in channels) if dense_projection else _UNET["heads"],
        "context_dim": unet.size(shapes, "mid_attention/block_0/cross_attention/key/kernel", 0),
        "dense_projection": dense_projection,
    }


def _autoencoder_config(networks: Mapping[str, _Network]) -> dict[str, Any]:
    encoder = networks["encoder"]
    shapes = encoder.shapes(_layers_of(key_map("autoencoder", _AUTOENCODER), "encoder"))
    channels = tuple(encoder.size(shapes, f"encoder/down_{i}_resnet_0/conv_1/bias", 0) for i in range(4))
    _check_channels(channels, _AUTOENCODER["groups"], encoder.path)
    networks["decoder"].shapes(_layers_of(key_map("autoencoder", _AUTOENCODER), "decoder"))
    return {
        **_AUTOENCODER,
        "channels": channels,
        "latent_channels": encoder.size(shapes, "encoder/quant_conv/bias", 0) // 2,
        "image_channels": encoder.size(shapes, "encoder/conv_in/kernel", 2),
    }


def _text_encoder_config(networks: Mapping[str, _Network]) -> dict[str, Any]:
    text = networks["text_encoder"]
    config = {
        "vocabulary_size": 1,
        "context_length": 1,
        "width": 1,
        "depth": max(len(text.layers) - 2, 0),  # beside the embeddings and the final norm
        "heads": 1,
        "mlp_width": 1,
        "activation": "quick_gelu",
        "norm_epsilon": 1e-5,
    }
    shapes = text.shapes(_layers_of(key_map("text_encoder", config), "text_encoder"))
    width = text.size(shapes, "token_embedding/embeddings", 1)
    if width not in _TEXT_WIDTHS:
        raise CheckpointError(
            f"`{text.path}`: KerasCV's text encoders are {' or '.join(map(str, _TEXT_WIDTHS))} wide. Received: {width}"
        )
    return {
        **config,
        "vocabulary_size": text.size(shapes, "token_embedding/embeddings", 0),
        "context_length": text.size(shapes, "position_embedding/embeddings", 0),
        "width": width,
        "heads": width // _HEAD_WIDTH,
        "mlp_width": 4 * width,
        "activation": _TEXT_WIDTHS[width],
    }


_CONFIGS = {"unet": _unet_config, "autoencoder": _autoencoder_config, "text_encoder": _text_encoder_config}


def _check_channels(channels: tuple[int, ...], divisor: int, path: Path) -> None:
    if any(width % divisor for width in channels):
        raise CheckpointError(f"`{path}`: channels must be multiples of {divisor}. Received: {channels}")


def _match(groups: Groups, network: _Network) -> dict[str, tuple[Entry, StoredTensor]]:
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
