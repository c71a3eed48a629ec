"""JAX's own debugging switches: nothing compiled, and a NaN reported where it arises."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import CASES, FEATURES
from helpers import assert_close, draw
from jax.experimental.key_reuse._core import check_key_reuse  # not exported

from discretax.ops import linear_recurrence, selective_scan
from discretax.testing import mixer_laws

pytestmark = pytest.mark.slow

# One for each operation.
NAMES = (
    "LRUSequenceMixer",
    "LinOSSSequenceMixer",
    "RGLRUSequenceMixer",
    "MambaSequenceMixer",
    "GatedDeltaNetSequenceMixer",
    "AttentionSequenceMixer",
    *(  # whose parts are in those above
        pytest.param(name, marks=pytest.mark.thorough)
        for name in (
            "Mamba3SequenceMixer",
            "S4DSequenceMixer",
            "GLASequenceMixer",
            "MLSTMSequenceMixer",
        )
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_without_jit(name):
    """Outputs, cache and gradients of a call, and of a step where there is one."""
    case = next(case for case in CASES if case.name == name)
    mixer, x = case.make(jr.key(0)), draw(2, FEATURES)

    def loss(mixer, x):
        out = mixer(x, mixer.allocate_inference_cache(max_seqlen=3) if case.streams else None)
        if case.streams:
            out = out, mixer.step(x[0], out[1])
        total = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out) if eqx.is_inexact_array(leaf))
        return total, out

    gradients = lambda mixer, x: eqx.filter_value_and_grad(loss, has_aux=True)(mixer, x)
    with jax.disable_jit():
        uncompiled = gradients(mixer, x)
    assert_close(uncompiled, eqx.filter_jit(gradients)(mixer, x))


def laws(case):
    return {law.name: law for law in mixer_laws(case.make, **{**case.options, "longest": 13})}


# Of the cases that a law concerns, the cheapest: the last in this row.
CHEAPEST = ("Bidirectional", "Decay", "IdentitySequenceMixer")
LAWS = {}
for cheap in CHEAPEST:
    LAWS |= laws(next(case for case in CASES if str(case) == cheap))


@pytest.mark.parametrize("name", LAWS)
def test_every_law_without_jit(name):
    with jax.disable_jit():
        LAWS[name]()


def test_every_law_is_there():
    assert set(LAWS) == {name for case in CASES for name in laws(case)}


def test_a_split_sequence_without_jit():
    case = next(case for case in CASES if case.name == "SequenceParallel")
    mixer, x = case.make(jr.key(0)), draw(2, FEATURES)
    with jax.disable_jit():
        uncompiled = mixer(x)
    assert_close(uncompiled, mixer(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_key_is_drawn_from_twice(case):
    """As JAX's own checker has it (`jax.debug_key_reuse`)."""
    check_key_reuse(lambda key: eqx.filter(case.make(key), eqx.is_array), jr.key(0))


@pytest.mark.parametrize("name", ["LRUSequenceMixer", "GLASequenceMixer", "MLSTMSequenceMixer"])
def test_no_nan_is_made_where_nothing_is_broken(name):
    case = next(case for case in CASES if case.name == name)
    mixer, x = case.make(jr.key(0)), draw(2, FEATURES)
    with jax.disable_jit(), jax.debug_nans(True):
        y, cache = mixer(x)
        mixer.step(x[0], cache)
    assert jnp.isfinite(y).all()


def recurrence(x):
    return linear_recurrence(jnp.ones(3), x)


def scan(x):
    weights = jnp.ones((4, 2))
    return selective_scan(x, jnp.ones_like(x), -jnp.ones((3, 2)), weights, weights)[0]


@pytest.mark.parametrize("operation", [recurrence, scan])
def test_a_nan_is_reported_where_it_arises(operation):
    x = jnp.full((4, 3), jnp.inf).at[2].set(-jnp.inf)
    with jax.debug_nans(True):
        for run in (operation, jax.jit(operation)):
            with pytest.raises(FloatingPointError, match=r"invalid value \(nan\) .* scan"):
                run(x)
