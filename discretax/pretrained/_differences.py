"""In what two models differ, but for how they run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from discretax.architectures import LanguageModel

# What a model may have in its own way, with the same files: how it runs, and where it drops.
OWN = ("cache_index", "dropout", "dtype", "inference", "streaming")


def differences(model: LanguageModel, other: LanguageModel) -> Iterator[tuple[str, Any, Any]]:
    """Field by field, what the two have there. Of the backbone the blocks alone: how it runs them is
    its own matter."""
    blocks = model.backbone.blocks, other.backbone.blocks
    yield from _of_fields(*blocks, "backbone.blocks")
    for name in ("encoder", "norm", "head", "embedding_scale", "tie_embeddings"):
        yield from _of_fields(getattr(model, name), getattr(other, name), name)


def _of_fields(a: Any, b: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if type(a) is type(b) and dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            if field.name not in OWN:
                yield from _of_fields(
                    getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}"
                )
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _of_fields(left, right, f"{where}[{i}]")
    elif _shown(a) != _shown(b):
        yield where, _shown(a), _shown(b)


def _shown(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"array of shape {tuple(value.shape)}"
    return type(value).__name__ if dataclasses.is_dataclass(value) else value
