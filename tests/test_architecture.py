"""The arrows of the design: which module may import which."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentdiff"

FRAMEWORKS = {"tensorflow", "jax", "jaxlib", "torch"}
FRAMEWORK_FLOORS = ("latentdiff.backend", "latentdiff.fused", "latentdiff.export")
# Reads pickles, through torch's weights-only unpickler, for `latentdiff convert` alone.
PICKLE_MODULE = "latentdiff.checkpoints.pickles"
CONVERTER = "latentdiff.convert"
# Input pipelines, which must say in their docstring that they import TensorFlow.
INPUT_FLOOR = "latentdiff.data"
# These, and what is in `latentdiff.export` and `latentdiff.training`, see both floors; `latentdiff` itself is the front
# door to what they offer.
MODULES_OF_BOTH_FLOORS = {f"latentdiff.{name}" for name in ("metrics", "pipeline", "presets")}
FRONT_DOOR = "latentdiff"
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK_PARTS = {"layers", "models", "Model", "Layer", "Sequential", "applications", "initializers", "random"}

# What each of these may import of its own floor; a module that is not named here is part of one that was split.
DIFFUSION_ARROWS = {
    "schedule": set(),
    "noise": set(),
    "process": {"schedule"},
    "denoiser": {"process", "schedule"},
    "guidance": {"denoiser", "process", "schedule"},
    "likelihood": {"process", "schedule"},
}
MODEL_ARROWS = {
    "norms": set(),
    "layers": {"norms"},
    "attention": {"layers", "norms"},
    "tokenizer": set(),
    "text_encoder": {"layers", "norms", "attention"},
    "image_encoder": {"layers", "norms", "attention"},
    "unet": {"layers", "norms", "attention"},
    "autoencoder": {"layers", "norms", "attention"},
}


def imports_of(source, module, is_package=False):
    """Absolute names that the source of a module imports anywhere, `from a import b` as both a and a.b."""
    package = module if is_package else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def modules():
    """Every module of the package: dotted name -> path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
