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
    nan_padded,
    numbers,
)

from discretax import Timeseries
from discretax.encoder import EmbeddingEncoder, LinearEncoder

TOKENS = jnp.array([2, 0, 6, 6, 1, 2, 5])
CLASSES = 7


def make_linear(use_bias=False):
    return changed(LinearEncoder(FEATURES, jr.key(0), out_features=3, use_bias=use_bias))


def make_embedding(num_classes=CLASSES):
    return EmbeddingEncoder(jr.key(0), num_classes=num_classes, out_features=3)


def make_state(encoder):
    return eqx.nn.State(encoder)


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_is_a_matrix_product_at_each_step(use_bias):
    encoder = make_linear(use_bias)
    x = draw(TIME, FEATURES)
    y, _ = encoder(x, make_state(encoder))
    assert_close(y, linear(encoder.linear, x))
    assert (encoder.linear.bias is not None) == use_bias


def test_linear_in_float64():
    encoder = make_linear(use_bias=True)
    with jax.enable_x64(True):
        encoder = changed(encoder, dtype=jnp.float64)
        x = draw(TIME, FEATURES)
        assert_close(encoder(x, make_state(encoder))[0], linear(encoder.linear, x), rtol=1e-12)


def test_linear_keeps_bfloat16():
    encoder = make_linear(use_bias=True)
    x = draw(TIME, FEATURES).astype(jnp.bfloat16)
    y, _ = encoder(x, make_state(encoder))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), linear(encoder.linear, x), rtol=2e-2)


def test_linear_of_nan_padding():
    encoder = make_linear(use_bias=True)
    x, length = draw(TIME, FEATURES), 5

    @jax.value_and_grad
    def loss(encoder, x):
        y, _ = encoder(x, make_state(encoder))
        values = y.values[:length] if isinstance(y, Timeseries) else y
        return jnp.sum(jnp.sin(values))

    y, _ = encoder(nan_padded(x, length), make_state(encoder))
    assert_close(y.values[:length], linear(encoder.linear, x[:length]))
    assert np.isfinite(y.values).all()
    assert_close(loss(encoder, nan_padded(x, length)), loss(encoder, x[:length]))


def test_linear_passes_the_rest_of_a_timeseries_on():
    encoder = make_linear()
    x = Timeseries(
        draw(3, FEATURES),
        timesteps=jnp.array([1.0, 2.5, 0.5]),
        length=2,
        resets=jnp.array([False, True, False]),
    )
    y, _ = encoder(x, make_state(encoder))
    assert isinstance(y, Timeseries)
    assert_equal((y.timesteps, y.length, y.resets), (x.timesteps, x.length, x.resets))


@pytest.mark.parametrize(
    "make, x", [(make_linear, jnp.ones((2, FEATURES))), (make_embedding, TOKENS)]
)
def test_state_and_key_are_without_effect(make, x):
    encoder = make()
    state = make_state(encoder)
    y, new_state = encoder(x, state)
    assert new_state is state
    assert_equal(encoder(x, state, key=jr.key(3))[0], y)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "dtype, num_classes",
    [
        (jnp.int32, CLASSES),
        (jnp.uint8, CLASSES),
        (jnp.uint8, 256),
        (jnp.uint8, 300),
        (jnp.int8, CLASSES),
        (jnp.int8, 200),
        (jnp.int16, 40_000),
        (jnp.uint32, CLASSES),
    ],
)
def test_embedding_looks_up_rows_by_tokens_of_any_type(dtype, num_classes, jit):
    encoder = make_embedding(num_classes)
    tokens = TOKENS.astype(dtype)
    run = lambda x: encoder(x, make_state(encoder))[0]
    y = (jax.jit(run) if jit else run)(tokens)
    assert_equal(y, np.asarray(encoder.embedding.weight)[np.asarray(TOKENS)])


def test_gradient_of_an_embedding_is_a_sum_over_the_token_s_places():
    encoder = make_embedding()
    cotangent = draw(len(TOKENS), 3)

    def loss(encoder, x):
        y, _ = encoder(x, make_state(encoder))
        return jnp.vdot(y.values[:4], cotangent[:4])

    padded = jnp.where(jnp.arange(len(TOKENS)) < 4, TOKENS, -1)
    grad = eqx.filter_grad(loss)(encoder, Timeseries(padded, length=4)).embedding.weight
    expected = np.zeros((CLASSES, 3))
    np.add.at(expected, np.asarray(TOKENS[:4]), numbers(cotangent[:4]))
    assert_close(grad, expected)
    assert not np.any(numbers(grad)[5])  # a token of the padding only


