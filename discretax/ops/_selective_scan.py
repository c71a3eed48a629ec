"""The selective scan of Mamba: a diagonal recurrence whose steps and projections the input chooses."""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._features import check_name, check_size
from discretax._timeseries import check_length, check_resets, valid_samples
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._discretization import bilinear, zoh
from discretax.ops._sequence_parallel import incoming_state

SelectiveDiscretization = Literal["mamba", "zoh", "bilinear", "dirac"]


def selective_scan(
    x: Float[Array, "time features"],
    dt: Float[Array, "time features"],
    A: Float[Array, "features state"],
    B: Float[Array, "time state"],
    C: Float[Array, "time state"],
    D: Float[Array, " features"] | None = None,
    h0: Float[Array, "features state"] | None = None,
    *,
    dt_A: Float[Array, "time features"] | None = None,
    discretization: SelectiveDiscretization = "mamba",
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Array, "time features"], Float[Array, "features state"]]:
    r"""Each feature is the input of a system of its own, sampled with a step that changes with time.

    $$h_t = \bar A_t \odot h_{t-1} + \gamma_t \odot (x_t B_t^T), \qquad y_t = h_t C_t + D \odot x_t$$

    | `discretization` | $\bar A_t$ | $\gamma_t$ |
    |---|---|---|
    | `"mamba"` | $e^{\Delta^A_t A}$ | $\Delta_t$ |
    | `"zoh"` | $e^{\Delta^A_t A}$ | $A^{-1}(e^{\Delta_t A} - 1)$ |
    | `"bilinear"` | $\frac{1 + \Delta^A_t A/2}{1 - \Delta^A_t A/2}$ | $\frac{\Delta_t}{1 - \Delta_t A/2}$ |
    | `"dirac"` | $e^{\Delta^A_t A}$ | 1 |

    The states, (time, features, state) of them, are never held together, neither forward nor
    backward: the forward pass keeps one state per chunk, and the backward pass computes a chunk's
    states again. (Mamba, arXiv:2312.00752, algorithm 2 and section 3.3.)

    **Arguments:**

    - `x`: the input.
    - `dt`: $\Delta$, the steps.
    - `A`: the rates, negative for a state that decays.
    - `B`, `C`: how each sample is written to the states and read from them, alike for all features.
    - `D`: the elementwise skip; none if left out.
    - `h0`: the state before the first sample; zero if left out.
    - `dt_A`: $\Delta^A$, the steps over which the state decays, where they are not `dt`, as between
        events.
    - `discretization`: see the table. `"mamba"` is the first order of `"zoh"` in the input alone.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass.
    - `chunk_size`: samples between two states that the backward pass keeps.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the discretization is unknown or an input is not real.
    """
    check_name("discretization", discretization, SelectiveDiscretization)
    check_size("chunk_size", chunk_size)
    if x.ndim != 2 or A.ndim != 2:
        raise ValueError(
            "`x` must be (time, features) and `A` (features, state); got "
            f"x: {x.shape} and A: {A.shape}. Use `jax.vmap` to batch."
        )
    (time, features), state_dim = x.shape, A.shape[1]
    for name, array in (("x", x), ("dt", dt), ("dt_A", dt_A)):
        check_array(name, array, time=time, features=features)
    for name, array in (("A", A), ("h0", h0)):
        check_array(name, array, features=features, state=state_dim)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, time=time, state=state_dim)
    check_array("D", D, features=features)
    check_length(length, time)
    check_resets(resets, time)
    dtype = accumulation_dtype(*jax.tree.leaves((x, dt, dt_A, A, B, C, D, h0)))
    h = jnp.zeros(A.shape, dtype) if h0 is None else h0.astype(dtype)
    if time == 0:
        return x, h

    if length is not None:
        # Padding becomes a step of zero and an input of zero: the identity on the state.
        valid = valid_samples(time, length)
        x, dt, dt_A, B, C = jax.tree.map(
            lambda value: jnp.where(valid[:, None], value, 0), (x, dt, dt_A, B, C)
        )
        resets = None if resets is None else resets & valid
    chunk_size = min(chunk_size, time)
    padding = -time % chunk_size  # zeros are the identity on the state here too
    samples = jax.tree.map(
        lambda value: jnp.pad(value, ((0, padding), (0, 0))), _Samples(x, dt, dt_A, B, C)
    )
    resets = None if resets is None else jnp.pad(resets, (0, padding))
    A = A.astype(dtype).T
    over_time = ft.partial(_scan, discretization, chunk_size)

    def summary():
        silence = samples._replace(x=jnp.zeros_like(samples.x))
        return (
            over_time(silence, resets, A, jnp.ones_like(A))[1],
            over_time(samples, resets, A, jnp.zeros_like(A))[1],
        )

    y, h = over_time(samples, resets, A, incoming_state(h.T, summary, resets))
    y = y[:time]
    if D is not None:
        y = y + D.astype(dtype) * x.astype(dtype)
    return y.astype(x.dtype), h.T


class _Samples(NamedTuple):
    x: Float[Array, "*time features"]
    dt: Float[Array, "*time features"]
    dt_A: Float[Array, "*time features"] | None
    B: Float[Array, "*time state"]
    C: Float[Array, "*time state"]


