from typing import overload

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import sizes_first
from discretax._features import check_features, check_name, check_size, linear
from discretax.channel_mixers._non_linearity import NON_LINEARITIES, NonLinearity
from discretax.channel_mixers.base import AbstractChannelMixer


class MLPChannelMixer(AbstractChannelMixer):
    r"""One layer of a perceptron, $y = \phi(W x + b)$.

    With an `intermediate_dim` two, as in transformers: $y = W_2\, \phi(W x + b) + b_2$.
    """

    linear: eqx.nn.Linear
    down_proj: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)
    non_linearity: str = eqx.field(static=True)

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        intermediate_dim: int | None = None,
        non_linearity: NonLinearity = "gelu",
        use_bias: bool = False,
    ): ...
    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        out_features: int | None = None,
        intermediate_dim: int | None = None,
        non_linearity: NonLinearity = "gelu",
        use_bias: bool = False,
    ): ...
    @sizes_first
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        key: PRNGKeyArray,
        intermediate_dim: int | None = None,
        non_linearity: NonLinearity = "gelu",
        use_bias: bool = False,
    ):
        """**Arguments:** `in_features`; `out_features`, `in_features` if left out; `key`;
        `intermediate_dim`, the width between two layers; `non_linearity`, by name; `use_bias`, of
        each layer.

        **Raises:** `ValueError` for an unknown non-linearity, or sizes below one.
        """
        check_name("non_linearity", non_linearity, NonLinearity)
        out_features = in_features if out_features is None else out_features
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        self.down_proj = None
        width = out_features
        if intermediate_dim is not None:
            width = check_size("intermediate_dim", intermediate_dim)
            key, down_key = draw.split(key)
            self.down_proj = draw.linear(width, out_features, use_bias, key=down_key)
        self.linear = draw.linear(in_features, width, use_bias, key=key)
        self.in_features = in_features
        self.non_linearity = non_linearity

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        check_features(self, x, self.in_features)
        y = NON_LINEARITIES[self.non_linearity](linear(self.linear, x))
        return y if self.down_proj is None else linear(self.down_proj, y)