IMPORTS = {
    name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


def is_within(name, floor):
    return name == floor or name.startswith(floor + ".")


def floor(name):
    return {module for module in MODULES if is_within(module, f"latentdiff.{name}")}


def reaches(module, name):
    return any(is_within(imported, name) for imported in IMPORTS[module])


def own_imports(module, name):
    """Modules of the floor that a module of the floor imports, by their last names."""
    prefix = f"latentdiff.{name}."
    return {
        imported[len(prefix) :] for imported in IMPORTS[module] if imported in MODULES and imported.startswith(prefix)
    }


def test_floors_hold_modules():
    for name in ("diffusion", "models", "checkpoints"):
        assert floor(name), name
    assert set(DIFFUSION_ARROWS) <= {module.rpartition(".")[2] for module in floor("diffusion")}


def test_diffusion_and_models_never_import_each_other():
    assert [module for module in floor("diffusion") if reaches(module, "latentdiff.models")] == []
    assert [module for module in floor("models") if reaches(module, "latentdiff.diffusion")] == []


def test_checkpoints_import_neither():
    for forbidden in ("latentdiff.diffusion", "latentdiff.models", "keras"):
        assert [module for module in floor("checkpoints") if reaches(module, forbidden)] == []


def test_diffusion_imports_nothing_of_the_package_but_itself():
    for module in floor("diffusion"):
        own = {name for name in IMPORTS[module] if is_within(name, "latentdiff")}
        assert {name for name in own if not is_within(name, "latentdiff.diffusion")} == set(), module


def test_only_the_modules_that_may_import_both_floors():
    both = {
        module
        for module in MODULES
        if (reaches(module, "latentdiff.diffusion") or module in floor("diffusion"))
        and (reaches(module, "latentdiff.models") or module in floor("models"))
    }
    above = ("latentdiff.export", "latentdiff.training")
    both = {module for module in both if not any(is_within(module, name) for name in above)}
    assert both - MODULES_OF_BOTH_FLOORS - {FRONT_DOOR} == set()


def test_only_backend_and_export_import_a_framework():
    for module, imported in IMPORTS.items():
        frameworks = {name.partition(".")[0] for name in imported} & FRAMEWORKS
        if any(is_within(module, name) for name in FRAMEWORK_FLOORS):
            frameworks -= {"tensorflow", "jax", "jaxlib"}
        if module == PICKLE_MODULE:
            frameworks -= {"torch"}
        if is_within(module, INPUT_FLOOR) and "TensorFlow" in (
            ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
        ):
            frameworks -= {"tensorflow"}
        assert frameworks == set(), module


def test_diffusion_imports_numpy_keras_and_the_standard_library_alone():
    for module in floor("diffusion"):
        roots = {name.partition(".")[0] for name in IMPORTS[module]}
        assert roots - {"numpy", "keras", "latentdiff"} - sys.stdlib_module_names == set(), module


def keras_parts(source):
    """What a source takes from keras: `keras.layers.Dense` and `from keras import layers` both give layers."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "keras":
            parts.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "keras":
            _, _, below = node.module.partition(".")
            parts |= {below.partition(".")[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("keras.")}
    return parts


def test_diffusion_holds_no_network_and_draws_nothing_of_keras():
    for module in floor("diffusion"):
        assert keras_parts(MODULES[module].read_text(encoding="utf-8")) & NETWORK_PARTS == set(), module


@pytest.mark.parametrize(("name", "arrows"), [("diffusion", DIFFUSION_ARROWS), ("models", MODEL_ARROWS)])
def test_arrows_within_a_floor(name, arrows):
    for last, allowed in arrows.items():
        module = f"latentdiff.{name}.{last}"
        if module in MODULES:
            named = own_imports(module, name) & set(arrows)
            assert named - allowed == set(), module


def test_no_module_of_a_floor_imports_in_a_circle():
    for name in ("diffusion", "models", "checkpoints"):
        below = {module: {f"latentdiff.{name}.{last}" for last in own_imports(module, name)} for module in floor(name)}
        while below:
            free = {module for module, imported in below.items() if not (imported & below.keys()) - {module}}
            assert free, f"In a circle: {sorted(below)}"
            below = {module: imported for module, imported in below.items() if module not in free}


def test_samplers_know_no_noise_generator_and_no_guidance():
    for module in floor("diffusion"):
        if module.rpartition(".")[2].startswith("sampler"):
            assert own_imports(module, "diffusion") & {"noise", "guidance", "likelihood"} == set(), module


def test_nothing_imports_what_runs_code_from_files():
    for module, imported in IMPORTS.items():
        assert {name.partition(".")[0] for name in imported} & UNSAFE == set(), module


def imports_at_once(source):
    """Roots of what a source imports when it is imported itself: outside of functions."""
    tree = ast.parse(source)
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in late]
    return {name.partition(".")[0] for node in nodes for name in imports_of(ast.unparse(node), "x")}


def test_torch_is_imported_by_the_one_module_that_reads_pickles_and_only_when_it_does():
    assert [module for module in MODULES if reaches(module, "torch")] == [PICKLE_MODULE]
    assert "torch" not in imports_at_once(MODULES[PICKLE_MODULE].read_text(encoding="utf-8"))
    assert imports_at_once("import a\nif b:\n    from torch import c\ndef f():\n    import d") == {"a", "torch"}


def test_only_the_converter_reads_pickles():
    assert [module for module in MODULES if reaches(module, PICKLE_MODULE)] == [CONVERTER]
    assert [module for module in MODULES if reaches(module, CONVERTER)] == ["latentdiff.commands"]


def test_every_pickle_is_opened_with_weights_only():
    calls = [
        node
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert given["weights_only"] == "True"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import latentdiff.models.unet", "latentdiff.models.unet"),
        ("from latentdiff import models", "latentdiff.models"),
        ("from latentdiff.models.unet import UNet", "latentdiff.models.unet"),
        ("from ..models import unet", "latentdiff.models.unet"),
        ("from .. import models", "latentdiff.models"),
        ("from .noise import normal", "latentdiff.diffusion.noise"),
        ("def late():\n    import tensorflow as tf", "tensorflow"),
        ("if True:\n    from jax import numpy", "jax"),
        ("import importlib\nimportlib.import_module('torch.nn')", "torch.nn"),
        ("__import__('pickle')", "pickle"),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert expected in imports_of(source, "latentdiff.diffusion.process")


def test_imports_of_a_package_are_relative_to_itself():
    assert "latentdiff.models.unet" in imports_of("from .unet import UNet", "latentdiff.models", is_package=True)


@pytest.mark.parametrize(
    "source",
    [
        "import keras\nkeras.layers.Dense",
        "from keras import layers",
        "from keras.layers import Dense",
        "import keras.layers",
    ],
)
def test_every_way_to_a_layer_is_seen(source):
    assert "layers" in keras_parts(source)


def test_data_knows_no_noise_and_no_network():
    for forbidden in ("latentdiff.diffusion", "latentdiff.models", "latentdiff.training"):
        assert [module for module in floor("data") if reaches(module, forbidden)] == []
