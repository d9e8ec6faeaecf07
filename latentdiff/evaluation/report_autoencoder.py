"""What an autoencoder is worth: how well pictures come back from their latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.backend import Compiled, psnr_and_ssim, to_numpy
from latentdiff.data.decode import in_model_range
from latentdiff.evaluation.pictures import Pictures, check_size, read_pictures
from latentdiff.evaluation.plots import SHOWN, sheet
from latentdiff.evaluation.report import Report
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pipeline import grey_levels
from latentdiff.presets import load_autoencoder


def autoencoder_report(
    model: str | Path, pictures: Pictures, size: int | None, batch_size: int, tell: Callable[[str], Any]
) -> Report:
    """Of an autoencoder alone; see `evaluate`. Figures: "psnr" in decibels, "ssim"."""
    if size is None:
        raise ValueError("`size` must be given for an autoencoder, which has none of its own. Received: size=None.")
    autoencoder = load_autoencoder(model, dtype="float32")
    check_size(size, autoencoder.factor)
    judged = read_pictures(pictures.judged, size)
    tell(f"{len(judged)} pictures come back from their latents")
    return come_back(autoencoder, judged, batch_size)[0]


def come_back(autoencoder: Autoencoder, judged: np.ndarray, batch_size: int) -> tuple[Report, np.ndarray]:
    """The report on how pictures, uint8 (N, H, W, 3), come back; and their scaled latents, float32 (N, h, w, c)."""
    latents, back = through(autoencoder, judged, batch_size)
    psnr, ssim = psnr_and_ssim(judged, back)
    report = Report(
        {"psnr": psnr, "ssim": ssim},
        [("pictures come back from their latents", f"{psnr:.1f} dB, SSIM {ssim:.3f}")],
        [("reconstructions.png", "pictures, and what came back", sheet([judged[:SHOWN], back[:SHOWN]]).save)],
    )
    return report, latents


def through(autoencoder: Autoencoder, judged: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents of pictures, uint8 (N, H, W, 3), and the pictures that they give back, of the same shape."""
    encode = Compiled(autoencoder.encode, [autoencoder])
    decode = Compiled(lambda latent: grey_levels(autoencoder.decode(latent)), [autoencoder])
    latents, back = [], []
    for i in range(0, len(judged), batch_size):
        latents.append(to_numpy(encode(in_model_range(judged[i : i + batch_size])), "float32"))
        back.append(to_numpy(decode(latents[-1]), "uint8"))
    return np.concatenate(latents), np.concatenate(back)
