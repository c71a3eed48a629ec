"""Sizes may be whole numbers of any kind, such as NumPy's: what is built is the same."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from discretax import (
    architectures,
    channel_mixers,
    encoder,
    heads,
    models,
    rates,
    sequence_mixers,
)
from discretax._features import check_size
from discretax.sequence_mixers import LRUSequenceMixer

# What has no default.
GIVEN = {"in_features": 8, "out_features": 6, "num_classes": 5, "hidden_dim": 8, "vocab_size": 7}
GIVEN |= {"stride": 2, "patch_size": 3}
GIVEN |= {"num_blocks": 2, "sequence_mixer": LRUSequenceMixer, "pattern": (LRUSequenceMixer,)}
OPTIONS = {
    "Bidirectional": {"forward": LRUSequenceMixer},
    "AttentionSequenceMixer": {"num_kv_heads": 2, "head_dim": 4, "window": 3},
    "Centaurus": {"state_dim": 4},
    "GatedSequenceMixer": {"bottleneck": 2, "gate": 1},
    "GriffinSequenceMixer": {"lru_width": 4, "num_heads": 2},
    "HydraSequenceMixer": {"head_dim": 4, "num_groups": 2, "conv_width": 5},
    "Mamba2SequenceMixer": {"head_dim": 4, "num_groups": 2},
    "Mamba2": {"head_dim": 4},
    "Mamba3SequenceMixer": {"head_dim": 4, "num_groups": 2, "rank": 2},
    "Mamba3": {"head_dim": 4, "rank": 2, "intermediate_dim": 9},
    "MambaSequenceMixer": {"dt_rank": 2},
    "RWKV7SequenceMixer": {"head_dim": 4, "num_layers": 3},
    "RWKV7ChannelMixer": {"intermediate_dim": 9},
    "RWKV7": {"head_dim": 4},
    "HalfGLU": {"out_features": 8},
    "IdentityChannelMixer": {"out_features": 8},
    "S4DSequenceMixer": {"n_ssm": 2, "l_max": 9},
    "S4SequenceMixer": {"n_ssm": 2, "l_max": 9},
    "S5SequenceMixer": {"ssm_blocks": 2},
    "SwiGLU": {"intermediate_dim": 9},
}
ROOMS = (architectures, channel_mixers, encoder, heads, models, rates, sequence_mixers)


def built_from_sizes():
    for room in ROOMS:
        for name, value in vars(room).items():
            if inspect.isclass(value) and issubclass(value, eqx.Module) and "Abstract" not in name:
                arguments = inspect.signature(value.__init__).parameters
                required = {a for a in arguments.values() if a.default is a.empty}
                if "key" in arguments and {a.name for a in required} <= {"self", "key", *GIVEN}:
                    yield pytest.param(value, id=f"{room.__name__.split('.')[1]}.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("cls", list(built_from_sizes()))
def test_sizes_of_numpy(cls):
    """Warnings are errors here: Equinox warns of a field that is a number of NumPy's."""
    arguments = inspect.signature(cls.__init__).parameters
    options = GIVEN | OPTIONS.get(cls.__name__, {})
    options = {name: value for name, value in options.items() if name in arguments} | {
        name: argument.default
        for name, argument in arguments.items()
        if name not in options and type(argument.default) is int
    }
    assert any(type(value) is int for value in options.values())
    of_numpy = {n: np.int16(v) if type(v) is int else v for n, v in options.items()}
    shapes = lambda given: eqx.filter_eval_shape(lambda key: cls(key=key, **given), jr.key(0))
    assert jax.tree.leaves(shapes(of_numpy)) == jax.tree.leaves(shapes(options))


@pytest.mark.parametrize("size", [3, np.int64(3), np.uint8(3), np.array(3), jnp.asarray(3)])
def test_what_is_a_size(size):
    assert type(check_size("size", size)) is int and check_size("size", size) == 3


@pytest.mark.parametrize(
    "size", [0, -1, np.int64(0), True, np.True_, 3.0, np.float32(3), "3", None, [3], np.array([3])]
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="`size` must be a whole number of at least 1; got "):
        check_size("size", size)
