import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    STATE,
    TIME,
    Leaky,
    assert_close,
    assert_equal,
    draw,
    gelu,
    leaky,
    nan_padded,
    numbers,
)

from discretax import Timeseries
from discretax.channel_mixers import IdentityChannelMixer
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU, Backbone
from discretax.sequence_mixers import LRUSequenceMixer, S5SequenceMixer

pytestmark = pytest.mark.slow

WIDTH, BATCH = 4, 3
LENGTHS = jnp.array([5, TIME, 0])


@ft.cache
def make(norm="layer", head=False):
    encoder_key, model_key, head_key = jr.split(jr.key(0), 3)
    layers = [
        LinearEncoder(FEATURES, encoder_key, out_features=WIDTH),
        LRU(model_key, hidden_dim=WIDTH, num_blocks=2, state_dim=STATE, drop_rate=0.0, norm=norm),
    ]
    if head:
        layers.append(ClassificationHead(WIDTH, 3, head_key))
    return eqx.nn.make_with_state(eqx.nn.Sequential)(layers)


@eqx.filter_jit
def run(model, state, x):
    return model(x, state)[0]


@eqx.filter_jit
def run_batch(model, state, x):
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


@eqx.filter_jit
def batch_gradients(model, state, x):
    """Of a loss over the valid outputs, with respect to the model and to the samples."""

    def loss(model, x):
        y, _ = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        valid = jnp.arange(TIME)[None, :, None] < x.length[:, None, None]
        return jnp.sum(jnp.where(valid, jnp.sin(y.values), 0))

    return eqx.filter_grad(lambda both: loss(*both))((model, x))


def test_array_in_array_out():
    model, state = make()
    assert isinstance(run(model, state, draw(TIME, FEATURES)), jax.Array)


def test_timeseries_in_timeseries_out():
    model, state = make()
    resets = jnp.arange(TIME) == 4
    y = run(model, state, Timeseries(draw(TIME, FEATURES), length=7, resets=resets))
    assert isinstance(y, Timeseries)
    assert y.timesteps is None
    assert_equal((y.length, y.resets), (7, resets))


def test_timeseries_without_options_is_an_array():
    model, state = make()
    x = draw(TIME, FEATURES)
    assert_close(run(model, state, Timeseries(x)).values, run(model, state, x), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, TIME])
def test_length_is_a_shorter_sequence(length):
    model, state = make()
    x = draw(TIME, FEATURES)
    y = run(model, state, nan_padded(x, length))
    assert_close(y.values[:length], run(model, state, x[:length]))


def test_resets_are_separate_sequences():
    model, state = make()
    x = draw(TIME, FEATURES)
    resets = jnp.isin(jnp.arange(TIME), jnp.array([4, 5]))
    y = run(model, state, Timeseries(x, resets=resets)).values
    assert_close(y, jnp.concatenate([run(model, state, part) for part in jnp.split(x, (4, 5))]))


def test_timesteps_reach_the_mixer():
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0),
        hidden_dim=FEATURES,
        sequence_mixer=Leaky,
        channel_mixer=IdentityChannelMixer,
        num_blocks=1,
        drop_rate=0.0,
        norm=None,
    )
    x = draw(TIME, FEATURES)
    timesteps = jnp.abs(draw(TIME, seed=2))
    y = run(model, state, Timeseries(x, timesteps=timesteps))
    mixer = model.blocks[0].sequence_mixer
    assert_close(y.values, numbers(x) + gelu(leaky(mixer, x, timesteps)))
    assert_equal(y.timesteps, timesteps)


def test_batch_axes_go_through_vmap():
    model, state = make(head=True)
    x, resets = draw(BATCH, TIME, FEATURES), draw(BATCH, TIME, seed=2) > 1
    assert resets.any()
    y, _ = run_batch(model, state, Timeseries(x, length=LENGTHS, resets=resets))
    one_by_one = [
        run(model, state, Timeseries(x[i], length=LENGTHS[i], resets=resets[i]))
        for i in range(BATCH)
    ]
    assert_close(y, jnp.stack(one_by_one))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_padding_is_without_effect(norm):
    model, state = make(norm)
    x = draw(BATCH, TIME, FEATURES)
    valid = (jnp.arange(TIME)[None] < LENGTHS[:, None])[..., None]
    with_padding = lambda padding: Timeseries(jnp.where(valid, x, padding), length=LENGTHS)
    nan, other = with_padding(jnp.nan), with_padding(1e6 * draw(BATCH, TIME, FEATURES, seed=2))

    (y, new_state), (y_other, new_state_other) = (
        run_batch(model, state, batch) for batch in (nan, other)
    )
    assert_equal(jnp.where(valid, y.values, 0), jnp.where(valid, y_other.values, 0))
    assert_equal(new_state, new_state_other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, new_state)))

    (model_grad, x_grad), (model_grad_other, x_grad_other) = (
        batch_gradients(model, state, batch) for batch in (nan, other)
    )
    assert_equal(model_grad, model_grad_other)
    assert_equal(x_grad.values, x_grad_other.values)
    assert not np.any(jnp.where(valid, 0, x_grad.values))  # False for a NaN, too


