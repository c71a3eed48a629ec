r"""The selective scan on NVIDIA GPUs from Hopper (sm_90) on, backward.

A warpgroup takes 128 features of one example and walks through the chunks from last to first. From
the state before a chunk it finds those before all its tiles, and then goes back through the tiles.
A tile is so short that its states fit in registers. With $\lambda_t$ the cotangent of $h_t$,

$$\lambda_t = C_t \, dy_t + e^{\Delta^A_{t+1} A} \lambda_{t+1}, \qquad
dB_t = \sum_d \lambda_t \Delta_t x_t, \qquad dC_t = \sum_d h_t \, dy_t.$$

The sums over features are those over the lanes: the terms of a tile go to shared memory, where each
row is the work of a few lanes. XLA adds the sums of the blocks of 128 features.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from discretax.ops._running.launch_gpu import LANES, launch
from discretax.ops._selective_scan.gpu import (
    LOG2_E,
    STAGES,
    TILE_STATES,
    UNROLL,
    Lanes,
    Ring,
    Sample,
    advance,
    get,
    keep,
    narrow,
    put,
    read_block,
    ring_slots,
    send,
    split,
    stream_tiles,
    total,
)

LN_2 = math.log(2)
STATES = (4, 8, 16, 32)
SHARED_MEMORY = 223 * 1024  # bytes, of the 227 KB of a block: the compiler takes some for itself
PITCH = LANES + 8  # between rows of terms: the lanes of a warp read 8 rows from different banks


def checkpoint_every(state: int) -> int:
    """Samples between two checkpoints: as many as leave room for two blocks at a time.

    With a number of states that is not for these kernels, 32, as elsewhere.
    """
    return min(32, 256 // state) if state in STATES else 32


def supports(
    x: Array,
    dt: Array,
    dt_A: Array | None,
    A: Array,
    B: Array,
    C: Array,
    *,
    checkpoint_every: int,
) -> str | None:
    """Why the kernels do not take such arrays; None if they do."""
    (_, _, features), state = x.shape, A.shape[1]
    wide = [x, dt] if dt_A is None else [x, dt, dt_A]
    if any(value.dtype not in (jnp.float32, jnp.bfloat16) for value in (*wide, B, C)):
        return "the inputs must be float32 or bfloat16"
    if state not in STATES:
        return f"the number of states must be one of {STATES}"
    if any(features * value.dtype.itemsize % 16 for value in (*wide, A)):
        return "the features of a sample must fill a multiple of 16 bytes"
    rows = TILE_STATES // state
    if checkpoint_every % max(rows, UNROLL):
        return f"`checkpoint_every` must be a multiple of {max(rows, UNROLL)}"
    itemsizes = [value.dtype.itemsize for value in (*wide, x)]  # the last is the cotangent's
    copied = STAGES * (LANES * sum(itemsizes) + 4 * (2 * state + max(4, state // 2)))
    copied += 2 * LANES * sum(itemsizes[:-1])
    kept = (checkpoint_every // rows + 1) * state * LANES
    if rows * copied + 4 * (kept + TILE_STATES * (PITCH + 4)) > SHARED_MEMORY:
        return "the states of a chunk must fit in shared memory"
    return None


def backward(
    x: Float[Array, "#batch time features"],
    dt: Float[Array, "#batch time features"],
    dt_A: Float[Array, "#batch time features"] | None,
    A: Float[Array, "#batch state features"],
    B: Float[Array, "#batch time state"],
    C: Float[Array, "#batch time state"],
    resets: Bool[Array, "#batch time"] | None,
    checkpoints: Float[Array, "batch chunks state features"],
    d_y: Float[Array, "batch time features"],
    d_h_last: Float[Array, "batch state features"],
    *,
    checkpoint_every: int,
    interpret: Any = None,
) -> tuple[Array, Array, Array | None, Array, Array, Array, Array]:
    """The cotangents of `x`, `dt`, `dt_A`, `A`, `B`, `C` and `h0`, for each example of the batch.

    Those of `A` and `h0` are in float32, the others in the type of what they belong to. That of a
    `dt_A` left out is None, and that of `dt` then includes it.
    """
    (_, time, features), state = x.shape, A.shape[1]
    rows = TILE_STATES // state
    tiles = checkpoint_every // rows  # in a chunk
    streams = {"x": x, "dt": dt, "dt_A": dt_A, "d_y": d_y, "narrow": narrow(B, C, resets)}
    streams = {name: value for name, value in streams.items() if value is not None}
    results = [value for value in (x, dt, dt_A) if value is not None]
    batch, chunks = checkpoints.shape[:2]
    blocks = pl.cdiv(features, LANES)
    visits = 2 * tiles - 1  # to the tiles of a chunk: all but the last forward, then all back

    def tile_of(visit):
        chunk, visit = lax.div(visit, visits), lax.rem(visit, visits)
        return (chunks - 1 - chunk) * tiles + jnp.minimum(visit, 2 * (tiles - 1) - visit)

    def body(*refs):
        inputs, others, wide_refs, sums_refs, last_refs, slots, wide_out, rest = split(
            refs, len(streams), 3, len(results), 2, 2, len(streams), len(results)
        )
        A_ref, checkpoints_ref, d_last_ref = others
        sums_out, terms, starts, arrived, block_arrived = rest
        ring = Ring.over(streams, inputs, slots, arrived, rows, chunks * visits, tile_of)
        rates = read_block(A_ref, starts.at[0], block_arrived)
        d_h = read_block(d_last_ref, starts.at[0], block_arrived)
        put(starts.at[0], [jnp.zeros(LANES, jnp.float32)] * state)
        d_rates = get(starts.at[0])
        plgpu.commit_smem()

        def fetch_start(i):
            source = checkpoints_ref.at[ring.example, chunks - 1 - i, :, ring.columns]
            plgpu.copy_gmem_to_smem(source, starts.at[lax.rem(i, 2)], block_arrived)

        fetch_start(jnp.int32(0))
        ring.start()

        def sum_over_lanes():
            values = terms[:, pl.ds(0, LANES)]
            if interpret is None:  # the interpreter knows no layouts
                values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
            return values.sum(1)

        def chunk(i, carry):
            plgpu.barrier_wait(block_arrived)
            pl.when(i + 1 < chunks)(lambda: fetch_start(i + 1))

            def forth(j, h):
                slot = ring.wait(i * visits + j)
                for row in range(rows):
                    h = advance(rates, h, ring.sample(slot, row, state))[-1]
                put(starts.at[j + 2], h)
                plgpu.commit_smem()
                ring.refill(i * visits + j)
                return h

            if tiles > 1:
                lax.fori_loop(0, tiles - 1, forth, get(starts.at[lax.rem(i, 2)]))

            def back(j, carry):
                d_h, d_rates = carry
                visit, out = i * visits + tiles - 1 + j, lax.rem(i * tiles + j, 2)
                slot = ring.wait(visit)
                h = get(starts.at[jnp.where(j == tiles - 1, lax.rem(i, 2), tiles - j)])
                past = []
                for row in range(rows):
                    sample = ring.sample(slot, row, state)
                    before, decay, h = advance(rates, h, sample)
                    past.append((before, decay))
                    for n in range(state):
                        terms[row * state + n, pl.ds(0, LANES)] = h[n] * sample.wide["d_y"]
                plgpu.commit_smem()
                d_C = sum_over_lanes()
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # a barrier too: `terms` is read
                sums_out[out, 1] = d_C

                for row in reversed(range(rows)):
                    sample, (before, decay) = ring.sample(slot, row, state), past[row]
                    adjoint = tuple(
                        d + C_n * sample.wide["d_y"] for d, C_n in zip(d_h, sample.C, strict=True)
                    )
                    for n in range(state):
                        terms[row * state + n, pl.ds(0, LANES)] = adjoint[n] * sample.drive
                    d_drive = total([d * B_n for d, B_n in zip(adjoint, sample.B, strict=True)])
                    d_h, d_rates, d_step = _retreat(rates, before, decay, sample, adjoint, d_rates)
                    d_x, d_dt = d_drive * sample.wide["dt"], d_drive * sample.wide["x"]
                    cotangents = [d_x, d_dt + d_step] if dt_A is None else [d_x, d_dt, d_step]
                    for ref, value in zip(wide_out, cotangents, strict=True):
                        ref[out, row] = value.astype(ref.dtype)
                plgpu.commit_smem()
                sums_out[out, 0] = sum_over_lanes()
                plgpu.commit_smem()

                tile = tile_of(visit)
                for source, target in zip(wide_out, wide_refs, strict=True):
                    send(source.at[out], ring.tile_of(target, tile))
                block = lax.axis_index("block")
                for kind, target in enumerate(sums_refs):
                    place = pl.ds(tile * TILE_STATES, TILE_STATES)
                    send(sums_out.at[out, kind], target.at[ring.example, block, place])
                plgpu.commit_smem_to_gmem_group()
                ring.refill(visit)
                return d_h, d_rates

            return lax.fori_loop(0, tiles, back, carry)

        last = lax.fori_loop(0, chunks, chunk, (d_h, d_rates))
        for place, (value, target) in enumerate(zip(last, last_refs, strict=True)):
            put(starts.at[place], value)
            plgpu.commit_smem()
            target = target.at[ring.example, :, ring.columns]
            plgpu.copy_smem_to_gmem(starts.at[place], target)
        plgpu.wait_smem_to_gmem(0)

    block = (1, state, LANES)
    whole = checkpoint_every  # the interpreter needs room for all tiles of a chunk
    in_tiles = [*stream_tiles(streams, whole), block, (1, *block), block]
    sums = jax.ShapeDtypeStruct((batch, blocks, time * state), jnp.float32)
    last = jax.ShapeDtypeStruct((batch, state, features), jnp.float32)
    *wide, d_B, d_C, d_h0, d_A = launch(
        body,
        [*streams.values(), A * LOG2_E, checkpoints, d_h_last],
        [
            *(jax.ShapeDtypeStruct((batch, time, features), value.dtype) for value in results),
            *[sums] * 2,
            *[last] * 2,
        ],
        tiles=[
            *in_tiles,
            *[(1, whole, LANES)] * len(results),
            *[(1, 1, whole * state)] * 2,
            *[block] * 2,
        ],
        grid={"example": batch, "block": blocks},
        scratch=[
            *ring_slots(streams, rows),
            *(plgpu.SMEM((2, rows, LANES), value.dtype) for value in results),
            plgpu.SMEM((2, 2, TILE_STATES), jnp.float32),
            plgpu.SMEM((TILE_STATES, PITCH), jnp.float32),
            plgpu.SMEM((tiles + 1, state, LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=len(streams), num_barriers=STAGES),
            plgpu.Barrier(),
        ],
        fill=0,
        interpret=interpret,
        approx_math=True,
    )
    d_B, d_C = (
        value.reshape(batch, blocks, time, state).sum(1).astype(like.dtype)
        for value, like in ((d_B, B), (d_C, C))
    )
    d_dt_A = None if dt_A is None else wide[2]
    return wide[0], wide[1], d_dt_A, d_A, d_B, d_C, d_h0


def _retreat(
    rates: Lanes, before: Lanes, decay: Lanes, sample: Sample, adjoint: Lanes, d_rates: Lanes
) -> tuple[Lanes, Lanes, Array]:
    """From the cotangent of a state: those of the one before, of the rates and of the step."""
    d_h = tuple(d * a for d, a in zip(adjoint, decay, strict=True))
    slope = [d * h for d, h in zip(d_h, before, strict=True)]
    d_rates = tuple(d + s * sample.step for d, s in zip(d_rates, slope, strict=True))
    # The rates are those of a power of 2.
    d_step = LN_2 * total([s * rate for s, rate in zip(slope, rates, strict=True)])
    return keep(sample.reset, d_h), d_rates, d_step
