"""Stable Diffusion 1.5 and 2.1 in full size, of diffusers' and transformers' making, with random weights in float16."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import diffusers
import ldm_files
import numpy as np
import safetensors.numpy
import tiny_pipelines
import torch
import transformers

from latentdiff.checkpoints.clip_vocabulary import clip_vocabulary

POOL = 1_000_003  # a prime: no row of a kernel is another's
ATTENTION = (True, True, True, False)
TEXT = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"hidden_act": "quick_gelu", "projection_dim": 768, "pad_token_id": 49407},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    | {"hidden_act": "gelu", "projection_dim": 512, "pad_token_id": 0},
}
UNET = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
    | {"use_linear_projection": True},
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def write(size: str, directory: Path, file: Path) -> None:
    """Writes a model as a directory and as a single file in LDM's layout.

    Args:
        size: "sd15" or "sd21".
        directory: the pipeline's.
        file: ends in ".safetensors".
    """
    generator = torch.Generator().manual_seed(0)
    text = transformers.CLIPTextConfig(
        **TEXT[size], vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407
    )
    models = {}
    for kind, make in (
        ("unet", lambda: diffusers.UNet2DConditionModel(**UNET[size])),
        ("vae", lambda: diffusers.AutoencoderKL(**AUTOENCODER, sample_size=8 * UNET[size]["sample_size"])),
        ("text_encoder", lambda: transformers.CLIPTextModel(text)),
    ):
        with torch.device("meta"):  # so that no weights are drawn that are drawn anew at once
            model = make()
        model.to_empty(device="cpu").eval()
        tiny_pipelines.randomise(model, generator, from_pool)
        models[kind] = model.half()
    vocabulary, merges = clip_vocabulary()
    pad = "<|endoftext|>" if size == "sd15" else "!"
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(merges), pad_token=pad, model_max_length=77)
    scheduler = diffusers.PNDMScheduler if size == "sd15" else diffusers.DDIMScheduler
    pipe = diffusers.StableDiffusionPipeline(
        **models,
        tokenizer=tokenizer,
        scheduler=scheduler.from_config(tiny_pipelines.SCHEDULERS["sd1" if size == "sd15" else "sd2"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(directory)
    safetensors.numpy.save_file(_ldm_tensors(models, size) | ldm_files.schedule(), file)


def from_pool(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normals of any number, from a random place of a fixed sequence on: ten times faster than fresh ones."""
    begin = int(torch.randint(POOL, (), generator=generator))
    count = math.prod(shape)
    return _pool().roll(-begin).repeat(-(-count // POOL))[:count].reshape(shape)


@functools.cache
def _pool() -> torch.Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(1))


def _ldm_tensors(models: dict[str, torch.nn.Module], size: str) -> dict[str, np.ndarray]:
    """The models' tensors under LDM's names, by the tests' own map."""
    state = {kind: {n: tensor.numpy() for n, tensor in model.state_dict().items()} for kind, model in models.items()}
    text = ldm_files.clip if size == "sd15" else ldm_files.open_clip
    return {
        **ldm_files.prefixed("model.diffusion_model.", ldm_files.unet(state["unet"], 4, 2, ATTENTION)),
        **ldm_files.prefixed("first_stage_model.", ldm_files.autoencoder(state["vae"])),
        **text(state["text_encoder"]),
    }
