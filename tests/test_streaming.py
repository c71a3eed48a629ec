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
    nan_padded,
)
from jax import lax

import discretax
from discretax import Timeseries, discretized, inference_state, streaming_mode
from discretax.blocks import StandardBlock
from discretax.channel_mixers import GLU
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead, Pooling
from discretax.models import LRU, Backbone
from discretax.sequence_mixers import Bidirectional, Discretized, LRUSequenceMixer
from discretax.testing import check_streaming

pytestmark = pytest.mark.slow

WIDTH, CLASSES, BATCH = 4, 3, 3


def draw_batch():
    """Samples far from zero mean and unit variance, as untrained statistics would have it."""
    return 2 + 3 * draw(BATCH, TIME, FEATURES)


@ft.cache
def trained(norm, prenorm=True):
    """A classifier after three steps of gradient descent, in inference mode, and its state."""
    encoder_key, model_key, head_key = jr.split(jr.key(0), 3)
    model, state = eqx.nn.make_with_state(eqx.nn.Sequential)(
        [
            LinearEncoder(FEATURES, encoder_key, out_features=WIDTH),
            LRU(
                model_key,
                hidden_dim=WIDTH,
                num_blocks=2,
                state_dim=STATE,
                prenorm=prenorm,
                norm=norm,
            ),
            ClassificationHead(WIDTH, CLASSES, head_key),
        ]
    )

    @eqx.filter_jit
    def step(model, state, keys):
        def loss(model, state):
            run = lambda x, state, key: model(x, state, key=key)
            y, state = jax.vmap(run, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
                draw_batch(), state, keys
            )
            return -jnp.mean(y[:, 0]), state

        grad, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.05 * g, grad)), state

    for seed in range(3):
        model, state = step(model, state, jr.split(jr.key(seed), BATCH))
    return eqx.nn.inference_mode(model), state


def trained_per_step(norm, prenorm=True):
    """The same with an answer at every time step."""
    model, state = trained(norm, prenorm)
    return eqx.tree_at(lambda m: m[-1].pooled_linear.pooling, model, None), state


@eqx.filter_jit
def run(model, state, x):
    return model(x, state)


@eqx.filter_jit
def run_batch(model, state, x):
    """One stream per row, each with its own state."""
    return jax.vmap(model)(x, state)


@eqx.filter_jit
def evaluate(model, state, x, lengths):
    run = lambda x, length: model(Timeseries(x, length=length), state)[0]
    return jax.vmap(run)(x, jnp.broadcast_to(lengths, len(x)))


@eqx.filter_jit
def evaluate_arrays(model, state, x):
    return jax.vmap(lambda x: model(x, state)[0])(x)


def edges(cuts):
    return zip((0, *cuts), (*cuts, TIME), strict=True)


def stream(live, state, x, cuts=(5, 6)):
    """The outputs of all chunks and the last state; `x` with a batch axis or without."""
    ys, batched = [], x.ndim == 3
    for start, end in edges(cuts):
        chunk = x[..., start:end, :]
        y, state = (run_batch if batched else run)(live, state, chunk)
        ys.append(y)
    return ys, state


def layers_of(model, kind):
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(model, is_leaf=is_kind) if is_kind(node)]


def statistics(model, state):
    norms = layers_of(model, discretax.blocks.BatchNorm)
    return [state.get(norm.statistics) for norm in norms]


def caches(model, state):
    layers = layers_of(model, (StandardBlock, Pooling))
    return [state.get(layer.cache_index) for layer in layers]


def test_training_moved_the_statistics():
    mean, var, weight = statistics(*trained("batch"))[0]
    assert np.abs(mean / weight).max() > 0.5
    assert np.abs(var / weight - 1).max() > 0.5


@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_answers_so_far_are_those_of_the_whole(norm):
    check_streaming(*trained(norm), draw_batch()[1])


@pytest.mark.parametrize(
    "norm, prenorm", [("batch", True), ("layer", True), (None, True), ("batch", False)]
)
def test_answers_to_samples_are_those_of_the_whole(norm, prenorm):
    check_streaming(*trained_per_step(norm, prenorm), draw_batch()[1])


def test_eager_is_jit():
    model, state = trained("batch")
    live, x = streaming_mode(model), draw_batch()[0]
    y, stream_state = live(x[:5], inference_state(model, state))
    y_jit, stream_state_jit = run(live, inference_state(model, state), x[:5])
    assert_close((y, stream_state), (y_jit, stream_state_jit))


def test_samples_in_a_scan():
    model, state = trained_per_step("batch")
    live, x = streaming_mode(model), draw_batch()[0]

    def step(state, sample):
        y, state = live(sample[None], state)
        return state, y[0]

    # jitted together, as generating samples would be
    go = eqx.filter_jit(lambda state: lax.scan(step, inference_state(model, state), x)[1])
    assert_close(go(state), evaluate_arrays(model, state, x[None])[0])


def test_discretized_before_streaming():
    model, state = trained("batch")
    x = draw_batch()
    live = streaming_mode(discretized(model))
    ys, _ = stream(live, inference_state(live, state, BATCH), x)
    assert_close(ys[-1], evaluate_arrays(model, state, x))


