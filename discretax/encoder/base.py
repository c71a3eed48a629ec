import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax._timeseries import Timeseries


class AbstractEncoder(eqx.nn.StatefulLayer):
    """From raw samples to the width of the model: `(x, state) -> (x, state)`.

    It keeps nothing in the state, and passes it on for `eqx.nn.Sequential`.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: an array or a [`discretax.Timeseries`][]; `state`; `key`, unused.

        **Returns:** the same kind as `x`, with values `(time, out_features)`, and `state`.
        """
