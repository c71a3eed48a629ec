import functools as ft
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import broken_since_reset, each_sample, nan_where, spoilt
from discretax._constructors import check_key, keyed
from discretax._features import check_name, check_size, linear
from discretax._stateful import AbstractStreamingLayer, check_cache, samples_of
from discretax._timeseries import Timeseries, known, length_of, valid_samples
from discretax._types import accumulation_dtype
from discretax.rates._windows import (
    check_chunk,
    check_time,
    in_windows,
    num_windows,
    resets_in_windows,
    since_last,
    valid_in_windows,
)

Downsampling = Literal["stride", "mean", "max", "linear"]


class Downsample(AbstractStreamingLayer):
    r"""One sample in the place of each window of `stride` samples: fewer for the layers that follow.

    $$y_k = \mathrm{pool}(x_{sk}, \dots, x_{sk + s - 1}), \qquad
    y_k = W\,[x_{sk}; \dots; x_{sk + s - 1}] + b \;\text{ for "linear"}$$

    with $s$ the stride. `"stride"` takes the last sample of each window, which is the newest that is
    known when the window ends; `"mean"` and `"max"` pool each feature; `"linear"` learns: a
    convolution whose width is its stride, so that the samples of a window lie side by side, the
    first in front. With other `out_features`, what is pooled goes through a linear map as well.

    Of a [`discretax.Timeseries`][],

    - the `length` is rounded up: a last window that is not full pools the samples that it has;
    - the timesteps of a window add up, so that time goes on in the unit that it had; without any, the
        layers that follow count in windows;
    - a window that a reset falls into pools what comes from its last reset on, never two sequences,
        and resets in its turn. What came before in that window is dropped: let sequences begin at
        multiples of the stride to keep all.

    Neither padding nor what came before a reset enters, though it be NaN.

    A stream comes in chunks that are multiples of the stride. Its last one may have any `length`; what
    follows one whose length is no multiple, without a reset, is refused, or NaN under `jax.jit`.

    !!! example

        ```python
        layer = Downsample(64, 4, how="linear", out_features=128, key=key)
        y, state = layer(x, eqx.nn.State(layer))  # (time, 64) -> (ceil(time / 4), 128)
        ```
    """

    linear: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    how: Downsampling = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        in_features: int,
        stride: int,
        key: PRNGKeyArray | None = None,
        *,
        how: Downsampling = "mean",
        out_features: int | None = None,
    ):
        """**Arguments:**

        - `in_features`: width of the samples.
        - `stride`: how many samples become one.
        - `key`: for the linear map, where there is one.
        - `how`: `"stride"`, `"mean"`, `"max"` or `"linear"`.
        - `out_features`: width of what comes out; that of the samples if left out.

        **Raises:** `ValueError` for sizes below one and an unknown `how`; `TypeError` for a linear map
        without a key.
        """
        self.in_features = check_size("in_features", in_features)
        self.stride = check_size("stride", stride)
        check_name("how", how, Downsampling)
        self.how = how
        self.out_features = check_size(
            "out_features", self.in_features if out_features is None else out_features
        )
        width = self.in_features * (self.stride if how == "linear" else 1)
        self.linear = None
        if how == "linear" or self.out_features != width:
            check_key(key, "`key` of `Downsample`")
            self.linear = draw.linear(width, self.out_features, key=key)  # pyright: ignore[reportArgumentType]

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Bool[Array, "*batch"]:
        """Whether the stream has ended, with a window that was not full."""
        del max_seqlen, dtype
        return jnp.zeros(() if batch_size is None else (batch_size,), bool)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)` or a [`discretax.Timeseries`][] of such; `state`;
        `key`, unused.

        **Returns:** the same kind as `x`, with values `(ceil(time / stride), out_features)`, and the
        state.

        **Raises:** `ValueError` for no samples, and while streaming for a chunk whose time is no
        multiple of the stride.
        """
        del key
        values = samples_of(x, state, self, self.in_features)
        time = values.shape[0]
        check_time(self, time)
        if self.streaming:
            check_chunk(f"`Downsample(stride={self.stride})`", time, self.stride)
        counted = valid_in_windows(x, time, self.stride)
        resets = resets_in_windows(x, time, self.stride)
        if resets is not None:
            counted &= since_last(resets)
        y = self._pooled(in_windows(values, self.stride), counted, x)
        if self.linear is not None:
            y = each_sample(x, ft.partial(linear, self.linear), y)
        begins = None if resets is None else resets.any(1)
        if self.streaming:
            y, state = self._continued(y, begins, x, time, state)
        return (self._series(x, y, counted, begins) if isinstance(x, Timeseries) else y), state

    def _pooled(
        self,
        windows: Float[Array, "windows stride features"],
        counted: Bool[Array, "windows stride"],
        x: Array | Timeseries,
    ) -> Float[Array, "windows pooled"]:
        zeros = jnp.zeros_like(windows)
        if self.how == "linear":
            return jnp.where(counted[..., None], windows, zeros).reshape(len(windows), -1)
        if self.how == "stride":
            place = jnp.arange(self.stride)[None]
            is_last = place == jnp.where(counted, place, -1).max(1, keepdims=True)
            return jnp.where(is_last[..., None], windows, zeros).sum(1)
        if self.how == "mean":
            u = jnp.where(counted[..., None], windows, zeros).astype(accumulation_dtype(windows))
            number = jnp.maximum(counted.sum(1, dtype=u.dtype), 1)
            return (u.sum(1) / number[:, None]).astype(windows.dtype)

        def largest(u: Float[Array, "windows features stride"]) -> Float[Array, "windows features"]:
            pooled = jnp.where(counted[:, None], u, -jnp.inf).max(2)
            return jnp.where(counted.any(1)[:, None], pooled, jnp.zeros_like(pooled))

        u = jnp.where(counted[..., None], windows, zeros).swapaxes(1, 2)
        return each_sample(x, largest, u)

    def _continued(
        self,
        y: Float[Array, "windows out"],
        begins: Bool[Array, " windows"] | None,
        x: Array | Timeseries,
        time: int,
        state: eqx.nn.State,
    ) -> tuple[Float[Array, "windows out"], eqx.nn.State]:
        """NaN in the windows that go on where none could begin: behind one that was not full."""
        ended = self.read_cache(state)
        check_cache(self, ended, self.allocate_inference_cache())
        length = length_of(x)
        length = jnp.asarray(time if length is None else length).astype(int)
        filled = num_windows(length, self.stride)
        displaced = broken_since_reset(jnp.zeros(len(y), bool), ended, begins)
        seen = known(displaced & valid_samples(len(y), filled))
        if seen is not None and seen.any():
            raise ValueError(
                f"a stream goes on in whole windows of {self.stride} samples; got more after a chunk "
                "whose `length` was no multiple. Give such a length to the last chunk alone, begin "
                "anew by a reset, or start another stream by `discretax.inference_state`."
            )
        last = displaced[jnp.maximum(filled, 1) - 1]
        after = jnp.where(length > 0, last | (length % self.stride != 0), ended)
        return spoilt(y, displaced), self.write_cache(state, after)

    def _series(
        self,
        x: Timeseries,
        y: Float[Array, "windows out"],
        counted: Bool[Array, "windows stride"],
        begins: Bool[Array, " windows"] | None,
    ) -> Timeseries:
        timesteps, length = x.timesteps, length_of(x)
        if timesteps is not None:
            # Added up, a negative one would be seen no more.
            unfit = ~(jnp.isfinite(timesteps) & (timesteps >= 0))
            timesteps = jnp.where(unfit, nan_where(unfit, timesteps.dtype), timesteps)
            timesteps = in_windows(timesteps, self.stride)
            timesteps = jnp.where(counted, timesteps, jnp.zeros_like(timesteps)).sum(1)
        if length is not None:
            length = num_windows(length.astype(int), self.stride)
        return Timeseries(y, timesteps, length, begins)
