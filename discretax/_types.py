"""The axis legend as types, and the type in which recurrences and parameters are computed with.

`time` L, `features` H (width of the residual stream), `state` N, `heads`, `batch` (never written
inside the library: everything is unbatched and users `jax.vmap`). `timesteps` are elapsed times
since the previous sample, in sample intervals.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from discretax import _installation as _installation  # nobody gets past it

Tree = TypeVar("Tree", bound=PyTree)

Values = Float[Array, "time features"]
Sample = Float[Array, " features"]
Timesteps = Float[Array, " time"]
Length = Int[Array, ""] | int
Resets = Bool[Array, " time"]


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """float64 if any of the arrays is float64, float32 otherwise (bfloat16 included)."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def check_floating(argument: str, dtype: Any) -> None:
    """Refuses what is neither None nor a floating type."""
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(
            f"`{argument}` must be a floating type, such as `jax.numpy.bfloat16`; got {dtype!r}."
        )


def conversion(array: Any, kind: type[bool] | type[int] | type[float]) -> str:
    """How real numbers of another kind become of this one: the remedy at the end of an error."""
    meant = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}[kind]
    if jnp.issubdtype(array.dtype, meant) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        return ""
    return f" Convert it: `.astype({kind.__name__})`."


def widened(tree: Tree, *others: Array) -> Tree:
    """`tree` with its floating arrays in the type that they and `others` accumulate in.

    What acts inside a recurrence is computed from this, whatever type the parameters are kept in:
    with eight bits, the exponential of a slow decay is one, and the state never forgets.
    """
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    is_floating = lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    dtype = accumulation_dtype(*others, *filter(is_floating, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_floating(leaf) else leaf, tree)
