"""The scan of Mamba-3: each sample is written twice, a part of it with the one that follows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from discretax._timeseries import zero_padding
from discretax._types import widened
from discretax.ops._checks import check_array
from discretax.ops._convolution.short import token_shift
from discretax.ops._matrix_state.gated_linear_attention import gated_linear_attention


class TrapezoidalState(NamedTuple):
    """The state, and what the last sample still has to write."""

    h: Float[Array, "heads head_dim state"]
    x: Float[Array, "rank heads head_dim"]
    B: Float[Array, "rank heads state"]


def trapezoidal_ssd(
    x: Float[Array, "time rank heads head_dim"],
    dt: Float[Array, "time heads"],
    log_decay: Float[Array, "time heads"],
    trapezoid: Float[Array, "time heads"],
    B: Float[Array, "time rank heads state"],
    C: Float[Array, "time rank heads state"],
    initial_state: TrapezoidalState | None = None,
    *,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "time rank heads head_dim"], TrapezoidalState]:
    r"""State space duality by the trapezoidal rule: a step writes what it began and ended with.

    $$h_t = \alpha_t h_{t-1} + (1 - \lambda_t)\, \Delta_t \alpha_t \sum_r x_{t-1,r} B_{t-1,r}^T
    + \lambda_t \Delta_t \sum_r x_{t,r} B_{t,r}^T, \qquad y_{t,r} = h_t C_{t,r}$$

    with $\alpha = e^{\mathrm{log\_decay}}$ and $\lambda$ the `trapezoid`: 1 is Euler's rule, that of
    [`discretax.ops.ssd`][], and 1/2 the trapezoidal one, of second order. With a `rank` above one
    several inputs write to the states of a head and several outputs read from them at once.

    $z_t = h_t - \lambda_t \Delta_t \sum_r x_{t,r} B_{t,r}^T$ is what
    [`discretax.ops.gated_linear_attention`][] makes of the samples before, each written once with

    $$z_t = \alpha_t \Big(z_{t-1} + \big(\lambda_{t-1} \Delta_{t-1} + (1 - \lambda_t) \Delta_t\big)
    \sum_r x_{t-1,r} B_{t-1,r}^T\Big),$$

    and the sample of the moment is added to its outputs. Nothing of a later sample enters.

    **Arguments:**

    - `x`: the input.
    - `dt`: $\Delta$, the steps.
    - `log_decay`: the logarithm of the decay, 0 or less: $\Delta A$.
    - `trapezoid`: $\lambda$, from 0 to 1.
    - `B`, `C`: how each sample is written to the states and read from them, for every head.
    - `initial_state`: the state before the first sample; zero if left out.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero, and so is the sample before.
    - `chunk_size`: inputs in a chunk, `rank` of which a sample has.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, an input is not real, or a log decay is positive where the
    numbers are known (outside `jax.jit`).

    ??? cite

        Lahoti et al., Mamba-3: Improved Sequence Modeling using State Space Principles, 2026
        (arXiv:2603.15569).
    """
    if x.ndim != 4 or B.ndim != 4 or 0 in x.shape[1:3]:
        raise ValueError(
            "`x` must be (time, rank, heads, head_dim) and `B` (time, rank, heads, state), of at "
            "least one rank and head; got "
            f"x: {x.shape} and B: {B.shape}. Use `jax.vmap` to batch."
        )
    (time, rank, heads, head_dim), state = x.shape, B.shape[-1]
    each = {"time": time, "rank": rank, "heads": heads}
    check_array("x", x, **each, head_dim=head_dim)
    for name, array in (("dt", dt), ("log_decay", log_decay), ("trapezoid", trapezoid)):
        check_array(name, array, time=time, heads=heads)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, **each, state=state)
    if initial_state is not None:
        check_array("initial_state.h", initial_state.h, heads=heads, head_dim=head_dim, state=state)
        last = {"rank": rank, "heads": heads}
        check_array("initial_state.x", initial_state.x, **last, head_dim=head_dim)
        check_array("initial_state.B", initial_state.B, **last, state=state)
    dtype = x.dtype
    given = (x, dt, log_decay, trapezoid, B, C, initial_state)
    x, dt, log_decay, trapezoid, B, C, initial_state = widened(given)
    dt, log_decay = zero_padding(dt, length), zero_padding(log_decay, length)
    if initial_state is None:
        blank = lambda *shape: jnp.zeros(shape, x.dtype)
        initial_state = TrapezoidalState(
            blank(heads, head_dim, state), blank(rank, heads, head_dim), blank(rank, heads, state)
        )
    now = trapezoid * dt
    # What is written of the last sample is in the state that one starts with.
    before = (initial_state.x, initial_state.B, jnp.zeros_like(dt, shape=(heads,)))
    start, apart = ravel_pytree(before)
    rows = jax.vmap(lambda *sample: ravel_pytree(sample)[0])(x, B, now)
    rows_before, last = token_shift(rows, start, length=length, resets=resets)
    x_before, B_before, already = jax.vmap(apart)(rows_before)
    x_last, B_last, now_last = apart(last)
    weight = jnp.exp(log_decay) * (already + (1 - trapezoid) * dt)

    by_input = lambda array: array.reshape(time * rank, *array.shape[2:])
    # One input after the other. The first alone decays, or begins anew.
    first_alone = lambda array: by_input(
        jnp.pad(array[:, None], ((0, 0), (0, rank - 1)) + ((0, 0),) * (array.ndim - 1))
    )
    y, z = gated_linear_attention(
        by_input(C),
        by_input(B_before),
        by_input(x_before),
        by_input(jnp.broadcast_to(weight[:, None], (time, rank, heads))),
        first_alone(log_decay),
        initial_state.h.mT,
        length=None if length is None else rank * length,
        resets=None if resets is None else first_alone(resets),
        chunk_size=chunk_size,
    )
    y = y.reshape(x.shape) + _read_at_once(C, B, now, x)
    if rank > 1:  # what a sample's later inputs write before its first output is read
        later = jnp.triu(jnp.ones((rank, rank), x.dtype), 1)[..., None]
        y = y + _read_at_once(C, B_before, weight, x_before, later)
    h = z.mT + jnp.einsum("h,rhp,rhn->hpn", now_last, x_last, B_last)
    return y.astype(dtype), TrapezoidalState(h, x_last, B_last)


def _read_at_once(
    C: Float[Array, "time rank heads state"],
    B: Float[Array, "time rank heads state"],
    weight: Float[Array, "time heads"],
    x: Float[Array, "time rank heads head_dim"],
    mask: Float[Array, "rank rank 1"] | None = None,
) -> Float[Array, "time rank heads head_dim"]:
    """What the outputs read of the inputs that they are paired with, without a state."""
    scores = weight[:, None, None] * jnp.einsum("trhn,tshn->trsh", C, B)
    if mask is not None:
        scores = mask[None] * scores
    return jnp.einsum("trsh,tshp->trhp", scores, x)
