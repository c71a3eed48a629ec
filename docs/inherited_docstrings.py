"""For the API pages: a method without a docstring points to the one that it implements."""

import griffe


class InheritedDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        _visit(pkg)


def _visit(parent: griffe.Module | griffe.Class) -> None:
    for child in parent.members.values():
        if child.is_alias:
            continue
        if isinstance(child, griffe.Function) and isinstance(parent, griffe.Class):
            _inherit(parent, child)
        elif isinstance(child, griffe.Module | griffe.Class):
            _visit(child)


def _inherit(owner: griffe.Class, method: griffe.Function) -> None:
    if method.docstring is not None:
        return
    for base in owner.mro():
        stated = base.members.get(method.name)
        if stated is None or stated.docstring is None:
            continue
        text = stated.docstring.value
        if "\n" in text:
            rooms = [room for room in base.canonical_path.split(".")[:-2] if room[0] != "_"]
            path = ".".join([*rooms, base.name, method.name])
            text = f"As stated for [`{base.name}.{method.name}`][{path}]."
        method.docstring = griffe.Docstring(text, parent=method)
        return
