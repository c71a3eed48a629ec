"""From points in time to the gaps between them, in NumPy: float32 has too few digits for a date."""

import datetime
from typing import Any

import numpy as np
from jax.core import Tracer


def gaps_between(
    timestamps: Any,
    interval: Any,
    values_shape: tuple[int, ...],
    length: Any,
    resets: Any,
    previous: Any,
) -> np.ndarray:
    """In intervals; one at a reset, in the padding, and at the beginning without a `previous`."""
    given = (timestamps, interval, length, resets, previous)
    if any(isinstance(value, Tracer) for value in given):
        raise TypeError(
            "timestamps are turned into gaps in NumPy, before `jax.jit`; got a traced array. Pass "
            "the `Timeseries` into the compiled function, not the timestamps."
        )
    times = _numbers("timestamps", timestamps)
    if times.ndim == 0 or values_shape[: times.ndim] != times.shape:
        is_column = times.shape == (*values_shape[:-1], 1)
        remedy = " Take the last axis off: `timestamps[..., 0]`." if is_column else ""
        raise ValueError(
            "`timestamps` must be one per sample, (*batch, time), for values (*batch, time, ...); "
            f"got {times.shape} for values {values_shape}.{remedy}"
        )
    *batch, time = times.shape
    begins = np.zeros(times.shape, bool) if resets is None else np.array(resets, bool)
    lengths = np.asarray(time if length is None else length)
    if begins.shape != times.shape or lengths.shape not in ((), tuple(batch)):
        raise ValueError(
            "`resets` must be (*batch, time) and `length` (*batch,), as the timestamps are; got "
            f"timestamps {times.shape}, resets {begins.shape}, length {lengths.shape}."
        )
    if previous is None:
        begins[..., :1] = True
        before = np.concatenate([times[..., :1], times[..., :-1]], axis=-1)
    else:
        before = np.concatenate([_previous(previous, times), times], axis=-1)[..., :-1]
    valid = np.arange(time) < lengths[..., None]
    if (broken := valid & ~_is_finite(times)).any():
        raise ValueError(
            "`timestamps` must be finite and not NaT, but for padding; got "
            f"{times[broken][0]} at {_first(broken)}. Take out the samples that have none."
        )
    followed = valid & ~begins
    with np.errstate(invalid="ignore"):  # in the padding
        differences = times - before
        gaps = differences / _unit(interval, times)
    is_before = times < before
    is_negative = differences < np.zeros((), differences.dtype)
    if (too_far := followed & (is_before != is_negative)).any():
        at = _first(too_far)
        raise ValueError(
            "differences of `timestamps` must fit 64 bits; got "
            f"{before[at]}, then {times[at]} at {at}. Give them in a coarser unit, or, if they are "
            "numbers, as floats."
        )
    if (backwards := followed & is_before).any():
        at = _first(backwards)
        raise ValueError(
            f"`timestamps` must be in order within a sequence; got {before[at]}, then {times[at]} "
            f"at {at}. Sort the samples by them, or mark with `resets` where a new sequence begins."
        )
    return np.where(followed, gaps, 1)


def _previous(previous: Any, times: np.ndarray) -> np.ndarray:
    """As a sample before the first."""
    moment = _numbers("previous", previous)
    kinds = moment.dtype.kind, times.dtype.kind
    if not _is_finite(moment).all() or (kinds[0] != kinds[1] and set("mM") & set(kinds)):
        raise ValueError(
            f"`previous` must be a time as the timestamps are, {times.dtype}, and finite; got "
            f"{previous!r}."
        )
    if moment.shape not in ((), times.shape[:-1]):
        raise ValueError(
            f"`previous` must be one time, or one per sequence, of shape {times.shape[:-1]}; got "
            f"{moment.shape}."
        )
    return np.broadcast_to(moment[..., None], (*times.shape[:-1], 1))


def _is_finite(times: np.ndarray) -> np.ndarray:
    return ~np.isnat(times) if times.dtype.kind in "mM" else np.isfinite(times)


def _numbers(name: str, given: Any) -> np.ndarray:
    times = np.asarray(given)
    if times.dtype.kind not in "iufmM":
        is_text = times.dtype.kind in "OSU"
        remedy = f'np.asarray({name}, "datetime64[us]")' if is_text else f"{name}.astype(float)"
        raise TypeError(
            f"`{name}` must be numbers or NumPy's datetimes; got an array of {times.dtype}. "
            f"Convert it: `{remedy}`."
        )
    wide = {"i": np.int64, "u": np.int64, "f": np.float64}  # in which differences fit
    return times.astype(wide.get(times.dtype.kind, times.dtype))


def _unit(interval: Any, times: np.ndarray) -> Any:
    is_span = isinstance(interval, datetime.timedelta | np.timedelta64)
    is_date = times.dtype.kind in "mM"
    is_number = np.ndim(interval) == 0 and np.asarray(interval).dtype.kind in "iuf"
    if is_span != is_date or not (is_span or is_number):
        needed = (
            'a `numpy.timedelta64`, such as `np.timedelta64(1, "s")`,' if is_date else "a number"
        )
        raise TypeError(
            f"`interval` must be {needed} for timestamps of {times.dtype}; got {interval!r}."
        )
    unit: Any = np.timedelta64(interval) if is_span else float(interval)
    zero = 0 * unit  # in its unit; not a number if it is infinite or not a time
    if not unit > zero:
        raise ValueError(f"`interval` must be positive and finite; got {interval!r}.")
    if is_span:
        _check_units(unit, times)
    return unit


def _check_units(interval: np.timedelta64, times: np.ndarray) -> None:
    difference = (times[..., :0] - times[..., :0]).dtype
    try:
        np.promote_types(interval.dtype, difference)
    except TypeError:
        raise TypeError(
            "`interval` must be in a unit that the timestamps can be told in: months and years have no "
            f"fixed length in days; got {interval!r} for timestamps of {times.dtype}. Take days or "
            'less, `np.timedelta64(30, "D")`, for both.'
        ) from None


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis[0]) for axis in np.nonzero(mask))
