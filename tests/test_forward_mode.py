"""Forward mode: its product is that of reverse mode, transposed; and both after one another."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import FEATURES, every_case

from discretax.ops import linear_recurrence, selective_scan

pytestmark = pytest.mark.slow


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def noise(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)


@every_case
def test_forward_is_reverse_transposed(case):
    with jax.enable_x64(True):
        mixer = case.make(jr.key(0))
        floating, static = eqx.partition(mixer, eqx.is_inexact_array)
        point = floating, jnp.asarray(np.random.default_rng(0).normal(size=(5, FEATURES)))
        along, weights = noise(point, 1), noise(point[1], 2)
        run = lambda point: eqx.combine(point[0], static)(point[1])[0]

        @jax.jit
        def products(point):
            _, dy = jax.jvp(run, (point,), (along,))
            return dot(dy, weights), dot(jax.vjp(run, point)[1](weights)[0], along)

        forward, reverse = products(point)
        np.testing.assert_allclose(forward, reverse, rtol=1e-11)


def recurrence(x, reverse=False, implementation=None):
    resets = jnp.zeros(5, bool).at[3].set(True)
    options = {"reverse": reverse, "implementation": implementation}
    return linear_recurrence(jnp.sin(x), jnp.cos(x), x[0], resets=resets, **options)


def constant(x):
    return linear_recurrence(jnp.sin(x[0]), jnp.cos(x))


def scan(x):
    return selective_scan(x, jnp.exp(x), -jnp.exp(x[:2].T), x[:, :2], x[:, :2], chunk_size=2)[0]


@pytest.mark.parametrize(
    "operation",
    [
        recurrence,
        ft.partial(recurrence, reverse=True),
        ft.partial(recurrence, implementation="associative"),
        constant,
        scan,
    ],
)
def test_hessians(operation):
    """Forward over reverse, reverse over forward, and reverse twice."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
        loss = lambda x: jnp.sum(jnp.sin(operation(x)))
        expected = jax.jit(jax.jacrev(jax.jacrev(loss)))(x)
        for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)):
            np.testing.assert_allclose(
                jax.jit(outer(inner(loss)))(x), expected, rtol=1e-9, atol=1e-11
            )
