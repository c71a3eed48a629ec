"""Rotary positions: how features are turned by the count of their sample."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
