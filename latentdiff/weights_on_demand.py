"""Weights that are in memory only while a pipeline computes with them, for those who have little of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import keras

from latentdiff.backend import release
from latentdiff.presets import Parts, fill


class WeightsOnDemand:
    """Of a pipeline's networks, those that hold no weights but while these are asked for.

    Args:
        parts: the networks, and in `parts.files` which of them, and where their weights are.
    """

    def __init__(self, parts: Parts):
        self._parts, self._files = parts, dict(parts.files)

    @property
    def kinds(self) -> Collection[str]:
        """The networks whose weights come and go, of "text_encoder", "unet" and "autoencoder"."""
        return self._files.keys()

    @contextlib.contextmanager
    def held(self, kind: str) -> Iterator[None]:
        """The scope in which a network has its weights: read from the files at its beginning, freed at its end."""
        if kind not in self._files:
            yield
            return
        network: keras.Model = getattr(self._parts, kind)
        try:
            fill(network, self._files[kind])
            yield
        finally:
            release(network.variables)

    def take(self, kind: str) -> keras.Model:
        """A network with its weights, which stay from now on: whoever has it may call it or train it at any time."""
        network: keras.Model = getattr(self._parts, kind)
        if kind in self._files:
            fill(network, self._files.pop(kind))
        return network
