"""A chunk of samples of a depthwise system as matrices, and the states between chunks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from discretax.ops._depthwise_ssm.transition import Power, Transition, flat, unflat


class Chunk(NamedTuple):
    """One chunk of samples as matrices, for every feature."""

    toeplitz: Float[Array, "features chunk channels*chunk"]
    from_input: Float[Array, "features chunk flat"]
    to_output: Float[Array, "features flat channels*chunk"]
    power: Power

    @classmethod
    def of(cls, transition: Transition, B: Array, C: Array, D: Array | None, size: int) -> "Chunk":
        ahead, back, power = transition.krylov(B, C, size)
        kernel = jnp.einsum("cfs,jfs->fcj", flat(C), ahead)
        if D is not None:
            kernel = kernel.at[..., 0].add(D.T)
        features = kernel.shape[0]
        return cls(
            _toeplitz(kernel).swapaxes(1, 2).reshape(features, size, -1),
            jnp.moveaxis(ahead[::-1], 0, 1),
            jnp.transpose(back, (2, 3, 1, 0)).reshape(features, ahead.shape[-1], -1),
            power,
        )


def _toeplitz(kernel: Float[Array, "*lead size"]) -> Float[Array, "*lead size size"]:
    """`T[i, j] = kernel[j - i]`, zero below the diagonal.

    The kernel and as many zeros, over and over, in rows of one less: each row begins one later.
    A gather would be plainer, but its derivative is a scatter, which is slow on CPU.
    """
    size = kernel.shape[-1]
    lead = kernel.shape[:-1]
    period = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=-1)
    rows = jnp.broadcast_to(period[..., None, :], (*lead, size, 2 * size)).reshape(*lead, -1)
    return rows[..., : size * (2 * size - 1)].reshape(*lead, size, -1)[..., :size]


def boundary_states(power: Power, inputs: Float[Array, "features chunks flat"], h0):
    """The states before each chunk, (chunks, features, flat), and the one after the last."""
    after = power.states(jnp.moveaxis(inputs, 1, 0), h0)
    return jnp.concatenate([flat(h0)[None], after[:-1]]), after[-1]


def state_within(transition, B, inputs, before, after, left):
    """The state after the last valid of `left` samples: from the boundary before it, by steps."""
    chunks, size = inputs.shape[1:]
    if left is None:
        return unflat(after)
    chunk = left // size
    h = jnp.where(chunk < chunks, before[jnp.minimum(chunk, chunks - 1)], after)
    x = lax.dynamic_index_in_dim(inputs, chunk, 1, keepdims=False)

    def step(h, inputs):
        x_t, valid = inputs
        return jnp.where(valid, transition(h) + B * x_t[:, None, None], h), None

    return lax.scan(step, unflat(h), (x.T, jnp.arange(size) < left - chunk * size))[0]
