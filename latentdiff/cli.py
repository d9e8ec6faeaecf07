"""The `latentdiff` command: arguments are checked first, and Keras is imported only when they are good."""

from __future__ import annotations

import argparse
import gc
import math
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from latentdiff import __version__, commands, commands_evaluation, commands_training
from latentdiff.arguments import level, number, text, whole
from latentdiff.catalogue import preset_names, resolve_preset
from latentdiff.checkpoints.diffusers_scheduler import PREDICTIONS, SAMPLER_CLASSES
from latentdiff.checkpoints.sources import open_source
from latentdiff.engine import ENGINES, NETWORKS, check_cache_interval, check_engine, check_free, check_tiled, freeable

if TYPE_CHECKING:
    from latentdiff.checkpoints.sources import Source
    from latentdiff.pictures import Settings

SAMPLERS = tuple(SAMPLER_CLASSES)
DTYPES = ("float32", "bfloat16", "float16")

_SHARED = (
    "negative_prompt",
    "preset",
    "num_steps",
    "guidance_scale",
    "guidance_interval",
    "cache_interval",
    "seed",
    "sampler",
    "height",
    "width",
    "dtype",
    "ema",
    "prediction",
    "engine",
)

_EXAMPLES = """examples:
  latentdiff generate "a red heart, noto style"
  latentdiff generate "a red heart" "a blue heart" --num-images 2 --seed 7 --output hearts.png
  latentdiff generate --from out.png --guidance-scale 3 --output again.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; None takes those that the program was started with.

    Returns:
        The exit status: 0, or 130 after an interrupt.

    Raises:
        SystemExit: with status 2 and one line on standard error, if the arguments or the files they name are wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    before = gc.get_threshold()
    gc.set_threshold(100_000)  # a start makes a million objects, all of which stay
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except (ValueError, OSError) as error:
        parser.error(_sentence(error))
    except ImportError as error:
        if error.name is not None:  # Python's own, of a broken installation; those of this package name an extra
            raise
        parser.error(_sentence(error))
    except KeyboardInterrupt:
        print("latentdiff: stopped", file=sys.stderr)
        return 130
    finally:
        gc.set_threshold(*before)
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"latentdiff: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="latentdiff", description="Latent diffusion: a prompt goes in, a picture comes out.")
    parser.add_argument("--version", action="version", version=f"latentdiff {__version__}")
    chosen = parser.add_subparsers(metavar="command", required=True)
    commands.add_convert(chosen)
    commands.add_info(chosen)
    commands.add_export(chosen)
    commands_training.add_train(chosen)
    commands_evaluation.add_evaluate(chosen)

    generate = chosen.add_parser(
        "generate",
        help="make pictures from prompts",
        description="Makes pictures from prompts. Each PNG carries the settings that made it; --from reads them back.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("prompt", nargs="*", type=text, help="what to draw; several prompts make several pictures")
    add("--from", dest="source", metavar="PICTURE", help="take every setting that is not given here from this PNG")
    add("--preset", help=f"a shipped model ({', '.join(preset_names())}), a model directory or file; default: emoji")
    add("--output", default="out.png", metavar="PNG", help="default: out.png; several: out-0.png, out-1.png, ...")
    add("--negative-prompt", type=text, help="what to keep away from; default: nothing")
    add("--num-images", type=whole(1), default=1, help="pictures for each prompt; default: 1")
    add("--num-steps", type=whole(1), help="default: 25")
    add("--guidance-scale", type=number, help="how closely to follow the prompt; default: 5")
    add("--guidance-interval", nargs=2, type=level, metavar=("LOW", "HIGH"), help="noise over signal; default: 0 inf")
    add("--cache-interval", type=whole(1), help="steps that share the UNet's deep features; default: 1, faster: 3")
    add("--seed", type=whole(0), help="of the first picture, the next has one more; default: random")
    add("--sampler", choices=SAMPLERS, metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: the model's own")
    add("--height", type=whole(1), help="in pixels; default: the model's own")
    add("--width", type=whole(1), help="in pixels; default: the model's own")
    add("--batch-size", type=whole(1), help="pictures made at a time; default: all")
    add("--tiled", action=argparse.BooleanOptionalAction, help="decode in strips; default: beyond 1024 x 1024 pixels")
    add("--dtype", choices=DTYPES, help="of the networks; default: chosen by the device")
    add("--ema", action=argparse.BooleanOptionalAction, help="the averaged weights of a single file; default: no")
    add("--prediction", choices=tuple(PREDICTIONS.values()), help="what the UNet predicts, where no file says it")
    add("--engine", choices=ENGINES, help="what computes the networks: keras, or openvino, an extra; default: keras")
    add("--free", nargs="*", choices=NETWORKS, help="networks held only while they are used; default: all of Keras'")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show each step; default: yes")
    return parser


def _generate(options: argparse.Namespace) -> None:
    prompts, settings = _settings(options)
    check_engine(settings.engine)
    check_cache_interval(settings.engine, settings.cache_interval)
    check_tiled(settings.engine, options.tiled)
    # Each network is used once, whatever the number of pictures, so that none is read twice.
    free = freeable(settings.engine) if options.free is None else options.free
    check_free(settings.engine, free)
    weights = {"ema": settings.ema, "prediction": settings.prediction}
    source = open_source(resolve_preset(settings.preset), **weights)  # what cannot be opened is told at once
    total = len(prompts) * options.num_images
    seeds = range(settings.seed, settings.seed + total)
    outputs = _outputs(options.output, total)
    _check_seeds(seeds)

    backend = start_keras()
    from latentdiff.pictures import write_png
    from latentdiff.pipeline import TextToImage

    _check_run(source, settings)
    if settings.backend not in (None, backend):
        _show_warning(
            f"{options.source} was made with {settings.backend}, and this is {backend}: grey levels may differ by one"
        )
    pipeline = TextToImage.from_preset(
        settings.preset, dtype=settings.dtype, engine=settings.engine, free=free, **weights
    )
    images = pipeline.generate(
        prompts,
        negative_prompt=settings.negative_prompt,
        num_images=options.num_images,
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        guidance_interval=_interval(settings),
        cache_interval=settings.cache_interval,
        seed=settings.seed,
        sampler=settings.sampler,
        height=settings.height,
        width=settings.width,
        batch_size=options.batch_size,
        tiled=options.tiled,
        progress=options.progress,
    )
    made = replace(
        settings,
        sampler=settings.sampler or pipeline.settings.sampler,
        height=images.shape[1],
        width=images.shape[2],
        dtype=pipeline.dtype,
        backend=backend,
    )
    for index, (image, seed, output) in enumerate(zip(images, seeds, outputs, strict=True)):
        write_png(output, image, replace(made, prompt=prompts[index // options.num_images], seed=seed))
        print(f"{output}  seed {seed}")


def _check_run(source: Source, settings: Settings) -> None:
    """Raises ValueError where a model cannot make such a picture: what `generate` would say, before it is loaded."""
    from latentdiff import presets
    from latentdiff.generate_arguments import read_size, read_table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the load gives them again
        stored = presets.settings_of(source)
    read_table(settings.sampler, settings.num_steps, 0.0, *stored)
    channels = source.component("autoencoder").config["channels"]
    read_size(settings.height, settings.width, presets.sample_size_of(source), channels)


def start_keras(find_devices: bool = True) -> str:
    """The name of Keras' backend, once that has been imported and has found its devices.

    Args:
        find_devices: hosts must be joined before.
    """
    with _without_start_log():
        import keras

        if find_devices:
            keras.ops.zeros(())
        return keras.backend.backend()


@contextmanager
def _without_start_log() -> Iterator[None]:
    """Holds back what TensorFlow reports of its build and of missing GPUs, unless the user has set its log level.

    Its C++ code writes to the descriptor, and some of it before it heeds any level. If the start fails, all is shown.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(stderr, log.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def _settings(options: argparse.Namespace) -> tuple[list[str], Settings]:
    """The prompts, and what all pictures share: from the command line, else from the picture, else the default."""
    from latentdiff.pictures import Settings, read_settings

    given = {name: getattr(options, name) for name in _SHARED if getattr(options, name) is not None}
    if options.source is not None:
        stored = replace(read_settings(options.source), version=__version__)
        if stored.sampler not in (None, *SAMPLERS):
            raise ValueError(f"{options.source} was made with a sampler unknown here: {stored.sampler!r}.")
        return options.prompt or [stored.prompt], replace(stored, **given)
    if not options.prompt:
        raise ValueError("a prompt is needed, or a picture to take it from: latentdiff generate PROMPT, or --from PNG")
    defaults = {"preset": "emoji", "seed": secrets.randbelow(2**32)}
    return options.prompt, Settings(prompt=options.prompt[0], **{**defaults, **given})


def _interval(settings: Settings) -> tuple[float, float] | None:
    """The interval as `generate` takes it; JSON has no infinity."""
    if settings.guidance_interval is None:
        return None
    low, high = settings.guidance_interval
    return low or 0.0, math.inf if high is None else high


def _outputs(output: str, total: int) -> list[Path]:
    """The files to write: `output` itself, or numbered ones beside it, `out-0.png` to `out-3.png`."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png. Received: {output!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"--output must be in a directory that exists. Received: {output!r}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output must be in a directory that can be written to. Received: {output!r}.")
    digits = len(str(total - 1))
    paths = [path.with_stem(f"{path.stem}-{index:0{digits}}") for index in range(total)] if total > 1 else [path]
    for candidate in paths:
        if candidate.is_dir():
            raise ValueError(f"--output must not be a directory. Received: {str(candidate)!r}.")
    return paths


def _check_seeds(seeds: range) -> None:
    from latentdiff.pictures import MAX_SEED

    if seeds[-1] > MAX_SEED:
        raise ValueError(f"--seed must leave every picture's seed at most {MAX_SEED}. Received: {seeds[0]}.")


def _sentence(error: Exception) -> str:
    """An error in one line; an operating system's error names its file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"latentdiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
