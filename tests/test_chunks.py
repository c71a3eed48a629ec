"""Time in chunks, read and written where they are: numbers and derivatives are those of the whole."""

import functools as ft

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, draw

from discretax.ops import linear_recurrence
from discretax.ops._running.chunks import HEAVY, scan_chunks_in_place, state_at

FEATURES, STATE, CHUNK = 6, 3, 4


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def make_weights():
    return 0.9 * jnp.tanh(draw(STATE)), draw(FEATURES, STATE, seed=2)


def run(weights, h, chunk, left):
    a, W = weights
    x, resets = chunk
    states = linear_recurrence(a, x @ W, h, resets=resets)
    return state_at(states, h, left), {"y": jnp.tanh(states) @ W.T}


@ft.partial(jax.jit, static_argnames=("chunk_size", "static_length"))
def in_chunks(weights, h, x, resets, length=None, *, chunk_size, static_length=None):
    """The state and the outputs up to `length`."""
    if static_length is not None:
        length = static_length
    h, out = scan_chunks_in_place(run, weights, h, (x, resets), length, chunk_size)
    valid = jnp.arange(x.shape[0])[:, None] < (x.shape[0] if length is None else length)
    return h, jnp.where(valid, out["y"], 0)


def with_gradients(f, *args):
    """Outputs and gradients in weights, state and input."""

    def loss(*args):
        h, y = f(*args)
        return (jnp.sin(h) ** 2).sum() + (y**2 * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return f(*args), jax.grad(loss, argnums=(0, 1, 2))(*args)


@pytest.mark.slow
@pytest.mark.parametrize("time", [11, 12])
@pytest.mark.parametrize("length", [None, 7, "traced"])
@pytest.mark.parametrize("resets", [False, True])
def test_chunks_are_the_whole(time, length, resets):
    arrays = make_weights(), draw(STATE, seed=3), draw(time, FEATURES, seed=4)
    flags = jnp.arange(time) % 5 == 3 if resets else None
    options = {"length": jnp.asarray(6)} if length == "traced" else {"static_length": length}
    results = [
        with_gradients(ft.partial(in_chunks, resets=flags, chunk_size=size, **options), *arrays)
        for size in (CHUNK, time)
    ]
    assert_close(*results, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(None, 0, 0), (0, None, 0), (0, 0, None)])
def test_batches(axes):
    """Also of weights, as of an ensemble of models."""
    add_axis = lambda tree, axis: jax.tree.map(
        lambda v: v if axis is None else jnp.stack([v, 0.5 * v, -v]), tree
    )
    arrays = make_weights(), draw(STATE, seed=3), draw(10, FEATURES, seed=4)
    arrays = tuple(map(add_axis, arrays, axes))
    results = [
        with_gradients(jax.vmap(ft.partial(in_chunks, resets=None, chunk_size=size), axes), *arrays)
        for size in (CHUNK, 10)
    ]
    assert_close(*results, 1e-13)


def test_gradients_of_each_sequence():
    x, weights = draw(3, 10, FEATURES, seed=4), make_weights()

    def loss(weights, x):
        return in_chunks(weights, jnp.zeros(STATE), x, None, chunk_size=CHUNK)[1].sum()

    one_by_one = [jax.grad(loss)(weights, sequence) for sequence in x]
    stacked = jax.tree.map(lambda *gradients: jnp.stack(gradients), *one_by_one)
    assert_close(jax.vmap(jax.grad(loss), (None, 0))(weights, x), stacked, 1e-13)


def test_second_derivative():
    h, x = draw(STATE, seed=3), draw(10, FEATURES, seed=4)

    def curvature(x, size):
        loss = lambda x: (in_chunks(make_weights(), h, x, None, chunk_size=size)[1] ** 3).sum()
        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    assert_close(curvature(x, CHUNK), curvature(x, 10), 1e-13)


def test_heavy_weights_are_not_added_up_for_each_sequence():
    """What the backward pass holds for every sequence: weights only if they are light."""
    x = draw(3, 12, 2, seed=4)

    def tuned(weights, *args):
        a, W, shift = weights
        return run((a, W + shift.sum()), *args)

    def total(size, shift):
        weights = 0.1 * draw(STATE), draw(2, STATE, seed=2), shift

        def loss(x):
            chunked = scan_chunks_in_place(tuned, weights, jnp.zeros(STATE), (x, None), None, size)
            return chunked[1]["y"].sum()

        return jax.vmap(loss)(x).sum()

    def kept(width):
        shift = jnp.zeros(width)
        gradients = [jax.grad(ft.partial(total, size)) for size in (CHUNK, 12)]
        assert_close(*(gradient(shift) for gradient in gradients), 1e-13)
        return f"[3,{width}]" in str(jax.make_jaxpr(gradients[0])(shift))

    light = HEAVY * CHUNK * 2 - STATE - 2 * STATE
    assert kept(light) and not kept(light + 1)
