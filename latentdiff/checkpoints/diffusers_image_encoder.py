"""transformers' CLIPVisionModelWithProjection: its configuration as ours and back, its preprocessing, and its keys.

Mean and deviation of the images are numbers of the network here and lie in `preprocessor_config.json` there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentdiff.checkpoints.diffusers_layers import clip_layer, dense, norm
from latentdiff.checkpoints.diffusers_text_encoder import ACTIVATIONS, written_activation
from latentdiff.checkpoints.fields import Fields, require_arguments
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import Entry

ARGUMENTS = (
    "image_size",
    "patch_size",
    "width",
    "depth",
    "heads",
    "mlp_width",
    "projection_dim",
    "activation",
    "norm_epsilon",
    "image_mean",
    "image_std",
)
PREFIX = "vision_model."

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
}
_PREPROCESSOR_DEFAULTS = {
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_BICUBIC = 3  # Pillow's number


def read_config(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """CLIPImageEncoder's keyword arguments, less those of `read_preprocessor`, from transformers' fields.

    Raises:
        CheckpointError: If a field is wrong, or asks for what `CLIPImageEncoder` cannot do.
    """
    fields = Fields(values, _DEFAULTS, source)
    config = {
        "image_size": fields.count("image_size", high=2**14),
        "patch_size": fields.count("patch_size", high=2**12),
        "width": fields.count("hidden_size", high=2**16),
        "depth": fields.count("num_hidden_layers", high=256),
        "heads": fields.count("num_attention_heads", high=2**10),
        "mlp_width": fields.count("intermediate_size", high=2**18),
        "projection_dim": fields.count("projection_dim", high=2**16),
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "norm_epsilon": fields.number("layer_norm_eps", high=1.0),
    }
    fields.require("model_type", "clip_vision_model")
    fields.require("num_channels", 3)
    fields.require("quantization_config", None)
    fields.check_divides("num_attention_heads", [config["heads"]], [config["width"]])
    if config["image_size"] % config["patch_size"]:
        received = f"{config['patch_size']} for {config['image_size']} in `{source}`"
        raise CheckpointError(f"`patch_size` must divide `image_size`. Received: {received}")
    # As in the text encoder's file, fields of generation settings may be there, and more with each version.
    fields.finish(strict=False)
    return config


def read_preprocessor(values: Mapping[str, Any], source: str) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of `preprocessor_config.json`; CLIP's own where it does not say them.

    Raises:
        CheckpointError: If a field is wrong, or pixels are scaled otherwise than from 0..255 to 0..1.
    """
    fields = Fields(values, _PREPROCESSOR_DEFAULTS, source)
    fields.require("do_rescale", True)
    if not math.isclose(fields.number("rescale_factor"), 1 / 255, rel_tol=1e-6):
        fields.refuse("rescale_factor", fields.take("rescale_factor"), "1/255")
    mean, std = (_three_numbers(fields, name) for name in ("image_mean", "image_std"))
    fields.finish(strict=False)
    if not fields.flag("do_normalize"):
        return {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    if min(std) <= 0:
        raise CheckpointError(f"`image_std` must be positive. Received: image_std={std} in `{source}`")
    return {"image_mean": mean, "image_std": std}


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' fields for `CLIPImageEncoder`'s arguments.

    Raises:
        ValueError: If arguments are missing or unknown.
    """
    require_arguments(config, ARGUMENTS, "an image encoder")
    return {
        "attention_dropout": 0.0,
        "hidden_act": written_activation(config["activation"]),
        "hidden_size": config["width"],
        "image_size": config["image_size"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config["mlp_width"],
        "layer_norm_eps": config["norm_epsilon"],
        "model_type": "clip_vision_model",
        "num_attention_heads": config["heads"],
        "num_channels": 3,
        "num_hidden_layers": config["depth"],
        "patch_size": config["patch_size"],
        "projection_dim": config["projection_dim"],
    }


def write_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `preprocessor_config.json` for `CLIPImageEncoder`'s arguments: resized, cropped, normalized."""
    size = config["image_size"]
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config["image_mean"]),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(config["image_std"]),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the image encoder that `config` describes."""
    width, patch = config["width"], config["patch_size"]
    positions = 1 + (config["image_size"] // patch) ** 2
    entries = [
        Entry("patch_embedding/kernel", ("embeddings.patch_embedding.weight",), "conv", (patch, patch, 3, width)),
        Entry("class_token/embedding", ("embeddings.class_embedding",), "same", (width,)),
        Entry("position_embedding/embeddings", ("embeddings.position_embedding.weight",), "same", (positions, width)),
        *norm("pre_layrnorm", "pre_norm", width),  # their spelling
    ]
    for i in range(config["depth"]):
        entries += clip_layer(f"encoder.layers.{i}", f"layer_{i}", width, config["mlp_width"])
    entries += norm("post_layernorm", "post_norm", width)
    entries = [replace(entry, keys=(PREFIX + entry.keys[0],)) for entry in entries]
    return entries + dense("visual_projection", "projection", width, config["projection_dim"], bias=False)


def _three_numbers(fields: Fields, name: str) -> list[float]:
    values = fields.take(name)
    good = isinstance(values, list) and len(values) == 3
    if not good or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise CheckpointError(f"`{name}` must be three numbers. Received: {name}={values!r:.80} in `{fields.source}`")
    return [float(value) for value in values]
