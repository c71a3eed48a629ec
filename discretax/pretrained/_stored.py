"""How the leaves of a model lie in the tensors of a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

# Short convolutions have an axis of one there, for their input channels.
CONVOLUTIONS = ("conv1d.weight", "conv_1d.weight", "conv.conv.weight")


class Stored(NamedTuple):
    """A tensor: a leaf, or several after each other along the first axis."""

    leaves: tuple[Array, ...]
    is_convolution: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, rest = sum(leaf.shape[0] for leaf in self.leaves), self.leaves[0].shape[1:]
        return (rows, 1, *rest) if self.is_convolution else (rows, *rest)

    def tensor(self) -> np.ndarray:
        arrays = [np.asarray(leaf) for leaf in self.leaves]
        joined = np.concatenate(arrays) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])
        return joined.reshape(self.shape)

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """What each leaf is in the tensor."""
        ends = np.cumsum([leaf.shape[0] for leaf in self.leaves])
        parts = np.split(tensor, ends[:-1]) if len(ends) > 1 else [tensor]
        return [part.reshape(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]


def stored(tensors: Mapping[str, Array | Stored | None]) -> dict[str, Stored]:
    """What there is of `tensors`, a leaf as a tensor of its own."""
    return {
        name: leaf if isinstance(leaf, Stored) else Stored((leaf,), name.endswith(CONVOLUTIONS))
        for name, leaf in tensors.items()
        if leaf is not None
    }


def leaves(tensors: Mapping[str, Stored]) -> list[Any]:
    return [leaf for tensor in tensors.values() for leaf in tensor.leaves]
