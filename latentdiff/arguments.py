"""What the command line's arguments may be: each function takes one as it was typed, and gives its value."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable


def text(value: str) -> str:
    """Text that can be written as UTF-8.

    Raises:
        argparse.ArgumentTypeError: it holds bytes that are no text.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"must be text in {sys.getfilesystemencoding()}. Received: {value!r}"
        ) from None
    return value


def whole(minimum: int) -> Callable[[str], int]:
    """What reads a whole number of at least `minimum`, and raises `argparse.ArgumentTypeError` at others."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {minimum}. Received: {value!r}")
        return number

    return read


def number(value: str) -> float:
    """A finite number.

    Raises:
        argparse.ArgumentTypeError: it is not finite, or no number.
    """
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"must be a finite number. Received: {value!r}")
    return found


def level(value: str) -> float | None:
    """A level of noise_to_signal, 0 or more; None for "inf".

    Raises:
        argparse.ArgumentTypeError: it is negative, or no number.
    """
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not found >= 0:
        raise argparse.ArgumentTypeError(f"must be a number, at least 0, or inf. Received: {value!r}")
    return found if math.isfinite(found) else None
