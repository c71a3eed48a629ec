"""Rotary positions: how samples are counted, and how features are turned by their count."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


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


def rotated(
    heads: Float[Array, "time heads head"], counts: Int[Array, " time"], size: int, base: float
) -> Float[Array, "time heads head"]:
    r"""Features $i$ and $i + r/2$ of the first $r$ = `size`, turned by $t\, \theta^{-2i/r}$, for
    the count $t$ and the `base` $\theta$.

    An integer of `bits` bits stands for an angle, its whole range for one turn: it runs over
    where the angle does. In floating point late samples would lose the digits of theirs.
    """
    half = size // 2
    if half == 0:
        return heads
    bits = jnp.iinfo(counts.dtype).bits
    frequencies = base ** (-np.arange(half) / half)
    turns = np.rint(frequencies / (2 * np.pi) * 2.0**bits) % 2.0**bits
    counted = counts[:, None] * turns.astype(np.uint64).astype(counts.dtype)[None]
    angles = (counted.astype(float) * (2 * np.pi / 2.0**bits))[:, None]
    first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
    return jnp.concatenate([*turned(first, second, angles), rest], axis=-1)


def turned(
    first: Float[Array, "*lead pairs"],
    second: Float[Array, "*lead pairs"],
    angles: Float[Array, "*lead pairs"],
) -> tuple[Float[Array, "*lead pairs"], Float[Array, "*lead pairs"]]:
    """Each pair of numbers, turned by its angle."""
    cos, sin = jnp.cos(angles).astype(first.dtype), jnp.sin(angles).astype(first.dtype)
    return first * cos - second * sin, second * cos + first * sin
