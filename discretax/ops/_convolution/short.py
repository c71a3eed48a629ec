from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._timeseries import check_length, check_resets, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._running.split_time import incoming_window


def depthwise_convolution(
    x: Float[Array, "time features"],
    weight: Float[Array, "features width"],
    bias: Float[Array, " features"] | None = None,
    window: Float[Array, "past features"] | None = None,
    *,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
) -> tuple[Float[Array, "time features"], Float[Array, "past features"]]:
    r"""A short causal convolution, one filter per feature, that can be continued.

    $$y_t = b + \sum_{k=0}^{K-1} w_{K-1-k} \odot x_{t-k}$$

    **Arguments:**

    - `x`: the input.
    - `weight`: the filters, `width` $= K$. The last entry multiplies the sample of the moment.
    - `bias`: added to the output; none if left out.
    - `window`: the `past` $= K - 1$ samples before the first one, oldest first. Zero if left out.
    - `length`: number of valid samples; those at or past it do not enter the returned window.
    - `resets`: where True at `t`, a new sequence begins: samples before `t` count as zero from
        there on. They are selected, not multiplied, so that a NaN in the past does not pass. For
        gradients put a finite number in its place before the call, `jnp.where(jnp.isfinite(x), x, 0)`.

    **Returns:**

    The output, in the type of `x`, and the window after the last valid sample, with which the next
    chunk continues; a chunk may be shorter than the filters, or empty. Sum and window are float32,
    or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit or an input is not real.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(
            "`x` must be (time, features) and `weight` (features, width), of width at least 1; got "
            f"x: {x.shape} and weight: {weight.shape}. Use `jax.vmap` to batch."
        )
    (time, features), past = x.shape, weight.shape[1] - 1
    check_array("x", x, time=time, features=features)
    check_array("weight", weight, features=features, width=past + 1)
    check_array("bias", bias, features=features)
    check_array("window", window, past=past, features=features)
    check_length(length, time)
    check_resets(resets, time)
    dtype = accumulation_dtype(*jax.tree.leaves((x, weight, bias, window)))
    window = jnp.zeros((past, features)) if window is None else window
    delayed, window = delays(x.astype(dtype), window.astype(dtype), length, resets)

    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)[None]
    for k in range(past + 1):
        y = y + weight[None, :, k].astype(dtype) * delayed(past - k)
    return y.astype(x.dtype), window


def token_shift(
    x: Float[Array, "time features"],
    last: Float[Array, " features"] | None = None,
    *,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
) -> tuple[Float[Array, "time features"], Float[Array, " features"]]:
    r"""The sample before each one: $y_t = x_{t-1}$.

    **Arguments:**

    - `x`: the samples.
    - `last`: the one before the first; zero if left out.
    - `length`: number of valid samples.
    - `resets`: where True at `t`, a new sequence begins, and zero comes before its first sample.

    **Returns:**

    The samples before, and the last valid one, with which the next chunk continues.

    **Raises:**

    `ValueError` if shapes do not fit or an input is not real.
    """
    if x.ndim != 2:
        raise ValueError(f"`x` must be (time, features); got {x.shape}. Use `jax.vmap` to batch.")
    time, features = x.shape
    check_array("x", x, time=time, features=features)
    check_array("last", last, features=features)
    check_length(length, time)
    check_resets(resets, time)
    window = jnp.zeros((1, features), x.dtype) if last is None else last[None].astype(x.dtype)
    delayed, window = delays(x, window, length, resets)
    return delayed(1), window[0]


def delays(
    x: Float[Array, "time features"],
    window: Float[Array, "past features"],
    length: Int[Array, ""] | int | None,
    resets: Bool[Array, " time"] | None,
) -> tuple[Callable[[int], Float[Array, "time features"]], Float[Array, "past features"]]:
    """`delayed(k)`, the samples `k` before each one, up to the `past` of the window, and the window
    after the last valid sample."""
    time, past = x.shape[0], window.shape[0]
    x = zero_padding(x, length)
    # Each sample's sequence; those of the window belong to the zeroth.
    sequence = None if resets is None else jnp.pad(jnp.cumsum(resets), (past, 0))
    window = incoming_window(
        window,
        lambda: _window_after(jnp.pad(x, ((past, 0), (0, 0))), sequence, time, past),
        time,
    )
    samples = jnp.concatenate([window, x])

    def delayed(k):
        start = past - k
        before = samples[start : start + time]
        if sequence is None:
            return before
        same = sequence[start : start + time] == sequence[past:]
        return jnp.where(same[:, None], before, 0)

    return delayed, _window_after(samples, sequence, time if length is None else length, past)


def _window_after(samples, sequence, length, past):
    """The last `past` samples of the sequence that the last valid one belongs to."""
    window = lax.dynamic_slice_in_dim(samples, length, past)
    if sequence is None or past == 0:
        return window
    tail = lax.dynamic_slice_in_dim(sequence, length, past)
    return jnp.where((tail == tail[-1])[:, None], window, 0)
