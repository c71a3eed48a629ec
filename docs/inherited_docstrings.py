"""For the API pages: a class links to the methods that other classes state, and repeats none of them."""

import copy
from collections.abc import Iterator

import griffe


class InheritedDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        public = {}
        for cls, path in _exports(pkg):
            if cls not in public or path.count(".") < public[cls].count("."):
                public[cls] = path
        for cls in public:
            links = {}
            for stated, home in _stated_above(cls, public):
                if home is cls:  # its base is not public: it stands here
                    cls.set_member(stated.name, _owned(cls, stated))
                else:
                    links.setdefault(public[home], []).append(stated.name)
            if links:
                _append(cls, f"Methods: {'; '.join(_linked(*link) for link in links.items())}.")


def _exports(pkg: griffe.Module) -> Iterator[tuple[griffe.Class, str]]:
    """Classes, and the names under which users import them."""
    rooms = [module for name, module in pkg.modules.items() if name[0] != "_"]
    for room in [pkg, *rooms]:
        for name, member in room.members.items():
            if isinstance(member, griffe.Class):
                yield member, member.path
            elif name[0] != "_" and room.is_init_module and _is_class_of_ours(member):
                yield member.final_target, member.path


def _is_class_of_ours(member: griffe.Object | griffe.Alias) -> bool:
    """Names of other libraries cannot be followed."""
    ours = isinstance(member, griffe.Alias) and member.target_path.startswith("discretax.")
    return ours and member.is_class


def _stated_above(
    cls: griffe.Class, public: dict[griffe.Class, str]
) -> Iterator[tuple[griffe.Function, griffe.Class]]:
    """Methods whose docstring is a base's, each with the class at which a reader finds it."""
    lineage = [cls, *cls.mro()]
    for name in dict.fromkeys(name for base in reversed(lineage) for name in base.members):
        stating = next((base for base in lineage if _states(base, name)), cls)
        if stating is cls or (name[0] == "_" and name != "__call__"):
            continue
        stated = stating.members[name]
        home = [base for base in lineage if base in public and stating in [base, *base.mro()]][-1]
        hook = home is cls and stating.name.startswith("Abstract") and name in cls.members
        if not hook or cls.name.startswith("Abstract"):
            yield stated, home


def _states(cls: griffe.Class, name: str) -> bool:
    method = cls.members.get(name)
    return isinstance(method, griffe.Function) and method.docstring is not None


def _owned(cls: griffe.Class, method: griffe.Function) -> griffe.Function:
    method = copy.copy(method)
    method.parent = cls
    return method


def _linked(path: str, names: list[str]) -> str:
    links = ", ".join(f"[`{name}`][{path}.{name}]" for name in names)
    return f"{links} of [`{path.rpartition('.')[2]}`][{path}]"


def _append(cls: griffe.Class, text: str) -> None:
    """At the end of what the page says of the class, which is its docstring and `__init__`'s."""
    place = cls.members.get("__init__", cls)
    if place.docstring is None:
        place = cls
    if place.docstring is None:
        place.docstring = griffe.Docstring(text, parent=place)
    else:
        place.docstring.value += f"\n\n{text}"
