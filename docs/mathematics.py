"""Formulas as MathML, which browsers draw by themselves: no script, no other server."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

_LOGGER = logging.getLogger("mkdocs.plugins.mathematics")
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</\1>', re.DOTALL
)
_UNKNOWN = {r"\arg": r"\mathrm{arg}"}  # to latex2mathml
_ORDINARY = re.compile("<mo([^>]*)>(&#x0007C;|&#x02016;|&#x0002F;)</mo>")  # | and /, without space


def on_page_content(content: str, page: Page, **kwargs: Any) -> str:
    return _FORMULA.sub(lambda formula: _mathml(formula, page), content)


def _mathml(formula: re.Match[str], page: Page) -> str:
    latex = html.unescape(formula["latex"])
    for command, known in _UNKNOWN.items():
        latex = latex.replace(command, known)
    display = "block" if formula["kind"] == "[" else "inline"
    # Formulas one below the other come as one.
    mathml = "".join(convert(part, display=display) for part in latex.split("$$\n$$"))
    mathml = _ORDINARY.sub(r'<mo lspace="0" rspace="0"\1>\2</mo>', mathml)
    if "\\" in re.sub("<[^>]*>", "", mathml):
        _LOGGER.warning(f"{page.file.src_path}: what stands in {latex!r} has no MathML")
    return f'<div class="formula">{mathml}</div>' if display == "block" else mathml
