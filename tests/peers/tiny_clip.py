"""A tiny CLIPModel of transformers with random weights, and what it says, as NumPy arrays laid out as here."""

from pathlib import Path

import numpy as np
import torch
from reference import to_torch
from tiny_pipelines import randomise
from transformers import CLIPConfig, CLIPModel

START, END = 30, 31
# Of the images, where black is 0 and white is 1: CLIP's, as transformers has them.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def build(activation: str = "quick_gelu", end_id: int = END, vocabulary_size: int = 32) -> CLIPModel:
    """The model, in float32; its two widths, depths and numbers of heads all differ."""
    text = {
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 9,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_act": activation,
        "bos_token_id": START,
        "eos_token_id": end_id,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "hidden_act": activation,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    generator = torch.Generator().manual_seed(3)
    for part in (model.text_model, model.vision_model, model.text_projection, model.visual_projection):
        randomise(part, generator)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return model


def inputs(vocabulary_size: int = 32, end_id: int = END) -> dict[str, np.ndarray]:
    """Tokens with their end at several places, once followed by more of it, and images in [-1, 1]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, START, (4, 9)).astype("int32")
    tokens[:, 0] = START
    for row, end in zip(tokens, (2, 5, 8, 3), strict=True):
        row[end] = end_id
        row[end + 1 :] = 0
    tokens[3, 4:] = end_id
    return {"tokens": tokens, "image": rng.uniform(-1, 1, (4, 12, 12, 3)).astype("float32")}


@torch.no_grad()
def outputs(model: CLIPModel, tokens: np.ndarray, image: np.ndarray) -> dict[str, np.ndarray]:
    """`text_embedding`, `image_embedding` (B, E) of unit length and `logits` (B, B), a row for each image."""
    pixels = ((image / 2 + 0.5 - MEAN) / STD).astype("float32")
    said = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=to_torch(pixels))
    return {
        "text_embedding": said.text_embeds.numpy(),
        "image_embedding": said.image_embeds.numpy(),
        "logits": said.logits_per_image.numpy(),
    }


def save_goldens(directory: Path) -> None:
    """Writes the model's directory and, beside it, what goes in and comes out."""
    model = build()
    model.save_pretrained(directory)
    given = inputs()
    np.savez_compressed(directory.with_suffix(".npz"), **given, **outputs(model, **given))
