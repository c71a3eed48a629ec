import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    TIME,
    assert_close,
    assert_equal,
    changed,
    draw,
    linear,
    log_softmax,
    nan_padded,
    numbers,
    pool,
)

import discretax
from discretax import Timeseries
from discretax.heads import ClassificationHead, Pooling, RegressionHead

POOLINGS = ("mean", "last", "max")
HEADS = {"classification": ClassificationHead, "regression": RegressionHead}
FINAL = {"classification": log_softmax, "regression": lambda y: y}

every_head = pytest.mark.parametrize("kind", HEADS)
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def make(kind, **options):
    return eqx.nn.make_with_state(HEADS[kind])(FEATURES, 3, jr.key(0), **options)


def formula(kind, head, pooled):
    return FINAL[kind](linear(head.pooled_linear.linear, pooled))


def negative():
    # A zero from the padding or from an empty cache would win every maximum.
    return -1 - jnp.abs(draw(TIME, FEATURES))


@eqx.filter_jit
def run(head, state, x):
    return head(x, state)


@eqx.filter_jit
def gradients(head, state, x):
    """Of a weighted sum of the outputs, with respect to the head and to the samples."""

    def loss(head, x):
        y, _ = head(x, state)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)))

    return eqx.filter_grad(lambda both: loss(*both))((head, x))


@every_head
@every_pooling
@pytest.mark.parametrize("length", [None, 0, 1, 5, TIME])
def test_pooling_sees_the_valid_samples(kind, pooling, length):
    head, state = make(kind, pooling=pooling)
    x = negative()
    y, _ = run(head, state, x if length is None else nan_padded(x, length))
    assert_close(y, formula(kind, head, pool(pooling, numbers(x[:length]))))


@pytest.mark.slow
@every_head
@every_pooling
def test_float64(kind, pooling):
    head, state = make(kind, pooling=pooling)
    with jax.enable_x64(True):
        head = changed(head, dtype=jnp.float64)
        x = negative()
        y, _ = head(nan_padded(x, 7), state)
        assert_close(y, formula(kind, head, pool(pooling, numbers(x[:7]))), rtol=1e-12)


@pytest.mark.slow
@every_head
@every_pooling
@pytest.mark.parametrize("length", [0, 5])
def test_gradients_with_nan_padding_are_those_of_the_truncated_sequence(kind, pooling, length):
    head, state = make(kind, pooling=pooling)
    x = negative()
    head_grad, x_grad = gradients(head, state, nan_padded(x, length))
    truncated_head_grad, truncated_x_grad = gradients(head, state, x[:length])
    assert_close(head_grad, truncated_head_grad)
    assert_close(x_grad.values[:length], truncated_x_grad)
    assert not np.any(x_grad.values[length:])  # False for a NaN, too


@every_head
def test_without_reduction_one_answer_per_time_step(kind):
    head, state = make(kind, reduce=False)
    x = negative()
    y, _ = run(head, state, x)
    assert_close(y, formula(kind, head, x))
    padded, _ = run(head, state, nan_padded(x, 5))
    assert_close(padded[:5], formula(kind, head, x[:5]))
    assert np.isfinite(padded).all()


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_log_probabilities_sum_to_one(reduce, scale):
    head, state = make("classification", reduce=reduce)
    y, _ = head(scale * negative(), state)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(np.exp(numbers(y)).sum(-1), 1, rtol=1e-6)
    assert (numbers(y) <= 0).all()


@pytest.mark.slow
@every_head
@every_pooling
def test_bfloat16(kind, pooling):
    head, state = make(kind, pooling=pooling)
    x = negative().astype(jnp.bfloat16)
    y, _ = head(x, state)
    # Log-probabilities feed a loss, and are as wide as losses are.
    assert y.dtype == (jnp.float32 if kind == "classification" else jnp.bfloat16)
    assert_close(y.astype(jnp.float32), formula(kind, head, pool(pooling, numbers(x))), rtol=2e-2)


def test_mean_accumulates_bfloat16_in_float32():
    pooling, state = eqx.nn.make_with_state(Pooling)(FEATURES, "mean")
    y, _ = pooling(jnp.full((1000, FEATURES), 1.5, jnp.bfloat16), state)
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.5)  # bfloat16 would stop at 512


