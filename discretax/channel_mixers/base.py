import abc

import equinox as eqx
from jaxtyping import Array, Float


class AbstractChannelMixer(eqx.Module):
    """Mixes features at each time step: a function of the last axis alone."""

    in_features: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        """**Arguments:** `x`: any leading axes, then `in_features`.

        **Returns:** the same leading axes, then `out_features`, in the type of `x`.

        **Raises:** `ValueError` if the last axis has another size.
        """
