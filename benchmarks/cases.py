"""What is measured: tasks, each asked of every system in the same sizes; pure data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PROMPT = "a red heart, noto style"
GUIDANCE_SCALE = 5.0
DTYPES = ("float32", "bfloat16")
TASKS = {
    "unet": "one UNet evaluation with guidance, batch 2",
    "generate": "a whole generation, cold start to picture on disk",
    "text": "text encoding of one prompt",
    "decode": "decoding of one picture",
    "train": "a training step of a 6.1 M parameter UNet, latent 32 x 32 x 4, batch 32",
    "start": "import, load and first step",
    "memory": "peak memory of a generation",
    "fit": "what `fit` adds to its steps, an epoch",
    "scaling": "time against batch size and number of steps; traces; memory over many calls",
}
COLD = ("generate", "start")  # each repetition in a process of its own, timed from its beginning

# SD's own UNet of 6,105,348 parameters; `small` is the rehearsal's.
TRAINING = {
    "full": {
        "channels": (64, 128, 128),
        "attention": (True, True, False),
        "heads": 4,
        "context_dim": 256,
        "groups": 32,
    },
    "small": {"channels": (16, 32), "attention": (True, False), "heads": 2, "context_dim": 16, "groups": 8},
}
LEARNING_RATE = 1e-4
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Size:
    """The model that all systems load, and how much is asked of it.

    Attributes:
        unet: height and width in pixels of the UNet's evaluations.
        pixels: height and width of everything else.
        training: of `TRAINING`.
        latent, batch: of the training.
        leak_pixels: height and width of the many calls that memory is watched over.
        peak_gib: of a process that holds one part in float32, before it is known better.
    """

    unet: tuple[int, ...]
    pixels: int
    training: str
    latent: int
    batch: int
    leak_pixels: int
    peak_gib: float


SIZES = {
    "tiny": Size(unet=(16, 32), pixels=32, training="small", latent=8, batch=4, leak_pixels=16, peak_gib=1.0),
    "emoji": Size(unet=(64, 128), pixels=128, training="full", latent=32, batch=32, leak_pixels=64, peak_gib=1.5),
    "sd15": Size(unet=(256, 512), pixels=512, training="full", latent=32, batch=32, leak_pixels=64, peak_gib=6.5),
}


@dataclass(frozen=True)
class Case:
    """One thing that every system is asked for.

    Attributes:
        task: of `TASKS`, but "memory", which is read off "generate".
        dtype: what the networks compute in.
        pixels: height and width of the picture; None where there is none.
    """

    task: str
    dtype: str
    pixels: int | None = None

    @property
    def name(self) -> str:
        """As results call it: "unet 512 bfloat16"."""
        return " ".join(str(part) for part in (self.task, self.pixels, self.dtype) if part is not None)


def make_cases(
    tasks: Iterable[str], size: Size, dtypes: Iterable[str], pixels: Iterable[int] | None = None
) -> list[Case]:
    """The cases of some tasks, each once, in the order of `TASKS`.

    Args:
        tasks: of `TASKS`.
        size: the model's.
        dtypes: of `DTYPES`; a generation, a start and our own laws are measured in the last one alone.
        pixels: in place of the size's own.
    """
    chosen = {"generate" if task == "memory" else task for task in tasks}
    dtypes, asked = list(dtypes), tuple(pixels or ())
    cases = []
    for task in (task for task in TASKS if task in chosen):
        for dtype in dtypes[-1:] if task in (*COLD, "fit", "scaling") else dtypes:
            if task in ("text", "train", "fit"):
                cases.append(Case(task, dtype))
            else:
                each = asked or (size.unet if task == "unet" else (size.pixels,))
                cases += [Case(task, dtype, count) for count in each]
    return cases
