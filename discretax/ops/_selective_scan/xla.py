"""The selective scan in XLA's own terms: chunk by chunk, and sample by sample within a chunk."""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from discretax.ops._discretization import bilinear, zoh
from discretax.ops._running.chunks import whole_chunks

SelectiveDiscretization = Literal["mamba", "zoh", "bilinear", "dirac"]


class Samples(NamedTuple):
    x: Float[Array, "*time features"]
    dt: Float[Array, "*time features"]
    dt_A: Float[Array, "*time features"] | None
    B: Float[Array, "*time state"]
    C: Float[Array, "*time state"]


# The states are (state, features): features next to each other in memory take half the time of
# states next to each other on CPU. Time is walked by index, and results are put into whole arrays:
# `lax.scan` would fill a new buffer with zeros for every chunk, which takes as long as computing
# it, and would want time as the first axis under `jax.vmap`.
def scan_forward(
    discretization: SelectiveDiscretization,
    chunk_size: int,
    samples: Samples,
    resets: Bool[Array, " time"] | None,
    A: Float[Array, "state features"],
    h0: Float[Array, "state features"],
):
    """Outputs and last state, and for the backward pass the state before each chunk."""
    (time, _), dtype = samples.x.shape, samples.x.dtype
    chunk_size = min(chunk_size, time)
    # Zeros after the last sample are the identity on the state.
    samples, resets = whole_chunks((samples, resets), chunk_size)
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
    return y[:time].astype(dtype), h, starts


def scan_backward(discretization, chunk_size, samples, resets, A, starts, d_y, d_h):
    """From the last chunk to the first: its states and decays once more, then back through them."""
    time = samples.x.shape[0]
    chunk_size = min(chunk_size, time)
    samples, resets, d_y = whole_chunks((samples, resets, d_y.astype(A.dtype)), chunk_size)
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
    return jax.tree.map(lambda value: value[:time], d_samples), d_A, d_h0


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
