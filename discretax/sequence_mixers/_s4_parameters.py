"""What S4 and S4D share: how their parameters start, and what continuous system they stand for."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from discretax._features import check_name, check_size
from discretax._types import Timesteps
from discretax.init import Measure, diagonalised_hippo, hippo, log_uniform_step

Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]
StepTransform = Literal["exp", "softplus"]
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


def untransformed(value: np.ndarray, transform: str) -> Float[Array, "..."]:
    """The raw parameter that `transformed` takes to `value`."""
    if transform == "sigmoid" and value.max() >= 1:
        raise ValueError(
            'the transform "sigmoid" reaches values below 1 only; this initialisation has '
            f"{value.max():.3g}. Choose another transform or `init`."
        )
    value = np.maximum(value, _SMALLEST) if transform != "none" else value
    raw = {
        "none": lambda: value,
        "exp": lambda: np.log(value),
        "relu": lambda: value - _SMALLEST,
        "sigmoid": lambda: np.log(value) - np.log1p(-value),
        "softplus": lambda: value + np.log(-np.expm1(-value)),
    }[transform]()
    return jnp.asarray(raw, float)


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
) -> int:
    """Refuses sizes and names that do not fit; returns the number of trained systems."""
    check_size("in_features", in_features)
    check_size("state_dim", state_dim)
    check_size("channels", channels)
    check_name("real_transform", real_transform, Transform)
    check_name("imag_transform", imag_transform, Transform)
    check_name("dt_transform", dt_transform, StepTransform)
    if l_max is not None:
        check_size("l_max", l_max)
    if pairs and state_dim % 2:
        raise ValueError(
            "`state_dim` counts both states of each conjugate pair and must be even; got "
            f"{state_dim}."
        )
    n_ssm = in_features if n_ssm is None else n_ssm
    check_size("n_ssm", n_ssm)
    if in_features % n_ssm:
        raise ValueError(
            "`n_ssm`, the number of systems that the features share, must divide `in_features`; "
            f"got n_ssm={n_ssm} and in_features={in_features}."
        )
    if step_rescale <= 0:
        raise ValueError(f"`step_rescale` must be positive; got {step_rescale}.")
    return n_ssm


def init_step(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    dt_min: float,
    dt_max: float,
    dt_transform: str,
    deterministic: bool,
) -> Float[Array, "features states"]:
    log_dt = log_uniform_step(key, shape, dt_min, dt_max)
    if deterministic:
        spread = jnp.linspace(math.log(dt_min), math.log(dt_max), shape[0])
        log_dt = jnp.broadcast_to(spread[:, None], shape)
    if dt_transform == "softplus":  # exp(dt) - 1 = expm1(dt)
        return jnp.log(jnp.expm1(jnp.exp(log_dt)))
    return log_dt


def init_diagonal(
    init: str, state_dim: int, key: PRNGKeyArray
) -> tuple[Complex[np.ndarray, " half"], Complex[np.ndarray, " half"]]:
    r"""$-A$ and $B$ of S4D, one of each conjugate pair: $A = -\mathrm{Re} - i\,\mathrm{Im}$."""
    n = np.arange(state_dim // 2)
    if init == "legs":
        Lambda, V = diagonalised_hippo("legs", state_dim)
        half = slice(state_dim // 2)
        return -Lambda[half], V[:, half].conj().T @ hippo("legs", state_dim)[1]
    real = np.full(len(n), 0.5)
    if init == "real":
        return n + 1.0 + 0j, np.ones(len(n), complex)
    imag = {
        "lin": lambda: np.pi * n,
        "inv": lambda: state_dim / np.pi * (state_dim / (2 * n + 1) - 1),
        "quad": lambda: (1 + 2 * n) ** 2 / np.pi,
        "rand": lambda: np.exp(np.asarray(jr.normal(key, (len(n),)), float)),
    }[init]()
    return real + 1j * imag, np.ones(len(n), complex)


def init_dplr(
    measure: Measure, state_dim: int, rank: int
) -> tuple[
    Complex[np.ndarray, " half"], Complex[np.ndarray, " half"], Complex[np.ndarray, "rank half"]
]:
    r"""$-\Lambda$, $B$ and $P$ of HiPPO as diagonal plus low rank, $A = \Lambda - P P^*$."""
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
    return -Lambda[half], to_eigenvectors @ B, (to_eigenvectors @ P.T).T


def pairs(values: np.ndarray | Array) -> Float[Array, "*shape 2"]:
    """A complex array as real and imaginary part along a last axis."""
    return jnp.stack(
        [jnp.asarray(part, float) for part in (jnp.real(values), jnp.imag(values))], axis=-1
    )


def joined(values: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    return lax.complex(values[..., 0], values[..., 1])


def init_readout(
    key: PRNGKeyArray, shape: tuple[int, int, int], deterministic: bool, V: np.ndarray | None
) -> Float[Array, "channels features half 2"]:
    """Standard complex normal; or, `deterministic`, the first coordinate before diagonalisation."""
    if not deterministic:
        return jr.normal(key, (*shape, 2)) * 0.5**0.5
    first = np.eye(1, shape[2])[0] if V is None else V[0, : shape[2]].conj()
    return pairs(jnp.broadcast_to(jnp.asarray(first, complex), shape))


def shared(values: Array, in_features: int) -> Array:
    """Repeats the trained systems, (n_ssm, ...), over the features: feature h takes h mod n_ssm."""
    return jnp.tile(values, (in_features // values.shape[0],) + (1,) * (values.ndim - 1))


def continuous_system(mixer, timesteps: Timesteps | None) -> tuple[Array, Array, Array, Array]:
    r"""$\Delta$ (over all timesteps, if given), $A$, $B$ and $2C$ of `mixer`, complex, per feature."""
    dt = mixer.step_rescale * transformed(mixer.inv_dt, mixer.dt_transform)
    if timesteps is not None:
        dt = dt * jnp.asarray(timesteps, dt.dtype)[..., None, None]
    real = -transformed(mixer.A_real, mixer.real_transform)
    if mixer.A_imag is None:
        A, B, C = (lax.complex(part, jnp.zeros_like(part)) for part in (real, mixer.B, mixer.C))
    else:
        A = lax.complex(real, -transformed(mixer.A_imag, mixer.imag_transform))
        B, C = joined(mixer.B), joined(mixer.C)
    A, B = shared(A, mixer.in_features), shared(B, mixer.in_features)
    return dt.astype(A.dtype), A, B, 2 * C
