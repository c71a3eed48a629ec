"""Transitions of systems with one input, and their powers."""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import PLANES, conjugate, times, times_in_loop
from discretax.ops._running.derivatives import differentiated, push_through
from discretax.ops._running.manual_axes import vary_alike


class Transition(NamedTuple):
    r"""$h \mapsto A \odot h + U\,\mathrm{Re}(W h)$ for each feature: diagonal, or plus low rank.

    - `A`: planes (re, im), `(*time, features, 2, state)`.
    - `U`, `W`: None, or `(*time, features, 2, state, rank)` and `(*time, features, rank, 2, state)`,
        `W` with the planes (re, -im), so that $\mathrm{Re}(W h)$ is a plain product.
    """

    A: Array
    U: Array | None = None
    W: Array | None = None

    def __call__(self, h: Float[Array, "features 2 state"]) -> Float[Array, "features 2 state"]:
        moved = times(self.A, h)
        if self.U is None or self.W is None:
            return moved
        return moved + jnp.einsum("fpnr,frqm,fqm->fpn", self.U, self.W, h)

    def krylov(
        self,
        right: Float[Array, "features 2 state"],
        left: Float[Array, "channels features 2 state"],
        count: int,
    ) -> "tuple[Array, Array, Power]":
        r"""$T^j$ right and left $T^{j+1}$ for j below `count`, flat, and $T^c$ with c = `count`.

        One by one: products unrolled would take XLA long to compile, and the derivative of one
        product with all powers is far slower than that of a loop. The power of a diagonal
        $\Lambda$ with a low-rank part needs no products of large matrices either:

        $$(\Lambda + U W)^c = \Lambda^c + \sum_{j < c} (\Lambda + U W)^j U\, W \Lambda^{c-1-j}$$
        """
        one = jnp.zeros_like(self.A).at[:, 0].set(1)
        lefts = flat(powers_on(self.transposed(), left, count)[1:])
        if self.U is None or self.W is None:
            rights = powers_on(self, jnp.stack([right, one]), count)
            return flat(rights[:-1, 0]), lefts, DiagonalPower(rights[-1, 1])
        columns, rows = jnp.moveaxis(self.U, -1, 0), jnp.moveaxis(self.W, 1, 0)
        rights = flat(powers_on(self, jnp.concatenate([right[None], columns]), count - 1))
        diagonal = Transition(conjugate(self.A))
        rows = powers_on(diagonal, jnp.concatenate([one[None], rows]), count)
        correction = jnp.einsum("jrfs,jrft->fst", rights[:, 1:], flat(rows[-2::-1, 1:]))
        return rights[:, 0], lefts, DensePower(_dense(conjugate(rows[-1, 0])) + correction)

    def in_loop(self) -> Callable[[Array], Array]:
        """The map of several states, (lead, features, 2, state), for a loop."""
        diagonal = times_in_loop(self.A[None])
        if self.U is None or self.W is None:
            return diagonal
        # On CPU sums are faster than products as small as these.
        U, W = jnp.moveaxis(self.U, -1, 1)[None], self.W[None]

        def advance(h):
            seen = (W * h[:, :, None]).sum((-2, -1), keepdims=True)
            return diagonal(h) + (U * seen).sum(2)

        return advance

    def transposed(self) -> "Transition":
        """As a real matrix of flat states: a complex number is one of 2 x 2."""
        if self.U is None or self.W is None:
            return Transition(conjugate(self.A))
        U, W = jnp.moveaxis(self.W, 1, -1), jnp.moveaxis(self.U, -1, 1)
        return Transition(conjugate(self.A), U, W)

    def cotangent(self, lam: Array, before: Array) -> "Transition":
        """Of the transition that made states with the cotangents `lam` from those `before`."""
        d_A = times(conjugate(before), lam).sum((0, 1))
        if self.U is None or self.W is None:
            return Transition(d_A)
        seen = jnp.einsum("frqm,jkfqm->jkfr", self.W, before)
        d_seen = jnp.einsum("fpnr,jkfpn->jkfr", self.U, lam)
        d_U = jnp.einsum("jkfpn,jkfr->fpnr", lam, seen)
        return Transition(d_A, d_U, jnp.einsum("jkfr,jkfqm->frqm", d_seen, before))