def test_mean_of_a_long_stream_with_narrow_caches():
    pooling, state = eqx.nn.make_with_state(Pooling)(FEATURES, "mean")
    live = discretax.streaming_mode(eqx.nn.inference_mode(pooling))
    state = discretax.inference_state(pooling, state, dtype=jnp.bfloat16)

    @jax.jit
    def go(state):
        step = lambda state, _: live(jnp.full((1, FEATURES), 1.5), state)[::-1]
        return jax.lax.scan(step, state, length=1000)[1]

    np.testing.assert_allclose(go(state), 1.5, rtol=1e-6)  # a sum in bfloat16 stops at 512


@ft.cache
def two_streams():
    """Their state, and a function that sends each of them chunks that are alike."""
    pooling, state = eqx.nn.make_with_state(Pooling)(1, "mean")
    live = discretax.streaming_mode(eqx.nn.inference_mode(pooling))

    @ft.partial(jax.jit, static_argnums=2)
    def send(state, value, size, lengths, times):
        chunks = Timeseries(jnp.full((2, size, 1), value), length=jnp.stack(lengths))
        step = lambda _, carry: jax.vmap(live)(chunks, carry[1])
        mean, state = jax.lax.fori_loop(0, times, step, (jnp.zeros((2, 1)), state))
        return mean[:, 0], state

    return send, discretax.inference_state(pooling, state, batch_size=2)


@pytest.mark.parametrize("size", [1, 64])
def test_mean_of_a_stream_longer_than_a_float32_counts(size):
    send, state = two_streams()
    _, state = send(state, 1.0, 2**18, (2**18, 0), 64)  # in float32, 2**24 + 1 is 2**24
    mean, state = send(state, 1.0, size, (size, 1), 2**12)
    np.testing.assert_array_equal(mean, 1)
    mean, _ = send(state, -0.1, size, (size, 1), 2**12)
    ones, others = np.array([2**24 + 2**12 * size, 2**12]), np.array([2**12 * size, 2**12])
    np.testing.assert_allclose(mean, (ones - 0.1 * others) / (ones + others), rtol=1e-6)


def test_mean_of_a_stream_longer_than_an_int32_counts():
    send, state = two_streams()
    _, state = send(state, 1.0, 2**18, (2**18, 2**18), 2**13)
    mean, _ = send(state, 0.0, 2**18, (2**18, 2**17), 2**13)
    np.testing.assert_allclose(mean, (1 / 2, 2 / 3), rtol=2e-7)


@every_pooling
def test_a_batched_cache_without_vmap(pooling):
    layer, state = eqx.nn.make_with_state(Pooling)(FEATURES, pooling)
    live = discretax.streaming_mode(eqx.nn.inference_mode(layer))
    with pytest.raises(ValueError, match=r"`Pooling` takes a cache .* got \(8, .*`jax\.vmap`"):
        live(negative(), discretax.inference_state(layer, state, batch_size=8))


def test_infinite_samples_have_an_infinite_mean():
    layer, state = eqx.nn.make_with_state(Pooling)(1, "mean")
    live = discretax.streaming_mode(eqx.nn.inference_mode(layer))
    state = discretax.inference_state(layer, state)
    for value in (1.0, jnp.inf, 2.0):
        mean, state = live(jnp.full((3, 1), value), state)
    np.testing.assert_array_equal(mean, jnp.inf)
    fresh = Timeseries(jnp.ones((3, 1)), resets=jnp.array([True, False, False]))
    np.testing.assert_array_equal(live(fresh, state)[0], 1)


@every_pooling
@pytest.mark.parametrize("cuts", [(1, 2, 6), (10,), tuple(range(1, TIME))], ids=str)
def test_streamed_in_chunks(pooling, cuts):
    head, state = make("regression", pooling=pooling)
    live = discretax.streaming_mode(eqx.nn.inference_mode(head))
    state = discretax.inference_state(head, state)
    x = negative()
    for start, end in zip((0, *cuts), (*cuts, TIME), strict=True):
        y, state = run(live, state, x[start:end])
        assert_close(y, formula("regression", head, pool(pooling, numbers(x[:end]))))


