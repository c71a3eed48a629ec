from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from discretax._stateful import AbstractStreamingLayer, check_cache, check_state
from discretax._timeseries import Timeseries, length_of, valid_samples, values_of
from discretax._types import Values, accumulation_dtype

Kind = Literal["mean", "last", "max"]


class Pooling(AbstractStreamingLayer):
    """One vector from a sequence: the mean, the last or the largest of its valid samples.

    After a reset it begins anew. While streaming it pools all that has come so far. Without samples
    it gives zeros.

    The mean's cache holds the sum of the samples with their number behind it, both in two parts: a
    single float32 stops counting at 2**24. That of the others holds the sample, and a one behind it
    once there is any.
    """

    in_features: int = eqx.field(static=True)
    kind: Kind = eqx.field(static=True)

    def __init__(self, in_features: int, kind: Kind = "mean"):
        """**Arguments:** `in_features`; `kind`, one of `"mean"`, `"last"`, `"max"`.

        **Raises:** `ValueError` for another kind.
        """
        if kind not in ("mean", "last", "max"):
            raise ValueError(f"`pooling` must be 'mean', 'last' or 'max'; got {kind!r}.")
        self.in_features = in_features
        self.kind = kind

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "*parts summary"]:
        del max_seqlen
        batch = () if batch_size is None else (batch_size,)
        parts = (2,) if self.kind == "mean" else ()
        cache = jnp.zeros((*batch, *parts, self.in_features + 1), dtype)
        # A sum in bfloat16 would stop growing after some hundred samples.
        return cache.astype(accumulation_dtype(cache))

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
        summary, begins_anew = self._summary(u, x)
        if self.streaming:
            cache = self.read_cache(state)
            check_cache(self, cache, self.allocate_inference_cache())
            after = self._after(jnp.where(begins_anew, 0, cache), summary.astype(cache.dtype))
            state = self.write_cache(state, after)
            summary = (after[0] if self.kind == "mean" else after).astype(u.dtype)
        pooled, number = summary[:-1], summary[-1]
        if self.kind == "mean":
            pooled = pooled / jnp.maximum(number, 1)
        return pooled.astype(values.dtype), state

    def _summary(
        self, u: Values, x: Array | Timeseries
    ) -> tuple[Float[Array, " summary"], Bool[Array, ""] | bool]:
        """Of the samples since the last reset, and whether there was one."""
        time = u.shape[0]
        if time == 0:
            return jnp.zeros(self.in_features + 1, u.dtype), False
        index = jnp.arange(time)
        length = length_of(x)
        end = time if length is None else length
        counted = valid_samples(time, end)
        begins_anew = False
        if isinstance(x, Timeseries) and x.resets is not None:
            start = jnp.max(jnp.where(x.resets & counted, index, -1))
            counted &= index >= start
            begins_anew = start >= 0
        count = counted.sum()
        number = count if self.kind == "mean" else count > 0
        if self.kind == "mean":
            pooled = jnp.where(counted[:, None], u, 0).sum(0)
        elif self.kind == "last":
            pooled = jnp.where(count > 0, u[jnp.maximum(end, 1) - 1], 0)
        else:
            pooled = jnp.where(counted[:, None], u, -jnp.inf).max(0)
            pooled = jnp.where(count > 0, pooled, 0)
        return jnp.append(pooled, number.astype(u.dtype)), begins_anew

    def _after(self, cache: Array, summary: Float[Array, " summary"]) -> Array:
        """The cache, after the samples of `summary`."""
        if self.kind == "mean":
            return _sum_in_two_parts(cache, summary)
        any_new = summary[-1] > 0
        if self.kind == "max":
            summary = jnp.where(cache[-1] > 0, jnp.maximum(cache, summary), summary)
        return jnp.where(any_new, summary, cache)


def _sum_in_two_parts(
    total: Float[Array, "2 summary"], x: Float[Array, " summary"]
) -> Float[Array, "2 summary"]:
    """The second part keeps what rounding takes from the first: Knuth's two-sum."""
    high, low = total
    rounded = high + x
    x_taken = rounded - high
    lost = (high - (rounded - x_taken)) + (x - x_taken)
    low = jnp.where(jnp.isfinite(rounded), low + lost, 0)  # a sum of infinity stays infinite
    high = rounded + low
    return jnp.stack([high, low - (high - rounded)])
