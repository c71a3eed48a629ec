"""What models have in common: options of one meaning, and defaults that the docs say."""

import functools as ft
import inspect
import math
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal

from discretax import models
from discretax.channel_mixers import GLU, IdentityChannelMixer, MLPChannelMixer, SwiGLU
from discretax.models import GLA, HGRN2, LRU, RGLRU, S4, S5, S7, XLSTM, Backbone, Mamba
from discretax.sequence_mixers import Bidirectional, BidirectionalS5, LRUSequenceMixer
from discretax.sequence_mixers.wrappers.gated import exact_gelu

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models-overview.md"
KEY, WIDTH, TIME = jr.key(0), 4, 5
NEEDED = {
    "Backbone": {"sequence_mixer": LRUSequenceMixer},
    "Griffin": {"num_blocks": 3, "num_heads": 1},
    "Mamba2": {"head_dim": 4},
    "Mamba3": {"head_dim": 4},
    "RetNet": {"num_heads": 2},
    "RWKV7": {"head_dim": 4},
}
MODELS = {
    name: model
    for name, model in vars(models).items()
    if inspect.isclass(model) and "num_blocks" in inspect.signature(model).parameters
}
OF_MIXER = ("DeltaNet", "activation")  # of queries, keys and values


def parameters(name):
    given = inspect.signature(MODELS[name]).parameters
    return {p: v for p, v in given.items() if (name, p) != OF_MIXER}


def block_of(name, **options):
    """The first block, without its numbers, of a model that has run."""
    options = {"hidden_dim": WIDTH, "num_blocks": 1} | NEEDED.get(name, {}) | options

    def run(key):
        model, state = eqx.nn.make_with_state(MODELS[name])(key, **options)
        return model, eqx.nn.inference_mode(model)(jnp.zeros((TIME, WIDTH)), state)[0]

    model, y = eqx.filter_eval_shape(run, KEY)
    assert y.shape == (TIME, WIDTH)
    return model.blocks[0]


# The docs' table


COLUMNS = ["norm", "drop_rate", "num_blocks", "channel_mixer", "activation", "bidirectional"]
SAID = {
    "norm": {"batch": "batch", "rms": "rms"},
    "channel_mixer": {"GLU": GLU, "SwiGLU": SwiGLU, "GEGLU": SwiGLU, "none": IdentityChannelMixer},
    "activation": {
        "GELU": jax.nn.gelu,
        "exact GELU": exact_gelu,
        "full_glu": "full_glu",
        "none": None,
    },
    "bidirectional": {"yes": False},
}


def table():
    """From the name of a model to its row, as the page has it."""
    section = PAGE.read_text().split("## Options and defaults")[1].split("\n## ")[0]
    rows = [
        re.split(r" ?\| ?", line.strip("|")) for line in section.splitlines() if line[:1] == "|"
    ]
    header, _, *rows = [[cell.strip(" `") for cell in row] for row in rows]
    assert header == ["model", *COLUMNS]
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, *cells in rows}


def test_the_table_has_all_models():
    assert table().keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_table_says_the_defaults(name):
    row, given = table()[name], parameters(name)
    for column, cell in row.items():
        assert (column in given) == (cell != ""), column
        if cell == "":
            continue
        if column == "channel_mixer":
            mixer = block_of(name).channel_mixer
            assert type(mixer) is SAID[column][cell]
            assert getattr(mixer, "non_linearity", None) in (
                None,
                "gelu" if cell == "GEGLU" else "swish",
            )
        else:
            said = SAID[column][cell] if column in SAID else float(cell)
            assert given[column].default == said, column


# One meaning


@pytest.mark.parametrize("name", MODELS)
def test_options_mean_the_same(name):
    given = parameters(name)
    other = {"channel_mixer": MLPChannelMixer, "activation": jax.nn.relu, "bidirectional": True}
    block = block_of(name, **{option: other[option] for option in other if option in given})
    if "channel_mixer" in given:
        assert isinstance(block.channel_mixer, MLPChannelMixer)
    if "activation" in given:
        assert block.activation is jax.nn.relu
    if "bidirectional" in given:
        both = BidirectionalS5 if name == "S5" else Bidirectional
        assert isinstance(block.sequence_mixer, both)
    for option in other.keys() - inspect.signature(MODELS[name]).parameters.keys():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            block_of(name, **{option: other[option]})


def same_numbers(model, other):
    arrays = lambda model: jax.tree.leaves(eqx.filter(model.blocks, eqx.is_inexact_array))
    assert_equal(arrays(model), arrays(other))
    assert [b.activation for b in model.blocks] == [b.activation for b in other.blocks]


