from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from discretax._stateful import AbstractStreamingLayer, check_state
from discretax._timeseries import Timeseries, length_of, valid_samples, values_of
from discretax._types import accumulation_dtype

Kind = Literal["mean", "last", "max"]


class Pooling(AbstractStreamingLayer):
    """One vector from a sequence: the mean, the last or the largest of its valid samples.

    After a reset it begins anew. While streaming it pools all that has come so far: its cache is
    the sum, last or largest sample, with the number of samples. Without samples it gives zeros.
    """

    cache_index: eqx.nn.StateIndex
    streaming: bool
    inference: bool
    in_features: int = eqx.field(static=True)
    kind: Kind = eqx.field(static=True)

    def __init__(self, in_features: int, kind: Kind = "mean"):
        """**Arguments:** `in_features`; `kind`, one of `"mean"`, `"last"`, `"max"`.

        **Raises:** `ValueError` for another kind.
        """
        if kind not in ("mean", "last", "max"):
            raise ValueError(f"`pooling` must be 'mean', 'last' or 'max'; got {kind!r}.")
        self.cache_index = eqx.nn.StateIndex(None)
        self.streaming = False
        self.inference = False
        self.in_features = in_features
        self.kind = kind

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> tuple[Float[Array, " features"], Int[Array, ""]]:
        del max_seqlen
        batch = () if batch_size is None else (batch_size,)
        summary = jnp.zeros((*batch, self.in_features), dtype)
        # A sum in bfloat16 would stop growing after some hundred samples.
        return summary.astype(accumulation_dtype(summary)), jnp.zeros(batch, jnp.int32)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, " features"], eqx.nn.State]:
        """**Arguments:** `x`: `(time, features)` or a [`discretax.Timeseries`][]; `state`; `key`,
        unused.

        **Returns:** `(features,)`, and the state.
        """
        del key
        check_state(state, self)
        values = values_of(x)
        u = values.astype(accumulation_dtype(values))
        cache = self.allocate_inference_cache(dtype=u.dtype)
        if self.streaming:
            cache = self.read_cache(state)
        summary, total = cache[0].astype(u.dtype), cache[1]
        if u.shape[0] > 0:
            summary, total = self._add(u, x, summary, total)
        if self.streaming:
            state = state.set(self.cache_index, (summary.astype(cache[0].dtype), total))
        if self.kind == "mean":
            summary = summary / jnp.maximum(total, 1).astype(u.dtype)
        return summary.astype(values.dtype), state

    def _add(self, u, x, summary, total):
        index = jnp.arange(u.shape[0])
        length = length_of(x)
        end = u.shape[0] if length is None else length
        counted = valid_samples(u.shape[0], end)
        if isinstance(x, Timeseries) and x.resets is not None:
            start = jnp.max(jnp.where(x.resets & counted, index, -1))
            counted &= index >= start
            summary = jnp.where(start >= 0, 0, summary)
            total = jnp.where(start >= 0, 0, total)
        count = counted.sum(dtype=total.dtype)
        if self.kind == "mean":
            summary = summary + jnp.where(counted[:, None], u, 0).sum(0)
        elif self.kind == "last":
            summary = jnp.where(count > 0, u[jnp.maximum(end, 1) - 1], summary)
        else:
            largest = jnp.where(counted[:, None], u, -jnp.inf).max(0)
            so_far = jnp.where(total > 0, summary, -jnp.inf)
            summary = jnp.where(total + count > 0, jnp.maximum(largest, so_far), 0)
        return summary, total + count
