"""Walking through time in chunks that are computed again in the backward pass."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, PyTree

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
    """`scan_chunks` without forward derivatives and, under `jax.vmap`, without copies.

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
    floating, flags = eqx.partition(inputs, eqx.is_inexact_array)
    outputs: Any = _in_place(run, chunk_size, (weights, state, floating), (flags, left))
    state, y = outputs
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


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_place(run, size, differentiable, other):
    return _forward(run, size, differentiable, other)[0]


def _forward(run, size, differentiable, other):
    (weights, state, inputs), (flags, left) = differentiable, other
    inputs = eqx.combine(inputs, flags)
    count = jax.tree.leaves(inputs)[0].shape[0] // size

    def advance(state, i):
        return run(weights, state, _chunk(inputs, size, i), _left_in(left, size, i))

    def step(carry, i):
        before, y = carry
        state, y_chunk = advance(before, i)
        return (state, _write(y, y_chunk, size, i)), before

    shapes = jax.eval_shape(lambda: advance(state, 0)[1])
    y = jax.tree.map(lambda y: jnp.zeros((count * size, *y.shape[1:]), y.dtype), shapes)
    outputs, states = lax.scan(step, _varying_with(state, (state, y)), jnp.arange(count))
    return outputs, (states, differentiable, other)


def _backward(run, size, kept, cotangents):
    states, (weights, _, inputs), (flags, left) = kept
    d_state, d_y = cotangents

    def step(carry, i_and_state):
        d_weights, d_state, d_inputs = carry
        i, state = i_and_state

        def outputs(weights, state, chunk):
            chunk = eqx.combine(chunk, _chunk(flags, size, i))
            return run(weights, state, chunk, _left_in(left, size, i))

        _, pullback = jax.vjp(outputs, weights, state, _chunk(inputs, size, i))
        more, d_state, d_chunk = pullback((d_state, _chunk(d_y, size, i)))
        d_weights = jax.tree.map(jnp.add, d_weights, more)
        return (d_weights, d_state, _write(d_inputs, d_chunk, size, i)), None

    d_weights, d_inputs = jax.tree.map(jnp.zeros_like, (weights, inputs))
    start = _varying_with(states, (d_weights, d_state, d_inputs))
    count = jax.tree.leaves(states)[0].shape[0]
    return lax.scan(step, start, (jnp.arange(count), states), reverse=True)[0], None


_in_place.defvjp(_forward, _backward)


def _varying_with(like: PyTree[Array], tree: PyTree[Array]) -> PyTree[Array]:
    arrays, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, vary_alike(jax.tree.leaves(like)[0], *arrays)[1:])


def _chunk(tree: PyTree[Array], size: int, i) -> PyTree[Array]:
    take = ft.partial(lax.dynamic_slice_in_dim, slice_size=size, allow_negative_indices=False)
    return jax.tree.map(lambda value: take(value, i * size), tree)


def _write(tree: PyTree[Array], part: PyTree[Array], size: int, i) -> PyTree[Array]:
    put = ft.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
    return jax.tree.map(lambda value, rows: put(value, rows, i * size), tree, part)


def state_at(states: Float[Array, "chunk ..."], before: Float[Array, "..."], left: Left) -> Array:
    """The last valid one of a chunk's `states`, or the one `before` if none is valid."""
    size = states.shape[0]
    if isinstance(left, int):  # the common case, free of a gather: no padding
        return states[min(left, size) - 1] if min(left, size) else before
    return jnp.where(left > 0, states[jnp.clip(left, 1, size) - 1], before)
