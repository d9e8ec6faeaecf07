"""The systems that are compared, by name; nothing of theirs is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case

FORWARD = ("unet", "text", "decode", "generate", "start")


class Measured:
    """A function that measures by itself and gives figures, and is warm already; others are timed from outside."""

    def __init__(self, call: Callable[[], dict[str, Any]]):
        self.call = call

    def __call__(self) -> dict[str, Any]:
        return self.call()


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        system: of `SYSTEMS`.
        case: what to do.
        directory: the model's.
        work: a folder for what a system makes of the model, and for outputs.
        size: of `cases.SIZES`.
        threads: how many compute.
        num_steps: of a generation.
        seconds: that a repetition lasts at least.
    """

    system: str
    case: Case
    directory: Path
    work: Path
    size: str
    threads: int
    num_steps: int
    seconds: float

    @property
    def files(self) -> Path:
        """Where the system keeps what it makes of the model first."""
        return files_of(self.system, self.size, self.work)


def files_of(system: str, size: str, work: Path) -> Path:
    """The folder of what a system makes of a model of that size."""
    return work / f"{size}-{SYSTEMS[system].module}"


@dataclass(frozen=True)
class System:
    """Where a system's code is, and what it can do.

    Attributes:
        module: of this package; its class `Asker` takes the job and `choices`.
        choices: of the variant.
        packages: that must be installed.
        tasks: of `cases.TASKS`.
        sizes: of `cases.SIZES`.
        prepares: whether it makes files of the model first, in `Job.files`.
        peak: of its process, over that of the plainest.
        backend: Keras' own.
        on_gpu: whether it is asked on a machine with a GPU alone.
    """

    module: str
    choices: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = FORWARD
    sizes: tuple[str, ...] = ("tiny", "emoji", "sd15")
    prepares: bool = False
    peak: float = 1.0
    backend: str = "tensorflow"
    on_gpu: bool = False

    def why_not(self, case: Case, size: str) -> str | None:
        """Why it is not asked, or None."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if self.on_gpu and not machine.gpus():
            return "no GPU"
        if case.task not in self.tasks:
            return f"has no `{case.task}` here"
        if size not in self.sizes:
            return f"comes in the size of {' and '.join(self.sizes)} alone"
        return None

    def asker(self, job: Job) -> Any:
        """The system, imported and told what to do."""
        return import_module(f"benchmarks.systems.{self.module}").Asker(job, **self.choices)


_TORCH = ("torch", "diffusers", "transformers")
SYSTEMS = {
    "latentdiff": System("ours", tasks=(*FORWARD, "train", "fit", "scaling")),
    "latentdiff-openvino": System(
        "ours", {"engine": "openvino"}, ("openvino",), ("unet", "generate", "start"), peak=1.5
    ),
    # Where attention in half precision is one operation.
    "latentdiff-jax": System("ours", packages=("jax",), backend="jax", on_gpu=True),
    "diffusers": System("theirs", packages=_TORCH, tasks=(*FORWARD, "train")),
    "diffusers-channels-last": System("theirs", {"channels_last": True}, _TORCH, (*FORWARD, "train")),
    "diffusers-compile": System("theirs", {"compiled": True}, _TORCH, FORWARD, peak=1.5),
    "keras-cv": System("kerascv", {"xla": False}, ("keras_cv",), sizes=("sd15",), prepares=True),
    "keras-cv-xla": System("kerascv", {"xla": True}, ("keras_cv",), sizes=("sd15",), prepares=True, peak=1.5),
    "openvino": System("openvino_files", packages=("openvino", *_TORCH), prepares=True, peak=1.5),
}
