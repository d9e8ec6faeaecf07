"""A report on a model: figures as JSON, and a page of Markdown with plots and sheets that shows them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

from latentdiff.backend import Compiled, psnr_and_ssim, to_numpy
from latentdiff.checkpoints.files import replaced_directory
from latentdiff.data import index_source
from latentdiff.data.decode import decode_crop
from latentdiff.data.sources import read_picture
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.evaluation.retrieval import Gallery, Retrieval
from latentdiff.pipeline import TextToImage
from latentdiff.training.diffusion import DiffusionTraining

SEEDS = 4  # pictures of a prompt on the sheet
SHOWN = 12  # pictures of the reconstructions' sheet
BINS = 10  # of t


def evaluate(
    model: str | Path,
    data: Sequence[str],
    directory: str | Path,
    *,
    prompts: Sequence[str] = (),
    count: int = 100,
    size: int | None = None,
    num_steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Judges a pipeline on pictures and captions, and writes report.md, report.json, plots and sheets.

    Args:
        model: a model directory or a shipped name.
        data: sources of captioned pictures; see `index_source`.
        directory: of the report; new.
        prompts: rows of the contact sheet, four seeds each; the first captions where there are none.
        count: pictures that are encoded, and captions that are drawn; all are in the gallery that is searched.
        size: of the pictures, in pixels; None is the model's own.
        num_steps, guidance_scale, seed: of the drawings.
        batch_size: pictures at a time.
        progress: whether each part is told on standard output.

    Returns:
        The figures: "psnr" in decibels, "ssim", "loss", "loss_by_t" from small t to large, "retrieval".

    Raises:
        FileExistsError: `directory` has files.
        ValueError: the model or the data is not what it must be, or there are too few pictures.
    """
    pipe = TextToImage.from_preset(model, dtype="float32")
    index = index_source(list(data))
    factor = pipe.autoencoder.factor
    height = width = size or pipe.parts.sample_size[0] * factor
    if height % factor:
        raise ValueError(f"`size` must be a multiple of {factor}. Received: size={size}.")
    batch_size = min(batch_size, len(index))
    count = min(count, len(index)) // batch_size * batch_size
    if not count:
        raise ValueError(
            f"There must be at least {batch_size} pictures. Received: count={count}, {len(index)} pictures."
        )

    def told(text: str) -> None:
        if progress:
            print(text, flush=True)

    with replaced_directory(directory, overwrite=False) as fresh:
        gallery = _pictures(index, (height, width))
        told(f"{len(gallery)} pictures; {count} of them come back from their latents")
        images = gallery[:count].astype("float32") / 127.5 - 1
        latents, back = _through(pipe, images, batch_size)
        psnr, ssim = psnr_and_ssim(gallery[:count], back)
        shown = min(SHOWN, count)
        _sheet([gallery[:shown], back[:shown]]).save(fresh / "reconstructions.png")
        told("the loss by t")
        captions = [example.captions[0] for example in index]
        loss, by_t = _losses(pipe, latents, captions[:count], batch_size, seed)
        told(f"{count} captions are drawn")
        settings: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": guidance_scale, "progress": False}
        drawn = pipe.generate(
            captions[:count], seed=[seed] * count, height=height, width=width, batch_size=batch_size, **settings
        )
        retrieval = Gallery(gallery).find(drawn, np.arange(count))
        _sheet([gallery[:shown], drawn[:shown]]).save(fresh / "seen.png")
        rows = list(prompts) or captions[: min(6, count)]
        sheet = pipe.generate(
            [prompt for prompt in rows for _ in range(SEEDS)],
            seed=[seed + i for _ in rows for i in range(SEEDS)],
            height=height,
            width=width,
            batch_size=batch_size,
            **settings,
        )
        _sheet(sheet.reshape(len(rows), SEEDS, *sheet.shape[1:])).save(fresh / "sheet.png")
        figures = {
            "model": str(model),
            "data": list(data),
            "pictures": len(index),
            "count": count,
            "psnr": psnr,
            "ssim": ssim,
            "loss": loss,
            "loss_by_t": by_t,
            "retrieval": asdict(retrieval),
            "settings": {
                "num_steps": num_steps,
                "guidance_scale": guidance_scale,
                "seed": seed,
                "backend": keras.backend.backend(),
            },
        }
        (fresh / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        curve = _run_losses(Path(model))
        _plots(fresh, by_t, curve)
        page = _page(figures, retrieval, rows, curve is not None)
        (fresh / "report.md").write_text(page, encoding="utf-8")
    return figures


def _pictures(index, size: tuple[int, int]) -> np.ndarray:
    """All pictures in their order, from their middle: uint8 (N, H, W, 3)."""
    return np.stack([decode_crop(read_picture(example), size, (0.5, 0.5), False, 1.0) for example in index])


def _through(pipe: TextToImage, images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents (N, h, w, c), and the pictures that they give back, uint8 (N, H, W, 3)."""
    encode = Compiled(pipe.autoencoder.encode, [pipe.autoencoder])
    decode = Compiled(pipe.image, [pipe.autoencoder])
    parts = [to_numpy(encode(images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return np.concatenate(parts), np.concatenate([to_numpy(decode(part)) for part in parts])


def _losses(pipe: TextToImage, latents, captions, batch_size: int, seed: int) -> tuple[float, list[float]]:
    """The training's loss on fixed noise, and by t."""
    diffusion = GaussianDiffusion(pipe.schedule, pipe.settings.prediction)
    model = DiffusionTraining(pipe.unet, pipe.text_encoder, diffusion, pipe.tokenizer("")[0], bins=BINS, seed=seed)
    model.compile()
    batch = {
        "latent": latents,
        "tokens": pipe.tokenizer(list(captions)),
        "index": np.arange(len(latents), dtype="int32"),
    }
    said = model.evaluate(batch, batch_size=batch_size, verbose=0, return_dict=True)
    return float(said["loss"]), [float(said[f"loss_t{i}"]) for i in range(BINS)]


def _sheet(rows) -> Image.Image:
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def _run_losses(model: Path) -> np.ndarray | None:
    """(steps, losses) of the run whose `model/` this is."""
    path = model.resolve().parent / "losses.csv"
    if model.name != "model" or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]).T


