"""Transitions of systems with one input, and their powers."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from discretax.ops._recurrence.transitions import conjugate, times, times_in_loop


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


class DiagonalPower(NamedTuple):
    """A power of a diagonal transition, as a map of flat states."""

    planes: Float[Array, "features 2 state"]

    def __call__(self, h: Float[Array, "features flat"]) -> Float[Array, "features flat"]:
        return flat(times(self.planes, unflat(h)))

    def krylov(self, right: Array, left: Array, count: int) -> "tuple[Array, Array, DiagonalPower]":
        """A^j right and left A^j for j below `count`, and A^count.

        One by one: products unrolled would take XLA long to compile, and the derivative of one
        product with all powers is far slower than that of a loop.
        """
        one = jnp.zeros_like(self.planes).at[:, 0].set(1)
        forth, back = times_in_loop(self.planes), times_in_loop(conjugate(self.planes)[None])

        @ft.partial(jax.checkpoint, prevent_cse=False)  # keeps what it starts from, alone
        def advance(carry, _):
            power, right, left = carry
            return (forth(power), forth(right), back(left)), (right, left)

        carry = (one, unflat(right), unflat(left))
        (last, _, _), (rights, lefts) = lax.scan(advance, carry, length=count)
        return flat(rights), flat(lefts), DiagonalPower(last)

    def pull(
        self, left: Float[Array, "*lead features flat"]
    ) -> Float[Array, "*lead features flat"]:
        """left A. A complex number as a real 2x2 matrix is transposed by conjugation."""
        left = unflat(left)
        return flat(times(lax.broadcast_to_rank(conjugate(self.planes), left.ndim), left))


class DensePower(NamedTuple):
    """A power of a transition with a low-rank part, as a real matrix of flat states."""

    matrix: Float[Array, "features flat flat"]

    def __call__(self, h: Float[Array, "features flat"]) -> Float[Array, "features flat"]:
        return jnp.einsum("fst,ft->fs", self.matrix, h)

    def krylov(self, right: Array, left: Array, count: int) -> "tuple[Array, Array, DensePower]":
        """A^j right and left A^j for j below `count`, a power of two, by doubling, and A^count."""
        ahead, back, power = right[None], left[None], self.matrix
        while ahead.shape[0] < count:
            ahead = jnp.concatenate([ahead, jnp.einsum("fst,jft->jfs", power, ahead)])
            back = jnp.concatenate([back, DensePower(power).pull(back)])
            power = power @ power
        return ahead, back, DensePower(power)

    def pull(
        self, left: Float[Array, "*lead features flat"]
    ) -> Float[Array, "*lead features flat"]:
        """left A."""
        return jnp.einsum("fst,...fs->...ft", self.matrix, left)


def power_of(transition: Transition) -> DiagonalPower | DensePower:
    A, U, W = transition
    if U is None or W is None:
        return DiagonalPower(A)
    state_dim = A.shape[-1]
    eye = jnp.eye(2 * state_dim, dtype=A.dtype).reshape(-1, 1, 2, state_dim)
    columns = flat(times(A[None], eye))  # (column, features, row)
    U = U.reshape(U.shape[0], -1, U.shape[-1])
    return DensePower(jnp.moveaxis(columns, 0, -1) + jnp.einsum("fsr,frt->fst", U, flat(W)))


def flat(planes: Float[Array, "*lead 2 state"]) -> Float[Array, "*lead flat"]:
    return planes.reshape(*planes.shape[:-2], -1)


def unflat(flat: Float[Array, "*lead flat"]) -> Float[Array, "*lead 2 state"]:
    return flat.reshape(*flat.shape[:-1], 2, -1)
