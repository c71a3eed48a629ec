"""Values that are missing: filled and told, or dropped with longer gaps."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, leaky

from discretax import Timeseries, drop_missing, fill_missing, pad

N = np.nan
VALUES = np.array([[N, 1], [2, N], [N, N], [3, 4], [N, 5]], np.float32)
GONE = np.isnan(VALUES)


def test_the_last_value_is_filled_in():
    filled = np.array([[0, 1], [2, 1], [2, 1], [3, 4], [3, 5]])
    x = fill_missing(VALUES)
    assert isinstance(x, np.ndarray) and x.dtype == np.float32
    assert_equal(x, np.concatenate([filled, GONE], axis=1))
    assert_equal(fill_missing(VALUES[None])[0], x)


def test_zero_is_filled_in():
    assert_equal(fill_missing(VALUES, fill="zero")[:, :2], np.nan_to_num(VALUES))


def test_nothing_is_carried_over_a_reset_or_out_of_the_padding():
    resets = np.array([[False, False, True, False, True]])
    x = Timeseries(VALUES[None], np.ones((1, 5), np.float32), [4], resets)
    y = fill_missing(x)
    expected = [[0, 1, 1, 0], [2, 1, 0, 1], [0, 0, 1, 1], [3, 4, 0, 0], [0, 0, 0, 0]]
    assert_equal(y.values[0], np.array(expected))
    assert_equal((y.timesteps, y.length, y.resets), (x.timesteps, x.length, x.resets))


def test_what_is_missing_may_be_said():
    values = np.array([[7.0, 1], [2, 3]])
    missing = np.array([[False, False], [True, False]])
    assert_equal(fill_missing(values, missing), np.array([[7, 1, 0, 0], [7, 3, 1, 0]]))
    dropped = drop_missing(values, np.array([True, False]))
    assert_equal(dropped.values, np.array([[2, 3], [0, 0]]))


def test_gaps_add_up():
    values = np.array([[N], [1], [N], [N], [2], [N]], np.float32)
    x = drop_missing(values)
    assert_equal(x.values[:, 0], np.array([1, 2, 0, 0, 0, 0]))
    assert_equal((x.timesteps[:2], x.length), (np.array([2, 3]), 2))
    assert x.resets is None and x.timesteps.dtype == jnp.float32
    told = Timeseries(values, np.array([1, 2, 4, 8, 16, 32], np.float32), 5)
    assert_equal(drop_missing(told).timesteps[:2], np.array([3, 28]))


def test_small_gaps_beside_a_large_one():
    gaps = np.array([1e20, 1, 0.1, 3, 4], np.float32)
    told = Timeseries(np.zeros((5, 1), np.float32), gaps)
    assert_equal(drop_missing(told).timesteps, gaps)
    missing = np.array([False, False, False, True, False])
    assert_equal(drop_missing(told, missing).timesteps[:4], np.append(gaps[:3], np.float32(7)))


def test_a_reset_moves_on_to_the_next_sample():
    values = np.array([[1], [N], [N], [2], [N], [3]], np.float32)
    gaps = np.array([1, 2, 4, 8, 16, 32], np.float32)
    resets = np.array([False, True, True, False, False, True])
    x = drop_missing(Timeseries(values, gaps, resets=resets))
    assert_equal(x.values[:3, 0], np.array([1, 2, 3]))
    assert_equal(x.timesteps[:3], np.array([1, 12, 32]))  # 4 + 8 since the last reset
    assert_equal(x.resets, np.array([False, True, True, False, False, False]))


def test_a_batch_of_which_one_has_nothing():
    values = np.stack([np.full((3, 1), N), np.array([[1], [N], [2]])]).astype(np.float32)
    x = drop_missing(Timeseries(values, length=[3, 2]))
    assert_equal(x.length, np.array([0, 1]))
    assert_equal(x.values[..., 0], np.array([[0, 0, 0], [1, 0, 0]]))
    assert_equal(pad(x).values, np.array([[[0]], [[1]]]))


def test_dropped_samples_are_samples_of_zero_input():
    """What longer gaps mean: a state decays through them as through samples of nothing."""
    system = types.SimpleNamespace(rate=np.array([0.1, 0.7]))
    values = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    missing = np.array([True, False, True, True, False, False, True])
    x = drop_missing(values, missing)
    silent = leaky(system, np.where(missing[:, None], 0, values))
    assert_close(leaky(system, x.values[:3], x.timesteps[:3]), silent[~missing])


@pytest.mark.parametrize(
    "function, x, options, error, message",
    [
        (
            fill_missing,
            VALUES,
            {"fill": "mean"},
            ValueError,
            "`fill` must be one of 'zero', 'last'",
        ),
        (fill_missing, VALUES[:, 0], {}, ValueError, r"floating.*got float32\(5,\)"),
        (fill_missing, GONE, {}, ValueError, r"floating.*got bool\(5, 2\)"),
        (
            fill_missing,
            Timeseries(VALUES[None, ..., None], length=[2]),
            {},
            ValueError,
            r"floating, \(\*batch, time, features\); got float32\(1, 5, 2, 1\)",
        ),
        (
            fill_missing,
            VALUES,
            {"missing": GONE[:, 0]},
            ValueError,
            r"shape \(5, 2\); got bool\(5,\)",
        ),
        (fill_missing, VALUES, {"missing": 1 - GONE}, ValueError, "must be booleans.*got int"),
        (drop_missing, VALUES, {}, ValueError, r"some of them, at \(0,\).*`fill_missing` after it"),
        (drop_missing, VALUES, {"missing": GONE}, ValueError, r"per sample: shape \(5,\)"),
    ],
)
def test_what_does_not_fit(function, x, options, error, message):
    with pytest.raises(error, match=message):
        function(x, **options)


@pytest.mark.parametrize("function", [fill_missing, drop_missing])
def test_inside_jit(function):
    with pytest.raises(TypeError, match=r"outside `jax.jit`; got a traced array"):
        jax.jit(function)(VALUES)
