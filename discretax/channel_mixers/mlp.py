from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._features import check_features, check_size, linear
from discretax.channel_mixers.base import AbstractChannelMixer

_NON_LINEARITIES = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swish": jax.nn.swish,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLPChannelMixer(AbstractChannelMixer):
    r"""One layer of a perceptron, $y = \phi(W x + b)$."""

    linear: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    non_linearity: str = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        out_features: int | None = None,
        non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh"] = "gelu",
        use_bias: bool = False,
    ):
        """**Arguments:** `in_features`; `key`; `out_features`, `in_features` if left out;
        `non_linearity`, by name; `use_bias`.

        **Raises:** `ValueError` for an unknown non-linearity.
        """
        if non_linearity not in _NON_LINEARITIES:
            raise ValueError(
                f"`non_linearity` must be one of {', '.join(_NON_LINEARITIES)}; got "
                f"{non_linearity!r}."
            )
        out_features = in_features if out_features is None else out_features
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        self.linear = eqx.nn.Linear(in_features, out_features, use_bias, key=key)
        self.in_features = in_features
        self.non_linearity = non_linearity

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        check_features(self, x, self.in_features)
        return _NON_LINEARITIES[self.non_linearity](linear(self.linear, x))
