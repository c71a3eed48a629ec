"""`discretax.live`: the compiled step."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, STATE, TIME, assert_close, assert_equal, draw

import discretax
from discretax import Timeseries
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.inference import _live
from discretax.models import LRU

pytestmark = pytest.mark.slow

BATCH = 3


@ft.cache
def built():
    """In training mode, with batch norm and dropout, and statistics that are not those of the start."""
    keys = jr.split(jr.key(0), 3)
    layers = [
        LinearEncoder(FEATURES, keys[0], out_features=FEATURES),
        LRU(keys[1], hidden_dim=FEATURES, num_blocks=1, state_dim=STATE),
        ClassificationHead(FEATURES, 2, keys[2]),
    ]
    model, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential(layers))()
    norm = model[1].blocks[0].norm
    mean, var, weight = (draw(FEATURES, seed=7), 2 + draw(FEATURES, seed=8) ** 2, 0.9)
    return model, state.set(
        norm.statistics, (mean * weight, var * weight, jnp.asarray(weight, float))
    )


@ft.cache
def side_by_side():
    return discretax.live(*built(), batch_size=BATCH)[0]


@ft.cache
def alone():
    return discretax.live(*built())[0]


@eqx.filter_jit
def evaluated(x, length):
    model, state = built()
    return eqx.nn.inference_mode(model)(Timeseries(x, length=length), state)[0]


def test_chunks_of_any_length_are_the_whole():
    step, stream = alone(), alone().start()
    x, start = draw(TIME, FEATURES), 0
    for end in (1, 2, 7, TIME):
        y, stream = step(np.asarray(x[start:end]), stream)
        assert_close(y, evaluated(x, end))
        start = end


def test_streams_side_by_side_and_at_their_own_rates():
    step, stream = side_by_side(), side_by_side().start()
    x, so_far = draw(BATCH, TIME, FEATURES), np.zeros(BATCH, int)
    for lengths in ((2, 0, 4), (4, 1, 0)):
        rows = np.minimum(so_far[:, None] + np.arange(4), TIME - 1)
        chunk = Timeseries(np.take_along_axis(np.asarray(x), rows[..., None], 1), length=lengths)
        y, stream = step(chunk, stream)
        so_far += np.array(lengths)
        assert_close(y, np.stack([evaluated(*row) for row in zip(x, so_far, strict=True)]))


def test_a_stream_is_used_up_unless_it_is_copied():
    step, first = alone(), alone().start()
    x = draw(1, FEATURES)
    copy = jax.tree.map(jnp.copy, first)
    y, after = step(x, first)
    with pytest.raises(ValueError, match=r"used up.*jax\.tree\.map\(jnp\.copy.*step\.start\(\)"):
        step(x, first)
    assert_equal(step(x, copy)[0], y)
    assert_equal(step(x, step.start())[0], y)
    assert np.abs(step(x, after)[0] - y).max() > 1e-3


def test_model_and_state_stay_as_they_are():
    model, state = built()
    before = jax.tree.map(np.array, eqx.filter((model, state), eqx.is_array))
    step, stream = alone(), alone().start()
    step(draw(1, FEATURES), stream)
    assert_equal(eqx.filter((model, state), eqx.is_array), before)
    assert not model[1].blocks[0].streaming and not model[1].blocks[0].dropout.inference


def test_large_weights_are_arguments(monkeypatch):
    x = draw(1, FEATURES)
    compiled = lambda step: jax.make_jaxpr(step._step)(step._arguments, x, step.start()).eqns[0]
    constants = lambda step: compiled(step).params["jaxpr"].consts
    weight = built()[0][0].linear.weight
    is_weight = lambda array: array.shape == weight.shape and np.array_equal(array, weight)
    assert any(map(is_weight, constants(alone())))
    monkeypatch.setattr(_live, "LARGE", 0)
    step, stream = discretax.live(*built())
    assert not constants(step)
    assert_close(step(x, stream)[0], evaluated(x, 1))


def test_large_arrays_travel_by_themselves():
    tree = {
        "count": jnp.arange(3),
        "small": (draw(2, 3), draw(4)),
        "large": draw(5000),
        "key": jr.key(1),
        "scalar": jnp.ones(()),
    }
    packing = _live._Packing(tree)
    packed = packing.pack(tree)
    assert sorted(array.size for array in packed) == [1, 3, 11, 5000]
    unpacked = packing.unpack(packed)
    assert jax.tree.structure(unpacked) == jax.tree.structure(tree)
    assert_equal(*(jr.key_data(arrays.pop("key")) for arrays in (unpacked, tree)))
    assert_equal(unpacked, tree)


def test_what_does_not_fit_is_refused():
    step, stream = side_by_side(), side_by_side().start()
    x = draw(BATCH, 4, FEATURES)
    _, state = built()
    for chunk, wrong, error, says in (
        (x, state, TypeError, r"`step\.start\(\)`; got State\..*streaming_mode"),
        (x, alone().start(), ValueError, r"one of this step, .*\(3, .*; got .*`discretax\.live`"),
        (x[0], stream, ValueError, r"batch_size=3 streams; got an array of shape \(4, 4\)"),
    ):
        with pytest.raises(error, match=says):
            step(chunk, wrong)
    for sizes, says in (
        ({"batch_size": 0}, "`batch_size` .* at least 1; got 0"),
        ({"batch_size": 2.0}, r"`batch_size` .* whole number .*; got 2\.0"),
        ({"batch_size": True}, "`batch_size` .*; got True"),
        ({"max_seqlen": 2.5}, r"`max_seqlen` .* whole number .*; got 2\.5"),
    ):
        with pytest.raises(ValueError, match=says):
            discretax.live(*built(), **sizes)
