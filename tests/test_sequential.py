"""Layers one after the other, and a batch through them."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, STATE, TIME, assert_close, assert_equal, draw

import discretax
from discretax import Sequential, Timeseries, batched
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU

WIDTH, BATCH = 4, 3
X = jnp.zeros((BATCH, TIME, FEATURES))


def parts():
    encoder_key, model_key, head_key = jr.split(jr.key(0), 3)
    return {
        "encoder": LinearEncoder(FEATURES, encoder_key, out_features=WIDTH),
        "model": LRU(
            model_key, hidden_dim=WIDTH, num_blocks=1, state_dim=STATE, norm="batch", drop_rate=0.5
        ),
        "head": ClassificationHead(WIDTH, 3, head_key),
    }


@pytest.fixture(scope="module")
def named():
    return eqx.nn.make_with_state(lambda: Sequential(**parts()))()


@eqx.filter_jit
def run_batch(model, state, x, key):
    """By hand, as `batched` says that it does."""
    keys = None if key is None else jr.split(key, BATCH)
    mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return mapped(x, state, key=keys)


@eqx.filter_jit
def run(model, state, x, key=None):
    return batched(model)(x, state, key)


def test_numbers_are_those_of_equinox(named):
    """In training, with a key for dropout, statistics of the batch, padding and a state."""
    model, state = named
    listed, listed_state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(list(parts().values()))
    )()
    x = Timeseries(draw(BATCH, TIME, FEATURES), length=[TIME, 5, 7])
    actual = run(model, state, x, jr.key(3))
    assert_equal(actual, run_batch(listed, listed_state, x, jr.key(3)))
    assert not np.array_equal(actual[0], run(model, state, x, jr.key(4))[0])
    assert any(
        not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(actual[1]), strict=True)
    )
    # Saved by the one, read by the other.
    assert_equal(jax.tree.leaves((model, state)), jax.tree.leaves((listed, listed_state)))


def test_one_by_one_or_in_a_list():
    layers = (eqx.nn.Lambda(jnp.sin), eqx.nn.Lambda(jnp.cos))
    assert Sequential(*layers).layers == Sequential(list(layers)).layers == layers


@pytest.mark.parametrize("key", [jr.key(3), jr.PRNGKey(3)], ids=["key", "PRNGKey"])
def test_each_sequence_has_a_key(named, key):
    tell = batched(lambda x, state, key: (jr.key_data(key), state))
    keys = jr.split(key, BATCH)
    for given in key, keys:
        assert_equal(tell(X, named[1], given)[0], jr.key_data(keys))


def test_evaluation_is_sequence_by_sequence(named):
    model, state = eqx.nn.inference_mode(named[0]), named[1]
    x = draw(BATCH, TIME, FEATURES)
    y, after = run(model, state, np.asarray(x))
    single = eqx.filter_jit(lambda model, x, state: model(x, state)[0])
    assert_close(y, jnp.stack([single(model, row, state) for row in x]))
    assert_equal(after, state)


def test_streams_have_a_state_each(named):
    model, state = eqx.nn.inference_mode(named[0]), named[1]
    live = discretax.streaming_mode(model)
    x = draw(BATCH, TIME, FEATURES)
    whole, _ = run(model, state, x)
    streams = discretax.inference_state(live, state, batch_size=BATCH)
    for chunk in jnp.split(x, [4], axis=1):
        answer, streams = run(live, streams, chunk)
    assert_close(answer, whole)
    one = discretax.inference_state(live, state)
    for streaming in live, live.__call__, ft.partial(ft.partial(live.__call__)):
        with pytest.raises(ValueError, match=r"each of the 3 streams.*batch_size=3\)"):
            batched(streaming)(x, one)
    with pytest.raises(ValueError, match="streaming mode is called within this function"):
        batched(lambda x, state: live(x, state))(x, streams)


def test_parts_by_name_and_place(named):
    model, _ = named
    assert model["head"] is model[-1] is model.layers[2]
    assert list(model) == list(model.layers)
    assert len(model) == 3
    front = model[:2]
    assert isinstance(front, Sequential)
    assert front.names == ("encoder", "model")
    assert Sequential(model.layers)[1:].layers == model.layers[1:]
    head = ClassificationHead(WIDTH, 2, jr.key(9))
    changed = eqx.tree_at(lambda model: model["head"], model, head)
    assert_equal(changed["head"], head)
    assert_equal(changed["encoder"], model["encoder"])
    with pytest.raises(KeyError, match="no layer 'heads'; there are 'encoder', 'model', 'head'"):
        model["heads"]
    with pytest.raises(KeyError, match="there are no names"):
        Sequential(model.layers)["head"]


def test_layers_without_a_state():
    double = eqx.nn.Lambda(lambda x: 2 * x)
    model, state = eqx.nn.make_with_state(Sequential)([double, eqx.nn.Sequential([double]), double])
    assert_equal(model(jnp.ones((2, 1)), state)[0], np.full((2, 1), 8))
    nested = eqx.nn.Sequential([model, double])
    assert_equal(nested(jnp.ones((2, 1)), state)[0], np.full((2, 1), 16))


def test_an_ensemble(named):
    """One `Sequential` whose arrays have an axis more, mapped over."""
    make = lambda key: Sequential(encoder=LinearEncoder(FEATURES, key, out_features=WIDTH))
    keys, x = jr.split(jr.key(5)), draw(BATCH, TIME, FEATURES)
    models = eqx.filter_vmap(make)(keys)
    call = eqx.filter_vmap(lambda model: batched(model)(x, named[1])[0])
    expected = x @ make(keys[1])["encoder"].linear.weight.T
    assert_close(call(models)[1], expected)
    assert_close(batched(make(keys[1]).__call__)(x, named[1])[0], expected)  # a method


@pytest.mark.parametrize(
    "layers, names, error, message",
    [
        ([], {}, ValueError, "at least one layer; got none"),
        (None, {}, ValueError, "at least one layer; got none"),
        ([eqx.nn.Identity()], {"b": eqx.nn.Identity()}, TypeError, "got both.*names"),
        (eqx.nn.Identity(), {}, TypeError, r"list of layers.*instance of `Identity`"),
        ([LRU], {}, TypeError, "layer 0 must be an `eqx.Module`.*got the class `LRU`"),
        (None, {"act": jax.nn.relu}, TypeError, "layer 'act' must be.*`eqx.nn.Lambda`"),
    ],
)
def test_what_is_no_layer(layers, names, error, message):
    with pytest.raises(error, match=message):
        Sequential(*([] if layers is None else [layers]), **names)


@pytest.mark.parametrize(
    "x, key, error, message",
    [
        (X[0], None, ValueError, r"takes a batch.*got float32\(11, 4\), one sequence.*`x\[None\]`"),
        (Timeseries(X[0], length=5), None, ValueError, "one sequence"),
        (Timeseries(X[0]), None, ValueError, "one sequence"),
        (X[:0], None, ValueError, r"at least one sequence; got .*float32\(0, 11, 4\)"),
        (jnp.zeros(TIME, int), None, ValueError, r"got int32\(11,\), one sequence"),
        ([X[0]], None, TypeError, "an array or a `Timeseries`; got list.*`discretax.pad`"),
        (
            X,
            jr.split(jr.key(0), 2),
            ValueError,
            r"each of the 3 sequences, of shape \(3,\); got \(2,\)",
        ),
        (X, jr.PRNGKey(0)[None], ValueError, r"one key, of shape \(2,\).*got \(1, 2\)"),
        (X, 0, TypeError, "`key` must be a key.*got 0"),
    ],
)
def test_what_is_no_batch(named, x, key, error, message):
    with pytest.raises(error, match=message):
        batched(named[0])(x, named[1], key=key)


def test_without_a_state(named):
    for model in named[0], batched(named[0]):
        with pytest.raises(ValueError, match=r"`Sequential` needs the model's state.*got NoneType"):
            model(X, None)
