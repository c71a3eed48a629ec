"""The house: which room may see which, and that nothing public goes without case and docs."""

import ast
import importlib
import inspect
import operator
import pathlib
import re
import shutil
import subprocess
import sys

import equinox as eqx
import pytest
from cases import CASES

import discretax
from discretax.sequence_mixers import AbstractSequenceMixer

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "discretax"

# Each room sees the rooms before it in its row, and nothing else of the library.
_FRONT = ("_types", "_timeseries", "_constructors", "_features", "_stateful")
_COMMON = (
    "_types",
    "_timeseries",
    "_ensembles",
    "_constructors",
    "_counts",
    "_drawing",
    "_dropout",
    "_projection",
    "_features",
    "_stateful",
    "_broken",
)
MAY_SEE = {
    "_installation": (),
    "_types": ("_installation",),
    "_timestamps": (),
    "_timeseries": ("_types", "_timestamps"),
    "_ensembles": (),
    "_constructors": (),
    "_counts": (),
    "_drawing": (),
    "_dropout": (),
    "_projection": (),
    "_features": ("_types", "_projection"),
    "_stateful": ("_types", "_timeseries", "_features"),
    "_broken": ("_timeseries",),
    "_sequential": _FRONT,
    "_batched": _FRONT,
    "_padding": _FRONT,
    "_missing": _FRONT,
    "ops": _COMMON,
    "init": _COMMON,
    "sequence_mixers": (*_COMMON, "ops", "init"),
    "channel_mixers": (*_COMMON, "ops", "init"),
    "blocks": (*_COMMON, "ops", "init", "sequence_mixers", "channel_mixers"),
    "rates": _COMMON,
    "encoder": (*_COMMON, "rates"),
    "heads": _COMMON,
    "models": (*_COMMON, "ops", "init", "sequence_mixers", "channel_mixers", "blocks"),
    "architectures": (
        *_COMMON,
        "ops",
        "sequence_mixers",
        "channel_mixers",
        "blocks",
        "rates",
        "encoder",
        "heads",
        "models",
    ),
    "inference": (*_COMMON, "ops", "sequence_mixers", "blocks", "encoder", "heads", "models"),
    "pretrained": ("_features", "architectures", "blocks", "channel_mixers", "sequence_mixers"),
    "inspection": (*_COMMON, "ops", "sequence_mixers", "blocks", "rates", "inference"),
    "optim": (*_COMMON, "sequence_mixers"),
    "sharding": ("_features",),
    "testing": (*_COMMON, "_sequential", "ops", "sequence_mixers", "inference"),
}
# Within `ops`, a room sees the files of one idea and the operations that it is made of.
_TOOLS = ("_checks", "_rms", "_scaled", "_discretization")
OPERATION_MAY_SEE = {
    **dict.fromkeys(_TOOLS, ()),
    "_attention": ("_running",),
    "_rotary": (),
    "_running": (),
    "_cross_entropy": ("_running",),
    "_convolution": (*_TOOLS, "_running"),
    "_recurrence": (*_TOOLS, "_running"),
    "_phase": ("_checks", "_running", "_recurrence"),
    "_selective_scan": (*_TOOLS, "_running"),
    "_depthwise_ssm": (*_TOOLS, "_running", "_recurrence", "_convolution"),
    "_matrix_state": (*_TOOLS, "_running", "_convolution"),
}
KERNELS = {"kernels", "gpu", "gpu_backward", "tpu"}  # seen by their own operation alone
# A mixer sees its family's systems, and what wraps any mixer; never another mixer.
MIXER_MAY_SEE = {
    "lti": ("base", "wrappers"),
    "ltv": ("base", "wrappers"),
    "wrappers": ("base",),
    "base": (),
    "attention": ("base", "_attention_cache", "rotary_scaling"),
    **dict.fromkeys(("_attention_cache", "rotary_scaling"), ()),
    **dict.fromkeys(("identity", "packed", "short_convolution"), ("base",)),
}
FILES = sorted(PACKAGE.rglob("*.py"))


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
                "datetime",
                "dataclasses",
                "fcntl",
                "functools",
                "importlib",
                "inspect",
                "io",
                "itertools",
                "json",
                "math",
                "operator",
                "os",
                "pathlib",
                "re",
                "reprlib",
                "shutil",
                "sys",
                "typing",
                "warnings",
            }, f"{path} depends on {name}"


def test_no_compiler_of_kernels_is_loaded():
    """It takes longer to import than all of the library, and is wanted where a kernel is lowered."""
    loaded = "import sys, discretax; print('jax.experimental.pallas' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], cwd=ROOT, text=True) == "False\n"


def places(room: str) -> list[pathlib.Path]:
    return [path for path in sorted((PACKAGE / room).rglob("*.py")) if path.name != "__init__.py"]


def seen_within(room: str, path: pathlib.Path) -> list[list[str]]:
    """What `path` imports of its own room, each as the parts of its place in it."""
    inside = f"discretax.{room}"
    found = [name for name in imports(path) if f"{name}.".startswith(f"{inside}.")]
    assert inside not in found, f"{path}: imported from where it stands, not from {inside}"
    return [name.removeprefix(f"{inside}.").split(".") for name in found]