def test_a_mixer_with_a_cache_of_several_parts():
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=FEATURES, sequence_mixer=Leaky, num_blocks=2, norm="layer"
    )
    model = eqx.nn.inference_mode(model)
    x = draw_batch()
    ys, new_state = stream(streaming_mode(model), inference_state(model, state, BATCH), x)
    assert_close(jnp.concatenate(ys, axis=1), evaluate_arrays(model, state, x))
    for cache in caches(model, new_state):
        assert_equal(cache["count"], np.full(BATCH, TIME))


def test_bfloat16_activations_keep_float32_caches():
    model, state = trained_per_step("batch")
    x = draw_batch()
    ys, new_state = stream(
        streaming_mode(model), inference_state(model, state, BATCH), x.astype(jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state)} == {jnp.dtype(jnp.float32)}
    y = jnp.concatenate(ys, axis=1).astype(jnp.float32)
    assert_close(y, evaluate_arrays(model, state, x), rtol=2e-2)


# Lengths


def test_streams_that_go_on_at_different_rates():
    model, state = trained("batch")
    live, x = streaming_mode(model), draw_batch()
    stream_state = inference_state(model, state, batch_size=BATCH)
    so_far = jnp.zeros(BATCH, int)
    for lengths in ((2, 0, 5), (0, 0, 3), (5, 1, 0), (1, 5, 3)):
        lengths = jnp.array(lengths)
        rows = jnp.clip(so_far[:, None] + jnp.arange(5)[None], 0, TIME - 1)
        chunk = jax.vmap(nan_padded)(jnp.take_along_axis(x, rows[..., None], axis=1), lengths)
        y, stream_state = run_batch(live, stream_state, chunk)
        so_far += lengths
        assert_close(y, evaluate(model, state, x, so_far))


# States


@pytest.mark.parametrize("before, after", [(None, BATCH), (2, BATCH), (2, None), (1, 1)])
def test_batch_size_of_a_used_state_may_change(before, after):
    model, state = trained("batch")
    live, x = streaming_mode(model), draw_batch()[:1]
    x_for = lambda size: x[0] if size is None else jnp.repeat(x, size, 0)
    _, used = stream(live, inference_state(model, state, before), x_for(before))
    again = inference_state(model, used, after)
    fresh = inference_state(model, state, after)
    assert jax.tree.structure(again) == jax.tree.structure(fresh)
    assert_equal(again, fresh)
    ys, _ = stream(live, again, x_for(after))
    expected = evaluate_arrays(model, state, x)[0]
    assert_close(ys[-1], np.broadcast_to(expected, ys[-1].shape))


def test_the_given_state_stays_usable():
    model, state = trained("batch")
    x = draw_batch()
    expected = evaluate_arrays(model, state, x)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    live = streaming_mode(model)
    stream(live, inference_state(model, state, BATCH), x)
    live(x[0], inference_state(model, state))
    assert_equal(state, before)
    assert_equal(evaluate_arrays(model, state, x), expected)
    used = stream(live, inference_state(model, state, BATCH), x, cuts=(5, 6))[1]
    inference_state(model, used)
    assert run_batch(live, used, x)[0].shape == (BATCH, CLASSES)


def test_trained_statistics_are_kept_and_caches_are_empty():
    model, state = trained("batch")
    stream_state = inference_state(model, state, batch_size=BATCH)
    repeated = jax.tree.map(lambda leaf: np.stack([leaf] * BATCH), statistics(model, state))
    assert_equal(statistics(model, stream_state), repeated)
    empty = caches(model, stream_state)
    assert len(jax.tree.leaves(empty)) == 3  # two recurrences, and the sums of the head
    assert all(not np.any(leaf) and len(leaf) == BATCH for leaf in jax.tree.leaves(empty))


def test_streaming_leaves_the_statistics_alone():
    model, state = trained("batch")
    before = inference_state(model, state)
    _, after = stream(streaming_mode(model), before, draw_batch()[0])
    assert_equal(statistics(model, after), statistics(model, before))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtype_of_the_caches(dtype):
    model, state = trained("batch")
    stream_state = inference_state(model, state, BATCH, dtype=dtype)
    of_type = lambda tree: {leaf.dtype for leaf in jax.tree.leaves(tree)} - {jnp.dtype(jnp.int32)}
    of_head = caches(model[-1], stream_state)
    of_mixers = caches(model[:-1], stream_state)
    assert of_type(of_mixers) == {jnp.dtype(dtype or jnp.float32)}
    assert of_type(of_head) == {jnp.dtype(jnp.float32)}  # a sum over a long stream
    assert of_type(statistics(model, stream_state)) == {jnp.dtype(jnp.float32)}
    x = draw_batch()
    ys, _ = stream(streaming_mode(model), stream_state, x, cuts=(5, 6))
    rtol = 1e-5 if dtype is None else 2e-2
    assert_close(ys[-1], evaluate_arrays(model, state, x), rtol=rtol)


