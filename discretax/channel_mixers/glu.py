from typing import overload

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import sizes_first
from discretax._features import check_features, check_size, linear
from discretax.channel_mixers.base import AbstractChannelMixer


class GLU(AbstractChannelMixer):
    r"""Gated linear unit, $y = (W_1 x + b_1) \odot \sigma(W_2 x + b_2)$.

    ??? cite

        Dauphin et al., Language Modeling with Gated Convolutional Networks, ICML 2017
        (arXiv:1612.08083).
    """

    w1: eqx.nn.Linear
    w2: eqx.nn.Linear
    in_features: int = eqx.field(static=True)

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        use_bias: bool = True,
    ): ...
    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        out_features: int | None = None,
        use_bias: bool = True,
    ): ...
    @sizes_first
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        key: PRNGKeyArray,
        use_bias: bool = True,
    ):
        """**Arguments:** `in_features`; `out_features`, `in_features` if left out; `key`; `use_bias`
        of both maps."""
        out_features = in_features if out_features is None else out_features
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        w1_key, w2_key = draw.split(key)
        self.w1 = draw.linear(in_features, out_features, use_bias, key=w1_key)
        self.w2 = draw.linear(in_features, out_features, use_bias, key=w2_key)
        self.in_features = in_features

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        check_features(self, x, self.in_features)
        return linear(self.w1, x) * jax.nn.sigmoid(linear(self.w2, x))
