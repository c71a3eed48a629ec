"""Windows of `stride` samples on a fixed grid: the first begins with the first sample."""

from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from discretax._timeseries import Timeseries, length_of, resets_of, valid_samples

Number = TypeVar("Number", int, Array)


def num_windows(samples: Number, stride: int) -> Number:
    """A last one that is not full counts."""
    return (samples + stride - 1) // stride


def in_windows(
    array: Shaped[Array, "time ..."], stride: int
) -> Shaped[Array, "windows stride ..."]:
    """Zeros, or False, where the last window lacks samples."""
    padding = [(0, -array.shape[0] % stride)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(-1, stride, *array.shape[1:])


def valid_in_windows(
    x: Array | Timeseries, time: int, stride: int
) -> Bool[Array, "windows stride"]:
    length = length_of(x)
    valid = jnp.ones(time, bool) if length is None else valid_samples(time, length)
    return in_windows(valid, stride)


def resets_in_windows(
    x: Array | Timeseries, time: int, stride: int
) -> Bool[Array, "windows stride"] | None:
    """Of valid samples."""
    resets = resets_of(x)
    if resets is None:
        return None
    return in_windows(resets, stride) & valid_in_windows(x, time, stride)


def since_last(resets: Bool[Array, "windows stride"]) -> Bool[Array, "windows stride"]:
    """The samples of the sequence that goes on after the window: from its last reset on, or all."""
    place = jnp.arange(resets.shape[1])[None]
    return place >= jnp.where(resets, place, 0).max(1, keepdims=True)


def until_first(resets: Bool[Array, "windows stride"]) -> Bool[Array, "windows stride"]:
    """The samples of the sequence that was under way before the window: those before a reset."""
    return jnp.cumsum(resets, axis=1) == 0


def check_time(layer: object, time: int) -> None:
    if time == 0:
        raise ValueError(
            f"`{type(layer).__name__}` takes at least one sample, (time, features); got none. Leave "
            "the empty series out."
        )


def check_chunk(what: str, time: int, stride: int) -> None:
    """Of a stream: the windows of one chunk do not reach into the next."""
    if time % stride:
        least = num_windows(time, stride) * stride
        raise ValueError(
            f"a chunk of a stream must be a multiple of {stride} samples for {what}; got {time}. "
            f"Gather {least} samples, or, where the stream ends, pad the last ones and say how many "
            f"they are: `discretax.pad([chunk], multiple_of={stride})[0]`."
        )
