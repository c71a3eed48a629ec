"""Sizes first and the key by name, or the key where it always stood; without one, an error."""

import functools as ft
import inspect

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from discretax import (
    architectures,
    blocks,
    channel_mixers,
    encoder,
    heads,
    models,
    rates,
    sequence_mixers,
)
from discretax.channel_mixers import GLU, HalfGLU, IdentityChannelMixer, MLPChannelMixer, SwiGLU
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.models import BlockStack
from discretax.sequence_mixers import Bidirectional, IdentitySequenceMixer, LRUSequenceMixer

KEY = jr.key(0)
small = ft.partial(LRUSequenceMixer, state_dim=2)
make_block = ft.partial(
    blocks.StandardBlock, sequence_mixer=IdentitySequenceMixer, channel_mixer=IdentityChannelMixer
)
ROOMS = (architectures, blocks, channel_mixers, encoder, heads, models, rates, sequence_mixers)
OF_ROOMS = {cls for room in ROOMS for cls in vars(room).values() if inspect.isclass(cls)}
WITH_KEY = {
    cls: inspect.signature(cls).parameters["key"]
    for cls in OF_ROOMS
    if issubclass(cls, eqx.Module) and "key" in inspect.signature(cls).parameters
}


@pytest.mark.parametrize(
    "cls", [LinearEncoder, GLU, HalfGLU, MLPChannelMixer, IdentityChannelMixer]
)
def test_spellings_of_two_sizes(cls):
    expected = cls(in_features=3, out_features=3, key=KEY)
    for layer in (
        cls(3, 3, key=KEY),
        cls(3, 3, KEY),
        cls(np.int64(3), jnp.asarray(3), KEY),
        cls(3, KEY, out_features=3),
        cls(3, out_features=3, key=KEY),
    ):
        assert eqx.tree_equal(layer, expected)


def test_spellings_of_other_sizes():
    expected = EmbeddingEncoder(KEY, num_classes=3, out_features=2)
    assert expected.embedding.weight.shape == (3, 2)
    for spelled in (EmbeddingEncoder(3, 2, key=KEY), EmbeddingEncoder(3, 2, KEY)):
        assert eqx.tree_equal(spelled, expected)
    old = jr.PRNGKey(0)
    assert eqx.tree_equal(GLU(3, 2, old), GLU(3, 2, key=np.asarray(old)))
    assert SwiGLU(3, 2, key=KEY).down_proj.out_features == 2
    assert GLU(3, KEY).w1.out_features == 3


def test_without_a_key():
    is_needed = {cls for cls, key in WITH_KEY.items() if key.default is inspect.Parameter.empty}
    assert WITH_KEY.keys() - is_needed == {
        IdentityChannelMixer,
        IdentitySequenceMixer,
        Bidirectional,
        rates.Downsample,
        rates.Upsample,
    }
    assert len(is_needed) > 60
    for cls in is_needed:
        for attempt in (ft.partial(cls, key=None), ft.partial(cls, key=0), cls):
            with pytest.raises(
                TypeError, match=rf"`key` of `{cls.__name__}` must be a key, such as"
            ):
                attempt()
        with pytest.raises(ValueError, match=r"must be a single key, of shape \(\); got \(2,\)"):
            cls(key=jr.split(KEY))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: models.LRU(64, key=KEY),
        lambda: LRUSequenceMixer(4, 8, key=KEY),
        lambda: GLU(4, KEY, key=KEY),
        lambda: GLU(KEY, KEY),
    ],
)
def test_with_something_in_the_place_of_the_key(attempt):
    with pytest.raises(TypeError, match=r"takes one key; got "):
        attempt()


