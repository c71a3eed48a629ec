"""Ensembles, as `eqx.filter_vmap` makes them: every array of a layer has one axis more."""

import dataclasses
import functools as ft
import inspect
from typing import Any, get_args

import equinox as eqx
import jax
from jaxtyping import AbstractArray


def check_one_member(layer: eqx.Module, remedy: str) -> None:
    """Refuses an ensemble where one layer is meant; sizes that happen to fit would hide it.

    What arrays one layer has, the annotations of its fields say, and of those of the layers in it.
    """
    shapes = []

    def note(node):
        if isinstance(node, eqx.Module):
            for name, rank in _ranks(type(node)).items():
                if eqx.is_array(array := getattr(node, name)):
                    shapes.append((name, array.shape, rank))
        return False

    jax.tree.leaves(layer, is_leaf=note)
    excess = {len(shape) - rank for _, shape, rank in shapes}
    if len(excess) == 1 and min(excess) > 0:
        name, shape, rank = shapes[0]
        raise ValueError(
            f"this takes one `{type(layer).__name__}`, not an ensemble: `{name}` of one has "
            f"{rank} {'axis' if rank == 1 else 'axes'}; got the shape {shape}. Map over the "
            f"members: `{remedy}`."
        )


@ft.cache
def _ranks(kind: type[eqx.Module]) -> dict[str, int]:
    if kind is eqx.nn.Linear:  # whose annotations leave the ranks open
        return {"weight": 2, "bias": 1}
    ranks = {field.name: _rank(field.type) for field in dataclasses.fields(kind)}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _rank(annotation: Any) -> int | None:
    """How many axes an array of this annotation has; None if that is left open."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        axes = annotation.dim_str.split()
        return None if any(axis == "..." or "*" in axis for axis in axes) else len(axes)
    ranks = {_rank(part) for part in get_args(annotation) if part is not type(None)}
    return ranks.pop() if len(ranks) == 1 else None
