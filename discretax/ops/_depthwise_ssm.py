"""One small state space system per feature: its scan, its chunks of matrices, its convolution."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from discretax.ops._chunks import Left, scan_chunks, state_at
from discretax.ops._convolution import fft_convolution
from discretax.ops._linear_recurrence import recurrence
from discretax.ops._recurrence_xla import times
from discretax.ops._sequence_parallel import incoming_state, time_parts
from discretax.ops._transition import DensePower, DiagonalPower, Transition, flat, power_of, unflat

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
        None takes chunks beyond 16 samples.

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
        kernel = depthwise_kernel(transition, B, C, x.shape[0])
        if D is not None:
            kernel = kernel.at[0].add(D)
        free, h = carried_state(transition, B, C, x, h0, length)
        return fft_convolution(kernel, x[:, None]) + free, h
    if x.shape[0] >= LONG and x.shape[1] > BLOCK and x.shape[1] % BLOCK == 0:
        return _block_by_block(transition, B, C, D, x, h0, length)
    return _chunks(transition, B, C, D, x, h0, length)


# What is fastest on CPU, from 256 features of 32 complex states; both ways on both sides of each
# number of samples: "choices" in docs/performance.md.
STEPS = 16  # up to so many, one by one: too few to pay for the matrices
CHUNK, LARGE_CHUNK = 32, 64
LARGE_BEYOND = 4096  # up to so many, small chunks
# From so many on, 16 features after the other, so that what they need stays in the cache, and each
# block's forward pass again in the backward pass. Segments bound the memory of very long sequences.
LONG = 2048
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
        return carried_state(transition, B, C, x, h, length)[1]

    def summary():
        one = jnp.zeros_like(h0).at[:, 0].set(1)
        return last_state(one, jnp.zeros_like(x)), last_state(jnp.zeros_like(h0), x)

    return incoming_state(h0, summary, resets, times)


def carried_state(
    transition: Transition, B: Array, C: Array, x: Array, h0: Array, length: Left | None
) -> tuple[Float[Array, "time channels features"], Float[Array, "features 2 state"]]:
    """What a convolution leaves out: the output that `h0` alone brings forth, and the last state."""
    matrices = _Chunk.of(transition, B, C, None, _chunk_size(x.shape[0]))
    inputs = _split(x, matrices)
    ahead = jnp.einsum("fmj,fjs->fms", inputs, matrices.from_input)
    before, after = _boundary_states(matrices.power, ahead, h0)
    free, _ = _boundary_states(matrices.power, jnp.zeros_like(ahead), h0)
    y = jnp.einsum("mfs,fsk->fmk", free, matrices.to_output)
    left = x.shape[0] if length is None else length
    h = _state_within(transition, B, x, before, after, left, inputs.shape[2])
    return _join(y, x.shape[0], matrices), h


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
    size = 1 << ((length - 1).bit_length() + 1) // 2
    count = 1 << (-(-length // size) - 1).bit_length()
    ahead, _, power = power_of(transition).krylov(flat(B), flat(C), size)
    _, back, _ = power.krylov(flat(B), flat(C), count)
    kernel = jnp.einsum("icfs,jfs->fcij", back, ahead)
    return jnp.moveaxis(kernel.reshape(*kernel.shape[:2], -1)[..., :length], -1, 0).swapaxes(1, 2)


class _Chunk(NamedTuple):
    """One chunk of samples as matrices, for every feature."""

    toeplitz: Float[Array, "features chunk channels*chunk"]
    from_input: Float[Array, "features chunk flat"]
    to_output: Float[Array, "features flat channels*chunk"]
    power: DiagonalPower | DensePower

    @classmethod
    def of(cls, transition: Transition, B: Array, C: Array, D: Array | None, size: int) -> "_Chunk":
        one = power_of(transition)
        ahead, back, power = one.krylov(flat(B), one.pull(flat(C)), size)
        kernel = jnp.einsum("cfs,jfs->fcj", flat(C), ahead)
        if D is not None:
            kernel = kernel.at[..., 0].add(D.T)
        features = kernel.shape[0]
        return cls(
            _toeplitz(kernel).swapaxes(1, 2).reshape(features, size, -1),
            jnp.moveaxis(ahead[::-1], 0, 1),
            jnp.transpose(back, (2, 3, 1, 0)).reshape(features, ahead.shape[-1], -1),
            power,
        )


def _toeplitz(kernel: Float[Array, "*lead size"]) -> Float[Array, "*lead size size"]:
    """`T[i, j] = kernel[j - i]`, zero below the diagonal.

    The kernel and as many zeros, over and over, in rows of one less: each row begins one later.
    A gather would be plainer, but its derivative is a scatter, which is slow on CPU.
    """
    size = kernel.shape[-1]
    lead = kernel.shape[:-1]
    period = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=-1)
    rows = jnp.broadcast_to(period[..., None, :], (*lead, size, 2 * size)).reshape(*lead, -1)
    return rows[..., : size * (2 * size - 1)].reshape(*lead, size, -1)[..., :size]


def _block_by_block(transition, B, C, D, x, h0, length):
    def split(values, axis):
        blocks = values.reshape(*values.shape[:axis], -1, BLOCK, *values.shape[axis + 1 :])
        return jnp.moveaxis(blocks, axis, 0)

    transition, B, h0 = jax.tree.map(lambda values: split(values, 0), (transition, B, h0))

    @jax.checkpoint
    def run(block):
        transition, B, C, D, x, h0 = block
        return _chunks(transition, B, C, D, x, h0, length)

    D = None if D is None else split(D, 1)
    y, h = lax.map(run, (transition, B, split(C, 1), D, split(x, 1), h0))
    return jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], -1), h.reshape(-1, *h.shape[2:])


def _chunks(transition, B, C, D, x, h0, length):
    matrices = _Chunk.of(transition, B, C, D, _chunk_size(x.shape[0]))

    def run(h, x_segment, left):
        y, h = _in_chunks(matrices, transition, B, x_segment, h, left)
        return h, y

    h, y = scan_chunks(run, h0, x, length, SEGMENT)
    return y, h


def _in_chunks(matrices: _Chunk, transition, B, x, h0, left):
    inputs = _split(x, matrices)
    size = matrices.from_input.shape[-1]
    both = jnp.concatenate([matrices.from_input, matrices.toeplitz], axis=-1)
    products = jnp.einsum("fmj,fjk->fmk", inputs, both)
    before, after = _boundary_states(matrices.power, products[..., :size], h0)
    y = products[..., size:] + jnp.einsum("mfs,fsk->fmk", before, matrices.to_output)
    h = _state_within(transition, B, x, before, after, left, inputs.shape[2])
    return _join(y, x.shape[0], matrices), h


def _boundary_states(
    power: DiagonalPower | DensePower, inputs: Float[Array, "features chunks flat"], h0
):
    """The states before each chunk, (chunks, features, flat), and the one after the last."""
    inputs = jnp.moveaxis(inputs, 1, 0)
    if isinstance(power, DiagonalPower):
        after = recurrence(power.planes, unflat(inputs), h0, None, planes=True)
        return flat(jnp.concatenate([h0[None], after[:-1]])), flat(after[-1])

    def move(h, v):
        return power(h) + v, h

    after, before = lax.scan(move, flat(h0), inputs)
    return before, after


def _state_within(transition, B, x, before, after, left, size):
    """The state after the last valid of `left` samples: from the boundary before it, by steps."""
    time = x.shape[0]
    padding = -time % size
    if isinstance(left, int) and left >= time and padding == 0:
        return unflat(after)
    states = jnp.concatenate([before, after[None]])
    left = jnp.minimum(left, time)
    chunk = left // size
    rest = jnp.pad(x, ((0, padding + size), (0, 0)))
    rest = lax.dynamic_slice_in_dim(rest, chunk * size, size)

    def step(h, inputs):
        x_t, valid = inputs
        return jnp.where(valid, transition(h) + B * x_t[:, None, None], h), None

    valid = jnp.arange(size) < left - chunk * size
    return lax.scan(step, unflat(states[chunk]), (rest, valid))[0]


def _scan(transition: Transition, B, C, D, x, h0, length, resets):
    varying = transition.A.ndim == 4

    def run(h_initial, inputs, left):
        x_chunk, (moving, B_chunk), resets_chunk = inputs
        system = moving if varying else transition
        drive = (B_chunk if varying else B) * x_chunk[..., None, None]
        if system.U is None:
            h = recurrence(system.A, drive, h_initial, resets_chunk, planes=True)
        else:
            h = _step_by_step(system, drive, h_initial, resets_chunk, varying)
        y = jnp.einsum("cfpn,tfpn->tcf", C, h)
        if D is not None:
            y = y + D * x_chunk[:, None]
        return state_at(h, h_initial, left), y

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


def _split(
    x: Float[Array, "time features"], matrices: _Chunk
) -> Float[Array, "features chunks chunk"]:
    size = matrices.from_input.shape[1]
    x = jnp.pad(x, ((0, -x.shape[0] % size), (0, 0)))
    return jnp.moveaxis(x.reshape(-1, size, x.shape[1]), -1, 0)


def _join(y: Float[Array, "features chunks channels*chunk"], time: int, matrices: _Chunk):
    features, chunks, _ = y.shape
    y = y.reshape(features, chunks, -1, matrices.from_input.shape[1])
    y = jnp.transpose(y, (1, 3, 2, 0))
    return y.reshape(-1, *y.shape[2:])[:time]
