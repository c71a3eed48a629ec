import abc
import functools as ft

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._features import check_size, linear
from discretax._stateful import samples_of
from discretax._timeseries import Timeseries
from discretax.heads.pooling import Kind, Pooling


class AbstractHead(eqx.nn.StatefulLayer):
    """From the residual stream to the answer: `(x, state) -> (y, state)`.

    Takes an array or a [`discretax.Timeseries`][], and returns an array. While streaming, a head
    that pools answers with what it has seen so far.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "... out"], eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)` or a [`discretax.Timeseries`][] of such;
        `state`; `key`, unused.

        **Returns:** `(out_features,)`, or `(time, out_features)` with `reduce=False`, and the state.
        """


class PooledLinear(eqx.Module):
    """Pooling, if any, and a linear map: what heads have in common."""

    pooling: Pooling | None
    linear: eqx.nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        reduce: bool,
        pooling: Kind,
    ):
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        if not reduce and pooling != "mean":
            raise ValueError(
                f"`reduce=False` answers at every time step and pools nothing; got pooling="
                f"{pooling!r} with it. Leave one of the two out."
            )
        self.pooling = Pooling(in_features, pooling) if reduce else None
        self.linear = draw.linear(in_features, out_features, key=key)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, head: AbstractHead
    ) -> tuple[Float[Array, "... out"], eqx.nn.State]:
        values = samples_of(x, state, head, int(self.linear.in_features))
        if self.pooling is not None:
            values, state = self.pooling(x, state)
            return linear(self.linear, values), state
        return each_sample(x, ft.partial(linear, self.linear), values), state
