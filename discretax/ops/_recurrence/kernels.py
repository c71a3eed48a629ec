"""The kernels of the linear recurrence, in the shapes in which the recurrence comes.

Each is imported where it is called: the compilers of kernels take long to load.
"""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array

from discretax.ops._recurrence.transitions import (
    MATRICES,
    PLANES,
    Transitions,
    to_complex,
    to_planes,
)


def why_no_kernel(transitions: Transitions, b: Array, kernel: str) -> str | None:
    """What keeps a batch of recurrences with drive `b` from a kernel, or None."""
    planes = transitions is PLANES
    if transitions is MATRICES:
        return "its states are carried on by numbers; got matrices"
    if b.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64):
        return f"it computes in float32, from 16 or 32 bits a number; got {b.dtype}"
    if kernel == "mosaic_tpu" and b.dtype == jnp.float16:
        return "TPUs have no float16"
    if planes and b.ndim != 4:
        return f"it takes planes as (time, 2, state); got {b.shape[1:]}"
    if b.size == 0:
        return f"there is nothing in {b.shape[1:]}"
    channels = math.prod(b.shape[2:]) // (2 if planes else 1)
    step = 16 // jnp.finfo(b.dtype).dtype.itemsize
    if kernel == "mosaic_gpu" and channels % step:
        return (
            "asynchronous copies want rows of a multiple of 16 bytes, which is a multiple of "
            f"{step} channels of {b.dtype}; got {channels}"
        )
    return None


def states(
    kernel: str,
    planes: bool,
    reverse: bool,
    a: Array,
    b: Array,
    h0: Array,
    resets: Array | None = None,
) -> Array:
    """All arrays have a batch axis, of size 1 where all examples share a value."""
    if kernel == "mosaic_gpu":
        from discretax.ops._recurrence.gpu import states_gpu as compute
    else:
        from discretax.ops._recurrence.tpu import states_tpu as compute
    own = functools.partial(_own, planes)
    batch = max(value.shape[0] for value in (a, b, h0, resets) if value is not None)
    b = jnp.broadcast_to(b, (batch, *b.shape[1:]))
    a = own(a if a.ndim == b.ndim else a[:, None])
    return _like(b, compute(a, own(b), own(h0[:, None])[:, 0], resets, reverse=reverse))


def derivatives(
    planes: bool,
    reverse: bool,
    a: Array,
    h0: Array,
    h: Array,
    g: Array,
    resets: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The cotangents of `a`, `b` and `h0` on a GPU, one for each example."""
    from discretax.ops._recurrence.gpu import derivatives_gpu

    # JAX's cotangents of complex numbers are transposed, those of planes adjoint.
    turn = jnp.conj if jnp.iscomplexobj(g) else lambda value: value
    own = functools.partial(_own, planes)
    a_over_time = a if a.ndim == h.ndim else a[:, None]
    h0_over_time = h0[:, None]
    d_a, d_b, d_h0 = derivatives_gpu(
        own(a_over_time), own(h0_over_time)[:, 0], resets, own(h), own(turn(g)), reverse=reverse
    )
    d_a = turn(_like(a_over_time, d_a))
    d_h0 = turn(_like(h0_over_time, d_h0[:, None]))[:, 0]
    return d_a if a.ndim == h.ndim else d_a[:, 0], turn(_like(g, d_b)), d_h0


def _own(planes: bool, value: Array) -> Array:
    """(batch, time, planes, state)"""
    if planes:
        return value
    value = value.reshape(*value.shape[:2], -1)
    return to_planes(value) if jnp.iscomplexobj(value) else value[:, :, None]


def _like(value: Array, own: Array) -> Array:
    if jnp.iscomplexobj(value):
        own = to_complex(own)
    return own.reshape(own.shape[0], *value.shape[1:]).astype(value.dtype)
