"""JAX's own debugging switches: nothing compiled, and a NaN reported where it arises."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import CASES, FEATURES
from helpers import assert_close, draw

from discretax.ops import linear_recurrence, selective_scan

pytestmark = pytest.mark.slow

# One for each operation.
NAMES = (
    "LRUSequenceMixer",
    "RGLRUSequenceMixer",
    "MambaSequenceMixer",
    "S4DSequenceMixer",
)


@pytest.mark.parametrize("name", NAMES)
def test_without_jit(name):
    case = next(case for case in CASES if case.name == name)
    mixer, x = case.make(jr.key(0)), draw(2, FEATURES)

    def gradients(mixer):
        loss = lambda mixer: jnp.sum(mixer(x)[0] ** 2)
        return eqx.filter_value_and_grad(loss)(mixer)

    with jax.disable_jit():
        uncompiled = gradients(mixer)
    assert_close(uncompiled, eqx.filter_jit(gradients)(mixer))


def test_a_split_sequence_without_jit():
    case = next(case for case in CASES if case.name == "SequenceParallel")
    mixer, x = case.make(jr.key(0)), draw(2, FEATURES)
    with jax.disable_jit():
        uncompiled = mixer(x)
    assert_close(uncompiled, mixer(x))


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
