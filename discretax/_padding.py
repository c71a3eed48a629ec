"""Batches of sequences of unequal length, put together in NumPy: no shape is compiled for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import PRNGKeyArray

from discretax._constructors import check_key
from discretax._features import check_size, described
from discretax._timeseries import Timeseries, batch_ndim_of


class Item(NamedTuple):
    """The valid part of one sequence."""

    values: np.ndarray
    timesteps: np.ndarray | None
    resets: np.ndarray | None


def pad(
    sequences: Iterable[Any],
    *,
    timesteps: Iterable[Any] | None = None,
    resets: Iterable[Any] | None = None,
    to_length: int | None = None,
    multiple_of: int | None = None,
) -> Timeseries:
    """One batch of sequences of unequal length, which are padded with zeros.

    `jax.jit` compiles once for each shape: where batches differ in their longest sequence, pad all
    of them to one length, or to multiples of one. It is done in NumPy, and compiles nothing.

    !!! example

        ```python
        batch = discretax.pad([array_of_60_by_3, array_of_35_by_3], multiple_of=32)
        batch.values.shape, batch.length  # (2, 64, 3), [60, 35]
        targets = discretax.pad(targets_per_sample, to_length=64).values
        ```

    **Arguments:**

    - `sequences`: arrays `(time, features)`, or `(time,)` tokens, of NumPy or JAX; or
        [`discretax.Timeseries`][] of one sequence each, of which the valid samples are taken, with
        their timesteps and resets.
    - `timesteps`, `resets`: for each array, one per sample, as in a `Timeseries`. Timesteps are
        padded with ones.
    - `to_length`: the length of the batch. Left out, that of the longest sequence.
    - `multiple_of`: the length is the next multiple of this, one of it at least.

    **Returns:** a `Timeseries` of a batch, with the `length` of every sequence.

    **Raises:** `ValueError` for no sequences, sequences that differ in more than their length,
    timesteps or resets that do not fit, and one that is longer than `to_length`; `TypeError` for
    anything but a list of arrays.
    """
    items = _items(sequences, timesteps, resets)
    return _padded(items, _target(_lengths(items), to_length, multiple_of))


def bucket_by_length(
    sequences: Iterable[Any],
    *,
    batch_size: int | None = None,
    num_buckets: int = 4,
    to_lengths: Sequence[int] | None = None,
    timesteps: Iterable[Any] | None = None,
    resets: Iterable[Any] | None = None,
    drop_last: bool = False,
    key: PRNGKeyArray | None = None,
) -> Iterator[tuple[np.ndarray, Timeseries]]:
    """Padded batches of sequences of like length: few shapes to compile, and little padding.

    !!! example

        ```python
        for epoch_key in jax.random.split(key, epochs):
            for indices, batch in discretax.bucket_by_length(sequences, batch_size=32, key=epoch_key):
                train_step(batch, labels[indices])
        ```

    **Arguments:**

    - `sequences`, `timesteps`, `resets`: as in [`discretax.pad`][].
    - `batch_size`: of every batch but the last of each bucket, which has what is left; None for one
        batch per bucket.
    - `num_buckets`: how many lengths there are at most. They are the lengths that leave the least
        padding.
    - `to_lengths`: the lengths, instead. Each sequence is padded to the next of them.
    - `drop_last`: leaves out the last batch of a bucket if it is not full.
    - `key`: shuffles the sequences within each bucket, and the batches. Without it they come in
        their order, the shortest bucket first.

    **Returns:** an iterator over `(indices, batch)`, the places of the sequences in the list, and
    the padded sequences. Batches are made when it comes to them.

    **Raises:** as [`discretax.pad`][], and `ValueError` for sizes below one and for a sequence that
    is longer than all of `to_lengths`.
    """
    items = _items(sequences, timesteps, resets)
    lengths = _lengths(items)
    size = None if batch_size is None else check_size("batch_size", batch_size)
    if drop_last and size is None:
        raise ValueError("`drop_last` leaves out what does not fill a `batch_size`; got None.")
    if to_lengths is None:
        ends = _least_padding(lengths, check_size("num_buckets", num_buckets))
    else:
        given = _listed("to_lengths", to_lengths, "whole numbers")
        if not given:
            raise ValueError("`to_lengths` must hold at least one length; got none.")
        ends = np.unique([check_size("to_lengths", end) for end in given])
        _target(lengths, int(ends.max()), None)
    bucket_of = np.searchsorted(ends, lengths)
    batches = []
    rng = None
    if key is not None:
        check_key(key)
        rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    for i, end in enumerate(ends):
        indices = np.flatnonzero(bucket_of == i)
        if rng is not None:
            rng.shuffle(indices)
        step = size or max(len(indices), 1)
        cuts = [indices[start : start + step] for start in range(0, len(indices), step)]
        batches += [(cut, int(end)) for cut in cuts if not drop_last or len(cut) == size]
    if rng is not None:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return ((cut, _padded([items[i] for i in cut], end)) for cut, end in batches)


def _items(sequences: Any, timesteps: Any, resets: Any) -> list[Item]:
    if not hasattr(sequences, "__iter__") or hasattr(sequences, "dtype"):
        raise TypeError(
            "`sequences` must be a list of arrays; got "
            f"{described(sequences) if not hasattr(sequences, 'shape') else sequences.shape}. "
            "Sequences of equal length in one array are a batch as they are; `list(array)` makes a "
            "list of them."
        )
    sequences = list(sequences)
    if not sequences:
        raise ValueError("`sequences` must hold at least one sequence; got none.")
    extras = {"timesteps": timesteps, "resets": resets}
    extras = {name: _extra(name, given, len(sequences)) for name, given in extras.items()}
    items = [
        _item(i, sequence, {name: given[i] for name, given in extras.items()})
        for i, sequence in enumerate(sequences)
    ]
    shapes = [item.values.shape[1:] for item in items]
    if odd := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            "sequences must differ in their length alone, (time, features) with the same features; "
            f"got {items[0].values.shape} first and {items[odd[0]].values.shape} at {odd[0]}."
        )
    for name in extras:
        given = [getattr(item, name) is not None for item in items]
        if any(given) and not all(given):
            raise ValueError(
                f"`{name}` must be given for all sequences or for none; got none for number "
                f"{given.index(False)}."
            )
    return items


def _extra(name: str, given: Any, size: int) -> list[Any]:
    if given is None:
        return [None] * size
    given = _listed(name, given, "one array per sequence")
    if len(given) != size:
        raise ValueError(
            f"`{name}` must be a list of one array per sequence; got {len(given)} for {size} "
            "sequences."
        )
    return given


def _listed(name: str, given: Any, of: str) -> list[Any]:
    try:
        items = iter(given)
    except TypeError:
        raise TypeError(f"`{name}` must be a list of {of}; got {described(given)}.") from None
    return list(items)


def _item(i: int, sequence: Any, extras: dict[str, Any]) -> Item:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((sequence, extras))):
        raise TypeError("sequences are padded in NumPy, outside `jax.jit`; got a traced array.")
    end = None
    if isinstance(sequence, Timeseries):
        if any(extra is not None for extra in extras.values()):
            raise ValueError(
                f"a `Timeseries` brings its own timesteps and resets; got others for number {i}."
            )
        if batch_ndim_of(sequence):
            raise ValueError(
                f"each sequence must be one; got a batch of {len(sequence)} at {i}. `list(batch)` "
                "are its sequences."
            )
        end = None if sequence.length is None else int(sequence.length)
        extras = {name: getattr(sequence, name) for name in extras}
        sequence = sequence.values
    values = _array(f"sequence {i}", sequence)[:end]
    arrays = {
        name: None if extra is None else _array(f"`{name}` {i}", extra)[:end]
        for name, extra in extras.items()
    }
    for name, array in arrays.items():
        if array is not None and array.shape != values.shape[:1]:
            raise ValueError(
                f"`{name}` must be one per sample; got {array.shape} for sequence {i} of "
                f"{len(values)} samples."
            )
    return Item(values, **arrays)


def _array(what: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length
        array = np.asarray(None)
    if array.ndim == 0 or array.dtype.kind in "OSUmM":
        raise TypeError(f"{what} must be an array of numbers, (time, ...); got {values!r}.")
    return array


def _lengths(items: list[Item]) -> np.ndarray:
    return np.array([len(item.values) for item in items])


def _target(lengths: np.ndarray, to_length: int | None, multiple_of: int | None) -> int:
    longest = int(lengths.max())
    if to_length is not None and multiple_of is not None:
        raise ValueError(
            "the padded length is `to_length` or a `multiple_of`; got both, "
            f"{to_length} and {multiple_of}."
        )
    if multiple_of is not None:
        multiple = check_size("multiple_of", multiple_of)
        return -(-max(longest, 1) // multiple) * multiple
    if to_length is None:
        return longest
    to_length = check_size("to_length", to_length)
    if longest > to_length:
        raise ValueError(
            f"no sequence may be longer than the {to_length} samples to pad to; got {longest} at "
            f"{int(lengths.argmax())}. Pad to more, or cut it: `sequence[:{to_length}]`."
        )
    return to_length


def _padded(items: list[Item], time: int) -> Timeseries:
    def stack(arrays: Sequence[Any], fill: float) -> np.ndarray | None:
        if arrays[0] is None:
            return None
        shape = (len(arrays), time, *arrays[0].shape[1:])
        stacked = np.full(shape, fill, np.result_type(*{array.dtype for array in arrays}))
        for row, array in zip(stacked, arrays, strict=True):
            row[: len(array)] = array
        return stacked

    values, timesteps, resets = zip(*items, strict=True)
    length = _lengths(items).astype(np.int32)
    return Timeseries(stack(values, 0), stack(timesteps, 1), length, stack(resets, False))


def _least_padding(lengths: np.ndarray, num_buckets: int) -> np.ndarray:
    """The ends of the buckets: the longest of a bucket's sequences is what all are padded to.

    Dynamic programming over the distinct lengths: `padded[j]` samples are needed for the sequences
    of the first `j` lengths, with one bucket more in every round.
    """
    ends, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    padded = np.concatenate([[0], np.full(len(ends), np.inf)])
    starts = []
    for _ in range(min(num_buckets, len(ends))):
        start = np.zeros(len(ends) + 1, int)
        best = np.zeros(len(ends) + 1)
        for j in range(1, len(ends) + 1):
            samples = padded[:j] + ends[j - 1] * (before[j] - before[:j])
            start[j] = samples.argmin()
            best[j] = samples[start[j]]
        padded = best
        starts.append(start)
    chosen, j = [], len(ends)
    for start in reversed(starts):
        if j == 0:
            break
        chosen.append(j - 1)
        j = start[j]
    return ends[chosen[::-1]]
