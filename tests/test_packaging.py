"""What the package promises to those who install it, and which module may import which."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import latentdiff
from latentdiff import catalogue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "latentdiff"
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
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = PYPROJECT["project"]["dependencies"] + [
        each for name in extras if name != "peers" for each in extras[name]
    ]
    for text in wanted:
        requirement = packaging.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
    assert all("==" in text for text in extras["peers"])


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
    with pytest.raises(ValueError, match=r"`preset` must be a name in weights/ or a model directory\. Received: "):
        catalogue.resolve_preset(preset)


@pytest.mark.parametrize("preset", [None, 3, b"emoji"])
def test_a_preset_is_text_or_a_path(preset):
    with pytest.raises(TypeError, match="`preset` must be a name or a directory"):
        catalogue.resolve_preset(preset)


def imported(path):
    """The dotted names that a module imports, those inside its functions too, less those for type checkers alone."""
    names = set()
    todo = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return names


MODULES = {path.relative_to(PACKAGE): imported(path) for path in sorted(PACKAGE.rglob("*.py"))}


def within(names, *packages):
    return {name for name in names for package in packages if name == package or name.startswith(package + ".")}


def test_the_mathematics_knows_no_networks_and_the_networks_no_mathematics():
    above = ("training", "metrics", "pipeline", "presets", "export")
    for path, names in MODULES.items():
        floor = path.parts[0]
        others = {"diffusion", "models", "checkpoints"} - {floor}
        if floor in ("diffusion", "models", "checkpoints"):
            assert not within(names, *(f"latentdiff.{each}" for each in (*others, *above))), path


def test_only_the_top_floor_joins_mathematics_and_networks():
    for path, names in MODULES.items():
        if within(names, "latentdiff.diffusion") and within(names, "latentdiff.models"):
            assert path.parts[0].removesuffix(".py") in ("training", "metrics", "pipeline", "presets", "export"), path


def test_only_the_backend_and_the_export_name_tensorflow_or_jax():
    for path, names in MODULES.items():
        if within(names, "tensorflow", "jax", "torch"):
            assert path.parts[0].removesuffix(".py") in ("backend", "export", "data"), path


def test_checkpoints_are_read_without_keras():
    for path, names in MODULES.items():
        if path.parts[0] == "checkpoints":
            assert not within(names, "keras", "tensorflow", "jax", "torch", "pickle", "h5py"), path