@pytest.mark.parametrize("padding", [-1, 10_000])
def test_padding_tokens_may_be_anything(padding):
    encoder = make_embedding()
    tokens = TOKENS.at[3:].set(padding)
    y, _ = encoder(Timeseries(tokens, length=3), make_state(encoder))
    assert_equal(y.values[:3], encoder.embedding.weight[TOKENS[:3]])
    assert np.isfinite(y.values).all()


@pytest.mark.parametrize("token, seen", [(-1, "-1 to 6"), (CLASSES, "0 to 7")])
def test_token_out_of_range(token, seen):
    encoder = make_embedding()
    tokens = TOKENS.at[4].set(token)
    with pytest.raises(ValueError, match=rf"in \[0, 7\); got values from {seen}.*`num_classes`"):
        encoder(tokens, make_state(encoder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "token, dtype",
    [
        (-1, jnp.int32),
        (-CLASSES, jnp.int8),
        (CLASSES, jnp.int32),
        (CLASSES, jnp.uint8),
        (2**32 - 1, jnp.uint32),  # a -1 that went through an unsigned type
    ],
)
def test_token_out_of_range_under_jit_is_nan(token, dtype):
    encoder = make_embedding()
    tokens = TOKENS.astype(dtype).at[4].set(jnp.asarray(token, dtype))
    y = jax.jit(lambda x: encoder(x, make_state(encoder))[0])(tokens)
    expected = np.array(encoder.embedding.weight)[np.asarray(TOKENS)]
    expected[4] = np.nan
    assert_equal(y, expected)


def test_key_by_position_or_by_name():
    key = jr.key(3)
    assert_equal(
        LinearEncoder(FEATURES, key, out_features=3),
        LinearEncoder(in_features=FEATURES, out_features=3, key=key),
    )
    assert_equal(
        EmbeddingEncoder(key, num_classes=3, out_features=2),
        EmbeddingEncoder(num_classes=3, out_features=2, key=key),
    )


@pytest.mark.parametrize(
    "x, message",
    [
        (jnp.zeros(FEATURES), r"\(time, 4\); got \(4,\)\. .*`x\[None\]`"),
        (jnp.zeros((2, TIME, FEATURES)), r"\(time, 4\); got \(2, 11, 4\). Use `jax.vmap`"),
        (jnp.zeros((TIME, 3)), r"last axis has size 4; got float32\(11, 3\)"),
        (
            jnp.zeros((TIME, FEATURES), jnp.int32),
            r"floating .* got int32\(11, 4\)\. Convert it: `\.astype\(float\)`",
        ),
    ],
)
def test_samples_that_linear_refuses(x, message):
    encoder = make_linear()
    with pytest.raises(ValueError, match=f"`LinearEncoder` takes .*{message}"):
        encoder(x, make_state(encoder))


@pytest.mark.parametrize(
    "x, received",
    [
        (jnp.zeros((TIME, CLASSES)), r"float32\(11, 7\)"),
        (jnp.zeros(TIME), r"float32\(11,\).*Convert it: `\.astype\(int\)`"),
        (jnp.zeros((2, TIME), jnp.int32), r"int32\(2, 11\). Use `jax.vmap`"),
    ],
)
def test_samples_that_embedding_refuses(x, received):
    encoder = make_embedding()
    with pytest.raises(ValueError, match=rf"whole numbers, \(time,\); got {received}"):
        encoder(x, make_state(encoder))


@pytest.mark.parametrize("size", [0, -2, 3.0, True])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda n: LinearEncoder(n, jr.key(0), out_features=3), "in_features"),
        (lambda n: LinearEncoder(3, jr.key(0), out_features=n), "out_features"),
        (lambda n: EmbeddingEncoder(jr.key(0), num_classes=n, out_features=3), "num_classes"),
        (lambda n: EmbeddingEncoder(jr.key(0), num_classes=3, out_features=n), "out_features"),
    ],
)
def test_sizes_are_whole_numbers_from_one(make, name, size):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number .* got {size}"):
        make(size)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearEncoder(3, jr.key(0), out_features=3, bias=True),
        lambda: EmbeddingEncoder(jr.key(0), num_classes=3, out_features=3, use_bias=True),
    ],
)
def test_unknown_keyword(make):
    with pytest.raises(TypeError, match="bias"):
        make()
