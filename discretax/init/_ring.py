import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw


def ring(
    key: PRNGKeyArray, state_dim: int, r_min: float, r_max: float, max_phase: float
) -> tuple[Float[Array, " state"], Float[Array, " state"], Float[Array, " state"]]:
    r"""Eigenvalues $\lambda = e^{-\nu + i\theta}$ uniform by area on a ring of the complex plane.

    $|\lambda|^2$ is uniform in $[r_{min}^2, r_{max}^2]$ and $\theta$ in $[0, \theta_{max}]$
    (LRU, arXiv:2303.06349, lemma 3.2). It is $q = 1 - |\lambda|^2$ that is drawn: close to the unit
    circle, where long memory lives, $1 - q$ would round it away.

    **Returns:**

    $\log \nu$, $\log \theta$ and $\log \gamma = \frac12 \log(1 - |\lambda|^2)$, each `(state,)`.

    **Raises:**

    `ValueError` unless $0 \le r_{min} \le r_{max} \le 1$, $r_{min} < 1$, $0 < r_{max}$ and
    $\theta_{max} > 0$.
    """
    if not (0 <= r_min <= r_max <= 1 and r_min < 1 and r_max > 0):
        raise ValueError(
            "the ring of eigenvalues needs 0 <= r_min <= r_max <= 1, with r_min < 1 and r_max > 0; "
            f"got r_min={r_min} and r_max={r_max}."
        )
    if max_phase <= 0:
        raise ValueError(f"`max_phase` must be positive, in radians; got {max_phase}.")
    radius_key, phase_key = draw.split(key)
    # Zero would have a logarithm of minus infinity.
    smallest = float(jnp.finfo(jnp.result_type(float)).eps)
    u = draw.uniform(radius_key, (state_dim,), minval=smallest)
    q = (1 - r_max**2) + (r_max**2 - r_min**2) * u
    nu = -0.5 * jnp.log1p(-q)
    theta = max_phase * draw.uniform(phase_key, (state_dim,), minval=smallest)
    return jnp.log(nu), jnp.log(theta), 0.5 * jnp.log(q)
