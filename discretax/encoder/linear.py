import functools as ft
from typing import Any, overload

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import sizes_first
from discretax._features import check_size, linear
from discretax._stateful import samples_of
from discretax._timeseries import Timeseries, with_values
from discretax.encoder.base import AbstractEncoder


class LinearEncoder(AbstractEncoder):
    r"""$W x_t$, or $W x_t + b$ with `use_bias=True`, at each time step."""

    linear: eqx.nn.Linear

    @overload
    def __init__(
        self, in_features: int, out_features: int, key: PRNGKeyArray, *, use_bias: bool = False
    ): ...
    @overload
    def __init__(
        self, in_features: int, key: PRNGKeyArray, *, out_features: int, use_bias: bool = False
    ): ...
    @sizes_first
    def __init__(
        self, in_features: int, out_features: int, *, key: PRNGKeyArray, use_bias: bool = False
    ):
        """`LinearEncoder(in_features, out_features, key=key)`.

        **Arguments:** `in_features`, width of the samples; `out_features`, width of the model;
        `key`; `use_bias`.
        """
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        self.linear = draw.linear(in_features, out_features, use_bias, key=key)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        del key
        values = samples_of(x, state, self, int(self.linear.in_features))
        return with_values(x, each_sample(x, ft.partial(linear, self.linear), values)), state
