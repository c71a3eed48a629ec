"""Inside `jax.shard_map`, arrays of different kinds together: each device's own, and one for all."""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """Each array varies over those axes of the mesh over which any does; None stays None.

    A loop wants its carry to do so, and a kernel all of its arguments. Cast before a derivative rule
    and not in it, what is summed over devices is the cotangent of what they share.
    """
    varying = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        lax.pcast(x, tuple(axes - own), to="varying") if x is not None and axes - own else x
        for x, own in zip(arrays, varying, strict=True)
    )


def varying_with(like: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """What a kernel gives for arguments that vary as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def split_by_compiler() -> bool:
    """Inside a `shard_map` over some axes of a mesh, does it leave others to the compiler?

    The compiler cannot split a kernel there, and would gather what it takes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, strict=True)
    return in_shard_map() and any(size > 1 for name, size in sizes if name not in mesh.manual_axes)
