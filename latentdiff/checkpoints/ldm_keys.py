"""LDM's names: each network's key map, from diffusers' names, which say the same in other words.

In LDM's UNet residual blocks, transformers and resamplings are numbered through: `input_blocks.4.1` is what diffusers
calls `down_blocks.1.attentions.0`. Its decoder counts `up` from the full size down, diffusers the other way round.
Rombach et al. 2022, arXiv:2112.10752, and their code; open_clip's names are those of its `TextTransformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentdiff.checkpoints import diffusers_autoencoder, diffusers_text_encoder, diffusers_unet
from latentdiff.checkpoints.key_map import Entry

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj": "attn.in_proj_query",
    "self_attn.k_proj": "attn.in_proj_key",
    "self_attn.v_proj": "attn.in_proj_value",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# What `attn.in_proj_weight` and `attn.in_proj_bias` hold, one below the other; these names are this package's own.
FUSED_PARTS = ("in_proj_query", "in_proj_key", "in_proj_value")


def unet_key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the UNet that `config` describes, under LDM's names: `input_blocks.0.0.weight`, ..."""
    blocks = config["blocks_per_level"]
    levels = len(config["channels"])
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for i in range(levels):
        for j in range(blocks):
            number = 1 + i * (blocks + 1) + j
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (blocks + 1)}.0.op"
        for j in range(blocks + 1):
            number = i * (blocks + 1) + j
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
        place = 2 if config["attention"][levels - 1 - i] else 1  # behind the transformer, where there is one
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (blocks + 1) + blocks}.{place}.conv"
    for theirs, ldm in resnets.items():
        modules |= {f"{theirs}.{part}": f"{ldm}.{name}" for part, name in _UNET_RESNET.items()}
    return _renamed(diffusers_unet.key_map(config), modules)


def autoencoder_key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the autoencoder that `config` describes, under LDM's names: `encoder.conv_in.weight`, ..."""
    blocks = config["blocks_per_level"]
    levels = len(config["channels"])
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    resnets = {}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in (0, 1)}
        attention = f"{half}.mid_block.attentions.0"
        modules |= {f"{attention}.{part}": f"{half}.mid.attn_1.{name}" for part, name in _AUTOENCODER_ATTENTION.items()}
    for i in range(levels):
        resnets |= {f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for j in range(blocks)}
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        up = f"decoder.up.{levels - 1 - i}"
        resnets |= {f"decoder.up_blocks.{i}.resnets.{j}": f"{up}.block.{j}" for j in range(blocks + 1)}
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    for theirs, ldm in resnets.items():
        modules |= {f"{theirs}.{part}": f"{ldm}.{name}" for part, name in _AUTOENCODER_RESNET.items()}
    return _renamed(diffusers_autoencoder.key_map(config), modules)


def open_clip_key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the text encoder that `config` describes, under open_clip's names, the fused ones split."""
    modules = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(config["depth"]):
        layer = {
            f"encoder.layers.{i}.{part}": f"transformer.resblocks.{i}.{name}" for part, name in _OPEN_CLIP_LAYER.items()
        }
        modules |= layer
    entries = diffusers_text_encoder.key_map(config)
    bare = [replace(entry, keys=entry.keys[1:]) for entry in entries]
    position = "embeddings.position_embedding.weight"  # in open_clip no module's, but a parameter of its own
    return [
        replace(entry, keys=("positional_embedding",)) if entry.keys[0] == position else _rename(entry, modules)
        for entry in bare
    ]


def ema_key(key: str) -> str:
    """The averaged twin of a key of LDM's: LitEma drops the dots and the first word, `model.` of the UNet's wrapper."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _renamed(entries: list[Entry], modules: Mapping[str, str]) -> list[Entry]:
    return [_rename(entry, modules) for entry in entries]


def _rename(entry: Entry, modules: Mapping[str, str]) -> Entry:
    """The entry under the name of its module, the longest that is known; inside of transformers both agree."""
    module, rest = entry.keys[0], ""
    while module and module not in modules:
        module, _, part = module.rpartition(".")
        rest = f".{part}{rest}"
    return replace(entry, keys=(modules[module] + rest,))
