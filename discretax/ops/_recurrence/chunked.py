from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from discretax.ops._recurrence.linear_recurrence import Implementation, recurrence
from discretax.ops._recurrence.xla import times
from discretax.ops._running.chunks import Left, scan_chunks_in_place, state_at
from discretax.ops._running.split_time import incoming_state


def chunked_recurrence(
    terms: Callable[[Any, Any], tuple[Array, Array, Any]],
    readout: Callable[[Any, Float[Array, "chunk *state"], Any], Float[Array, "chunk ..."]],
    weights: PyTree[Array],
    h0: Float[Array, "*state"],
    inputs: PyTree[Array],
    *,
    resets: Bool[Array, " time"] | None,
    length: Left | None,
    chunk_size: int,
    planes: bool = False,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*state"], Float[Array, "time ..."]]:
    """The last valid state, and the readout of all, whose states exist a chunk at a time.

    `terms` makes a and b of the recurrence from the `weights` and a chunk of `inputs`, and whatever
    `readout` makes the output from, besides weights and states.
    """

    def states(a, b, h, resets):
        return recurrence(a, b, h, resets, planes=planes, implementation=implementation)

    def run(weights, h, chunk, left):
        inputs, resets = chunk
        a, b, rest = terms(weights, inputs)
        after = states(a, b, h, resets)
        return state_at(after, h, left), readout(weights, after, rest)

    def summarise(weights, before, chunk, left):
        inputs, resets = chunk
        (a, b, _), (decay, h) = terms(weights, inputs), before
        after = states(a, jnp.zeros_like(b), decay, resets), states(a, b, h, resets)
        return tuple(map(state_at, after, before, (left, left))), None

    def summary():
        one = jnp.zeros_like(h0).at[..., 0, :].set(1) if planes else jnp.ones_like(h0)
        start = one, jnp.zeros_like(h0)
        return scan_chunks_in_place(
            summarise, weights, start, (inputs, resets), length, chunk_size
        )[0]

    h0 = incoming_state(h0, summary, resets, times if planes else jnp.multiply)
    return scan_chunks_in_place(run, weights, h0, (inputs, resets), length, chunk_size)
