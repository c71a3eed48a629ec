"""The linear recurrence h_t = a_t h_{t-1} + b_t: its meaning, its derivative rule, its dispatch.

Every mixer of the library ends here, and nowhere else is the recurrence's step or its
associative combination written down.
"""

import functools as ft
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from discretax.ops._sequence_parallel import incoming_state, time_parts

Implementation = Literal["sequential", "associative"] | None


def linear_recurrence(
    a: Inexact[Array, "time *state"] | Inexact[Array, "*state"],
    b: Inexact[Array, "time *state"],
    h0: Inexact[Array, "*state"] | None = None,
    *,
    resets: Bool[Array, " time"] | None = None,
    reverse: bool = False,
    implementation: Implementation = None,
) -> Inexact[Array, "time *state"]:
    r"""All states of the elementwise linear recurrence $h_t = a_t h_{t-1} + b_t$.

    The derivative rule saves the states alone. With $\lambda_t$ the cotangent that reaches
    $h_t$ through all later states, $\lambda_t = g_t + a_{t+1} \lambda_{t+1}$: the backward pass
    is the same recurrence in the other direction. (No conjugate appears for complex `a`: JAX's
    cotangents are transposed, not adjoint.) The rule itself can be differentiated again in
    reverse mode.

    **Arguments:**

    - `a`: the transition, real or complex; shaped like `b`, or like one state if it does not
        change with time.
    - `b`: the drive, of shape `(time, *state)`.
    - `h0`: the state before the first sample (with `reverse=True`, after the last one). Zero
        if left out.
    - `resets`: where True at `t`, the state before `t` is taken to be zero. It is selected, not
        multiplied, so that a NaN in the past does not pass.
    - `reverse`: run from the last sample to the first, $h_t = a_t h_{t+1} + b_t$.
    - `implementation`: `"sequential"` walks through time with `lax.scan`: least work, least
        rounding, fastest on CPU. `"associative"` is a parallel scan of logarithmic depth. `None`
        chooses when the function is lowered: sequential on CPU, associative elsewhere.

    **Returns:**

    The states $h_t$, of shape `(time, *state)`. Inputs narrower than float32 are accumulated in
    float32 and the states returned in the inputs' type.

    **Raises:**

    `ValueError` if the shapes do not fit or `implementation` is unknown; `TypeError` if the types
    of `a`, `b` and `h0` differ or are not floating.
    """
    if implementation not in ("sequential", "associative", None):
        raise ValueError(
            "`implementation` must be 'sequential', 'associative' or None (choose by platform); "
            f"got {implementation!r}."
        )
    if b.ndim == 0 or a.shape not in (b.shape, b.shape[1:]):
        raise ValueError(
            "`a` must have the shape of `b`, (time, *state), or of one state, (*state,); "
            f"got a: {a.shape} and b: {b.shape}. Broadcast `a` with `jnp.broadcast_to`."
        )
    if h0 is None:
        h0 = jnp.zeros(b.shape[1:], b.dtype)
    if h0.shape != b.shape[1:]:
        raise ValueError(f"`h0` must have the shape of one state, {b.shape[1:]}; got {h0.shape}.")
    if resets is not None and (resets.shape != b.shape[:1] or resets.dtype != bool):
        raise ValueError(
            f"`resets` must be a boolean array of shape (time,) = {b.shape[:1]}; got "
            f"{resets.dtype}{resets.shape}."
        )
    if not (a.dtype == b.dtype == h0.dtype) or not jnp.issubdtype(b.dtype, jnp.inexact):
        raise TypeError(
            "`a`, `b` and `h0` must be of one floating or complex type; got "
            f"{a.dtype}, {b.dtype} and {h0.dtype}. Convert with `.astype`."
        )
    dtype = b.dtype
    if dtype in (jnp.bfloat16, jnp.float16):
        a, b, h0 = a.astype(jnp.float32), b.astype(jnp.float32), h0.astype(jnp.float32)
    states = ft.partial(
        recurrence, a, resets=resets, reverse=reverse, implementation=implementation
    )
    if time_parts() > 1 and reverse:
        raise ValueError(
            "with time split over devices, `linear_recurrence` runs forward alone; got reverse=True."
        )
    summary = lambda: (
        states(jnp.zeros_like(b), jnp.ones_like(h0))[-1],
        states(b, jnp.zeros_like(h0))[-1],
    )
    h = states(b, incoming_state(h0, summary, resets))
    return h.astype(dtype)


