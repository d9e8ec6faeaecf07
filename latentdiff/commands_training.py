"""The commands `latentdiff train` and `latentdiff evaluate`: their arguments, checked before Keras is imported."""

from __future__ import annotations

import argparse
import shutil
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.arguments import number, whole
from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints.files import read_json
from latentdiff.checkpoints.sources import open_source
from latentdiff.extras import require
from latentdiff.training_config import KINDS, Config, field_types, read_config

_TRAIN_EXAMPLES = """examples:
  latentdiff train autoencoder --config scripts/toy_autoencoder.toml --output runs/toy_autoencoder
  latentdiff train diffusion --data pictures/ --steps 2000 --start emoji --size 128 --output runs/mine
  latentdiff train diffusion --config mine.toml --output runs/mine --max-steps 2     a rehearsal of the whole

The same command goes on with a run that was interrupted. What was trained is the model directory OUTPUT/model.
"""


def add_train(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff train autoencoder|clip|diffusion --config FILE --output DIR`."""
    parser = commands.add_parser(
        "train",
        help="train an autoencoder, a CLIP pair, or latent diffusion",
        description="Trains on captioned pictures, from random weights or from a model's.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for kind in KINDS:
        each = kinds.add_parser(kind, help=f"train {kind}", allow_abbrev=False)
        each.set_defaults(run=_train)
        add = each.add_argument
        add("--config", type=Path, metavar="FILE", help="TOML; each of its values has an option below")
        add("--output", type=Path, required=True, metavar="DIR", help="of the run; one that is there is gone on with")
        add("--max-steps", type=int, metavar="N", help="rehearse: all of it in N steps, in a directory that is removed")
        add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a bar; default: yes")
        for name, type_ in field_types(kind).items():
            add(f"--{name.replace('_', '-')}", **_option(type_))


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff evaluate MODEL --data SOURCE --output DIR`, and `latentdiff evaluate RUN`."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a model on captioned pictures",
        description="Writes a report: how well pictures come back from their latents, the loss by t, whether a caption "
        "gives its own picture, and a sheet of prompts.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("model", help="a model directory, a shipped model's name, or the directory of a run of `train diffusion`")
    add("--data", nargs="+", metavar="SOURCE", help="folders of captioned pictures, or shards; default: the run's own")
    add("--output", type=Path, metavar="DIR", help="of the report; new; default: the run's, and `report` in it")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, rows of the sheet; default: the run's or captions",
    )
    add("--count", type=whole(1), default=100, metavar="N", help="pictures that are judged; default: 100")
    add("--size", type=int, metavar="N", help="of the pictures, in pixels; default: the model's own")
    add("--num-steps", type=whole(1), default=25, metavar="N", help="of the drawings; default: 25")
    add("--guidance-scale", type=number, default=5.0, metavar="X", help="of the drawings; default: 5")
    add("--seed", type=int, default=0, metavar="N", help="of the drawings; default: 0")
    add("--batch-size", type=whole(1), default=16, metavar="N", help="pictures at a time; default: 16")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="tell each part; default: yes")


def _evaluate(options: argparse.Namespace) -> None:
    require("This", ["grain"], "data")
    require("This", ["matplotlib"], "evaluate")
    model, defaults = _run_or_model(options.model)
    data, output, size = (getattr(options, name) or defaults.get(name) for name in ("data", "output", "size"))
    if not data or not output:
        raise ValueError(f"--data and --output must be given, but for a run's directory. Received: {options.model!r}.")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"A report's directory must be new. Received: {output}.")
    prompts = defaults.get("prompts", [])
    if options.prompts:
        prompts = options.prompts.read_text(encoding="utf-8").splitlines()
    model = resolve_preset(model)
    open_source(model)  # so that what cannot be opened is told before Keras is imported

    from latentdiff.cli import start_keras

    start_keras()
    from latentdiff.evaluation import evaluate

    evaluate(
        model,
        data,
        output,
        prompts=[prompt for prompt in prompts if prompt.strip()],
        count=options.count,
        size=size,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=options.progress,
    )
    print(output / "report.md")


def _run_or_model(name: str) -> tuple[str, dict[str, Any]]:
    """A model, and what the run that trained it says of data: of pictures that it was not trained on, where it can."""
    run = Path(name)
    if not ((run / "config.json").is_file() and (run / "model").is_dir()):
        return name, {}
    config = read_json(run / "config.json")
    data = config.get("validation_data") or config.get("data")
    known = {"data": data, "size": config.get("size"), "prompts": config.get("prompts", [])}
    return str(run / "model"), {**known, "output": run / "report"}


def _option(type_) -> dict:
    """An option's arguments, for a value of the configuration; absent options are None."""
    if typing.get_origin(type_) is list:
        (item,) = typing.get_args(type_)
        return {"nargs": "*", **_option(item)} if item is not bool else {"nargs": "*", "type": _boolean}
    if type_ is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": type_, "metavar": {str: "TEXT", int: "N", float: "X"}[type_]}


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false. Received: {text!r}")
    return text == "true"


def _train(options: argparse.Namespace) -> None:
    require("This", ["grain"], "data")
    known = field_types(options.kind)
    given = {name: value for name in known if (value := getattr(options, name)) is not None}
    config = read_config(options.kind, options.config, given)
    if options.max_steps is not None and options.max_steps < 1:
        raise ValueError(f"--max-steps must be at least 1. Received: {options.max_steps}.")

    from latentdiff.cli import start_keras

    start_keras(find_devices=not config.hosts)
    from latentdiff.training.recipe import train

    if options.max_steps is None:
        run = train(config, options.output, options.progress)
        if run.step < config.steps:
            print(f"stopped after step {run.step} of {config.steps}; the same command goes on")
        else:
            print(options.output / "model")
        return
    _rehearse(config, options)


def _rehearse(config: Config, options: argparse.Namespace) -> None:
    """A run of a few steps, in a directory beside the run's that all hosts see; what was there before is of a kill."""
    from latentdiff.backend import is_first_process
    from latentdiff.training.recipe import train

    aside = options.output.with_name(f".{options.output.name}-rehearsal")
    shutil.rmtree(aside, ignore_errors=True)
    changes: dict[str, Any] = {"steps": options.max_steps, "checkpoint_every": options.max_steps, "log_every": 1}
    if options.kind == "diffusion":
        changes["cache"] = ""  # a whole one stays as it is
    try:
        run = train(
            replace(config, **changes),
            aside / "run",
            options.progress,
            most_latents=options.max_steps * config.batch_size,
        )
        if is_first_process():
            what = _opened(options.kind, aside)
            print(f"rehearsed {run.step} steps, a checkpoint{what}")
    finally:
        if not config.hosts or is_first_process():
            shutil.rmtree(aside, ignore_errors=True)


def _opened(kind: str, aside: Path) -> str:
    """Opens the model of a rehearsal, and exports it where that can be done; what there is to say of it."""
    if kind != "diffusion":
        return " and the model's directory"
    import keras

    from latentdiff.pipeline import TextToImage

    pipe = TextToImage.from_preset(aside / "run" / "model", dtype="float32")
    if keras.backend.backend() != "tensorflow":
        return " and the model's directory; a SavedModel is exported with KERAS_BACKEND=tensorflow"
    from latentdiff.export import export_saved_model

    export_saved_model(pipe, aside / "export" / "1")
    return ", the model's directory and a SavedModel"