@pytest.mark.parametrize("path", places("ops"), ids=lambda path: path.stem)
def test_operations_see_what_they_are_made_of(path):
    own = path.relative_to(PACKAGE / "ops").parts[0].removesuffix(".py")
    for other, *file in seen_within("ops", path):
        assert other == own or other in OPERATION_MAY_SEE[own], f"{own} sees {other}"
        assert other == own or not KERNELS & set(file), f"{own} sees a kernel of {other}"


@pytest.mark.parametrize("path", places("sequence_mixers"), ids=lambda path: path.stem)
def test_mixers_never_import_each_other(path):
    own = path.relative_to(PACKAGE / "sequence_mixers").parts[0].removesuffix(".py")
    for family, *file in seen_within("sequence_mixers", path):
        system = family == own and file and file[0].startswith("_")
        assert system or family in MIXER_MAY_SEE[own], f"{path.name} sees {family} {file}"


# Where parameters are drawn, and what `discretax._drawing` has in the place of it.
DRAWING = ("init", "sequence_mixers", "channel_mixers", "blocks", "rates", "encoder", "heads")
DRAWING += ("models", "architectures")
DRAWN_ELSEWHERE = {"uniform", "normal", "truncated_normal", "Linear", "Embedding"}


def test_parameters_are_drawn_by_programs_that_shapes_share():
    """Those of `jax.random` and of Equinox are compiled anew for every shape of a parameter."""
    found = set()
    for path in (path for room in DRAWING for path in places(room)):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                # In a call, keys are split for dropout.
                also = {"split"} if function.name == "__init__" else set()
                for node in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                    *of, name = ast.unparse(node.func).split(".")
                    is_theirs = of in (["jr"], ["jax", "random"], ["eqx", "nn"])
                    if is_theirs and name in DRAWN_ELSEWHERE | also:
                        place = f"{path.relative_to(ROOT)}:{node.lineno}"
                        found.add(f"{place} takes {ast.unparse(node.func)}")
    assert not found, "`from discretax import _drawing as draw` has the same numbers"


def exported_mixers() -> list[type]:
    return [
        value
        for value in vars(discretax.sequence_mixers).values()
        if inspect.isclass(value)
        and issubclass(value, AbstractSequenceMixer)
        and not inspect.isabstract(value)
    ]


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


NAMES_OF_0_3 = {
    "blocks": "AbstractBlock StandardBlock",
    "channel_mixers": "AbstractChannelMixer GLU IdentityChannelMixer MLPChannelMixer SwiGLU",
    "encoder": "AbstractEncoder EmbeddingEncoder LinearEncoder",
    "heads": "AbstractHead ClassificationHead RegressionHead",
    "models": "DeltaNet LRU LinOSS S5",
    "sequence_mixers": (
        "AbstractSequenceMixer DeltaNetSequenceMixer IdentitySequenceMixer LRUSequenceMixer "
        "LinOSSSequenceMixer S4DSequenceMixer S5SequenceMixer"
    ),
}


@pytest.mark.parametrize("room", NAMES_OF_0_3)
def test_names_of_the_package_before_are_kept(room):
    """What the rooms of discretax 0.3.0 export."""
    assert set(NAMES_OF_0_3[room].split()) <= set(vars(getattr(discretax, room)))


def reference_entries() -> set[str]:
    return {
        line.split()[1]
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_documented(name):
    assert name in reference_entries()
    value = operator.attrgetter(name.removeprefix("discretax."))(discretax)
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(reference_entries()))
def test_every_documented_name_is_public(name):
    """The reference is the list of public names: none is lost when code moves."""
    operator.attrgetter(name.removeprefix("discretax."))(discretax)
    assert not any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("mixer", exported_mixers(), ids=lambda mixer: mixer.__name__)
def test_every_exported_mixer_has_a_case(mixer):
    assert mixer.__name__ in {case.name for case in CASES}
    fields = set(mixer.__dataclass_fields__)
    assert set(mixer.recurrent_parameters) <= fields
    assert issubclass(mixer, eqx.Module)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("__init__.py", "ImportError: another library, discretax, has replaced files"),
        ("utils/from_config.py", "UserWarning: another library, discretax, is installed"),
    ],
)
def test_says_that_another_library_has_written_into_the_folder(theirs, said, tmp_path):
    """The distribution `discretax` is not this one, and is imported by the same name."""
    shutil.copytree(PACKAGE, tmp_path / "discretax", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "discretax" / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / "discretax" / theirs).write_text("")
    load = [sys.executable, "-W", "error", "-c", "import discretax.ops"]
    # What is found here comes before what is installed.
    outcome = subprocess.run(load, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert said in outcome.stderr
    assert "`pip uninstall -y discretax discretax-zoo`" in outcome.stderr


def test_the_citation_is_of_this_version():
    assert f"\nversion: {discretax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{discretax.__version__}}}" in (ROOT / "README.md").read_text()


def test_what_is_typed_installs_this_library():
    """`pip install discretax` with or without extras is another one."""
    texts = [*FILES, ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts += (ROOT / "examples").glob("*.py")
    other = re.compile(r"pip install [^`\n]*discretax(?!-zoo)\b[^`\n]*")
    found = {command for path in texts for command in other.findall(path.read_text())}
    assert found == {"pip install discretax"}  # said of the other one
