"""Samples that are not finite, where the laws over every mixer do not reach: sizes, caches, models."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, draw

from discretax import Timeseries
from discretax.blocks._batch_norm import BatchNorm
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import S5, Griffin
from discretax.ops import diagonal_ssm, linear_recurrence
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    Centaurus,
    GatedSequenceMixer,
    LRUSequenceMixer,
    MambaSequenceMixer,
    RGLRUSequenceMixer,
    S4DSequenceMixer,
    S5SequenceMixer,
    S7SequenceMixer,
)

pytestmark = pytest.mark.slow

run = eqx.filter_jit(lambda mixer, x, cache=None, **options: mixer(x, cache, **options))

step = eqx.filter_jit(lambda mixer, x, cache, gap: mixer.step(x, cache, integration_timestep=gap))


@eqx.filter_jit
def gradients(mixer, x, looked_at, cache=None, **options):
    """Of a loss that looks at some of the outputs."""

    def loss(arguments):
        mixer, x, cache = arguments
        y = jnp.sin(mixer(x, cache, **options)[0])
        return jnp.sum(jnp.where(looked_at[:, None], y, 0))

    return eqx.filter_grad(loss)((mixer, x, cache))


def floats(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


# Each on the route that long sequences, or many features, take.
LONG = {
    "LRU in chunks": (lambda key: LRUSequenceMixer(2, key, state_dim=128), 2100, 2),
    "S4D in blocks of features": (lambda key: S4DSequenceMixer(32, key, state_dim=2), 2048, 32),
    "S4D by steps": (lambda key: S4DSequenceMixer(2, key, state_dim=2, route="scan"), 150, 2),
    "S7": (lambda key: S7SequenceMixer(2, key, state_dim=3), 150, 2),
    "RG-LRU": (lambda key: RGLRUSequenceMixer(512, key, num_heads=64), 530, 512),
    "windows": (lambda key: AttentionSequenceMixer(4, key, num_heads=2, window=5), 150, 4),
}


@pytest.mark.parametrize("name", LONG)
def test_in_sequences_that_are_walked_through(name):
    make, time, features = LONG[name]
    mixer, x, middle = make(jr.key(0)), draw(time, features), time // 2 + 3
    broken = x.at[middle, 0].set(jnp.nan)
    before = jnp.arange(time) < middle
    y, _ = run(mixer, broken)
    assert_close(y[:middle], run(mixer, x)[0][:middle])
    assert jnp.isnan(y[middle]).any()
    assert_close(*(floats(gradients(mixer, u, before)) for u in (broken, x)))


@pytest.mark.parametrize(
    "make",
    [
        ft.partial(S4DSequenceMixer, state_dim=2, channels=2),
        ft.partial(S4DSequenceMixer, state_dim=2, route="fft"),
        ft.partial(Centaurus, mode="dws"),
    ],
    ids=["chunks", "fft", "dws"],
)
@pytest.mark.parametrize("resets", [None, np.arange(40) == 30], ids=["", "resets"])
def test_features_with_systems_of_their_own_break_alone(make, resets):
    mixer, x = make(3, jr.key(0)), draw(40, 3)
    y, cache = run(mixer, x.at[7, 1].set(jnp.inf), resets=resets)
    expected, last = run(mixer, x, resets=resets)
    broken = np.zeros((40, 3), bool)
    broken[7 : None if resets is None else 30, 1] = True
    broken = np.tile(broken, (1, y.shape[1] // 3))
    assert_equal(jnp.isnan(y), broken)
    assert_close(jnp.where(broken, 0, y), jnp.where(broken, 0, expected))
    assert_equal(jnp.isnan(cache).any((1, 2)), np.arange(3) == (1 if resets is None else -1))
    assert_close(jnp.delete(cache, 1, 0), jnp.delete(last, 1, 0))


def test_a_window_passes_over_a_broken_sample():
    mixer, x = AttentionSequenceMixer(4, jr.key(0), num_heads=2, window=3), draw(20, 4)
    y, _ = run(mixer, x.at[8].set(jnp.nan))
    broken = np.isin(np.arange(20), (8, 9, 10))
    assert_equal(jnp.isnan(y).any(1), broken)
    expected = jnp.where(broken[:, None], jnp.nan, run(mixer, x)[0])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        ft.partial(LRUSequenceMixer, state_dim=3),
        ft.partial(MambaSequenceMixer, state_dim=3),
        ft.partial(AttentionSequenceMixer, num_heads=2, window=4),
    ],
    ids=["LRU", "Mamba", "attention"],
)
def test_a_reset_heals_a_stream(make):
    """The cache that a broken sample leaves has no part in the gradients of what comes after."""
    mixer, x = make(4, jr.key(0)), draw(12, 4)
    _, cache = run(mixer, x[:5].at[4].set(jnp.nan))
    resets, behind = jnp.arange(7) == 3, jnp.arange(7) >= 3
    y, last = run(mixer, x[5:], cache, resets=resets)
    expected = run(mixer, x[8:], mixer.allocate_inference_cache())
    assert_close((y[3:], last), expected)
    d_mixer, d_x, _ = gradients(mixer, x[5:], behind, cache, resets=resets)
    alone, d_alone, _ = gradients(mixer, x[8:], behind[3:])
    assert_close((floats(d_mixer), d_x[3:]), (floats(alone), d_alone))


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
@pytest.mark.parametrize("varying, broken", [(True, "a"), (True, "b"), (False, "b")])
def test_the_recurrence_learns_from_what_is_behind_a_reset(implementation, varying, broken):
    """By itself, where no mixer has put zero in the place of what is broken."""
    arrays = {"a": 0.3 * draw(12, 3), "b": draw(12, 3, seed=2)}

    @jax.jit
    @jax.grad
    def gradient(arrays, resets):
        a = arrays["a"] if varying else arrays["a"][-1]
        h = linear_recurrence(a, arrays["b"], resets=resets, implementation=implementation)
        return jnp.sum(jnp.sin(h[-5:]))

    behind = jax.tree.map(lambda array: array[-5:], arrays)
    alone = gradient(behind, jnp.arange(5) == 0)
    arrays[broken] = arrays[broken].at[3, 1].set(jnp.nan)
    expected = jax.tree.map(lambda array: jnp.pad(array, ((7, 0), (0, 0))), alone)
    assert_close(gradient(arrays, jnp.arange(12) == 7), expected)


def test_batch_norm_has_a_broken_sample_in_its_statistics():
    norm, state = eqx.nn.make_with_state(BatchNorm)(3)
    train = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, after = jax.jit(train)(draw(2, 5, 3).at[0, 2, 1].set(jnp.nan), state)
    assert_equal(jnp.isnan(y), np.broadcast_to([False, True, False], y.shape))
    mean, variance, _ = after.get(norm.statistics)
    assert_equal(jnp.isnan(jnp.stack([mean, variance])), np.array([[False, True, False]] * 2))


def test_a_broken_sample_of_padding_alone_leaves_the_state():
    """In the operation, which is not told before where the padding is."""
    A, h0 = 0.5 * jnp.ones((2, 3)), jnp.ones((2, 3))
    B, C = draw(2, 3, 4), draw(4, 2, 3)
    x = draw(9, 4)

    @jax.jit
    @jax.value_and_grad
    def loss(weights, x, length):
        y, h = diagonal_ssm(*weights, x, h0, length=length)
        return jnp.sum(y[:5] ** 2) + jnp.sum(h**2)

    padded = loss((A, B, C), x.at[5:].set(jnp.nan), jnp.asarray(5))
    assert_close(padded, loss((A, B, C), x[:5], jnp.asarray(5)))


@pytest.mark.parametrize("gap", [np.nan, -1.0, np.inf])
def test_a_timestep_that_could_not_be_refused_breaks_its_sample(gap):
    mixer, x = S5SequenceMixer(3, jr.key(0), state_dim=4), draw(11, 3)
    gaps = jnp.ones(11).at[6].set(gap)
    y, cache = run(mixer, x, integration_timesteps=gaps)
    assert_equal(jnp.isnan(y).all(1), np.arange(11) >= 6)
    assert_close(y[:6], run(mixer, x[:6], integration_timesteps=gaps[:6])[0])
    assert jnp.isnan(cache).all()
    y, _ = step(mixer, x[0], mixer.allocate_inference_cache(), gap)
    assert jnp.isnan(y).all()
    with pytest.raises(ValueError, match="must be finite and must not be negative; got"):
        mixer.step(x[0], mixer.allocate_inference_cache(), integration_timestep=gap)


def test_a_gated_mixer_breaks_as_the_one_in_it():
    inner = ft.partial(AttentionSequenceMixer, num_heads=2, window=3)
    mixer = GatedSequenceMixer(4, jr.key(0), sequence_mixer=inner, gate=2)
    y, _ = run(mixer, draw(20, 4).at[8, 1].set(jnp.nan))
    assert_equal(jnp.isnan(y).all(1), np.isin(np.arange(20), (8, 9, 10)))


MODELS = {
    "S5": lambda key: S5(key, hidden_dim=4, num_blocks=1, state_dim=4, norm="layer", drop_rate=0.0),
    "Griffin": lambda key: Griffin(key, hidden_dim=8, num_blocks=3, window=4, num_heads=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_from_the_sequences_beside_a_broken_one(name):
    def make(key):
        encoder_key, model_key, head_key = jr.split(key, 3)
        model = MODELS[name](model_key)
        width = model.blocks[0].in_features
        encoder = LinearEncoder(2, encoder_key, out_features=width)
        head = ClassificationHead(width, 3, head_key, reduce=False)
        return eqx.nn.Sequential([encoder, model, head])

    model, state = eqx.nn.make_with_state(make)(jr.key(0))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, x, looked_at):
        log_probabilities, _ = model(x, state)
        return -jnp.sum(jnp.where(looked_at, log_probabilities[:, 1], 0))

    x, time = draw(18, 2), np.arange(18)
    resets = (time == 6) | (time == 12)
    packed = Timeseries(x.at[8, 1].set(jnp.nan), resets=resets)
    y = eqx.filter_jit(model)(packed, state)[0]
    assert_equal(jnp.isnan(y).all(1), (time >= 8) & (time < 12))
    learned = gradient(model, packed, (time < 6) | (time >= 12))
    beside = Timeseries(jnp.delete(x, slice(6, 12), 0), resets=resets[6:])
    assert_close(floats(learned), floats(gradient(model, beside, np.ones(12, bool))))
