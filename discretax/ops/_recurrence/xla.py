"""The linear recurrence in XLA's own terms: step by step, and as a parallel scan."""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from discretax.ops._recurrence.transitions import Transitions


def accumulated(value: Array) -> jnp.dtype:
    """The type in which `value` enters sums and products: no narrower than float32."""
    return jnp.dtype(jnp.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value.dtype


@ft.partial(jax.jit, static_argnums=(0, 1))
def sequential(transitions: Transitions, reverse, a, b, h0, resets):
    """Writes each state over its drive: nothing else of that size, and under `vmap` no transposes."""
    varying = a.ndim == b.ndim
    dtype, wide = b.dtype, accumulated(b)

    multiplication = lambda a: transitions.apply_in_loop(a.astype(wide))
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


def associative(transitions: Transitions, reverse, a, b, h0, resets):
    first = -1 if reverse else 0
    dtype = b.dtype
    a, b, h0 = (value.astype(accumulated(value)) for value in (a, b, h0))
    a = a if a.ndim == b.ndim else jnp.broadcast_to(a, (b.shape[0], *a.shape))
    b_first = transitions.apply(a[first], h0) + b[first]
    if resets is not None:
        b_first = jnp.where(resets[first], b[first], b_first)
    b = b.at[first].set(b_first)

    def combine(earlier, later):
        (a_i, b_i, reset_i), (a_j, b_j, reset_j) = earlier, later
        h_j = transitions.apply(a_j, b_i) + b_j
        a_ij = transitions.compose(a_j, a_i)
        if reset_j is None:
            return a_ij, h_j, None
        return a_ij, jnp.where(align(reset_j, h_j), b_j, h_j), reset_i | reset_j

    return lax.associative_scan(combine, (a, b, resets), reverse=reverse)[1].astype(dtype)


def align(flags, values):
    """Reshapes one flag per sample so that it broadcasts against (time, *state)."""
    return flags.reshape(flags.shape + (1,) * (values.ndim - 1))
