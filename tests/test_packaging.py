"""What the package promises to those who install it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import latentdiff
from latentdiff import catalogue

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_importing_the_package_imports_nothing_heavy():
    program = """
import sys
before = set(sys.modules)
import latentdiff
heavy = {"keras", "tensorflow", "jax", "torch", "numpy", "PIL", "tokenizers", "safetensors"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", latentdiff.__all__)
def test_every_public_name_exists(name):
    assert getattr(latentdiff, name).__doc__
    assert name in dir(latentdiff)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'latentdiff' has no attribute 'Unet'"):
        latentdiff.Unet  # noqa: B018


def test_every_requirement_is_pinned_within_its_range():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = PYPROJECT["project"]["dependencies"] + [
        each for name in extras if name not in ("peers", "convert") for each in extras[name]
    ]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
    assert all("==" in text for text in extras["peers"])
    # torch is no part of what the tests run on; the peers bring the one that pickles are tested with.
    exact = {Requirement(text).name: next(iter(Requirement(text).specifier)).version for text in extras["peers"]}
    assert all(Requirement(text).specifier.contains(exact[Requirement(text).name]) for text in extras["convert"])


def test_clips_vocabulary_and_its_licence_are_in_the_package():
    files = Path(latentdiff.__file__).parent / "checkpoints"
    assert "Copyright (c) 2021 OpenAI" in (files / "clip_merges.LICENSE").read_text()
    assert (files / "clip_merges.txt.gz").stat().st_size < 250_000


def test_shipped_models_are_found_by_name_in_a_checkout():
    assert catalogue.weights_directory() == ROOT / "weights"
    for name in catalogue.preset_names():
        assert catalogue.resolve_preset(name) == ROOT / "weights" / name


def test_shipped_models_are_found_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "latentdiff" / "weights" / "emoji").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "latentdiff" / "catalogue.py"))
    assert catalogue.preset_names() == ("emoji",)
    assert catalogue.resolve_preset("emoji") == tmp_path / "latentdiff" / "weights" / "emoji"


def test_a_shipped_name_comes_before_a_directory_and_a_path_means_the_directory(tmp_path, monkeypatch):
    shipped, here = tmp_path / "weights", tmp_path / "here"
    (shipped / "emoji").mkdir(parents=True)
    (here / "emoji").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "weights_directory", lambda: shipped)
    monkeypatch.chdir(here)
    assert catalogue.resolve_preset("emoji") == shipped / "emoji"
    assert catalogue.resolve_preset("./emoji") == Path("emoji")
    assert catalogue.resolve_preset(Path("emoji")) == Path("emoji")


@pytest.mark.parametrize("preset", ["", "no such model", Path("no such model")])
def test_what_is_neither_a_name_nor_a_directory_is_refused(preset):
    with pytest.raises(ValueError, match=r"`preset` must be a name in weights/ or a model's path\. Received: "):
        catalogue.resolve_preset(preset)


@pytest.mark.parametrize("preset", [None, 3, b"emoji"])
def test_a_preset_is_text_or_a_path(preset):
    with pytest.raises(TypeError, match="`preset` must be a name or a path"):
        catalogue.resolve_preset(preset)
