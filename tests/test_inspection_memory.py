"""How long mixers remember: against their equations, written out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, assert_close, draw, linear, numbers, sigmoid

from discretax import Timeseries
from discretax.inspection import memory
from discretax.models import LRU
from discretax.sequence_mixers import (
    Bidirectional,
    BidirectionalS5,
    GatedDeltaNetSequenceMixer,
    HydraSequenceMixer,
    IdentitySequenceMixer,
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    MambaSequenceMixer,
    RGLRUSequenceMixer,
)

pytestmark = pytest.mark.slow

TIME = 12


@eqx.filter_jit
def lru():
    return LRUSequenceMixer(FEATURES, jr.key(0), state_dim=3, r_min=0.3, r_max=0.9)


@eqx.filter_jit
def rg_lru():
    return RGLRUSequenceMixer(FEATURES, jr.key(0), num_heads=2, a_min=0.3, a_max=0.9)


def shapes(make, **options):
    return eqx.filter_eval_shape(lambda key: make(FEATURES, key, **options), jr.key(0))


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x * sigmoid(x)


def test_lru_by_the_size_of_its_eigenvalues():
    mixer = lru()
    time_constants = np.exp(-numbers(mixer.nu_log))  # |lambda| = exp(-exp(nu_log))
    exact = memory(mixer)
    assert_close(exact.time_constants, time_constants)
    assert_close(exact.half_lives, np.log(2) * time_constants)
    assert exact.kept is None

    start, time = 2, 60
    along = memory(mixer, draw(time, FEATURES), start=start)
    # Each sample turns the two planes of a state into each other; they are taken together.
    kept = np.exp(-np.arange(time - start)[:, None] / time_constants)
    assert_close(along.kept, np.stack([kept, kept], axis=1))
    for name in ("time_constants", "half_lives"):
        both = np.stack([getattr(exact, name)] * 2)
        np.testing.assert_allclose(getattr(along, name), both, rtol=1e-4)


def test_the_least_memory_and_the_longest():
    mixer = eqx.tree_at(lambda m: m.nu_log, lru(), jnp.array([100.0, 0.0, -100.0]))
    np.testing.assert_allclose(memory(mixer).half_lives, [0, np.log(2), np.inf], rtol=1e-6)


def test_an_oscillator_by_the_size_of_its_eigenvalues():
    mixer = eqx.filter_jit(LinOSSSequenceMixer)(FEATURES, jr.key(0), state_dim=5, r_min=0.3)
    M = np.moveaxis(numbers(mixer.discretize().A_bar), -1, 0)
    size = np.abs(np.linalg.eigvals(M)).max(1)
    np.testing.assert_allclose(memory(mixer).time_constants, -1 / np.log(size), rtol=1e-4)


def test_mamba_that_is_given_one_sample_over_and_over():
    """It decays like a time-invariant mixer then, by exp(Delta A). Its window keeps all, then nothing."""
    start = 2  # from here on the window is full
    mixer = eqx.filter_jit(MambaSequenceMixer)(
        FEATURES, jr.key(0), state_dim=3, conv_width=3, dt_min=0.03, dt_max=0.9
    )
    x = jnp.broadcast_to(draw(FEATURES), (start + TIME, FEATURES))
    along = memory(mixer, x, start=start)
    u = np.split(linear(mixer.in_proj, x[0]), 2)[0]
    u = silu(u * numbers(mixer.conv_weight).sum(1) + numbers(mixer.conv_bias))
    dt = softplus(linear(mixer.dt_proj, linear(mixer.x_proj, u)[: mixer.dt_rank]))
    time_constants = 1 / (dt[:, None] * np.exp(numbers(mixer.A_log))).T
    assert_close(along.kept.state, np.exp(-np.arange(TIME)[:, None, None] / time_constants))
    seen = time_constants < TIME - 1
    assert 0 < seen.sum() < seen.size
    found = along.time_constants.state
    np.testing.assert_allclose(found[seen], time_constants[seen], rtol=1e-3)
    assert np.isinf(found[~seen]).all()

    window = np.zeros((TIME, 2, 2 * FEATURES))
    window[0], window[1, 0] = 1, 1  # the oldest first: the newest moves to its place
    np.testing.assert_array_equal(along.kept.window, window)
    np.testing.assert_array_equal(along.half_lives.window[:, 0], [1, 0])


@pytest.mark.thorough
def test_rg_lru_by_the_product_of_its_gates():
    mixer, x, start = rg_lru(), draw(TIME, FEATURES), 3
    along = memory(mixer, x, start=start)
    gate = np.einsum("thi,hio->tho", numbers(x).reshape(TIME, 2, -1), numbers(mixer.a_weight))
    gate = sigmoid(gate + numbers(mixer.a_bias)).reshape(TIME, -1)
    a = np.exp(-8 * gate * softplus(numbers(mixer.Lambda)))
    a[start] = 1
    assert_close(along.kept.state, np.cumprod(a[start:], axis=0))
    assert along.kept.started is None


def test_delta_rule_by_the_product_of_its_matrices():
    mixer = eqx.filter_jit(GatedDeltaNetSequenceMixer)(
        FEATURES, jr.key(0), num_heads=2, head_dim=3, value_dim=2, conv_width=None
    )
    x = draw(TIME, FEATURES)
    kept = memory(mixer, x).kept.state
    k = silu(linear(mixer.projections.k_proj, x)).reshape(TIME, 2, 3)
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    beta = sigmoid(linear(mixer.beta_proj, x))
    raw = linear(mixer.decay_proj, x) + numbers(mixer.dt_bias)
    alpha = np.exp(-np.exp(numbers(mixer.A_log)) * softplus(raw))
    erase = beta[..., None, None] * k[..., None] * k[..., None, :]
    factors = alpha[..., None, None] * (np.eye(3) - erase)
    product, rows = np.broadcast_to(np.eye(3), (2, 3, 3)), []
    for t in range(TIME):
        product = factors[t] @ product if t else product
        rows.append(np.sqrt((product**2).sum(-1)))
    assert_close(kept, np.repeat(np.stack(rows)[..., None], 2, axis=-1))  # alike for all values
    # So the mean square over the keys is a norm of the whole product.
    norm = np.linalg.norm(product, axis=(1, 2)) / np.sqrt(3)
    np.testing.assert_allclose(np.sqrt((numbers(kept[-1]) ** 2).mean((1, 2))), norm, rtol=1e-4)


X = jnp.ones((5, FEATURES))


def test_of_numbers_that_are_not_known_yet():
    """As outside, where the input is finite; from a broken sample on, nothing is known."""
    mixer, x = lru(), draw(5, FEATURES)
    found = eqx.filter_jit(jax.vmap(lambda x: memory(mixer, x)))(
        jnp.stack([x, x.at[3].set(jnp.nan)])
    )
    whole, broken = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(2))
    for actual, expected in zip(whole, memory(mixer, x), strict=True):
        assert_close(actual, expected)
    np.testing.assert_array_equal(np.isnan(broken.kept).all((1, 2)), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(broken.kept[:3], whole.kept[:3])
    # What has been forgotten by then is known.
    early = np.asarray(whole.half_lives) <= 2
    assert 0 < early.sum() < early.size
    np.testing.assert_array_equal(broken.half_lives[early], whole.half_lives[early])
    assert np.isnan(broken.half_lives[~early]).all()


def test_eigenvalues_that_are_nan():
    mixer = eqx.tree_at(lambda m: m.nu_log, lru(), jnp.array([0.0, jnp.nan, -100.0]))
    np.testing.assert_allclose(memory(mixer).time_constants, [1, np.nan, np.inf], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "rule"),
    [
        (
            lambda: memory(eqx.filter_eval_shape(LRU, jr.key(0), hidden_dim=4)),
            TypeError,
            r"a sequence mixer; got an instance of `LRU`\. .*`model\.blocks\[0\]",
        ),
        (lambda: memory(rg_lru()), ValueError, r"depends on its input.* no `x`.*\(time, 4\)"),
        (lambda: memory(rg_lru(), X[:, :3]), ValueError, r"size 4; got float32\(5, 3\)"),
        (lambda: memory(rg_lru(), X[0]), ValueError, r"takes one sequence, .* got \(4,\)"),
        (lambda: memory(rg_lru(), X, start=4), ValueError, r"from 0 to 3; got start=4 and 5"),
        (lambda: memory(rg_lru(), X, start=-1), ValueError, r"`start` must .* least 0; got -1"),
        (lambda: memory(rg_lru(), X, start=2.5), ValueError, r"`start` must .* got 2\.5"),
        (lambda: memory(rg_lru(), X, start="a"), ValueError, r"`start` must .* got 'a'"),
        (lambda: memory(rg_lru(), X, start=True), ValueError, r"`start` must .* got True"),
        (lambda: memory(lru(), start=3), ValueError, r"`start` is .* got start=3 and no `x`"),
        (lambda: memory(rg_lru(), X[:1]), ValueError, r"at least two samples.* got \(1, 4\)"),
        (lambda: memory(rg_lru(), X.at[2, 1].set(jnp.nan)), ValueError, r"x\[2, 1\] = nan\. Put"),
        (lambda: memory(rg_lru(), X.at[0, 3].set(-jnp.inf)), ValueError, r"x\[0, 3\] = -inf\. Put"),
        (lambda: memory(rg_lru(), Timeseries(X)), TypeError, r"an array.*`x\.values\[:length\]`"),
        (lambda: memory(rg_lru(), [[1.0] * 4] * 5), TypeError, r"`x` must be an array"),
        (
            lambda: memory(Bidirectional(lru(), lru()), X),
            ValueError,
            r"`Bidirectional`, .* Take `mixer\.forward` or `mixer\.backward`\.$",
        ),
        (
            lambda: memory(shapes(BidirectionalS5, state_dim=4), X),
            ValueError,
            r"`BidirectionalS5`, .* Take `mixer\.forward`\.$",
        ),
        (
            lambda: memory(shapes(HydraSequenceMixer, head_dim=2), X),
            ValueError,
            r"`HydraSequenceMixer`, .* Take a mixer that streams\.$",
        ),
        (lambda: memory(IdentitySequenceMixer(FEATURES), X), ValueError, "nothing of the past"),
        (
            lambda: memory(jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * 2)), lru())),
            ValueError,
            r"not an ensemble: .*`eqx\.filter_vmap\(lambda mixer: memory\(mixer\)\)\(mixers\)`",
        ),
    ],
)
def test_bad_input(call, error, rule):
    with pytest.raises(error, match=rule):
        call()
