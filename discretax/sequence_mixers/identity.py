from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._features import check_size
from discretax._types import Length, Resets, Timesteps, Values
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache


class IdentitySequenceMixer(AbstractRecurrentMixer[Float[Array, "0"]]):
    """$y = x$: a model without a memory, to compare others with. The cache is an empty array.

    !!! example

        ```python
        mixer = IdentitySequenceMixer(64)
        y, cache = mixer(x)  # y is x
        ```
    """

    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()
    # No sample reaches another one, broken or not.
    contains_broken_samples: ClassVar[bool] = True

    def __init__(self, in_features: int, key: PRNGKeyArray | None = None):
        """**Arguments:** `in_features`. `key` is there for the common signature.

        **Raises:** `ValueError` for a size below one.
        """
        del key
        self.in_features = check_size("in_features", in_features)

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "0"]:
        del max_seqlen
        return zero_cache(batch_size, (0,), dtype)

    def mix(
        self,
        x: Values,
        cache: Float[Array, "0"],
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Float[Array, "0"]]:
        refuse_timesteps(self, integration_timesteps, "it remembers nothing")
        return x, cache
