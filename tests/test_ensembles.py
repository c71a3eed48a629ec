"""Ensembles, as `eqx.filter_vmap` over keys makes them: mapped over, or refused with what to do."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import CASES
from helpers import TIME, assert_close, draw

import discretax
from discretax.inspection import eigenvalues, frequency_response, impulse_response
from discretax.models import LRU, S4, S5

pytestmark = pytest.mark.slow

# Sizes for which the members' axis passes for another one.
WIDTH, BATCH = 8, 3
MODELS = {
    "LRU": (2, ft.partial(LRU, state_dim=WIDTH)),
    "S5": (2, ft.partial(S5, state_dim=2 * WIDTH)),
    "S4": (WIDTH, ft.partial(S4, state_dim=2 * WIDTH)),
}
ONE, EVERY = None, eqx.if_array(0)
every_model = pytest.mark.parametrize("name", MODELS)
call = eqx.filter_jit(lambda model, x, state: model(x, state))
call_ensemble = eqx.filter_jit(
    eqx.filter_vmap(lambda model, x, state: model(x, state), in_axes=(EVERY, ONE, EVERY))
)


@ft.cache
def ensemble(name):
    size, make = MODELS[name]
    build = eqx.nn.make_with_state(ft.partial(make, hidden_dim=WIDTH, num_blocks=1))
    models, states = eqx.filter_vmap(lambda key: build(key=key))(jr.split(jr.key(0), size))
    # Statistics that differ from member to member.
    states = jax.tree.map(lambda leaf: leaf + 1 + draw(*leaf.shape) ** 2, states)
    return eqx.nn.inference_mode(models), states


def members(tree):
    size = len(jax.tree.leaves(eqx.filter(tree, eqx.is_array))[0])
    take = lambda i: jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, tree)
    return [take(i) for i in range(size)]


def answers(name, x):
    """Of each member by itself."""
    models, states = ensemble(name)
    pairs = zip(members(models), members(states), strict=True)
    return jnp.stack([call(model, x, state)[0] for model, state in pairs])


@every_model
def test_an_ensemble_answers_as_its_members(name):
    models, states = ensemble(name)
    x = draw(TIME, WIDTH)
    assert_close(call_ensemble(models, x, states)[0], answers(name, x))


@every_model
def test_discretized(name):
    models, states = ensemble(name)
    rule = rf"one `{name}SequenceMixer`, not an ensemble: .* got the shape \({MODELS[name][0]}, "
    with pytest.raises(ValueError, match=rule) as caught:
        discretax.discretized(models)
    caught.match(r"`eqx\.filter_vmap\(discretax\.discretized\)\(ensemble\)`")
    fast = eqx.filter_vmap(discretax.discretized)(models)
    x = draw(TIME, WIDTH)
    assert_close(call_ensemble(fast, x, states)[0], answers(name, x))
    with pytest.raises(ValueError, match="not an ensemble"):
        discretax.inference_state(fast, states)


@every_model
@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_streaming(name, batch_size):
    models, states = ensemble(name)
    remedy = r"`eqx\.filter_vmap\(discretax\.inference_state\)\(models, states\)`"
    with pytest.raises(ValueError, match=f"not an ensemble.*{remedy}"):
        discretax.inference_state(models, states, batch_size)
    streams = eqx.filter_vmap(discretax.inference_state)(models, states, batch_size)
    live = discretax.streaming_mode(models)
    x = draw(*(() if batch_size is None else (batch_size,)), TIME, WIDTH)

    def send(model, chunk, state):
        return model(chunk, state) if batch_size is None else jax.vmap(model)(chunk, state)

    send = eqx.filter_jit(eqx.filter_vmap(send, in_axes=(EVERY, ONE, EVERY)))
    ys = []
    for chunk in jnp.split(x, (5,), axis=-2):
        y, streams = send(live, chunk, streams)
        ys.append(y)
    rows = x[None] if batch_size is None else x
    expected = jnp.stack([answers(name, row) for row in rows], axis=1)
    assert_close(jnp.concatenate(ys, axis=-2), expected[:, 0] if batch_size is None else expected)


def test_resampled():
    models, states = ensemble("S5")
    slower = discretax.resampled(models, 0.5)
    x = draw(TIME, WIDTH)
    alone = [
        call(discretax.resampled(model, 0.5), x, state)[0]
        for model, state in zip(members(models), members(states), strict=True)
    ]
    assert_close(call_ensemble(slower, x, states)[0], jnp.stack(alone))


@pytest.mark.parametrize("function", ["eigenvalues", "frequency_response", "impulse_response"])
def test_inspection(function):
    inspect = {
        "eigenvalues": eigenvalues,
        "frequency_response": lambda mixer: frequency_response(mixer, jnp.array([0.1, 0.2])),
        "impulse_response": lambda mixer: impulse_response(mixer, 2),
    }[function]
    mixers = ensemble("S5")[0].blocks[0].sequence_mixer
    remedy = rf"`eqx\.filter_vmap\(lambda mixer: {function}\(mixer.*\)\)\(mixers\)`"
    with pytest.raises(ValueError, match=f"one `S5SequenceMixer`, not an ensemble.*{remedy}"):
        inspect(mixers)
    found = eqx.filter_vmap(inspect)(mixers)
    assert_close(found, jnp.stack([inspect(mixer) for mixer in members(mixers)]))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "IdentitySequenceMixer"], ids=str
)
def test_every_mixer_is_told_from_an_ensemble(case):
    """By the annotations of its fields, which therefore must be right. One has no arrays."""

    @jax.eval_shape  # there is nothing to compute
    def _():
        mixer = case.make(jr.key(0))
        state = eqx.nn.State(mixer)
        discretax.inference_state(mixer, state)
        ensemble = jax.tree.map(lambda leaf: leaf[None] if eqx.is_array(leaf) else leaf, mixer)
        with pytest.raises(ValueError, match="not an ensemble"):
            discretax.inference_state(ensemble, state)
