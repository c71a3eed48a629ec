"""Whatever has parameters can be built under JAX's transformations, pickled and copied."""

import copy
import functools as ft
import inspect
import pickle

import equinox as eqx
import jax
import jax.random as jr
import pytest
from cases import CASES
from helpers import assert_close, assert_equal, draw

from discretax import models
from discretax.architectures import LanguageModel
from discretax.channel_mixers import GLU, HalfGLU, MLPChannelMixer, SwiGLU
from discretax.encoder import EmbeddingEncoder, LinearEncoder
from discretax.heads import ClassificationHead, LanguageModelHead, RegressionHead
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    LRUSequenceMixer,
    MambaSequenceMixer,
    S4DSequenceMixer,
)

pytestmark = pytest.mark.slow

WIDTH = 4
NEEDED = {
    "Backbone": {"sequence_mixer": LRUSequenceMixer},
    "Griffin": {"num_blocks": 3, "num_heads": 1},
    "Mamba2": {"head_dim": 4},
    "Mamba3": {"head_dim": 4},
    "RetNet": {"num_heads": 2},
    "RWKV7": {"head_dim": 4},
}
language_model = ft.partial(LanguageModel, vocab_size=3, hidden_dim=8, num_blocks=2)
MAKERS = {
    **{str(case): case.make for case in CASES},
    **{
        name: ft.partial(model, **{"hidden_dim": WIDTH, "num_blocks": 1} | NEEDED.get(name, {}))
        for name, model in vars(models).items()
        if inspect.isclass(model) and "num_blocks" in inspect.signature(model).parameters
    },
    "S4 with a gate": ft.partial(models.S4, hidden_dim=WIDTH, num_blocks=1, gate=2),
    "S5 half_glu2": ft.partial(models.S5, hidden_dim=WIDTH, num_blocks=1, activation="half_glu2"),
    "LanguageModel": ft.partial(language_model, pattern=(MambaSequenceMixer,)),
    "LanguageModel with SwiGLU": ft.partial(
        language_model, pattern=(LRUSequenceMixer, AttentionSequenceMixer), channel_mixer=SwiGLU
    ),
    **{mixer.__name__: ft.partial(mixer, WIDTH) for mixer in (GLU, HalfGLU, MLPChannelMixer)},
    **{
        head.__name__: ft.partial(head, WIDTH, 3)
        for head in (ClassificationHead, RegressionHead, LanguageModelHead)
    },
    "LinearEncoder": ft.partial(LinearEncoder, WIDTH, out_features=3),
    "EmbeddingEncoder": ft.partial(EmbeddingEncoder, num_classes=3, out_features=WIDTH),
}
TRANSFORMS = {
    transform: ft.partial(S4DSequenceMixer, WIDTH, init="rand", n_ssm=2, imag_transform=transform)
    for transform in ("exp", "relu", "softplus")
}


KEYS = jr.split(jr.key(0), 2)
WAYS_TO_COPY = (lambda tree: pickle.loads(pickle.dumps(tree)), copy.deepcopy)


def make(name):
    return eqx.nn.make_with_state((MAKERS | TRANSFORMS)[name])


@ft.cache
def made(name, i=0):
    return make(name)(KEYS[i])


def parts(model_and_state):
    """Arrays, and all else but what names a state, which is new in each model."""
    is_named = lambda node: isinstance(node, eqx.nn.State | eqx.nn.StateIndex)
    without_name = lambda node: jax.tree.leaves(node) if is_named(node) else node
    tree = jax.tree.map(without_name, model_and_state, is_leaf=is_named)
    return eqx.partition(tree, lambda leaf: eqx.is_array(leaf) or is_shape(leaf))


def is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


ALIKE = {str(case) for case in CASES if not case.is_one_of_each}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough if name in ALIKE else ())
        for name in MAKERS | TRANSFORMS
    ],
)
def test_built_under_transformations_and_copied(name):
    both = [made(name, i) for i in range(2)]
    arrays, static = parts(eqx.filter_vmap(make(name))(KEYS))
    shapes, static_of_shapes = parts(eqx.filter_eval_shape(make(name), KEYS[0]))
    for i, (expected, expected_static) in enumerate(map(parts, both)):
        assert static == static_of_shapes == expected_static
        assert jax.tree.structure(arrays) == jax.tree.structure(expected)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), expected)
        assert jax.tree.map(jax.typeof, expected) == jax.tree.map(jax.typeof, shapes)
    if name == "SequenceParallel":  # which holds its devices
        return
    arrays, static = parts(both[0])
    for copied in WAYS_TO_COPY:
        copied_arrays, copied_static = parts(copied(both[0]))
        assert copied_static == static
        assert_equal(copied_arrays, arrays)


def test_a_copy_finds_its_state():
    model, state = made("LRU")
    run = eqx.filter_jit(lambda model, x, state: eqx.nn.inference_mode(model)(x, state)[0])
    x = draw(5, WIDTH)
    for copied in WAYS_TO_COPY:
        model_again, state_again = copied((model, state))
        assert_equal(run(model_again, x, state_again), run(model, x, state))
