r"""From a continuous diagonal system $\dot h = A h + B x$ to $h_t = \bar A h_{t-1} + \gamma \odot (B x_t)$.

Each function returns the pair $(\bar A, \gamma)$ for an eigenvalue `A` (real or complex) and a step
`dt`, in sample intervals. Both broadcast, so that `dt` of shape (time, state) gives a system that
changes with time. The input factor $\gamma$ multiplies $B x_t$ or the rows of $B$.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def zoh(
    A: Inexact[Array, "*state"], dt: Inexact[Array, "*step"]
) -> tuple[Inexact[Array, "*both"], Inexact[Array, "*both"]]:
    r"""Zero-order hold: $\bar A = e^{A \Delta}$, $\gamma = A^{-1}(\bar A - 1)$.

    Exact for an input that is constant between samples, and exact at and near $A = 0$, where
    $\gamma \to \Delta$. (S5, arXiv:2208.04933, eq. 6.)

    **Arguments:** `A`: eigenvalues. `dt`: steps, in sample intervals.

    **Returns:** $(\bar A, \gamma)$.
    """
    A, dt = jnp.broadcast_arrays(A, dt)
    z = A * dt
    return jnp.exp(z), dt * _mean_of_exp(0, z)


def bilinear(
    A: Inexact[Array, "*state"], dt: Inexact[Array, "*step"]
) -> tuple[Inexact[Array, "*both"], Inexact[Array, "*both"]]:
    r"""Bilinear (Tustin): $\bar A = \frac{1 + A \Delta/2}{1 - A \Delta/2}$, $\gamma = \frac{\Delta}{1 - A \Delta/2}$.

    Maps the left half plane onto the unit disc. With the two signs swapped, a mistake found in
    other code, the disc is left and the state explodes. (S4, arXiv:2111.00396, eq. 3.)

    **Arguments:** `A`: eigenvalues. `dt`: steps, in sample intervals.

    **Returns:** $(\bar A, \gamma)$.
    """
    A, dt = jnp.broadcast_arrays(A, dt)
    denominator = 1 - A * dt / 2
    return (1 + A * dt / 2) / denominator, dt / denominator


def dirac(
    A: Inexact[Array, "*state"], dt: Inexact[Array, "*step"]
) -> tuple[Inexact[Array, "*both"], Inexact[Array, "*both"]]:
    r"""Dirac input: $\bar A = e^{A \Delta}$, $\gamma = 1$.

    Each sample is an impulse that arrives undecayed, as an event does. (Event-SSM,
    arXiv:2404.18508.)

    **Arguments:** `A`: eigenvalues. `dt`: steps, in sample intervals.

    **Returns:** $(\bar A, \gamma)$.
    """
    A, dt = jnp.broadcast_arrays(A, dt)
    A_bar = jnp.exp(A * dt)
    return A_bar, jnp.ones_like(A_bar)


def asynchronous(
    A: Inexact[Array, "*state"], dt: Inexact[Array, "*state"], timesteps: Inexact[Array, "*step"]
) -> tuple[Inexact[Array, "*both"], Inexact[Array, "*state"]]:
    r"""Asynchronous events: $\bar A_t = e^{A \Delta \tau_t}$, $\gamma = A^{-1}(e^{A \Delta} - 1)$.

    The state decays over the gap $\tau_t$ since the previous event; what an event adds does not
    depend on how long one waited for it. (Event-SSM, arXiv:2404.18508, eq. 8.)

    **Arguments:** `A`: eigenvalues. `dt`: steps, in sample intervals. `timesteps`: gap before
    each event, in sample intervals, shaped to broadcast against `A * dt`.

    **Returns:** $(\bar A_t, \gamma)$.
    """
    A, dt = jnp.broadcast_arrays(A, dt)
    z, timesteps = jnp.broadcast_arrays(A * dt, timesteps)
    return jnp.exp(z * timesteps), zoh(A, dt)[1]


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mean_of_exp(order: int, z: Array) -> Array:
    r"""$\int_0^1 s^k e^{sz} ds$, the derivative of order $k$ of $(e^z - 1)/z$, exact near $z = 0$.

    Far from zero each follows from the one before by parts, $(e^z - k I_{k-1}) / z$, and dividing by
    a small number costs digits. Below 0.3, and further out the higher the order, the series serves.
    It is not differentiated: that would hold all its terms, and cancel.
    """
    terms = 8 if jnp.finfo(z.dtype).bits == 32 else 18
    small = jnp.abs(z) < 0.3 * (order + 1)
    near = jnp.where(small, z, 0)
    # The terms z^n / (n! (n + k + 1)), from the last to the first.
    series = jnp.zeros_like(z)
    for n in range(terms, -1, -1):
        series = 1 / (n + order + 1) + series * near / (n + 1)
    far = jnp.where(small, 1, z)
    e_z = jnp.exp(z)
    integral = (e_z - 1) / far
    for k in range(1, order + 1):
        integral = (e_z - k * integral) / far
    return jnp.where(small, series, integral)


@_mean_of_exp.defjvp
def _mean_of_exp_jvp(order, primals, tangents):
    (z,), (dz,) = primals, tangents
    return _mean_of_exp(order, z), _mean_of_exp(order + 1, z) * dz
