"""The short convolution against a loop in numpy, and its window."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, numbers

from discretax import ops

TIME, FEATURES, WIDTH = 9, 3, 4

convolve = jax.jit(ops.depthwise_convolution)


def draw(width=WIDTH):
    keys = jr.split(jr.key(0), 4)
    return (
        jr.normal(keys[0], (TIME, FEATURES)),
        jr.normal(keys[1], (FEATURES, width)),
        jr.normal(keys[2], (FEATURES,)),
        jr.normal(keys[3], (width - 1, FEATURES)),
    )


def reference(x, weight, bias, window):
    samples, filters = np.concatenate([numbers(window), numbers(x)]), numbers(weight).T
    y = [(filters * samples[t : t + len(filters)]).sum(0) for t in range(len(x))]
    return np.reshape(y, x.shape) + numbers(bias), samples[len(x) :]


@pytest.mark.parametrize("width", [1, 2, 4, 12])
def test_is_the_loop(width):
    with jax.enable_x64(True):
        arrays = draw(width)
        assert_close(convolve(*arrays), reference(*arrays), 1e-13)


def test_bias_and_window_may_be_left_out():
    x, weight, bias, window = draw()
    expected = reference(x, weight, 0 * bias, 0 * window)
    assert_close(convolve(x, weight), expected)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("cuts", [(5,), (1, 2), (4, 4, 8), range(1, TIME)], ids=str)
def test_chunks_are_the_whole(cuts, width):
    x, weight, bias, window = draw(width)
    expected = convolve(x, weight, bias, window)
    ys = []
    for start, end in itertools.pairwise((0, *cuts, TIME)):
        y, window = convolve(x[start:end], weight, bias, window)
        ys.append(y)
    assert_close((jnp.concatenate(ys), window), expected)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [0, 2, 7, TIME])
def test_padding_does_not_enter_the_window(length, width):
    x, weight, bias, window = draw(width)
    expected, expected_window = reference(x[:length], weight, bias, window)
    padded = x.at[length:].set(jnp.nan)
    resets = jnp.ones(TIME, bool).at[:length].set(False)  # those in the padding have no effect
    for options in (
        {"length": length},
        {"length": jnp.asarray(length)},
        {"length": jnp.asarray(length, jnp.uint8), "resets": resets},
    ):
        y, after = convolve(padded, weight, bias, window, **options)
        assert_close((y[:length], after), (expected, expected_window))

    loss = lambda weight, x, **options: jnp.sum(
        jnp.sin(ops.depthwise_convolution(x, weight, bias, window, **options)[0][:length])
    )
    gradient = jax.grad(loss)(weight, padded, length=length)
    assert_close(gradient, jax.grad(loss)(weight, x[:length]))


@pytest.mark.slow
@pytest.mark.parametrize("starts", [(0,), (5,), (3, 4, 7), (TIME - 1,)], ids=str)
def test_resets_are_separate_runs(starts):
    x, weight, bias, window = draw()
    resets = jnp.zeros(TIME, bool).at[jnp.array(starts)].set(True)
    actual = convolve(x, weight, bias, window, resets=resets)
    ys, after = [], window
    for start, end in itertools.pairwise(sorted({0, *starts, TIME})):
        before = jnp.zeros_like(window) if start in starts else window
        y, after = reference(x[start:end], weight, bias, before)
        ys.append(y)
    assert_close(actual, (np.concatenate(ys), after))

    broken = x.at[: starts[-1]].set(jnp.nan), weight, bias, window.at[:].set(jnp.nan)
    y, after = convolve(*broken, resets=resets)
    assert_close((y[starts[-1] :], after), (actual[0][starts[-1] :], actual[1]))


def test_bfloat16_keeps_a_wide_window():
    x, weight, bias, window = draw()
    y, after = convolve(x.astype(jnp.bfloat16), weight, bias, window)
    assert y.dtype == jnp.bfloat16
    assert after.dtype == jnp.float32
    expected, _ = reference(x.astype(jnp.bfloat16), weight, bias, window)
    assert_close(numbers(y), expected, 4e-3)  # the output's own rounding


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, jnp.ones(FEATURES), r"`x` must be \(time, features\).*jax.vmap"),
        (
            0,
            jnp.ones((TIME, FEATURES), int),
            r"`x` must be floating.*got int32\(9, 3\)\. Convert it",
        ),
        (1, jnp.ones((FEATURES, 0)), r"width at least 1; got .*weight: \(3, 0\)"),
        (1, jnp.ones((2, WIDTH)), r"`weight` must be .*= \(3, 4\); got float32\(2, 4\)"),
        (2, jnp.ones(2), r"`bias` must be .*\(features\) = \(3,\); got float32\(2,\)"),
        (3, jnp.ones((4, FEATURES)), r"`window` must be .*= \(3, 3\); got float32\(4, 3\)"),
    ],
)
def test_unfit_arguments_are_refused(index, value, message):
    arrays = list(draw())
    arrays[index] = value
    with pytest.raises(ValueError, match=message):
        ops.depthwise_convolution(*arrays)


def test_unfit_length_and_resets_are_refused():
    with pytest.raises(ValueError, match=r"between 0 and .*9; got 10"):
        ops.depthwise_convolution(*draw(), length=10)
    with pytest.raises(ValueError, match=r"booleans.*got bool\(8,\)"):
        ops.depthwise_convolution(*draw(), resets=jnp.zeros(8, bool))


def test_token_shift_is_the_convolution_that_waits():
    """Across chunks, resets and padding: the filter (1, 0)."""
    x, *_ = draw()
    waits, last = jnp.tile(jnp.array([1.0, 0.0]), (FEATURES, 1)), jnp.arange(1.0, 1 + FEATURES)
    resets = jnp.arange(TIME) == 6
    for options in ({}, {"length": 7}, {"length": 0}, {"resets": resets, "length": 8}):
        shifted, after = ops.token_shift(x, last, **options)
        expected, window = convolve(x, waits, None, last[None], **options)
        assert_close((shifted, after), (expected, window[0]))
    first, middle = ops.token_shift(x[:4])
    second, end = ops.token_shift(x[4:], middle)
    assert_close((jnp.concatenate([first, second]), end), ops.token_shift(x))


def test_token_shift_lets_no_broken_sample_pass_a_reset():
    x = draw()[0].at[3].set(jnp.nan)
    shifted, _ = ops.token_shift(x, resets=jnp.arange(TIME) == 4)
    assert_close(jnp.isfinite(shifted), jnp.ones((TIME, FEATURES), bool))


def test_token_shift_refuses_what_does_not_fit():
    x, *_ = draw()
    with pytest.raises(ValueError, match=r"`x` must be \(time, features\)"):
        ops.token_shift(x[0])
    with pytest.raises(
        ValueError, match=r"`last` must be floating, of shape \(features\) = \(3,\)"
    ):
        ops.token_shift(x, x[:, 0])
