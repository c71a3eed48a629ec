"""The code in the README and in the docs runs, and the numbers that it claims hold."""

import functools
import inspect
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import discretax
from discretax import blocks, channel_mixers, models, sequence_mixers
from discretax.sequence_mixers import AbstractSequenceMixer

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "examples.md")  # tells of scripts that have tests of their own
BLOCK = re.compile(r"^```(?:python| \{ \.python \})\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIME = 24
SNIPPET = re.compile(r'^--8<-- "(.*):(.*)"$', re.MULTILINE)
SHAPES = re.compile(r"([a-z][\w.]*(?:, [a-z][\w.]*)*): (\([^)]*\))")  # x, y: (time, 64)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, as a reader would type them."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    assert len(blocks) == text.count("```py") + text.count("``` {"), (
        "a block that this test would leave out"
    )
    monkeypatch.chdir(tmp_path)  # what a page saves
    namespace = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it; optax needs it
        for block in blocks:
            # Tracebacks show the line of the page.
            line = text.count("\n", 0, block.start(1))
            code = SNIPPET.sub(section, block[1])
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def section(snippet: re.Match) -> str:
    """What mkdocs puts in its place: a part of a file."""
    _, text = (ROOT / snippet[1]).read_text().split(f"[start:{snippet[2]}]\n")
    return re.split(rf"#.*\[end:{snippet[2]}\]", text)[0]


def with_examples():
    """Every mixer and model that users make."""
    for room, base in ((sequence_mixers, AbstractSequenceMixer), (models, eqx.nn.StatefulLayer)):
        for value in vars(room).values():
            of_users = inspect.isclass(value) and not value.__name__.startswith("Abstract")
            if of_users and issubclass(value, base):
                yield pytest.param(value, id=f"{room.__name__}.{value.__name__}")


@pytest.mark.parametrize("described", list(with_examples()))
def test_example_of_a_docstring(described):
    """It runs as far as shapes go, and they are those that its comments say."""
    code = re.search(r"```python\n(.*?)```", inspect.cleandoc(described.__doc__), re.DOTALL)
    assert code is not None, "every mixer and model shows an example"
    code = inspect.cleandoc(code[1])
    said = {n: shape for names, shape in SHAPES.findall(code) for n in names.split(", ")}
    assert "y" in said or "y.values" in said or "y is x" in code
    names = {"discretax": discretax, "eqx": eqx, "functools": functools, "jax": jax}
    for room in (sequence_mixers, channel_mixers, blocks, models):
        names |= vars(room)
    names[described.__name__] = described

    def run(key, other_key, x, chunk, sample, gaps, length, resets):
        scope = names | locals()
        exec(code, scope)
        return {name: eval(name, scope) for name in said}

    x, gaps = jnp.ones((TIME, 64)), jnp.ones((TIME,))
    arrays = (x, x[:5], x[0], gaps, jnp.asarray(TIME), jnp.zeros((TIME,), bool))
    shapes = jax.eval_shape(run, jr.key(0), jr.key(1), *arrays)
    for name, shape in said.items():
        assert shapes[name].shape == eval(shape, {"time": TIME}), name
