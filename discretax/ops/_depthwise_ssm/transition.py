"""Transitions of systems with one input, and their powers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import PLANES, conjugate, times, times_in_loop
from discretax.ops._running.derivatives import differentiated
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
        r"""$T^j$ right and left $T^j$ for j below `count`, and $T^c$ with c = `count`; flat.

        One by one: products unrolled would take XLA long to compile, and the derivative of one
        product with all powers is far slower than that of a loop. The power of a diagonal
        $\Lambda$ with a low-rank part needs no product of large matrices either:

        $$(\Lambda + U W)^c = \Lambda^c + \sum_{j < c} (\Lambda + U W)^j U\, W \Lambda^{c-1-j}$$
        """
        forth, back = self._in_loop(), self._transposed()._in_loop()
        along, against = (times_in_loop(planes[None]) for planes in (self.A, conjugate(self.A)))
        one = jnp.zeros_like(self.A).at[:, 0].set(1)
        low_rank = self.U is not None and self.W is not None
        columns, rows = (
            (jnp.moveaxis(self.U, -1, 0), jnp.moveaxis(self.W, 1, 0))
            if low_rank
            else (left[:0], left[:0])
        )
        advance = lambda carry: (
            forth(carry[0]), back(carry[1]), along(carry[2]), against(carry[3]),
        )  # fmt: skip
        start = jnp.concatenate([right[None], columns]), left, one[None], rows
        (rights, lefts, _, rows), (_, _, (diagonal,), _) = repeated(advance, start, count)
        rights, lefts, rows = flat(rights), flat(lefts), flat(rows)
        if not low_rank:
            return rights[:, 0], lefts, DiagonalPower(diagonal)
        correction = jnp.einsum("jrfs,jrft->fst", rights[:, 1:], rows[::-1])
        return rights[:, 0], lefts, DensePower(_dense(diagonal) + correction)

    def pull(self, left: Float[Array, "lead features 2 state"]) -> Array:
        """left T."""
        return self._transposed()._in_loop()(left)

    def _transposed(self) -> "Transition":
        """As a real matrix of flat states: a complex number is one of 2 x 2."""
        if self.U is None or self.W is None:
            return Transition(conjugate(self.A))
        U, W = jnp.moveaxis(self.W, 1, -1), jnp.moveaxis(self.U, -1, 1)
        return Transition(conjugate(self.A), U, W)

    def _in_loop(self) -> Callable[[Array], Array]:
        """The map of several states, (lead, features, 2, state), for a loop."""
        diagonal = times_in_loop(self.A[None])
        if self.U is None or self.W is None:
            return diagonal

        def advance(h):
            seen = jnp.einsum("frqm,kfqm->kfr", self.W, h)
            return diagonal(h) + jnp.einsum("fpnr,kfr->kfpn", self.U, seen)

        return advance


class DiagonalPower(NamedTuple):
    """A power of a diagonal transition."""

    planes: Float[Array, "features 2 state"]

    def states(self, inputs: Float[Array, "chunks features flat"], h0) -> Array:
        """The state after each chunk."""
        return flat(recurrence(self.planes, unflat(inputs), h0, None, transitions=PLANES))

    def lefts(self, left: Float[Array, "channels features 2 state"], count: int) -> Array:
        """left P^j for j below `count`; flat."""
        return flat(repeated(times_in_loop(conjugate(self.planes)[None]), left, count)[0])


class DensePower(NamedTuple):
    """A power of a transition with a low-rank part, as a real matrix of flat states."""

    matrix: Float[Array, "features flat flat"]

    def states(self, inputs: Float[Array, "chunks features flat"], h0) -> Array:
        """The state after each chunk."""
        return dense_recurrence(self.matrix, inputs[..., None], flat(h0)[..., None])[..., 0]

    def lefts(self, left: Float[Array, "channels features 2 state"], count: int) -> Array:
        """left P^j for j below `count`; flat."""
        left = jnp.moveaxis(flat(left), 0, -1)
        none = jnp.zeros_like(left, shape=(count - 1, *left.shape))
        later = dense_recurrence(self.matrix.swapaxes(1, 2), none, left)
        return jnp.moveaxis(jnp.concatenate([left[None], later]), -1, 1)


Power = DiagonalPower | DensePower


def repeated(
    advance: Callable[[PyTree[Array]], PyTree[Array]], start: PyTree[Array], count: int
) -> tuple[PyTree[Array], PyTree[Array]]:
    """`start` and what it becomes, once to `count - 1` times, stacked; and `count` times."""

    @jax.checkpoint(prevent_cse=False)  # keeps what it starts from, alone
    def step(carry, _):
        return advance(carry), carry

    last, stacked = lax.scan(step, start, length=count)
    return stacked, last


def dense_recurrence(
    matrix: Float[Array, "features flat flat"],
    inputs: Float[Array, "time features flat columns"],
    h0: Float[Array, "features flat columns"],
) -> Float[Array, "time features flat columns"]:
    """h_t = M h_{t-1} + v_t. Its derivative with respect to M is one product, not a sum of outer
    products of which each would go through memory."""
    return _dense_states(None, *vary_alike(matrix, inputs, h0))


def _dense_walk(_, matrix, inputs, h0):
    def step(h, v):
        h = matrix @ h + v
        return h, h

    return lax.scan(step, h0, inputs)[1]


def _dense_forward(_, matrix, inputs, h0):
    states = _dense_states(None, matrix, inputs, h0)
    return states, (matrix, jnp.concatenate([h0[None], states])[:-1])


def _dense_push(_, kept, tangents):
    matrix, before = kept
    d_matrix, d_inputs, d_h0 = tangents
    drive = jnp.zeros_like(before) if d_inputs is None else d_inputs
    if d_matrix is not None:
        drive = drive + jnp.einsum("fst,mftk->mfsk", d_matrix, before)
    d_h0 = jnp.zeros_like(before[0]) if d_h0 is None else d_h0
    return _dense_states(None, matrix, drive, d_h0)


def _dense_pull(_, kept, cotangents):
    matrix, before = kept
    transposed = matrix.swapaxes(1, 2)
    end = jnp.zeros_like(matrix, shape=before.shape[1:])
    lam = _dense_states(None, transposed, cotangents[::-1], end)[::-1]
    d_h0 = transposed @ lam[0] if before.shape[0] else end
    return jnp.einsum("mfsk,mftk->fst", lam, before), lam, d_h0


_dense_states = differentiated(_dense_walk, _dense_forward, _dense_push, _dense_pull)


def _dense(planes: Float[Array, "features 2 state"]) -> Float[Array, "features flat flat"]:
    """The real matrices of flat states of complex numbers."""
    state_dim = planes.shape[-1]
    eye = jnp.eye(2 * state_dim, dtype=planes.dtype).reshape(-1, 1, 2, state_dim)
    return jnp.moveaxis(flat(times(planes[None], eye)), 0, -1)  # from (column, features, row)


def flat(planes: Float[Array, "*lead 2 state"]) -> Float[Array, "*lead flat"]:
    return planes.reshape(*planes.shape[:-2], -1)


def unflat(flat: Float[Array, "*lead flat"]) -> Float[Array, "*lead 2 state"]:
    return flat.reshape(*flat.shape[:-1], 2, -1)
