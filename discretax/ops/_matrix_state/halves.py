"""Lower triangular matrices put together from halves: 1, 2, 4, ... samples.

What relates a later half to an earlier one is a product of matrices; so is most of the work, however
it began.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Lower = Float[Array, "*lead time time"]
Parts = Float[Array, "*lead parts samples key"]


def in_parts(rows: Float[Array, "*lead time key"], parts: int) -> Parts:
    return rows.reshape(*rows.shape[:-2], parts, -1, rows.shape[-1])


def earlier_and_later(parts: Parts) -> tuple[Array, Array]:
    """Of each two parts that follow one another."""
    return parts[..., 0::2, :, :], parts[..., 1::2, :, :]


def in_one(earlier: Parts, later: Parts) -> Parts:
    """Each two parts, one behind the other."""
    return jnp.concatenate([earlier, later], -2)


def joined(own: Float[Array, "*lead parts half half"], across: Array) -> Array:
    """[[own, 0], [across, own]] for each two parts."""
    earlier, later = earlier_and_later(own)
    above = jnp.concatenate([earlier, jnp.zeros_like(across)], -1)
    return in_one(above, jnp.concatenate([across, later], -1))


@jax.custom_jvp
def solve_unit_lower(lower: Lower, right: Float[Array, "*lead time value"]) -> Array:
    r"""$w$ of $(I + L) w = r$, for $L$ zero on the diagonal and above, its size a power of two.

    The inverse is built from those of its halves. Sums of powers of $L$ would be faster and are
    wrong: between nearly parallel keys, powers exceed the inverse by a factor of 1e12.
    """
    return _inverse(lower) @ right


@solve_unit_lower.defjvp
def _(primals, tangents):
    (lower, right), (d_lower, d_right) = primals, tangents
    inverse = _inverse(lower)
    w = inverse @ right
    return w, inverse @ (d_right - jnp.tril(d_lower, -1) @ w)


def _inverse(lower: Lower) -> Lower:
    return _inverses(lower[..., None, :, :])[..., 0, :, :]


def _inverses(lower: Float[Array, "*lead parts time time"]) -> Array:
    half = lower.shape[-1] // 2
    if half == 0:
        return jnp.ones_like(lower)
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], -3)
    own = _inverses(halves.reshape(*lower.shape[:-3], -1, half, half))
    earlier, later = earlier_and_later(own)
    return joined(own, -_product(later, _product(lower[..., half:, :half], earlier)))


def _product(a: Array, b: Array) -> Array:
    if a.shape[-1] < SMALL:
        return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
    return a @ b


# XLA takes a product of matrices smaller than this by itself, which on CPU takes ten times as long as
# a sum.
SMALL = 8
