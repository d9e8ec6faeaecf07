"""What an LDM file's networks are, from the names and shapes of their tensors.

Shapes do not say everything. Stable Diffusion's own numbers stand for the rest: 32 groups in every norm; 8 heads in the
UNet of SD 1.x, heads 64 wide in that of SD 2.x, known by its dense projections, and in both text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from latentdiff.checkpoints.diffusers_autoencoder import NORM_EPSILON
from latentdiff.checkpoints.files import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

GROUPS = 32
HEADS = 8  # of a UNet of SD 1.x
HEAD_WIDTH = 64  # of a UNet of SD 2.x, and of the text encoders
SCALING_FACTOR = 0.18215
OPEN_CLIP_LAYERS = 23  # of the file's 24: Stable Diffusion 2.x takes the context from the layer before the last


def unet_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """UNet's keyword arguments; `shapes` are those of the names "input_blocks.0.0.weight", ...

    Raises:
        CheckpointError: If a tensor that would tell is missing, or the UNet is none that can be built here.
    """
    first = _shape(shapes, "input_blocks.0.0.weight", 4, source)
    levels: list[list[tuple[int, int]]] = [[]]  # (outputs, depth of the transformer) of each level's blocks
    for n in count(1):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{n}.0.out_layers.3.weight" in shapes:
            outputs = _shape(shapes, f"input_blocks.{n}.0.out_layers.3.weight", 4, source)[0]
            levels[-1].append((outputs, _depth(shapes, f"input_blocks.{n}.1")))
        else:
            break
    if not all(level and level == [level[0]] * len(levels[0]) for level in levels):
        raise CheckpointError(f"The levels of a UNet must have equal blocks. Received: {levels} in `{source}`.")
    channels = tuple(level[0][0] for level in levels)
    depths = [level[0][1] for level in levels]
    middle = _depth(shapes, "middle_block.1")
    if not middle or depths[-1] not in (0, middle):
        raise CheckpointError(
            "The middle of a UNet must attend as deeply as its last level. Received: transformers of"
            f" {middle} and {depths[-1]} blocks in `{source}`."
        )
    to_key = _shape(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2, source)
    dense = len(_shape(shapes, "middle_block.1.proj_in.weight", None, source)) == 2
    _check_groups(channels, source)
    return {
        "in_channels": first[1],
        "out_channels": _shape(shapes, "out.2.weight", 4, source)[0],
        "channels": channels,
        "blocks_per_level": len(levels[0]),
        "attention": tuple(depth > 0 for depth in depths),
        "heads": tuple(_heads(width, source) if dense else HEADS for width in channels),
        "transformer_depth": (*(max(depth, 1) for depth in depths[:-1]), middle),
        "context_dim": to_key[1],
        "dense_projection": dense,
        "groups": GROUPS,
        "norm_epsilon": 1e-5,
        "entry_epsilon": 1e-6,
        "gelu": "exact",
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
        "mid_attention": True,
    }


def autoencoder_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """Autoencoder's keyword arguments; `shapes` are those of the names "encoder.conv_in.weight", ...

    Raises:
        CheckpointError: If a tensor that would tell is missing, or the autoencoder is none that can be built here.
    """
    levels = _length(shapes, "encoder.down.{}.block.0.conv1.weight")
    channels = tuple(_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4, source)[0] for i in range(levels))
    if not channels:
        raise CheckpointError(f"An autoencoder must have levels. Received: no `encoder.down.0.block.0` in `{source}`.")
    _check_groups(channels, source)
    return {
        "channels": channels,
        "blocks_per_level": _length(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4, source)[1],
        "image_channels": _shape(shapes, "encoder.conv_in.weight", 4, source)[1],
        "groups": GROUPS,
        "norm_epsilon": NORM_EPSILON,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": 0.0,
        "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def clip_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """CLIPTextEncoder's keyword arguments; `shapes` are those of transformers' names, "embeddings. ...".

    Raises:
        CheckpointError: If a tensor that would tell is missing.
    """
    return _text_config(
        _shape(shapes, "embeddings.token_embedding.weight", 2, source),
        _shape(shapes, "embeddings.position_embedding.weight", 2, source),
        _shape(shapes, "encoder.layers.0.mlp.fc1.weight", 2, source),
        _length(shapes, "encoder.layers.{}.mlp.fc1.weight"),
        "quick_gelu",
        source,
    )


def open_clip_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """CLIPTextEncoder's keyword arguments; `shapes` are those of open_clip's names, "transformer.resblocks. ...".

    Raises:
        CheckpointError: If a tensor that would tell is missing.
    """
    return _text_config(
        _shape(shapes, "token_embedding.weight", 2, source),
        _shape(shapes, "positional_embedding", 2, source),
        _shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2, source),
        min(_length(shapes, "transformer.resblocks.{}.mlp.c_fc.weight"), OPEN_CLIP_LAYERS),
        "gelu",
        source,
    )


def _text_config(
    tokens: tuple[int, ...], positions: tuple[int, ...], mlp: tuple[int, ...], depth: int, activation: str, source: str
) -> dict[str, Any]:
    return {
        "vocabulary_size": tokens[0],
        "context_length": positions[0],
        "width": tokens[1],
        "depth": depth,
        "heads": _heads(tokens[1], source),
        "mlp_width": mlp[0],
        "activation": activation,
        "norm_epsilon": 1e-5,
    }


def _shape(shapes: Shapes, name: str, rank: int | None, source: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"`{source}` must have all parts of its networks. It lacks: {name}")
    if (rank is not None and len(shape) != rank) or not all(0 < size < 2**24 for size in shape):
        raise CheckpointError(
            f"`{name}` must have {rank or 'its'} sizes, none of them 0. Received: {shape} in `{source}`."
        )
    return shape


def _length(shapes: Shapes, pattern: str) -> int:
    """How many names there are of a pattern with a number in it, from 0 on without a gap."""
    return next(n for n in count() if pattern.format(n) not in shapes)


def _depth(shapes: Shapes, transformer: str) -> int:
    return _length(shapes, transformer + ".transformer_blocks.{}.norm1.weight")


def _heads(width: int, source: str) -> int:
    heads = max(1, width // HEAD_WIDTH)
    if width % heads:
        raise CheckpointError(f"Heads must be {HEAD_WIDTH} wide. Received: a width of {width} in `{source}`.")
    return heads


def _check_groups(channels: tuple[int, ...], source: str) -> None:
    if any(width % GROUPS for width in channels):
        raise CheckpointError(
            f"Channels must be multiples of the {GROUPS} groups of LDM's norms. Received: {channels} in `{source}`."
        )
