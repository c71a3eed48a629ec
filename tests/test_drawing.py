"""What parameters start at: the numbers of `jax.random` and of Equinox, without a program per shape."""

import functools as ft
import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_equal

from discretax import _drawing
from discretax.sequence_mixers import GatedDeltaNetSequenceMixer, LRUSequenceMixer, S5SequenceMixer

pytestmark = pytest.mark.slow

KEYS = {
    "typed": jr.key(0),
    "raw": jr.PRNGKey(1),
    "of NumPy": np.array([0, 2], np.uint32),
    "of another kind": jr.key(3, impl="rbg"),
}
OURS = {
    "uniform": ft.partial(_drawing.uniform, minval=-1, maxval=np.float64(0.5)),
    "normal": _drawing.normal,
    "truncated_normal": ft.partial(_drawing.truncated_normal, lower=-2, upper=2),
}
THEIRS = {
    "uniform": ft.partial(jr.uniform, minval=-1, maxval=np.float64(0.5)),
    "normal": jr.normal,
    "truncated_normal": lambda key, shape: jr.truncated_normal(key, -2, 2, shape),
}
SHAPES = ((3, 5), (), (0, 2))


def assert_same(actual, expected):
    assert_equal(actual, expected)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def assert_draws_alike(key, shapes=SHAPES):
    for name, ours in OURS.items():
        for shape in shapes:
            assert_same(ours(key, shape), THEIRS[name](key, shape))


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_numbers_are_those_of_jax(key):
    assert_draws_alike(key)
    for num in (1, 2, 16, 17):  # 17 are more than are shared
        keys = _drawing.split(key, num)
        expected = jr.split(key, num)
        assert all(jax.typeof(mine) == jax.typeof(expected[0]) for mine in keys)
        assert_equal(jr.key_data(jnp.stack(keys)), jr.key_data(expected))


def test_the_numbers_are_those_of_jax_in_float64():
    """Where XLA is to optimise nothing, the last bit of what is made of them depends on the shape."""
    key, shape = jr.key(0), (3, 5)
    with jax.enable_x64(True):
        assert_same(OURS["uniform"](key, shape), THEIRS["uniform"](key, shape))
        for name in ("normal", "truncated_normal"):
            actual, expected = OURS[name](key, shape), THEIRS[name](key, shape)
            assert actual.dtype == expected.dtype == "float64"
            np.testing.assert_allclose(actual, expected, rtol=1e-14, atol=0)


def test_more_numbers_than_are_shared(monkeypatch):
    monkeypatch.setattr(_drawing, "NUMBERS", 14)
    assert_draws_alike(jr.key(0), ((2, 7), (3, 5)))


def test_numbers_that_depend_on_how_many_there_are():
    with jax.threefry_partitionable(False):
        assert (jr.uniform(jr.key(0), (4,))[:3] != jr.uniform(jr.key(0), (3,))).any()
        assert_draws_alike(jr.key(0), SHAPES[:1])
    # Nor is it promised of other generators, whose first numbers are the same on a CPU.
    assert not _drawing._is_shared(KEYS["of another kind"])


@pytest.mark.parametrize("use_bias", [True, False])
def test_layers_are_those_of_equinox(use_bias):
    key = jr.key(0)
    expected = eqx.nn.Linear(3, 5, use_bias, key=key)
    layer = _drawing.linear(3, 5, use_bias, key=key)
    assert_same(layer, expected)
    assert_same(_drawing.linear_of(expected.weight, expected.bias), expected)
    assert_equal(layer(jnp.arange(3.0)), expected(jnp.arange(3.0)))
    assert_same(_drawing.embedding(3, 5, key=key), eqx.nn.Embedding(3, 5, key=key))


def make(key):
    return _drawing.linear(3, 5, key=key), _drawing.truncated_normal(key, (2, 3), -2, 2)


def test_under_transformations():
    keys = jr.split(jr.key(0), 2)
    alone = [make(key) for key in keys]
    assert_same(
        eqx.filter_vmap(make)(keys), jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    )
    outside = keys[0]
    assert_same(eqx.filter_jit(lambda: make(outside))(), alone[0])
    for traced in (jax.make_jaxpr(make)(outside), jax.make_jaxpr(lambda: make(outside))()):
        assert str(_drawing.NUMBERS) not in str(traced)  # no more is drawn than is wanted


def test_stays_where_the_key_is():
    key = jax.device_put(jr.key(0), jax.devices()[-1])
    for tree in (make(key), _drawing.split(key)):
        assert all(
            leaf.committed and leaf.devices() == key.devices() for leaf in jax.tree.leaves(tree)
        )


def test_a_key_is_used_once():
    with jax.debug_key_reuse(True):
        first, second = _drawing.split(jr.key(0))
        for use in (lambda key: _drawing.normal(key, (2,)), _drawing.split):
            use(first)
            with pytest.raises(jax.errors.KeyReuseError):
                use(first)
            first = second


@pytest.mark.parametrize(
    "mixer",
    [LRUSequenceMixer, S5SequenceMixer, GatedDeltaNetSequenceMixer],
    ids=lambda m: m.__name__,
)
def test_another_width_draws_with_what_is_compiled(mixer, caplog):
    make = lambda width: mixer(width, jr.key(0))
    make(16)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        make(24)
    compiled = [record.getMessage() for record in caplog.records]
    compiled = [message for message in compiled if "Finished XLA compilation" in message]
    assert any("jit(_first)" in message for message in compiled)  # which cuts out a shape
    drawn = ("uniform", "normal", "split", "threefry", "unstack")
    assert not [message for message in compiled if any(name in message for name in drawn)]
