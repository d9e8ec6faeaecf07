"""A foreign configuration, field by field: each is used, known to change nothing, or refused by its name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from latentdiff.checkpoints.files import CheckpointError


class Fields:
    """The fields of one JSON configuration, checked as they are taken.

    Args:
        values: What the file holds. Names that begin with "_" are private to the library that wrote it.
        defaults: The values of fields that are not in the file.
        source: The file's name, for errors.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], source: str):
        self.source = source
        self._stated = {name: value for name, value in values.items() if not name.startswith("_")}
        self._values = {**defaults, **self._stated}
        self._taken: set[str] = set()
        self._refused: list[str] = []

    def states(self, name: str) -> bool:
        """Whether the file itself has the field."""
        return name in self._stated

    def take(self, name: str) -> Any:
        """The field's value as it is; None if there is none."""
        self._taken.add(name)
        return self._values.get(name)

    def count(self, name: str, low: int = 1, high: int = 2**20) -> int:
        """A whole number in low..high."""
        return self._check_count(name, self.take(name), low, high)

    def counts(self, name: str, length: int | None = None, low: int = 1, high: int = 2**20) -> tuple[int, ...]:
        """Whole numbers in low..high, `length` of them; where a length is given, one number stands for all."""
        value = self.take(name)
        if length is not None and not isinstance(value, list | tuple):
            value = [value] * length
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16 or len(value) != (length or len(value)):
            rule = f"{length} whole numbers" if length else "a list of 1 to 16 whole numbers"
            raise CheckpointError(f"`{name}` must be {rule}. Received: {name}={value!r:.200} in `{self.source}`")
        return tuple(self._check_count(name, item, low, high) for item in value)

    def number(self, name: str, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number in low..high."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"`{name}` must be a number. Received: {name}={value!r:.80} in `{self.source}`")
        if not low <= value <= high:
            raise CheckpointError(f"`{name}` must be in {low}..{high}. Received: {name}={value} in `{self.source}`")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"`{name}` must be true or false. Received: {name}={value!r:.80} in `{self.source}`")
        return value

    def choice(self, name: str, choices: Mapping[str, Any]) -> Any:
        """What the field's word stands for; another word is refused."""
        value = self.take(name)
        if isinstance(value, str) and value in choices:
            return choices[value]
        self.refuse(name, value, " or ".join(choices))
        return next(iter(choices.values()))

    def words(self, name: str) -> tuple[str, ...]:
        """A list of words."""
        value = self.take(name)
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value) or len(value) > 16:
            raise CheckpointError(
                f"`{name}` must be a list of words. Received: {name}={value!r:.200} in `{self.source}`"
            )
        return tuple(value)

    def size(self, name: str) -> int | list[int] | None:
        """A picture's size: one number, [height, width], or null."""
        value = self.take(name)
        return value if value is None else list(self.counts(name)) if isinstance(value, list) else self.count(name)

    def check_divides(self, name: str, divisors: Iterable[int], multiples: Iterable[int]) -> None:
        """Refuses the field `name` where one of `divisors` does not divide its partner among `multiples`."""
        for divisor, multiple in zip(divisors, multiples, strict=True):
            if multiple % divisor:
                raise CheckpointError(
                    f"`{name}` must divide the channels. Received: {divisor} for {multiple} channels in `{self.source}`"
                )

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses the field unless its value is one of `allowed`, of which the first is written in the error."""
        value = self.take(name)
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
            self.refuse(name, value, repr(allowed[0]))

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Notes that the field asks for something that the networks here cannot do."""
        self._refused.append(f"{name}={value!r:.200} (only {expected})")

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change nothing here."""
        self._taken.update(names)

    def finish(self, strict: bool = True) -> None:
        """Ends the reading.

        Args:
            strict: Whether a field that nobody took is refused too, unless it is null or false.

        Raises:
            CheckpointError: If fields were refused; all are named.
        """
        if strict:
            for name in sorted(set(self._stated) - self._taken):
                if self._stated[name] not in (None, False):
                    self.refuse(name, self._stated[name], "known fields")
        if self._refused:
            raise CheckpointError(f"`{self.source}` asks for what is not supported:\n  " + "\n  ".join(self._refused))

    def _check_count(self, name: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"`{name}` must be a whole number in {low}..{high}. Received: {name}={value!r:.80} in `{self.source}`"
            )
        return value


def require_arguments(config: Mapping[str, Any], names: Iterable[str], kind: str) -> None:
    """Checks that `config` has exactly the arguments that describe a `kind`, beside Keras' own.

    Raises:
        ValueError: If arguments are missing or unknown.
    """
    wanted = set(names)
    given = set(config) - {"name", "dtype", "trainable"}
    if given != wanted:
        raise ValueError(
            f"A configuration of {kind} must have its constructor's arguments."
            f" Received: missing {sorted(wanted - given)}, unknown {sorted(given - wanted)}"
        )
