"""diffusers' AutoencoderKL: its configuration as ours and back, and its keys.

The middle attention's keys had other names in older files: `query`, `key`, `value`, `proj_attn` before diffusers 0.18,
and `q`, `k`, `v`, `proj_out` in LDM's; its kernels are dense or 1 x 1 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.checkpoints.diffusers_layers import conv, norm, resnet
from latentdiff.checkpoints.fields import Fields, require_arguments
from latentdiff.checkpoints.key_map import Entry

ARGUMENTS = (
    "channels",
    "blocks_per_level",
    "latent_channels",
    "image_channels",
    "groups",
    "norm_epsilon",
    "scaling_factor",
    "shift_factor",
    "mid_attention",
)
NORM_EPSILON = 1e-6  # diffusers' autoencoder has no other

_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_ATTENTION_NAMES = {
    "norm": ("group_norm", "norm"),
    "query": ("to_q", "query", "q"),
    "key": ("to_k", "key", "k"),
    "value": ("to_v", "value", "v"),
    "out": ("to_out.0", "proj_attn", "proj_out"),
}


def read_config(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Autoencoder's keyword arguments, and the details that change no number (`sample_size`), from diffusers' fields.

    Raises:
        CheckpointError: If a field is wrong, or asks for what `Autoencoder` cannot do.
    """
    fields = Fields(values, _DEFAULTS, source)
    channels = fields.counts("block_out_channels", high=2**16)
    shift = fields.take("shift_factor")
    config = {
        "channels": channels,
        "blocks_per_level": fields.count("layers_per_block", high=64),
        "latent_channels": fields.count("latent_channels", high=2**12),
        "image_channels": fields.count("in_channels", high=2**12),
        "groups": fields.count("norm_num_groups", high=2**12),
        "norm_epsilon": NORM_EPSILON,
        "scaling_factor": fields.number("scaling_factor", low=1e-6, high=1e6),
        "shift_factor": 0.0 if shift is None else fields.number("shift_factor", low=-1e6, high=1e6),
        "mid_attention": fields.flag("mid_block_add_attention"),
    }
    fields.require("out_channels", config["image_channels"])
    fields.require("down_block_types", ["DownEncoderBlock2D"] * len(channels))
    fields.require("up_block_types", ["UpDecoderBlock2D"] * len(channels))
    fields.require("act_fn", "silu", "swish")
    fields.require("use_quant_conv", True)
    fields.require("use_post_quant_conv", True)
    for name in ("latents_mean", "latents_std", "quantization_config"):
        fields.require(name, None)
    fields.ignore(["force_upcast"])  # a caution of float16 pipelines; the dtype is the caller's here
    fields.check_divides("norm_num_groups", [config["groups"]] * len(channels), channels)
    details = {"sample_size": fields.size("sample_size")}
    fields.finish()
    return config, details


def write_config(config: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' fields for `Autoencoder`'s arguments; newer ones only where they do not stand at their defaults.

    Raises:
        ValueError: If an argument is something that diffusers' configuration cannot say.
    """
    require_arguments(config, ARGUMENTS, "an autoencoder")
    if config["norm_epsilon"] != NORM_EPSILON:
        raise ValueError(
            f"A diffusers autoencoder must have norm_epsilon=1e-6. Received: norm_epsilon={config['norm_epsilon']}"
        )
    channels = list(config["channels"])
    fields = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": config["image_channels"],
        "latent_channels": config["latent_channels"],
        "layers_per_block": config["blocks_per_level"],
        "norm_num_groups": config["groups"],
        "out_channels": config["image_channels"],
        "scaling_factor": config["scaling_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    if details.get("sample_size") is not None:
        fields["sample_size"] = details["sample_size"]
    if config["shift_factor"]:
        fields["shift_factor"] = config["shift_factor"]
    if not config["mid_attention"]:
        fields["mid_block_add_attention"] = False
    return fields


def key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the autoencoder that `config` describes; the paths begin with "encoder/" or "decoder/"."""
    channels = tuple(config["channels"])
    last = len(channels) - 1
    blocks = config["blocks_per_level"]
    latent, image = config["latent_channels"], config["image_channels"]

    def middle(half: str) -> list[Entry]:
        entries = resnet(f"{half}.mid_block.resnets.0", f"{half}/mid_resnet_0", channels[-1], channels[-1])
        if config["mid_attention"]:
            entries += _attention(f"{half}.mid_block.attentions.0", f"{half}/mid_attention", channels[-1])
        return entries + resnet(f"{half}.mid_block.resnets.1", f"{half}/mid_resnet_1", channels[-1], channels[-1])

    entries = conv("encoder.conv_in", "encoder/conv_in", 3, image, channels[0])
    width = channels[0]
    for i, outputs in enumerate(channels):
        key, path = f"encoder.down_blocks.{i}", f"encoder/down_{i}"
        for j in range(blocks):
            entries += resnet(f"{key}.resnets.{j}", f"{path}_resnet_{j}", width, outputs)
            width = outputs
        if i < last:
            entries += conv(f"{key}.downsamplers.0.conv", f"{path}_downsample/conv", 3, width, width)
    entries += middle("encoder")
    entries += norm("encoder.conv_norm_out", "encoder/norm_out", width)
    entries += conv("encoder.conv_out", "encoder/conv_out", 3, width, 2 * latent)
    entries += conv("quant_conv", "encoder/quant_conv", 1, 2 * latent, 2 * latent)

    entries += conv("post_quant_conv", "decoder/post_quant_conv", 1, latent, latent)
    entries += conv("decoder.conv_in", "decoder/conv_in", 3, latent, width)
    entries += middle("decoder")
    for i, outputs in enumerate(reversed(channels)):
        key, path = f"decoder.up_blocks.{i}", f"decoder/up_{i}"
        for j in range(blocks + 1):
            entries += resnet(f"{key}.resnets.{j}", f"{path}_resnet_{j}", width, outputs)
            width = outputs
        if i < last:
            entries += conv(f"{key}.upsamplers.0.conv", f"{path}_upsample/conv", 3, width, width)
    entries += norm("decoder.conv_norm_out", "decoder/norm_out", width)
    return entries + conv("decoder.conv_out", "decoder/conv_out", 3, width, image)


def _attention(key: str, path: str, width: int) -> list[Entry]:
    def keys(part: str, last: str) -> tuple[str, ...]:
        return tuple(f"{key}.{name}.{last}" for name in _ATTENTION_NAMES[part])

    entries = [
        Entry(f"{path}/norm/gamma", keys("norm", "weight"), "same", (width,)),
        Entry(f"{path}/norm/beta", keys("norm", "bias"), "same", (width,)),
    ]
    for part in ("query", "key", "value", "out"):
        entries.append(Entry(f"{path}/{part}/kernel", keys(part, "weight"), "dense", (width, width)))
        entries.append(Entry(f"{path}/{part}/bias", keys(part, "bias"), "same", (width,)))
    return entries
