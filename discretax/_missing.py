"""Values that are missing within a sequence, in NumPy: told as features, or as longer gaps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from discretax._features import check_name
from discretax._timeseries import Timeseries, batch_ndim_of

Fill = Literal["zero", "last"]


def fill_missing(
    x: Array | np.ndarray | Timeseries, missing: Any | None = None, *, fill: Fill = "last"
) -> Any:
    r"""Values in the place of the missing ones, and for each feature one more that says which.

    $$\tilde x_t = [\,(1 - m_t) \odot x_t + m_t \odot \hat x_t,\; m_t\,]$$

    with $m_t$ one where a value is missing and $\hat x_t$ zero, or the last value of that feature
    that is there: since the beginning of the sequence or the last reset, and zero without any. For
    every model: the width of the samples doubles. Timesteps stay.

    ??? cite

        The indicators: Lipton et al., Directly Modeling Missing Data in Sequences with RNNs
        (arXiv:1606.04130).

    !!! example

        ```python
        x = discretax.fill_missing(values)  # (time, features) with NaN: (time, 2 * features)
        encoder = LinearEncoder(in_features=2 * features, out_features=64, key=key)
        ```

    **Arguments:**

    - `x`: `(*batch, time, features)`, an array or a [`discretax.Timeseries`][].
    - `missing`: booleans of the shape of the values, True where one is missing. NaN, if left out.
    - `fill`: `"last"` or `"zero"`.

    **Returns:** an array of NumPy for an array, a `Timeseries` for a `Timeseries`. Padding is zero.

    **Raises:** `ValueError` for another shape or fill; `TypeError` inside `jax.jit`.
    """
    check_name("fill", fill, Fill)
    values = _values(x)
    gone = _mask(missing, np.isnan(values) if missing is None else None, values.shape, "value")
    time = np.arange(values.shape[-2])
    begins = np.zeros(values.shape[:-1], bool)
    if isinstance(x, Timeseries):
        gone = gone & _valid(x)[..., None]
        begins = begins if x.resets is None else np.asarray(x.resets)
    filled = np.where(gone, np.zeros_like(values), values)
    if fill == "last":
        there = np.maximum.accumulate(np.where(gone, -1, time[:, None]), axis=-2)
        first = np.maximum.accumulate(np.where(begins, time, 0), axis=-1)
        is_known = there >= first[..., None]
        last = np.take_along_axis(filled, np.maximum(there, 0), axis=-2)
        filled = np.where(gone & is_known, last, filled)
    if isinstance(x, Timeseries):
        filled = np.where(_valid(x)[..., None], filled, np.zeros_like(filled))
    filled = np.concatenate([filled, gone.astype(values.dtype)], axis=-1)
    if isinstance(x, Timeseries):
        return Timeseries(filled, x.timesteps, x.length, x.resets)
    return filled


def drop_missing(x: Array | np.ndarray | Timeseries, missing: Any | None = None) -> Timeseries:
    """The samples that are there, each with the time since the one before it.

    For models in continuous time. The timesteps of what is dropped are added to that of the next
    sample, and a reset among them moves on to it. The samples that are left come first, and `length`
    says how many; the shape stays.

    !!! example

        ```python
        series = discretax.drop_missing(values)  # values at 0, 1 and 4; NaN at 2 and 3
        series.timesteps, series.length  # [1, 1, 3, 1, 1], 3
        ```

    **Arguments:**

    - `x`: `(*batch, time, features)`, an array, whose timesteps are one, or a
        [`discretax.Timeseries`][].
    - `missing`: booleans, `(*batch, time)`, True where a sample is missing. Left out, those of which
        every feature is NaN.

    **Raises:** `ValueError` for another shape, and, without `missing`, for a sample of which some
    features are NaN and some are not: nothing that is known is dropped unless it is said;
    `TypeError` inside `jax.jit`.
    """
    values = _values(x)
    if not isinstance(x, Timeseries):
        x = Timeseries(values, np.ones(values.shape[:-1]))
    valid = _valid(x)
    default = None
    if missing is None:
        is_nan = np.isnan(values)
        default = is_nan.all(-1)
        if (partly := valid & is_nan.any(-1) & ~default).any():
            at = tuple(int(axis[0]) for axis in np.nonzero(partly))
            raise ValueError(
                "a sample is dropped if all of its features are missing; got one with some of them, "
                f"at {at}: {values[at]}. Drop those too, `missing=np.isnan(values).any(-1)`, or only "
                "the others, `.all(-1)`, and `fill_missing` after it."
            )
    kept = valid & ~_mask(missing, default, values.shape[:-1], "sample")
    timesteps = np.ones(kept.shape) if x.timesteps is None else np.asarray(x.timesteps, np.float64)
    resets = np.zeros(kept.shape, bool) if x.resets is None else np.asarray(x.resets)
    out = np.zeros_like(values), np.ones_like(timesteps), np.zeros_like(resets)
    for at in np.ndindex(kept.shape[:-1]):
        rows = values[at], timesteps[at], resets[at]
        for whole, part in zip(out, _left(*rows, kept[at]), strict=True):
            whole[at][: len(part)] = part
    dtype = jnp.result_type(float) if x.timesteps is None else x.timesteps.dtype
    return Timeseries(
        out[0],
        out[1].astype(dtype),
        kept.sum(-1).astype(np.int32),
        None if x.resets is None else out[2],
    )


def _left(
    values: np.ndarray, timesteps: np.ndarray, resets: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one sequence: the samples that are kept, their gaps and whether a reset came since the last."""
    places = np.flatnonzero(kept)
    before = np.concatenate([[-1], places[:-1]])
    last_reset = np.maximum.accumulate(np.where(resets, np.arange(len(kept)), -1))[places]
    is_reset = last_reset > before
    begins = np.where(is_reset, last_reset, before + 1)
    # Each gap by itself: of one running sum, a large gap would take the digits of the small ones.
    bounds = np.stack([begins, places + 1], axis=1).ravel()
    gaps = np.add.reduceat(np.append(timesteps, 0), bounds)[::2]
    return values[places], gaps, is_reset


def _values(x: Any) -> np.ndarray:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
        raise TypeError("missing values are told in NumPy, outside `jax.jit`; got a traced array.")
    values = np.asarray(x.values if isinstance(x, Timeseries) else x)
    batch_ndim = batch_ndim_of(x) if isinstance(x, Timeseries) else None
    has_features = values.ndim >= 2 if batch_ndim is None else values.ndim == batch_ndim + 2
    if values.dtype.kind not in "fV" or not has_features:
        raise ValueError(
            "values that can be missing must be floating, (*batch, time, features); got "
            f"{values.dtype}{values.shape}."
        )
    return values


def _valid(x: Timeseries) -> np.ndarray:
    shape = x.values.shape[:-1]
    if x.length is None:
        return np.ones(shape, bool)
    return np.arange(shape[-1]) < np.asarray(x.length)[..., None]


def _mask(given: Any, default: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    if given is None:
        return default
    mask = np.asarray(given)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(
            f"`missing` must be booleans, one per {what}: shape {shape}; got {mask.dtype}"
            f"{mask.shape}."
        )
    return mask
