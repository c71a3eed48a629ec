"""One small state space system per feature: its scan, its chunks of matrices, its convolution."""

import functools as ft
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from discretax._broken import contained, mended
from discretax.ops._convolution.fft import fft_convolution
from discretax.ops._depthwise_ssm.matrices import Chunk, boundary_states, state_within
from discretax.ops._depthwise_ssm.transition import Transition
from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import PLANES, times
from discretax.ops._running.chunks import Left, scan_chunks, state_at, whole_chunks
from discretax.ops._running.derivatives import (
    differentiated,
    push_through,
    turns_kept_whole,
)
from discretax.ops._running.manual_axes import vary_alike
from discretax.ops._running.split_time import incoming_state, time_parts

Route = Literal["scan", "chunks", "fft"] | None


def depthwise_ssm(
    transition: Transition,
    B: Float[Array, "*time features 2 state"],
    C: Float[Array, "channels features 2 state"],
    x: Float[Array, "time features"],
    h0: Float[Array, "features 2 state"],
    *,
    D: Float[Array, "channels features"] | None = None,
    length: Left | None = None,
    resets: Bool[Array, " time"] | None = None,
    route: Route = None,
) -> tuple[Float[Array, "time channels features"], Float[Array, "features 2 state"]]:
    r"""One system per feature $f$, $h^f_t = A^f h^f_{t-1} + B^f x^f_t$ and
    $y^{cf}_t = \mathrm{Re}(C^{cf} h^f_t) + D^{cf} x^f_t$.

    A system with one input has few numbers going in and out and many states in between. Within a
    chunk of some 32 samples the states are never formed: output and last state are matrix products
    with the input and the state before the chunk,

    $$y = T x + O h, \qquad h' = A^c h + I x$$

    with $T$ the Toeplitz matrix of the kernel $K_l = \mathrm{Re}(C A^l B)$, with $D$ added to $K_0$,
    $O_j = C A^{j+1}$ and $I_j = A^{c-1-j} B$. That is the route `"chunks"`. `"fft"` convolves with the whole kernel.
    `"scan"` walks sample by sample and can follow a system that changes with time or is reset.

    **Arguments:**

    - `transition`: planes of $A$, constant or one per sample, and its low-rank part if it has one.
    - `B`: planes of the input vectors, constant or one per sample.
    - `C`: planes (re, -im) of the readout, so that $\mathrm{Re}(C h)$ is a plain product.
    - `x`: the input.
    - `h0`: planes of the state before the first sample.
    - `D`: the skip; none if left out.
    - `length`: number of valid samples; `x` is zero after them.
    - `resets`: where True at `t`, the state before `t` is zero.
    - `route`: for a system that stays the same over time, without resets; any other takes the scan.
        None takes chunks beyond 32 samples.

    **Returns:**

    The output, and the planes of the state after the last valid sample.
    """
    varying = transition.A.ndim == 4
    h0 = incoming_depthwise_state(transition, B, C, x, h0, length, resets)
    if route is None:
        route = "scan" if x.shape[0] <= STEPS else "chunks"
    if route == "scan" or varying or resets is not None:
        return _scan(transition, B, C, D, x, h0, length, resets)
    if x.shape[0] == 0:
        return jnp.zeros((0, *C.shape[:2]), x.dtype), h0
    if route == "fft":
        return _convolve(transition, B, C, D, x, h0, length)
    return _chunks(transition, B, C, D, x, h0, length)


# What is fastest on CPU, from 256 features of 32 complex states; both ways on both sides of each
# number of samples: "choices" in docs/performance.md.
STEPS = 32  # up to so many, one by one: too few to pay for the matrices
CHUNK, LARGE_CHUNK = 32, 64
LARGE_BEYOND = 4096  # up to so many, small chunks
# From so many on, 16 features after the other, so that what they need stays in the cache, and each
# block's forward pass again in the backward pass. Segments bound the memory of very long sequences.
LONG = 256
BLOCK = 16
SEGMENT = 2**16


def _chunk_size(time: int) -> int:
    size = CHUNK if time <= LARGE_BEYOND else LARGE_CHUNK
    return min(size, 1 << (time - 1).bit_length())