@pytest.mark.parametrize("gap", [np.nan, np.inf, -1e4])
def test_gaps_in_the_padding_are_without_effect(gap):
    """As timestamps padded with zeros have them, once they are differences."""
    mixer = S5SequenceMixer(FEATURES, jr.key(0), state_dim=4)
    x, valid = draw(TIME, FEATURES), np.arange(TIME) < 6

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(arguments, length):
        mixer, gaps = arguments
        series = Timeseries(x, gaps, length)
        y, last = mixer(series.values, integration_timesteps=series.timesteps, length=series.length)
        return jnp.sum(jnp.where(valid[:, None], y, 0) ** 2) + jnp.sum(last**2)

    expected = loss((mixer, ONES), 6)
    gaps = jnp.where(valid, ONES, gap)
    assert_equal(loss((mixer, gaps), 6), expected)
    assert_equal(loss((mixer, gaps), jnp.asarray(6)), expected)
    y, _ = mixer(x, integration_timesteps=gaps, length=6)
    assert_close(y[:6], mixer(x[:6], integration_timesteps=ONES[:6])[0])
    batch = Timeseries(jnp.stack([x, x]), jnp.stack([ONES, gaps]), jnp.array([TIME, 6]))
    assert_equal(batch.timesteps[1], gaps)


def test_gradients_of_a_padded_batch_are_those_of_the_single_sequences():
    model, state = make()
    x = draw(BATCH, TIME, FEATURES)
    valid = (jnp.arange(TIME)[None] < LENGTHS[:, None])[..., None]
    padded = Timeseries(jnp.where(valid, x, jnp.nan), length=LENGTHS)

    @eqx.filter_jit
    @eqx.filter_grad
    def single_gradient(model, x):
        return jnp.sum(jnp.sin(model(x, state)[0]))

    singles = [single_gradient(model, x[i, :length]) for i, length in enumerate((5, TIME))]
    total = jax.tree.map(jnp.add, *(eqx.filter(grad, eqx.is_inexact_array) for grad in singles))
    model_grad, _ = batch_gradients(model, state, padded)
    assert_close(eqx.filter(model_grad, eqx.is_inexact_array), total)