def recurrence(
    a: Array,
    b: Array,
    h0: Array,
    resets: Array | None,
    *,
    reverse: bool = False,
    planes: bool = False,
    implementation: Implementation = None,
) -> Array:
    """`linear_recurrence` without checks, also for complex states held as real planes.

    With `planes`, axis -2 of `a`, `b` and `h0` has size two and holds real and imaginary part:
    a float array of shape (time, 2, state), which a reshape turns into the (time, 2*state) that
    one real matrix product yields or consumes.
    """
    if b.shape[0] == 0:
        return b
    return _recurrence(planes, reverse, implementation, a, b, h0, resets)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recurrence(planes, reverse, implementation, a, b, h0, resets):
    sequential = ft.partial(_sequential, planes, reverse)
    associative = ft.partial(_associative, planes, reverse)
    if implementation == "sequential" or b.shape[0] == 1:
        return sequential(a, b, h0, resets)
    if implementation == "associative":
        return associative(a, b, h0, resets)
    return lax.platform_dependent(a, b, h0, resets, cpu=sequential, default=associative)


def _recurrence_fwd(planes, reverse, implementation, a, b, h0, resets):
    h = _recurrence(planes, reverse, implementation, a, b, h0, resets)
    return h, (a, h0, resets, h)


def _recurrence_bwd(planes, reverse, implementation, residuals, g):
    a, h0, resets, h = residuals
    first = -1 if reverse else 0
    earlier, later = slice(None, -1), slice(1, None)
    if reverse:
        earlier, later = later, earlier

    def next_sample(value):  # value[t + 1], and zero after the last sample
        end = jnp.zeros_like(value[:1])
        return jnp.concatenate([end, value[later]] if reverse else [value[later], end])

    varying = a.ndim == h.ndim
    # As a real 2x2 matrix, a complex number is transposed by conjugation.
    transpose = conjugate if planes else lambda value: value
    multiply = times if planes else jnp.multiply
    adjoint = transpose(a)
    lam = recurrence(
        next_sample(adjoint) if varying else adjoint,
        g,
        jnp.zeros_like(h0),
        None if resets is None else next_sample(resets),
        reverse=not reverse,
        planes=planes,
        implementation=implementation,
    )
    dh0 = multiply(adjoint[first] if varying else adjoint, lam[first])
    da_first = multiply(transpose(h0), lam[first])
    da_later = multiply(transpose(h[earlier]), lam[later])
    if resets is not None:
        dh0 = jnp.where(resets[first], 0, dh0)
        da_first = jnp.where(resets[first], 0, da_first)
        da_later = jnp.where(_align(resets[later], da_later), 0, da_later)
    if varying:
        parts = [da_first[None], da_later]
        da = jnp.concatenate(parts[::-1] if reverse else parts)
    else:
        da = da_first + da_later.sum(0)
    return da, lam, dh0, None


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _sequential(planes, reverse, a, b, h0, resets):
    multiply = times if planes else jnp.multiply
    varying = a.ndim == b.ndim

    def step(h, inputs):
        a_t, b_t, reset_t = inputs
        h_t = multiply(a_t if varying else a, h) + b_t
        if reset_t is not None:
            h_t = jnp.where(reset_t, b_t, h_t)
        return h_t, h_t

    return lax.scan(step, h0, (a if varying else None, b, resets), reverse=reverse)[1]


def _associative(planes, reverse, a, b, h0, resets):
    multiply = times if planes else jnp.multiply
    first = -1 if reverse else 0
    a = jnp.broadcast_to(a, b.shape)
    b_first = multiply(a[first], h0) + b[first]
    if resets is not None:
        b_first = jnp.where(resets[first], b[first], b_first)
    b = b.at[first].set(b_first)

    def combine(earlier, later):
        (a_i, b_i, reset_i), (a_j, b_j, reset_j) = earlier, later
        h_j = multiply(a_j, b_i) + b_j
        if reset_j is None:
            return multiply(a_j, a_i), h_j, None
        return multiply(a_j, a_i), jnp.where(_align(reset_j, h_j), b_j, h_j), reset_i | reset_j

    return lax.associative_scan(combine, (a, b, resets), reverse=reverse)[1]


def times(a: Array, h: Array) -> Array:
    """Complex product of two arrays of planes."""
    a_re, a_im, h_re, h_im = a[..., 0, :], a[..., 1, :], h[..., 0, :], h[..., 1, :]
    return jnp.stack([a_re * h_re - a_im * h_im, a_re * h_im + a_im * h_re], axis=-2)


def to_planes(values: Array) -> Array:
    """Real and imaginary part along axis -2."""
    return jnp.stack([values.real, values.imag], axis=-2)


def to_complex(planes: Array) -> Array:
    return lax.complex(planes[..., 0, :], planes[..., 1, :])


def conjugate(a: Array) -> Array:
    return a * jnp.array([[1], [-1]], a.dtype)


def _align(flags, values):
    """Reshapes one flag per sample so that it broadcasts against (time, *state)."""
    return flags.reshape(flags.shape + (1,) * (values.ndim - 1))
