"""The packages that this one does without until they are needed, and the extras that bring them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def require(what: str, packages: Sequence[str], extra: str) -> None:
    """Tells that something cannot be done for want of a package, before it is begun.

    Args:
        what: needs them, as the sentence begins.
        packages: the names that are imported.
        extra: of this package, which brings them.

    Raises:
        ImportError: one is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'{what} needs {" and ".join(missing)}: pip install "latentdiff[{extra}]".')
