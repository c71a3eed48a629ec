"""Downsample, Upsample and PatchEncoder against a loop over samples; streams, resets, padding."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    assert_close,
    assert_equal,
    downsampled,
    draw,
    numbers,
    samples_that_count,
    upsampled,
)

import discretax
from discretax import Sequential, Timeseries
from discretax.encoder import PatchEncoder
from discretax.rates import Downsample, Upsample
from discretax.testing import check_streaming

TIME, STRIDE, LENGTH, OUT = 14, 4, 10, 3
WINDOWS, FILLED = 4, 3
# Within the first window twice, at a window's beginning, and in the padding.
RESETS = np.isin(np.arange(TIME), [1, 2, 8, 11])
KINDS = ["stride", "mean", "max", "linear"]
down = ft.partial(Downsample, FEATURES, STRIDE, jr.key(0))
up = ft.partial(Upsample, FEATURES, STRIDE, jr.key(1))


@eqx.filter_jit
def call(layer, x, state, **options):
    return layer(x, state, **options)


def run(layer, x, **options):
    return call(layer, x, eqx.nn.State(layer), **options)[0]


def series(values=None, resets=RESETS):
    """Samples with gaps, of which NaN are those in the padding and those before a reset in a window."""
    values = np.array(draw(TIME, FEATURES) if values is None else values)
    values[LENGTH:] = np.nan
    values[:2] = np.nan
    return Timeseries(values, np.linspace(0.5, 2, TIME, dtype=np.float32), LENGTH, resets)


# Downsample


@pytest.mark.parametrize(
    "how, out_features", [("stride", None), ("mean", None), ("max", OUT), ("linear", None)]
)
def test_downsample_pools_windows(how, out_features):
    layer = down(how=how, out_features=out_features)
    assert layer.out_features == (out_features or FEATURES)
    values = draw(TIME, FEATURES)
    y = run(layer, values)
    assert isinstance(y, jax.Array)
    assert_close(y, downsampled(layer, values))  # of 14 samples, the last window has two

    x = series()
    y = run(layer, x)
    assert_close(y.values[:FILLED], downsampled(layer, x.values[:LENGTH], RESETS))
    assert (y.length, y.values.shape) == (FILLED, (WINDOWS, layer.out_features))
    assert y.resets.tolist() == [True, False, True, False]
    gaps = numbers(x.timesteps)
    starts = range(0, LENGTH, STRIDE)
    counted = [samples_that_count(t, min(t + STRIDE, LENGTH), RESETS) for t in starts]
    assert_close(y.timesteps[:FILLED], np.array([gaps[rows].sum() for rows in counted]))


def test_without_timesteps_there_are_none():
    y = run(down(), Timeseries(draw(TIME, FEATURES), length=LENGTH))
    assert (y.timesteps, y.resets, y.length) == (None, None, FILLED)
    for length, filled in ((0, 0), (1, 1), (4, 1), (5, 2), (TIME, WINDOWS)):
        assert (
            run(down(), Timeseries(draw(TIME, FEATURES), length=np.uint8(length))).length == filled
        )


@pytest.mark.parametrize("how", KINDS)
def test_a_broken_sample_stays_in_its_window(how):
    """Its value, and the gradients of what others are made of."""
    layer = down(how=how, out_features=OUT)
    resets = np.isin(np.arange(TIME), [4])

    @eqx.filter_value_and_grad(has_aux=True)
    def loss(arguments, broken):
        layer, values = arguments
        values = values.at[3, 0].set(jnp.where(broken, jnp.nan, values[3, 0]))
        y, _ = layer(Timeseries(values, resets=resets), eqx.nn.State(layer))
        return jnp.sum(y.values[1:] ** 2), y.values

    # XLA may take zero divided by zero, in the gradient of a largest number, for zero.
    loss = loss if how == "max" else eqx.filter_jit(loss)
    (_, y), gradients = loss((layer, draw(TIME, FEATURES)), True)
    (_, fine), expected = loss((layer, draw(TIME, FEATURES)), False)
    assert np.isnan(y[0]).all() and not np.isnan(fine).any()
    assert_equal(y[1:], fine[1:])
    assert_equal(gradients, expected)


def test_a_mean_may_be_of_more_than_its_type_can_add():
    layer = Downsample(1, 1000)
    x = jnp.full((2000, 1), 100, jnp.float16)
    assert_equal(run(layer, x), x[:2])


@pytest.mark.parametrize("how", ["mean", "linear"])
def test_types_are_kept(how):
    x = series(draw(TIME, FEATURES)).map_values(lambda v: v.astype(jnp.bfloat16))
    y = run(down(how=how), x)
    z = run(up(how="linear"), y, like=x)
    assert y.values.dtype == z.values.dtype == jnp.bfloat16
    assert y.timesteps.dtype == jnp.float32


def test_patches_are_downsamples():
    encoder = PatchEncoder(FEATURES, OUT, jr.key(0), patch_size=STRIDE)
    assert eqx.tree_equal(encoder.downsample.linear, down(how="linear", out_features=OUT).linear)
    x = series()
    assert_close(
        run(encoder, x).values[:FILLED],
        downsampled(encoder.downsample, x.values[:LENGTH], RESETS),
    )
    # The convolution that it is.
    weight = encoder.downsample.linear.weight.reshape(OUT, STRIDE, FEATURES)
    values = draw(3 * STRIDE, FEATURES)
    convolved = jax.lax.conv_general_dilated(
        values.T[None], weight.swapaxes(1, 2), (STRIDE,), "VALID"
    )[0].T
    assert_close(run(encoder, values), convolved + encoder.downsample.linear.bias[None])


# Upsample


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("how, out_features", [("repeat", None), ("repeat", OUT), ("linear", OUT)])
def test_upsample_gives_each_sample_what_is_known(how, out_features, causal):
    layer = up(how=how, out_features=out_features, causal=causal)
    x, like = run(down(), series()), series()
    y = run(layer, x, like=like)
    assert_equal((y.length, y.timesteps, y.resets), (like.length, like.timesteps, like.resets))
    assert y.values.shape == (TIME, layer.out_features)
    expected = upsampled(layer, x.values, LENGTH, RESETS)
    assert_close(y.values[:LENGTH], expected)

    values = draw(WINDOWS, FEATURES)
    short = run(layer, values, like=draw(TIME, 1))
    assert_close(short, upsampled(layer, values, TIME))
    assert_close(run(layer, values), upsampled(layer, values, WINDOWS * STRIDE))


@pytest.mark.parametrize("causal", [True, False])
def test_upsample_without_the_finer_series(causal):
    """Windows are full, their time is divided, and a sequence begins with its window."""
    x = Timeseries(draw(3, FEATURES), [4.0, 2.0, 1.0], 2, [False, True, False])
    layer = up(causal=causal)
    y = run(layer, x)
    assert y.length == 8
    assert_equal(y.timesteps, np.repeat([1.0, 0.5, 0.25], 4))
    assert_equal(y.resets, np.arange(12) == 4)
    assert_close(y.values[:8], upsampled(layer, x.values[:2], 8, np.arange(8) == 4))
    again = run(down(), y)
    assert_equal((again.length, again.resets, again.timesteps[:2]), (2, x.resets, x.timesteps[:2]))


def test_nothing_broken_gets_past_a_reset():
    """NaN of a former sequence, its values and gradients; the reset is within a window."""
    layer = up(how="linear", out_features=OUT)
    resets = np.arange(TIME) == 6

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(layer, values):
        like = Timeseries(draw(TIME, 1), resets=resets)
        x = Timeseries(values, resets=np.array([False, True, False, False]))
        y, _ = layer(x, eqx.nn.State(layer), like=like)
        return jnp.sum(y.values[6:] ** 2)

    values = draw(WINDOWS, FEATURES)
    broken = values.at[0].set(jnp.nan)
    assert_equal(gradients(layer, broken), gradients(layer, values))
    y = run(layer, Timeseries(broken), like=Timeseries(draw(TIME, 1), resets=resets)).values
    assert np.isnan(y[4:6]).all() and not np.isnan(y[6:]).any()


# Streams


def there_and_back():
    return eqx.nn.make_with_state(lambda: Sequential(down(how="linear"), up(how="linear")))()


@pytest.mark.slow
def test_there_and_back_streams():
    x = Timeseries(draw(20, FEATURES), timesteps=np.linspace(0.5, 2, 20, dtype=np.float32))
    check_streaming(*there_and_back(), x, multiple=STRIDE)


@pytest.mark.slow
def test_what_gives_fewer_samples_streams():
    check_streaming(*eqx.nn.make_with_state(down)(how="max"), draw(20, FEATURES), multiple=STRIDE)


def test_gradients_of_chunks_are_those_of_the_whole():
    model, state = there_and_back()
    live, empty = discretax.streaming_mode(model), discretax.inference_state(model, state)

    def gradients(cuts):
        def loss(arguments):
            model, x = arguments
            ys, stream = [], empty if cuts else state
            for chunk in jnp.split(x, cuts):
                y, stream = model(chunk, stream)
                ys.append(y)
            return jnp.sum(jnp.sin(jnp.concatenate(ys)))

        return eqx.filter_jit(eqx.filter_grad(loss))((live if cuts else model, draw(20, FEATURES)))

    whole = jax.tree.leaves(gradients([]))
    assert_close(jax.tree.leaves(gradients([4, 12])), whole)


def test_a_stream_ends_with_a_window_that_is_not_full():
    model, state = there_and_back()
    live, stream = discretax.streaming_mode(model), discretax.inference_state(model, state)
    x = draw(10, FEATURES)
    first, stream = call(live, x[:8], stream)
    last, ended = call(live, discretax.pad([x[8:]], multiple_of=STRIDE)[0], stream)
    assert_close(jnp.concatenate([first, last.values[:2]]), call(model, x, state)[0][:10])

    shrink, nothing = live[0], Timeseries(x[:8], length=0, resets=np.ones(8, bool))
    _, ended = call(shrink, nothing, ended)  # goes on with nothing
    chunk = Timeseries(x[:8], length=8, resets=np.arange(8) == 5)
    y, after = call(shrink, chunk, ended)
    alone, _ = call(shrink, chunk, stream)
    assert np.isnan(y.values[0]).all()
    assert_equal(y.values[1], alone.values[1])
    assert_equal(after.get(shrink.cache_index), False)
    begun, _ = call(shrink, Timeseries(x[:8], length=8, resets=np.arange(8) == 0), ended)
    assert_close(begun.values, downsampled(shrink, x[:8]))
    with pytest.raises(ValueError, match="whole windows of 4 samples; got more after a chunk"):
        shrink(chunk, ended)


# What is refused


@pytest.mark.parametrize("layer", [Downsample, Upsample])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"stride": 0}, ValueError, "`stride` must be a whole number of at least 1; got 0"),
        ({"stride": 2.0}, ValueError, r"`stride` must be a whole number .*; got 2\.0"),
        ({"in_features": 0}, ValueError, "`in_features` must be .*; got 0"),
        ({"out_features": 0}, ValueError, "`out_features` must be .*; got 0"),
        ({"how": "sum"}, ValueError, r"`how` must be one of '(stride|repeat)', .*; got 'sum'"),
        ({"how": "linear"}, TypeError, r"`key` of `(Down|Up)sample` must be a key.*; got None"),
        ({"out_features": 2}, TypeError, r"`key` of `(Down|Up)sample` must be a key.*; got None"),
    ],
)
def test_what_makes_no_layer(layer, arguments, error, message):
    with pytest.raises(error, match=message):
        layer(**{"in_features": FEATURES, "stride": STRIDE} | arguments)


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (down, (TIME, FEATURES + 1), r"`Downsample` takes floating arrays whose last axis.* 4"),
        (down, (FEATURES,), r"`Downsample` takes one sequence.*`x\[None\]`"),
        (down, (0, FEATURES), "`Downsample` takes at least one sample.*; got none"),
        (up, (TIME, FEATURES + 1), r"`Upsample` takes floating arrays whose last axis.* 4"),
        (up, (0, FEATURES), "`Upsample` takes at least one sample.*; got none"),
    ],
)
def test_samples_that_are_refused(layer, shape, message):
    layer = layer()
    with pytest.raises(ValueError, match=message):
        layer(jnp.zeros(shape), eqx.nn.State(layer))


def test_chunks_that_do_not_fit():
    model, state = there_and_back()
    live, stream = discretax.streaming_mode(model), discretax.inference_state(model, state)
    x = draw(6, FEATURES)
    with pytest.raises(
        ValueError,
        match=r"a multiple of 4 samples for `Downsample\(stride=4\)`; got 6.*pad\(\[chunk\], "
        r"multiple_of=4\)\[0\]",
    ):
        live(x, stream)
    with pytest.raises(
        ValueError, match=r"a multiple of 4 samples for `Upsample\(stride=4\)`; got"
    ):
        live[1](x[:2], stream, like=x)
    for time in (16, 21):
        with pytest.raises(
            ValueError, match=f"at least 20 samples, and a multiple of 4; got {time}"
        ):
            check_streaming(live, state, draw(time, FEATURES), multiple=4)


@pytest.mark.parametrize(
    "like, error, message",
    [
        (jnp.zeros((9, 1)), ValueError, r"samples of 2 windows of 4.*; got \(9, 1\)"),
        (jnp.zeros((4, 1)), ValueError, r"samples of 2 windows of 4.*; got \(4, 1\)"),
        (jnp.zeros(8), ValueError, r"\(time, features\); got \(8,\)"),
        (10, TypeError, "an array or a `Timeseries`; got int"),
        (Timeseries(jnp.zeros((8, 1))), TypeError, "both arrays or both `Timeseries`; got Timese"),
    ],
)
def test_finer_series_that_do_not_fit(like, error, message):
    layer = up()
    with pytest.raises(error, match=message):
        layer(jnp.zeros((2, FEATURES)), eqx.nn.State(layer), like=like)


def test_a_finer_length_that_does_not_fit():
    layer, x = up(), Timeseries(jnp.zeros((2, FEATURES)), length=1)
    with pytest.raises(ValueError, match=r"valid windows of 4 as .*, 1; got a length of 5"):
        layer(x, eqx.nn.State(layer), like=Timeseries(jnp.zeros((8, 1)), length=5))
