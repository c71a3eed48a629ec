"""Phases that add up along time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._timeseries import check_length, check_resets, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._recurrence.linear_recurrence import linear_recurrence
from discretax.ops._running.split_time import incoming_state


def cumulative_phase(
    turns: Float[Array, "time *phases"],
    start: Float[Array, "*phases"] | None = None,
    *,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
) -> tuple[Float[Array, "time *phases"], Float[Array, "*phases"]]:
    r"""$\phi_t = \phi_{t-1} + \delta_t$ in turns, less whole turns: from $-1/2$ to $1/2$.

    The angle is $2 \pi \phi$. What is added is rounded once, to $2^{-30}$ of a turn or to what its
    type holds, and the sum is exact: it is one of whole numbers, which run over where the phase
    does. In floating point late phases would lose the digits of theirs.

    **Arguments:**

    - `turns`: $\delta$, by how much each sample turns.
    - `start`: the phase before the first sample; zero if left out.
    - `length`: number of valid samples; those at or past it do not turn.
    - `resets`: where True at `t`, the phase before `t` is zero.

    **Returns:**

    The phases, and the one after the last valid sample, in float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit.
    """
    if turns.ndim == 0:
        raise ValueError(f"`turns` must be (time, *phases); got a scalar, {turns}.")
    time = turns.shape[0]
    check_length(length, time)
    check_resets(resets, time)
    phases = {f"phases[{i}]": size for i, size in enumerate(turns.shape[1:])}
    check_array("turns", turns, time=time, **phases)
    check_array("start", start, **phases)
    dtype = accumulation_dtype(*jax.tree.leaves((turns, start)))
    turns = zero_padding(turns, length).astype(dtype)
    resets = None if resets is None else zero_padding(resets, length)
    start = jnp.zeros(turns.shape[1:], dtype) if start is None else start.astype(dtype)
    if time == 0:
        return turns, start
    smooth = linear_recurrence(jnp.ones_like(start), turns, start, resets=resets)
    phase = _with_slope_of(smooth, _added_up(turns, start, resets))
    after = jnp.concatenate([start[None], phase])
    return phase, after[time if length is None else length]


@jax.custom_jvp
def _with_slope_of(smooth: Array, exact: Array) -> Array:
    """`exact`, whose derivative is that of `smooth`: the rounding to whole numbers has none."""
    del smooth
    return exact


@_with_slope_of.defjvp
def _(primals, tangents):
    return _with_slope_of(*primals), tangents[0]


def _added_up(turns: Array, start: Array, resets: Array | None) -> Array:
    integer = jnp.int64 if turns.dtype == jnp.float64 else jnp.int32
    # The sums run over at four turns: half a turn, rounded up, is well within.
    turn = 2.0 ** (jnp.iinfo(integer).bits - 2)
    counted = jnp.rint(turn * _less_whole(turns)).astype(integer)
    counts = jnp.cumsum(counted, axis=0)
    phase_of = lambda counts: (4 * counts).astype(turns.dtype) / (4 * turn)
    since_start = jnp.ones((len(turns), *(1,) * start.ndim), bool)
    if resets is not None:
        index = lax.cummax(jnp.where(resets, jnp.arange(len(turns)), -1))
        since_start = (index < 0).reshape(since_start.shape)
        counts -= jnp.where(since_start, 0, (counts - counted)[index])
    last = phase_of(counts[-1])
    start = incoming_state(start, lambda: (jnp.ones_like(start), last), resets)
    return _less_whole(phase_of(counts) + jnp.where(since_start, start, 0))


def _less_whole(turns: Array) -> Array:
    return turns - jnp.rint(turns)
