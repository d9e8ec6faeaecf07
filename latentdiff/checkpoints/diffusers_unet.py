"""diffusers' UNet2DConditionModel: its configuration as ours and back, and its keys.

Traps: its `attention_head_dim` is the number of heads; a transformer's `proj_in` and `proj_out` are 1 x 1 convolutions
in SD 1.x and dense in SD 2.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.checkpoints.diffusers_layers import conv, dense, norm, resnet
from latentdiff.checkpoints.fields import Fields, require_arguments
from latentdiff.checkpoints.key_map import Entry

ARGUMENTS = (
    "in_channels",
    "out_channels",
    "channels",
    "blocks_per_level",
    "attention",
    "heads",
    "transformer_depth",
    "context_dim",
    "dense_projection",
    "groups",
    "norm_epsilon",
    "entry_epsilon",
    "gelu",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_attention",
)
# What diffusers' UNet has no field for, and is always so there.
CONSTANTS = {"entry_epsilon": 1e-6, "gelu": "exact", "mid_attention": True}
DOWN_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_TYPES = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
}
# What changes the computation, with the only values that the networks here have.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "quantization_config": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Training's dropout, a softmax that is float32 here anyway, and the sizes of embeddings that `_FIXED` excludes.
_WITHOUT_EFFECT = (
    "dropout",
    "upcast_attention",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def read_config(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet's keyword arguments, and the details that change no number (`sample_size`), from diffusers' fields.

    Raises:
        CheckpointError: If a field is wrong, or asks for what `UNet` cannot do.
    """
    fields = Fields(values, _DEFAULTS, source)
    channels = fields.counts("block_out_channels", high=2**16)
    levels = len(channels)
    config = {
        "in_channels": fields.count("in_channels", high=2**12),
        "out_channels": fields.count("out_channels", high=2**12),
        "channels": channels,
        "blocks_per_level": _one_for_all(fields, "layers_per_block", levels, high=64),
        "attention": _read_attention(fields, levels),
        "heads": _read_heads(fields, levels),
        "transformer_depth": fields.counts("transformer_layers_per_block", levels, high=64),
        "context_dim": _one_for_all(fields, "cross_attention_dim", levels, high=2**16),
        "dense_projection": fields.flag("use_linear_projection"),
        "groups": fields.count("norm_num_groups", high=2**12),
        "norm_epsilon": fields.number("norm_eps", high=1.0),
        "flip_sin_to_cos": fields.flag("flip_sin_to_cos"),
        "freq_shift": fields.number("freq_shift"),
        **CONSTANTS,
    }
    for name, allowed in _FIXED.items():
        fields.require(name, *allowed)
    fields.require("time_embedding_dim", None, 4 * channels[0])
    fields.require("only_cross_attention", False, [False] * levels)
    depths = list(config["transformer_depth"])
    fields.require("reverse_transformer_layers_per_block", None, depths[::-1])
    fields.ignore(_WITHOUT_EFFECT)
    attending = [level for level in range(levels) if config["attention"][level] or level == levels - 1]
    fields.check_divides("norm_num_groups", [config["groups"]] * levels, channels)
    fields.check_divides(
        "attention_head_dim", [config["heads"][level] for level in attending], [channels[level] for level in attending]
    )
    details = {"sample_size": fields.size("sample_size")}
    fields.finish()
    return config, details


