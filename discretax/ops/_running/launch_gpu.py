"""Launching a Mosaic GPU kernel, the same on the hardware and in the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from discretax.ops._running.manual_axes import vary_alike, varying_with

LANES = 128  # threads of a warpgroup, each with a channel of its own


def launch(
    body: Callable[..., None],
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    tiles: Sequence[tuple[int, ...]],
    grid: dict[str, int],
    scratch: Sequence[Any],
    fill: float = jnp.nan,
    interpret: Any = None,
    **compiler_params: Any,
) -> list[Array]:
    """Runs `body(*inputs, *outputs, *scratch)`, one warpgroup for each point of the grid.

    `tiles` are the shapes in which the body copies the inputs and the outputs. Of a copy that goes
    past the end of an array, the hardware fills with zeros what it reads and drops what it writes.
    The interpreter does neither: for it the arrays are extended to whole tiles, with `fill`. NaN shows
    a body that takes what lies there; one that relies on the zeros says so.
    """
    inputs = vary_alike(*inputs)
    outputs = [varying_with(inputs[0], value.shape, value.dtype) for value in outputs]
    whole = outputs
    if interpret is not None:
        inputs = [_extend(value, tile, fill) for value, tile in zip(inputs, tiles, strict=False)]
        whole = [
            varying_with(inputs[0], _whole_tiles(value.shape, tile), value.dtype)
            for value, tile in zip(outputs, tiles[len(inputs) :], strict=True)
        ]
    results = plgpu.kernel(
        body,
        out_type=whole,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=list(scratch),
        # A body says what a lane does. It touches its own columns of shared memory alone: no barrier
        # is needed between a write and the reads that follow it.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            **compiler_params,
        ),
        interpret=interpret,
    )(*inputs)
    if interpret is None:
        return list(results)
    return [
        result[tuple(map(slice, value.shape))]
        for result, value in zip(results, outputs, strict=True)
    ]


def _whole_tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // step) * step for size, step in zip(shape, tile, strict=True))


def _extend(value: Array, tile: tuple[int, ...], fill: float) -> Array:
    target = _whole_tiles(value.shape, tile)
    padding = [(0, new - old) for old, new in zip(value.shape, target, strict=True)]
    fill = fill if jnp.issubdtype(value.dtype, jnp.floating) else 0
    return jnp.pad(value, padding, constant_values=fill)
