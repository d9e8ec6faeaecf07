"""Measurements beside the peers: `python -m benchmarks`; and `python -m benchmarks.loading`, `.serving` ..."""

import sys
from pathlib import Path

# The tests' maps of foreign names and their words for what the peers say serve here too.
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "peers")]
