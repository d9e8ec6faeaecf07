"""diffusers on PyTorch: as it comes, in channels_last, or with torch.compile; and a plain loop that trains its UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from benchmarks import weights
from benchmarks.cases import CAPTION_DROPOUT, GUIDANCE_SCALE, LEARNING_RATE, PROMPT, SIZES, TRAINING
from benchmarks.systems import Job

LENGTH = 77


class Asker:
    """See `systems.System`.

    Args:
        job: what to do.
        channels_last: whether convolutions' arrays lie so.
        compiled: whether networks go through torch.compile.
    """

    def __init__(self, job: Job, channels_last: bool = False, compiled: bool = False):
        self.job, self.channels_last, self.compiled = job, channels_last, compiled
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, job.case.dtype)
        torch.set_num_threads(job.threads)
        diffusers.utils.logging.disable_progress_bar()

    def unet(self) -> Callable[[], np.ndarray]:
        """Gives the prediction (2, h, w, c)."""
        unet = self._ready(self._part(diffusers.UNet2DConditionModel, "unet"))
        given = weights.inputs(self.job.directory, self.job.case.pixels)
        latent = self._tensor(np.concatenate([given["latent"]] * 2))
        timestep, context = torch.from_numpy(given["timestep"]).to(self.device), self._tensor(given["context"])
        return self._asked(lambda: unet(latent, timestep, context, return_dict=False)[0])

    def text(self) -> Callable[[], np.ndarray]:
        """Gives the context (1, S, D)."""
        encoder = self._ready(self._part(transformers.CLIPTextModel, "text_encoder"))
        tokens = torch.from_numpy(weights.inputs(self.job.directory)["tokens"]).long().to(self.device)
        return self._asked(lambda: encoder(tokens)[0])

    def decode(self) -> Callable[[], np.ndarray]:
        """Gives the image (1, H, W, 3)."""
        autoencoder = self._laid_out(self._part(diffusers.AutoencoderKL, "vae"))
        decode = torch.compile(autoencoder.decode) if self.compiled else autoencoder.decode
        given = weights.inputs(self.job.directory, self.job.case.pixels)["latent"]
        latent = self._tensor(given / autoencoder.config.scaling_factor)
        return self._asked(lambda: decode(latent, return_dict=False)[0])

    def generate(self, path: Path) -> np.ndarray:
        """Writes a picture, uint8 (H, W, 3), and gives it."""
        image = self._generate(self.job.num_steps, "pil")[0]
        image.save(path)
        return np.asarray(image)

    def start(self) -> None:
        """Loads, and makes the first step."""
        self._generate(1, "latent")

    def train(self) -> Callable[[], int]:
        """A step of a plain loop; gives the number of pictures in it."""
        size = SIZES[self.job.size]
        config: dict[str, Any] = TRAINING[size.training]
        attention, width = config["attention"], config["context_dim"]
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=size.latent,
            block_out_channels=config["channels"],
            layers_per_block=1,
            attention_head_dim=config["heads"],
            cross_attention_dim=width,
            norm_num_groups=config["groups"],
            down_block_types=tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in attention[::-1]),
        ).to(self.device)
        unet = self._laid_out(unet).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=self.device) ** 2
        alpha_bar = torch.cumprod(1 - betas, 0)
        x0 = self._laid_out(torch.randn(size.batch, 4, size.latent, size.latent, device=self.device))
        context = torch.randn(size.batch, LENGTH, width, device=self.device)
        empty = torch.zeros(LENGTH, width, device=self.device)

        def step() -> int:
            t = torch.randint(1000, (size.batch,), device=self.device)
            eps = torch.randn_like(x0)
            level = alpha_bar[t][:, None, None, None]
            x_t = level.sqrt() * x0 + (1 - level).sqrt() * eps
            left_out = torch.rand(size.batch, 1, 1, device=self.device) < CAPTION_DROPOUT
            told = torch.where(left_out, empty, context)
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                output = unet(x_t, t, told, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(output.float(), eps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            return size.batch

        return step

    def _part(self, network_class: Any, name: str) -> Any:
        network = network_class.from_pretrained(self.job.directory, subfolder=name, dtype=self.dtype)
        return network.eval().to(self.device)

    def _laid_out(self, network: Any) -> Any:
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def _ready(self, network: Any) -> Any:
        network = self._laid_out(network)
        return torch.compile(network) if self.compiled else network

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """In the networks' dtype; an array of four axes as (B, C, h, w)."""
        moved = np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array
        tensor = torch.from_numpy(moved).to(self.device, self.dtype)
        return self._laid_out(tensor) if array.ndim == 4 else tensor

    def _asked(self, network: Callable[[], torch.Tensor]) -> Callable[[], np.ndarray]:
        """What a network says, as a NumPy array with its channels last."""

        def ask() -> np.ndarray:
            with torch.inference_mode():
                said = network().float().cpu()
            return np.moveaxis(said.numpy(), 1, -1) if said.ndim == 4 else said.numpy()

        return ask

    def _generate(self, num_steps: int, output: str) -> Any:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            self.job.directory, dtype=self.dtype, safety_checker=None, requires_safety_checker=False
        ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet = self._ready(pipe.unet)
        pipe.vae = self._laid_out(pipe.vae)
        if self.compiled:
            pipe.vae.decode = torch.compile(pipe.vae.decode)
        pixels = self.job.case.pixels
        latent = self._tensor(weights.inputs(self.job.directory, pixels)["latent"])
        return pipe(
            PROMPT, num_inference_steps=num_steps, guidance_scale=GUIDANCE_SCALE, latents=latent, height=pixels,
            width=pixels, output_type=output,
        ).images  # fmt: skip
