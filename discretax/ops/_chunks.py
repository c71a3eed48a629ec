"""Walking through time in chunks that are computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

Left = Int[Array, ""] | int


def scan_chunks(
    run: Callable[[PyTree, PyTree, Left], tuple[PyTree, Any]],
    state: PyTree,
    inputs: PyTree[Array],
    length: Left | None,
    chunk_size: int,
) -> tuple[PyTree, Any]:
    """Runs `state, chunk of inputs, valid samples left -> state, chunk of outputs` over time.

    In training the backward pass keeps the states between the chunks and computes the rest again.
    `length` None means that all samples are valid.
    """
    time = jax.tree.leaves(inputs)[0].shape[0]
    left: Any = time if length is None or time == 0 else length
    left = left if isinstance(left, int) else jnp.asarray(left).astype(int)
    if time <= chunk_size:
        return run(state, inputs, left)

    num_chunks = -(-time // chunk_size)
    padding = num_chunks * chunk_size - time

    def split(value):
        value = jnp.pad(value, ((0, padding),) + ((0, 0),) * (value.ndim - 1))
        return value.reshape(num_chunks, chunk_size, *value.shape[1:])

    @jax.checkpoint
    def advance(carry, chunk):
        state, left = carry
        state, y = run(state, chunk, left)
        return (state, jnp.maximum(left - chunk_size, 0)), y

    (state, _), y = lax.scan(advance, (state, jnp.asarray(left)), jax.tree.map(split, inputs))
    return state, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:time], y)


def state_at(states: Float[Array, "chunk ..."], before: Float[Array, "..."], left: Left) -> Array:
    """The last valid one of a chunk's `states`, or the one `before` if none is valid."""
    size = states.shape[0]
    if isinstance(left, int):  # the common case, free of a gather: no padding
        return states[min(left, size) - 1] if min(left, size) else before
    return jnp.where(left > 0, states[jnp.clip(left, 1, size) - 1], before)
