"""How a matrix state runs: a chunk as products of matrices, a sample, and both along time."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from discretax._broken import is_broken
from discretax._features import check_size
from discretax._timeseries import check_length, check_resets, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._matrix_state.decay import ScalarDecay, VectorDecay
from discretax.ops._matrix_state.halves import solve_unit_lower
from discretax.ops._running.chunks import scan_chunks, whole_chunks
from discretax.ops._running.split_time import incoming_state

State = Float[Array, "groups heads key value"]


class Samples(NamedTuple):
    """What reads, writes and erases, in `steps` that follow one another within a sample.

    The decay comes before a sample's first step, and what is read is the state behind its last.
    """

    q: Float[Array, "time groups key"]
    k: Float[Array, "time steps groups key"]
    v: Float[Array, "time steps groups heads value"]
    beta: Float[Array, "time steps groups heads"] | None
    log_decay: Float[Array, "time groups heads *key"]
    erase: Float[Array, "time steps groups key"] | None
    resets: Bool[Array, " time"] | None = None


def matrix_state(
    samples: Samples,
    state: State | None,
    *,
    erase_first: bool = False,
    length: Int[Array, ""] | int | None,
    resets: Bool[Array, " time"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "time groups heads value"], State]:
    r"""$S_t = (I - \beta_t k_t e_t^T) \mathrm{Diag}(\alpha_t) S_{t-1} + \beta_t k_t v_t^T$ and
    $y_t = S_t^T q_t$; with `erase_first`, $e_t$ acts on $S_{t-1}$ itself. Without `erase`, $e = 0$.
    """
    chunk_size = check_size("chunk_size", chunk_size)
    floating = [array for array in samples[:-1] if array is not None]
    dtype = accumulation_dtype(*floating, *([] if state is None else [state]))
    time, _, groups, heads, value = samples.v.shape
    check_length(length, time)
    check_resets(resets, time)
    shape = (groups, heads, samples.q.shape[-1], value)
    start = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    if time == 0:
        return jnp.zeros((0, groups, heads, value), dtype), start
    # Padding becomes a decay of one and writes nothing: the identity on the state.
    samples = jax.tree.map(
        lambda array: zero_padding(array, length), samples._replace(resets=resets)
    )
    per_chunk = max(1, chunk_size // samples.k.shape[1])
    over_time = ft.partial(_over_time, erase_first, per_chunk)

    def summary():
        last = over_time(jnp.zeros_like(start), samples)[0]
        if samples.erase is not None:
            # What the samples make of each unit vector of the key: a matrix for each head.
            nothing = jnp.zeros((*samples.v.shape[:-1], shape[2]), samples.v.dtype)
            unit = jnp.broadcast_to(jnp.eye(shape[2], dtype=dtype), (*shape[:3], shape[2]))
            return over_time(unit, samples._replace(v=nothing))[0], last
        whole = samples.log_decay.astype(dtype)
        if samples.resets is not None:  # which leave nothing to decay
            whole = jnp.where(samples.resets.any(), 0, whole)
        left = jnp.exp(whole.sum(0))
        return left.reshape(*left.shape[:2], -1, 1), last

    multiply = jnp.multiply if samples.erase is None else jnp.matmul
    before = incoming_state(start, summary, samples.resets, multiply)
    last, y = over_time(before, samples)
    return y, last


@ft.partial(jax.jit, static_argnums=(0, 1))
def _over_time(erase_first: bool, per_chunk: int, state: State, samples: Samples):
    advance = _sample if samples.q.shape[0] == 1 else _chunk

    def run(state, samples, _):
        wide = jax.tree.map(
            lambda array: array if array.dtype == bool else array.astype(state.dtype), samples
        )
        return advance(state, wide, erase_first)

    return scan_chunks(run, state, samples, None, per_chunk)


def _sample(state: State, samples: Samples, erase_first: bool) -> tuple[State, Array]:
    """The equation as it stands."""
    q, k, v, beta, log_decay, erase, resets = jax.tree.map(lambda array: array[0], samples)
    if resets is not None:
        state = jnp.where(resets, 0, state)
    alpha = jnp.exp(log_decay).reshape(*state.shape[:2], -1, 1)
    for step in range(k.shape[0]):
        decayed = alpha * state if step == 0 else state
        w = v[step]
        if erase is not None:
            seen = state if erase_first else decayed
            w = w - jnp.einsum("gk,ghkv->ghv", erase[step], seen)
        if beta is not None:
            w = beta[step][..., None] * w
        state = decayed + k[step][:, None, :, None] * w[..., None, :]
    return state, jnp.einsum("gk,ghkv->ghv", q, state)[None]


def _chunk(state: State, samples: Samples, erase_first: bool) -> tuple[State, Array]:
    r"""With $s_i$ the logarithm of the decay up to sample $i$, $w_i$ what is written at $i$ in the
    end, and $S$ the state before the chunk:

    $$w_i + \beta_i \sum_{j < i} e^{s_i - s_j} (e_i^T k_j)\, w_j = \beta_i (v_i - e^{s_i} S^T e_i),
    \qquad y_i = e^{s_i} S^T q_i + \sum_{j \le i} e^{s_i - s_j} (q_i^T k_j)\, w_j$$
    """
    time, steps = samples.k.shape[:2]
    vector = samples.log_decay.ndim == 4
    samples = _one_step_each(samples)
    if vector or samples.erase is not None:  # which go by halves
        samples = whole_chunks(samples, 1 << (samples.q.shape[0] - 1).bit_length())
    resets = samples.resets
    seen = jnp.tri(samples.q.shape[0], dtype=bool)  # does sample i still know of sample j
    if resets is not None:
        sequence = jnp.cumsum(resets)
        seen = seen & (sequence[:, None] == sequence[None])
        samples, state, spoilt = _without_broken(samples, state, seen, sequence == 0)
    # Heads before time: the products then run head by head over adjacent numbers.
    q, k = jnp.moveaxis(samples.q, 0, 1), jnp.moveaxis(samples.k, 0, 1)
    v, log_decay = jnp.moveaxis(samples.v, 0, 2), jnp.moveaxis(samples.log_decay, 0, 2)
    beta = None if samples.beta is None else jnp.moveaxis(samples.beta, 0, 2)[..., None]
    erase = None if samples.erase is None else jnp.moveaxis(samples.erase, 0, 1)
    decay = (VectorDecay if vector else ScalarDecay)(log_decay, seen)

    def read(rows, before=False):
        past = decay.read(rows, state, before=before)
        return past if resets is None else jnp.where(sequence[:, None] == 0, past, 0)

    scaled = lambda array: array if beta is None else beta * array
    w = scaled(v if erase is None else v - read(erase, erase_first))
    if erase is not None:
        erased = jnp.tril(decay.scores(erase, k, before=erase_first), -1)
        w = solve_unit_lower(scaled(erased), w)
    y = read(q) + decay.scores(q, k) @ w
    past = decay.carry(state)
    if resets is not None:
        y = jnp.where(spoilt[..., None], jnp.nan, y)
        past = jnp.where(sequence[-1] == 0, past, 0)
        past = jnp.where(spoilt[..., -1, None, None], jnp.nan, past)
        k = jnp.where(seen[-1][:, None], k, 0)
    state = past + decay.write(k, w)
    return state, jnp.moveaxis(y, 2, 0)[steps - 1 : time * steps : steps]


def _one_step_each(samples: Samples) -> Samples:
    """As if every step were a sample: the first decays, and only the last one's reading counts."""
    steps = samples.k.shape[1]

    def spread(array, before, behind):
        padding = ((0, 0), (before, behind)) + ((0, 0),) * (array.ndim - 1)
        return jnp.pad(array[:, None], padding)

    placed = samples._replace(
        q=spread(samples.q, steps - 1, 0),
        log_decay=spread(samples.log_decay, 0, steps - 1),
        resets=None if samples.resets is None else spread(samples.resets, 0, steps - 1),
    )
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), placed)