def incoming_depthwise_state(
    transition: Transition, B: Array, C: Array, x: Array, h0: Array, length: Left | None, resets
) -> Float[Array, "features 2 state"]:
    """`h0`, or with time split over devices the state that the samples before leave."""
    if transition.U is not None and time_parts() > 1:
        raise ValueError(
            "a transition with a low-rank part, that of S4, is not split over devices along time: "
            "its power over a part is a dense matrix for each feature. Take a diagonal one, that "
            "of S4D."
        )

    def last_state(h, x):
        if transition.A.ndim == 4 or resets is not None:
            return _scan(transition, B, C, None, x, h, length, resets)[1]
        carried = lambda h: carried_state(transition, B, C, mended(x), h, length)
        return contained(carried, h, x, None, length, by_feature=True)[1]

    def summary():
        one = jnp.zeros_like(h0).at[:, 0].set(1)
        return last_state(one, jnp.zeros_like(x)), last_state(jnp.zeros_like(h0), x)

    return incoming_state(h0, summary, resets, times)


@jax.jit
def carried_state(
    transition: Transition, B: Array, C: Array, x: Array, h0: Array, length: Left | None
) -> tuple[Float[Array, "time channels features"], Float[Array, "features 2 state"]]:
    """What a convolution leaves out: the output that `h0` alone brings forth, and the last state."""
    inputs = _split(x)
    matrices = Chunk.of(transition, B, C, None, inputs.shape[2])
    ahead = jnp.einsum("fmj,fjs->fms", inputs, matrices.from_input)
    before, after = boundary_states(matrices.power, ahead, h0)
    free, _ = boundary_states(matrices.power, jnp.zeros_like(ahead), h0)
    y = jnp.einsum("mfs,fsk->fmk", free, matrices.to_output)
    left = _unless_all(x.shape[0] if length is None else length, x.shape[0])
    h = state_within(transition, B, inputs, before, after, left)
    return _join(y, inputs, x.shape[0]), h


