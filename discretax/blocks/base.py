import abc
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from discretax._broken import each_sample
from discretax._dropout import dropped
from discretax._stateful import AbstractStreamingLayer
from discretax._timeseries import Timeseries, length_of
from discretax._types import Values
from discretax.blocks._batch_norm import BatchNorm
from discretax.blocks._parts import NormLayer
from discretax.sequence_mixers import AbstractSequenceMixer

Samples = TypeVar("Samples", Array, Timeseries)


class AbstractBlock(AbstractStreamingLayer):
    """A residual layer around a sequence mixer: `(x, state) -> (x, state)`.

    It owns what is not pure: the norm's statistics, and the mixer's cache while streaming. What a
    block does with norm, mixer and dropout stands here; in which order, in the block.
    """

    in_features: eqx.AbstractVar[int]
    out_features: eqx.AbstractVar[int]
    sequence_mixer: eqx.AbstractVar[AbstractSequenceMixer]
    dropout: eqx.AbstractVar[eqx.nn.Dropout]

    @abc.abstractmethod
    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        """**Arguments:** `x`: `(time, features)` or a [`discretax.Timeseries`][] of such; `state`;
        `key`, for dropout.

        **Returns:** the same kind as `x`, and the new state.
        """

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree:
        return self.sequence_mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def mix(
        self, u: Values, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None
    ) -> tuple[Values, eqx.nn.State]:
        """`u` through the sequence mixer, with what `x` says of timesteps, length and resets."""
        cache = self.read_cache(state) if self.streaming else None
        u, cache = self.sequence_mixer(u, cache, key=key, **mixer_options(x))
        return u, self.write_cache(state, cache)

    def drop(self, u: Values, key: PRNGKeyArray | None) -> Values:
        """One mask of features for the whole sequence."""
        return dropped(u, self.dropout, key, self)


def mixer_options(x: Array | Timeseries) -> dict[str, Any]:
    """What `x` says of timesteps, length and resets."""
    if not isinstance(x, Timeseries):
        return {}
    return {"integration_timesteps": x.timesteps, "length": x.length, "resets": x.resets}


def normalise(
    norm: NormLayer, u: Values, state: eqx.nn.State, x: Array | Timeseries
) -> tuple[Values, eqx.nn.State]:
    """`u`, with what `x` says of length and resets."""
    if isinstance(norm, BatchNorm):
        return norm(u, state, length=length_of(x))
    if norm is not None:
        u = each_sample(x, jax.vmap(norm), u)
    return u, state


def residual(
    branch: Callable[[Values, eqx.nn.State], tuple[Values, eqx.nn.State]],
    norm: NormLayer,
    prenorm: bool,
    u: Values,
    state: eqx.nn.State,
    x: Array | Timeseries,
    dtype: Any = None,
) -> tuple[Values, eqx.nn.State]:
    """`u` and what `branch` makes of it, summed, with the norm before the branch or after the sum.

    `dtype` is that in which the branch computes, if it is another than that of `u`."""
    skip = u
    if prenorm:
        u, state = normalise(norm, u, state, x)
    u, state = branch(u if dtype is None else u.astype(dtype), state)
    u = skip + u.astype(skip.dtype)
    return (u, state) if prenorm else normalise(norm, u, state, x)
