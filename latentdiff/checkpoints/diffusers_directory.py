"""A diffusers directory as a source: a whole pipeline's, or a component's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints import diffusers, diffusers_pipeline
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings, read_scheduler
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.safetensors_files import WeightsOpener, open_weights
from latentdiff.checkpoints.tokenizer_files import read_tokenizer


class DiffusersDirectory:
    """See `sources.Source`.

    Args:
        path, ema, prediction: As for `sources.open_source`.
        open_weights: What opens the tensors of a component; see `safetensors_files.open_weights`.
    """

    form = "diffusers directory"

    def __init__(
        self,
        path: Path,
        *,
        ema: bool = False,
        prediction: str | None = None,
        open_weights: WeightsOpener = open_weights,
    ):
        if not path.is_dir():
            raise FileNotFoundError(f"There is no model directory or file `{path}`.")
        if ema:
            raise CheckpointError(
                "`ema` chooses between the two kinds of weights that one file may hold. A diffusers directory has one"
                f' kind, or another as a `variant`, such as "non_ema". Received: ema=True for `{path}`.'
            )
        self.path = path
        self._prediction = prediction
        self._open_weights = open_weights

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in diffusers.KINDS if diffusers.has_component(self.path, kind))

    def component(
        self, kind: str, *, dtype: str | np.dtype | None = None, variant: str | None = None
    ) -> diffusers.Component:
        opener = self._open_weights
        return diffusers.read_component(self.path, kind, dtype=dtype, variant=variant, open_weights=opener)

    def settings(self) -> SamplerSettings:
        diffusers_pipeline.read_pipeline_index(self.path)
        settings = read_scheduler(self.path)
        return replace(settings, prediction=self._prediction) if self._prediction else settings

    def tokenizer(self) -> dict[str, Any]:
        return read_tokenizer(self.path)

    def sample_size(self) -> tuple[int, int] | None:
        size = diffusers.read_config(self.path, "unet")[1].get("sample_size")
        return (size, size) if isinstance(size, int) else size and (size[0], size[1])
