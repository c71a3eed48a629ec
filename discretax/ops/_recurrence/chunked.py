import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from discretax._broken import contained
from discretax.ops._recurrence.linear_recurrence import Implementation, recurrence
from discretax.ops._recurrence.transitions import NUMBERS, Transitions
from discretax.ops._running.chunks import Left, scan_chunks_in_place, state_at
from discretax.ops._running.split_time import incoming_state


def chunked_recurrence(
    terms: Callable[[Any, Array, Any], tuple[Array, Array, Any]],
    readout: Callable[[Any, Float[Array, "chunk *state"], Any], Float[Array, "chunk ..."]],
    weights: PyTree[Array],
    h0: Float[Array, "*state"],
    samples: Float[Array, "time features"],
    inputs: PyTree[Array] = None,
    *,
    resets: Bool[Array, " time"] | None,
    length: Left | None,
    chunk_size: int,
    transitions: Transitions = NUMBERS,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*state"], Float[Array, "time ..."]]:
    """The last valid state, and the readout of all, whose states exist a chunk at a time.

    `terms` makes a and b of the recurrence from the `weights`, a chunk of `samples` and one of
    `inputs`, and whatever `readout` makes the output from, besides weights and states. Neither closes
    over anything. `terms` mends the samples, of which some may be broken.
    """
    form = _Form(terms, readout, transitions, implementation)

    def summary():
        start = transitions.basis(h0), jnp.zeros_like(h0)
        basis, h = _over_time(_summarise, form, chunk_size, weights, start, chunks, length)[0]
        return transitions.of_basis(*basis), h

    chunks = samples, inputs, resets
    h0 = incoming_state(h0, summary, resets, transitions.apply)
    return _over_time(_run, form, chunk_size, weights, h0, chunks, length)


class _Form(NamedTuple):
    """Equal for calls alike, which then share what is compiled."""

    terms: Callable[[Any, Array, Any], tuple[Array, Array, Any]]
    readout: Callable[[Any, Array, Any], Array]
    transitions: Transitions
    implementation: Implementation

    def states(self, a, b, h, resets):
        options = {"transitions": self.transitions, "implementation": self.implementation}
        return recurrence(a, b, h, resets, **options)


@ft.partial(jax.jit, static_argnums=(0, 1, 2))
def _over_time(run, form, chunk_size, weights, state, inputs, length):
    run = ft.partial(run, form)
    return scan_chunks_in_place(run, weights, state, inputs, length, chunk_size)


def _run(form: _Form, weights, h, chunk, left):
    samples, inputs, resets = chunk

    def advance(h):
        a, b, rest = form.terms(weights, samples, inputs)
        after = form.states(a, b, h, resets)
        return form.readout(weights, after, rest), state_at(after, h, left)

    y, h = contained(advance, h, samples, resets, left)
    return h, y


def _summarise(form: _Form, weights, before, chunk, left):
    samples, inputs, resets = chunk

    def advance(before):
        (a, b, _), (basis, h) = form.terms(weights, samples, inputs), before
        carried = tuple(form.states(a, jnp.zeros_like(b), one, resets) for one in basis)
        after = carried, form.states(a, b, h, resets)
        return None, jax.tree.map(lambda last, first: state_at(last, first, left), after, before)

    return contained(advance, before, samples, resets, left)[1], None
