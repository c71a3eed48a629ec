"""Discretisations against numpy in extended precision, near A = 0 above all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from discretax.ops import asynchronous, bilinear, dirac, zoh

# From zero through the border between series and closed form (0.3) to fast decay.
SIZES = (0.0, 1e-30, 1e-12, 1e-7, 1e-4, 1e-2, 0.2, 0.299, 0.301, 0.5, 2.0, 30.0)
RATES = np.array([size * direction for size in SIZES for direction in (-1, -1 + 1j, 1j)])


def mean_of_exp(z):
    """(exp(z) - 1) / z by its Taylor series, or, where that would cancel, by its definition."""
    z = np.asarray(z, np.clongdouble)
    term, total = np.ones_like(z), np.ones_like(z)
    for n in range(2, 60):
        term = term * z / n
        total = total + term
    safe = np.where(np.abs(z) < 1, 1, z)
    return np.where(np.abs(z) < 1, total, (np.exp(safe) - 1) / safe)


def derivative_of_mean_of_exp(z):
    z = np.asarray(z, np.clongdouble)
    term, total = np.full_like(z, 0.5), np.full_like(z, 0.5)
    for n in range(3, 60):
        term = term * z / n
        total = total + (n - 1) * term
    safe = np.where(np.abs(z) < 1, 1, z)
    return np.where(np.abs(z) < 1, total, (np.exp(safe) * (safe - 1) + 1) / safe**2)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("complex128", 1e-14), ("complex64", 5e-7)], ids=["double", "single"]
)
def test_zoh_is_exact_also_near_zero(dtype, rtol):
    with jax.enable_x64(dtype == "complex128"):
        A, dt = jnp.asarray(RATES, dtype), jnp.asarray(0.5, dtype)
        A_bar, gamma = jax.jit(zoh)(A, dt)
        z = np.asarray(A) * 0.5
        np.testing.assert_allclose(A_bar, np.exp(z), rtol=rtol)
        np.testing.assert_allclose(gamma, 0.5 * mean_of_exp(z), rtol=rtol)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("complex128", 1e-13), ("complex64", 5e-6)], ids=["double", "single"]
)
def test_zoh_gradient_is_exact_also_near_zero(dtype, rtol):
    with jax.enable_x64(dtype == "complex128"):
        A, dt = jnp.asarray(RATES, dtype), jnp.asarray(0.5, dtype)
        gradient = jax.jit(jax.vmap(jax.grad(lambda a: zoh(a, dt)[1], holomorphic=True)))(A)
        expected = 0.25 * derivative_of_mean_of_exp(np.asarray(A) * 0.5)
        np.testing.assert_allclose(gradient, expected, rtol=rtol)


def test_zoh_of_real_rates_is_real():
    A = jnp.array([-1e-8, -0.1, -3.0])
    A_bar, gamma = zoh(A, jnp.float32(1.0))
    assert A_bar.dtype == gamma.dtype == jnp.float32
    np.testing.assert_allclose(gamma, mean_of_exp(np.asarray(A)).real, rtol=3e-7)


def test_zoh_solves_the_differential_equation():
    """A constant input held over a step, integrated in a thousand small ones."""
    A, dt = -0.7 + 2.0j, 0.9
    h = 0.3 + 0.1j
    A_bar, gamma = zoh(jnp.complex64(A), jnp.complex64(dt))
    target = A_bar * h + gamma
    small = dt / 100_000
    for _ in range(100_000):
        h = h + small * (A * h + 1)
    np.testing.assert_allclose(target, h, rtol=1e-4)


def test_bilinear_maps_the_left_half_plane_into_the_unit_disc():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        A = -rng.exponential(10, 1000) + 1j * rng.normal(0, 10, 1000)
        A_bar, gamma = map(np.asarray, bilinear(jnp.asarray(A), jnp.asarray(0.3 + 0j)))
        assert (np.abs(A_bar) < 1).all()
        # The trapezoid rule: (h' - h) / dt = A (h' + h) / 2 + input.
        h = rng.normal(size=1000)
        after = A_bar * h + gamma
        np.testing.assert_allclose((after - h) / 0.3, A * (after + h) / 2 + 1, rtol=1e-9)


def test_dirac_adds_the_input_undecayed():
    A = jnp.array([-0.5 + 1j, -2.0 + 0j])
    A_bar, gamma = dirac(A, jnp.complex64(0.25))
    np.testing.assert_allclose(A_bar, np.exp(np.asarray(A) * 0.25), rtol=1e-6)
    assert (gamma == 1).all()


def test_asynchronous_input_does_not_know_the_gap():
    A, dt = jnp.array([-0.5 + 1j, -2.0 + 0j]), jnp.array([0.25 + 0j, 0.5 + 0j])
    gaps = jnp.array([0.0, 1.0, 7.5])[:, None].astype(A.dtype)
    A_bar, gamma = asynchronous(A, dt, gaps)
    np.testing.assert_allclose(
        A_bar, np.exp(np.asarray(A) * np.asarray(dt) * np.asarray(gaps)), rtol=1e-6
    )
    np.testing.assert_allclose(gamma, (np.exp(A * dt) - 1) / A, rtol=1e-6)
    unit = asynchronous(A, dt, jnp.ones((1, 1), A.dtype))
    for actual, expected in zip(unit, zoh(A, dt), strict=True):
        np.testing.assert_array_equal(jnp.squeeze(actual), expected)