def write_config(config: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' fields for `UNet`'s arguments; those that stand at diffusers' defaults since SD 2 are left out.

    Every version of diffusers since 0.10 knows the fields that are written, and so opens them without a warning.

    Raises:
        ValueError: If an argument is something that diffusers' configuration cannot say.
    """
    require_arguments(config, ARGUMENTS, "a UNet")
    levels = len(config["channels"])
    for name, value in CONSTANTS.items():
        if config[name] != value:
            raise ValueError(f"A diffusers UNet must have {name}={value!r}. Received: {name}={config[name]!r}")
    attention = _spread(config["attention"], levels)
    shift = config["freq_shift"]
    fields = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": _fold(_spread(config["heads"], levels)),
        "block_out_channels": list(config["channels"]),
        "center_input_sample": False,
        "cross_attention_dim": config["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": bool(config["flip_sin_to_cos"]),
        "freq_shift": int(shift) if shift == int(shift) else shift,
        "in_channels": config["in_channels"],
        "layers_per_block": config["blocks_per_level"],
        "mid_block_scale_factor": 1,
        "norm_eps": config["norm_epsilon"],
        "norm_num_groups": config["groups"],
        "out_channels": config["out_channels"],
        "sample_size": details.get("sample_size"),
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attention)],
        "use_linear_projection": bool(config["dense_projection"]),
    }
    depth = _fold(_spread(config["transformer_depth"], levels))
    if depth != 1:
        fields["transformer_layers_per_block"] = depth
    return fields


def key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the UNet that `config` describes, in diffusers' order."""
    channels = tuple(config["channels"])
    levels = len(channels)
    blocks = config["blocks_per_level"]
    attention = _spread(config["attention"], levels)
    depths = _spread(config["transformer_depth"], levels)
    time = 4 * channels[0]

    def transformer(key: str, path: str, width: int, depth: int) -> list[Entry]:
        return _transformer(key, path, width, depth, config["context_dim"], bool(config["dense_projection"]))

    entries = conv("conv_in", "conv_in", 3, config["in_channels"], channels[0])
    entries += dense("time_embedding.linear_1", "time_mlp_1", channels[0], time)
    entries += dense("time_embedding.linear_2", "time_mlp_2", time, time)
    skips = [channels[0]]
    width = channels[0]
    for i, outputs in enumerate(channels):
        for j in range(blocks):
            entries += resnet(f"down_blocks.{i}.resnets.{j}", f"down_{i}_resnet_{j}", width, outputs, time)
            if attention[i]:
                entries += transformer(f"down_blocks.{i}.attentions.{j}", f"down_{i}_attention_{j}", outputs, depths[i])
            width = outputs
            skips.append(width)
        if i < levels - 1:
            entries += conv(f"down_blocks.{i}.downsamplers.0.conv", f"down_{i}_downsample/conv", 3, width, width)
            skips.append(width)
    entries += resnet("mid_block.resnets.0", "mid_resnet_0", width, width, time)
    if config["mid_attention"]:
        entries += transformer("mid_block.attentions.0", "mid_attention", width, depths[-1])
    entries += resnet("mid_block.resnets.1", "mid_resnet_1", width, width, time)
    for i, outputs in enumerate(reversed(channels)):
        level = levels - 1 - i
        for j in range(blocks + 1):
            inputs = width + skips.pop()
            entries += resnet(f"up_blocks.{i}.resnets.{j}", f"up_{i}_resnet_{j}", inputs, outputs, time)
            if attention[level]:
                entries += transformer(f"up_blocks.{i}.attentions.{j}", f"up_{i}_attention_{j}", outputs, depths[level])
            width = outputs
        if level > 0:
            entries += conv(f"up_blocks.{i}.upsamplers.0.conv", f"up_{i}_upsample/conv", 3, width, width)
    entries += norm("conv_norm_out", "norm_out", width)
    return entries + conv("conv_out", "conv_out", 3, width, config["out_channels"])


def _transformer(key: str, path: str, width: int, depth: int, context: int, dense_projection: bool) -> list[Entry]:
    def projection(name: str) -> list[Entry]:
        if dense_projection:
            return dense(f"{key}.{name}", f"{path}/{name}", width, width)
        return conv(f"{key}.{name}", f"{path}/{name}", 1, width, width)

    def attend(key: str, path: str, inputs: int) -> list[Entry]:
        entries = dense(f"{key}.to_q", f"{path}/query", width, width, bias=False)
        entries += dense(f"{key}.to_k", f"{path}/key", inputs, width, bias=False)
        entries += dense(f"{key}.to_v", f"{path}/value", inputs, width, bias=False)
        return entries + dense(f"{key}.to_out.0", f"{path}/out", width, width)

    entries = norm(f"{key}.norm", f"{path}/norm", width) + projection("proj_in")
    for d in range(depth):
        block, here = f"{key}.transformer_blocks.{d}", f"{path}/block_{d}"
        entries += norm(f"{block}.norm1", f"{here}/norm_1", width)
        entries += attend(f"{block}.attn1", f"{here}/self_attention", width)
        entries += norm(f"{block}.norm2", f"{here}/norm_2", width)
        entries += attend(f"{block}.attn2", f"{here}/cross_attention", context)
        entries += norm(f"{block}.norm3", f"{here}/norm_3", width)
        entries += dense(f"{block}.ff.net.0.proj", f"{here}/geglu", width, 8 * width)
        entries += dense(f"{block}.ff.net.2", f"{here}/mlp_out", 4 * width, width)
    return entries + projection("proj_out")


def _one_for_all(fields: Fields, name: str, levels: int, high: int) -> int:
    """A field that diffusers lets vary by level and that does not vary here."""
    values = fields.counts(name, levels, high=high)
    if len(set(values)) > 1:
        fields.refuse(name, list(values), "one number for all levels")
    return values[0]


def _read_attention(fields: Fields, levels: int) -> tuple[bool, ...]:
    down, up = fields.words("down_block_types"), fields.words("up_block_types")
    for name, types, known in (("down_block_types", down, DOWN_TYPES), ("up_block_types", up, UP_TYPES)):
        if len(types) != levels or not all(word in known for word in types):
            fields.refuse(name, list(types), f"{levels} of {' or '.join(known)}")
            return (True,) * levels
    attention = tuple(DOWN_TYPES[word] for word in down)
    if attention != tuple(UP_TYPES[word] for word in reversed(up)):
        fields.refuse("up_block_types", list(up), "the mirror image of down_block_types")
    return attention


def _read_heads(fields: Fields, levels: int) -> tuple[int, ...]:
    if fields.take("num_attention_heads") is not None:
        fields.ignore(["attention_head_dim"])
        return fields.counts("num_attention_heads", levels, high=2**10)
    return fields.counts("attention_head_dim", levels, high=2**10)


def _spread(value: Any, levels: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def _fold(values: tuple[Any, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)
