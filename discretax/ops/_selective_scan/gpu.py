r"""The selective scan on NVIDIA GPUs from Hopper (sm_90) on, forward.

$$h_t = e^{\Delta^A_t A} \odot h_{t-1} + (\Delta_t \odot x_t) B_t^T, \qquad y_t = h_t C_t$$

A warpgroup takes 128 features of one example and walks through time; a lane holds the states of one
feature in registers. Asynchronous copies bring tiles of the inputs to shared memory and take the
outputs away. Past the end they read zeros, and a step and an input of zero leave the state alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from discretax.ops._running.launch_gpu import LANES, launch

STAGES = 3  # tiles under way
TILE_STATES = 64  # rows of the smallest matrix whose rows a warpgroup sums
TILE = 16  # most rows of a tile
UNROLL = 4  # rows whose instructions the compiler may interleave
LOG2_E = math.log2(math.e)  # the hardware's exponential is to base 2

Lanes = tuple[Array, ...]  # for each state, the values of the lanes' features


def forward(
    x: Float[Array, "#batch time features"],
    dt: Float[Array, "#batch time features"],
    dt_A: Float[Array, "#batch time features"] | None,
    A: Float[Array, "#batch state features"],
    B: Float[Array, "#batch time state"],
    C: Float[Array, "#batch time state"],
    h0: Float[Array, "#batch state features"],
    resets: Bool[Array, "#batch time"] | None,
    *,
    checkpoint_every: int,
    interpret: Any = None,
) -> tuple[
    Float[Array, "batch time features"],
    Float[Array, "batch state features"],
    Float[Array, "batch chunks state features"],
]:
    """The outputs, in the type of `x`, and in float32 the last state and those before each chunk.

    `dt_A` left out is `dt`. A leading axis of size 1 is shared by the batch.
    """
    (_, time, features), state = x.shape, A.shape[1]
    rows = math.gcd(checkpoint_every, TILE)
    chunk = checkpoint_every // rows  # tiles
    streams = {"x": x, "dt": dt, "dt_A": dt_A, "narrow": narrow(B, C, resets)}
    streams = {name: value for name, value in streams.items() if value is not None}
    batch = max(value.shape[0] for value in (*streams.values(), A, h0))
    tiles = pl.cdiv(time, rows)

    def body(*refs):
        inputs, (A_ref, h0_ref, y_ref, last_ref, starts_ref), slots, rest = split(
            refs, len(streams), 5, len(streams)
        )
        y_out, h_out, arrived, block_arrived = rest
        ring = Ring.over(streams, inputs, slots, arrived, rows, tiles, lambda visit: visit)
        rates = read_block(A_ref, h_out.at[0], block_arrived)
        h = read_block(h0_ref, h_out.at[1], block_arrived)
        ring.start()

        def tile(i, h):
            slot, out = ring.wait(i), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            put(h_out.at[out], h)

            def some_rows(j, h):
                for row in (j * UNROLL + k for k in range(UNROLL)):
                    sample = ring.sample(slot, row, state)
                    _, _, h = advance(rates, h, sample)
                    y = total([h_n * C_n for h_n, C_n in zip(h, sample.C, strict=True)])
                    y_out[out, row] = y.astype(x.dtype)
                return h

            h = lax.fori_loop(0, rows // UNROLL, some_rows, h)
            plgpu.commit_smem()
            start = starts_ref.at[ring.example, lax.div(i, chunk), :, ring.columns]
            pl.when(lax.rem(i, chunk) == 0)(lambda: send(h_out.at[out], start))
            send(y_out.at[out], ring.tile_of(y_ref, i))
            plgpu.commit_smem_to_gmem_group()
            ring.refill(i)
            return h

        h = lax.fori_loop(0, tiles, tile, h)
        plgpu.wait_smem_to_gmem(0)
        put(h_out.at[0], h)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(h_out.at[0], last_ref.at[ring.example, :, ring.columns])
        plgpu.wait_smem_to_gmem(0)

    block = (1, state, LANES)
    in_tiles = [*stream_tiles(streams, rows), block, block]
    y, last, starts = launch(
        body,
        [*streams.values(), A * LOG2_E, h0],
        [
            jax.ShapeDtypeStruct((batch, time, features), x.dtype),
            jax.ShapeDtypeStruct((batch, state, features), jnp.float32),
            jax.ShapeDtypeStruct((batch, pl.cdiv(tiles, chunk), state, features), jnp.float32),
        ],
        tiles=[*in_tiles, (1, rows, LANES), block, (1, *block)],
        grid={"example": batch, "block": pl.cdiv(features, LANES)},
        scratch=[
            *ring_slots(streams, rows),
            plgpu.SMEM((2, rows, LANES), x.dtype),
            plgpu.SMEM((2, state, LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=len(streams), num_barriers=STAGES),
            plgpu.Barrier(),
        ],
        fill=0,
        interpret=interpret,
        approx_math=True,
    )
    return y, last, starts


def narrow(B: Array, C: Array, resets: Array | None) -> Float[Array, "#batch time numbers"]:
    """What all features share, side by side, so that one copy brings it."""
    values = [B, C]
    if resets is not None:
        width = max(4, B.shape[-1] // 2)  # tiles begin at multiples of 128 bytes
        values.append(jnp.broadcast_to(resets[..., None], (*resets.shape, width)))
    batch = max(value.shape[0] for value in values)
    return jnp.concatenate(
        [
            jnp.broadcast_to(value, (batch, *value.shape[1:])).astype(jnp.float32)
            for value in values
        ],
        axis=-1,
    )


class Sample(NamedTuple):
    wide: dict[str, Array]  # the rows of the streams that have features
    B: Lanes
    C: Lanes
    reset: Array | None

    @property
    def step(self) -> Array:
        """Over which the state decays."""
        return self.wide.get("dt_A", self.wide["dt"])

    @property
    def drive(self) -> Array:
        return self.wide["dt"] * self.wide["x"]


def advance(rates: Lanes, h: Lanes, sample: Sample) -> tuple[Lanes, Lanes, Lanes]:
    """The state before the sample, after a reset if there is one, its decay and the new state."""
    step, drive = sample.step, sample.drive
    h = keep(sample.reset, h)
    decay = tuple(jnp.exp2(step * rate) for rate in rates)
    new = (drive * B_n + a * h_n for a, h_n, B_n in zip(decay, h, sample.B, strict=True))
    return h, decay, tuple(new)


def keep(reset: Array | None, h: Sequence[Array]) -> Lanes:
    return tuple(h if reset is None else [jnp.where(reset, 0.0, h_n) for h_n in h])


def total(terms: Sequence[Array]) -> Array:
    """In four sums, which do not wait for each other."""
    sums = list(terms[:4])
    for n, term in enumerate(terms[4:]):
        sums[n % 4] += term
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


class Ring(NamedTuple):
    """Tiles of the streams on their way to shared memory."""

    sources: dict[str, Any]
    slots: dict[str, Any]
    arrived: Any
    rows: int
    visits: int
    tile: Callable[[Array], Array]  # the tile that a visit needs
    example: Array
    columns: Any

    @classmethod
    def over(cls, names, sources, slots, arrived, rows, visits, tile):
        example, columns = lax.axis_index("example"), pl.ds(lax.axis_index("block") * LANES, LANES)
        sources = dict(zip(names, sources, strict=True))
        slots = dict(zip(names, slots, strict=True))
        return cls(sources, slots, arrived, rows, visits, tile, example, columns)

    def start(self):
        lax.fori_loop(0, min(STAGES, self.visits), lambda visit, _: self._fetch(visit), None)

    def wait(self, visit) -> Array:
        slot = lax.rem(visit, STAGES)
        plgpu.barrier_wait(self.arrived.at[slot])
        return slot

    def refill(self, visit):
        """Once all lanes have read the slot of this visit."""
        pl.when(visit + STAGES < self.visits)(lambda: self._fetch(visit + STAGES))

    def _fetch(self, visit):
        slot = lax.rem(visit, STAGES)
        for name, source in self.sources.items():
            tile = self.tile_of(source, self.tile(visit), wide=name != "narrow")
            plgpu.copy_gmem_to_smem(tile, self.slots[name].at[slot], self.arrived.at[slot])

    def tile_of(self, ref, tile, *, wide: bool = True):
        time = pl.ds(tile * self.rows, self.rows)
        ref = of_example(ref, self.example)
        return ref.at[time, self.columns] if wide else ref.at[time]

    def sample(self, slot, row, state: int) -> Sample:
        wide = {
            name: ref[slot, row].astype(jnp.float32)
            for name, ref in self.slots.items()
            if name != "narrow"
        }
        shared = self.slots["narrow"]
        number = lambda n: shared[slot, row, n]
        return Sample(
            wide,
            tuple(number(n) for n in range(state)),
            tuple(number(state + n) for n in range(state)),
            number(2 * state) != 0 if shared.shape[2] > 2 * state else None,
        )


def stream_tiles(streams: dict[str, Array], rows: int) -> list[tuple[int, ...]]:
    return [
        (1, rows, value.shape[2] if name == "narrow" else LANES) for name, value in streams.items()
    ]


def ring_slots(streams: dict[str, Array], rows: int) -> list[Any]:
    tiles = stream_tiles(streams, rows)
    return [
        plgpu.SMEM((STAGES, *tile[1:]), value.dtype)
        for tile, value in zip(tiles, streams.values(), strict=True)
    ]


def of_example(ref, example):
    return ref.at[example if ref.shape[0] > 1 else 0]


def read_block(source, buffer, arrived) -> Lanes:
    """The lanes' columns of one example's (state, features), by way of shared memory."""
    columns = pl.ds(lax.axis_index("block") * LANES, LANES)
    source = of_example(source, lax.axis_index("example")).at[:, columns]
    plgpu.copy_gmem_to_smem(source, buffer, arrived)
    plgpu.barrier_wait(arrived)
    values = get(buffer)
    plgpu.commit_smem()  # the next copy to the buffer must not overtake the lanes
    return values


def get(ref) -> Lanes:
    return tuple(ref[n] for n in range(ref.shape[0]))


def put(ref, values: Sequence[Array]):
    for n, value in enumerate(values):
        ref[n] = value


def send(source, target):
    plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def split(refs, *sizes):
    """Consecutive pieces of the given sizes, and the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(refs[start : start + size])
        start += size
    return *pieces, refs[start:]
