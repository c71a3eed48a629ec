from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from discretax._features import check_size
from discretax._types import accumulation_dtype
from discretax.ops._running.chunks import whole_chunks


def chunked_cross_entropy(
    logits: Callable[[Float[Array, "chunk features"]], Float[Array, "chunk classes"]],
    x: Float[Array, "time features"],
    targets: Int[Array, " time"],
    *,
    chunk_size: int = 128,
) -> Float[Array, " time"]:
    r"""$-\log \mathrm{softmax}(\mathrm{logits}(x_t))_{\mathrm{target}_t}$ at every sample.

    The logits of `chunk_size` samples at a time are all that ever exists of them, forward and
    backward: for a large vocabulary those of a whole sequence take more memory than the model.

    A chunk is made of samples evenly spread over time. So where time is split over devices, each
    computes the logits of its own samples, and none of `x` are sent if the devices divide
    `chunk_size` and that the time; otherwise some go to the neighbours.

    **Arguments:**

    - `logits`: from some samples to their logits. It may close over parameters; they get gradients,
        added up over the chunks in their type.
    - `x`: the samples.
    - `targets`: which class is right, in [0, classes).
    - `chunk_size`: samples whose logits exist together.

    **Returns:**

    The losses in nats, float32, or float64 if `x` is. A target out of range gives NaN.

    **Raises:**

    `ValueError` if shapes do not fit or targets are not whole numbers.
    """
    chunk_size = check_size("chunk_size", chunk_size)
    if x.ndim != 2 or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            "`x` must be (time, features) and `targets` (time,) whole numbers; got "
            f"x: {x.dtype}{x.shape}, targets: {targets.dtype}{targets.shape}. "
            "Use `jax.vmap` to batch."
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(f"`targets` must be (time,) = ({x.shape[0]},); got {targets.shape}.")

    targets = targets.astype(int)
    if x.shape[0] <= chunk_size:
        return _losses(logits, x, targets)
    # A layer's method is equal from call to call; any other function may be made anew for each.
    walk = eqx.filter_jit(_over_time) if isinstance(logits, eqx.Module) else _over_time
    return walk(logits, x, targets, chunk_size)


def _over_time(logits, x, targets, chunk_size):
    time = x.shape[0]
    num_chunks = -(-time // chunk_size)

    def split(value):
        # Samples `num_chunks` apart make a chunk: devices along time have a part of each.
        value = whole_chunks(value, chunk_size)
        return value.reshape(chunk_size, num_chunks, *value.shape[1:]).swapaxes(0, 1)

    losses = jax.checkpoint(lambda chunk: _losses(logits, *chunk))
    y = jax.lax.map(losses, (split(x), split(targets)))
    return y.T.reshape(-1)[:time]


def _losses(logits, x, targets):
    y = logits(x)
    y = y.astype(accumulation_dtype(y))
    index = jnp.where(targets < 0, y.shape[1], targets)[:, None]  # no wrapping around
    chosen = jnp.take_along_axis(y, index, axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    return jax.nn.logsumexp(y, axis=1) - chosen
