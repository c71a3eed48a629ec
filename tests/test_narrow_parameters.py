"""Layers whose parameters are of half the width compute what the same numbers in float32 do.

Of mixers it is a law.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close, changed, draw, numbers

from discretax.architectures import LanguageModel
from discretax.blocks import BatchNorm, OffsetRMSNorm, StandardBlock
from discretax.channel_mixers import GLU, HalfGLU, MLPChannelMixer, SwiGLU
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead, LanguageModelHead, RegressionHead
from discretax.sequence_mixers import LRUSequenceMixer

pytestmark = pytest.mark.slow

WIDTH, TIME, BATCH = 4, 7, 3
block = ft.partial(
    StandardBlock,
    WIDTH,
    sequence_mixer=ft.partial(LRUSequenceMixer, state_dim=3),
    drop_rate=0.0,
)
LAYERS = {
    **{
        f"norm {norm}": ft.partial(block, channel_mixer=GLU, norm=norm) for norm in ("layer", "rms")
    },
    "norm offset rms": ft.partial(block, channel_mixer=GLU, norm=OffsetRMSNorm),
    "norm batch": ft.partial(block, channel_mixer=GLU, norm="batch"),
    **{
        mixer.__name__: ft.partial(block, channel_mixer=mixer, norm=None)
        for mixer in (HalfGLU, MLPChannelMixer, SwiGLU)
    },
    "LinearEncoder": ft.partial(LinearEncoder, WIDTH, out_features=3, use_bias=True),
    "ClassificationHead": ft.partial(ClassificationHead, WIDTH, 3),
    "RegressionHead": ft.partial(RegressionHead, WIDTH, 3, reduce=False),
    "LanguageModelHead": ft.partial(LanguageModelHead, WIDTH, 3, soft_cap=2.0),
    "LanguageModel": ft.partial(
        LanguageModel,
        vocab_size=5,
        hidden_dim=WIDTH,
        num_blocks=1,
        pattern=(LRUSequenceMixer,),
        dtype=jnp.float32,
    ),
}


def cast(tree, dtype):
    return jax.tree.map(lambda p: p.astype(dtype) if eqx.is_inexact_array(p) else p, tree)


@eqx.filter_jit
def train(layer, state, x):
    run = lambda x: layer(x, state)
    return jax.vmap(run, axis_name="batch", out_axes=(0, None))(x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, state = eqx.nn.make_with_state(LAYERS[name])(jr.key(0))
    x = draw(BATCH, TIME, WIDTH)
    if name == "LanguageModel":
        x = jr.randint(jr.key(1), (BATCH, TIME), 0, 5)
    narrow = cast(changed(layer), jnp.bfloat16)
    outcome = train(narrow, state, x)
    assert outcome[0].dtype == jnp.float32
    assert_close(outcome, train(cast(narrow, jnp.float32), state, x), 1e-6)


def test_statistics_of_half_the_width():
    """They are blended, and divided by their weight, in float32, and rounded when they are kept."""
    norm = cast(BatchNorm(WIDTH), jnp.bfloat16)
    state = eqx.nn.State(norm)
    x = 3 + draw(BATCH, TIME, WIDTH)
    y, state = train(norm, state, x)
    mean, var, weight = state.get(norm.statistics)
    assert mean.dtype == jnp.bfloat16
    rounded = lambda value: numbers(jnp.asarray(value, jnp.bfloat16))
    assert_close(numbers(mean), rounded(0.05 * numbers(x).mean((0, 1))), 1e-6)
    assert_close(numbers(var), rounded(0.05 * numbers(x).var((0, 1))), 1e-6)
    y, _ = train(eqx.nn.inference_mode(norm), state, x)
    mean, var = (numbers(value) / numbers(weight) for value in (mean, var))
    assert_close(y, (numbers(x) - mean) / (var + 1e-5) ** 0.5, 1e-6)
