"""What is the LRU's own: its ring, its normalisation, its kernel and its errors."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from discretax.init import ring
from discretax.sequence_mixers import Bidirectional, Discretized, LRUSequenceMixer


@pytest.mark.parametrize(
    ("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * np.pi), (0.9, 0.999, 0.3), (0.5, 0.5, 1.0)]
)
def test_ring_is_uniform_by_area(r_min, r_max, max_phase):
    with jax.enable_x64(True):
        nu_log, theta_log, gamma_log = ring(jr.key(0), 20_000, r_min, r_max, max_phase)
        radius, phase = np.exp(-np.exp(nu_log)), np.exp(theta_log)
        assert ((r_min - 1e-12 <= radius) & (radius <= r_max)).all()
        assert ((phase > 0) & (phase <= max_phase)).all()
        quantiles = np.linspace(0, 1, 11)
        np.testing.assert_allclose(
            np.quantile(radius**2, quantiles),
            r_min**2 + quantiles * (r_max**2 - r_min**2),
            atol=0.015 * max(r_max**2 - r_min**2, 1e-6),
        )
        np.testing.assert_allclose(
            np.quantile(phase, quantiles), quantiles * max_phase, atol=0.015 * max_phase
        )
        np.testing.assert_allclose(np.exp(2 * gamma_log), 1 - radius**2, rtol=1e-9)
        if r_min < r_max:
            assert abs(np.corrcoef(radius, phase)[0, 1]) < 0.03


def test_ring_keeps_the_distance_to_the_unit_circle_in_float32():
    nu_log, _, gamma_log = ring(jr.key(0), 1000, 0.999999, 0.9999999, 1.0)
    gap = -np.expm1(-2 * np.exp(np.asarray(nu_log, np.float64)))
    assert ((gap > 1.9e-7) & (gap < 2.1e-6)).all()
    np.testing.assert_allclose(np.exp(2 * np.asarray(gamma_log, np.float64)), gap, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_keep_their_eigenvalues(dtype):
    """In their own type the exponentials would round to one, and the states never decay."""
    mixer = LRUSequenceMixer(4, jr.key(0), state_dim=64, r_min=0.99, r_max=0.9999)
    narrow = jax.tree.map(lambda p: p.astype(dtype), mixer)
    nu, theta = (np.asarray(p, np.float64) for p in (narrow.nu_log, narrow.theta_log))
    A_bar, _, _ = narrow.discretize()
    np.testing.assert_allclose(A_bar, np.exp(-np.exp(nu) + 1j * np.exp(theta)), rtol=1e-6)
    assert np.abs(A_bar).max() < 1


def test_white_noise_gives_states_of_equal_variance():
    mixer = LRUSequenceMixer(8, jr.key(0), state_dim=32, r_min=0.5, r_max=0.97)
    A, B, _ = mixer.discretize()
    x = np.random.default_rng(0).normal(size=(20_000, 8))
    h, total = np.zeros(32, complex), np.zeros(32)
    for sample in x:
        h = np.asarray(A) * h + np.asarray(B) @ sample
        total += np.abs(h) ** 2
    expected = np.sum(np.abs(np.asarray(mixer.B_re) + 1j * np.asarray(mixer.B_im)) ** 2, axis=1)
    np.testing.assert_allclose(total / len(x), expected, rtol=0.2)


def test_discrete_system_unpacks_as_the_paper_writes_it():
    mixer = LRUSequenceMixer(4, jr.key(0), state_dim=3)
    system = mixer.discretize()
    A_bar, B_bar, C = system
    p = jax.tree.map(np.asarray, mixer)
    eigenvalues = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    np.testing.assert_allclose(A_bar, eigenvalues, rtol=1e-5)
    B = np.exp(p.gamma_log)[:, None] * (p.B_re + 1j * p.B_im)
    np.testing.assert_allclose(B_bar, B, rtol=1e-6)
    np.testing.assert_allclose(C, p.C_re + 1j * p.C_im, rtol=1e-6)
    np.testing.assert_array_equal(system.D, mixer.D)


def test_kernel_holds_the_powers_of_the_eigenvalues():
    mixer = LRUSequenceMixer(4, jr.key(0), state_dim=3, r_min=0.99, r_max=0.9999)
    A = np.asarray(mixer.discretize().A_bar, np.complex128)
    powers = A ** np.arange(2000)[:, None]
    np.testing.assert_allclose(mixer.compute_kernel(2000), powers, atol=2e-5)
    np.testing.assert_array_equal(Discretized(mixer).compute_kernel(20), mixer.compute_kernel(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "`state_dim` must be a whole number of at least 1; got 0"),
        ({"state_dim": 2.0}, "`state_dim` must be a whole number of at least 1; got 2.0"),
        ({"in_features": 0}, "`in_features` must be .*; got 0"),
        ({"r_min": 0.9, "r_max": 0.5}, "r_min <= r_max.*got r_min=0.9 and r_max=0.5"),
        ({"r_min": -0.1}, "0 <= r_min.*got r_min=-0.1"),
        ({"r_max": 1.1}, "r_max <= 1.*got .*r_max=1.1"),
        ({"r_min": 1.0}, "r_min < 1.*got r_min=1.0"),
        ({"r_max": 0.0}, "r_max > 0.*r_max=0.0"),
        ({"max_phase": 0.0}, "`max_phase` must be positive, in radians; got 0.0"),
    ],
)
def test_unfit_options_are_refused(options, message):
    options = {"in_features": 4, "key": jr.key(0)} | options
    with pytest.raises(ValueError, match=message):
        LRUSequenceMixer(**options)


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="stat_dim"):
        LRUSequenceMixer(4, jr.key(0), stat_dim=3)  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, -3, 2.5])
def test_kernel_length_is_checked(length):
    mixer = LRUSequenceMixer(4, jr.key(0), state_dim=3)
    with pytest.raises(ValueError, match=f"`length` must be .* at least 1; got {length}"):
        mixer.compute_kernel(length)


def test_bidirectional_widths_must_agree():
    narrow, wide = LRUSequenceMixer(3, jr.key(0)), LRUSequenceMixer(4, jr.key(1))
    with pytest.raises(ValueError, match="the same `in_features`; got 3 and 4"):
        Bidirectional(narrow, wide)


def test_bidirectional_is_the_sum_of_both_directions():
    mixers = [LRUSequenceMixer(4, jr.key(seed), state_dim=3) for seed in (0, 1)]
    x = jr.normal(jr.key(2), (9, 4))
    y, cache = Bidirectional(*mixers)(x)
    assert cache is None
    expected = mixers[0](x)[0] + mixers[1](x[::-1])[0][::-1]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jnp.abs(y - mixers[0](x)[0]).max() > 0.1
