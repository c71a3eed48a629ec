"""The house: which room may see which, and that nothing public goes without case and docs."""

import ast
import importlib
import inspect
import pathlib

import equinox as eqx
import pytest
from cases import CASES

import discretax
from discretax.sequence_mixers import AbstractSequenceMixer

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "discretax"

# Each room sees the rooms before it in its row, and nothing else of the library.
_COMMON = ("_types", "_timeseries", "_features", "_stateful")
MAY_SEE = {
    "_types": (),
    "_timeseries": ("_types",),
    "_features": (),
    "_stateful": (),
    "ops": _COMMON,
    "init": _COMMON,
    "sequence_mixers": (*_COMMON, "ops", "init"),
    "channel_mixers": (*_COMMON, "ops", "init"),
    "blocks": (*_COMMON, "ops", "init", "sequence_mixers", "channel_mixers"),
    "encoder": _COMMON,
    "heads": _COMMON,
    "models": (*_COMMON, "ops", "init", "sequence_mixers", "channel_mixers", "blocks"),
    "architectures": (
        *_COMMON,
        "ops",
        "sequence_mixers",
        "channel_mixers",
        "blocks",
        "encoder",
        "heads",
        "models",
    ),
    "inference": (*_COMMON, "ops", "sequence_mixers", "blocks", "heads", "models"),
    "pretrained": ("architectures", "blocks", "channel_mixers", "sequence_mixers"),
    "inspection": (*_COMMON, "sequence_mixers"),
    "optim": (*_COMMON, "sequence_mixers"),
    "sharding": ("_features",),
}
FILES = sorted(PACKAGE.rglob("*.py"))
WRAPPERS = {"bidirectional.py", "discretized.py", "gated.py", "parallel.py"}


def imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            if node.module == "discretax":
                found += [f"discretax.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "discretax":
            assert rest and (rest[0] == room or rest[0] in MAY_SEE[room]), f"{room} sees {name}"
        else:
            assert top in {
                "jax",
                "equinox",
                "optax",
                "jaxtyping",
                "numpy",
                "abc",
                "collections",
                "contextlib",
                "contextvars",
                "dataclasses",
                "functools",
                "importlib",
                "itertools",
                "json",
                "math",
                "os",
                "pathlib",
                "re",
                "shutil",
                "typing",
            }, f"{path} depends on {name}"


def mixer_files() -> set[str]:
    room = "discretax.sequence_mixers."
    modules = {mixer.__module__.removeprefix(room) for mixer in exported_mixers()}
    return {f"{module}.py" for module in modules} - WRAPPERS


def exported_mixers() -> list[type]:
    return [
        value
        for value in vars(discretax.sequence_mixers).values()
        if inspect.isclass(value)
        and issubclass(value, AbstractSequenceMixer)
        and not inspect.isabstract(value)
    ]


@pytest.mark.parametrize("name", sorted(mixer_files()))
def test_mixers_never_import_each_other(name):
    others = {
        f"discretax.sequence_mixers.{other.removesuffix('.py')}" for other in mixer_files() - {name}
    }
    seen = set(imports(PACKAGE / "sequence_mixers" / name))
    assert not seen & (others | {"discretax.sequence_mixers"})


def public_names() -> list[str]:
    names = []
    for place in ("discretax", *(f"discretax.{room}" for room in MAY_SEE if room[0] != "_")):
        if place == "discretax.inference":  # its names stand at the top
            continue
        for name, value in vars(importlib.import_module(place)).items():
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if name[0].isalpha() and is_code and value.__module__.startswith(place):
                names.append(f"{place}.{name}")
    return names


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_documented(name):
    entries = {
        line.split()[1]
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }
    assert name in entries
    value = discretax
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("mixer", exported_mixers(), ids=lambda mixer: mixer.__name__)
def test_every_exported_mixer_has_a_case(mixer):
    assert mixer.__name__ in {case.name for case in CASES}
    fields = set(mixer.__dataclass_fields__)
    assert set(mixer.recurrent_parameters) <= fields
    assert issubclass(mixer, eqx.Module)
