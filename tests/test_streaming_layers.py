"""Layers of one's own that remember, and those that should."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, TIME, assert_equal, draw

import discretax
from discretax import AbstractStreamingLayer, Timeseries
from discretax.encoder import AbstractEncoder, LinearEncoder
from discretax.ops import token_shift
from discretax.sequence_mixers import zero_cache
from discretax.testing import check_streaming

pytestmark = pytest.mark.slow


class Difference(AbstractEncoder, AbstractStreamingLayer):
    """From the sample before; without an `__init__` of its own."""

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return zero_cache(batch_size, (FEATURES,), dtype)

    def __call__(self, x, state, key=None):
        x = x if isinstance(x, Timeseries) else Timeseries(x)
        last = self.read_cache(state)
        before, last = token_shift(x.values, last, length=x.length, resets=x.resets)
        y = Timeseries(x.values - before, x.timesteps, x.length, x.resets)
        return y, self.write_cache(state, last)


class Twice(AbstractEncoder, AbstractStreamingLayer):
    """The difference of differences: remembers, and holds a layer that remembers too."""

    inner: Difference
    scale: jax.Array

    def __init__(self, scale):
        self.inner = Difference()
        self.scale = jnp.asarray(scale)

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return self.inner.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def __call__(self, x, state, key=None):
        y, state = self.inner(x, state)
        last = self.read_cache(state)
        before, last = token_shift(y.values, last, length=y.length, resets=y.resets)
        y = Timeseries(self.scale * (y.values - before), y.timesteps, y.length, y.resets)
        return y, self.write_cache(state, last)


class Forgetful(AbstractEncoder):
    """The same difference, as if there were whole sequences alone."""

    def __call__(self, x, state, key=None):
        shift = lambda values: values - token_shift(values)[0]
        if isinstance(x, Timeseries):
            return Timeseries(shift(x.values), x.timesteps, x.length, x.resets), state
        return shift(x), state


class Halves(AbstractStreamingLayer):
    """Writes another cache than it reads."""

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return zero_cache(batch_size, (FEATURES,), dtype)

    def __call__(self, x, state, key=None):
        return x, self.write_cache(state, self.read_cache(state)[: FEATURES // 2])


class Converting(AbstractStreamingLayer):
    """Writes a cache of another kind than it reads."""

    kind: type = eqx.field(static=True)

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return zero_cache(batch_size, (), int if self.kind is float else float)

    def __call__(self, x, state, key=None):
        return x, self.write_cache(state, self.read_cache(state).astype(self.kind))


def sequential(*makers):
    return eqx.nn.make_with_state(lambda: eqx.nn.Sequential([make() for make in makers]))()


def linear():
    return LinearEncoder(FEATURES, jr.key(0), out_features=FEATURES)


def test_layers_that_remember_stream():
    check_streaming(*sequential(linear, Difference, lambda: Twice(2.0)), draw(TIME, FEATURES))


def test_a_model_holds_no_cache_until_it_streams():
    model, state = sequential(lambda: Twice(2.0))
    assert len(jax.tree.leaves(eqx.filter(model, eqx.is_array))) == 1
    assert jax.tree.leaves(state) == []
    assert {node.streaming for node in (model[0], model[0].inner)} == {False}
    live = discretax.streaming_mode(model)
    assert {node.streaming for node in (live[0], live[0].inner)} == {True}
    x = draw(TIME, FEATURES)
    y, after = model(x, state)
    assert_equal(y.values, live(x, discretax.inference_state(model, state))[0].values)
    assert jax.tree.leaves(after) == []


def test_a_cache_keeps_its_type():
    model, state = sequential(Difference)
    live, stream = discretax.streaming_mode(model), discretax.inference_state(model, state)
    x = draw(TIME, FEATURES).astype(jnp.bfloat16)
    _, stream = live(x, stream)
    cache = stream.get(model[0].cache_index)
    assert cache.dtype == jnp.float32
    assert_equal(cache, np.asarray(x[-1], np.float32))


def test_one_that_forgets_is_named_with_the_remedy():
    model, state = sequential(linear, Forgetful, linear)
    with pytest.raises(AssertionError, match="chunks_are_the_whole") as caught:
        check_streaming(model, state, draw(TIME, FEATURES))
    advice = str(caught.value).splitlines()[-1]
    assert advice.startswith("`Forgetful`, `model[1]`, is where it begins, and it keeps no cache.")
    assert "derives from `discretax.AbstractStreamingLayer`" in advice


def test_a_cache_of_another_shape_is_refused():
    model, state = sequential(Halves)
    live = discretax.streaming_mode(model)
    x = draw(TIME, FEATURES)
    assert_equal(model(x, state)[0], x)  # nothing is written
    with pytest.raises(ValueError, match=r"`Halves` must write .* \(4,\); got \(2,\)"):
        live(x, discretax.inference_state(model, state))
    with pytest.raises(ValueError, match="no inference cache for `Halves`"):
        live(x, state)


@pytest.mark.parametrize(
    "kind, says", [(float, "int32; got float32"), (complex, "float32; got com")]
)
def test_a_cache_of_another_kind_is_refused(kind, says):
    model, state = sequential(lambda: Converting(kind))
    live = discretax.streaming_mode(model)
    with pytest.raises(TypeError, match=f"`Converting` must write .*{says}"):
        live(draw(TIME, FEATURES), discretax.inference_state(model, state))
