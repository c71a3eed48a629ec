import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from discretax._types import accumulation_dtype


def rms_normalised(
    x: Float[Array, "*lead features"], eps: float, axes: int | tuple[int, ...] = -1
) -> Float[Array, "*lead features"]:
    """`x` divided by the root of the mean of its squares and `eps`; float32, or float64 if `x` is."""
    wide = x.astype(accumulation_dtype(x))
    return wide * lax.rsqrt(jnp.mean(wide**2, axis=axes, keepdims=True) + eps)
