"""A report on a model: figures as JSON, and a page of Markdown with plots and sheets that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from latentdiff.checkpoints.files import check_replaceable, replaced_directory
from latentdiff.evaluation.pictures import Pictures
from latentdiff.evaluation.plots import curve, losses_of_run


@dataclass(frozen=True)
class Drawing:
    """How a pipeline draws for its report.

    Attributes:
        prompts: rows of the contact sheet, four seeds each; the first captions where there are none.
        num_steps, guidance_scale, seed: as `TextToImage.generate`'s.
    """

    prompts: Sequence[str] = ()
    num_steps: int = 25
    guidance_scale: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What was found out about a model.

    Attributes:
        figures: for report.json.
        table: (what, how much) of the page.
        images: (file's name, what it shows, what saves it to a path), in the page's order.
        note: a sentence about how it was judged.
        rows: what the last image's rows show.
    """

    figures: dict[str, Any]
    table: Sequence[tuple[str, str]]
    images: Sequence[tuple[str, str, Callable[[Path], Any]]]
    note: str = ""
    rows: Sequence[str] = ()


def evaluate(
    kind: str,
    model: str | Path,
    pictures: Pictures,
    directory: str | Path,
    *,
    count: int = 100,
    size: int | None = None,
    batch_size: int = 16,
    drawing: Drawing | None = None,
    tell: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:
    """Judges a model on pictures, and writes report.md, report.json, plots and sheets.

    Args:
        kind: "autoencoder", "clip" or "diffusion", what the model is.
        model: its directory, or a shipped name.
        pictures: see `pictures_of_run` and `pictures_of_sources`.
        directory: of the report; new.
        count: pictures that are judged, at most.
        size: of the pictures, in pixels; None is the model's own, which an autoencoder has not.
        batch_size: pictures at a time.
        drawing: how a pipeline draws; None is as `Drawing` says.
        tell: is told each part of the work as it begins.

    Returns:
        The figures, as report.json has them.

    Raises:
        FileExistsError: `directory` has files.
        ValueError: the model or the size is not what it must be.
    """
    check_replaceable(directory)
    pictures = pictures.at_most(count, batch_size)
    batch_size = min(batch_size, len(pictures.judged))
    # Each kind's networks are imported when it is asked for.
    if kind == "autoencoder":
        from latentdiff.evaluation.report_autoencoder import autoencoder_report

        report = autoencoder_report(model, pictures, size, batch_size, tell)
    elif kind == "clip":
        from latentdiff.evaluation.report_clip import clip_report

        report = clip_report(model, pictures, batch_size, tell)
    else:
        from latentdiff.evaluation.report_diffusion import diffusion_report

        report = diffusion_report(model, pictures, size, batch_size, drawing or Drawing(), tell)
    figures = {
        "model": str(model),
        "kind": kind,
        "data": list(pictures.sources),
        "pictures": len(pictures),
        "count": len(pictures.judged),
        "trained_on": pictures.trained_on,
        "backend": keras.backend.backend(),
        **report.figures,
    }
    losses = losses_of_run(Path(model))
    images = list(report.images)
    if losses is not None:
        images.insert(0, ("losses.png", "loss of every batch", curve(losses).savefig))
    with replaced_directory(directory) as fresh:
        for name, _, save in images:
            save(fresh / name)
        (fresh / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        lines = [
            f"# {model}",
            "",
            " ".join([f"Judged on {pictures}.", *([report.note] if report.note else [])]),
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {much} |" for what, much in report.table),
            "",
            *(line for name, what, _ in images for line in (f"![{what}]({name})", "")),
            *(f"{i}. {row}" for i, row in enumerate(report.rows, 1)),
        ]
        (fresh / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return figures
