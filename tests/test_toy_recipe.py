"""The README's toy recipe as it is typed: pictures, an autoencoder, latent diffusion, a report; and the CLIP pair's."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="once is enough, and that is the README's"),
]


def run(folder, program, *arguments):
    """A command as it is typed, in a directory."""
    programs = {"python": [sys.executable], "latentdiff": [sys.executable, "-m", "latentdiff.cli"]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*programs[program], *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands have run, one after the other."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (block,) = [block for block in blocks if "toy_pictures.py" in block]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        run(folder, *command)
    return folder


def figure(report, name):
    """The number of a line of the report's table."""
    return float(re.search(rf"^\| {re.escape(name)}[^|]*\| *([0-9.]+)", report, re.MULTILINE)[1])


def test_the_recipe_ends_in_a_picture_of_what_was_asked_for(folder):
    with Image.open(folder / "out.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype("float32")
    height, width, _ = pixels.shape
    middle = pixels[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8].mean(axis=(0, 1))
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    assert middle[0] > middle[1:].max() + 60, middle
    assert corners.min() > 200, corners


def test_the_report_tells_what_the_training_reached(folder):
    directory = folder / "runs" / "toy_diffusion" / "report"
    report = (directory / "report.md").read_text(encoding="utf-8")
    assert figure(report, "pictures come back") > 18  # decibels; each picture as its own mean colour gives 11
    assert 0 < figure(report, "loss on fixed noise") < 0.5  # of 1, which says nothing
    named = re.findall(r"\((\w+\.png)\)", report)
    assert len(named) == 5 and all((directory / name).is_file() for name in named)


def test_captions_are_told_from_one_another(folder):
    command, _ = (ROOT / "scripts" / "toy_clip.toml").read_text(encoding="utf-8").split("\n", 1)
    run(folder, *shlex.split(command.removeprefix("#")))
    with (folder / "runs" / "toy_clip" / "losses.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 200
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    assert first > 2 and last < 0.75 * first, (first, last)  # log 12 = 2.5 where all of a batch are alike
