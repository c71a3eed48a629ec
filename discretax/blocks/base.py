import abc
from typing import TypeVar

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax._stateful import AbstractStreamingLayer
from discretax._timeseries import Timeseries

Samples = TypeVar("Samples", Array, Timeseries)


class AbstractBlock(AbstractStreamingLayer):
    """A residual layer around a sequence mixer: `(x, state) -> (x, state)`.

    It owns what is not pure: the norm's statistics, and the mixer's cache while streaming.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Samples, state: eqx.nn.State, *, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        """**Arguments:** `x`: `(time, features)` or a [`discretax.Timeseries`][] of such; `state`;
        `key`, for dropout.

        **Returns:** the same kind as `x`, and the new state.
        """
