"""The selective scan against a loop in numpy, and what it keeps in memory."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, numbers

from discretax import ops

TIME, FEATURES, STATE = 11, 3, 2
DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "dirac")

scan = jax.jit(ops.selective_scan, static_argnames=("discretization", "chunk_size"))


def draw(time=TIME, seed=0):
    keys = jr.split(jr.key(seed), 8)
    normal = lambda i, *shape: jr.normal(keys[i], shape)
    return {
        "x": normal(0, time, FEATURES),
        "dt": jnp.exp(normal(1, time, FEATURES)),
        "A": -jnp.exp(normal(2, FEATURES, STATE)),
        "B": normal(3, time, STATE),
        "C": normal(4, time, STATE),
        "D": normal(5, FEATURES),
        "h0": normal(6, FEATURES, STATE),
        "dt_A": jnp.exp(normal(7, time, FEATURES)),
    }


def loop(x, dt, A, B, C, D=0, h0=0, dt_A=None, discretization="mamba", resets=None):
    """One sample, feature and state after the other, from the equations."""
    x, dt, A, B, C = map(numbers, (x, dt, A, B, C))
    D, dt_A = np.broadcast_to(numbers(D), x.shape[1:]), dt if dt_A is None else numbers(dt_A)
    h, ys = np.broadcast_to(numbers(h0), A.shape).copy(), []
    for t in range(len(x)):
        if resets is not None and resets[t]:
            h[:] = 0
        y = D * x[t]
        for d, n in np.ndindex(A.shape):
            z, z_A = A[d, n] * dt[t, d], A[d, n] * dt_A[t, d]
            A_bar = (1 + z_A / 2) / (1 - z_A / 2) if discretization == "bilinear" else np.exp(z_A)
            gamma = {
                "mamba": dt[t, d],
                "zoh": np.expm1(z) / A[d, n],
                "bilinear": dt[t, d] / (1 - z / 2),
                "dirac": 1,
            }[discretization]
            h[d, n] = A_bar * h[d, n] + gamma * B[t, n] * x[t, d]
            y[d] += C[t, n] * h[d, n]
        ys.append(y)
    return np.reshape(ys, x.shape), h


def weighted(tree):
    leaves = jax.tree.leaves(tree)
    return sum(jnp.vdot(jnp.cos(jnp.arange(a.size, dtype=a.dtype)), a.ravel()) for a in leaves)


@pytest.mark.parametrize("events", [False, True], ids=["", "events"])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_is_the_loop(discretization, events):
    with jax.enable_x64(True):
        arrays = draw()
        if not events:
            del arrays["dt_A"]
        actual = scan(**arrays, discretization=discretization, chunk_size=4)
        assert_close(actual, loop(**arrays, discretization=discretization), 1e-13)


def test_groups_are_scans_side_by_side():
    """Of features 0 to 2 and 3 to 5, each with `B` and `C` of their own."""
    groups = [draw(seed=seed) for seed in range(2)]
    options = {"length": 9, "resets": jnp.arange(TIME) == 4, "chunk_size": 4}

    def together(name):
        join = jnp.stack if name in ("B", "C") else jnp.concatenate
        return ft.partial(join, axis=0 if name in ("A", "D", "h0") else 1)

    def grouped(groups):
        arrays = {name: together(name)([group[name] for group in groups]) for name in groups[0]}
        return ops.selective_scan(**arrays, **options)

    def apart(groups):
        ys, hs = zip(*(ops.selective_scan(**group, **options) for group in groups), strict=True)
        return jnp.concatenate(ys, axis=1), jnp.concatenate(hs)

    def with_gradients(run):
        return jax.jit(
            lambda groups: (run(groups), jax.grad(lambda groups: weighted(run(groups)))(groups))
        )(groups)

    assert_close(with_gradients(grouped), with_gradients(apart))


def test_skip_and_initial_state_may_be_left_out():
    arrays = {name: value for name, value in draw().items() if name not in ("D", "h0", "dt_A")}
    assert_close(scan(**arrays), loop(**arrays))


@pytest.mark.slow
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_gradients_are_finite_differences(discretization):
    """To first and, by differentiating a gradient in reverse, to second order."""
    with jax.enable_x64(True):
        point, direction = draw(5), draw(5, seed=1)
        run = ft.partial(scan, discretization=discretization, chunk_size=2)
        loss = jax.jit(lambda arrays: jnp.sum(jnp.tanh(weighted(run(**arrays)))))
        gradient = jax.jit(jax.grad(loss))
        dot = lambda a, b: sum(jnp.vdot(a[name], b[name]) for name in a)
        eps = 1e-5
        moved = [
            {name: value + s * eps * direction[name] for name, value in point.items()}
            for s in (1, -1)
        ]
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * eps)
        np.testing.assert_allclose(dot(gradient(point), direction), slope, rtol=1e-7)
        product = jax.jit(jax.grad(lambda arrays: dot(gradient(arrays), direction)))(point)
        ahead, behind = map(gradient, moved)
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), ahead, behind)
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(difference))
        for actual, expected in zip(*map(jax.tree.leaves, (product, difference)), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 3, TIME, 100])
def test_chunk_size_changes_nothing(chunk_size):
    with jax.enable_x64(True):
        arrays = draw()
        resets = jnp.arange(TIME) == 4
        run = lambda size: jax.jit(
            jax.value_and_grad(
                lambda arrays: weighted(
                    scan(**arrays, length=jnp.asarray(9), resets=resets, chunk_size=size)
                )
            )
        )(arrays)
        assert_close(run(chunk_size), run(5), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 7, TIME])
def test_length_ends_the_sequence(length):
    arrays = draw()
    valid = {k: v if k in ("A", "D", "h0") else v[:length] for k, v in arrays.items()}
    padded = {
        k: v if k in ("A", "D", "h0") else v.at[length:].set(jnp.nan) for k, v in arrays.items()
    }
    resets = jnp.ones(TIME, bool).at[:length].set(False)  # those in the padding have no effect
    run = ft.partial(scan, discretization="dirac", chunk_size=4)
    y, h = run(**padded, length=jnp.asarray(length, jnp.uint8), resets=resets)
    y_valid, h_valid = loop(**valid, discretization="dirac")
    assert_close((y[:length], h), (y_valid, h_valid))
    assert_close(scan(**padded, length=length)[1], loop(**valid)[1])

    loss = lambda A, **options: weighted(run(**{**padded, "A": A}, **options)[0][:length])
    gradient = jax.grad(loss)(arrays["A"], length=length)
    expected = jax.grad(lambda A: weighted(run(**{**valid, "A": A})[0]))(arrays["A"])
    assert_close(gradient, expected)


def test_resets_begin_anew_and_stop_a_nan():
    arrays = draw()
    resets = jnp.zeros(TIME, bool).at[jnp.array([3, 4, 9])].set(True)
    actual = scan(**arrays, resets=resets, chunk_size=4)
    assert_close(actual, loop(**arrays, resets=resets))
    arrays["x"] = arrays["x"].at[2, 1].set(jnp.nan)
    y, h = scan(**arrays, resets=resets, chunk_size=4)
    assert jnp.isnan(y[2]).any()
    assert_close((y[3:], h), (actual[0][3:], actual[1]))


def test_vmap_is_a_loop():
    batch = [draw(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    batched = jax.jit(jax.vmap(lambda arrays: scan(**arrays)))(stacked)
    for i, arrays in enumerate(batch):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), scan(**arrays))


def test_no_samples():
    arrays = draw(0)
    y, h = scan(**arrays)
    assert y.shape == (0, FEATURES)
    np.testing.assert_array_equal(h, arrays["h0"])


def test_bfloat16_accumulates_in_float32():
    """400 samples of one and no decay add up; bfloat16 itself would stop at 256."""
    ones = jnp.ones((400, 1), jnp.bfloat16)
    A = jnp.zeros((1, 1), jnp.bfloat16)
    y, h = ops.selective_scan(ones, ones, A, ones, ones)
    assert y.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert h == 400


def test_memory_holds_no_states():
    """Forward and backward, in less than a quarter of what the states alone would fill."""
    time, features, state = 2048, 32, 32
    shapes = ((time, features),) * 2 + ((features, state),) + ((time, state),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.jit(jax.grad(lambda *a: ops.selective_scan(*a)[0].sum(), argnums=range(5)))
    used = gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * time * features * state / 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", jnp.ones((2, TIME, FEATURES)), r"`x` must be \(time, features\).*jax.vmap"),
        ("A", jnp.ones(FEATURES), r"`A` \(features, state\); got .*A: \(3,\)"),
        (
            "dt",
            jnp.ones(TIME),
            r"`dt` must be .*\(time, features\) = \(11, 3\); got float32\(11,\)",
        ),
        ("dt_A", jnp.ones((TIME, 1)), r"`dt_A` must be .* = \(11, 3\); got float32\(11, 1\)"),
        ("B", jnp.ones((TIME, 3)), r"`B` must be .*\(time, state\) = \(11, 2\); got .*\(11, 3\)"),
        ("B", jnp.ones((TIME, 2, 2)), r"multiple of the number of groups; got 3 .*, 2 groups"),
        ("B", jnp.ones((TIME, 3, 2)), r"`C` must be .*\(time, groups, state\) = \(11, 3, 2\); got"),
        ("C", jnp.ones((TIME, 2), int), r"`C` must be floating.*got int32\(11, 2\)"),
        ("D", jnp.ones(2), r"`D` must be .*\(features\) = \(3,\); got float32\(2,\)"),
        ("h0", jnp.ones((2, 3)), r"`h0` must be .*\(features, state\) = \(3, 2\); got .*\(2, 3\)"),
        ("discretization", "euler", "must be one of 'mamba', 'zoh', .*got 'euler'"),
        ("chunk_size", 0, "`chunk_size` must be .* at least 1; got 0"),
        ("length", 12, "between 0 and .*11; got 12"),
        ("resets", jnp.zeros(TIME), r"`resets` must be booleans.*got float32\(11,\)"),
    ],
)
def test_unfit_arguments_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**{**draw(), name: value})
