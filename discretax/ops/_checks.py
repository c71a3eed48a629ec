import jax.numpy as jnp
from jaxtyping import Array

from discretax._types import conversion


def check_array(name: str, array: Array | None, **axes: int) -> None:
    """Refuses an array that is not floating with these axes; None is an argument left out."""
    shape = tuple(axes.values())
    if array is not None and (
        array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise ValueError(
            f"`{name}` must be floating, of shape ({', '.join(axes)}) = {shape}; got "
            f"{array.dtype}{array.shape}.{conversion(array, float)}"
        )
