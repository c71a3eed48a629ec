"""The code in the README and in the docs runs, and the numbers that it claims hold."""

import pathlib
import re

import jax
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "examples.md")  # tells of scripts that have tests of their own
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, as a reader would type them."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    assert len(blocks) == text.count("```py"), "a block that this test would leave out"
    monkeypatch.chdir(tmp_path)  # what a page saves
    namespace = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it; optax needs it
        for block in blocks:
            # Tracebacks show the line of the page.
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
