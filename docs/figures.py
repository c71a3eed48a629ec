"""Draws the figures of `inspection.md` by running its code: `python docs/figures.py`."""

import os
import pathlib
import re

import matplotlib

DOCS = pathlib.Path(__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The same figure is the same file, and its text is text.
os.environ["SOURCE_DATE_EPOCH"] = "0"
matplotlib.rcParams.update({"svg.hashsalt": "discretax", "svg.fonttype": "none"})

page = (DOCS / "inspection.md").read_text()
os.chdir(DOCS / "figures")
exec("\n".join(BLOCK.findall(page)))