def test_nothing_to_stream():
    encoder = LinearEncoder(FEATURES, jr.key(0), out_features=2)
    state = eqx.nn.State(encoder)
    assert_equal(inference_state(encoder, state, batch_size=2), state)
    assert streaming_mode(encoder) is encoder


def test_streaming_mode_can_be_left():
    model, state = trained("batch")
    back = streaming_mode(streaming_mode(model), False)
    x = draw_batch()[0]
    assert_equal(run(back, state, x)[0], run(model, state, x)[0])


# Discretized


def test_discretized_gives_the_same_outputs():
    model, state = trained("batch")
    x = draw_batch()
    fast = discretized(model)
    assert len(layers_of(fast, Discretized)) == 2
    assert_close(evaluate_arrays(fast, state, x), evaluate_arrays(model, state, x), rtol=1e-6)


def test_discretized_twice_is_discretized_once():
    model, _ = trained("batch")
    once = discretized(model)
    twice = discretized(once)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert_equal(eqx.filter(twice, eqx.is_array), eqx.filter(once, eqx.is_array))
    assert len(layers_of(model, Discretized)) == 0


def bidirectional(in_features, *, key):
    make = lambda key: LRUSequenceMixer(in_features, key, state_dim=STATE)
    return Bidirectional(*(make(k) for k in jr.split(key)))


@ft.cache
def bidirectional_model():
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=FEATURES, sequence_mixer=bidirectional, num_blocks=1, norm="layer"
    )
    return eqx.nn.inference_mode(model), state


def test_discretized_inside_bidirectional():
    model, state = bidirectional_model()
    fast = discretized(model)
    mixer = fast.blocks[0].sequence_mixer
    assert isinstance(mixer.forward, Discretized)
    assert isinstance(mixer.backward, Discretized)
    x = draw_batch()
    assert_close(evaluate_arrays(fast, state, x), evaluate_arrays(model, state, x), rtol=1e-6)


def test_discretized_leaves_other_mixers():
    model, _ = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=FEATURES, sequence_mixer=Leaky, num_blocks=1
    )
    assert eqx.tree_equal(discretized(model), model)


# Errors


def block():
    return StandardBlock(
        FEATURES,
        jr.key(0),
        sequence_mixer=ft.partial(LRUSequenceMixer, state_dim=STATE),
        channel_mixer=GLU,
        drop_rate=0.0,
        norm=None,
    )


def head():
    return ClassificationHead(FEATURES, CLASSES, jr.key(0))


STATEFUL = {
    "LinearEncoder": lambda: LinearEncoder(FEATURES, jr.key(0), out_features=FEATURES),
    "StandardBlock": block,
    "LRU": lambda: LRU(jr.key(0), hidden_dim=FEATURES, num_blocks=1, state_dim=STATE),
    "ClassificationHead": head,
    "BatchNorm": lambda: discretax.blocks.BatchNorm(FEATURES),
}
X = jnp.zeros((TIME, FEATURES))
REMEDY = r"`y, state = model\(x, state\)`.*eqx\.nn\.make_with_state.*eqx\.nn\.State\(model\)"


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("state, received", [(None, "NoneType"), ({}, "dict")])
def test_something_else_for_a_state(name, state, received):
    layer = STATEFUL[name]()
    with pytest.raises(ValueError, match=f"`{name}` needs the model's state") as caught:
        layer(X, state)
    assert f"got {received} for `state`" in str(caught.value)
    caught.match(REMEDY)


@pytest.mark.parametrize("name", ["LinearEncoder", "StandardBlock", "LRU", "ClassificationHead"])
def test_sequential_without_a_state(name):
    with pytest.raises(ValueError, match=f"`{name}` needs the model's state") as caught:
        eqx.nn.Sequential([eqx.nn.Identity(), STATEFUL[name]()])(X)
    assert "got nothing for `state`" in str(caught.value)
    caught.match(REMEDY)


@pytest.mark.parametrize("make, name", [(block, "StandardBlock"), (head, "Pooling")])
def test_streaming_without_a_cache(make, name):
    layer, state = eqx.nn.make_with_state(make)()
    live = streaming_mode(eqx.nn.inference_mode(layer))
    message = rf"no inference cache for `{name}`.*inference_state\(model, state\).*batch_size=8"
    with pytest.raises(ValueError, match=message):
        live(X, state)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size):
    model, state = trained("batch")
    with pytest.raises(ValueError, match=f"`batch_size` must be .* 1; got {batch_size}"):
        inference_state(model, state, batch_size=batch_size)


def test_a_batched_state_without_vmap():
    layer, state = eqx.nn.make_with_state(block)()
    live = streaming_mode(eqx.nn.inference_mode(layer))
    with pytest.raises(ValueError, match=r"cache of shapes \(2, 3\); got \(8, 2, 3\).*`jax\.vmap`"):
        live(X, inference_state(layer, state, batch_size=8))


@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_bidirectional_refuses(batch_size):
    model, state = bidirectional_model()
    with pytest.raises(ValueError, match=r"`Bidirectional` cannot stream.*whole sequences.*causal"):
        inference_state(model, state, batch_size=batch_size)
