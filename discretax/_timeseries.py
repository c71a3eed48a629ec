"""What flows through a model when a plain array of samples is not enough."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from discretax._timestamps import gaps_between
from discretax._types import Length, Resets, Timesteps, conversion


class Timeseries(eqx.Module):
    """Samples together with their gaps, their number and their boundaries.

    Encoders, blocks and heads take a `Timeseries` wherever they take an array, and pass on what
    they were given: an array for an array, a `Timeseries` for a `Timeseries`.

    !!! example

        ```python
        batch = Timeseries(values, length=lengths)  # values: (batch, time, features)
        batch = discretax.pad(sequences)  # the same, from a list of arrays
        y, state = discretax.batched(model)(batch, state, key=key)
        ```
    """

    values: Shaped[Array, "time ..."]
    timesteps: Float[Array, " time"] | None
    length: Int[Array, ""] | None
    resets: Bool[Array, " time"] | None

    def __init__(
        self,
        values: Any,
        timesteps: Any | None = None,
        length: Any | None = None,
        resets: Any | None = None,
    ):
        """**Arguments:**

        - `values`: the samples, `(time, features)`, or `(time,)` whole numbers for
            [`discretax.encoder.EmbeddingEncoder`][].
        - `timesteps`: `(time,)`, elapsed time since the previous sample, in sample intervals. The
            first sample of a sequence has none before it: give it one.
        - `length`: how many samples are valid; those at or past it are padding, and are
            replaced by zeros on the way in, their timesteps by ones, so that whatever stands
            there, a NaN included, is without effect.
        - `resets`: `(time,)` booleans, True where a new, independent sequence begins.

        Each may carry the same leading batch axes, to be removed with `jax.vmap` or by
        [`discretax.batched`][]. `len(batch)`, `batch[0]`, `batch[order]` and a loop over `batch` are
        about its sequences.

        **Raises:**

        `ValueError` for shapes that do not match, whole numbers of NumPy that do not fit the type
        that JAX has for them, and, where the numbers are known (outside
        `jax.jit`), for a length outside [0, time] and for timesteps that are negative or not
        finite, unless they are padding. Under `jit` such a timestep makes its sample a NaN.
        """
        self.values = _as_array(values)
        self.timesteps = None if timesteps is None else _as_array(timesteps)
        self.length = None if length is None else _as_array(length)
        self.resets = None if resets is None else _as_array(resets)
        batch_ndims = _batch_ndims(self)
        if len(set(batch_ndims.values())) > 1 or min(batch_ndims.values(), default=0) < 0:
            raise ValueError(
                "`timesteps` and `resets` must be (*batch, time) and `length` (*batch,), with the "
                f"same batch axes; got {self._shapes()}."
            )
        batch_ndim = max(batch_ndims.values(), default=0)
        if self.values.ndim <= batch_ndim:
            raise ValueError(
                "`values` must be (*batch, time, features), with the batch axes of `timesteps`, "
                f"`length` and `resets`; got {self._shapes()}."
            )
        batch, time = self.values.shape[:batch_ndim], self.values.shape[batch_ndim]
        for name in ("timesteps", "resets"):
            array = getattr(self, name)
            column = (*self.values.shape[:-1], 1)
            if array is not None and array.shape == column != (*batch, time):
                raise ValueError(
                    f"`{name}` must be one number per sample, (*batch, time); got {self._shapes()}. "
                    f"Take the last axis off: `{name}[..., 0]`."
                )
        check_length(self.length, time, batch)
        check_timesteps(self.timesteps, time, self.length, batch)
        check_resets(self.resets, time, batch)

    @classmethod
    def from_timestamps(
        cls,
        values: Any,
        timestamps: Any,
        *,
        interval: Any,
        previous: Any | None = None,
        length: Any | None = None,
        resets: Any | None = None,
    ) -> "Timeseries":
        r"""Samples and the times at which they were taken.

        $$\mathrm{timesteps}_t = (\mathrm{timestamps}_t - \mathrm{timestamps}_{t-1}) / \mathrm{interval}$$

        Without a `previous`, a sequence begins one interval before its first sample: there, and at a
        reset, the timestep is one. The differences are taken in NumPy, in the timestamps' own precision, before
        anything is rounded to float32.

        !!! example

            ```python
            times = np.array(["2026-01-01T00:00", "2026-01-01T00:10", "2026-01-01T01:00"], "M8[s]")
            series = Timeseries.from_timestamps(values, times, interval=np.timedelta64(10, "m"))
            series.timesteps  # 1, 1, 5
            ```

        **Arguments:**

        - `values`: as in a `Timeseries`, with or without batch axes.
        - `timestamps`: `(*batch, time)` numbers, or NumPy's datetimes, in order. Equal ones are one
            after the other without a gap.
        - `interval`: the time that the model takes for one step, in the unit of the timestamps: for
            datetimes a `numpy.timedelta64` or `datetime.timedelta`. The sampling interval, where
            there is one; otherwise the median of the gaps in the training set does. Training and
            use must have the same one, so that it is not guessed from the data here.
        - `previous`: the time before the first sample, where it is known: of the last sample of the
            chunk before, in a stream, or when the series began. One for all or one per sequence.
        - `length`, `resets`: as in a `Timeseries`. Timestamps of padding are not looked at.

        **Raises:**

        `ValueError` for timestamps that are out of order, not finite or NaT, too far apart for 64
        bits, or of another shape than the samples, and for an interval that is not positive; `TypeError` for timestamps that
        are neither numbers nor datetimes, an interval of another kind than they, and inside
        `jax.jit`, where there are no numbers yet.
        """
        gaps = gaps_between(timestamps, interval, np.shape(values), length, resets, previous)
        return cls(values, gaps.astype(jnp.result_type(float)), length, resets)

    def map_values(self, f: Callable[[Array], Any]) -> "Timeseries":
        """`f(values)` in the place of the values; timesteps, length and resets stay.

        `f` is given zeros where there is padding. What it makes of them is padding again. It may
        change the features, not the number of samples. [`discretax.map_values`][] takes arrays too.

        **Raises:** `ValueError` if what `f` returns does not fit the timesteps, length and resets.
        """
        return Timeseries(f(values_of(self)), self.timesteps, self.length, self.resets)

    def __len__(self) -> int:
        """How many sequences a batch has."""
        return self._batch_size("`len`")

    def __bool__(self) -> bool:
        """True: without it, Python would ask for the `len`, which one sequence has none of."""
        return True

    def __getitem__(self, index: Any) -> "Timeseries":
        """Sequences of a batch: `batch[0]` is one, `batch[2:5]`, `batch[order]` and `batch[mask]`
        are batches.

        It is the first batch axis that is indexed, never time. That there is a batch is known from
        timesteps, length or resets.

        **Raises:** `TypeError` for one sequence, a series of values alone, and an index of another
        kind; `IndexError` beyond the batch.
        """
        index = batch_index(index, self._batch_size("an index"))
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __iter__(self) -> Iterator["Timeseries"]:
        """The sequences of a batch, one after the other."""
        return (self[i] for i in range(self._batch_size("iteration")))

    def _batch_size(self, what: str) -> int:
        batch_ndim = batch_ndim_of(self)
        if batch_ndim is None:
            raise TypeError(
                f"{what} is for the sequences of a batch; a `Timeseries` of values alone does not "
                f"tell whether it is one; got {self._shapes()}. Take `x.values`, or give the length "
                "of each sequence."
            )
        if batch_ndim == 0:
            raise TypeError(
                f"{what} is for the sequences of a batch; got one sequence, {self._shapes()}. Its "
                "samples are `x.values`."
            )
        return self.values.shape[0]

    def _shapes(self) -> str:
        names = ("values", "timesteps", "length", "resets")
        arrays = ((name, getattr(self, name)) for name in names)
        return ", ".join(f"{name} {array.shape}" for name, array in arrays if array is not None)


def _as_array(values: Any) -> Array:
    if isinstance(values, np.ndarray | np.generic) and values.dtype.kind in "iu":
        _check_fits(values)
    # `jnp.asarray` compiles for every shape of an array of NumPy, which takes longer than all else.
    # A copy, since `device_put` may go on using NumPy's memory, which the next batch may be put into.
    return jax.device_put(values.copy()) if type(values) is np.ndarray else jnp.asarray(values)


def _check_fits(numbers: np.ndarray | np.generic) -> None:
    """Without 64 bits, JAX cuts off the upper ones of a whole number."""
    dtype = jax.dtypes.canonicalize_dtype(numbers.dtype)
    if dtype == numbers.dtype or numbers.size == 0:
        return
    info = np.iinfo(dtype)
    for extreme in int(numbers.min()), int(numbers.max()):
        if not info.min <= extreme <= info.max:
            raise ValueError(
                f"whole numbers must fit {dtype}, from {info.min} to {info.max}; got {extreme}. Number "
                'them anew, `np.unique(x, return_inverse=True)`, or `jax.config.update("'
                'jax_enable_x64", True)`.'
            )


def map_values(f: Callable[[Array], Any], x: Array | Timeseries) -> Any:
    """`f` of an array, or of the values of a [`discretax.Timeseries`][], which stays one.

    For a layer of one's own that takes both:

    !!! example

        ```python
        class Logarithm(discretax.encoder.AbstractEncoder):
            def __call__(self, x, state, key=None):
                return discretax.map_values(jnp.log1p, x), state
        ```

    **Arguments:** `f`: of an array, with zeros where there is padding; `x`.

    **Returns:** `f(x)` for an array, [`x.map_values(f)`][discretax.Timeseries] for a `Timeseries`.
    """
    return x.map_values(f) if isinstance(x, Timeseries) else f(x)


def values_of(x: Array | Timeseries) -> Array:
    """The samples of an array or a `Timeseries`, zero where they are padding."""
    if isinstance(x, Timeseries):
        return zero_padding(x.values, x.length)
    return x


def with_values(x: Array | Timeseries, values: Array) -> Any:
    """`values` in place of the samples of `x`: an array for an array, else a `Timeseries`."""
    if isinstance(x, Timeseries):
        return Timeseries(values, x.timesteps, x.length, x.resets)
    return values


def batch_ndim_of(x: Timeseries) -> int | None:
    """How many batch axes there are; None where nothing but the values is given."""
    return max(_batch_ndims(x).values(), default=None)


def _batch_ndims(x: Timeseries) -> dict[str, int]:
    arrays = {"timesteps": x.timesteps, "length": x.length, "resets": x.resets}
    return {
        name: array.ndim - (0 if name == "length" else 1)
        for name, array in arrays.items()
        if array is not None
    }


def batch_index(index: Any, size: int) -> Any:
    """`index`, if it is one that JAX takes as NumPy would: beyond the end, JAX takes the last."""
    if isinstance(index, slice):
        return index
    array = index if isinstance(index, jax.Array) else np.asarray(index)
    if isinstance(index, list) and array.size == 0:
        array = array.astype(int)
    is_mask = array.dtype == bool and array.shape == (size,)
    is_tuple = isinstance(index, tuple)
    if is_tuple or not (is_mask or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(
            "a batch takes one index: a whole number, a slice, an array of whole numbers, or a mask "
            f"of shape {(size,)}; got {index!r}. Samples and features are those of `x.values`."
        )
    numbers = known(array)
    if not is_mask and numbers is not None and ((numbers < -size) | (numbers >= size)).any():
        raise IndexError(f"the batch has {size} sequences; got the index {index!r}.")
    return array


def length_of(x: Array | Timeseries) -> Int[Array, ""] | None:
    return x.length if isinstance(x, Timeseries) else None


def resets_of(x: Array | Timeseries) -> Bool[Array, " time"] | None:
    return x.resets if isinstance(x, Timeseries) else None


def zero_padding(values: Array, length: Length | None) -> Array:
    """Selects zero at and past `length`; a NaN in the padding does not get through."""
    return _with_padding(values, length, 0)


def one_padding(timesteps: Timesteps | None, length: Length | None) -> Timesteps | None:
    """Selects one at and past `length`: a gap with which no system is anything special."""
    return None if timesteps is None else _with_padding(timesteps, length, 1)


def _with_padding(values: Array, length: Length | None, padding: int) -> Array:
    if length is None:
        return values
    valid = valid_samples(values.shape[0], length)
    valid = valid.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(valid, values, jnp.full_like(values, padding))


def valid_samples(time: int, length: Length) -> Bool[Array, " time"]:
    """`length` may be of any whole type; compared as it is, an unsigned one would not promote."""
    return jnp.arange(time) < jnp.asarray(length).astype(int)


def check_length(length: Length | None, time: int, batch: tuple[int, ...] = ()) -> None:
    if length is None:
        return
    if jnp.shape(length) != batch or not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(
            f"`length` must be a whole number per sequence, of shape {batch}; got "
            f"{jnp.result_type(length)}{jnp.shape(length)}. Use `jax.vmap` to batch."
        )
    lengths = known(length)
    if lengths is not None and ((lengths < 0) | (lengths > time)).any():
        raise ValueError(
            f"`length` must lie between 0 and the number of samples, {time}; got {lengths}."
        )


def check_resets(resets: Resets | None, time: int, batch: tuple[int, ...] = ()) -> None:
    if resets is not None and (resets.shape != (*batch, time) or resets.dtype != bool):
        raise ValueError(
            f"`resets` must be booleans, one per sample: shape {(*batch, time)}; got "
            f"{resets.dtype}{resets.shape}.{conversion(resets, bool)}"
        )


def check_timesteps(
    timesteps: Timesteps | None,
    time: int,
    length: Length | None = None,
    batch: tuple[int, ...] = (),
) -> None:
    """`length` is known to fit. What stands past it is not looked at."""
    if timesteps is None:
        return
    if timesteps.shape != (*batch, time) or not jnp.issubdtype(timesteps.dtype, jnp.floating):
        raise ValueError(
            f"timesteps must be floating, one per sample: shape {(*batch, time)}; got "
            f"{timesteps.dtype}{timesteps.shape}.{conversion(timesteps, float)}"
        )
    gaps, lengths = known(timesteps), known(time if length is None else length)
    if gaps is None or lengths is None:
        return
    unfit = (np.arange(time) < lengths[..., None]) & ~(np.isfinite(gaps) & (gaps >= 0))
    if unfit.any():
        raise ValueError(
            "timesteps are elapsed times since the previous sample: they must be finite and must "
            f"not be negative; got {gaps[unfit][0]}. Take the differences of sorted timestamps; "
            "the first sample has none before it, and takes a timestep of one."
        )


def mirrored(
    time: int,
    length: Length | None,
    resets: Resets | None,
    timesteps: Timesteps | None = None,
) -> tuple[Int[Array, " time"], Resets | None, Timesteps | None]:
    """A sequence from its last valid sample to its first: by which index, with which resets and gaps.

    The index is its own inverse. What stands at t belongs to the border between t - 1 and t. From the
    other side, that border is met on arriving at t - 1. A sequence begins with no border, so with a
    gap of one.
    """
    index = jnp.arange(time)
    valid = time if length is None else jnp.asarray(length).astype(int)
    mirror = jnp.where(index < valid, valid - 1 - index, index)
    from_behind = lambda per_sample: jnp.roll(per_sample, -1)[mirror]
    begins = index == 0
    if resets is not None:
        resets = from_behind(resets) & ~begins
        begins = begins | resets
    if timesteps is not None:
        timesteps = jnp.where(begins, jnp.ones_like(timesteps), from_behind(timesteps))
    return mirror, resets, timesteps


def known(value: Any) -> np.ndarray | None:
    """The numbers, where there are any: a traced value has none yet."""
    return None if isinstance(value, Tracer) else np.asarray(value)
