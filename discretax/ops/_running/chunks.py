"""Walking through time in chunks that are computed again in the backward pass."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, PyTree

from discretax.ops._running.derivatives import (
    differentiated,
    is_floating,
    push_through,
    turns_kept_whole,
)
from discretax.ops._running.manual_axes import vary_alike

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
    time, left = _extent(inputs, length)
    if time <= chunk_size:
        return run(state, inputs, left)
    count, inputs, left = _divided(inputs, left, chunk_size)

    @jax.checkpoint
    def step(state, inputs):
        i, chunk = inputs
        return run(state, chunk, _left_in(left, chunk_size, i))

    split = lambda value: value.reshape(count, chunk_size, *value.shape[1:])
    state, y = lax.scan(step, state, (jnp.arange(count), jax.tree.map(split, inputs)))
    return state, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:time], y)


def scan_chunks_in_place(
    run: Callable[[PyTree, PyTree, PyTree, Left], tuple[PyTree, PyTree]],
    weights: PyTree[Inexact[Array, "..."]],
    state: PyTree[Inexact[Array, "..."]],
    inputs: PyTree[Array],
    length: Left | None,
    chunk_size: int,
) -> tuple[PyTree, PyTree]:
    """`scan_chunks` without copies under `jax.vmap`.

    `weights` has all arrays that each chunk needs: `run` must close over none.

    XLA copies what `lax.scan` under `jax.vmap` takes chunks from and stacks them in, and the
    cotangents of both. Here chunks are slices, read and written where they are. But the gradient of
    the weights is added up sequence by sequence, which takes longer than copies if they are much
    larger than a chunk: then this is `scan_chunks`.
    """
    time, left = _extent(inputs, length)
    heavy = _numbers(weights) * time > HEAVY * _numbers(inputs) * chunk_size
    if time <= chunk_size or heavy:
        return scan_chunks(ft.partial(run, weights), state, inputs, length, chunk_size)
    _, inputs, left = _divided(inputs, left, chunk_size)
    arrays, structure = jax.tree.flatten((weights, state, inputs, left))
    weights, state, inputs, left = jax.tree.unflatten(structure, vary_alike(*arrays))
    state, y, _ = _in_place((run, chunk_size), weights, state, inputs, left)
    return state, jax.tree.map(lambda y: y[:time], y)


# Two CPU cores, eight sequences, forward and backward: RG-LRU with weights eight times as large as
# its chunks takes 1.24 times as long in place, LRU with four times as large ones 1.06 to 1.18 times.
HEAVY = 2


def _numbers(tree: PyTree[Array]) -> int:
    return sum(array.size for array in jax.tree.leaves(tree))


def _extent(inputs: PyTree[Array], length: Left | None) -> tuple[int, Left]:
    """All samples, and the valid ones."""
    time = jax.tree.leaves(inputs)[0].shape[0]
    left: Any = time if length is None or time == 0 else length
    return time, left if isinstance(left, int) else jnp.asarray(left).astype(int)


def whole_chunks(arrays: PyTree[Array], size: int) -> PyTree[Array]:
    """With zeros behind the last sample, up to a multiple of `size`."""

    def extend(value):
        padding = ((0, -value.shape[0] % size),) + ((0, 0),) * (value.ndim - 1)
        return jnp.pad(value, padding)

    return jax.tree.map(extend, arrays)


def _divided(
    inputs: PyTree[Array], left: Left, size: int
) -> tuple[int, PyTree[Array], Array | None]:
    """The number of chunks, inputs for all, and the valid samples: None if every one is."""
    inputs = whole_chunks(inputs, size)
    time = jax.tree.leaves(inputs)[0].shape[0]
    all_valid = isinstance(left, int) and left >= time
    return time // size, inputs, None if all_valid else jnp.asarray(left)


def _left_in(left: Array | None, size: int, i: Array) -> Left:
    """Valid samples left before chunk `i`; a plain number if every one is valid."""
    return size if left is None else jnp.maximum(left - i * size, 0)


def _walk(options, turns, weights, state, inputs, left):
    """The last state, the outputs, and the state before each chunk."""
    run, size = options

    def advance(state, i):
        return run(weights, state, _chunk(inputs, size, i), _left_in(left, size, i))

    def step(i, carry):
        state, y, states = carry
        states = _write(states, jax.tree.map(lambda value: value[None], state), 1, i)
        state, y_chunk = advance(state, i)
        return state, _write(y, y_chunk, size, i), states

    count = _count(inputs, size)
    shapes = jax.eval_shape(lambda: advance(state, 0)[1])
    y = jax.tree.map(lambda y: jnp.zeros((count * size, *y.shape[1:]), y.dtype), shapes)
    states = jax.tree.map(lambda value: jnp.zeros((count, *value.shape), value.dtype), state)
    return lax.fori_loop(0, turns, step, _varying_with(state, (state, y, states)))


def _run(options, weights, state, inputs, left):
    turns = turns_kept_whole(_count(inputs, options[1]))
    return _walk(options, turns, weights, state, inputs, left)


def _forward(options, weights, state, inputs, left):
    outputs = _in_place(options, weights, state, inputs, left)
    return outputs, (outputs[2], weights, inputs, left)


def _push(options, kept, tangents):
    states, weights, inputs, left = kept
    turns = _count(inputs, options[1])
    walk = lambda weights, state, inputs: _walk(options, turns, weights, state, inputs, left)
    return push_through(walk, (weights, _at(states, 0), inputs), tangents)


def _pull(options, kept, cotangents):
    run, size = options
    states, weights, inputs, left = kept
    inputs, flags = eqx.partition(inputs, is_floating)
    d_state, d_y, d_states = cotangents

    def step(carry, i):
        d_weights, d_state, d_inputs = carry

        def outputs(weights, state, chunk):
            chunk = eqx.combine(chunk, _chunk(flags, size, i))
            return run(weights, state, chunk, _left_in(left, size, i))

        _, pullback = jax.vjp(outputs, weights, _at(states, i), _chunk(inputs, size, i))
        more, d_state, d_chunk = pullback((d_state, _chunk(d_y, size, i)))
        d_weights = jax.tree.map(jnp.add, d_weights, more)
        d_state = jax.tree.map(jnp.add, d_state, _at(d_states, i))
        return (d_weights, d_state, _write(d_inputs, d_chunk, size, i)), None

    d_weights, d_inputs = jax.tree.map(jnp.zeros_like, (weights, inputs))
    start = _varying_with(states, (d_weights, d_state, d_inputs))
    return *lax.scan(step, start, jnp.arange(_count(inputs, size)), reverse=True)[0], None


_in_place = differentiated(_run, _forward, _push, _pull)


def _count(inputs: PyTree[Array], size: int) -> int:
    return jax.tree.leaves(inputs)[0].shape[0] // size


def _varying_with(like: PyTree[Array], tree: PyTree[Array]) -> PyTree[Array]:
    arrays, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, vary_alike(jax.tree.leaves(like)[0], *arrays)[1:])


def _chunk(tree: PyTree[Array], size: int, i) -> PyTree[Array]:
    take = ft.partial(lax.dynamic_slice_in_dim, slice_size=size, allow_negative_indices=False)
    return jax.tree.map(lambda value: take(value, i * size), tree)


def _at(tree: PyTree[Array], i) -> PyTree[Array]:
    return jax.tree.map(lambda value: value[0], _chunk(tree, 1, i))


def _write(tree: PyTree[Array], part: PyTree[Array], size: int, i) -> PyTree[Array]:
    put = ft.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
    return jax.tree.map(lambda value, rows: put(value, rows, i * size), tree, part)


def state_at(states: Float[Array, "chunk ..."], before: Float[Array, "..."], left: Left) -> Array:
    """The last valid one of a chunk's `states`, or the one `before` if none is valid."""
    size = states.shape[0]
    if isinstance(left, int):  # the common case, free of a gather: no padding
        return states[min(left, size) - 1] if min(left, size) else before
    return jnp.where(left > 0, states[jnp.clip(left, 1, size) - 1], before)
