"""Tiny Stable Diffusion 1.x and 2.x shaped pipelines of diffusers, with random weights that still denoise.

Every norm, bias and kernel is random, so that no parameter can be forgotten or swapped unseen. The UNet's last
convolution is then fitted by least squares, which makes the network a (poor) denoiser: its trajectories stay near the
data as those of a trained model do, and a picture's difference measures the sampler and not chaos. All numbers are
rounded to float16, so a file of either precision holds the same model.

What the two differ in is what SD 1.x and 2.x differ in: convolutions or dense layers around the transformer, quick or
exact GELU in the text encoder, what pads the tokens, eps or v, PNDM or DDIM, and the form in
which a tokenizer is kept.
"""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT_LENGTH = 77
LATENT_SIZE = (8, 12)
START, END = "<|startoftext|>", "<|endoftext|>"
CORPUS = (
    "a red heart, noto style. a photo of the smiling cat with blue hat. a grinning face, fluent style. "
    "an astronaut riding the horse on the moon, watercolour painting, 4k, highly detailed. "
    "the red house and the green tree in the rain; it's what they've made. "
)

SCHEDULERS = {
    # The file of Stable Diffusion 1.5, key by key: it names neither spacing nor prediction, so in diffusers another
    # sampler comes with its own class's spacing, linspace for Euler, Heun, DPM-Solver++ and UniPC.
    "sd1": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    # That of Stable Diffusion 2.1, with the spacing named, as diffusers writes it today.
    "sd2": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
}

TEXT = {
    "sd1": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "sd2": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96},
}
UNET = {
    "sd1": {
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 3),
        "cross_attention_dim": 32,
        "use_linear_projection": False,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd2": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": (1, 4, 2),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
AUTOENCODER = {
    "sd1": {"block_out_channels": (16, 24, 32), "layers_per_block": 2},
    "sd2": {"block_out_channels": (16, 16, 32), "layers_per_block": 1},
}


def build(kind: str) -> StableDiffusionPipeline:
    """The pipeline of one kind, in float32, on the CPU.

    Args:
        kind: "sd1" or "sd2".
    """
    generator = torch.Generator().manual_seed({"sd1": 1, "sd2": 2}[kind])
    vocabulary, merges = clip_vocabulary()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token=END if kind == "sd1" else "!",
        model_max_length=CONTEXT_LENGTH,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **TEXT[kind],
            vocab_size=len(vocabulary),
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="quick_gelu" if kind == "sd1" else "gelu",
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[END] if kind == "sd1" else 0,
            projection_dim=16,
        )
    )
    unet = UNet2DConditionModel(**UNET[kind], sample_size=LATENT_SIZE, norm_num_groups=8)
    autoencoder = AutoencoderKL(
        **AUTOENCODER[kind],
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    for model in (text_encoder, unet, autoencoder):
        randomise(model.eval(), generator)
    scheduler_class = PNDMScheduler if kind == "sd1" else DDIMScheduler
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler_class.from_config(SCHEDULERS[kind]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    scale_autoencoder(autoencoder, generator)
    fit_last_convolution(pipe, generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusionPipeline, kind: str, directory: str | Path) -> Path:
    """Writes the pipeline as a directory of its age: SD 1.x in float16 with `vocab.json` and `merges.txt` alone and the
    keys of old ("text_model." before the text encoder's), SD 2.x in float32 with `tokenizer.json` alone."""
    directory = Path(directory)
    shutil.rmtree(directory, ignore_errors=True)
    if kind == "sd1":
        pipe = pipe.to(torch.float16)
    pipe.save_pretrained(directory)
    pipe.to(torch.float32)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[kind], indent=2) + "\n")
    if kind == "sd1":
        use_old_tokenizer_files(directory / "tokenizer")
        use_old_text_encoder_keys(directory / "text_encoder")
    return directory