def test_models_are_the_backbone_of_their_mixer():
    mixer = ft.partial(LRUSequenceMixer, state_dim=3)
    options = {"hidden_dim": WIDTH, "num_blocks": 1, "bidirectional": True, "activation": jnp.tanh}
    options |= {"channel_mixer": MLPChannelMixer, "norm": "layer"}
    model = LRU(KEY, state_dim=3, **options)
    backbone = Backbone(KEY, sequence_mixer=mixer, **options)
    same_numbers(model, backbone)
    assert type(model.blocks[0].norm) is type(backbone.blocks[0].norm) is eqx.nn.LayerNorm


def test_a_function_as_the_activation_of_s5():
    small = ft.partial(S5, KEY, hidden_dim=WIDTH, num_blocks=1, state_dim=4, use_bias=False)
    same_numbers(small(activation=jax.nn.gelu), small())
    assert small(activation=None).blocks[0].activation is None
    assert type(small(activation="half_glu1").blocks[0].channel_mixer).__name__ == "HalfGLU"
    with pytest.raises(TypeError, match="`activation` must be None or a function"):
        small(activation=3)


def test_the_mixer_within_a_gate_goes_both_ways():
    block = block_of("S4", bidirectional=True, gate=1, bottleneck=2, activation=jnp.tanh)
    assert isinstance(block.sequence_mixer.sequence_mixer, Bidirectional)
    assert (block.sequence_mixer.activation, block.activation) == (jnp.tanh, None)


class Caught(eqx.Module):
    """In place of a backbone: what it would run with."""

    blocks: tuple

    def __call__(self, x, state, key):
        return [block.sequence_mixer for block in self.blocks]


def test_bounds_of_hgrn2_reach_both_ways():
    make = ft.partial(HGRN2, hidden_dim=2, num_blocks=2, num_heads=1, bidirectional=True)
    model = eqx.filter_eval_shape(make, KEY)
    where = lambda model: (model.backbone, model.lower_bounds)
    model = eqx.tree_at(where, model, (Caught(model.blocks), jnp.zeros((2, 1, 2))))
    for mixer, bound in zip(model(None, None), (0, 0.5), strict=True):
        for one_way in (mixer.forward, mixer.backward):
            assert_close(one_way.lower_bound, np.full((1, 2), bound), 1e-6)


# Refused


@pytest.mark.parametrize(
    ("model", "options", "received"),
    [
        (LRU, {"use_bias": False}, "use_bias=False"),
        (S5, {"use_bias": False}, "use_bias=False"),
        (S4, {"use_bias": False}, "use_bias=False"),
        (GLA, {"hidden_ratio": 2.0}, "hidden_ratio=2.0"),
        (GLA, {"intermediate_dim": 8}, "intermediate_dim=8"),
        (XLSTM, {"intermediate_dim": 8}, "intermediate_dim=8"),
        (RGLRU, {"expansion": 2}, "expansion=2"),
    ],
)
def test_what_a_channel_mixer_would_leave_unused(model, options, received):
    rule = f"is for the channel mixer that `{model.__name__}` makes itself; got {received} beside"
    with pytest.raises(ValueError, match=rule):
        model(KEY, hidden_dim=WIDTH, channel_mixer=MLPChannelMixer, **options)


def test_two_choices_of_one_channel_mixer():
    with pytest.raises(ValueError, match="'half_glu2' chooses the channel mixer as well; got a"):
        S5(KEY, hidden_dim=WIDTH, activation="half_glu2", channel_mixer=GLU)


@pytest.mark.parametrize("model", [LRU, Mamba, GLA])
def test_a_channel_mixer_that_all_blocks_would_share(model):
    with pytest.raises(
        TypeError, match="got an instance of `IdentityChannelMixer`, whose arrays all"
    ):
        model(KEY, hidden_dim=WIDTH, channel_mixer=IdentityChannelMixer(WIDTH))


def test_the_size_of_s7():
    """As the page and the docstring say it."""
    size = lambda tree: sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if is_shape(leaf)
    )
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    make = eqx.nn.make_with_state(ft.partial(S7, hidden_dim=32, num_blocks=2))
    model, _ = eqx.filter_eval_shape(make, KEY)
    H, N = 32, 64
    assert size(model.blocks[0].sequence_mixer) == 2 * N * H**2 + 3 * H**2 + 2 * N * H + N
    assert size(model) == 276_736
    for text in (PAGE.read_text(), inspect.getdoc(type(model.blocks[0].sequence_mixer))):
        assert "276 736" in text
