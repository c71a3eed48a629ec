"""From points in time to the gaps between them, in NumPy: float32 has too few digits for a date."""

import datetime
from typing import Any

import numpy as np
from jax.core import Tracer


def gaps_between(
    timestamps: Any, interval: Any, values_shape: tuple[int, ...], length: Any, resets: Any
) -> np.ndarray:
    """In intervals; one where a sequence begins and in the padding."""
    if any(isinstance(value, Tracer) for value in (timestamps, interval, length, resets)):
        raise TypeError(
            "timestamps are turned into gaps in NumPy, before `jax.jit`; got a traced array. Pass "
            "the `Timeseries` into the compiled function, not the timestamps."
        )
    times = _numbers(timestamps)
    if times.ndim == 0 or values_shape[: times.ndim] != times.shape:
        is_column = times.shape == (*values_shape[:-1], 1)
        remedy = " Take the last axis off: `timestamps[..., 0]`." if is_column else ""
        raise ValueError(
            "`timestamps` must be one per sample, (*batch, time), for values (*batch, time, ...); "
            f"got {times.shape} for values {values_shape}.{remedy}"
        )
    time = times.shape[-1]
    begins = np.zeros(times.shape, bool) if resets is None else np.asarray(resets).astype(bool)
    lengths = np.asarray(time if length is None else length)
    if begins.shape != times.shape or lengths.shape not in ((), times.shape[:-1]):
        raise ValueError(
            "`resets` must be (*batch, time) and `length` (*batch,), as the timestamps are; got "
            f"timestamps {times.shape}, resets {begins.shape}, length {lengths.shape}."
        )
    valid = np.arange(time) < lengths[..., None]
    begins = begins | (np.arange(time) == 0)
    is_broken = np.isnat if times.dtype.kind in "mM" else lambda times: ~np.isfinite(times)
    if (broken := valid & is_broken(times)).any():
        raise ValueError(
            "`timestamps` must be finite and not NaT, but for padding; got "
            f"{times[broken][0]} at {_first(broken)}. Take out the samples that have none."
        )
    unit = _unit(interval, times)
    followed = valid & ~begins
    with np.errstate(invalid="ignore"):  # in the padding
        gaps = np.ones(times.shape)
        gaps[..., 1:] = (times[..., 1:] - times[..., :-1]) / unit
    if (backwards := followed & (gaps < 0)).any():
        *batch, t = _first(backwards)
        before, after = times[(*batch, t - 1)], times[(*batch, t)]
        raise ValueError(
            f"`timestamps` must be in order within a sequence; got {before}, then {after} at "
            f"{(*batch, t)}. Sort the samples by them, or mark with `resets` where a new sequence "
            "begins."
        )
    return np.where(followed, gaps, 1)


def _numbers(timestamps: Any) -> np.ndarray:
    times = np.asarray(timestamps)
    if times.dtype.kind not in "iufmM":
        raise TypeError(
            "`timestamps` must be numbers or NumPy's datetimes; got an array of "
            f'{times.dtype}. Convert it: `np.asarray(timestamps, "datetime64[us]")`.'
        )
    wide = {"i": np.int64, "u": np.int64, "f": np.float64}  # in which differences fit
    return times.astype(wide.get(times.dtype.kind, times.dtype))


def _unit(interval: Any, times: np.ndarray) -> Any:
    is_span = isinstance(interval, datetime.timedelta | np.timedelta64)
    is_date = times.dtype.kind in "mM"
    if is_span != is_date or not (is_span or np.ndim(interval) == 0):
        needed = (
            'a `numpy.timedelta64`, such as `np.timedelta64(1, "s")`,' if is_date else "a number"
        )
        raise TypeError(
            f"`interval` must be {needed} for timestamps of {times.dtype}; got {interval!r}."
        )
    unit = np.timedelta64(interval) if is_span else float(interval)
    if not (unit > 0 and (is_span or np.isfinite(unit))):
        raise ValueError(f"`interval` must be positive and finite; got {interval!r}.")
    return unit


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis[0]) for axis in np.nonzero(mask))
