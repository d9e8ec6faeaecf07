"""What a pipeline is worth: how pictures come back, the loss by t, and whether a caption gives its own picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.evaluation.pictures import Pictures, check_size, read_pictures
from latentdiff.evaluation.plots import SHOWN, bars_by_t, sheet
from latentdiff.evaluation.report import Drawing, Report
from latentdiff.evaluation.report_autoencoder import come_back
from latentdiff.evaluation.retrieval import CELLS, Gallery
from latentdiff.pipeline import TextToImage
from latentdiff.training.diffusion import DiffusionTraining

SEEDS = 4  # pictures of a prompt on the sheet
BINS = 10  # of t


def diffusion_report(
    model: str | Path,
    pictures: Pictures,
    size: int | None,
    batch_size: int,
    drawing: Drawing,
    tell: Callable[[str], Any],
) -> Report:
    """Of a pipeline; see `evaluate`.

    Figures: "psnr" in decibels, "ssim", "loss", "loss_by_t" from small t to large, "retrieval" among all pictures.
    """
    pipe = TextToImage.from_preset(model, dtype="float32")
    side = pipe.parts.sample_size[0] * pipe.autoencoder.factor if size is None else size
    check_size(side, math.lcm(pipe.autoencoder.factor, CELLS))
    judged = read_pictures(pictures.judged, side)
    captions = [example.captions[0] for example in pictures.judged]
    everything = np.concatenate([judged, read_pictures(pictures.others, side)]) if len(pictures.others) else judged

    tell(f"{len(everything)} pictures; {len(judged)} of them come back from their latents")
    back, latents = come_back(pipe.autoencoder, judged, batch_size)
    tell("the loss by t")
    loss, by_t = _losses(pipe, latents, captions, batch_size, drawing.seed)
    tell(f"{len(captions)} captions are drawn")
    settings = {"num_steps": drawing.num_steps, "guidance_scale": drawing.guidance_scale}

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        sizes = {"height": side, "width": side, "batch_size": batch_size}
        return pipe.generate(list(prompts), seed=list(seeds), progress=False, **sizes, **settings)

    drawn = draw(captions, [drawing.seed] * len(captions))
    retrieval = Gallery(everything).find(drawn, np.arange(len(judged)))
    rows = list(drawing.prompts) or captions[:6]
    seeds = [drawing.seed + i for i in range(SEEDS)]
    seen = draw([prompt for prompt in rows for _ in seeds], seeds * len(rows))
    return Report(
        {
            **back.figures,
            "loss": loss,
            "loss_by_t": by_t,
            "retrieval": asdict(retrieval),
            "settings": {**settings, "seed": drawing.seed},
        },
        [
            *back.table,
            ("loss on fixed noise", f"{loss:.4f}"),
            (
                f"a caption's own picture is the nearest of {len(everything)}",
                f"{retrieval.nearest:.1%} (by chance {retrieval.chance:.2%})",
            ),
            ("it is among the five nearest", f"{retrieval.in_five:.1%}"),
            ("pictures that are nearer, in the middle", f"{retrieval.median_rank:.0f}"),
        ],
        [
            *back.images,
            ("seen.png", "pictures, and what their captions gave", sheet([judged[:SHOWN], drawn[:SHOWN]]).save),
            ("loss_by_t.png", "loss by t", bars_by_t(by_t).savefig),
            (
                "sheet.png",
                "the prompts below, a row each, four seeds",
                sheet(seen.reshape(len(rows), SEEDS, *seen.shape[1:])).save,
            ),
        ],
        note=f"Drawn with {drawing.num_steps} steps, guidance scale {drawing.guidance_scale:g}, seed {drawing.seed}; "
        "every picture as it came.",
        rows=rows,
    )


def _losses(
    pipe: TextToImage, latents: np.ndarray, captions: Sequence[str], batch_size: int, seed: int
) -> tuple[float, list[float]]:
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
