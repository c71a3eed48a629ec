"""The linear recurrence in XLA's own terms: step by step, and as a parallel scan."""

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def accumulated(value: Array) -> jnp.dtype:
    """The type in which `value` enters sums and products: no narrower than float32."""
    return jnp.dtype(jnp.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value.dtype


@ft.partial(jax.jit, static_argnums=(0, 1))
def sequential(planes, reverse, a, b, h0, resets):
    """Writes each state over its drive: nothing else of that size, and under `vmap` no transposes."""
    varying = a.ndim == b.ndim
    dtype, wide = b.dtype, accumulated(b)

    def multiplication(a):
        a = a.astype(wide)
        return times_in_loop(a) if planes else lambda h: a * h

    constant = None if varying else multiplication(a)
    within = {"allow_negative_indices": False}

    def step(i, carry):
        h, states = carry
        t = b.shape[0] - 1 - i if reverse else i
        sample = lambda value: lax.dynamic_index_in_dim(value, t, keepdims=False, **within)
        drive = sample(states).astype(wide)
        h = (constant or multiplication(sample(a)))(h) + drive
        if resets is not None:
            h = jnp.where(sample(resets), drive, h)
        return h, lax.dynamic_update_index_in_dim(states, h.astype(dtype), t, 0, **within)

    return lax.fori_loop(0, b.shape[0], step, (h0.astype(wide), b))[1]


def associative(planes, reverse, a, b, h0, resets):
    multiply = times if planes else jnp.multiply
    first = -1 if reverse else 0
    dtype = b.dtype
    a, b, h0 = (value.astype(accumulated(value)) for value in (a, b, h0))
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
        return multiply(a_j, a_i), jnp.where(align(reset_j, h_j), b_j, h_j), reset_i | reset_j

    return lax.associative_scan(combine, (a, b, resets), reverse=reverse)[1].astype(dtype)


def times(a: Array, h: Array) -> Array:
    """Complex product of two arrays of planes."""
    a_re, a_im, h_re, h_im = a[..., 0, :], a[..., 1, :], h[..., 0, :], h[..., 1, :]
    return jnp.stack([a_re * h_re - a_im * h_im, a_re * h_im + a_im * h_re], axis=-2)


def times_in_loop(a: Array) -> Callable[[Array], Array]:
    """The complex product with `a`, of both planes at once.

    On CPU, XLA vectorises this within a loop, and not `times`, which takes the planes apart. Over
    whole arrays it would make arrays of what is added.
    """
    re, im = a[..., :1, :], a[..., 1:, :]
    same, crossed = jnp.concatenate([re, re], axis=-2), jnp.concatenate([-im, im], axis=-2)
    return lambda h: same * h + crossed * lax.rev(h, (h.ndim - 2,))


def to_planes(values: Array) -> Array:
    """Real and imaginary part along axis -2."""
    return jnp.stack([values.real, values.imag], axis=-2)


def to_complex(planes: Array) -> Array:
    return lax.complex(planes[..., 0, :], planes[..., 1, :])


def conjugate(a: Array) -> Array:
    return a * lax.broadcast_to_rank(jnp.array([[1], [-1]], a.dtype), a.ndim)


def align(flags, values):
    """Reshapes one flag per sample so that it broadcasts against (time, *state)."""
    return flags.reshape(flags.shape + (1,) * (values.ndim - 1))
