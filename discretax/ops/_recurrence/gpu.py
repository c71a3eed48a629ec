"""The linear recurrence and its derivative on NVIDIA GPUs from Hopper (sm_90) on.

Where there are too few channels to occupy the device, time is cut into chunks, one a program: a
first pass finds by what each chunk multiplies a state and what it adds to it, and from these follow
the states with which all chunks can start at once.

Arrays are (batch, time, planes, state): one plane for real numbers, two for complex ones. The batch
axis of an argument may be 1, one value for all examples, and the time axis of `a`, if it is constant.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from discretax.ops._recurrence.transitions import NUMBERS, PLANES
from discretax.ops._recurrence.xla import associative
from discretax.ops._running.walk_gpu import Plan, Planes, make_plan, select, walk


def states_gpu(
    a: Array,
    b: Array,
    h0: Array,
    resets: Array | None,
    *,
    reverse: bool,
    tile: int | None = None,
    chunks: int | None = None,
    interpret: Any = None,
) -> Array:
    """All states, in the type of `b`. `h0` is (batch, planes, state), `resets` (batch, time)."""
    streams = _given(a=a, b=b, reset=resets)
    plan = make_plan(streams, [b.dtype], reverse, tile, chunks)

    def use(sample, carry):
        (h,) = carry
        h = _reset(sample, sample["b"], _add(_times(sample["a"], h), sample["b"]))
        return (h,), [h]

    start = _starts(plan, streams, h0, interpret, adjoint=False)
    return walk(plan, streams, {}, [start], use, [b.dtype], interpret)[0][0]


def derivatives_gpu(
    a: Array,
    h0: Array,
    resets: Array | None,
    h: Array,
    g: Array,
    *,
    reverse: bool,
    tile: int | None = None,
    chunks: int | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """The cotangents of `a` and `b`, from that of `h`, and of `h0`; one for each example.

    A program carries c = conj(a_t) lambda_t to the sample before, so that nothing has to be shifted.
    """
    constant = a.shape[1] == 1
    streams = _given(a=a, b=g, reset=resets, h=h)
    outputs = [g.dtype] if constant else [g.dtype, a.dtype]
    plan = make_plan(streams, outputs, not reverse, tile, chunks)

    def use(sample, carry):
        c, total = carry
        lam = _add(sample["b"], c)
        silence = tuple(map(jnp.zeros_like, lam))
        c = _reset(sample, silence, _times(_conjugate(sample["a"]), lam))
        d_a = _reset(sample, silence, _times(_conjugate(sample["h"]), lam))
        return (c, _add(total, d_a)) if constant else (c, total), [lam, d_a][: len(outputs)]

    start = _starts(
        plan, _given(a=a, b=g, reset=resets), jnp.zeros_like(h0), interpret, adjoint=True
    )
    edge = {"h0": h0[:, None].astype(jnp.float32)}
    zero = jnp.zeros((1, 1, *h0.shape[1:]), jnp.float32)
    rows, (c, total) = walk(plan, streams, edge, [start, zero], use, outputs, interpret)
    d_h0 = c[:, -1 if reverse else 0]
    return (total.sum(1, keepdims=True) if constant else rows[1]), rows[0], d_h0


def _given(**arrays: Array | None) -> dict[str, Array]:
    return {name: value for name, value in arrays.items() if value is not None}


def _starts(plan: Plan, streams, start: Array, interpret, *, adjoint: bool) -> Array:
    """The carry with which every chunk starts, (batch, chunks, planes, state)."""
    start = jnp.broadcast_to(start, (plan.batch, plan.planes, plan.state)).astype(jnp.float32)
    if plan.chunks == 1:
        return start[:, None]

    def use(sample, carry):
        factor, h = carry
        a = _conjugate(sample["a"]) if adjoint else sample["a"]
        if adjoint:
            h, at_reset = _times(a, _add(h, sample["b"])), tuple(map(jnp.zeros_like, h))
        else:
            h, at_reset = _add(_times(a, h), sample["b"]), sample["b"]
        factor = _reset(sample, tuple(map(jnp.zeros_like, h)), _times(a, factor))
        return (factor, _reset(sample, at_reset, h)), []

    zero = jnp.zeros((1, 1, plan.planes, plan.state), jnp.float32)
    one = zero.at[:, :, 0].set(1)
    _, summary = walk(plan, streams, {}, [one, zero], use, [], interpret)
    factor, last = (jnp.moveaxis(value, 1, 0) for value in summary)
    transitions = PLANES if plan.planes == 2 else NUMBERS
    after = associative(transitions, plan.down, factor, last, start, None)
    before = (
        jnp.concatenate([after[1:], start[None]])
        if plan.down
        else jnp.concatenate([start[None], after[:-1]])
    )
    return jnp.moveaxis(before, 0, 1)


def _reset(sample, at_reset: Planes, value: Planes) -> Planes:
    return select(sample["reset"], at_reset, value) if "reset" in sample else value


def _add(a: Planes, b: Planes) -> Planes:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _conjugate(a: Planes) -> Planes:
    return a if len(a) == 1 else (a[0], -a[1])


def _times(a: Planes, b: Planes) -> Planes:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