@every_pooling
@pytest.mark.parametrize("lengths", [(4, 0, 3, 1, 3), (0, 0, 2, 4, 0, 4, 1), (0, 1, 0, 0)], ids=str)
def test_streamed_in_padded_chunks(pooling, lengths):
    head, state = make("regression", pooling=pooling)
    live = discretax.streaming_mode(eqx.nn.inference_mode(head))
    state = discretax.inference_state(head, state)
    x, so_far = negative(), 0
    for length in lengths:
        chunk = jnp.concatenate([x[so_far:], jnp.zeros((4, FEATURES))])[:4]
        y, state = run(live, state, nan_padded(chunk, length))
        so_far += length
        assert_close(y, formula("regression", head, pool(pooling, numbers(x[:so_far]))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resets", "length", "start"),
    [((0,), TIME, 0), ((3, 7), TIME, 7), ((3, 9), 8, 3), ((TIME - 1,), TIME, TIME - 1)],
    ids=str,
)
@every_pooling
def test_a_reset_begins_anew(pooling, resets, length, start):
    layer, state = eqx.nn.make_with_state(Pooling)(FEATURES, pooling)
    x = negative()
    flags = jnp.zeros(TIME, bool).at[jnp.array(resets)].set(True)
    expected = pool(pooling, numbers(x)[start:length])
    assert_close(layer(Timeseries(x, length=length, resets=flags), state)[0], expected)

    live = discretax.streaming_mode(eqx.nn.inference_mode(layer))
    carried = discretax.inference_state(layer, state)
    for begin, end in ((0, 4), (4, 6), (6, TIME)):
        left = min(max(length - begin, 0), end - begin)
        chunk = Timeseries(x[begin:end], length=left, resets=flags[begin:end])
        answer, carried = live(chunk, carried)
    assert_close(answer, expected)


@pytest.mark.slow
@every_pooling
def test_an_empty_chunk_changes_nothing(pooling):
    head, state = make("regression", pooling=pooling)
    live = discretax.streaming_mode(eqx.nn.inference_mode(head))
    x = negative()
    y, state = live(x, discretax.inference_state(head, state))
    cache = jax.tree.leaves(state)
    y_again, state = live(x[:0], state)
    assert_equal((y_again, jax.tree.leaves(state)), (y, cache))


@pytest.mark.slow
@every_head
def test_per_step_answers_stream_without_a_cache(kind):
    head, state = make(kind, reduce=False)
    live = discretax.streaming_mode(eqx.nn.inference_mode(head))
    state = discretax.inference_state(head, state)
    x = negative()
    ys = [live(chunk, state)[0] for chunk in jnp.split(x, (1, 6))]
    assert_close(jnp.concatenate(ys), formula(kind, head, x))


@every_head
def test_key_by_position_or_by_name(kind):
    by_position = HEADS[kind](FEATURES, 3, jr.key(3))
    by_name = HEADS[kind](in_features=FEATURES, out_features=3, key=jr.key(3))
    is_array = lambda head: eqx.filter(head, eqx.is_array)
    assert_equal(is_array(by_position), is_array(by_name))


@every_head
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pooling": "sum"}, ValueError, "`pooling` must be 'mean', 'last' or 'max'; got 'sum'"),
        ({"reduce": False, "pooling": "max"}, ValueError, "reduce=False.*pooling='max'.*Leave one"),
        ({"in_features": 0}, ValueError, "`in_features` must be a whole number .* got 0"),
        ({"out_features": 2.5}, ValueError, "`out_features` must be a whole number .* got 2.5"),
        ({"reduction": True}, TypeError, "reduction"),
    ],
)
def test_options_that_are_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        HEADS[kind](**{"in_features": FEATURES, "out_features": 3, "key": jr.key(0)} | options)


@every_head
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize(
    "x, received",
    [
        (jnp.zeros(FEATURES), r"got \(4,\)\. .*`x\[None\]`"),
        (jnp.zeros((2, TIME, FEATURES)), r"got \(2, 11, 4\). Use `jax.vmap`"),
        (jnp.zeros((TIME, 3)), r"size 4; got float32\(11, 3\)"),
        (
            Timeseries(jnp.zeros((TIME, FEATURES), jnp.int32), length=2),
            r"got int32.*`\.astype\(float\)`",
        ),
    ],
)
def test_samples_that_are_refused(kind, reduce, x, received):
    head, state = make(kind, reduce=reduce)
    with pytest.raises(ValueError, match=f"`{type(head).__name__}` takes .*{received}"):
        head(x, state)


def test_unknown_kind_of_pooling():
    with pytest.raises(ValueError, match="'mean', 'last' or 'max'; got 'median'"):
        Pooling(FEATURES, "median")
