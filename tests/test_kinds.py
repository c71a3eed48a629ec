"""A class, an instance, a name or nothing where another of them is due: the error says which."""

import functools as ft

import equinox as eqx
import jax
import jax.random as jr
import pytest
from cases import ONE_DEVICE

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock, StandardBlock
from discretax.channel_mixers import GLU
from discretax.models import LRU, Backbone, BlockStack, DeepBackbone
from discretax.sequence_mixers import (
    Bidirectional,
    Discretized,
    GatedSequenceMixer,
    LRUSequenceMixer,
    RGLRUSequenceMixer,
    SequenceParallel,
)

WIDTH, KEY = 4, jr.key(0)
small = ft.partial(LRUSequenceMixer, state_dim=2)
lru, glu = small(WIDTH, KEY), GLU(WIDTH, KEY)
standard = ft.partial(StandardBlock, WIDTH, KEY, norm=None)
backbone = ft.partial(Backbone, KEY, hidden_dim=WIDTH, num_blocks=2)
language_model = ft.partial(LanguageModel, KEY, vocab_size=3, hidden_dim=WIDTH, num_blocks=2)

# Where one makes its own mixer, and where several blocks have each their own.
ONE = {
    "StandardBlock": lambda mixer: standard(sequence_mixer=mixer, channel_mixer=GLU),
    "ResidualBlock": lambda mixer: ResidualBlock(
        WIDTH, KEY, sequence_mixer=mixer, channel_mixer=GLU
    ),
    "GatedSequenceMixer": lambda mixer: GatedSequenceMixer(
        WIDTH, KEY, sequence_mixer=mixer, gate=1
    ),
}
SEVERAL = {
    "Backbone": lambda mixer: backbone(sequence_mixer=mixer),
    "LanguageModel": lambda mixer: language_model(pattern=(small, mixer)),
}
NO_MAKER = {
    "name": ("LRU", "got 'LRU'"),
    "nothing": (None, "got None"),
    "mixer of channels": (glu, "got an instance of `GLU`"),
    "class of mixers of channels": (GLU, "got the class `GLU`"),
    "block": (StandardBlock, "got the class `StandardBlock`"),
}


@pytest.mark.parametrize("kind", NO_MAKER)
@pytest.mark.parametrize("place", ONE | SEVERAL)
def test_what_makes_no_sequence_mixer(place, kind):
    maker, received = NO_MAKER[kind]
    argument = r"pattern\[1\]" if place == "LanguageModel" else "sequence_mixer"
    rule = rf"`{argument}` must be a function .* that makes an `AbstractSequenceMixer`; {received}"
    with pytest.raises(TypeError, match=rf"{rule}\. Give the class, or `functools\.partial`"):
        (ONE | SEVERAL)[place](maker)


@pytest.mark.parametrize("place", ONE | SEVERAL)
def test_a_function_that_makes_no_sequence_mixer(place):
    made = r"`sequence_mixer\(in_features, key=key\)` must be an `AbstractSequenceMixer`"
    with pytest.raises(TypeError, match=f"{made}; got the class `LRUSequenceMixer`. Make one"):
        (ONE | SEVERAL)[place](lambda width, *, key: LRUSequenceMixer)
    with pytest.raises(TypeError, match=f"{made}; got an instance of `GLU`"):
        (ONE | SEVERAL)[place](lambda width, *, key: glu)


@pytest.mark.parametrize("place", ONE)
def test_what_is_made_for_one(place):
    """An instance, and Equinox's own way to fill in arguments."""
    for mixer in (lru, eqx.Partial(LRUSequenceMixer, state_dim=2), small):
        assert isinstance(ONE[place](mixer).sequence_mixer, LRUSequenceMixer)


