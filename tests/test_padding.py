"""Batches of sequences of unequal length, by hand and in buckets; and the sequences of a batch."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_equal

from discretax import Timeseries, bucket_by_length, map_values, pad

RNG = np.random.default_rng(0)
LENGTHS = (5, 2, 0, 3)
SEQUENCES = [RNG.normal(size=(length, 2)).astype(np.float32) for length in LENGTHS]
GAPS = [RNG.uniform(1, 2, length).astype(np.float32) for length in LENGTHS]
RESETS = [RNG.uniform(size=length) > 0.5 for length in LENGTHS]


def assert_padded(batch, time, order=range(4)):
    assert batch.values.shape == (len(order), time, 2)
    assert_equal(batch.length, np.array(LENGTHS)[list(order)])
    for row, i in zip(np.asarray(batch.values), order, strict=True):
        assert_equal(row[: LENGTHS[i]], SEQUENCES[i])
        assert not row[LENGTHS[i] :].any()


@pytest.mark.parametrize(
    "options, time",
    [({}, 5), ({"to_length": 7}, 7), ({"multiple_of": 4}, 8), ({"multiple_of": 5}, 5)],
)
def test_padded_to_one_length(options, time):
    batch = pad(SEQUENCES, **options)
    assert_padded(batch, time)
    assert batch.timesteps is None and batch.resets is None
    assert_padded(pad(map(jnp.asarray, SEQUENCES), **options), time)


def test_timesteps_and_resets_go_along():
    batch = pad(SEQUENCES, timesteps=GAPS, resets=RESETS, to_length=6)
    for i, length in enumerate(LENGTHS):
        assert_equal(batch.timesteps[i], np.append(GAPS[i], np.ones(6 - length, np.float32)))
        assert_equal(batch.resets[i], np.append(RESETS[i], np.zeros(6 - length, bool)))
    # Sequences that know of themselves, padding that stands in them included.
    assert_equal(pad(list(batch), to_length=6), batch)
    assert_equal(pad(batch, to_length=6), batch)
    assert_padded(pad(batch), 5)


def test_tokens_and_mixed_kinds():
    batch = pad([np.array([3, 1], np.uint8), np.array([2], np.uint8)])
    assert_equal((batch.values, batch.length), (np.array([[3, 1], [2, 0]]), np.array([2, 1])))
    assert batch.values.dtype == jnp.uint8
    assert pad([np.ones((1, 2), int), np.ones((1, 2), np.float32)]).values.dtype == jnp.float32
    assert pad([jnp.ones((1, 2), jnp.bfloat16)]).values.dtype == jnp.bfloat16


def test_a_multiple_of_nothing_is_one():
    assert pad([np.zeros((0, 2))], multiple_of=4).values.shape == (1, 4, 2)


def test_nothing_is_compiled_for_a_shape():
    with jax.no_tracing():
        pad(SEQUENCES, timesteps=GAPS, resets=RESETS)
        list(bucket_by_length(SEQUENCES))


def padding(ends):
    ends = np.sort(ends)
    return sum(ends[np.searchsorted(ends, length)] - length for length in SIZES)


SIZES = RNG.integers(1, 12, 40)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 20])
def test_buckets_leave_the_least_padding(num_buckets):
    sequences = [np.full((size, 1), i, np.float32) for i, size in enumerate(SIZES)]
    buckets = list(bucket_by_length(sequences, num_buckets=num_buckets))
    ends = [batch.values.shape[1] for _, batch in buckets]
    distinct = np.unique(SIZES)
    assert ends == sorted(set(ends)) and len(ends) == min(num_buckets, len(distinct))
    choices = itertools.combinations(distinct[:-1], len(ends) - 1)
    assert padding(ends) == min(padding([*choice, distinct[-1]]) for choice in choices)
    seen = [i for indices, _ in buckets for i in indices]
    assert sorted(seen) == list(range(40))
    for indices, batch in buckets:
        assert list(indices) == sorted(indices)
        assert_equal(batch.values[:, 0, 0], indices.astype(np.float32))
        assert_equal(batch.length, SIZES[indices])


def test_batches_of_buckets():
    buckets = list(bucket_by_length(SEQUENCES, batch_size=2, to_lengths=(6, 3), timesteps=GAPS))
    assert [list(indices) for indices, _ in buckets] == [[1, 2], [3], [0]]
    for indices, batch in buckets:
        assert_padded(batch, 6 if 0 in indices else 3, indices)
        assert_equal(batch.timesteps[0, : LENGTHS[indices[0]]], GAPS[indices[0]])
    full = bucket_by_length(SEQUENCES, batch_size=2, to_lengths=(6, 3), drop_last=True)
    assert [list(indices) for indices, _ in full] == [[1, 2]]


@pytest.mark.parametrize("make_key", [jr.key, jr.PRNGKey])
def test_a_key_shuffles(make_key):
    order = lambda seed: [
        list(indices)
        for indices, _ in bucket_by_length(
            SEQUENCES * 10, batch_size=3, num_buckets=2, key=make_key(seed)
        )
    ]
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(itertools.chain(*order(1))) == list(range(40))
    assert {len(indices) for indices in order(1)} <= {1, 2, 3}
    short = [max(LENGTHS[i % 4] for i in indices) < 5 for indices in order(1)]
    assert short != sorted(short) and short != sorted(short, reverse=True)  # batches are shuffled


@pytest.mark.parametrize(
    "sequences, options, error, message",
    [
        ([], {}, ValueError, "at least one sequence"),
        (np.ones((4, 2)), {}, TypeError, r"a list of arrays; got \(4, 2\).*`list\(array\)`"),
        (3, {}, TypeError, "a list of arrays; got 3"),
        (
            [np.ones((2, 3)), np.ones((2, 4))],
            {},
            ValueError,
            r"got \(2, 3\) first and \(2, 4\) at 1",
        ),
        ([np.ones(())], {}, TypeError, "sequence 0 must be an array of numbers"),
        (["ab"], {}, TypeError, "sequence 0 must be an array of numbers"),
        ([[[1.0], [2.0, 3.0]]], {}, TypeError, "sequence 0 must be an array of numbers"),
        (SEQUENCES, {"to_length": 4}, ValueError, r"the 4 samples to pad to; got 5 at 0.*\[:4\]"),
        (SEQUENCES, {"to_length": 5, "multiple_of": 5}, ValueError, "got both, 5 and 5"),
        (SEQUENCES, {"multiple_of": 0}, ValueError, "`multiple_of` must be a whole number"),
        (SEQUENCES, {"timesteps": GAPS[:3]}, ValueError, "got 3 for 4 sequences"),
        (SEQUENCES, {"timesteps": 5}, TypeError, "`timesteps` must be a list of .*; got 5"),
        ([np.array([2**40, 1])], {}, ValueError, r"must fit int32.*got 1099511627776\. Number"),
        (
            SEQUENCES,
            {"timesteps": [GAPS[1], *GAPS[1:]]},
            ValueError,
            r"`timesteps` must be one per sample; got \(2,\) for sequence 0 of 5 samples",
        ),
        (
            SEQUENCES,
            {"resets": [None, *RESETS[1:]]},
            ValueError,
            "or for none; got none for number 0",
        ),
        ([Timeseries(SEQUENCES[0])], {"resets": RESETS[:1]}, ValueError, "brings its own"),
        ([pad(SEQUENCES)], {}, ValueError, r"each sequence must be one; got a batch of 4 at 0"),
    ],
)
def test_what_cannot_be_padded(sequences, options, error, message):
    with pytest.raises(error, match=message):
        pad(sequences, **options)


def test_padding_inside_jit():
    with pytest.raises(TypeError, match=r"outside `jax.jit`"):
        jax.jit(lambda x: pad([x]).values)(jnp.ones((2, 1)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"num_buckets": 0}, "`num_buckets` must be"),
        ({"to_lengths": (2, 4)}, "the 4 samples to pad to; got 5 at 0"),
        ({"to_lengths": ()}, "`to_lengths` must hold at least one"),
        ({"drop_last": True}, "does not fill a `batch_size`"),
        ({"key": jr.split(jr.key(0))}, "single key"),
    ],
)
def test_what_is_no_bucket(options, message):
    with pytest.raises(ValueError, match=message):
        bucket_by_length(SEQUENCES, **options)


def test_lengths_are_a_list():
    with pytest.raises(TypeError, match="`to_lengths` must be a list of whole numbers; got 5"):
        bucket_by_length(SEQUENCES, to_lengths=5)


BATCH = pad(SEQUENCES, timesteps=GAPS, resets=RESETS)


def test_sequences_of_a_batch():
    rows = lambda index: jax.tree.map(lambda leaf: np.asarray(leaf)[index], BATCH)
    order = [2, 0]
    assert len(BATCH) == 4
    for index in (1, -1, np.int32(2), slice(1, 3), slice(None, None, -1)):
        assert_equal(BATCH[index], rows(index))
    for index in (order, np.array(order), jnp.array(order), np.array([[0, 1], [2, 3]])):
        assert_equal(BATCH[index], rows(np.asarray(index)))
    assert_equal(BATCH[[]], rows(np.zeros(0, int)))
    assert BATCH and BATCH[0] and Timeseries(np.ones((0, 1)))
    mask = np.array([True, False, True, False])
    assert_equal(BATCH[mask], rows(mask))
    assert_equal(list(BATCH), [rows(i) for i in range(4)])
    assert_equal(jax.jit(lambda batch, i: batch[i])(BATCH, 3), rows(3))
    two_axes = BATCH[np.array([[0, 1], [2, 3]])]
    assert_equal(two_axes[1][0], rows(2))


def test_a_batch_is_a_tree_as_before():
    assert_equal(jax.vmap(lambda x: x)(BATCH), BATCH)
    assert jax.tree.map(jnp.shape, BATCH).length == (4,)
    assert len(jax.tree.leaves(BATCH)) == 4


@pytest.mark.parametrize(
    "x, use, error, message",
    [
        (BATCH[0], len, TypeError, r"`len` is .*got one sequence, values \(5, 2\).*`x.values`"),
        (BATCH[0], list, TypeError, "iteration is .*got one sequence"),
        (BATCH[0], lambda x: x[0], TypeError, "an index is .*got one sequence"),
        (Timeseries(np.ones((2, 3, 1))), len, TypeError, "of values alone does not tell"),
        (BATCH, lambda x: x[4], IndexError, "has 4 sequences; got the index 4"),
        (BATCH, lambda x: x[np.array([0, -5])], IndexError, "has 4 sequences"),
        (BATCH, lambda x: x[0, 1], TypeError, r"one index.*got \(0, 1\)"),
        (BATCH, lambda x: x[True], TypeError, "one index.*got True"),
        (BATCH, lambda x: x[None], TypeError, "one index.*got None"),
        (BATCH, lambda x: x[1.0], TypeError, "one index.*got 1.0"),
        (BATCH, lambda x: x[np.array([True])], TypeError, r"a mask of shape \(4,\)"),
    ],
)
def test_what_is_no_sequence_of_a_batch(x, use, error, message):
    with pytest.raises(error, match=message):
        use(x)


def test_values_are_mapped():
    x = Timeseries(np.array([[1.0], [2.0], [np.nan]], np.float32), GAPS[3], 2)
    y = x.map_values(lambda values: jnp.concatenate([values, values + 1], axis=-1))
    assert_equal(y.values, np.array([[1, 2], [2, 3], [0, 1]]))
    assert_equal((y.timesteps, y.length), (x.timesteps, x.length))
    assert_equal(map_values(jnp.negative, x), x.map_values(jnp.negative))
    assert_equal(map_values(jnp.negative, x.values[:2]), np.array([[-1], [-2]]))
    with pytest.raises(ValueError, match=r"number of samples, 1; got 2"):
        x.map_values(lambda values: values[:1])
