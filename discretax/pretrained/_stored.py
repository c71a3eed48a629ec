"""How the leaves of a model lie in the tensors of a file."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

# Short convolutions have an axis of one there, for their input channels.
CONVOLUTIONS = ("conv1d.weight", "conv_1d.weight", "conv.conv.weight")


class Rows(NamedTuple):
    """A leaf from row `start` up to `stop`; the next tensor goes on from there, if there are more."""

    leaf: Any
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.leaf.shape[1:])

    @property
    def is_whole(self) -> bool:
        return self.shape == self.leaf.shape

    @property
    def is_last(self) -> bool:
        return self.stop == self.leaf.shape[0]


class Stored(NamedTuple):
    """A tensor: leaves, or rows of them, after each other along the first axis.

    With several `groups`, such as heads, each part is cut into as many: first come the rows of all
    parts for the first group, then those for the second, and so on. With a `form`, such as (1, 1, -1),
    the axes are others, -1 for as many as the numbers. Matrices may be transposed.
    """

    parts: tuple[Array | Rows, ...]
    is_convolution: bool = False
    groups: int = 1
    form: tuple[int, ...] | None = None
    is_transposed: bool = False

    @property
    def rows(self) -> list[Rows]:
        return [
            part if isinstance(part, Rows) else Rows(part, 0, part.shape[0]) for part in self.parts
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [rows.shape for rows in self.rows]
        count, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        if self.form is not None:
            return tuple(count * math.prod(rest) if n == -1 else n for n in self.form)
        if self.is_transposed:
            return (*rest, count)
        return (count, 1, *rest) if self.is_convolution else (count, *rest)

    def tensor(self) -> np.ndarray:
        arrays = [np.asarray(rows.leaf)[rows.start : rows.stop] for rows in self.rows]
        grouped = [array.reshape(self.groups, -1, *array.shape[1:]) for array in arrays]
        joined = np.concatenate(grouped, axis=1) if len(arrays) > 1 else arrays[0]
        joined = joined.T if self.is_transposed else joined.reshape(self.shape)
        return np.ascontiguousarray(joined)

    def split(self, tensor: np.ndarray) -> Iterator[tuple[Rows, np.ndarray]]:
        """What each of the rows are in the tensor."""
        parts, tensor = self.rows, tensor.T if self.is_transposed else tensor
        grouped = tensor.reshape(self.groups, -1, *parts[0].shape[1:])
        end = 0
        for rows in parts:
            start, end = end, end + rows.shape[0] // self.groups
            yield rows, grouped[:, start:end].reshape(rows.shape)


def stored(tensors: Mapping[str, Array | Stored | None]) -> dict[str, Stored]:
    """What there is of `tensors`, a leaf as a tensor of its own."""
    return {
        name: (leaf if isinstance(leaf, Stored) else Stored((leaf,)))._replace(
            is_convolution=name.endswith(CONVOLUTIONS)
        )
        for name, leaf in tensors.items()
        if leaf is not None
    }


def cut_as_stored(
    tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """Leaves that several tensors make, cut as the file with these `shapes` cuts them.

    transformers writes Olmo-Hybrid's convolutions of queries, keys and values in three equal parts."""
    spread: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        rows = tensor.rows
        if len(rows) == 1 and not rows[0].is_whole:
            spread.setdefault(id(rows[0].leaf), []).append(name)
    cut = dict(tensors)
    for names in spread.values():
        leaf = tensors[names[0]].rows[0].leaf
        counts = [(shapes.get(name) or (0,))[0] for name in names]
        if all(counts) and sum(counts) == leaf.shape[0]:
            ends = np.cumsum(counts).tolist()
            for name, start, end in zip(names, [0, *ends], ends, strict=False):
                cut[name] = tensors[name]._replace(parts=(Rows(leaf, start, end),))
    return cut


def leaves(tensors: Mapping[str, Stored]) -> list[Any]:
    """Each once, in the order in which the tensors end them."""
    parts = [part for tensor in tensors.values() for part in tensor.parts]
    found = [part.leaf if isinstance(part, Rows) else part for part in reversed(parts)]
    return list({id(leaf): leaf for leaf in found}.values())[::-1]


def gathered(
    tensors: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    dtypes: Mapping[str, np.dtype],
) -> Iterator[np.ndarray]:
    """The numbers of each of the `leaves`. Tensors are `read` one by one, and what several make is put
    together as they come."""
    begun: dict[int, np.ndarray] = {}
    for name, tensor in tensors.items():
        for rows, array in tensor.split(read(name)):
            array = array.astype(dtypes[name], copy=False)
            if not rows.is_whole:
                key = id(rows.leaf)
                whole = begun.setdefault(key, np.empty(rows.leaf.shape, array.dtype))
                whole[rows.start : rows.stop] = array
                if not rows.is_last:
                    continue
                array = begun.pop(key)
            yield array