@pytest.mark.parametrize("place", SEVERAL)
def test_what_is_made_is_not_for_several(place):
    shared = "got an instance of `LRUSequenceMixer`, whose arrays all blocks would share. Give the"
    with pytest.raises(TypeError, match=shared):
        SEVERAL[place](lru)
    for mixer in (eqx.Partial(LRUSequenceMixer, state_dim=2), small):
        SEVERAL[place](mixer)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: backbone(sequence_mixer=small, channel_mixer=glu),
            r"`channel_mixer` .* makes an `AbstractChannelMixer`; got an instance of `GLU`, whose",
        ),
        (
            lambda: language_model(pattern=(small,), channel_mixer=glu),
            r"`channel_mixer` .* makes an `AbstractChannelMixer`; got an instance of `GLU`, whose",
        ),
        (
            lambda: standard(sequence_mixer=lru, channel_mixer="glu"),
            "`channel_mixer` .* makes an `AbstractChannelMixer`; got 'glu'",
        ),
        (lambda: language_model(pattern="LRU"), r"`pattern` must be a sequence .*; got 'LRU'"),
        (lambda: language_model(pattern=small), "`pattern` must be a sequence .*; got .*partial"),
        (lambda: language_model(pattern=LRUSequenceMixer), "got the class `LRUSequenceMixer`"),
        (lambda: language_model(pattern=None), r"such as `\(MambaSequenceMixer,\)`; got None"),
        (
            lambda: Bidirectional(LRUSequenceMixer, LRUSequenceMixer),
            r"`forward` must be an `AbstractSequenceMixer`; got the class `LRUSequenceMixer`\. "
            r"Make one: `LRUSequenceMixer\(in_features, key\)`",
        ),
        (lambda: Bidirectional(lru, "LRU"), "`backward` must be an .*; got 'LRU'"),
        (lambda: Bidirectional(lru, glu), "`backward` must be an .*; got an instance of `GLU`"),
        (lambda: Discretized(LRUSequenceMixer), r"Make one: `LRUSequenceMixer\(in_features, key\)"),
        (
            lambda: Discretized(RGLRUSequenceMixer(WIDTH, KEY)),
            "`mixer` must be an `AbstractLTIMixer`; got an instance of `RGLRUSequenceMixer`",
        ),
        (lambda: SequenceParallel(small, ONE_DEVICE), "`mixer` must be an .*; got .*partial"),
        (lambda: BlockStack([lru]), r"`blocks\[0\]` must be an `AbstractBlock`; got an instance"),
        (lambda: BlockStack([StandardBlock]), r"Make one: `StandardBlock\(in_features, key\)`"),
        (lambda: BlockStack("blocks"), r"`\[block, other_block\]`; got 'blocks'"),
        (
            lambda: BlockStack(standard(sequence_mixer=lru, channel_mixer=GLU)),
            "must be a sequence of blocks.*got an instance of `StandardBlock`",
        ),
        (
            lambda: DeepBackbone(LRU),
            "`backbone` must be an `AbstractBackbone`; got the class `LRU`",
        ),
        (
            lambda: standard(
                sequence_mixer=lru, channel_mixer=GLU, activation=jax.tree_util.Partial
            ),
            "`activation` must be None or a function",
        ),
    ],
)
def test_other_kinds(attempt, message):
    with pytest.raises(TypeError, match=message):
        attempt()


def test_one_mixer_for_both_directions():
    with pytest.raises(ValueError, match="must be two mixers; got one for both"):
        Bidirectional(lru, lru)


def test_norms_of_other_kinds():
    block = ft.partial(StandardBlock, WIDTH, KEY, sequence_mixer=lru, channel_mixer=glu)
    with pytest.raises(ValueError, match=r"`norm` must be .*; got an instance of `LayerNorm`"):
        block(norm=eqx.nn.LayerNorm(WIDTH))
    with pytest.raises(TypeError, match=r"`norm\(in_features\)` must be .*; got the class `LayerN"):
        block(norm=lambda width: eqx.nn.LayerNorm)
    for norm in (eqx.nn.LayerNorm, eqx.Partial(eqx.nn.LayerNorm, eps=1e-3)):
        assert isinstance(block(norm=norm).norm, eqx.nn.LayerNorm)
    assert block(norm=lambda width: None).norm is None
