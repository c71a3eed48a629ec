"""How many samples of its sequence are before each."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def counts_before(
    start: Int[Array, ""] | int, time: int, resets: Bool[Array, " time"] | None
) -> Int[Array, " time"]:
    """How many samples of its sequence are before each sample, `start` being before the first.

    Integers that end run over to the negative ones."""
    index = jnp.arange(time)
    if resets is None:
        return start + index
    anew = index - lax.cummax(jnp.where(resets, index, 0))
    return jnp.where(jnp.cumsum(resets) > 0, anew, start + index)


def count_after(
    start: Int[Array, ""] | int, counts: Int[Array, " time"], length: Int[Array, ""] | int
) -> Int[Array, ""]:
    """The count before the sample that follows the first `length`."""
    last = jnp.minimum(length, counts.shape[0]) - 1
    return jnp.where(last < 0, start, counts[last] + 1) if len(counts) else jnp.asarray(start, int)
