"""What S4 and S4D share: how their parameters start, and what continuous system they stand for."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._features import check_name, check_positive, check_size, divided
from discretax._types import Timesteps
from discretax.init import (
    Measure,
    diagonalised_hippo,
    hippo,
    inverse_softplus,
    log_spaced_step,
    log_uniform_step,
)
from discretax.sequence_mixers.base import AbstractContinuousMixer, zero_cache

Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]
StepTransform = Literal["exp", "softplus"]
Half = Complex[np.ndarray, " half"]
_SMALLEST = 1e-4  # relu keeps its distance to zero; where a system starts at zero, it starts here


def transformed(raw: Array, transform: str) -> Array:
    """A parameter that is positive (or, with "none", as it is)."""
    if transform == "exp":
        return jnp.exp(raw)
    if transform == "relu":
        return jax.nn.relu(raw) + _SMALLEST
    if transform == "sigmoid":
        return jax.nn.sigmoid(raw)
    if transform == "softplus":
        return jax.nn.softplus(raw)
    return raw


def untransformed(
    value: np.ndarray | Array, transform: str, shape: tuple[int, int]
) -> Float[Array, "n_ssm half"]:
    """The raw parameters that `transformed` takes to `value`, a JAX array if it was drawn."""
    largest = math.inf if isinstance(value, jax.Array) else value.max()
    if transform == "sigmoid" and largest >= 1:
        raise ValueError(
            'the transform "sigmoid" reaches values below 1 only; this initialisation has them up '
            f"to {largest:.3g}. Choose another transform or `init`."
        )
    value = jnp.broadcast_to(jnp.asarray(value, float), shape)
    if transform == "none":
        return value
    value = jnp.maximum(value, _SMALLEST)
    if transform == "exp":
        return jnp.log(value)
    if transform == "relu":
        return value - _SMALLEST
    if transform == "sigmoid":
        return jnp.log(value) - jnp.log1p(-value)
    return inverse_softplus(value)


def check_options(
    in_features: int,
    state_dim: int,
    channels: int,
    n_ssm: int | None,
    l_max: int | None,
    real_transform: str,
    imag_transform: str,
    dt_transform: str,
    step_rescale: float,
    *,
    pairs: bool = True,
) -> tuple[int, int, int, int, int | None]:
    """Refuses sizes and names that do not fit; returns the sizes, with the number of systems."""
    in_features = check_size("in_features", in_features)
    state_dim = check_size("state_dim", state_dim)
    channels = check_size("channels", channels)
    check_name("real_transform", real_transform, Transform)
    check_name("imag_transform", imag_transform, Transform)
    check_name("dt_transform", dt_transform, StepTransform)
    if l_max is not None:
        l_max = check_size("l_max", l_max)
    if pairs and state_dim % 2:
        raise ValueError(
            "`state_dim` counts both states of each conjugate pair and must be even; got "
            f"{state_dim}."
        )
    n_ssm = check_size("n_ssm", in_features if n_ssm is None else n_ssm)
    divided("in_features", in_features, "n_ssm", n_ssm)
    check_positive("step_rescale", step_rescale)
    return in_features, state_dim, channels, n_ssm, l_max


def init_step(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    dt_min: float,
    dt_max: float,
    dt_transform: str,
    deterministic: bool,
) -> Float[Array, "features states"]:
    if deterministic:
        log_dt = jnp.broadcast_to(log_spaced_step(shape[0], dt_min, dt_max)[:, None], shape)
    else:
        log_dt = log_uniform_step(key, shape, dt_min, dt_max)
    return inverse_softplus(jnp.exp(log_dt)) if dt_transform == "softplus" else log_dt


def init_diagonal(
    init: str, state_dim: int, n_ssm: int, key: PRNGKeyArray
) -> tuple[np.ndarray, np.ndarray | Array, Half, Half]:
    r"""Real and imaginary part of $-A$, and $B$ of S4D, one of each conjugate pair, and the first
    coordinate as a readout. The same for all `n_ssm` systems, unless drawn for each."""
    if init == "legs":
        minus_Lambda, B, _, first = init_dplr("legs", state_dim, rank=1)
        return np.real(minus_Lambda), np.imag(minus_Lambda), B, first
    n = np.arange(state_dim // 2)
    ones, first = np.ones(len(n), complex), np.eye(1, len(n), dtype=complex)[0]
    if init == "real":
        return n + 1.0, np.zeros(len(n)), ones, first
    imag = {
        "lin": lambda: np.pi * n,
        "inv": lambda: state_dim / np.pi * (state_dim / (2 * n + 1) - 1),
        "quad": lambda: (1 + 2 * n) ** 2 / np.pi,
        "rand": lambda: jnp.exp(draw.normal(key, (n_ssm, len(n)))),
    }[init]()
    return np.full(len(n), 0.5), imag, ones, first


def init_dplr(
    measure: Measure, state_dim: int, rank: int
) -> tuple[Half, Half, Complex[np.ndarray, "rank half"], Half]:
    r"""$-\Lambda$, $B$ and $P$ of HiPPO as diagonal plus low rank, $A = \Lambda - P P^*$, and the
    first coefficient as a readout."""
    _, B, P = hippo(measure, state_dim)
    if rank < len(P):
        raise ValueError(
            f'`rank` must be at least {len(P)} for init="{measure}", which needs so large a '
            f"correction to become normal; got {rank}."
        )
    Lambda, V = diagonalised_hippo(measure, state_dim)
    half = slice(state_dim // 2)
    to_eigenvectors = V[:, half].conj().T
    P = np.concatenate([P, np.zeros((rank - len(P), state_dim))])
    return -Lambda[half], to_eigenvectors @ B, (to_eigenvectors @ P.T).T, V[0, half].conj()


def pairs(values: np.ndarray) -> Float[Array, "*shape 2"]:
    """A complex array as real and imaginary part along a last axis."""
    return jnp.stack(
        [jnp.asarray(part, float) for part in (np.real(values), np.imag(values))], axis=-1
    )


def joined(values: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    return lax.complex(values[..., 0], values[..., 1])


def init_readout(
    key: PRNGKeyArray, shape: tuple[int, int, int], deterministic: bool, first: Half
) -> Float[Array, "channels features half 2"]:
    """Standard complex normal; or, `deterministic`, the `first` coordinate."""
    if not deterministic:
        return draw.normal(key, (*shape, 2)) * 0.5**0.5
    return pairs(np.broadcast_to(first, shape))


def shared(values: Array, in_features: int) -> Array:
    """Repeats the trained systems, (n_ssm, ...), over the features: feature h takes h mod n_ssm."""
    return jnp.tile(values, (in_features // values.shape[0],) + (1,) * (values.ndim - 1))


class AbstractS4Mixer(AbstractContinuousMixer[Float[Array, "features 2 state"]]):
    """What the two mixers do alike: one system for each feature, from parameters of these names."""

    A_real: eqx.AbstractVar[Float[Array, "n_ssm state"]]
    A_imag: eqx.AbstractVar[Float[Array, "n_ssm state"] | None]
    B: eqx.AbstractVar[Float[Array, "n_ssm state *parts"]]
    C: eqx.AbstractVar[Float[Array, "channels features state *parts"]]
    inv_dt: eqx.AbstractVar[Float[Array, "features steps"]]
    real_transform: eqx.AbstractVar[Transform]
    imag_transform: eqx.AbstractVar[Transform]
    dt_transform: eqx.AbstractVar[StepTransform]

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "features 2 state"]:
        del max_seqlen
        return zero_cache(batch_size, (self.in_features, 2, self.A_real.shape[1]), dtype)

    def compute_kernel(self, length: int) -> Float[Array, "time channels features"]:
        r"""$K_l = 2\,\mathrm{Re}(C \bar A^l \bar B)$, $l = 0, \dots$, length - 1: $y = K * x + D x$."""
        length = check_size("length", length)
        return self.discretize().kernel(length)

    def _continuous_system(self, timesteps: Timesteps | None) -> tuple[Array, Array, Array, Array]:
        r"""$\Delta$ (over all timesteps, if given), $A$, $B$ and $2C$, complex, per feature."""
        dt = self.step_rescale * transformed(self.inv_dt, self.dt_transform)
        if timesteps is not None:
            dt = jnp.multiply.outer(jnp.asarray(timesteps, dt.dtype), dt)
        real = -transformed(self.A_real, self.real_transform)
        if self.A_imag is None:
            A, B, C = (lax.complex(part, jnp.zeros_like(part)) for part in (real, self.B, self.C))
        else:
            A = lax.complex(real, -transformed(self.A_imag, self.imag_transform))
            B, C = joined(self.B), joined(self.C)
        A, B = (shared(v, self.in_features) for v in (A, B))
        A, B = (lax.broadcast_to_rank(v, dt.ndim) for v in (A, B))
        return dt.astype(A.dtype), A, B, 2 * C
