"""Second-order oscillators from real input to real output, their projections around the scan."""

import functools as ft

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from discretax._features import check_size
from discretax.ops._checks import check_array
from discretax.ops._recurrence.chunked import chunked_recurrence
from discretax.ops._recurrence.linear_recurrence import Implementation
from discretax.ops._recurrence.projections import (
    check_projected,
    choose_chunk_size,
    project,
    skip,
)
from discretax.ops._recurrence.transitions import MATRICES, matrices
from discretax.ops._scaled import scaled


def oscillator_ssm(
    M: Float[Array, "2 2 state"] | Float[Array, "time 2 2 state"],
    F: Float[Array, "2 state"] | Float[Array, "time 2 state"],
    B: Float[Array, "2 state features"],
    C: Float[Array, "out 2 state"],
    x: Float[Array, "time features"],
    h0: Float[Array, "2 2 state"],
    *,
    D: Float[Array, " out"] | None = None,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "time out"], Float[Array, "2 2 state"]]:
    r"""Velocity $z$ and position $y$ of each oscillator, of which the position is read out:

    $$\begin{pmatrix} z_t \\ y_t \end{pmatrix} = M_t \begin{pmatrix} z_{t-1} \\ y_{t-1} \end{pmatrix}
    + F_t\, (B x_t), \qquad o_t = \mathrm{Re}(C y_t) + D \odot x_t.$$

    $M$ and $F$ are real, $B$, $C$ and the state complex. A real matrix carries both parts of a complex
    state alike, whatever its eigenvectors, of which it may have one only: nothing is diagonalised.
    Memory is that of [`discretax.ops.diagonal_ssm`][] with twice as many states.

    **Arguments:**

    - `M`: the transition, `M[i, j]` from component `j` to component `i`, constant or one per sample.
    - `F`: by what a force moves velocity and position, constant if `M` is.
    - `B`, `C`: planes of the projections, as in [`discretax.ops.diagonal_ssm`][].
    - `x`: the input.
    - `h0`: the state before the first sample: velocity and position, each in real and imaginary part.
    - `D`: the elementwise skip; none if left out.
    - `length`: number of valid samples; the rest changes nothing that is returned as state.
    - `resets`: where True at `t`, the state before `t` is zero.
    - `chunk_size`: samples per chunk; `None` chooses from the shapes.
    - `implementation`: as in [`discretax.ops.linear_recurrence`][], without the kernels.

    **Returns:**

    The output, and the state after the last valid sample.

    **Raises:**

    `ValueError` if shapes do not fit, an input is not real, or `implementation` is unknown.
    """
    time, state = check_projected(B, C, D, x, length, resets, implementation)
    varying = M.ndim == 4
    each = {"time": time} if varying else {}
    check_array("M", M, **each, to=2, of=2, state=state)
    check_array("F", F, **each, to=2, state=state)
    check_array("h0", h0, components=2, planes=2, state=state)
    chunk_size = (
        choose_chunk_size(time, 2 * state)
        if chunk_size is None
        else check_size("chunk_size", chunk_size)
    )
    M = matrices(*(M[..., i, j, :] for i in (0, 1) for j in (0, 1)))
    h_final, y = chunked_recurrence(
        _terms,
        _readout,
        (None if varying else (M, F), B, C, D),
        h0.reshape(2, -1),
        x,
        (M, F) if varying else None,
        resets=resets,
        length=length,
        chunk_size=chunk_size,
        transitions=MATRICES,
        implementation=implementation,
    )
    return y, h_final.reshape(h0.shape)


def _terms(weights, x, inputs):
    constant, B, _, _ = weights
    of_both_parts = lambda planes: jnp.concatenate([planes, planes], axis=-1)
    M, F = map(of_both_parts, inputs if constant is None else constant)
    force = project(B.reshape(-1, B.shape[-1]), x)
    times = jnp.multiply if constant is None else ft.partial(scaled, axis=0)
    return M, jnp.stack([times(force, F[..., i, :]) for i in (0, 1)], axis=1), x


def _readout(weights, h, x):
    _, _, C, D = weights
    y = h[:, 1] @ C.reshape(C.shape[0], -1).T
    return y if D is None else y + skip(D, x)
