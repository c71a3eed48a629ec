"""Streaming in training mode: exact where nothing speaks against it, refused elsewhere."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, STATE, TIME, assert_close, draw

from discretax import Timeseries, inference_state, streaming_mode
from discretax.architectures import LanguageModel
from discretax.blocks import BatchNorm
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU
from discretax.sequence_mixers import MinGRUSequenceMixer

pytestmark = pytest.mark.slow

CUT = 4
RESETS = np.arange(TIME) == 2


def classifier(**options):
    keys = jr.split(jr.key(0), 3)
    layers = [
        LinearEncoder(FEATURES, keys[0], out_features=FEATURES),
        LRU(keys[1], hidden_dim=FEATURES, num_blocks=1, state_dim=STATE, **options),
        ClassificationHead(FEATURES, 2, keys[2]),
    ]
    return eqx.nn.make_with_state(lambda: eqx.nn.Sequential(layers))()


def language_model(**options):
    mixer = ft.partial(MinGRUSequenceMixer)
    return eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=5, hidden_dim=FEATURES, num_blocks=1, pattern=(mixer,), **options
    )


def embedding():
    return eqx.nn.make_with_state(EmbeddingEncoder)(5, FEATURES, key=jr.key(0), drop_rate=0.5)


def part(x, start, end):
    return Timeseries(x[start:end], resets=jnp.asarray(RESETS[start:end]))


def answers(live, x, stream, truncated=False):
    """Of two chunks."""
    first, stream = live(part(x, 0, CUT), stream)
    if truncated:
        stream = jax.lax.stop_gradient(stream)
    second, stream = live(part(x, CUT, TIME), stream)
    return first, second, stream


TOKENS = jnp.arange(TIME) % 5
MODELS = {
    "layer": (ft.partial(classifier, norm="layer", drop_rate=0.0), draw(TIME, FEATURES)),
    "language model": (language_model, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_chunks_in_training_mode_are_those_of_inference_mode(name):
    make, x = MODELS[name]
    model, state = make()

    @eqx.filter_jit
    def both(model):
        run = lambda model: answers(streaming_mode(model), x, inference_state(model, state))
        return run(model), run(eqx.nn.inference_mode(model))

    training, inference = both(model)
    assert_close(training, inference, rtol=0)


def test_gradients_reach_back_as_far_as_they_are_let():
    """Through both chunks, those of the whole. Cut between them, each chunk's own, added up."""
    model, state = classifier(norm="layer", drop_rate=0.0)
    x, weights = draw(TIME, FEATURES), draw(2, 2, seed=3)

    fresh = ft.partial(inference_state, model, state)

    def loss(model, truncated):
        first, second, _ = answers(streaming_mode(model), x, fresh(), truncated)
        return (weights * jnp.stack([first, second])).sum()

    def whole(model):
        first, _ = model(part(x, 0, CUT), state)
        second, _ = model(part(x, 0, TIME), state)
        return (weights * jnp.stack([first, second])).sum()

    def second_alone(model, stream):
        y, _ = streaming_mode(model)(part(x, CUT, TIME), stream)
        return (weights[1] * y).sum()

    def first_alone(model):
        y, stream = streaming_mode(model)(part(x, 0, CUT), fresh())
        return (weights[0] * y).sum(), stream

    @eqx.filter_jit
    def gradients(model):
        through = eqx.filter_grad(ft.partial(loss, truncated=False))(model)
        cut = eqx.filter_grad(ft.partial(loss, truncated=True))(model)
        first, carried = eqx.filter_grad(first_alone, has_aux=True)(model)
        second = eqx.filter_grad(second_alone)(model, carried)
        parts = jax.tree.map(jnp.add, first, second)
        return through, eqx.filter_grad(whole)(model), cut, parts

    through, expected, cut, parts = gradients(model)
    assert_close(through, expected)
    assert_close(cut, parts)
    with pytest.raises(AssertionError):
        assert_close(cut, through, rtol=1e-2)


REMEDY = r"inference mode only.*eqx\.nn\.inference_mode\(model\).*{}.*{}"


@pytest.mark.parametrize(
    "make, says",
    [
        (ft.partial(classifier, drop_rate=0.0), ("batch", 'norm="layer"', "drop_rate=0")),
        (ft.partial(classifier, norm=None), ("drop_rate=0.1", "drop_rate=0", 'norm="layer"')),
        (lambda: eqx.nn.make_with_state(BatchNorm)(FEATURES), ("batch", "layer", "drop_rate=0")),
        (embedding, ("`EmbeddingEncoder`.*drop_rate=0.5", "drop_rate=0", "layer")),
    ],
    ids=["batch norm", "dropout", "a batch norm by itself", "dropout of an encoder"],
)
def test_what_is_not_exact_is_refused(make, says):
    model, state = make()
    x = jnp.stack([TOKENS] * 2) if make is embedding else draw(2, TIME, FEATURES)
    live = jax.vmap(streaming_mode(model), axis_name="batch")
    what, *remedy = says
    stream = inference_state(model, state, batch_size=2)
    with pytest.raises(ValueError, match=what) as caught:
        jax.eval_shape(live, x, stream, key=jr.split(jr.key(1)))
    caught.match(REMEDY.format(*remedy))
    jax.eval_shape(jax.vmap(streaming_mode(eqx.nn.inference_mode(model))), x, stream)