def test_lists_and_numpy_arrays_are_taken():
    x = Timeseries([[1.0], [2.0]], timesteps=[0.5, 1.0], length=np.int32(1), resets=[False, True])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    assert_equal((x.values, x.timesteps, x.length), (np.array([[1], [2]]), np.array([0.5, 1]), 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, x64",
    [(jnp.uint8, False), (jnp.int16, False), (jnp.uint32, False), (jnp.int32, True)],
)
def test_length_of_any_whole_type(dtype, x64):
    model, state = make(head=True)
    expected = run(model, state, draw(TIME, FEATURES)[:5])
    with jax.enable_x64(x64):
        x = draw(TIME, FEATURES).astype(jnp.float32)
        assert_close(run(model, state, Timeseries(x, length=jnp.asarray(5, dtype))), expected)


def test_memory_of_numpy_is_not_shared():
    """A buffer is filled with the next batch while the last one is still used."""
    for size in range(1, 41):  # whether JAX takes it as it is depends on where it lies
        buffer = np.zeros((16 * size, 4), np.float32)
        kept = Timeseries(buffer, length=np.array(3))
        buffer[:] = 1
        assert not kept.values.any()


def test_unsigned_length_of_a_sequence_that_is_run_in_chunks():
    """Samples left after a chunk: 200 - 256 is 144 in uint8 and four billion in uint32."""
    mixer = LRUSequenceMixer(FEATURES, jr.key(0), state_dim=64)
    time, length = 5000, 200
    assert time * 64 > 2**18
    x = draw(time, FEATURES)
    run = eqx.filter_jit(lambda mixer, x, length=None: mixer(x, length=length)[1])
    expected = run(mixer, x[:length])
    for dtype in (jnp.uint8, jnp.uint32):
        assert_close(run(mixer, x, jnp.asarray(length, dtype)), expected)


VALUES = jnp.zeros((TIME, FEATURES))
BATCHED = jnp.zeros((BATCH, TIME, FEATURES))
ONES = jnp.ones(TIME)


@pytest.mark.parametrize(
    "values, options, message",
    [
        (VALUES, {"timesteps": jnp.ones(5)}, r"one per sample: shape \(11,\); got float32\(5,\)"),
        (
            VALUES,
            {"timesteps": jnp.ones(TIME, int)},
            r"timesteps must be floating.*got int32\(11,\)\. Convert it: `\.astype\(float\)`",
        ),
        (
            VALUES,
            {"timesteps": ONES[:, None]},
            r"one number per sample.*values \(11, 4\), timesteps \(11, 1\).*`timesteps\[\.\.\., 0\]`",
        ),
        (
            BATCHED,
            {"resets": jnp.zeros((BATCH, TIME, 1), bool), "timesteps": jnp.ones((BATCH, TIME, 1))},
            r"one number per sample.*timesteps \(3, 11, 1\), resets \(3, 11, 1\)",
        ),
        (VALUES, {"timesteps": ONES.at[3].set(-0.5)}, "must not be negative; got -0.5.*sorted"),
        (VALUES, {"timesteps": ONES.at[0].set(jnp.nan)}, "be finite.* got nan.*first .* of one"),
        (VALUES, {"timesteps": ONES.at[3].set(jnp.inf), "length": 4}, "be finite.* got inf"),
        (
            BATCHED,
            {
                "timesteps": jnp.ones((BATCH, TIME)).at[1, 4].set(-2),
                "length": jnp.array([4, 5, 4]),
            },
            "must not be negative; got -2",
        ),
        (VALUES, {"resets": jnp.zeros(5, bool)}, r"`resets`.*shape \(11,\); got bool\(5,\)"),
        (
            VALUES,
            {"resets": jnp.zeros(TIME)},
            r"`resets` must be booleans.*Convert it: `\.astype\(bool\)`",
        ),
        (VALUES, {"length": TIME + 1}, "between 0 and the number of samples, 11; got 12"),
        (VALUES, {"length": -1}, "between 0 and the number of samples, 11; got -1"),
        (VALUES, {"length": 2.0}, "`length` must be a whole number.*got float32"),
        (VALUES, {"length": 5, "resets": jnp.zeros((2, TIME), bool)}, "same batch axes; got"),
        (VALUES, {"timesteps": jnp.array(1.0)}, r"\(\*batch, time\).*got.*timesteps \(\)"),
        (jnp.zeros(TIME), {"length": jnp.zeros(TIME, int)}, r"got values \(11,\), length \(11,\)"),
        (BATCHED, {"length": jnp.array([1, 2])}, r"of shape \(3,\); got int32\(2,\)"),
        (BATCHED, {"length": jnp.array([1, 2, 12])}, r"number of samples, 11; got \[ 1  2 12\]"),
        (jnp.zeros(()), {}, r"got values \(\)"),
    ],
)
def test_what_does_not_fit(values, options, message):
    with pytest.raises(ValueError, match=message):
        Timeseries(values, **options)


def test_one_token_each_with_its_reset():
    Timeseries(jnp.zeros((BATCH, 1), int), resets=jnp.zeros((BATCH, 1), bool))


def test_unknown_keyword():
    with pytest.raises(TypeError, match="lengths"):
        Timeseries(VALUES, lengths=5)


def test_timesteps_without_a_continuous_time():
    model, state = make()
    with pytest.raises(ValueError, match=r"`LRUSequenceMixer` takes no .*timesteps.*Mixers with"):
        model(Timeseries(VALUES, timesteps=ONES), state)


def test_a_batch_without_vmap():
    model, state = make()
    x = Timeseries(BATCHED, length=LENGTHS)
    with pytest.raises(ValueError, match=r"one sequence.*got \(3, 11, 4\)\. Use `jax\.vmap`"):
        model(x, state)
