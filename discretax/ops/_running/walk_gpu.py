"""A walk through time on NVIDIA GPUs from Hopper (sm_90) on, which a recurrence fills with its step.

A program is one warpgroup that walks through time with 128 channels, one a lane. Asynchronous copies
bring tiles of time to shared memory some tiles ahead and take the results back.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from discretax.ops._running.launch_gpu import LANES, launch

GROUP = 8  # rows whose loads are issued before the operations that depend on each other
STAGES = 3  # tiles under way
SHARED_MEMORY = 112 * 1024  # bytes a program may take, so that two have room on a multiprocessor
MULTIPROCESSORS = 132  # of an H100
ENOUGH = 64  # programs, to have more bytes under way than the memory's rate times its latency
MIN_FLAGS = 32  # 128 bytes, the least that is copied
MIN_CHUNK = 256  # samples from which a chunk of its own pays


Planes = tuple[Array, ...]


class Plan(NamedTuple):
    batch: int
    time: int
    planes: int
    state: int
    tile: int  # samples that are copied at once
    chunk: int  # samples of a program
    chunks: int
    down: bool  # from the last sample to the first

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.state, LANES)

    @property
    def flags(self) -> int:
        return max(self.tile, MIN_FLAGS)


def make_plan(streams, outputs, down, tile, chunks) -> Plan:
    batch, time, planes, state = streams["b"].shape
    batch = max(batch, *(value.shape[0] for value in streams.values()))
    if tile is None:
        copied = [value for value in streams.values() if value.shape[1] > 1]
        row = sum(STAGES * value.dtype.itemsize for value in copied if value.ndim == 4)
        row += sum(2 * jnp.dtype(dtype).itemsize for dtype in outputs)
        fitting = SHARED_MEMORY // (row * planes * LANES)
        tile = next(rows for rows in (64, 32, 16, GROUP) if rows <= max(fitting, GROUP))
    if chunks is None:
        programs = batch * pl.cdiv(state, LANES)
        wanted = 1 if programs >= ENOUGH else pl.cdiv(2 * MULTIPROCESSORS, programs)
        chunks = max(1, min(wanted, time // MIN_CHUNK))
    chunk = pl.cdiv(pl.cdiv(time, chunks), tile) * tile
    return Plan(batch, time, planes, state, tile, chunk, pl.cdiv(time, chunk), down)


def walk(
    plan: Plan,
    streams: dict[str, Array],
    vectors: dict[str, Array],
    carries: list[Array],
    use: Callable[[dict[str, Planes], tuple[Planes, ...]], tuple[tuple[Planes, ...], list[Planes]]],
    rows: list[Any],
    interpret: Any,
) -> tuple[list[Array], list[Array]]:
    """`use(sample, carry) -> carry, outputs` on every sample of every chunk.

    A sample holds the rows of the `streams`, except for "h", of which it holds the neighbour that
    lies ahead, in the chunk or outside of it; past the end that is the vector "h0". Vectors and
    first carries are (batch, chunks or 1, planes, state). Returns the outputs, one for each type in
    `rows`, and the last carries of all chunks.
    """
    streams = dict(streams)
    if streams["a"].shape[1] == 1:
        vectors = vectors | {"a": streams.pop("a").astype(jnp.float32)}
    if "reset" in streams:  # the copies want strides of 16 bytes
        padding = plan.flags + -plan.time % 4
        flags = streams["reset"].astype(jnp.int32)
        streams["reset"] = jnp.pad(flags, ((0, 0), (0, padding)))
    neighbour = ["h"] if "h" in streams else []
    full = (plan.batch, plan.time, plan.planes, plan.state)
    summary = (plan.batch, plan.chunks, plan.planes, plan.state)
    inputs = [*streams.values(), *vectors.values(), *carries]
    outputs = [jax.ShapeDtypeStruct(full, dtype) for dtype in rows]
    outputs += [jax.ShapeDtypeStruct(summary, jnp.float32)] * len(carries)

    def body(*refs):
        take = iter(refs)
        several = lambda number: list(itertools.islice(take, number))
        named = lambda names: dict(zip(names, several(len(names)), strict=True))
        sources, once, first = named(streams), named(vectors), several(len(carries))
        targets, last = several(len(rows)), several(len(carries))
        tiles, edges, held = named(streams), named(neighbour), named(vectors)
        carried, staged, arrived, loaded = several(len(carries)), several(len(rows)), *take
        place = _place(plan)

        for source, target in zip(
            [*once.values(), *first], [*held.values(), *carried], strict=True
        ):
            plgpu.copy_gmem_to_smem(_vector(source, place), target, loaded)
        plgpu.barrier_wait(loaded)
        constants = {name: planes_of(value) for name, value in held.items()}

        def fetch(i):
            stage, start = lax.rem(i, STAGES), place.start(plan, i)
            for name, source in sources.items():
                target = tiles[name].at[stage]
                plgpu.copy_gmem_to_smem(
                    _tile(source, place, start, plan), target, arrived.at[stage]
                )
            for name in neighbour:
                row = start - 1 if plan.down else jnp.minimum(start + plan.tile, plan.time - 1)
                source = _at(sources[name], place.batch).at[jnp.maximum(row, 0), :, place.columns]
                plgpu.copy_gmem_to_smem(source, edges[name].at[stage], arrived.at[stage])

        def run(i, carry):
            stage, start = lax.rem(i, STAGES), place.start(plan, i)
            valid = jnp.minimum(plan.tile, plan.time - start)
            plgpu.barrier_wait(arrived.at[stage])
            plgpu.wait_smem_to_gmem(len(rows), wait_read_only=True)
            edge = {}
            for name in neighbour:
                outside = start == 0 if plan.down else start + valid == plan.time
                edge[name] = select(outside, constants["h0"], planes_of(edges[name].at[stage]))

            def load(row):
                sample = dict(constants)
                for name, value in tiles.items():
                    if name in neighbour:
                        ahead = row - 1 if plan.down else row + 1
                        inside = ahead >= 0 if plan.down else ahead < valid
                        at = jnp.where(inside, ahead, row)
                        sample[name] = select(inside, planes_of(value.at[stage, at]), edge[name])
                    elif name == "reset":
                        sample[name] = value[stage, row] != 0
                    else:
                        sample[name] = planes_of(value.at[stage, row])
                return sample

            def step(row, sample, carry):
                carry, results = use(sample, carry)
                for target, result in zip(staged, results, strict=True):
                    for plane, value in enumerate(result):
                        target[lax.rem(i, 2), row, plane] = value.astype(target.dtype)
                return carry

            carry = _rows(valid, load, step, carry, plan.down)
            plgpu.commit_smem()  # a barrier too: the stage has been read by all
            for source, target in zip(staged, targets, strict=True):
                target = _tile(target, place, start, plan)
                plgpu.copy_smem_to_gmem(source.at[lax.rem(i, 2)], target)
            pl.when(i + STAGES < place.tiles)(lambda: fetch(i + STAGES))
            return carry

        for stage in range(STAGES):
            pl.when(stage < place.tiles)(lambda stage=stage: fetch(jnp.int32(stage)))
        carry = lax.fori_loop(0, place.tiles, run, tuple(planes_of(value) for value in carried))
        for planes, source in zip(carry, carried, strict=True):
            for plane, value in enumerate(planes):
                source[plane] = value
        plgpu.commit_smem()
        for source, target in zip(carried, last, strict=True):
            plgpu.copy_smem_to_gmem(source, _vector(target, place))
        plgpu.wait_smem_to_gmem(0)

    vector = plgpu.SMEM((plan.planes, LANES), jnp.float32)
    row = (plan.tile, plan.planes, LANES)
    scratch = [
        *(
            plgpu.SMEM((STAGES, *(row if value.ndim == 4 else (plan.flags,))), value.dtype)
            for value in streams.values()
        ),
        *(plgpu.SMEM((STAGES, *row[1:]), streams[name].dtype) for name in neighbour),
        *[vector] * (len(vectors) + len(carries)),
        *(plgpu.SMEM((2, *row), dtype) for dtype in rows),
        plgpu.Barrier(num_arrivals=len(streams) + len(neighbour), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=len(vectors) + len(carries)),
    ]
    tile = (1, plan.tile, 1, LANES)
    results = launch(
        body,
        inputs,
        outputs,
        tiles=[
            *(tile if value.ndim == 4 else (1, 1) for value in streams.values()),
            *[(1, 1, 1, LANES)] * (len(vectors) + len(carries)),
            *[tile] * len(rows),
            *[(1, 1, 1, LANES)] * len(carries),
        ],
        grid={"program": plan.batch * plan.chunks * plan.blocks},
        scratch=scratch,
        interpret=interpret,
    )
    return results[: len(rows)], results[len(rows) :]


class _Place(NamedTuple):
    batch: Array
    chunk: Array
    columns: Any
    tiles: Array

    def start(self, plan: Plan, i):
        """The first sample of the `i`-th tile on the way."""
        tile = self.tiles - 1 - i if plan.down else i
        return self.chunk * plan.chunk + tile * plan.tile


def _place(plan: Plan) -> _Place:
    program = lax.axis_index("program")
    rest, block = lax.div(program, plan.blocks), lax.rem(program, plan.blocks)
    batch, chunk = lax.div(rest, plan.chunks), lax.rem(rest, plan.chunks)
    samples = jnp.minimum(plan.chunk, plan.time - chunk * plan.chunk)
    tiles = lax.div(samples + plan.tile - 1, plan.tile)
    return _Place(batch, chunk, pl.ds(block * LANES, LANES), tiles)


def _at(ref, index):
    return ref.at[index if ref.shape[0] > 1 else 0]


def _vector(ref, place: _Place):
    return _at(_at(ref, place.batch), place.chunk).at[:, place.columns]


def _tile(ref, place: _Place, start, plan: Plan):
    example = _at(ref, place.batch)
    if len(ref.shape) == 2:
        return example.at[pl.ds(start, plan.flags)]
    return example.at[pl.ds(start, plan.tile), :, place.columns]


def _rows(valid, load, step, carry, down: bool):
    """Over the rows of a tile; the loads of a group come before the steps, which wait for each other."""
    at = lambda s: valid - 1 - s if down else s

    def group(k, carry):
        rows = [at(k * GROUP + j) for j in range(GROUP)]
        samples = [load(row) for row in rows]
        for row, sample in zip(rows, samples, strict=True):
            carry = step(row, sample, carry)
        return carry

    groups = lax.div(valid, GROUP)
    carry = lax.fori_loop(0, groups, group, carry)
    single = lambda s, carry: step(at(s), load(at(s)), carry)
    return lax.fori_loop(groups * GROUP, valid, single, carry)


def planes_of(ref) -> Planes:
    return tuple(ref[plane].astype(jnp.float32) for plane in range(ref.shape[0]))


def select(condition, yes: Planes, no: Planes) -> Planes:
    return tuple(jnp.where(condition, y, n) for y, n in zip(yes, no, strict=True))
