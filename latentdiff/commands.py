"""The commands about files: `latentdiff convert` and `latentdiff info`, without Keras, and `latentdiff export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from latentdiff.arguments import number, whole
from latentdiff.catalogue import preset_names, resolve_preset, weights_directory
from latentdiff.checkpoints.diffusers import FILE_DTYPES
from latentdiff.checkpoints.diffusers_scheduler import PREDICTIONS, SAMPLER_CLASSES
from latentdiff.checkpoints.sources import open_source

_CONVERT_EXAMPLES = """examples:
  latentdiff convert v1-5-pruned-emaonly.safetensors sd15 --dtype float16
  latentdiff convert v2-1_768-nonema-pruned.ckpt sd21 --prediction v --max-shard-size 2GB
"""
_EXPORT_EXAMPLES = """examples:
  latentdiff export emoji --output models/emoji/1
  latentdiff export sd15 --output models/sd15/1 --height 512 768 --width 512 512 --dtype bfloat16
  latentdiff export emoji --output emoji_onnx --format onnx
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


def add_export(commands: argparse._SubParsersAction) -> None:
    """Adds `latentdiff export PRESET --output models/emoji/1`."""
    parser = commands.add_parser(
        "export",
        help="make a SavedModel for TensorFlow Serving",
        description="Makes one TensorFlow SavedModel of a model: a prompt goes in, a PNG comes out. "
        "Or its networks as ONNX or OpenVINO files.",
        epilog=_EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("preset", help="a shipped model's name, a model directory, or a single file")
    add("--output", required=True, metavar="DIR", help="new; a SavedModel's ends in its version: models/emoji/1")
    add("--format", choices=("saved_model", "onnx", "openvino"), default="saved_model", help="default: saved_model")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the networks; default: chosen by the device")
    add(
        "--height", type=whole(1), nargs="+", metavar="H", help="in pixels, one for each size; default: the model's own"
    )
    add("--width", type=whole(1), nargs="+", metavar="W", help="in pixels, one for each size; default: the model's own")
    names = ", ".join(SAMPLER_CLASSES)
    add("--samplers", nargs="+", choices=SAMPLER_CLASSES, metavar="NAME", help=f"to choose from; default: {names}")
    add("--num-steps", type=whole(1), default=25, help="of a request that names none; default: 25")
    add("--guidance-scale", type=number, default=5.0, help="of a request that names none; default: 5")
    add("--max-batch", type=whole(1), default=16, help="pictures of one request; default: 16")
    add("--max-steps", type=whole(1), default=50, help="of one request; default: 50")
    add("--max-prompt-bytes", type=whole(1), default=2048, help="of one prompt; default: 2048")
    add("--max-guidance-scale", type=number, default=100.0, help="of one request; default: 100")
    add("--jit-compile", action="store_true", help="compile the networks with XLA, for a server with a GPU")


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

    said = describe(open_source(_path(options.path, options.variant)), options.variant)
    print(json.dumps(said, indent=2) if options.json else _table(said))


def _export(options: argparse.Namespace) -> None:
    heights, widths = options.height or [None], options.width or [None]
    networks_only = options.format != "saved_model"
    _check_export(options, heights, widths)
    path = resolve_preset(options.preset)
    open_source(path)  # so that what cannot be opened is told before Keras is imported

    from latentdiff.cli import start_keras

    start_keras()
    from latentdiff.export import check_format, export_networks, export_saved_model
    from latentdiff.pipeline import TextToImage

    if networks_only:
        check_format(options.format)
    pipeline = TextToImage.from_preset(path, dtype="float32" if networks_only else options.dtype)
    if networks_only:
        export_networks(pipeline, options.output, options.format, height=heights[0], width=widths[0])
    else:
        licences = path / "LICENSES.md"
        export_saved_model(
            pipeline,
            options.output,
            sizes=list(zip(heights, widths, strict=True)),
            **({"samplers": options.samplers} if options.samplers else {}),
            num_steps=options.num_steps,
            guidance_scale=options.guidance_scale,
            max_batch=options.max_batch,
            max_steps=options.max_steps,
            max_prompt_bytes=options.max_prompt_bytes,
            max_guidance_scale=options.max_guidance_scale,
            jit_compile=options.jit_compile,
            licences=licences.read_text(encoding="utf-8") if licences.is_file() else "",
        )
    print(options.output)


def _check_export(options: argparse.Namespace, heights: list, widths: list) -> None:
    """What can be told of an export before a model is opened."""
    output = Path(options.output)
    if len(heights) != len(widths):
        raise ValueError(f"--height and --width must name equally many sizes. Received: {heights}, {widths}.")
    if options.format != "saved_model":
        if len(heights) > 1:
            raise ValueError(f"--format {options.format} writes networks of one size. Received: {len(heights)} sizes.")
        if options.dtype not in (None, "float32"):
            raise ValueError(f"--format {options.format} writes float32. Received: --dtype {options.dtype}.")
    elif not output.name.isdecimal():
        raise ValueError(f"--output must end in a version's number: models/emoji/1. Received: {options.output!r}.")
    if output.exists():
        raise ValueError(f"--output must not exist yet: a version is never replaced. Received: {options.output!r}.")
    if options.num_steps > options.max_steps:
        raise ValueError(
            f"--num-steps must be at most --max-steps, {options.max_steps}. Received: {options.num_steps}."
        )
    if not 0 <= options.guidance_scale <= options.max_guidance_scale:
        rule = f"--guidance-scale must lie in 0 .. --max-guidance-scale, {options.max_guidance_scale:g}"
        raise ValueError(f"{rule}. Received: {options.guidance_scale:g}.")


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
