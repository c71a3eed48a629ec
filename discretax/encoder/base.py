import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax._timeseries import Timeseries


class AbstractEncoder(eqx.nn.StatefulLayer):
    """From raw samples to the width of the model: `(x, state) -> (x, state)`.

    It passes the state on for `eqx.nn.Sequential`, and keeps at most the place of a stream in it.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: an array or a [`discretax.Timeseries`][]; `state`; `key`, for what
        is random.

        **Returns:** the same kind as `x`, with values `(time, out_features)`, and `state`.
        """
