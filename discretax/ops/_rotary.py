"""Rotary positions: how features are turned by the count of their sample."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(size: int, base: float) -> tuple[float, ...]:
    r"""$\theta^{-2i/r}$ for the pairs $i$ of $r$ = `size` features and the `base` $\theta$."""
    half = size // 2
    return tuple((base ** (-np.arange(half) / half)).tolist()) if half else ()


def rotated(
    heads: Float[Array, "time heads head"],
    counts: Int[Array, " time"],
    frequencies: Sequence[float],
    magnitude: float = 1.0,
) -> Float[Array, "time heads head"]:
    r"""Features $i$ and $i + r/2$ of the first $r$, turned by the count times the pair's frequency,
    of which there are $r/2$, in radians per sample, and multiplied by the magnitude.

    An integer of `bits` bits stands for an angle, its whole range for one turn: it runs over
    where the angle does. In floating point late samples would lose the digits of theirs.
    """
    half = len(frequencies)
    if half == 0:
        return heads
    bits = jnp.iinfo(counts.dtype).bits
    turns = np.rint(np.asarray(frequencies) / (2 * np.pi) * 2.0**bits) % 2.0**bits
    counted = counts[:, None] * turns.astype(np.uint64).astype(counts.dtype)[None]
    angles = (counted.astype(float) * (2 * np.pi / 2.0**bits))[:, None]
    first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
    pairs = (magnitude * each for each in turned(first, second, angles))
    return jnp.concatenate([*pairs, rest], axis=-1)


def turned(
    first: Float[Array, "*lead pairs"],
    second: Float[Array, "*lead pairs"],
    angles: Float[Array, "*lead pairs"],
) -> tuple[Float[Array, "*lead pairs"], Float[Array, "*lead pairs"]]:
    """Each pair of numbers, turned by its angle."""
    cos, sin = jnp.cos(angles).astype(first.dtype), jnp.sin(angles).astype(first.dtype)
    return first * cos - second * sin, second * cos + first * sin
