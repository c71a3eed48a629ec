"""The layers of a model, and the same model made so that its traced program says which of them computes."""

import dataclasses
import functools as ft
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from discretax.sequence_mixers import AbstractSequenceMixer

SCOPE = re.compile(r"discretax_layer_(\d+)")
LEAF = jax.tree.structure(0)


class Layer(NamedTuple):
    path: str
    depth: int
    module: eqx.Module
    end: int  # the number behind that of the last layer within


class Named(NamedTuple):
    """`model` computes as the one that it was made of. `layers` are in the order of their fields, each
    before those within it, and are numbered by it; `owners` has for every leaf the number of the
    innermost layer that it is in."""

    model: PyTree
    layers: list[Layer]
    owners: list[int]


def named(model: PyTree) -> Named:
    layers: list[Any] = []
    owners = []

    def visit(node, path, depth, owner):
        # Without its initial value, a place in the state has no leaves.
        if isinstance(node, eqx.nn.StateIndex):
            return node
        is_layer = isinstance(node, eqx.Module)
        number = owner
        if is_layer:
            number, depth = len(layers), depth + 1
            layers.append(None)
        children, structure = jax.tree.flatten_with_path(node, is_leaf=lambda n: n is not node)
        if structure == LEAF:
            owners.append(owner)
            return node
        parts = [
            visit(part, path + jax.tree_util.keystr(keys), depth, number) for keys, part in children
        ]
        if not is_layer:
            return jax.tree.unflatten(structure, parts)
        layers[number] = Layer(path, depth - 1, node, len(layers))
        return _of_kind(_naming(type(node), number), jax.tree.unflatten(structure, parts))

    return Named(visit(model, "", 0, 0), layers, owners)


@ft.cache
def _naming(kind: type, number: int) -> type:
    """A subclass whose public methods are traced under the layer's number."""
    scope = f"discretax_layer_{number}"

    def within_scope(name):
        def method(self, *args, **options):
            with jax.named_scope(scope):
                return getattr(super(naming, self), name)(*args, **options)

        return method

    methods = {
        name: within_scope(name)
        for name in dir(kind)
        if (name == "__call__" or not name.startswith("_"))
        and name not in kind.__dataclass_fields__
        and callable(getattr(kind, name))
    }
    naming = type(kind)(kind.__name__, (kind,), methods)
    return naming


def _of_kind(kind: type, module: eqx.Module) -> eqx.Module:
    """The module as an instance of a subclass of its own."""
    instance = object.__new__(kind)
    for name, value in vars(module).items():
        object.__setattr__(instance, name, value)
    return instance


def mixers_within(mixer: Any) -> str:
    """How to take the mixers that a mixer is made of, for an error; nothing, if it is made of none."""
    if not isinstance(mixer, AbstractSequenceMixer):
        return ""
    names = [field.name for field in dataclasses.fields(mixer)]
    return " or ".join(
        f"`mixer.{name}`"
        for name in names
        if isinstance(getattr(mixer, name), AbstractSequenceMixer)
    )
