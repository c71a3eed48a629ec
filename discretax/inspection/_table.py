"""What a summary is, and how it is printed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


class LayerSummary(NamedTuple):
    """A layer of a model, with all that is within it."""

    path: str
    """How the model leads to it: `".blocks[0].norm"` for `model.blocks[0].norm`."""
    depth: int
    """How many layers it is in."""
    kind: str
    """The name of its class."""
    parameters: int
    """How many numbers it has to train."""
    cache: PyTree[jax.ShapeDtypeStruct] | None
    """The shapes of what it keeps of a stream; None if it keeps nothing by itself, or cannot stream."""
    cache_bytes: int | None
    """Of one stream; None if something in it cannot stream."""
    operations: float
    """On floating point numbers, for each sample that the model is given."""


class Summary(NamedTuple):
    """What a model is made of, as [`discretax.inspection.summary`][] finds it. Printed, it is a table."""

    layers: tuple[LayerSummary, ...]
    """The model first, and each layer before those within it."""
    samples: int
    """How many samples the operations are those of, before they are divided by it."""
    max_seqlen: int
    """Length of the streams that the caches are for."""

    @property
    def total(self) -> LayerSummary:
        """The whole model."""
        return self.layers[0]

    def __repr__(self) -> str:
        return _table(self)


def _table(summary: Summary) -> str:
    rows: list[tuple[str, ...]] = [("layer", "class", "parameters", "cache", "bytes", "operations")]
    above = [""]
    for line in summary.layers:
        name = line.path.removeprefix(above[line.depth]) or "model"
        above[line.depth + 1 :] = [line.path]
        rows.append(("  " * line.depth + name, *_cells(line)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
    lines = [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    streams = summary.total.cache_bytes is not None
    notes = (
        "Each line has what is within it.",
        f"Cache: of one stream, max_seqlen={summary.max_seqlen}."
        if streams
        else "It cannot stream.",
        f"Operations: floating point, per sample, {summary.samples} at a time.",
    )
    return "\n".join([lines[0], rule, *lines[1:], rule, *notes])


def _cells(line: LayerSummary) -> tuple[str, ...]:
    kept = ", ".join(map(_shape, jax.tree.leaves(line.cache)))
    return (
        line.kind,
        f"{line.parameters:,}",
        "cannot stream" if line.cache_bytes is None else kept,
        "" if line.cache_bytes is None else f"{line.cache_bytes:,}",
        f"{line.operations:,.0f}",
    )


def _shape(leaf: jax.ShapeDtypeStruct) -> str:
    shape = "(" + ", ".join(map(str, leaf.shape)) + ")"
    return shape if jnp.issubdtype(leaf.dtype, jnp.floating) else f"{leaf.dtype}{shape}"
