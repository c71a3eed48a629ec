"""The axis legend as types, and the type in which recurrences accumulate.

`time` L, `features` H (width of the residual stream), `state` N, `heads`, `batch` (never written
inside the library: everything is unbatched and users `jax.vmap`). `timesteps` are elapsed times
since the previous sample, in sample intervals.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Values = Float[Array, "time features"]
Sample = Float[Array, " features"]
Timesteps = Float[Array, " time"]
Length = Int[Array, ""] | int
Resets = Bool[Array, " time"]


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """float64 if any of the arrays is float64, float32 otherwise (bfloat16 included)."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)
