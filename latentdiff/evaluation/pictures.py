"""Which pictures a model is judged on: of a run those that it was not trained on, where there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentdiff.data import Index, index_source
from latentdiff.data.decode import decode_crop
from latentdiff.data.sources import read_picture
from latentdiff.training.recipe import pictures_of, split
from latentdiff.training_config import Config

SMALLEST = 11  # pixels: the window of SSIM


@dataclass(frozen=True)
class Pictures:
    """The captioned pictures of a report.

    Attributes:
        sources: where they are from.
        judged: those that the model is judged on.
        others: the rest of the sources' pictures, among which a drawing's own picture is searched, too.
        trained_on: whether the model was trained on those that are judged; None where nobody says so.
    """

    sources: Sequence[str]
    judged: Index
    others: Index
    trained_on: bool | None = None

    def at_most(self, count: int, batch_size: int) -> Pictures:
        """The same pictures, of which at most `count` are judged, in whole batches; those left over are others."""
        batch_size = min(batch_size, count, len(self.judged))
        count = min(count, len(self.judged)) // batch_size * batch_size
        judged, left = self.judged.select(range(count)), self.judged.select(range(count, len(self.judged)))
        return replace(self, judged=judged, others=Index([*left, *self.others]))

    def __len__(self) -> int:
        return len(self.judged) + len(self.others)

    def __str__(self) -> str:
        if self.trained_on is False:
            return f"{len(self.judged)} pictures that it was not trained on"
        return f"{len(self.judged)} of {len(self)} pictures" + (" of its training" if self.trained_on else "")


def pictures_of_sources(sources: Sequence[str], captions: bool = True) -> Pictures:
    """The pictures of sources; all of them may be judged.

    Args:
        sources: see `index_source`.
        captions: whether each picture must have one.
    """
    return Pictures(list(sources), index_source(list(sources), require_captions=captions), Index(()))


def pictures_of_run(config: Config, batch_size: int) -> Pictures:
    """The pictures of a run's validation, or all of its data where its seed holds out fewer than a batch.

    Args:
        config: the run's.
        batch_size: of the report.
    """
    if config.validation_data:
        held = pictures_of(config, config.validation_data)
        return Pictures(config.validation_data, held, Index(()), trained_on=False)
    index = pictures_of(config, config.data)
    trained, held = split(config, index)
    if len(held) < batch_size:
        return Pictures(config.data, index, Index(()), trained_on=True)
    return Pictures(config.data, held, trained, trained_on=False)


def read_pictures(index: Index, size: int) -> np.ndarray:
    """The middles of all pictures, in their order: uint8 (N, size, size, 3)."""
    return np.stack([decode_crop(read_picture(example), (size, size)) for example in index])


def check_size(size: int, multiple: int) -> None:
    """Checks that pictures of a size can be judged.

    Args:
        size: in pixels.
        multiple: what the model, or the judge, needs it to be a multiple of.

    Raises:
        ValueError: they cannot.
    """
    if size % multiple or size < SMALLEST:
        raise ValueError(f"`size` must be a multiple of {multiple} and at least {SMALLEST}. Received: size={size}.")