def use_old_tokenizer_files(directory: Path) -> None:
    """`tokenizer.json` becomes the four files that transformers 4 wrote."""
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(content["vocab"], ensure_ascii=False), "utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", "utf-8")
    pad = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))["pad_token"]
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    config = {
        "add_prefix_space": False,
        **special,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def use_old_text_encoder_keys(directory: Path) -> None:
    """The layout before transformers 5.6: every key under `text_model.`, and the positions stored as a buffer."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(CONTEXT_LENGTH).reshape(1, -1)
    save_file(tensors, path, metadata={"format": "pt"})


def clip_vocabulary(num_merges: int = 90) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary in CLIP's order: 256 bytes ("!" is 0), the same ending a word, the merges, two specials."""
    letters = byte_letters()
    merges = learn_merges(num_merges)
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return vocabulary, merges


def learn_merges(num_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding of `CORPUS`, the commonest pair first; of equally common ones the greater. (The trainer of
    `tokenizers` takes any of them, another each time.)"""
    words = [[*word[:-1], word[-1] + "</w>"] for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", CORPUS.lower())]
    merges = []
    for _ in range(num_merges):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = ["".join(pair)]
    return merges


def byte_letters() -> list[str]:
    """The printable letter of each byte, as byte-level BPE has them, in its order: printable bytes, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator, normal=torch.randn) -> None:
    """Draws every parameter: kernels that keep the variance, norms about 1, biases about 0, in float16's numbers."""
    norms = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
    }
    for name, parameter in sorted(model.named_parameters()):
        layer, _, leaf = name.rpartition(".")
        draw = normal(parameter.shape, generator=generator)
        if layer in norms:
            value = 1 + 0.2 * draw if leaf == "weight" else 0.2 * draw
        elif leaf == "bias":
            value = 0.1 * draw
        elif "embedding" in layer and "time_embedding" not in layer:
            value = 0.5 * draw
        else:
            gain = {"time_emb_proj": 2.0, "to_out.0": 2.0, "conv_in": 2.0}.get(layer.rpartition(".")[2], 1.0)
            value = gain * draw / np.sqrt(parameter[0].numel())
        parameter.copy_(value.half().float())


@torch.no_grad()
def scale_autoencoder(autoencoder: AutoencoderKL, generator: torch.Generator) -> None:
    """Scales both ends: scaled latents of deviation 1, pictures of deviation 0.35 about a grey, not saturated."""
    image = torch.rand((4, 3, 32, 48), generator=generator) * 2 - 1
    for _ in range(2):
        mean = autoencoder.encode(image).latent_dist.mean * autoencoder.config.scaling_factor
        autoencoder.quant_conv.weight[:4] /= mean.std()
        autoencoder.quant_conv.bias[:4] /= mean.std()
    latent = torch.randn((4, 4, *LATENT_SIZE), generator=generator) / autoencoder.config.scaling_factor
    for _ in range(2):
        decoded = autoencoder.decode(latent).sample
        autoencoder.decoder.conv_out.weight *= 0.35 / decoded.std()
        autoencoder.decoder.conv_out.bias += 0.05 - decoded.mean()
    for parameter in autoencoder.parameters():
        parameter.copy_(parameter.half().float())


@torch.no_grad()
def fit_last_convolution(pipe: StableDiffusionPipeline, generator: torch.Generator, num_samples: int = 128) -> None:
    """Ridge regression of what the UNet should say onto what its last convolution is given, plus a random part of its
    own that keeps the prompt's influence alive."""
    alpha_bar = pipe.scheduler.alphas_cumprod
    t = torch.randint(len(alpha_bar) // 2, len(alpha_bar), (num_samples,), generator=generator)
    signal = alpha_bar[t].sqrt()[:, None, None, None]
    noise = (1 - alpha_bar[t]).sqrt()[:, None, None, None]
    coarse = torch.randn((num_samples, 4, 4, 6), generator=generator)
    x0 = 1.3 * torch.nn.functional.interpolate(coarse, size=LATENT_SIZE, mode="bilinear")
    eps = torch.randn(x0.shape, generator=generator)
    x_t = signal * x0 + noise * eps
    target = eps if pipe.scheduler.config.prediction_type == "epsilon" else signal * eps - noise * x0
    tokens = torch.randint(0, pipe.text_encoder.config.vocab_size, (num_samples, 16), generator=generator)
    context = pipe.text_encoder(tokens)[0]

    given = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    pipe.unet(x_t, t, context)
    hook.remove()
    patches = torch.nn.functional.unfold(given[0], 3, padding=1).double()  # (B, 9 C, N)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    wanted = target.double().flatten(2).transpose(1, 2).reshape(-1, 4)
    normal = rows.T @ rows + 1e-5 * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    solution = torch.linalg.solve(normal, rows.T @ wanted)

    kernel = solution[:-1].T.reshape(pipe.unet.conv_out.weight.shape).float()
    own = 0.15 * pipe.unet.conv_out.weight
    pipe.unet.conv_out.weight.copy_((kernel + own).half().float())
    pipe.unet.conv_out.bias.copy_(solution[-1].half().float())


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where sd1/ and sd2/ are written")
    directory = parser.parse_args().directory
    for kind in SCHEDULERS:
        print(save(build(kind), kind, directory / kind))


if __name__ == "__main__":
    main()
