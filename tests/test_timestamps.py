"""From points in time to gaps."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal

from discretax import Timeseries

TIMES = np.array([10.0, 10.5, 12.0, 12.0, 13.0])
VALUES = np.zeros((5, 2), np.float32)
MINUTES = np.array(["2026-01-01T00:00", "2026-01-01T00:10", "2026-01-01T01:00"], "M8[m]")


def gaps(times, interval=0.5, values=None, **options):
    values = np.zeros((*np.shape(times), 2), np.float32) if values is None else values
    return Timeseries.from_timestamps(values, times, interval=interval, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gaps_in_intervals(dtype):
    series = gaps(TIMES.astype(dtype))
    assert_equal(series.timesteps, np.array([1, 1, 3, 0, 2]))
    assert series.timesteps.dtype == jnp.float32
    assert series.length is None and series.resets is None
    assert_equal(series.values, VALUES)


def test_whole_numbers_of_few_bits():
    assert_equal(gaps(np.array([0, 200], np.uint8), 1).timesteps, np.array([1, 200]))
    assert_equal(gaps(np.array([-100, 100], np.int8), 1).timesteps, np.array([1, 200]))
    assert_equal(gaps([3, 4, 9], 1).timesteps, np.array([1, 1, 5]))


def test_dates():
    ten = datetime.timedelta(minutes=10)
    for interval in (np.timedelta64(10, "m"), np.timedelta64(600, "s"), ten):
        assert_equal(gaps(MINUTES, interval).timesteps, np.array([1, 1, 5]))
    assert_equal(gaps(MINUTES - MINUTES[0], ten).timesteps, np.array([1, 1, 5]))


def test_more_digits_than_float32_has():
    """Seconds since 1970, a millisecond apart: float32 tells them apart by two minutes."""
    times = 1.7e9 + np.array([0, 0.001, 0.003])
    np.testing.assert_allclose(gaps(times, 0.001).timesteps, [1, 1, 2], rtol=1e-3)


def test_each_sequence_begins_with_one():
    """In a batch, after a reset, where time may go back, and in padding, where anything stands."""
    times = np.array([[0, 1, 3, 2, 7], [5, 9, 0, 0, np.nan]])
    resets = np.zeros((2, 5), bool)
    resets[0, 3] = True
    series = gaps(times, 1, length=[5, 2], resets=resets)
    assert_equal(series.timesteps, np.array([[1, 1, 2, 1, 5], [1, 4, 1, 1, 1]]))
    assert_equal((series.length, series.resets), (np.array([5, 2]), resets))
    dates = np.stack([MINUTES, np.array([MINUTES[0], "NaT", "NaT"], "M8[m]")])
    series = gaps(dates, np.timedelta64(10, "m"), length=np.array([3, 1]))
    assert_equal(series.timesteps, np.array([[1, 1, 5], [1, 1, 1]]))


def test_what_came_before():
    """Of a stream in chunks, the gaps of the whole."""
    whole = gaps(TIMES).timesteps
    chunks = gaps(TIMES[:2]), gaps(TIMES[2:], previous=TIMES[1])
    assert_equal(np.concatenate([chunk.timesteps for chunk in chunks]), whole)
    assert_equal(gaps([2, 3], 1, previous=-1).timesteps, np.array([3, 1]))
    two = np.array([[2, 3], [4, 9]])
    resets = np.array([[False, False], [True, False]])
    assert_equal(gaps(two, 1, previous=[0, 3]).timesteps, np.array([[2, 1], [1, 5]]))
    assert_equal(gaps(two, 1, previous=0, resets=resets).timesteps, np.array([[2, 1], [1, 5]]))
    series = gaps(MINUTES[1:], np.timedelta64(5, "m"), previous=MINUTES[0])
    assert_equal(series.timesteps, np.array([2, 10]))


@pytest.mark.parametrize(
    "times, options, error, message",
    [
        (TIMES[::-1], {}, ValueError, r"in order.*got 13\.0, then 12\.0 at \(1,\).*Sort"),
        ([[0.0, 1.0], [1.0, 0.0]], {}, ValueError, r"got 1\.0, then 0\.0 at \(1, 1\)"),
        ([0.0, np.nan], {}, ValueError, r"finite and not NaT.*got nan at \(1,\)"),
        ([0.0, np.inf], {}, ValueError, r"got inf at \(1,\)"),
        (np.array(["NaT"], "M8[s]"), {"interval": np.timedelta64(1, "s")}, ValueError, "got NaT"),
        (TIMES[:4], {"values": VALUES}, ValueError, r"got \(4,\) for values \(5, 2\)"),
        (
            TIMES[:, None],
            {"values": VALUES},
            ValueError,
            r"got \(5, 1\).*`timestamps\[\.\.\., 0\]`",
        ),
        (1.0, {"values": VALUES}, ValueError, r"got \(\) for values \(5, 2\)"),
        (TIMES, {"length": [5]}, ValueError, r"resets \(5,\), length \(1,\)"),
        (TIMES, {"resets": np.zeros(4, bool)}, ValueError, r"resets \(4,\), length \(\)"),
        (TIMES, {"interval": 0}, ValueError, "positive and finite; got 0"),
        (TIMES, {"interval": np.nan}, ValueError, "positive and finite; got nan"),
        (MINUTES, {"interval": np.timedelta64("NaT")}, ValueError, "positive and finite; got"),
        (TIMES, {"interval": np.ones(5)}, TypeError, "must be a number for timestamps of float64"),
        (TIMES, {"interval": np.timedelta64(1, "s")}, TypeError, "must be a number"),
        (TIMES, {"interval": None}, TypeError, "must be a number .*; got None"),
        (TIMES, {"interval": "2"}, TypeError, "must be a number .*; got '2'"),
        (TIMES, {"interval": True}, TypeError, "must be a number .*; got True"),
        (MINUTES, {"interval": np.timedelta64(1, "M")}, TypeError, "no fixed length .*1,'M'"),
        (
            np.array(["1700", "2200"], "M8[ns]"),
            {"interval": np.timedelta64(1, "D")},
            ValueError,
            r"must fit 64 bits; got 1700.*, then 2200.* at \(1,\)",
        ),
        (np.array([2**63 - 1, -(2**63)]), {}, ValueError, "must fit 64 bits"),
        (MINUTES, {"interval": 1}, TypeError, r"`numpy.timedelta64`.*datetime64\[m\]; got 1"),
        (TIMES, {"previous": 11.0}, ValueError, r"got 11\.0, then 10\.0 at \(0,\)"),
        (TIMES, {"previous": np.nan}, ValueError, "`previous` must be.*and finite; got nan"),
        (TIMES, {"previous": MINUTES[0]}, ValueError, "as the timestamps are, float64"),
        (TIMES, {"previous": [1.0]}, ValueError, r"of shape \(\); got \(1,\)"),
        (["2026-01-01"], {}, TypeError, r"numbers or NumPy's datetimes.*`np.asarray\("),
        ([datetime.datetime(2026, 1, 1)], {}, TypeError, "got an array of object"),
        (np.zeros(2, bool), {}, TypeError, r"array of bool.*`timestamps\.astype\(float\)`"),
        (np.zeros(2, jnp.bfloat16), {}, TypeError, r"of bfloat16.*`timestamps\.astype\(float\)`"),
    ],
)
def test_what_is_no_time(times, options, error, message):
    with pytest.raises(error, match=message):
        gaps(times, **options)


def test_inside_jit():
    with pytest.raises(TypeError, match=r"before `jax.jit`; got a traced array"):
        jax.jit(lambda times: gaps(times).timesteps)(jnp.asarray(TIMES))


def test_the_interval_is_not_guessed():
    with pytest.raises(TypeError, match="interval"):
        Timeseries.from_timestamps(VALUES, TIMES)
