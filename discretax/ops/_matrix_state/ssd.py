"""The scan of Mamba-2: one decay per head and sample, so that a chunk is a few matrix products."""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from discretax._features import check_size
from discretax._timeseries import check_length, check_resets, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._running.chunks import scan_chunks
from discretax.ops._running.split_time import incoming_state
from discretax.ops._scaled import scaled


def ssd(
    x: Float[Array, "time heads head_dim"],
    dt: Float[Array, "time heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "time groups state"],
    C: Float[Array, "time groups state"],
    D: Float[Array, " heads"] | None = None,
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

    Within a chunk the states are never formed. With $s_i = \sum_{j \le i} \Delta_j A$ and $S$ the
    state before the chunk,

    $$y_i = \sum_{j \le i} (C_i^T B_j)\, e^{s_i - s_j} \Delta_j x_j + e^{s_i} S C_i$$

    are products of matrices, and so is the state after it. The forward pass keeps one state per
    chunk, and the backward pass computes the rest again. (Mamba-2, arXiv:2405.21060, section 6.)

    **Arguments:**

    - `x`: the input.
    - `dt`: $\Delta$, the steps.
    - `A`: the rates, negative for a state that decays.
    - `B`, `C`: how each sample is written to the states and read from them.
    - `D`: the skip, one number per head; none if left out.
    - `h0`: the state before the first sample; zero if left out.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass.
    - `chunk_size`: samples in a chunk.

    **Returns:**

    The output, in the type of `x`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the heads cannot be shared out among the groups or an input
    is not real.
    """
    check_size("chunk_size", chunk_size)
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
    for name, array in (("A", A), ("D", D)):
        check_array(name, array, heads=heads)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, time=time, groups=groups, state=state_dim)
    check_array("h0", h0, heads=heads, head_dim=head_dim, state=state_dim)
    check_length(length, time)
    check_resets(resets, time)
    dtype = accumulation_dtype(*jax.tree.leaves((x, dt, A, B, C, D, h0)))
    h = jnp.zeros((heads, head_dim, state_dim), dtype) if h0 is None else h0.astype(dtype)
    if time == 0:
        return x, h

    # Padding becomes a step of zero and an input of zero: the identity on the state.
    x, dt, B, C = (zero_padding(array, length) for array in (x, dt, B, C))
    if resets is not None:
        resets = zero_padding(resets, length)
    grouped = lambda array, axis: array.reshape(
        *array.shape[:axis], groups, heads // groups, *array.shape[axis + 1 :]
    )
    rates = grouped(A.astype(dtype), 0)
    inputs = (grouped(x, 1), grouped(dt, 1), B, C, resets)
    over_time = lambda h: _over_time(chunk_size, rates, h, inputs)
    h = grouped(h, 0)

    def summary():
        steps = inputs[1].astype(dtype)
        if resets is not None:  # which leave nothing to decay
            steps = jnp.where(resets.any(), 0, steps)
        return jnp.exp(rates * steps.sum(0)), over_time(jnp.zeros_like(h))[0]

    h, y = over_time(
        incoming_state(h, summary, resets, lambda decay, h: decay[..., None, None] * h)
    )
    y = y.reshape(x.shape)
    if D is not None:
        y = y + D.astype(dtype)[:, None] * x.astype(dtype)
    return y.astype(x.dtype), h.reshape(heads, head_dim, state_dim)


@ft.partial(jax.jit, static_argnums=0)
def _over_time(chunk_size, A, h, inputs):
    advance = _sample if inputs[0].shape[0] == 1 else _chunk

    def run(h, inputs, _):
        *samples, resets = inputs
        x, dt, B, C = (array.astype(h.dtype) for array in samples)
        return advance(A, h, x, dt, B, C, resets)

    return scan_chunks(run, h, inputs, None, chunk_size)


def _sample(A, h, x, dt, B, C, reset):
    """The equation as it stands."""
    if reset is not None:
        h = jnp.where(reset, 0, h)
    drive = (dt[..., None] * x)[0]
    h = jnp.exp(dt[0] * A)[..., None, None] * h + drive[..., None] * B[0][:, None, None]
    return h, jnp.einsum("ghpn,gn->ghp", h, C[0])[None]


def _chunk(
    A: Float[Array, "groups heads"],
    h: Float[Array, "groups heads head_dim state"],
    x: Float[Array, "time groups heads head_dim"],
    dt: Float[Array, "time groups heads"],
    B: Float[Array, "time groups state"],
    C: Float[Array, "time groups state"],
    resets: Bool[Array, " time"] | None,
) -> tuple[Float[Array, "groups heads head_dim state"], Float[Array, "time groups heads head_dim"]]:
    # Heads before time: the products then run head by head over adjacent numbers.
    dt = jnp.transpose(dt, (1, 2, 0))
    drive = dt[..., None] * jnp.transpose(x, (1, 2, 0, 3))
    B, C = B.swapaxes(0, 1), C.swapaxes(0, 1)
    seen = jnp.tri(x.shape[0], dtype=bool)  # does sample i still know of sample j
    if resets is not None:
        sequence = jnp.cumsum(resets)
        seen = seen & (sequence[:, None] == sequence)
        # A product with a NaN is NaN in every row, those before it and those behind a reset
        # included. So it is taken out here, and put back below where it is known of.
        spoilt = ~jnp.isfinite(drive).all(-1)
        drive, dt = jnp.where(spoilt[..., None], 0, drive), jnp.where(spoilt, 0, dt)
        spoilt = (seen & spoilt[..., None, :]).any(-1)[..., None]

    elapsed, between = _decays(dt * A[..., None], seen)
    scores = jnp.where(seen, C @ B.mT, 0)
    y = scaled(between, scores, 1) @ drive
    y_past = elapsed[..., None] * jnp.einsum("gtn,ghpn->ghtp", C, h)
    h_past = elapsed[:, :, -1, None, None] * h
    if resets is not None:
        y_past = jnp.where(sequence[:, None] == 0, y_past, 0) + jnp.where(spoilt, jnp.nan, 0)
        h_past = jnp.where(sequence[-1] == 0, h_past, 0)
        h_past = h_past + jnp.where(spoilt[:, :, -1:], jnp.nan, 0)
        B = jnp.where(seen[-1][:, None], B, 0)
    h = h_past + jnp.einsum("ghtp,gtn->ghpn", between[:, :, -1, :, None] * drive, B)
    return h, jnp.transpose(y + y_past, (2, 0, 1, 3))


def _decays(
    log_decay: Float[Array, "groups heads time"], seen: Bool[Array, "time time"]
) -> tuple[Float[Array, "groups heads time"], Float[Array, "groups heads time time"]]:
    """Over the samples up to i, and over those from j to i, which is zero where j is not seen."""
    log_decay = jnp.maximum(log_decay, -1000)  # exp gives zero for less, infinities included
    # A difference of large sums has the rounding of the sums. Those of multiples of 1/16 are exact,
    # so what is rounded is the rest. (The derivative of rounding is zero: all of it is the rest's.)
    coarse = jnp.round(16 * log_decay) / 16
    parts = jnp.stack([coarse, log_decay - coarse])
    up_to = jnp.tri(log_decay.shape[-1], dtype=log_decay.dtype)
    coarse, rest = jnp.einsum("pght,it->pghi", parts, up_to, precision="highest")
    gaps = (coarse[..., :, None] - coarse[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    return jnp.exp(coarse + rest), jnp.exp(jnp.where(seen, gaps, -jnp.inf))