class DiagonalPower(NamedTuple):
    """A power of a diagonal transition."""

    planes: Float[Array, "features 2 state"]

    def states(self, inputs: Float[Array, "chunks features flat"], h0) -> Array:
        """The state after each chunk."""
        return flat(recurrence(self.planes, unflat(inputs), h0, None, transitions=PLANES))

    def lefts(self, left: Float[Array, "channels features 2 state"], count: int) -> Array:
        """left P^j for j below `count`; flat."""
        return flat(powers_on(Transition(self.planes).transposed(), left, count - 1))


class DensePower(NamedTuple):
    """A power of a transition with a low-rank part, as a real matrix of flat states."""

    matrix: Float[Array, "features flat flat"]

    def states(self, inputs: Float[Array, "chunks features flat"], h0) -> Array:
        """The state after each chunk."""
        return driven(self, inputs[..., None], flat(h0)[..., None])[..., 0]

    def lefts(self, left: Float[Array, "channels features 2 state"], count: int) -> Array:
        """left P^j for j below `count`; flat."""
        lefts = powers_on(self.transposed(), jnp.moveaxis(flat(left), 0, -1), count - 1)
        return jnp.moveaxis(lefts, -1, 1)

    def in_loop(self) -> Callable[[Array], Array]:
        """The map of states side by side, (features, flat, columns)."""
        return lambda h: self.matrix @ h

    def transposed(self) -> "DensePower":
        return DensePower(self.matrix.swapaxes(1, 2))

    def cotangent(self, lam: Array, before: Array) -> "DensePower":
        return DensePower(jnp.einsum("jfsk,jftk->fst", lam, before))


Power = DiagonalPower | DensePower


def powers_on(transition: Transition | DensePower, start: Array, count: int) -> Array:
    """`start`, and what the transition makes of it once, twice, ..., `count` times."""
    none = jnp.zeros_like(start, shape=(count, *start.shape))
    return jnp.concatenate([start[None], driven(transition, none, start)])


def driven(transition: Transition | DensePower, inputs: Array, h0: Array) -> Array:
    """All h_t = T h_{t-1} + v_t.

    The cotangent of T is one sum over all states at the end: added up in a loop, all of it would go
    through memory at every step.
    """
    arrays, structure = jax.tree.flatten((transition, inputs, h0))
    return _driven(None, *jax.tree.unflatten(structure, vary_alike(*arrays)))


def _walk(_, transition, inputs, h0):
    apply = transition.in_loop()

    def step(h, v):
        h = apply(h) + v
        return h, h

    return lax.scan(step, h0, inputs)[1]


def _forward(_, transition, inputs, h0):
    states = _driven(None, transition, inputs, h0)
    return states, (transition, inputs, h0, states)


def _push(_, kept, tangents):
    return push_through(ft.partial(_walk, None), kept[:3], tangents)


def _pull(_, kept, cotangents):
    transition, inputs, h0, states = kept
    if states.shape[0] == 0:
        return jax.tree.map(jnp.zeros_like, (transition, inputs, h0))
    transposed = transition.transposed()
    lam = _driven(None, transposed, cotangents[::-1], jnp.zeros_like(h0))[::-1]
    before = jnp.concatenate([h0[None], states[:-1]])
    return transition.cotangent(lam, before), lam, transposed.in_loop()(lam[0])


_driven = differentiated(_walk, _forward, _push, _pull)


def _dense(planes: Float[Array, "features 2 state"]) -> Float[Array, "features flat flat"]:
    """The real matrices of flat states of complex numbers."""
    state_dim = planes.shape[-1]
    eye = jnp.eye(2 * state_dim, dtype=planes.dtype).reshape(-1, 1, 2, state_dim)
    return jnp.moveaxis(flat(times(planes[None], eye)), 0, -1)  # from (column, features, row)


def flat(planes: Float[Array, "*lead 2 state"]) -> Float[Array, "*lead flat"]:
    return planes.reshape(*planes.shape[:-2], -1)


def unflat(flat: Float[Array, "*lead flat"]) -> Float[Array, "*lead 2 state"]:
    return flat.reshape(*flat.shape[:-1], 2, -1)
