"""Lower triangular matrices put together from halves: 1, 2, 4, ... samples.

What relates a later half to an earlier one is a product of matrices; so is most of the work, however
it began.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Lower = Float[Array, "*lead time time"]


def two_halves(rows: Float[Array, "*lead time key"], half: int) -> tuple[Array, Array]:
    """The earlier and the later half of each `2 * half` samples, `(*lead, pairs, half, key)`."""
    pairs = rows.reshape(*rows.shape[:-2], -1, 2, half, rows.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def joined(own: Float[Array, "*lead parts half half"], across: Array) -> Array:
    """[[own, 0], [across, own]] for each pair of `own` blocks."""
    half = own.shape[-1]
    pairs = own.reshape(*own.shape[:-3], -1, 2, half, half)
    earlier = jnp.concatenate([pairs[..., 0, :, :], jnp.zeros_like(across)], -1)
    return jnp.concatenate([earlier, jnp.concatenate([across, pairs[..., 1, :, :]], -1)], -2)


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
    time = lower.shape[-1]
    inverse = jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype)
    half = 1
    while half < time:
        by_pair = lower.reshape(*lower.shape[:-2], time // (2 * half), 2, half, -1, 2, half)
        below = jnp.einsum("...iaib->...iab", by_pair[..., 1, :, :, 0, :])
        earlier, later = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inverse = joined(inverse, -later @ (below @ earlier))
        half *= 2
    return inverse[..., 0, :, :]
