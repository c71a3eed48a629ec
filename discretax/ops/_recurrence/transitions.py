"""What can carry a state to the next sample: a number, a complex number, or a matrix of 2 x 2.

A complex number and a matrix act on a state of two real planes, (..., 2, state). The one is held as
its two planes, the other as four: its diagonal, then what stands beside it, row by row.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


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


def conjugate(a: Array) -> Array:
    return a * lax.broadcast_to_rank(jnp.array([[1], [-1]], a.dtype), a.ndim)


def to_planes(values: Array) -> Array:
    """Real and imaginary part along axis -2."""
    return jnp.stack([values.real, values.imag], axis=-2)


def to_complex(planes: Array) -> Array:
    return lax.complex(planes[..., 0, :], planes[..., 1, :])


def matrices(M_11: Array, M_12: Array, M_21: Array, M_22: Array) -> Array:
    """The planes of matrices, from their entries."""
    return jnp.stack([M_11, M_22, M_12, M_21], axis=-2)


def entries(M: Array) -> tuple[Array, Array, Array, Array]:
    """`M_11, M_12, M_21, M_22` of the planes `M`."""
    M_11, M_22, M_12, M_21 = (M[..., plane, :] for plane in range(4))
    return M_11, M_12, M_21, M_22


def _apply(M, h):
    M_11, M_12, M_21, M_22 = entries(M)
    first, second = h[..., 0, :], h[..., 1, :]
    return jnp.stack([M_11 * first + M_12 * second, M_21 * first + M_22 * second], axis=-2)


def _apply_in_loop(M):
    same, crossed = M[..., :2, :], M[..., 2:, :]
    return lambda h: same * h + crossed * lax.rev(h, (h.ndim - 2,))


def _compose(later, earlier):
    columns = (_apply(later, column) for column in _columns(earlier))
    return _of_columns(*columns)


def _columns(M):
    M_11, M_12, M_21, M_22 = entries(M)
    return jnp.stack([M_11, M_21], axis=-2), jnp.stack([M_12, M_22], axis=-2)


def _of_columns(first, second):
    return matrices(first[..., 0, :], second[..., 0, :], first[..., 1, :], second[..., 1, :])


def _transpose(M):
    M_11, M_12, M_21, M_22 = entries(M)
    return matrices(M_11, M_21, M_12, M_22)


def _outer(lam, h):
    products = [lam[..., i, :] * h[..., j, :] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
    return matrices(*products)


@dataclasses.dataclass(frozen=True, eq=False)
class Transitions:
    """What the recurrence and its derivatives ask of a kind of transition."""

    apply: Callable[[Array, Array], Array]
    """`apply(a, h)`, the product with a state."""
    apply_in_loop: Callable[[Array], Callable[[Array], Array]]
    """The same for one sample after the other: `apply_in_loop(a)(h)`."""
    compose: Callable[[Array, Array], Array]
    """`compose(later, earlier)`, the product of two transitions."""
    transpose: Callable[[Array], Array]
    """As real matrices, of which a complex number is one."""
    outer: Callable[[Array, Array], Array]
    """`outer(lam, h)`, the cotangent of a transition of `h` whose result has the cotangent `lam`."""
    basis: Callable[[Array], tuple[Array, ...]]
    """States like `h`; a transition is told by what becomes of them,"""
    of_basis: Callable[..., Array]
    """and made of it."""


NUMBERS = Transitions(
    apply=jnp.multiply,
    apply_in_loop=lambda a: lambda h: a * h,
    compose=jnp.multiply,
    transpose=lambda a: a,
    outer=jnp.multiply,
    basis=lambda h: (jnp.ones_like(h),),
    of_basis=lambda a: a,
)
PLANES = Transitions(
    apply=times,
    apply_in_loop=times_in_loop,
    compose=times,
    transpose=conjugate,
    outer=lambda lam, h: times(conjugate(h), lam),
    basis=lambda h: (jnp.zeros_like(h).at[..., 0, :].set(1),),
    of_basis=lambda a: a,
)
MATRICES = Transitions(
    apply=_apply,
    apply_in_loop=_apply_in_loop,
    compose=_compose,
    transpose=_transpose,
    outer=_outer,
    basis=lambda h: tuple(jnp.zeros_like(h).at[..., plane, :].set(1) for plane in (0, 1)),
    of_basis=_of_columns,
)
