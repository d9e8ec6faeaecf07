"""What diffusers and transformers say: tokens, context, UNet output, latents and pictures, as NumPy arrays.

Arrays are laid out as here, (B, H, W, C). diffusers' mistakes that REFERENCE.md lists are not copied: no clipping of
latents, and no final alpha_bar of 1 in DDIM. All else is what `from_config` makes of the directory's own scheduler: a
spacing that its file names is kept, and where the file is silent each class has its own default.
"""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch

torch.set_num_threads(1)  # tiny models lose more to waiting threads than they gain

NUM_STEPS = 12
GUIDANCE_SCALE = 6.0
PROMPTS = ["a red heart, noto style", "The CAT's blue hat on the moon 42!"]
TEXTS = [
    "",
    "a red heart, noto style",
    "  Two   spaces,\ta tab\nand a line  ",
    "It's the CAT's; they've 4k 1024x768, isn't it?",
    "naïve café — Ünïcödé, e\u0301 against é, ﬁ ligature, Ⅷ",
    "😀 a smiling 👨‍👩‍👧 family 🇨🇭 and ❤️",
    "漢字とかな, العربية, हिन्दी, Ελληνικά ΣΊΣΥΦΟΣ",
    "dots... dashes --- (((brackets))) [x:0.5] <lora:a> a_b #tag @you",
    "\u00a0no-break\u2003em space\u200bzero width\ufeff",
    "<|startoftext|> special <|endoftext|> words",
    "a red heart, " * 40,
]

# name here: (class of diffusers, what `from_config` changes)
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "lcm": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
NOISY = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm")


def open_pipeline(directory: str | Path) -> diffusers.StableDiffusionPipeline:
    """The pipeline of a directory, computing in float32."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        directory, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe, prompts: list[str]) -> np.ndarray:
    """int32 (B, S), padded and cut to the model's length."""
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
    return np.array(ids, dtype=np.int32)


@torch.no_grad()
def context(pipe, prompt_tokens: np.ndarray) -> np.ndarray:
    """(B, S, D)"""
    return pipe.text_encoder(torch.from_numpy(prompt_tokens).long())[0].numpy()


@torch.no_grad()
def unet_output(unet, latent: np.ndarray, timestep: np.ndarray, context: np.ndarray) -> np.ndarray:
    """(B, h, w, 4)"""
    output = unet(to_torch(latent), torch.from_numpy(timestep), torch.from_numpy(context)).sample
    return to_numpy(output)


@torch.no_grad()
def encoded(autoencoder, image: np.ndarray) -> np.ndarray:
    """The posterior's mean, scaled: (B, h, w, 4)"""
    mean = autoencoder.encode(to_torch(image)).latent_dist.mean
    return to_numpy(mean * autoencoder.config.scaling_factor)


@torch.no_grad()
def decoded(autoencoder, latent: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) in [-1, 1], not clipped"""
    return to_numpy(autoencoder.decode(to_torch(latent) / autoencoder.config.scaling_factor).sample)


def final_latent(
    pipe,
    noise: np.ndarray,
    *,
    sampler: str | None = None,
    prompts: list[str] = PROMPTS,
    guidance_scale: float = GUIDANCE_SCALE,
    num_steps: int = NUM_STEPS,
    negative_prompt: list[str] | None = None,
    **changes,
) -> np.ndarray:
    """The sampled latent, scaled: (B, h, w, 4).

    Args:
        pipe: diffusers' pipeline; its scheduler is the same afterwards.
        noise: (B, h, w, 4), or (1 + N, B, h, w, 4) with what each of N steps draws.
        sampler: a name in `SAMPLERS`, or None for the directory's own.
        prompts: B prompts.
        guidance_scale: 1 is without guidance.
        num_steps: Steps asked for.
        negative_prompt: B prompts to guide away from.
        **changes: Further settings of diffusers' scheduler.
    """
    first, rest = (noise[0], noise[1:]) if noise.ndim == 5 else (noise, ())
    factor = pipe.vae_scale_factor
    own = pipe.scheduler
    if sampler is not None:
        name, settings = SAMPLERS[sampler]
        pipe.scheduler = getattr(diffusers, name).from_config(own.config, **{**settings, **changes})
    try:
        with handed_noise(rest):
            latent = pipe(
                prompts,
                negative_prompt=negative_prompt,
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                latents=to_torch(first),
                height=first.shape[1] * factor,
                width=first.shape[2] * factor,
                output_type="latent",
            ).images
    finally:
        pipe.scheduler = own
    return to_numpy(latent)


@torch.no_grad()
def picture(pipe, latent: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) of scaled latents"""
    image = np.clip(decoded(pipe.vae, latent) / 2 + 0.5, 0.0, 1.0)
    return (image * 255).round().astype(np.uint8)


@contextmanager
def handed_noise(noise):
    """Every scheduler draws the arrays of `noise` one after the other, and nothing else."""
    remaining = iter(noise)

    def draw(shape, generator=None, device=None, dtype=None, layout=None):
        try:
            drawn = next(remaining)
        except StopIteration:
            raise AssertionError("the scheduler draws more noise than was handed in") from None
        assert tuple(shape) == tuple(to_torch(drawn).shape)
        return to_torch(drawn).to(dtype)

    modules = {sys.modules[getattr(diffusers, name).__module__] for name, _ in SAMPLERS.values()}
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(tensor.detach().numpy(), 1, -1))
