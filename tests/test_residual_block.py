"""The block with a norm and a sum for each mixer, against its two equations."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    TIME,
    Leaky,
    assert_close,
    changed,
    draw,
    gelu,
    leaky,
    linear,
    nan_padded,
    normalise,
    numbers,
    sigmoid,
)

from discretax import Timeseries
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import GLU, IdentityChannelMixer, SwiGLU
from discretax.sequence_mixers import GatedSequenceMixer

GEGLU = ft.partial(SwiGLU, intermediate_dim=6, non_linearity="gelu")
run = eqx.filter_jit(lambda block, state, x, **options: block(x, state, **options))


def make(features=FEATURES, **options):
    options = {"sequence_mixer": Leaky, "channel_mixer": GEGLU} | options
    return eqx.nn.make_with_state(ResidualBlock)(features, jr.key(0), **options)


def gated_mlp(mixer, x, phi):
    return linear(mixer.down_proj, phi(linear(mixer.gate_proj, x)) * linear(mixer.up_proj, x))


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_against_the_equations(norm, prenorm):
    with jax.enable_x64(True):
        block, state = make(norm=norm, prenorm=prenorm)
        block = changed(block)
        x = draw(TIME, FEATURES)
        expected = numbers(x)
        for layer, mix in (
            (block.sequence_norm, lambda u: leaky(block.sequence_mixer, u)),
            (block.channel_norm, lambda u: gated_mlp(block.channel_mixer, u, gelu)),
        ):
            before = normalise(norm, layer, expected) if prenorm else expected
            expected = expected + mix(before)
            expected = expected if prenorm else normalise(norm, layer, expected)
        assert_close(run(block, state, x)[0], expected, 1e-12)


def test_batch_norms_have_statistics_of_their_own():
    block, state = make(norm="batch", drop_rate=0.0)
    batch = draw(3, TIME, FEATURES)
    batched = jax.vmap(block, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = eqx.filter_jit(batched)(batch, state)
    mean, _, weight = state.get(block.sequence_norm.statistics)
    assert_close(mean / weight, numbers(batch).mean((0, 1)), 1e-5)
    other_mean, _, _ = state.get(block.channel_norm.statistics)
    assert np.abs(other_mean - mean).max() > 1e-3


def test_timeseries():
    """Timesteps reach the mixer, padding reaches nothing, and a `Timeseries` comes out."""
    block, state = make()
    x = draw(TIME, FEATURES)
    gaps = jnp.linspace(0.0, 2.0, TIME)
    padded = nan_padded(x, 6)
    y, _ = run(block, state, Timeseries(padded.values, gaps, length=6))
    alone, _ = run(block, state, Timeseries(x[:6], gaps[:6]))
    assert_close(y.values[:6], alone.values)
    assert (y.timesteps == gaps).all() and y.length == 6
    assert np.abs(alone.values - run(block, state, x[:6])[0]).max() > 1e-2


def test_each_sum_drops_whole_features():
    """Dropped or doubled: over all of time, and each sum by its own draw."""
    features = 64
    block, state = make(features, channel_mixer=IdentityChannelMixer, norm=None, drop_rate=0.5)
    x = draw(TIME, features)
    y, _ = run(block, state, x, key=jr.key(1))
    kept = numbers(x) + 2 * leaky(block.sequence_mixer, x)
    candidates = np.stack([numbers(x), kept, 3 * numbers(x), 3 * kept])  # (2, 2) draws
    distances = np.abs(candidates - numbers(y)).max(axis=1)
    assert (distances.min(axis=0) < 1e-4).all()
    assert set(distances.argmin(axis=0).tolist()) == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "group"},
            "`norm` must be 'batch', 'layer', 'rms', None or a function .*; got 'group'",
        ),
        ({"drop_rate": 1.0}, r"`drop_rate` must lie in \[0, 1\); got 1.0"),
        ({"sequence_mixer": Leaky(3, jr.key(0))}, "`sequence_mixer` .*in_features=4; .*width 3"),
        ({"channel_mixer": GLU(5, jr.key(0))}, "`channel_mixer` .*in_features=4; got GLU"),
        (
            {"sequence_mixer": ft.partial(GatedSequenceMixer, sequence_mixer=Leaky, gate=2)},
            "output of width 8. Use `StandardBlock`",
        ),
    ],
)
def test_unfit_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_dropout_without_a_key():
    block, state = make(drop_rate=0.25)
    with pytest.raises(ValueError, match=r"`ResidualBlock` drops .*\(drop_rate=0.25\).*key=key"):
        block(jnp.ones((TIME, FEATURES)), state)


def test_gelu_or_swish():
    x = draw(TIME, FEATURES)
    for name, phi in (("gelu", gelu), ("swish", lambda v: v * sigmoid(v))):
        mixer = SwiGLU(FEATURES, jr.key(0), intermediate_dim=6, non_linearity=name)
        assert_close(mixer(x), gated_mlp(mixer, numbers(x), phi))
    with pytest.raises(ValueError, match=r"`non_linearity` must be one of .*'gelu'.*; got 'glu'"):
        SwiGLU(FEATURES, jr.key(0), non_linearity="glu")
