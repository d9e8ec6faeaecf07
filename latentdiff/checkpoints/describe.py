"""What is in a checkpoint, in numbers and words, without reading its weights."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import asdict
from typing import Any

from latentdiff.checkpoints.diffusers import KINDS, Component
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import dtype_of, shape_of
from latentdiff.checkpoints.sources import Source


def describe(source: Source, variant: str | None = None) -> dict[str, Any]:
    """What `latentdiff info` says of a source, as JSON has it.

    Returns:
        `path`, `form`, `parts` (kind -> `parameters`, `tensors`, `dtypes`, `config`, `ignored`, or `problem` where it
        cannot be opened), `missing` (kinds), `settings` (or None), `tokens` (the tokenizer's vocabulary, or None),
        `sample_size`, `notes`, `problems` (what else is wrong) and `whole`: whether `TextToImage` opens it.
    """
    parts = {kind: _describe_part(source, kind, variant) for kind in source.kinds}
    missing = [kind for kind in KINDS if kind not in parts]
    problems: list[str] = []
    settings = tokens = size = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not missing:
            settings = _or_problem(lambda: asdict(source.settings()), problems)
            size = _or_problem(source.sample_size, problems)
        if "text_encoder" in parts:
            tokens = _or_problem(lambda: len(source.tokenizer()["vocabulary"]), problems)
    return {
        "path": str(source.path),
        "form": source.form,
        "parts": parts,
        "missing": missing,
        "settings": settings,
        "tokens": tokens,
        "sample_size": size,
        "notes": list(dict.fromkeys(str(warning.message) for warning in caught)),
        "problems": problems,
        "whole": not missing and not problems and not any("problem" in part for part in parts.values()),
    }


def _describe_part(source: Source, kind: str, variant: str | None) -> dict[str, Any]:
    try:
        component = source.component(kind, variant=variant)
    except (CheckpointError, FileNotFoundError) as error:
        return {"problem": str(error)}
    return {
        "parameters": sum(math.prod(shape_of(component.weights, path)) for path in component.weights),
        "tensors": len(component.weights),
        "dtypes": _dtypes(component),
        "config": component.config,
        "ignored": list(component.ignored),
    }


def _dtypes(component: Component) -> dict[str, int]:
    """dtype -> how many tensors are stored in it."""
    return dict(Counter(dtype_of(component.weights, path).name for path in component.weights).most_common())


def _or_problem(read, problems: list[str]) -> Any:
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
        return None
