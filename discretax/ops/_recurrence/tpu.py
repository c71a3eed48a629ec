"""The linear recurrence on TPUs: one pass through HBM, the state carried from tile to tile in VMEM.

Rows of time lie on sublanes and states on lanes. Eight rows, the sublanes of a register, are scanned
in three doublings; what then enters them is one product with the state before them. A walk row by
row takes longer in the compiled program, most of all where the states are few.

Complex planes lie side by side on lanes: (time, 2 * state), which is how one matrix product yields
and consumes them, so that no copy in another layout is made on either side of the kernel.
"""

import functools as ft
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from discretax.ops._running.manual_axes import varying_with

SUBLANES, LANES = 8, 128
SHIFTS = (1, 2, 4)
GROUP = 32  # rows of one turn of the loop, whole registers of bfloat16: one integer of reset flags
BUDGET = 4 * 2**20  # bytes of VMEM for the tiles, of each array one in use and one under way
WIDTH = 512  # lanes at work together: enough independent operations, all in registers
WIDEST = 4096  # lanes of a tile
# Python's integers become int64 with x64 enabled, and these kernels know none.
ZERO = np.int32(0)

Planes = tuple[Array, ...]


def states_tpu(
    a: Array,
    b: Array,
    h0: Array,
    resets: Array | None,
    *,
    reverse: bool,
    tile: int | None = None,
    interpret: Any = False,
) -> Array:
    """All states of h_t = a_t h_{t-1} + b_t, or with `reverse` of h_t = a_t h_{t+1} + b_t.

    `b` is (batch, time, planes, state), float32 or bfloat16, with planes 1 (real) or 2 (real and
    imaginary part); `a` (batch, time, planes, state) with time 1 where it is constant; `h0`
    (batch, planes, state); `resets` (batch, time) of booleans or integers, or None. The batch of
    `a`, `h0` and `resets` may be 1: shared by all examples. `tile` overrides the rows of a tile.
    """
    batch, time, planes, state = b.shape
    if planes * state > WIDEST and planes > 1:
        # A tile holds both planes whole.
        cuts = range(0, state, WIDEST // planes)
        parts = [slice(cut, cut + WIDEST // planes) for cut in cuts]
        run = ft.partial(states_tpu, reverse=reverse, tile=tile, interpret=interpret)
        slices = [run(a[..., s], b[..., s], h0[..., s], resets) for s in parts]
        return jnp.concatenate(slices, axis=-1)

    varying = a.shape[1] == time and time > 1
    lanes = min(planes * state, WIDEST)
    rows = tile or tile_rows(time, lanes, b.dtype.itemsize, varying)
    tiles = pl.cdiv(time, rows)

    def spec(value, block, index, **kwargs):
        shared = value.shape[0] == 1

        def index_map(n, d, t):
            return (ZERO if shared else n, *index(d, tiles - 1 - t if reverse else t))

        return pl.BlockSpec((1, *block), index_map, **kwargs)

    a, b, h0 = (value.reshape(value.shape[0], -1, planes * state) for value in (a, b, h0))
    tiled = ft.partial(spec, block=(rows, lanes), index=lambda d, t: (t, d))
    single = ft.partial(spec, block=(1, lanes), index=lambda d, t: (ZERO, d))
    inputs = [a, b, h0]
    in_specs = [tiled(a) if varying else single(a), tiled(b), single(h0)]
    if resets is not None:
        flags = _flags(resets, tiles, rows)
        inputs.append(flags)
        block = (1, 1, rows // GROUP)
        index = lambda d, t: (t, ZERO, ZERO)
        in_specs.append(spec(flags, block, index, memory_space=pltpu.SMEM))

    h = pl.pallas_call(
        ft.partial(
            _kernel, resets is not None, time=time, planes=planes, varying=varying, reverse=reverse
        ),
        out_shape=varying_with(b, b.shape, b.dtype),
        grid=(batch, pl.cdiv(planes * state, lanes), tiles),
        in_specs=in_specs,
        out_specs=tiled(b),
        scratch_shapes=[pltpu.VMEM((1, lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="linear_recurrence",
    )(*inputs)
    return h.reshape(batch, time, planes, state)


def tile_rows(time: int, lanes: int, itemsize: int, varying: bool) -> int:
    """Rows of a tile: as many as `BUDGET` allows, whole groups, no more than there are."""
    row = pl.cdiv(lanes, LANES) * LANES * itemsize
    most = BUDGET // (2 * (2 + varying) * row * GROUP)
    return GROUP * min(most, pl.cdiv(time, GROUP))


def _flags(resets: Array, tiles: int, rows: int) -> Array:
    """One bit a row, one integer a group: (batch, tiles, 1, groups of a tile)."""
    padding = tiles * rows - resets.shape[1]
    bits = jnp.pad(resets.astype(bool), ((0, 0), (0, padding))).reshape(-1, GROUP)
    words = (bits.astype(jnp.int32) << jnp.arange(GROUP, dtype=jnp.int32)[None]).sum(
        1, dtype=jnp.int32
    )
    return words.reshape(resets.shape[0], tiles, 1, -1)


def _kernel(with_resets, a_ref, b_ref, h0_ref, *refs, time, planes, varying, reverse):
    flags_ref = refs[0] if with_resets else None
    h_ref, carry = refs[with_resets:]
    rows, lanes = b_ref.shape[1:]
    tiles = pl.cdiv(time, rows)
    step = pl.program_id(2)
    at_end = step == (0 if reverse else tiles - 1)
    # The last tile may hang over the end; what is read there is undefined.
    whole, rest = divmod(time - (tiles - 1) * rows, GROUP)
    filled = whole if reverse else whole + (rest > 0)
    groups = jnp.where(at_end, np.int32(filled), np.int32(rows // GROUP))

    @pl.when(step == 0)
    def initialise():
        carry[...] = h0_ref[0].astype(jnp.float32)

    def columns(start, width):
        state = lanes // planes
        planes_of = [pl.ds(plane * state + start, width) for plane in range(planes)]
        read = lambda ref, here: tuple(ref[0, here, at].astype(jnp.float32) for at in planes_of)
        if not varying:
            constant = tuple(jnp.broadcast_to(p, (SUBLANES, width)) for p in read(a_ref, slice(1)))
            constant_powers = _powers(constant, reverse)

        def group(i, h, valid=GROUP):
            """Stores the states of group `i`, which follow from `h`; returns the last of them."""
            here = pl.ds(i * GROUP, GROUP)
            b = read(b_ref, here)
            a = read(a_ref, here) if varying else None
            eights: dict[int, Planes] = {}
            for k in sorted(range(GROUP // SUBLANES), reverse=reverse):
                eight = lambda value, k=k: tuple(
                    p[k * SUBLANES : (k + 1) * SUBLANES] for p in value
                )
                row = k * SUBLANES + _sublane(width)
                b_k, a_k = eight(b), eight(a) if varying else constant
                if valid < GROUP:  # beyond the end, where a walk in reverse comes from
                    b_k = tuple(jnp.where(row < valid, p, 0) for p in b_k)
                    a_k = tuple(jnp.where(row < valid, p, 1 - n) for n, p in enumerate(a_k))
                powers = _powers(a_k, reverse) if varying or valid < GROUP else constant_powers
                reset = None
                if flags_ref is not None:
                    reset = (flags_ref[0, 0, 0, i] >> row) & 1
                eights[k] = _eight(powers, b_k, h, reset, reverse)
                h = tuple(p[:1] if reverse else p[-1:] for p in eights[k])
            for plane, at in enumerate(planes_of):
                states = jnp.concatenate([eights[k][plane] for k in sorted(eights)])
                h_ref[0, here, at] = states.astype(h_ref.dtype)
            return h

        h = tuple(carry[:, at] for at in planes_of)
        if reverse and rest:
            h = lax.cond(at_end, lambda h: group(whole, h, rest), lambda h: h, h)
        h = lax.fori_loop(0, groups, lambda j, h: group(groups - 1 - j if reverse else j, h), h)
        for at, plane in zip(planes_of, h, strict=True):
            carry[:, at] = plane

    width = WIDTH // planes
    for start in range(0, lanes // planes, width):
        columns(start, min(width, lanes // planes - start))


def _powers(a: Planes, reverse: bool) -> list[Planes]:
    """Products of the transitions of the last 1, 2, 4 and 8 rows, as far as there are rows."""
    powers = [a]
    for shift in SHIFTS:
        a = _where(_inside(shift, a[0].shape[1], reverse), _times(a, _roll(a, shift, reverse)), a)
        powers.append(a)
    return powers


def _eight(
    powers: list[Planes], b: Planes, h: Planes, reset: Array | None, reverse: bool
) -> Planes:
    """The states of eight rows that follow the state `h`.

    What comes from before a reset or from the other end is not selected: no NaN passes.
    """
    for shift, a in zip(SHIFTS, powers, strict=False):
        use = inside = _inside(shift, b[0].shape[1], reverse)
        if reset is not None:
            use = inside & (reset == 0)
            reset = jnp.where(inside, reset | _roll((reset,), shift, reverse)[0], reset)
        b = _where(use, _add(_times(a, _roll(b, shift, reverse)), b), b)
    through = _add(_times(powers[-1], h), b)
    return through if reset is None else _where(reset == 0, through, b)


def _inside(shift: int, width: int, reverse: bool) -> Array:
    """Where there is a row `shift` earlier."""
    row = _sublane(width)
    return row < SUBLANES - shift if reverse else row >= shift


def _sublane(width: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)


def _roll(planes: Planes, shift: int, reverse: bool) -> Planes:
    rows: Any = np.int32(SUBLANES - shift if reverse else shift)
    return tuple(pltpu.roll(p, rows, 0) for p in planes)


def _where(condition: Array, x: Planes, y: Planes) -> Planes:
    return tuple(jnp.where(condition, p, q) for p, q in zip(x, y, strict=True))


def _add(x: Planes, y: Planes) -> Planes:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _times(x: Planes, y: Planes) -> Planes:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