# The states are (state, features): features next to each other in memory take half the time of
# states next to each other on CPU. Time is walked by index, and results are put into whole arrays:
# `lax.scan` would fill a new buffer with zeros for every chunk, which takes as long as computing
# it, and would want time as the first axis under `jax.vmap`.
def _scan_forward(
    discretization: SelectiveDiscretization,
    chunk_size: int,
    samples: _Samples,
    resets: Bool[Array, " time"] | None,
    A: Float[Array, "state features"],
    h0: Float[Array, "state features"],
):
    """Outputs and last state, and for the backward pass the state before each chunk."""
    num_chunks = samples.x.shape[0] // chunk_size

    def run_chunk(i, carry):
        h, y, starts = carry

        def step(j, carry):
            h, y = carry
            sample, reset = _sample(samples, resets, i * chunk_size + j, A.dtype)
            _, h = _advance(discretization, A, _keep(reset, h), sample)
            return h, _put(y, i * chunk_size + j, jnp.dot(sample.C, h, precision="highest"))

        starts = _put(starts, i, h)
        h, y = lax.fori_loop(0, chunk_size, step, (h, y))
        return h, y, starts

    y = jnp.zeros(samples.x.shape, A.dtype)
    starts = jnp.zeros((num_chunks, *A.shape), A.dtype)
    h, y, starts = lax.fori_loop(0, num_chunks, run_chunk, (h0, y, starts))
    return (y, h), (samples, resets, A, starts)


def _scan_backward(discretization, chunk_size, kept, cotangents):
    """From the last chunk to the first: its states and decays once more, then back through them."""
    samples, resets, A, starts = kept
    d_y, d_h = cotangents
    num_chunks = starts.shape[0]

    def run_chunk(i, carry):
        d_h, d_A, d_samples, states, decays = carry
        i = num_chunks - 1 - i
        start = i * chunk_size

        def again(j, carry):
            h, states, decays = carry
            sample, reset = _sample(samples, resets, start + j, A.dtype)
            A_bar, h = _advance(discretization, A, _keep(reset, h), sample)
            return h, _put(states, j + 1, h), _put(decays, j, A_bar)

        h = _at(starts, i)
        carry = h, _put(states, 0, h), decays
        _, states, decays = lax.fori_loop(0, chunk_size, again, carry)

        def step(j, carry):
            d_h, d_A, d_samples = carry
            j = chunk_size - 1 - j
            sample, reset = _sample(samples, resets, start + j, A.dtype)
            d_y_t, A_bar = _at(d_y, start + j), _at(decays, j)
            d_h = d_h + _outer(sample.C, d_y_t)
            d_exponent = _slope(discretization, A_bar) * d_h * _keep(reset, _at(states, j))
            _, pull = jax.vjp(ft.partial(_terms, discretization), A, sample)
            d_A_t, d_sample = pull((d_exponent, d_h))
            d_sample = d_sample._replace(C=jnp.dot(_at(states, j + 1), d_y_t, precision="highest"))
            d_samples = jax.tree.map(
                lambda whole, value: _put(whole, start + j, value),
                d_samples,
                d_sample,
            )
            return _keep(reset, A_bar * d_h), d_A + d_A_t, d_samples

        d_h, d_A, d_samples = lax.fori_loop(0, chunk_size, step, (d_h, d_A, d_samples))
        return d_h, d_A, d_samples, states, decays

    states = jnp.zeros((chunk_size + 1, *A.shape), A.dtype)
    decays = jnp.zeros((chunk_size, *A.shape), A.dtype)
    d_samples = jax.tree.map(jnp.zeros_like, samples)
    carry = d_h, jnp.zeros_like(A), d_samples, states, decays
    d_h0, d_A, d_samples, *_ = lax.fori_loop(0, num_chunks, run_chunk, carry)
    return d_samples, None, d_A, d_h0


_scan = jax.custom_vjp(lambda *args: _scan_forward(*args)[0], nondiff_argnums=(0, 1))
_scan.defvjp(_scan_forward, _scan_backward)


def _advance(discretization, A, h, sample):
    """The decay and the new state."""
    exponent, drive = _terms(discretization, A, sample)
    A_bar = (
        bilinear(exponent, jnp.ones_like(exponent))[0]
        if discretization == "bilinear"
        else jnp.exp(exponent)
    )
    return A_bar, A_bar * h + drive


def _slope(discretization, A_bar):
    """The derivative of the decay with respect to its exponent."""
    return (0.5 + 0.5 * A_bar) ** 2 if discretization == "bilinear" else A_bar


def _terms(discretization, A, sample):
    """What the decay is made from, the product of rates and step, and what is added to the state."""
    x, dt, dt_A, B, _ = sample
    over_states = ft.partial(_outer, jnp.ones(A.shape[0], A.dtype))
    exponent = A * over_states(dt if dt_A is None else dt_A)
    if discretization == "mamba":
        return exponent, _outer(B, dt * x)
    if discretization == "zoh":
        return exponent, zoh(A, over_states(dt))[1] * _outer(B, x)
    if discretization == "bilinear":
        return exponent, bilinear(A, over_states(dt))[1] * _outer(B, x)
    return exponent, _outer(B, x)


def _outer(a: Float[Array, " state"], b: Float[Array, " features"]):
    # As a product of matrices, so that its derivatives are such products too. Those of a product
    # with broadcasting would be sums, at which XLA on CPU calls its threads in every step.
    return jnp.tensordot(a, b, axes=0, precision="highest")


def _keep(reset, h):
    return h if reset is None else jnp.where(reset, 0, h)


def _sample(samples, resets, t, dtype):
    sample = jax.tree.map(lambda whole: _at(whole, t).astype(dtype), samples)
    return sample, None if resets is None else _at(resets, t)


def _at(whole, t):
    return lax.dynamic_index_in_dim(whole, t, keepdims=False)


def _put(whole, t, value):
    return lax.dynamic_update_index_in_dim(whole, value.astype(whole.dtype), t, axis=0)
