import math

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax.init._inverse_softplus import inverse_softplus


def log_uniform_step(
    key: PRNGKeyArray, shape: tuple[int, ...], dt_min: float, dt_max: float
) -> Float[Array, "..."]:
    r"""$\log\Delta$ uniform in $[\log\Delta_{min}, \log\Delta_{max}]$, in sample intervals.

    A state of rate 1 remembers about $1/\Delta$ samples: the range of steps is the range of
    memories. (S4, arXiv:2111.00396, appendix D; S5, arXiv:2208.04933, section B.1.3.)

    **Raises:** `ValueError` unless $0 < \Delta_{min} \le \Delta_{max}$.
    """
    _check_range(dt_min, dt_max)
    return draw.uniform(key, shape, minval=math.log(dt_min), maxval=math.log(dt_max))


def step_bias(
    key: PRNGKeyArray, shape: tuple[int, ...], dt_min: float, dt_max: float, floor: float
) -> Float[Array, "..."]:
    r"""Biases under a softplus whose steps are log-uniform in $[\Delta_{min}, \Delta_{max}]$.

    No step starts below the `floor`. (Mamba, arXiv:2312.00752, section 3.6.)

    **Raises:** `ValueError` unless $0 < \Delta_{min} \le \Delta_{max}$.
    """
    steps = jnp.exp(log_uniform_step(key, shape, dt_min, dt_max))
    return inverse_softplus(jnp.maximum(steps, floor))


def log_rate(
    key: PRNGKeyArray, shape: tuple[int, ...], low: float, high: float
) -> Float[Array, "..."]:
    r"""Logarithms of rates that are uniform in $[\mathrm{low}, \mathrm{high}]$.

    In a step $\Delta$ a state decays by $e^{-\Delta\,\mathrm{rate}}$. (Mamba-2, arXiv:2405.21060.)

    **Raises:** `ValueError` unless $0 < \mathrm{low} \le \mathrm{high} < \infty$.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"rates must start in a range 0 < low <= high; got ({low}, {high}).")
    return jnp.log(draw.uniform(key, shape, minval=low, maxval=high))


def log_spaced_step(num_steps: int, dt_min: float, dt_max: float) -> Float[Array, " step"]:
    r"""$\log\Delta$ evenly spread over $[\log\Delta_{min}, \log\Delta_{max}]$, in sample intervals.

    **Raises:** `ValueError` unless $0 < \Delta_{min} \le \Delta_{max}$.
    """
    _check_range(dt_min, dt_max)
    return jnp.linspace(math.log(dt_min), math.log(dt_max), num_steps)


def _check_range(dt_min: float, dt_max: float) -> None:
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"steps need 0 < dt_min <= dt_max; got dt_min={dt_min} and dt_max={dt_max}."
        )
