"""KerasCV's networks: which one a file holds, its layers in KerasCV's order, and its configuration from its shapes.

Layers come in the model's order, which is that of our key maps but for the UNet's beginning, where the first
convolution stands between the timestep's two dense layers, by its depth in the graph. What no array tells, heads,
epsilons and activations, is that of KerasCV 0.9 under Keras 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.diffusers import key_map
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.h5_files import StoredLayer
from latentdiff.checkpoints.key_map import Entry

Groups = dict[str, list[Entry]]  # a layer's name here -> its variables

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


@dataclass(frozen=True)
class Network:
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


def network_of(layers: list[StoredLayer], path: Path) -> str:
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


def layers_of(entries: list[Entry], network: str) -> Groups:
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


def _unet_config(networks: Mapping[str, Network]) -> dict[str, Any]:
    unet = networks["unet"]
    shapes = unet.shapes(layers_of(key_map("unet", _UNET), "unet"))
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


def _autoencoder_config(networks: Mapping[str, Network]) -> dict[str, Any]:
    encoder = networks["encoder"]
    shapes = encoder.shapes(layers_of(key_map("autoencoder", _AUTOENCODER), "encoder"))
    channels = tuple(encoder.size(shapes, f"encoder/down_{i}_resnet_0/conv_1/bias", 0) for i in range(4))
    _check_channels(channels, _AUTOENCODER["groups"], encoder.path)
    networks["decoder"].shapes(layers_of(key_map("autoencoder", _AUTOENCODER), "decoder"))
    return {
        **_AUTOENCODER,
        "channels": channels,
        "latent_channels": encoder.size(shapes, "encoder/quant_conv/bias", 0) // 2,
        "image_channels": encoder.size(shapes, "encoder/conv_in/kernel", 2),
    }


def _text_encoder_config(networks: Mapping[str, Network]) -> dict[str, Any]:
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
    shapes = text.shapes(layers_of(key_map("text_encoder", config), "text_encoder"))
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


CONFIGS = {"unet": _unet_config, "autoencoder": _autoencoder_config, "text_encoder": _text_encoder_config}


def _check_channels(channels: tuple[int, ...], divisor: int, path: Path) -> None:
    if any(width % divisor for width in channels):
        raise CheckpointError(f"`{path}`: channels must be multiples of {divisor}. Received: {channels}")
