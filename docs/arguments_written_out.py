r"""For the API pages: arguments that the code states once, for another class or function, are written out.

"- `r_min`, `r_max`: as in [`discretax.sequence_mixers.LRUSequenceMixer`][]." becomes what stands there.
"""

import re
from collections.abc import Iterator

import griffe

_LOGGER = griffe.get_logger("arguments_written_out")
_ITEM = re.compile(r"^- (`\w+`(?:,\s+`\w+`)*):((?:.*)(?:\n    .*)*)", re.MULTILINE)
_ELSEWHERE = re.compile(r"\s+as in\s+\[`(?P<path>[\w.]+)`\]\[\](?P<rest>.*)", re.DOTALL)


class ArgumentsWrittenOut(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        written = {}
        for place in _documented(pkg):
            write = lambda item, place=place: _write(pkg, place, item)
            written[place] = _ITEM.sub(write, place.docstring.value)
        for place, text in written.items():
            place.docstring.value = text


def _documented(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Function]:
    for member in parent.members.values():
        if isinstance(member, griffe.Function) and member.docstring is not None:
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from _documented(member)


def _write(pkg: griffe.Module, place: griffe.Function, item: re.Match[str]) -> str:
    elsewhere = _ELSEWHERE.fullmatch(item[2])
    if elsewhere is None:
        return item[0]
    names, (path, rest) = _names(item), elsewhere.groups()
    stated = _stated(pkg, path)
    for name in set(names) - set(stated):
        _LOGGER.warning(
            f"{place.path}: `{name}` is said to be as in {path}, which does not state it"
        )
        return item[0]
    if len(names) == 1:
        addition = rest.lstrip(".,; ")
        return f"- {item[1]}:{stated[names[0]][1]} {addition[:1].upper()}{addition[1:]}".rstrip()
    groups = dict.fromkeys(stated[name] for name in stated if name in names)
    lines = [f"- As in [`{path.rpartition('.')[2]}`][{path}]{rest.rstrip('.')}:"]
    for group, text in groups:
        head = ", ".join(f"`{name}`" for name in group if name in names)
        lines.append(f"    - {head}:" + text.replace("\n", "\n    "))
    return "\n".join(lines)


def _stated(pkg: griffe.Module, path: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """By its name, each argument's text, and the names that share it."""
    target = pkg[path.removeprefix("discretax.")]
    target = target.final_target if isinstance(target, griffe.Alias) else target
    if isinstance(target, griffe.Class):
        target = target.members["__init__"]
    stated = {}
    for item in _ITEM.finditer(target.docstring.value):
        elsewhere = _ELSEWHERE.fullmatch(item[2])
        there = _stated(pkg, elsewhere["path"]) if elsewhere else {}
        for name in _names(item):
            stated[name] = there.get(name, (_names(item), item[2]))
    return stated


def _names(item: re.Match[str]) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", item[1]))
