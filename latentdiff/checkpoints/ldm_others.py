"""Weights files that are recognised and not opened: each has its name, so that a person knows what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping

from latentdiff.checkpoints.files import CheckpointError

# What a file is -> a pattern of a name that no other kind of file has; the first that is found counts.
_PATTERNS = {
    "a LoRA or a relative of it, which changes a model and is none": (
        r"^lora_|[._](lora_(up|down|A|B|linear_layer)|lora\.(up|down)|hada_w1_[ab]|lokr_w[12](_[ab])?|oft_blocks)\b"
    ),
    "a textual inversion, which adds words to a model and is none": r"^(emb_params|string_to_param.*|clip_[lg])$",
    "a ControlNet, which steers a model and is none": r"^(control_model|input_hint_block|controlnet_\w+)\.",
    "a video model": r"\.(time_stack|time_mixer|motion_modules|temporal_transformer)\.",
    "Stable Diffusion XL": r"^conditioner\.embedders\.1\.|^(base_model\.)?add_embedding\.",
    "the refiner of Stable Diffusion XL": r"^conditioner\.embedders\.0\.model\.",
    "Stable Diffusion 3": r"^(model\.diffusion_model\.)?joint_blocks\.",
    "Flux or a relative of it": r"^(model\.diffusion_model\.)?(double_blocks|single_blocks)\.",
    "a GLIGEN model": r"\.fuser\.|^position_net\.",
    "an autoencoder with a codebook (VQ)": r"^(first_stage_model\.)?quantize\.",
    "a component in diffusers' layout, which is opened as its directory with its config.json": (
        r"^((encoder\.)?(down_blocks|mid_block)|text_model|embeddings)\."
    ),
}
# By the UNet's input channels: the latent's four and what is laid beside them.
_INPUTS = {
    5: "a model that is told the depth (depth2img)",
    7: "an upscaling model",
    8: "an instruct-pix2pix model",
    9: "an inpainting model",
}
_LABELS = {2560: "the refiner of Stable Diffusion XL", 2816: "Stable Diffusion XL"}
_ARCHITECTURES = {
    "stable-diffusion-xl": "Stable Diffusion XL",
    "stable-diffusion-v3": "Stable Diffusion 3",
    "stable-diffusion-3": "Stable Diffusion 3",
    "flux": "Flux or a relative of it",
}


def refuse_others(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], source: str) -> None:
    """Raises where the file is recognised as something that is not opened here.

    Args:
        shapes: Of every tensor in the file.
        metadata: What the file's header says beside them; `modelspec.architecture` is read.
        source: The file's name.

    Raises:
        CheckpointError: It is; the message says what.
    """
    name = _recognise(shapes, metadata)
    if name is not None:
        raise CheckpointError(
            "A single file must be Stable Diffusion 1.x or 2.x in LDM's layout, or its autoencoder."
            f" Received: `{source}`, {name}."
        )


def _recognise(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    names = "\n".join(shapes)
    for what, pattern in _PATTERNS.items():
        if re.search(pattern, names, re.MULTILINE):
            return what
    for prefix in ("model.diffusion_model.", ""):
        first = shapes.get(f"{prefix}input_blocks.0.0.weight", ())
        label = shapes.get(f"{prefix}label_emb.0.0.weight", ())
        if len(label) == 2 and label[1] in _LABELS:
            return _LABELS[label[1]]
        if len(first) == 4 and first[1] in _INPUTS:
            return _INPUTS[first[1]]
        if label or f"{prefix}label_emb.weight" in shapes:
            return "a model that is told a class or a picture (unCLIP and its kind)"
    for prefix in ("first_stage_model.", ""):
        decoder = shapes.get(f"{prefix}decoder.conv_in.weight", ())
        if len(decoder) == 4 and decoder[1] == 16:
            return "the autoencoder of Stable Diffusion 3 or Flux, with 16 channels"
        if len(decoder) == 5:
            return "a video model"
    architecture = metadata.get("modelspec.architecture", "").lower()
    return next((what for word, what in _ARCHITECTURES.items() if architecture.startswith(word)), None)
