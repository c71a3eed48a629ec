from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import check_key, keyed
from discretax._features import check_name, check_size
from discretax._stateful import AbstractStreamingLayer, check_cache, samples_of
from discretax._timeseries import Timeseries, known, length_of, values_of, with_values
from discretax._types import Values
from discretax.rates._windows import (
    check_chunk,
    check_time,
    num_windows,
    resets_in_windows,
    since_last,
    until_first,
)

Upsampling = Literal["repeat", "linear"]


class Upsample(AbstractStreamingLayer):
    r"""`stride` samples for each one: back to the rate before [`discretax.rates.Downsample`][].

    $$y_{sk + i} = W_i\,x_{k-1} + b_i, \qquad i = 0, \dots, s - 1$$

    with $s$ the stride: `"linear"` learns a matrix for each place in the window, `"repeat"` has none,
    or, for other `out_features`, one for all places.

    What a `Downsample` makes of a window is known when the window ends, so each value is that of the
    window before, and of a sequence's first window there is zero before it. With `causal=False` it is
    that of the same window, $x_k$: a sample then looks ahead to the end of its window, by up to
    `stride - 1` samples. A stream in chunks of whole windows waits for these anyway.

    `like` gives the finer series: the samples that the `Downsample` was given, as a U-Net has them for
    its skip. Time, length, timesteps and resets become its own, and no value of a former sequence gets
    past a reset within a window; there is zero in its place. Without it, every window is a full one, its
    time is divided evenly, and resets stand at its beginning.

    A stream comes in chunks that are multiples of the stride.

    !!! example

        ```python
        down = Downsample(64, 4)
        up = Upsample(64, 4, how="linear", key=key)
        y, state = down(x, state)  # (time, 64) -> (ceil(time / 4), 64)
        z, state = up(y, state, like=x)  # (time, 64)
        ```
    """

    linear: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    how: Upsampling = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        in_features: int,
        stride: int,
        key: PRNGKeyArray | None = None,
        *,
        how: Upsampling = "repeat",
        out_features: int | None = None,
        causal: bool = True,
    ):
        """**Arguments:**

        - `in_features`: width of the samples.
        - `stride`: how many samples become of one.
        - `key`: for the linear map, where there is one.
        - `how`: `"repeat"` or `"linear"`.
        - `out_features`: width of what comes out; that of the samples if left out.
        - `causal`: from the window before, or from the same one.

        **Raises:** `ValueError` for sizes below one and an unknown `how`; `TypeError` for a linear map
        without a key.
        """
        self.in_features = check_size("in_features", in_features)
        self.stride = check_size("stride", stride)
        check_name("how", how, Upsampling)
        self.how = how
        self.causal = causal
        self.out_features = check_size(
            "out_features", self.in_features if out_features is None else out_features
        )
        self.linear = None
        if how == "linear" or self.out_features != self.in_features:
            check_key(key, "`key` of `Upsample`")
            width = self.out_features * (self.stride if how == "linear" else 1)
            self.linear = draw.linear(self.in_features, width, key=key)  # pyright: ignore[reportArgumentType]

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "*batch features"]:
        """The sample before the first; of no size where it is not looked at."""
        del max_seqlen
        batch = () if batch_size is None else (batch_size,)
        return jnp.zeros((*batch, self.in_features if self.causal else 0), dtype)

    def __call__(
        self,
        x: Array | Timeseries,
        state: eqx.nn.State,
        key: PRNGKeyArray | None = None,
        *,
        like: Array | Timeseries | None = None,
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)` or a [`discretax.Timeseries`][] of such; `state`;
        `key`, unused; `like`: the finer series, of the kind of `x`.

        **Returns:** the same kind as `x`, with values `(stride * time, out_features)`, or as many as
        `like` has, and the state.

        **Raises:** `ValueError` for no samples, for a `like` of another number of windows or another length, and while
        streaming for one whose time is no multiple of the stride; `TypeError` for a `like` of another
        kind.
        """
        del key
        values = samples_of(x, state, self, self.in_features)
        check_time(self, values.shape[0])
        fine = self._finer(x, values) if like is None else self._checked(like, x, values)
        time = values_of(fine).shape[0]
        if self.causal:
            values, state = self._before(values, fine, state)
        y = self._mapped(values, fine)
        resets = resets_in_windows(fine, time, self.stride)
        if resets is not None:
            kept = until_first(resets) if self.causal else since_last(resets)
            y = jnp.where(kept[..., None], y, jnp.zeros_like(y))
        if self.linear is not None and self.linear.bias is not None:
            y = y + self.linear.bias.astype(y.dtype).reshape(1, -1, self.out_features)
        y = jnp.broadcast_to(y, (len(y), self.stride, self.out_features))
        return with_values(fine, y.reshape(-1, self.out_features)[:time]), state

    def _finer(self, x: Array | Timeseries, values: Values) -> Any:
        repeated = lambda array: jnp.repeat(array, self.stride, axis=0)
        if not isinstance(x, Timeseries):
            return repeated(values)
        timesteps, length, resets = x.timesteps, x.length, x.resets
        if timesteps is not None:
            timesteps = repeated(timesteps / self.stride)
        if length is not None:
            length = length.astype(int) * self.stride
        if resets is not None:
            is_first = jnp.arange(self.stride * values.shape[0]) % self.stride == 0
            resets = repeated(resets) & is_first
        return Timeseries(repeated(values), timesteps, length, resets)

    def _checked(self, like: Any, x: Array | Timeseries, values: Values) -> Any:
        if isinstance(like, Timeseries) != isinstance(x, Timeseries):
            raise TypeError(
                "`like` must be of the kind of `x`, both arrays or both `Timeseries`; got "
                f"{type(like).__name__} and {type(x).__name__}."
            )
        if not isinstance(like, Timeseries | jax.Array | np.ndarray):
            raise TypeError(
                f"`like` must be an array or a `Timeseries`; got {type(like).__name__}. Give what the "
                "`Downsample` was given."
            )
        if isinstance(like, np.ndarray):
            like = jnp.asarray(like)
        shape = values_of(like).shape
        if len(shape) != 2 or num_windows(shape[0], self.stride) != values.shape[0]:
            raise ValueError(
                f"`like` must have the samples of {values.shape[0]} windows of {self.stride}, one for "
                f"each sample of `x`, (time, features); got {shape}. Give what the `Downsample` was given."
            )
        coarse, fine = (
            known(n if length_of(u) is None else length_of(u))
            for u, n in ((x, values.shape[0]), (like, shape[0]))
        )
        if (
            coarse is not None
            and fine is not None
            and num_windows(int(fine), self.stride) != coarse
        ):
            raise ValueError(
                f"`like` must have as many valid windows of {self.stride} as `x` has valid samples, "
                f"{coarse}; got a length of {fine}. Give what the `Downsample` was given."
            )
        if self.streaming:
            check_chunk(f"`Upsample(stride={self.stride})`", shape[0], self.stride)
        return like

    def _before(
        self, values: Values, fine: Array | Timeseries, state: eqx.nn.State
    ) -> tuple[Values, eqx.nn.State]:
        """For each window the sample of the one before, and the state with that of the last."""
        cache = self.read_cache(state)
        check_cache(self, cache, self.allocate_inference_cache())
        first, last, length = cache.astype(values.dtype), values[-1], length_of(fine)
        if length is not None:
            filled = num_windows(length.astype(int), self.stride)
            last = jnp.where(filled > 0, values[jnp.maximum(filled, 1) - 1], first)
        state = self.write_cache(state, last)
        return jnp.concatenate([first[None], values[:-1]]), state

    def _mapped(
        self, values: Values, fine: Array | Timeseries
    ) -> Float[Array, "windows places out"]:
        """For each place in the window, or one for all, without the bias."""
        if self.linear is not None:
            weight = self.linear.weight.T.astype(values.dtype)
            values = each_sample(fine, lambda u: u @ weight, values)
        return values.reshape(values.shape[0], -1, self.out_features)
