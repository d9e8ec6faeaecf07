"""The commands about files, `latentdiff convert` and `latentdiff info`; neither imports Keras."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from latentdiff.catalogue import preset_names, resolve_preset, weights_directory
from latentdiff.checkpoints.diffusers import FILE_DTYPES
from latentdiff.checkpoints.diffusers_scheduler import PREDICTIONS

_CONVERT_EXAMPLES = """examples:
  latentdiff convert v1-5-pruned-emaonly.safetensors sd15 --dtype float16
  latentdiff convert v2-1_768-nonema-pruned.ckpt sd21 --prediction v --max-shard-size 2GB
"""
_WORDS = {"unet": "UNet", "autoencoder": "autoencoder", "text_encoder": "text encoder"}


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff convert SOURCE DIRECTORY`."""
    parser = commands.add_parser(
        "convert",
        help="make a diffusers directory of a checkpoint",
        description="Makes a diffusers directory of a checkpoint of any form. A pickle (.ckpt, .bin) is read through "
        "torch's weights-only unpickler, which the extra latentdiff[convert] brings.",
        epilog=_CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("source", help="a model directory, a single file, or a shipped model's name")
    add("directory", help="what is written: whole or not at all")
    add("--dtype", choices=FILE_DTYPES, help="of the files; default: each tensor keeps its own")
    add("--max-shard-size", metavar="SIZE", help="of a weights file, such as 2GB; default: one file for each network")
    add("--variant", metavar="NAME", help="which weights of a directory, such as fp16")
    add("--ema", action="store_true", help="take the averaged weights of a single file that holds both kinds")
    add("--prediction", choices=tuple(PREDICTIONS.values()), help="what the UNet predicts, where the file does not say")
    add("--overwrite", action="store_true", help="replace a model directory that exists")


def add_info(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff info PATH`."""
    parser = commands.add_parser(
        "info",
        help="say what is in a checkpoint",
        description="Says what is in a model directory or a single file, without reading its weights.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_info)
    parser.add_argument("path", help="a model directory, a single file, or a shipped model's name")
    parser.add_argument("--json", action="store_true", help="all of it, as JSON")
    parser.add_argument("--variant", metavar="NAME", help="which weights of a directory, such as fp16")


def _convert(options: argparse.Namespace) -> None:
    from latentdiff.convert import convert

    convert(
        _path(options.source, options.variant),
        options.directory,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        variant=options.variant,
        ema=options.ema,
        prediction=options.prediction,
        overwrite=options.overwrite,
    )
    print(options.directory)


def _info(options: argparse.Namespace) -> None:
    from latentdiff.checkpoints.describe import describe
    from latentdiff.checkpoints.sources import open_source

    said = describe(open_source(_path(options.path, options.variant)), options.variant)
    print(json.dumps(said, indent=2) if options.json else _table(said))


def _path(source: str, variant: str | None) -> Path:
    """The path that a name, a path or a hub's address stands for; what is at it is not asked here."""
    if source.startswith("hf://"):
        return resolve_preset(source, variant=variant)
    return weights_directory() / source if source in preset_names() else Path(source)


def _table(said: dict[str, Any]) -> str:
    lines = [f"{said['path']}: {said['form']}{'' if said['whole'] else ', not a whole pipeline'}"]
    for kind, part in said["parts"].items():
        if "problem" in part:
            lines += [f"{_WORDS[kind]:13} cannot be opened", *_indented(part["problem"])]
            continue
        dtypes = ", ".join(part["dtypes"])
        lines.append(f"{_WORDS[kind]:13} {part['parameters']:>13,} parameters, {part['tensors']} tensors, {dtypes}")
        if part["ignored"]:
            lines.append(f"{'':13} not used: {_few(part['ignored'])}")
    lines += [f"{_WORDS[kind]:13} missing" for kind in said["missing"]]
    settings = said["settings"]
    if settings is not None:
        schedule = f"{settings['schedule']}, {settings['num_timesteps']} timesteps"
        if settings["schedule"] in ("linear", "scaled_linear"):
            schedule += f", beta {settings['beta_start']:g} .. {settings['beta_end']:g}"
        lines.append(f"{'schedule':13} {schedule}{', zero terminal SNR' if settings['zero_terminal_snr'] else ''}")
        lines += [f"{'prediction':13} {settings['prediction']}", f"{'sampler':13} {settings['sampler']}"]
    if said["tokens"] is not None:
        lines.append(f"{'tokenizer':13} {said['tokens']:,} tokens")
    if said["sample_size"] is not None:
        lines.append(f"{'latent':13} {' x '.join(map(str, said['sample_size']))}")
    lines += [f"note: {note}" for note in said["notes"]]
    for problem in said["problems"]:
        lines += ["problem:", *_indented(problem)]
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
