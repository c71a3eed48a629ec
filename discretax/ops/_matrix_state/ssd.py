"""The scan of Mamba-2: one decay per head and sample, so that a chunk is a few matrix products."""

import jax
from jaxtyping import Array, Bool, Float, Int

from discretax._timeseries import zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._matrix_state.arguments import as_samples
from discretax.ops._matrix_state.run import matrix_state


def ssd(
    x: Float[Array, "time heads head_dim"],
    dt: Float[Array, "time heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "time groups state"],
    C: Float[Array, "time groups state"],
    D: Float[Array, "heads *head_dim"] | None = None,
    h0: Float[Array, "heads head_dim state"] | None = None,
    *,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "time heads head_dim"], Float[Array, "heads head_dim state"]]:
    r"""State space duality: each head is a matrix of states that decays by one number per sample.

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^T, \qquad y_t = h_t C_t + D x_t$$

    $B$ and $C$ are shared by the heads of a group: head $i$ takes those of group
    $\lfloor i \cdot \mathrm{groups} / \mathrm{heads} \rfloor$.

    This is [`discretax.ops.gated_linear_attention`][] by Mamba-2's names (arXiv:2405.21060): $C$ are
    the queries, $B$ the keys, $x$ the values, $\Delta$ what they are written by, $\Delta A$ the log
    decay, and $h = S^T$.

    **Arguments:**

    - `x`: the input.
    - `dt`: $\Delta$, the steps.
    - `A`: the rates, negative for a state that decays.
    - `B`, `C`: how each sample is written to the states and read from them.
    - `D`: the skip, one number per head, `(heads,)`, or per feature, `(heads, head_dim)`; none if left
        out.
    - `h0`: the state before the first sample; zero if left out.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass. For gradients put a finite number in its place before
        the call, `jnp.where(jnp.isfinite(x), x, 0)`: its product with a cotangent of zero is NaN.
    - `chunk_size`: samples in a chunk.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the heads cannot be shared out among the groups or an input
    is not real.
    """
    if x.ndim != 3 or B.ndim != 3:
        raise ValueError(
            "`x` must be (time, heads, head_dim) and `B` (time, groups, state); got "
            f"x: {x.shape} and B: {B.shape}. Use `jax.vmap` to batch."
        )
    (time, heads, head_dim), (_, groups, state_dim) = x.shape, B.shape
    if groups == 0 or heads % groups:
        raise ValueError(
            "the number of heads must be a multiple of the number of groups; got "
            f"x: {x.shape}, {heads} heads, and B: {B.shape}, {groups} groups."
        )
    check_array("x", x, time=time, heads=heads, head_dim=head_dim)
    check_array("dt", dt, time=time, heads=heads)
    check_array("A", A, heads=heads)
    per_feature = {"head_dim": head_dim} if D is not None and D.ndim == 2 else {}
    check_array("D", D, heads=heads, **per_feature)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, time=time, groups=groups, state=state_dim)
    check_array("h0", h0, heads=heads, head_dim=head_dim, state=state_dim)
    dtype = accumulation_dtype(*jax.tree.leaves((x, dt, A, B, C, D, h0)))
    dt = zero_padding(dt, length).astype(dtype)  # whose product with A has a gradient of its own
    samples = as_samples(C, B, x, dt, dt * A.astype(dtype)[None], None, None)
    y, h = matrix_state(
        samples, h0, value_first=True, length=length, resets=resets, chunk_size=chunk_size
    )
    if D is not None:
        D = D.astype(dtype).reshape(heads, -1)
        y = y + D[None] * x.astype(dtype)
    return y.astype(x.dtype), h
