"""A diagonal state space model from real input to real output, its projections around the scan."""

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
from discretax.ops._recurrence.transitions import PLANES, times


def diagonal_ssm(
    A: Float[Array, "2 state"] | Float[Array, "time 2 state"],
    B: Float[Array, "2 state features"],
    C: Float[Array, "out 2 state"],
    x: Float[Array, "time features"],
    h0: Float[Array, "2 state"],
    *,
    D: Float[Array, " out"] | None = None,
    gamma: Float[Array, "time 2 state"] | None = None,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "time out"], Float[Array, "2 state"]]:
    r"""$h_t = A_t h_{t-1} + B x_t$, $y_t = \mathrm{Re}(C h_t) + D \odot x_t$, complex but for `x` and `D`.

    Complex numbers are held as two real planes (re, im), so that (time, 2, state) and
    (time, 2*state) are the same memory and each projection is one real matrix product; complex
    products would do twice the work at a quarter of the rate on CPU. `B` and `C` have outputs
    before inputs: so laid out, their gradients over a batch are products without slow copies. In
    training the backward pass keeps `x` and the states; from a certain length on, only the states
    at the chunks' boundaries, the others being computed again.

    **Arguments:**

    - `A`: planes of the transition, constant or one per sample.
    - `B`: planes of the input projection, `B[0]` $= \mathrm{Re}\,B$, `B[1]` $= \mathrm{Im}\,B$.
    - `C`: planes of the readout, `C[:, 0]` $= \mathrm{Re}\,C$, `C[:, 1]` $= -\mathrm{Im}\,C$. The minus
        sign makes $\mathrm{Re}(C h)$ a plain product with the planes of $h$.
    - `x`: the input.
    - `h0`: planes of the state before the first sample.
    - `D`: the elementwise skip, from as many features to as many outputs; none if left out.
    - `gamma`: planes of an input factor that changes with time, $h_t = A_t h_{t-1} +
        \gamma_t \odot (B x_t)$.
    - `length`: number of valid samples; the rest changes nothing that is returned as state.
    - `resets`: where True at `t`, the state before `t` is zero.
    - `chunk_size`: samples per chunk; `None` chooses from the shapes.
    - `implementation`: as in [`discretax.ops.linear_recurrence`][].

    **Returns:**

    The output, and the planes of the state after the last valid sample.

    **Raises:**

    `ValueError` if shapes do not fit, an input is not real, or `implementation` is unknown.
    """
    time, state = check_projected(B, C, D, x, length, resets, implementation)
    varying = A.ndim == 3
    check_array("A", A, **({"time": time} if varying else {}), planes=2, state=state)
    check_array("gamma", gamma, time=time, planes=2, state=state)
    check_array("h0", h0, planes=2, state=state)
    chunk_size = (
        choose_chunk_size(time, state)
        if chunk_size is None
        else check_size("chunk_size", chunk_size)
    )
    h_final, y = chunked_recurrence(
        _terms,
        _readout,
        (None if varying else A, B, C, D),
        h0,
        x,
        (A if varying else None, gamma),
        resets=resets,
        length=length,
        chunk_size=chunk_size,
        transitions=PLANES,
        implementation=implementation,
    )
    return y, h_final


def _terms(weights, x, inputs):
    A, B, _, _ = weights
    A_chunk, gamma = inputs
    drive = project(B.reshape(-1, B.shape[-1]), x).reshape(-1, *B.shape[:-1])
    drive = drive if gamma is None else times(gamma, drive)
    return A_chunk if A is None else A, drive, x


def _readout(weights, h, x):
    _, _, C, D = weights
    C = C.reshape(C.shape[0], -1)
    y = h.reshape(-1, C.shape[1]) @ C.T
    return y if D is None else y + skip(D, x)
