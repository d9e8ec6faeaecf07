"""The command `latentdiff evaluate`: its arguments, checked before Keras is imported."""

from __future__ import annotations

import argparse
from pathlib import Path

from latentdiff.arguments import number, whole
from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints.clip_directory import CLIPDirectory
from latentdiff.checkpoints.files import read_json
from latentdiff.checkpoints.sources import Source, open_source
from latentdiff.extras import require
from latentdiff.training_config import DiffusionConfig, run_config

_DRAWING = ("prompts", "num_steps", "guidance_scale", "seed")

_EXAMPLES = """An autoencoder is judged by how well pictures come back from their latents; a CLIP pair by how often a
caption finds its own picture among those that are judged, and a picture its own caption; a pipeline by what comes
back, the loss by t, whether a caption gives its own picture, and a sheet of prompts.

examples:
  latentdiff evaluate runs/toy_autoencoder             the run's validation, or what it held out of its data
  latentdiff evaluate stable-diffusion-v1-5 --data pictures/ --size 512 --output report
"""


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff evaluate MODEL --data SOURCE --output DIR`, and `latentdiff evaluate RUN`."""
    parser = commands.add_parser(
        "evaluate",
        help="judge an autoencoder, a CLIP pair or a pipeline on pictures",
        description="Writes a report on a model: a page with figures, plots and sheets.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("model", help="a model directory, a shipped model's name, or the directory of a run of `latentdiff train`")
    add(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="folders of pictures, or shards, captioned but for an autoencoder; default: the run's validation_data, "
        "or what it held out of its data, or all of its data where that is less than a batch",
    )
    add("--output", type=Path, metavar="DIR", help="of the report; new; default: the run's, and `report` in it")
    add("--count", type=whole(1), default=100, metavar="N", help="pictures that are judged, at most; default: 100")
    add("--size", type=whole(1), metavar="N", help="of the pictures, in pixels; default: the run's or the model's own")
    add("--batch-size", type=whole(1), default=16, metavar="N", help="pictures at a time; default: 16")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="tell each part; default: yes")
    drawing = parser.add_argument_group("of a pipeline's drawings")
    add = drawing.add_argument
    prompts = "a prompt a line, rows of the sheet; default: the run's, or captions"
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--num-steps", type=whole(1), metavar="N", help="default: 25")
    add("--guidance-scale", type=number, metavar="X", help="default: 5")
    add("--seed", type=int, metavar="N", help="default: 0")


def _evaluate(options: argparse.Namespace) -> None:
    require("This", ["grain"], "data")
    require("This", ["matplotlib"], "evaluate")
    run = _run(options.model)
    model = resolve_preset(options.model) if run is None else run / "model"
    kind = _kind_of(open_source(model))
    _check_options(options, kind, run)
    config = run_config(kind, run) if run else None
    output = options.output or Path(options.model) / "report"
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"A report's directory must be new. Received: {output}.")
    given = {name: value for name in _DRAWING if (value := getattr(options, name)) is not None}
    prompts = config.prompts if isinstance(config, DiffusionConfig) else []
    if options.prompts:
        prompts = options.prompts.read_text(encoding="utf-8").splitlines()

    from latentdiff.cli import start_keras

    start_keras()
    from latentdiff.evaluation import Drawing, evaluate, pictures_of_run, pictures_of_sources

    if options.data or config is None:
        pictures = pictures_of_sources(options.data, captions=kind != "autoencoder")
    else:
        pictures = pictures_of_run(config, min(options.batch_size, options.count))
    evaluate(
        kind,
        model,
        pictures,
        output,
        count=options.count,
        size=options.size or (config.size if config else None),
        batch_size=options.batch_size,
        drawing=Drawing(**{**given, "prompts": [prompt for prompt in prompts if prompt.strip()]}),
        tell=(lambda text: print(text, flush=True)) if options.progress else (lambda text: None),
    )
    print(output / "report.md")


def _run(name: str) -> Path | None:
    """The directory of a run, by its configuration; None of anything else."""
    config = Path(name) / "config.json"
    if not config.is_file() or not {"data", "steps"} <= read_json(config).keys():
        return None
    if not (config.parent / "model").is_dir():
        raise ValueError(f"A run has a model from its first checkpoint on. Received: {name}, without `model/`.")
    return config.parent


def _kind_of(source: Source) -> str:
    """Which kind of training a model could be of, as `training_config.KINDS` names it."""
    if isinstance(source, CLIPDirectory):
        return "clip"
    if source.kinds == ("autoencoder",):
        return "autoencoder"
    if {"unet", "autoencoder", "text_encoder"} <= set(source.kinds):
        source.settings()  # raises where it is no whole pipeline
        return "diffusion"
    rule = "What is evaluated must be an autoencoder, a CLIP pair, a pipeline, or a run of one"
    raise ValueError(f"{rule}. Received: {source.path}, with {' and '.join(source.kinds) or 'none of these'}.")


def _check_options(options: argparse.Namespace, kind: str, run: Path | None) -> None:
    if run is None and not (options.data and options.output):
        raise ValueError(f"--data and --output must be given, but for a run's directory. Received: {options.model!r}.")
    if run is None and kind == "autoencoder" and options.size is None:
        raise ValueError(f"--size must be given for an autoencoder that is no run's. Received: {options.model!r}.")
    drawing = [name for name in _DRAWING if getattr(options, name) is not None and kind != "diffusion"]
    alien = [*drawing, *(["size"] if kind == "clip" and options.size else [])]
    if alien:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in alien)
        what = {"autoencoder": "An autoencoder draws nothing", "clip": "A CLIP pair draws nothing and has one size"}
        raise ValueError(f"{what[kind]}: it must be evaluated without these options. Received: {named}.")