def _without_broken(
    samples: Samples, state: State, seen: Bool[Array, "time time"], first: Bool[Array, " time"]
) -> tuple[Samples, State, Bool[Array, "groups heads time"]]:
    """Zero for the samples and states that are not finite, and where they are known of; the `first`
    sequence knows of the state.

    A product with a NaN is NaN in every row, those before it and those behind a reset included.
    """
    broken = jnp.isnan(samples.log_decay)
    broken = broken.any(-1) if samples.log_decay.ndim == 4 else broken
    shared = is_broken((samples.k, samples.erase), 2)
    broken = broken | shared[..., None] | is_broken((samples.v, samples.beta), 3)
    clean = lambda array, where: (
        None
        if array is None
        else jnp.where(where.reshape(*where.shape, *(1,) * (array.ndim - where.ndim)), 0, array)
    )
    samples = samples._replace(
        k=clean(samples.k, shared),
        erase=clean(samples.erase, shared),
        v=clean(samples.v, broken),
        beta=clean(samples.beta, broken),
        log_decay=clean(samples.log_decay, broken),
    )
    known_of = jnp.einsum("ij,jgh->ghi", seen.astype(int), broken.astype(int)) > 0
    lost = is_broken(state, 2)
    state = jnp.where(lost[..., None, None], 0, state)
    return samples, state, known_of | (lost[..., None] & first[None, None])