def _plots(directory: Path, by_t: Sequence[float], curve: np.ndarray | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar((np.arange(BINS) + 0.5) / BINS, by_t, width=0.9 / BINS)
    axes.set(xlabel="t / T", ylabel="loss")
    figure.savefig(directory / "loss_by_t.png")
    if curve is not None:
        steps, losses = curve
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, alpha=0.25, linewidth=0.5)
        axes.plot(steps[width - 1 :], smooth)
        axes.set(xlabel="batch", ylabel="loss", ylim=(0, float(np.quantile(losses, 0.99)) * 1.1))
        figure.savefig(directory / "losses.png")


def _page(figures: dict[str, Any], retrieval: Retrieval, rows: Sequence[str], has_curve: bool) -> str:
    count, pictures, settings = figures["count"], figures["pictures"], figures["settings"]
    lines = [
        f"# {figures['model']}",
        "",
        f"Judged on {count} of {pictures} pictures, {settings['num_steps']} steps, guidance scale "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}; every picture as it came.",
        "",
        "| | |",
        "|---|---|",
        f"| pictures come back from their latents | {figures['psnr']:.1f} dB, SSIM {figures['ssim']:.3f} |",
        f"| loss on fixed noise | {figures['loss']:.4f} |",
        f"| a caption's own picture is the nearest of {pictures} "
        f"| {retrieval.nearest:.1%} (by chance {retrieval.chance:.2%}) |",
        f"| it is among the five nearest | {retrieval.in_five:.1%} |",
        f"| pictures that are nearer, in the middle | {retrieval.median_rank:.0f} |",
        "",
        "![pictures, and what came back](reconstructions.png)",
        "",
        "![pictures, and what their captions gave](seen.png)",
        "",
        "![loss by t](loss_by_t.png)",
        "",
        *(["![loss of every batch](losses.png)", ""] if has_curve else []),
        *(f"{i}. {prompt}" for i, prompt in enumerate(rows, 1)),
        "",
        "![the prompts above, a row each, four seeds](sheet.png)",
        "",
    ]
    return "\n".join(lines)
