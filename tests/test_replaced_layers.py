"""Models with layers put in later, or put together from parts: they stream, or say what to do."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import FEATURES, STATE, TIME, assert_close, assert_equal, draw

import discretax
from discretax.architectures import LanguageModel
from discretax.blocks import StandardBlock
from discretax.channel_mixers import GLU
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU, BlockStack, scan_blocks
from discretax.sequence_mixers import LRUSequenceMixer

pytestmark = pytest.mark.slow

run = eqx.filter_jit(lambda model, x, state: model(x, state))
x = 2 + 3 * draw(TIME, FEATURES)


@ft.cache
def built(norm, seed=0):
    encoder_key, model_key, head_key = jr.split(jr.key(seed), 3)
    model, state = eqx.nn.make_with_state(eqx.nn.Sequential)(
        [
            LinearEncoder(FEATURES, encoder_key, out_features=FEATURES),
            LRU(model_key, hidden_dim=FEATURES, num_blocks=2, state_dim=STATE, norm=norm),
            ClassificationHead(FEATURES, 3, head_key),
        ]
    )
    # As training would: statistics that are not those of the beginning.
    return eqx.nn.inference_mode(model), jax.tree.map(lambda leaf: leaf + 1, state)


def new_block(norm, seed=1):
    make_mixer = ft.partial(LRUSequenceMixer, state_dim=STATE)
    return StandardBlock(
        FEATURES, jr.key(seed), sequence_mixer=make_mixer, channel_mixer=GLU, norm=norm
    )


def new_head():
    return ClassificationHead(FEATURES, 3, jr.key(2), pooling="max")


def replaced(model, where, layer):
    return eqx.nn.inference_mode(eqx.tree_at(where, model, layer))


def assert_streams(model, state, x=x):
    whole, _ = run(model, x, state)
    live = discretax.streaming_mode(model)
    stream = discretax.inference_state(model, state)
    ys = []
    for chunk in jnp.split(x, (5,)):
        y, stream = run(live, chunk, stream)
        ys.append(y)
    assert_close(ys[-1] if whole.ndim == 1 else jnp.concatenate(ys), whole)
    return stream


PARTS = {
    "head": (lambda model: model.layers[2], new_head),
    "block": (lambda model: model.layers[1].blocks[1], ft.partial(new_block, "layer")),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_replaced_layer_streams(part):
    model, state = built("layer")
    where, make = PARTS[part]
    model = replaced(model, where, make())
    stream = assert_streams(model, state)
    # Over again, and for several streams: from a state that knows the layer now.
    fresh = discretax.inference_state(model, stream, batch_size=2)
    assert all(len(leaf) == 2 for leaf in jax.tree.leaves(fresh))
    assert_equal(fresh, discretax.inference_state(model, state, batch_size=2))


def test_one_of_several_streams_learns_of_a_new_layer():
    model, state = built("layer")
    used = discretax.inference_state(model, state, batch_size=2)
    model = replaced(model, *(PARTS["head"][0], new_head()))
    again = discretax.inference_state(model, used, batch_size=3)
    fresh = discretax.inference_state(model, state, batch_size=3)
    assert_equal(again.substate(model), fresh.substate(model))


def test_a_new_norm_begins_with_its_initial_statistics():
    model, state = built("batch")
    model = replaced(model, PARTS["block"][0], new_block("batch"))
    with pytest.raises(ValueError, match=r"knows nothing of this `BatchNorm`.*inference_state"):
        model(x, state)
    completed = discretax.inference_state(model, state)
    blocks = model.layers[1].blocks
    assert_equal(completed.get(blocks[0].norm.statistics), state.get(blocks[0].norm.statistics))
    assert_equal(completed.get(blocks[1].norm.statistics), blocks[1].norm.statistics.init)
    assert_streams(model, completed)


def test_a_model_completed_so_can_be_trained():
    model, state = built("batch")
    model = eqx.tree_at(PARTS["block"][0], model, new_block("batch"))
    model = eqx.nn.inference_mode(model, False)
    state = discretax.inference_state(model, state)
    run = lambda x, state, key: model(x, state, key=key)
    batched = jax.vmap(run, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    _, after = jax.jit(batched)(jnp.stack([x, -x]), state, jr.split(jr.key(0)))
    norm = model.layers[1].blocks[1].norm
    assert jnp.any(after.get(norm.statistics)[1] != 0)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_scan_over_blocks_of_which_one_is_new(norm):
    model, state = built(norm)
    model = replaced(model, PARTS["block"][0], new_block(norm))
    state = state if norm == "layer" else discretax.inference_state(model, state)
    assert_close(run(scan_blocks(model), x, state)[0], run(model, x, state)[0])
    assert_streams(scan_blocks(model), state)


def test_a_scan_over_blocks_of_which_one_is_not_known():
    model, state = built("batch")
    model = replaced(model, PARTS["block"][0], new_block("batch"))
    with pytest.raises(ValueError, match="knows nothing of this `BatchNorm`"):
        scan_blocks(model)(x, state)


def test_parts_of_a_language_model():
    make_mixer = ft.partial(LRUSequenceMixer, state_dim=STATE)
    parts, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=5, hidden_dim=FEATURES, num_blocks=2, pattern=(make_mixer,)
    )
    model = eqx.nn.Sequential([parts.encoder, parts.backbone, new_head()])
    assert_streams(eqx.nn.inference_mode(model), state, jnp.arange(TIME) % 5)


# One place for two caches


def test_a_block_that_stands_twice():
    block = eqx.nn.inference_mode(new_block("layer"))
    model = BlockStack([block, block])
    state = eqx.nn.State(model)
    message = r"one for both `model\.blocks\[0\]` and `model\.blocks\[1\]`"
    with pytest.raises(ValueError, match=message) as caught:
        discretax.inference_state(model, state)
    remedy = (
        "eqx.tree_at(lambda model: model.blocks[1].cache_index, model, eqx.nn.StateIndex(None))"
    )
    assert f"`model = {remedy}`" in str(caught.value)
    model = eval(remedy, {"eqx": eqx, "model": model})
    assert_streams(model, state)


def test_a_block_of_another_model_of_the_kind():
    model, state = built("batch")
    other, other_state = built("batch", seed=5)
    other_state = jax.tree.map(lambda leaf: 3 * leaf, other_state)
    block = other.layers[1].blocks[0]
    model = replaced(model, lambda model: model.layers[1].blocks[1], block)
    with pytest.raises(ValueError, match=r"`model\.layers\[1\]\.blocks\[1\]`.*comes from another"):
        discretax.inference_state(model, state)
    values = other_state.get(block.norm.statistics)
    model = eqx.tree_at(
        lambda model: (
            model.layers[1].blocks[1].cache_index,
            model.layers[1].blocks[1].norm.statistics,
        ),
        model,
        (eqx.nn.StateIndex(None), eqx.nn.StateIndex(values)),
    )
    stream = discretax.inference_state(model, state)
    assert_equal(stream.get(model.layers[1].blocks[1].norm.statistics), values)
    assert_streams(model, stream)


def test_a_block_of_a_model_of_another_kind():
    model, state = built("batch")
    other, other_state = eqx.nn.make_with_state(new_block)("batch")
    other_state = jax.tree.map(lambda leaf: leaf + 3, other_state)
    model = replaced(model, PARTS["block"][0], other)
    message = r"a value for `model\.layers\[1\]\.blocks\[1\]\.norm\.statistics`.*another model"
    with pytest.raises(ValueError, match=message) as caught:
        discretax.inference_state(model, state)
    remedy = str(caught.value).split("`model = ")[1].split("`")[0]
    model = eval(remedy, {"eqx": eqx, "model": model, "other_state": other_state})
    stream = assert_streams(model, discretax.inference_state(model, state))
    statistics = model.layers[1].blocks[1].norm.statistics
    assert_equal(stream.get(statistics), other_state.get(other.norm.statistics))


# States that do not belong


def test_the_state_of_another_model():
    _, state = built("batch")
    model = LRU(jr.key(0), hidden_dim=FEATURES, num_blocks=1, state_dim=STATE)
    message = r"knows no layer of this `LRU`.*`model, state = eqx\.nn\.make_with_state\(Model\)"
    with pytest.raises(ValueError, match=message):
        discretax.inference_state(model, state)
    message = r"knows nothing of this `BatchNorm`: .*`model, state = eqx\.nn\.make_with_state"
    with pytest.raises(ValueError, match=message):
        eqx.nn.inference_mode(model)(x, state)
    live = discretax.streaming_mode(eqx.nn.inference_mode(new_block("layer")))
    with pytest.raises(ValueError, match="knows nothing of this `StandardBlock`"):
        live(x, state)


def test_a_state_in_the_place_of_the_model():
    model, state = built("layer")
    message = r"takes the model first, then its state; got State, then Sequential"
    with pytest.raises(TypeError, match=message):
        discretax.inference_state(state, model)
    with pytest.raises(TypeError, match=r"got Sequential, then NoneType.*make_with_state"):
        discretax.inference_state(model, None)
