"""Draws the figures of `inspection.md` and `images.md` by running their code: `python docs/figures.py`."""

import os
import pathlib
import re

import matplotlib

DOCS = pathlib.Path(__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The same figure is the same file, and its text is text.
os.environ["SOURCE_DATE_EPOCH"] = "0"
matplotlib.rcParams.update({"svg.hashsalt": "discretax", "svg.fonttype": "none"})

os.chdir(DOCS / "figures")
for page in ("inspection.md", "images.md"):
    exec("\n".join(BLOCK.findall((DOCS / page).read_text())), {})
