"""The command `latentdiff train`: its arguments, checked before Keras is imported."""

from __future__ import annotations

import argparse
import shutil
import typing
from dataclasses import replace
from pathlib import Path

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
    if options.max_steps is not None:
        _rehearse(config, options)
        return
    from latentdiff.training.recipe import train

    run = train(config, options.output, options.progress)
    if run.step < config.steps:
        print(f"stopped after step {run.step} of {config.steps}; the same command goes on")
    else:
        print(options.output / "model")


def _rehearse(config: Config, options: argparse.Namespace) -> None:
    """A run of a few steps, in a directory beside the run's that all hosts see; what was there before is of a kill."""
    from latentdiff.backend import is_first_process
    from latentdiff.training.recipe import train

    aside = options.output.with_name(f".{options.output.name}-rehearsal")
    shutil.rmtree(aside, ignore_errors=True)
    changes: dict[str, typing.Any] = {"steps": options.max_steps, "checkpoint_every": options.max_steps, "log_every": 1}
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
