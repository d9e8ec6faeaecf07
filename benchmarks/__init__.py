<<<<<<< HEAD
"""What this package costs, measured side by side in one process; each module is run by `python -m`."""
=======
"""Measurements beside the peers; each module is a command: `python -m benchmarks.loading`."""

import sys
from pathlib import Path

# The tests' maps of foreign names and their words for what the peers say serve here too.
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "peers")]
>>>>>>> checkpoints
