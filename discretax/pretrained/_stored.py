"""How the leaves of a model lie in the tensors of a file."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

# Short convolutions have an axis of one there, for their input channels.
CONVOLUTIONS = ("conv1d.weight", "conv_1d.weight", "conv.conv.weight")


class Rows(NamedTuple):
    """Some rows of a leaf, which files keep as a tensor of their own."""

    leaf: Array
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.leaf.shape[1:])


class Stored(NamedTuple):
    """A tensor: one leaf or some rows of one, or several after each other along the first axis.

    With `groups` (heads) come the rows of the first group of each part, then those of the second.
    A tensor may be `transposed`, or have axes of one more than the leaf, its `shape`.
    """

    parts: tuple[Array | Rows, ...]
    groups: int = 1
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def joined_shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape or self.joined_shape[:: -1 if self.transposed else 1]

    def tensor(self) -> np.ndarray:
        arrays = [
            np.asarray(part.leaf)[part.start : part.stop]
            if isinstance(part, Rows)
            else np.asarray(part)
            for part in self.parts
        ]
        if self.groups > 1:
            grouped = [array.reshape(self.groups, -1, *array.shape[1:]) for array in arrays]
            arrays = [np.concatenate(grouped, axis=1).reshape(self.joined_shape)]
        joined = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        return np.ascontiguousarray(joined.T if self.transposed else joined).reshape(
            self.stored_shape
        )

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """What each part is in the tensor."""
        if len(self.parts) == 1:
            return [tensor.T if self.transposed else tensor.reshape(self.joined_shape)]
        joined = tensor.T if self.transposed else tensor.reshape(self.joined_shape)
        grouped = joined.reshape(self.groups, -1, *joined.shape[1:])
        rows = [part.shape[0] // self.groups for part in self.parts]
        pieces = np.split(grouped, np.cumsum(rows)[:-1], axis=1)
        return [piece.reshape(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


class Source(NamedTuple):
    """The rows of a leaf from `start` on, and where they are: a part of a tensor."""

    start: int
    tensor: str
    part: int


def stored(tensors: Mapping[str, Array | Stored | None]) -> dict[str, Stored]:
    """What there is of `tensors`, a leaf as a tensor of its own."""
    return {
        name: leaf if isinstance(leaf, Stored) else Stored((leaf,), shape=_shape(name, leaf))
        for name, leaf in tensors.items()
        if leaf is not None
    }


def leaves(tensors: Iterable[Stored]) -> list[Any]:
    """Every leaf once, in the order of the tensors."""
    found = {id(leaf): leaf for tensor in tensors for leaf in map(_leaf, tensor.parts)}
    return list(found.values())


def sources(tensors: Mapping[str, Stored]) -> list[list[Source]]:
    """Where each of the leaves is, in order of its rows."""
    found: dict[int, list[Source]] = {}
    for name, tensor in tensors.items():
        for i, part in enumerate(tensor.parts):
            start = part.start if isinstance(part, Rows) else 0
            found.setdefault(id(_leaf(part)), []).append(Source(start, name, i))
    return [sorted(each) for each in found.values()]


def _leaf(part: Array | Rows) -> Any:
    return part.leaf if isinstance(part, Rows) else part


def _shape(name: str, leaf: Array) -> tuple[int, ...]:
    return (leaf.shape[0], 1, *leaf.shape[1:]) if name.endswith(CONVOLUTIONS) else leaf.shape
