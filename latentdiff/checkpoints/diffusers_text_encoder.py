"""transformers' CLIPTextModel: its configuration as ours and back, and its keys.

Up to transformers 5.5 its keys begin with `text_model.`, from 5.6 on they do not, and both are read by both; written
is the older form, which every version opens. Old files also hold `position_ids`, which are 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentdiff.checkpoints.diffusers_layers import clip_layer, norm
from latentdiff.checkpoints.fields import Fields, require_arguments
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import Entry

ARGUMENTS = ("vocabulary_size", "context_length", "width", "depth", "heads", "mlp_width", "activation", "norm_epsilon")
PREFIX = "text_model."
IGNORED_KEYS = (
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
    "text_projection.weight",  # CLIPTextModelWithProjection: the pooled embedding, which no UNet here reads
    "logit_scale",
)

_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "model_type": "clip_text_model",
}
# transformers' names; of equal ones the first is written.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_DETAILS = ("projection_dim", "bos_token_id", "eos_token_id", "pad_token_id")


def read_config(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIPTextEncoder's keyword arguments, and the details that change no number, from transformers' fields.

    Raises:
        CheckpointError: If a field is wrong, or asks for what `CLIPTextEncoder` cannot do.
    """
    fields = Fields(values, _DEFAULTS, source)
    config = {
        "vocabulary_size": fields.count("vocab_size", high=2**24),
        "context_length": fields.count("max_position_embeddings", high=2**16),
        "width": fields.count("hidden_size", high=2**16),
        "depth": fields.count("num_hidden_layers", high=256),
        "heads": fields.count("num_attention_heads", high=2**10),
        "mlp_width": fields.count("intermediate_size", high=2**18),
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "norm_epsilon": fields.number("layer_norm_eps", high=1.0),
    }
    fields.require("model_type", "clip_text_model")
    fields.require("quantization_config", None)
    fields.require("use_attention_mask", None, False)  # diffusers would hide the padding from the encoder
    fields.check_divides("num_attention_heads", [config["heads"]], [config["width"]])
    details = {name: fields.take(name) for name in _DETAILS if fields.states(name)}
    for name, value in details.items():
        if not (value is None or type(value) is int or (name == "eos_token_id" and _are_ids(value))):
            raise CheckpointError(f"`{name}` must be a whole number. Received: {name}={value!r:.80} in `{source}`")
    # transformers has put dozens of fields of its generation settings into this file, and still adds some.
    fields.finish(strict=False)
    return config, details


def write_config(config: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' fields for `CLIPTextEncoder`'s arguments.

    Args:
        config: The constructor's arguments.
        details: `projection_dim` and the token ids; where there are none, the vocabulary's last two are start and end.

    Raises:
        ValueError: If arguments are missing or unknown.
    """
    require_arguments(config, ARGUMENTS, "a text encoder")
    last = config["vocabulary_size"] - 1
    stated = {"projection_dim": config["width"], "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    stated.update({name: details[name] for name in _DETAILS if name in details})
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "hidden_act": written_activation(config["activation"]),
        "hidden_size": config["width"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config["mlp_width"],
        "layer_norm_eps": config["norm_epsilon"],
        "max_position_embeddings": config["context_length"],
        "model_type": "clip_text_model",
        "num_attention_heads": config["heads"],
        "num_hidden_layers": config["depth"],
        # Not the file's dtype: transformers 5 would compute in it, and diffusers fail on a UNet that is float32.
        "torch_dtype": "float32",
        "vocab_size": config["vocabulary_size"],
        **stated,
    }


def written_activation(activation: str) -> str:
    """transformers' name of an activation here; of equal ones the first."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def key_map(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the text encoder that `config` describes."""
    width = config["width"]
    entries = [
        Entry(
            "token_embedding/embeddings",
            ("embeddings.token_embedding.weight",),
            "same",
            (config["vocabulary_size"], width),
        ),
        Entry(
            "position_embedding/embeddings",
            ("embeddings.position_embedding.weight",),
            "same",
            (config["context_length"], width),
        ),
    ]
    for i in range(config["depth"]):
        entries += clip_layer(f"encoder.layers.{i}", f"layer_{i}", width, config["mlp_width"])
    entries += norm("final_layer_norm", "final_norm", width)
    return [replace(entry, keys=(PREFIX + entry.keys[0], entry.keys[0])) for entry in entries]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
