"""How every stateful layer is called: `(x, state, key)`, the key in third place or by name."""

import functools as ft
import importlib
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import FEATURES, STATE, TIME, assert_equal, draw

from discretax.architectures import LanguageModel
from discretax.blocks import BatchNorm, ResidualBlock, StandardBlock
from discretax.channel_mixers import GLU
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.heads import ClassificationHead, LanguageModelHead, Pooling
from discretax.models import LRU, remat_blocks, scan_blocks
from discretax.sequence_mixers import LRUSequenceMixer

pytestmark = pytest.mark.slow

ROOMS = ("architectures", "blocks", "encoder", "heads", "models", "rates")


def stateful_layers():
    return sorted(
        {
            value
            for room in ROOMS
            for value in vars(importlib.import_module(f"discretax.{room}")).values()
            if inspect.isclass(value) and issubclass(value, eqx.nn.StatefulLayer)
        },
        key=lambda layer: layer.__name__,
    )


@pytest.mark.parametrize("layer", stateful_layers(), ids=lambda layer: layer.__name__)
def test_every_stateful_layer_takes_the_key_in_third_place(layer):
    signature = inspect.signature(layer.__call__)
    assert signature.bind("self", "x", "state", "key").arguments["key"] == "key"
    assert signature.bind("self", "x", state="state", key="key").arguments["key"] == "key"
    assert signature.parameters["key"].default is None


make_mixer = ft.partial(LRUSequenceMixer, state_dim=STATE)
options = {"sequence_mixer": make_mixer, "channel_mixer": GLU, "norm": "layer", "drop_rate": 0.5}
make_lru = ft.partial(
    LRU, jr.key(0), hidden_dim=FEATURES, num_blocks=2, state_dim=STATE, norm="layer", drop_rate=0.5
)
samples, tokens = draw(TIME, FEATURES), jnp.arange(TIME) % 3
DRAWING = {
    "StandardBlock": (lambda: StandardBlock(FEATURES, jr.key(0), **options), samples),
    "ResidualBlock": (lambda: ResidualBlock(FEATURES, jr.key(0), **options), samples),
    "LRU": (make_lru, samples),
    "scan_blocks": (lambda: scan_blocks(make_lru()), samples),
    "remat_blocks": (lambda: remat_blocks(make_lru()), samples),
    "LanguageModel": (
        lambda: LanguageModel(
            jr.key(0),
            vocab_size=3,
            hidden_dim=FEATURES,
            num_blocks=1,
            pattern=(make_mixer,),
            drop_rate=0.5,
        ),
        tokens,
    ),
}
DETERMINISTIC = {
    "BatchNorm": (lambda: eqx.nn.inference_mode(BatchNorm(FEATURES)), samples),
    "LinearEncoder": (lambda: LinearEncoder(FEATURES, jr.key(0), out_features=2), samples),
    "EmbeddingEncoder": (
        lambda: EmbeddingEncoder(jr.key(0), num_classes=3, out_features=2),
        tokens,
    ),
    "Pooling": (lambda: Pooling(FEATURES), samples),
    "ClassificationHead": (lambda: ClassificationHead(FEATURES, 2, jr.key(0)), samples),
    "LanguageModelHead": (lambda: LanguageModelHead(FEATURES, 2, jr.key(0)), samples),
}


@pytest.mark.parametrize("name", DRAWING | DETERMINISTIC)
def test_the_key_in_third_place_is_the_key_by_name(name):
    make, x = (DRAWING | DETERMINISTIC)[name]
    layer, state = eqx.nn.make_with_state(make)()

    @eqx.filter_jit
    def outputs():
        calls = (
            layer(x, state, jr.key(1)),
            layer(x, state, key=jr.key(1)),
            layer(x, state, jr.key(2)),
        )
        return [y for y, _ in calls]

    by_position, by_name, other_key = outputs()
    assert_equal(by_position, by_name)
    assert bool(jnp.any(by_position != other_key)) == (name in DRAWING)


def test_the_loss_of_a_language_model_takes_the_key_in_third_place():
    make, x = DRAWING["LanguageModel"]
    model, state = eqx.nn.make_with_state(make)()
    assert_equal(model.loss(x, state, jr.key(1))[0], model.loss(x, state, key=jr.key(1))[0])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_sequential_gives_every_layer_its_key(name):
    make, x = DETERMINISTIC[name]
    model, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([make()]))()
    y, _ = model(x, state, key=jr.key(1))
    assert jax.tree.leaves(y)
