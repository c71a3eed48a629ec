"""Blocks in one loop and blocks run again backward: the numbers of blocks one by one."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close, changed, draw

from discretax import Timeseries, inference_state, streaming_mode
from discretax.models import HGRN2, LRU, RWKV7, Griffin, remat_blocks, scan_blocks
from discretax.sequence_mixers import LRUSequenceMixer

pytestmark = pytest.mark.slow

TIME, WIDTH, BATCH = 9, 4, 3
MODELS = {
    "LRU": ft.partial(LRU, hidden_dim=WIDTH, num_blocks=3, state_dim=3),
    # Two recurrent blocks and one of attention, twice, and the beginning of a third time.
    "Griffin": ft.partial(
        Griffin, hidden_dim=WIDTH, num_blocks=7, num_heads=1, window=4, drop_rate=0.1
    ),
    # Whose bounds are set when it is called.
    "HGRN2": ft.partial(HGRN2, hidden_dim=WIDTH, num_blocks=3, num_heads=1, intermediate_dim=3),
}
every_model = pytest.mark.parametrize("name", MODELS)
WAYS = scan_blocks, remat_blocks, lambda model: remat_blocks(scan_blocks(model))


@ft.cache
def make(name):
    model, state = eqx.nn.make_with_state(MODELS[name])(jr.key(0))
    return changed(model), state


@eqx.filter_jit
def outcome(model, state, x, length):
    """Output, state and gradients of a training step on a batch of unequal lengths."""

    def loss(arguments):
        model, x = arguments
        run = lambda x, length, key: model(Timeseries(x, length=length), state, key=key)
        y, new_state = jax.vmap(run, axis_name="batch", out_axes=(0, None))(
            x, length, jr.split(jr.key(2), BATCH)
        )
        return jnp.sum(jnp.sin(y.values)), (y.values, new_state)

    (_, aux), gradients = eqx.filter_value_and_grad(loss, has_aux=True)((model, x))
    return aux, gradients


@every_model
def test_same_numbers(name):
    model, state = make(name)
    x, length = draw(BATCH, TIME, WIDTH), jnp.array([TIME, 4, 1])
    expected = outcome(model, state, x, length)
    for way in WAYS:
        assert_close(outcome(way(model), state, x, length), expected)
    assert_close(outcome(scan_blocks(model, False), state, x, length), expected, 0)


def test_state_can_be_used_again():
    """As with the blocks one by one: where nothing is written, the caller's state stays valid."""
    model, state = eqx.nn.make_with_state(MODELS["LRU"])(jr.key(0), norm="layer", drop_rate=0.0)
    deep, x = scan_blocks(model), draw(TIME, WIDTH)
    assert_close(deep(x, state)[0], deep(x, state)[0], 0)


@every_model
def test_streaming_in_a_loop(name):
    model, state = make(name)
    live = streaming_mode(eqx.nn.inference_mode(model))
    x, outputs = draw(TIME, WIDTH), {}
    for kind, way in (("one by one", live), ("scan", scan_blocks(live))):
        stream = inference_state(way, state, max_seqlen=TIME)
        run = eqx.filter_jit(lambda model, x, state: model(x, state))
        ys = []
        for start, end in ((0, 4), (4, 5), (5, TIME)):
            y, stream = run(way, x[start:end], stream)
            ys.append(y)
        outputs[kind] = ys, stream
    assert_close(outputs["scan"], outputs["one by one"])


def products(model, state):
    """How many matrix products the code of a forward pass has."""

    def count(jaxpr):
        """In each call of a function: text has what calls share only once."""
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            for part in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(part, "jaxpr", part)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(lambda x: model(x, state)[0])(draw(TIME, WIDTH)).jaxpr)


def test_a_loop_is_compiled_once():
    counts = {}
    for depth in (2, 8):
        model, state = eqx.nn.make_with_state(LRU)(
            jr.key(0), hidden_dim=WIDTH, num_blocks=depth, norm="layer"
        )
        model = eqx.nn.inference_mode(model)
        counts[depth] = products(model, state), products(scan_blocks(model), state)
    assert counts[8][0] == 4 * counts[2][0]
    assert counts[8][1] == counts[2][1] == counts[2][0] / 2


def test_a_loop_between_blocks_of_other_kinds():
    """The first of RWKV-7's blocks puts values out, which the last does not hand on."""
    counts, x = {}, draw(TIME, WIDTH)
    for depth in (8, 4):
        model, state = eqx.nn.make_with_state(RWKV7)(
            jr.key(0), hidden_dim=WIDTH, num_blocks=depth, head_dim=WIDTH, drop_rate=0.5
        )
        evaluate = eqx.nn.inference_mode(model)
        counts[depth] = products(scan_blocks(evaluate), state)
    assert counts[8] == counts[4] < products(evaluate, state)
    run = eqx.filter_jit(lambda model: model(x, state, jr.key(1))[0])
    model = changed(model)
    assert_close(run(scan_blocks(model)), run(model))


def test_blocks_that_differ_stay_apart():
    """The middle one has another constant, or arrays of other shapes."""
    model, state = make("LRU")
    smaller = LRUSequenceMixer(WIDTH, jr.key(0), state_dim=2)
    for where, value in (
        (lambda m: m.blocks[1].dropout.p, 0.5),
        (lambda m: m.blocks[1].sequence_mixer, smaller),
    ):
        uneven = eqx.nn.inference_mode(eqx.tree_at(where, model, value))
        assert products(scan_blocks(uneven), state) == products(uneven, state)


def test_nothing_to_scan():
    for change in (scan_blocks, remat_blocks):
        with pytest.raises(ValueError, match=r"no blocks .*; got Linear"):
            change(eqx.nn.Linear(2, 2, key=jr.key(0)))