@ft.partial(jax.jit, static_argnames="length")
def depthwise_kernel(
    transition: Transition,
    B: Float[Array, "features 2 state"],
    C: Float[Array, "channels features 2 state"],
    length: int,
) -> Float[Array, "length channels features"]:
    r"""$K_l = \mathrm{Re}(C A^l B)$ for $l = 0, \dots$, length - 1.

    In two levels, $l = ic + j$ with $c \approx \sqrt{\mathrm{length}}$: $K = (C A^{ic})(A^j B)$ is a
    matrix product of two short lists of vectors, where a Vandermonde matrix would hold one power for
    every state and lag.
    """
    size = math.isqrt(length - 1) + 1
    count = -(-length // size)
    ahead, _, power = transition.krylov(B, C, size)
    kernel = jnp.einsum("icfs,jfs->fcij", power.lefts(C, count), ahead)
    return jnp.moveaxis(kernel.reshape(*kernel.shape[:2], -1)[..., :length], -1, 0).swapaxes(1, 2)


@jax.jit
def _convolve(transition, B, C, D, x, h0, length):
    def run(h):
        kernel = depthwise_kernel(transition, B, C, x.shape[0])
        if D is not None:
            kernel = kernel.at[0].add(D)
        u = mended(x)
        free, h = carried_state(transition, B, C, u, h, length)
        return fft_convolution(kernel, u[:, None]) + free, h

    return contained(run, h0, x, None, length, by_feature=True)


@jax.jit
def _chunks(transition, B, C, D, x, h0, length):
    time, features = x.shape
    in_blocks = time >= LONG and features > BLOCK and features % BLOCK == 0
    D = None if D is None else D.T

    def run(h, x, left):
        system = _System(transition, B, C.swapaxes(0, 1), D, h)
        form = _block_by_block if in_blocks else _all_at_once
        y, h = form(system, x, _unless_all(left, x.shape[0]))
        return h, y

    h, y = scan_chunks(run, h0, x, length, SEGMENT)
    return y, h


def _unless_all(left: Left, time: int) -> Left | None:
    whole = isinstance(left, int) and left >= time and time % _chunk_size(time) == 0
    return None if whole else jnp.minimum(left, time)


class _System(NamedTuple):
    """A system and its state for each feature, features first."""

    transition: Transition
    B: Float[Array, "features 2 state"]
    C: Float[Array, "features channels 2 state"]
    D: Float[Array, "features channels"] | None
    h0: Float[Array, "features 2 state"]


def _take(arrays, i, axis=0):
    """Block `i` of the features of each array."""
    take = lambda whole: lax.dynamic_slice_in_dim(whole, i * BLOCK, BLOCK, axis)
    return jax.tree.map(take, arrays)


def _put(arrays, i, blocks, axis=0):
    put = lambda whole, block: lax.dynamic_update_slice_in_dim(whole, block, i * BLOCK, axis)
    return jax.tree.map(put, arrays, blocks)


# Blocks of features are taken from whole arrays and put into them by index. `lax.map` would want
# them as the first axis, and copy input, output and both gradients to and fro.
def _walk(turns, system: _System, x, left):
    def run_block(i, carry):
        y, h = carry
        y_block, h_block = _all_at_once(_take(system, i), _take(x, i, 1), left)
        return _put(y, i, y_block, 2), _put(h, i, h_block)

    y = jnp.zeros_like(x, shape=(x.shape[0], system.C.shape[1], x.shape[1]))
    return lax.fori_loop(0, turns, run_block, (y, jnp.zeros_like(system.h0)))


def _push(_, kept, tangents):
    system, x, left = kept
    walk = lambda system, x: _walk(x.shape[1] // BLOCK, system, x, left)
    return push_through(walk, (system, x), tangents)


def _pull(_, kept, cotangents):
    system, x, left = kept
    d_y, d_h = cotangents

    def run_block(i, carry):
        d_system, d_x = carry
        forward = lambda system, x: _all_at_once(system, x, left)
        _, pull = jax.vjp(forward, _take(system, i), _take(x, i, 1))
        d_block, d_x_block = pull((_take(d_y, i, 2), _take(d_h, i)))
        return _put(d_system, i, d_block), _put(d_x, i, d_x_block, 1)

    zeros = jax.tree.map(jnp.zeros_like, (system, x))
    return *lax.fori_loop(0, x.shape[1] // BLOCK, run_block, zeros), None


_in_blocks = differentiated(
    lambda _, system, x, left: _walk(turns_kept_whole(x.shape[1] // BLOCK), system, x, left),
    lambda _, *arguments: (_in_blocks(_, *arguments), arguments),
    _push,
    _pull,
)


def _block_by_block(system: _System, x, left):
    arrays, structure = jax.tree.flatten((system, x, left))
    return _in_blocks(None, *jax.tree.unflatten(structure, vary_alike(*arrays)))


def _all_at_once(system: _System, x, left):
    """Output, (time, channels, features), and state after the last valid of `left` samples."""
    transition, B, C, D, h0 = system

    def run(h):
        inputs = _split(mended(x))
        skip = None if D is None else D.T
        matrices = Chunk.of(transition, B, C.swapaxes(0, 1), skip, inputs.shape[2])
        ahead = jnp.einsum("fmj,fjs->fms", inputs, matrices.from_input)
        before, after = boundary_states(matrices.power, ahead, h)
        y = jnp.einsum("fmj,fjk->fmk", inputs, matrices.toeplitz)
        y = y + jnp.einsum("mfs,fsk->fmk", before, matrices.to_output)
        h = state_within(transition, B, inputs, before, after, left)
        return _join(y, inputs, x.shape[0]), h

    return contained(run, h0, x, None, left, by_feature=True)


@jax.jit
def _scan(transition: Transition, B, C, D, x, h0, length, resets):
    varying = transition.A.ndim == 4

    def run(h_initial, inputs, left):
        x_chunk, (moving, B_chunk), resets_chunk = inputs
        system = moving if varying else transition

        def advance(before):
            u = mended(x_chunk)
            drive = (B_chunk if varying else B[None]) * u[..., None, None]
            if system.U is None:
                h = recurrence(system.A, drive, before, resets_chunk, transitions=PLANES)
            else:
                h = _step_by_step(system, drive, before, resets_chunk, varying)
            y = jnp.einsum("cfpn,tfpn->tcf", C, h)
            if D is not None:
                y = y + D[None] * u[:, None]
            return y, state_at(h, before, left)

        y, h = contained(advance, h_initial, x_chunk, resets_chunk, left, by_feature=True)
        return h, y

    moving = (transition, B) if varying else (None, None)
    h, y = scan_chunks(run, h0, (x, moving, resets), length, 64)
    return y, h


def _step_by_step(system, drive, h0, resets, varying):
    def step(h, inputs):
        moving, drive_t, reset_t = inputs
        if reset_t is not None:
            h = jnp.where(reset_t, 0, h)
        h = (moving if varying else system)(h) + drive_t
        return h, h

    return lax.scan(step, h0, (system if varying else None, drive, resets))[1]


def _split(x: Float[Array, "time features"]) -> Float[Array, "features chunks chunk"]:
    size = _chunk_size(x.shape[0])
    x = whole_chunks(x, size)
    return jnp.moveaxis(x.reshape(-1, size, x.shape[1]), -1, 0)


def _join(y: Float[Array, "features chunks channels*chunk"], inputs, time: int):
    features, chunks, size = inputs.shape
    y = jnp.transpose(y.reshape(features, chunks, -1, size), (1, 3, 2, 0))
    return y.reshape(chunks * size, -1, features)[:time]