def test_both_directions_from_one_maker():
    forward_key, backward_key = jr.split(KEY)
    expected = Bidirectional(small(3, forward_key), small(3, backward_key))
    for both in (
        Bidirectional(3, forward=small, key=KEY),
        Bidirectional(3, KEY, forward=small, backward=small),
        Bidirectional(forward=expected.forward, backward=expected.backward),
        Bidirectional(expected.forward, backward=expected.backward),
    ):
        assert eqx.tree_equal(both, expected)
    other = Bidirectional(3, KEY, forward=small, backward=IdentitySequenceMixer)
    assert isinstance(other.backward, IdentitySequenceMixer)
    assert eqx.tree_equal(other.forward, expected.forward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda a, b: {"forward": small},
            "`forward` must be an `AbstractSequenceMixer`; got .*part",
        ),
        (
            lambda a, b: {"in_features": a},
            "takes a width .* one alone, of which the first was an in",
        ),
        (
            lambda a, b: {"in_features": a, "key": b, "forward": a},
            "takes a width .*; got others be",
        ),
        (
            lambda a, b: {"in_features": a, "key": b, "backward": b},
            "takes a width .*; got others b",
        ),
        (lambda a, b: {"in_features": 3, "key": KEY}, "`forward` must be a function .*; got None"),
        (
            lambda a, b: {"in_features": 3, "key": KEY, "forward": a},
            "`forward` must be a function ",
        ),
        (
            lambda a, b: {"in_features": 3, "key": KEY, "forward": small, "backward": b},
            "`backward` must be a function .*; got an instance",
        ),
        (
            lambda a, b: {"in_features": 3, "forward": small},
            "`key` of `Bidirectional` must be a key",
        ),
    ],
)
def test_mixed_forms_of_both_directions(options, message):
    with pytest.raises(TypeError, match=message):
        Bidirectional(**options(*(IdentitySequenceMixer(3) for _ in range(2))))


def test_blocks_of_widths_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"blocks\[0\] puts out 3 features; got blocks\[1\] of in_f"
    ):
        BlockStack([make_block(3, KEY), make_block(4, KEY)])
    make = ft.partial(models.RWKV7, hidden_dim=4, head_dim=4, num_blocks=3)
    chain = eqx.filter_eval_shape(make, KEY).blocks
    assert len(BlockStack(chain).blocks) == 3
    with pytest.raises(
        ValueError, match=r"blocks\[1\] puts out 8 features; got blocks\[2\] of in_f"
    ):
        BlockStack([*chain[:2], make_block(4, KEY)])


# Numbers


RETENTION = ft.partial(sequence_mixers.RetentionSequenceMixer, 4, KEY, num_heads=1)
MLSTM = ft.partial(sequence_mixers.MLSTMSequenceMixer, 4, KEY, num_heads=1)
DELTA = ft.partial(sequence_mixers.DeltaNetSequenceMixer, 4, KEY, num_heads=1)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (RETENTION, {"rotary_base": INF}, ValueError, "`rotary_base` of `Reten.* finite; got inf"),
        (RETENTION, {"norm_eps": "1e-5"}, TypeError, "must be a number; got '1e-5'"),
        (RETENTION, {"norm_eps": None}, TypeError, "must be a number; got None"),
        (RETENTION, {"norm_eps": True}, TypeError, "must be a number; got True"),
        (RETENTION, {"norm_eps": NAN}, ValueError, "`norm_eps` must be positive; got nan"),
        (MLSTM, {"input_bias": NAN}, ValueError, "`input_bias` of .* must be finite; got nan"),
        (MLSTM, {"forget_bias": 3.0}, TypeError, r"2 numbers, such as \(3.0, 6.0\); got 3.0"),
        (MLSTM, {"forget_bias": (1.0,)}, TypeError, r"must be 2 numbers.*; got \(1.0,\)"),
        (MLSTM, {"forget_bias": "36"}, TypeError, "must be 2 numbers.*; got '36'"),
        (MLSTM, {"forget_bias": (0.0, INF)}, ValueError, "must be finite; got "),
        (DELTA, {"scale": NAN}, ValueError, "`scale` of .* must be finite; got nan"),
        (DELTA, {"scale": "x"}, TypeError, "`scale` of .* must be a number; got 'x'"),
        (DELTA, {"key_norm": None}, TypeError, "`key_norm` must be a function .*; got None"),
        (ft.partial(SwiGLU, 4, 4, KEY), {"hidden_ratio": INF}, ValueError, "positive and finite"),
    ],
)
def test_numbers_that_are_none(make, options, error, message):
    with pytest.raises(error, match=message):
        eqx.filter_eval_shape(lambda: make(**options))


@pytest.mark.parametrize("number", [8, np.float32(8), np.int64(8), jnp.asarray(8.0), np.array(8.0)])
def test_numbers_of_any_kind(number):
    mixer = eqx.filter_eval_shape(lambda: MLSTM(gate_soft_cap=8.0, input_bias=number))
    assert mixer.gate_soft_cap == 8.0
    assert eqx.filter_eval_shape(lambda: MLSTM(gate_soft_cap=None)).gate_soft_cap is None
