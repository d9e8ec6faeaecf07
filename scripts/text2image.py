"""Pictures from a prompt, out of a checkout: `latentdiff generate` with the same arguments.

python scripts/text2image.py "a red heart" --preset emoji --num-images 4 --num-steps 25 --seed 0 --output heart.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latentdiff.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
