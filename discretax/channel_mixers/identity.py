from typing import overload

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._constructors import sizes_first
from discretax._features import check_features, check_size
from discretax.channel_mixers.base import AbstractChannelMixer


class IdentityChannelMixer(AbstractChannelMixer):
    """$y = x$."""

    in_features: int = eqx.field(static=True)

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray | None = None,
    ): ...
    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray | None = None,
        *,
        out_features: int | None = None,
    ): ...
    @sizes_first
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:** `in_features`. `key` is there for the common signature.

        **Raises:** `ValueError` for a size below one, or if `out_features` is given and differs
        from `in_features`.
        """
        del key
        if out_features not in (None, in_features):
            raise ValueError(
                "`IdentityChannelMixer` cannot change the width; got in_features="
                f"{in_features} and out_features={out_features}. Use `MLPChannelMixer`."
            )
        self.in_features = check_size("in_features", in_features)

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        check_features(self, x, self.in_features)
        return x
