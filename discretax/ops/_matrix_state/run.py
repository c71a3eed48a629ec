"""How a matrix state runs: a chunk as products of matrices, a sample, and both along time."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._broken import is_broken, nan_where
from discretax._features import check_size
from discretax._timeseries import check_length, check_resets, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._matrix_state.decay import ScalarDecay, VectorDecay
from discretax.ops._matrix_state.halves import solve_unit_lower
from discretax.ops._running.chunks import scan_chunks_in_place, whole_chunks
from discretax.ops._running.split_time import incoming_state

State = Float[Array, "heads key value"]


class Samples(NamedTuple):
    """What reads, writes and erases, as the operations take it; without `erase` of its own, the key
    erases, if anything does.

    Several `steps` follow one another within a sample: the decay comes before the first, and what is
    read is the state behind the last.
    """

    q: Float[Array, "time groups key"]
    k: Float[Array, "time *steps groups key"]
    v: Float[Array, "time *steps heads value"]
    beta: Float[Array, "time *steps heads"] | None
    log_decay: Float[Array, "time heads *key"] | Float[Array, " heads"]
    erase: Float[Array, "time *steps groups key"] | None
    resets: Bool[Array, " time"] | None = None


class Rule(NamedTuple):
    erases: bool
    erase_first: bool  # of the state before the decay
    counted: bool
    value_first: bool  # how the state stands, heads in front


def matrix_state(
    samples: Samples,
    state: State | None,
    *,
    erases: bool = False,
    erase_first: bool = False,
    counted: bool = False,
    value_first: bool = False,
    scale: float = 1.0,
    length: Int[Array, ""] | int | None,
    resets: Bool[Array, " time"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "time heads value"], State]:
    r"""$S_t = (I - \beta_t k_t e_t^T) \mathrm{Diag}(\alpha_t) S_{t-1} + \beta_t k_t v_t^T$ and
    $y_t = c\, S_t^T q_t$; with `erase_first`, $e_t$ acts on $S_{t-1}$ itself. $e = 0$ unless it `erases`.
    Where it is `counted` what is written, values have one more column, all ones. With `value_first`,
    for a decay of one number per head, what is given and returned is $S^T$.
    """
    chunk_size = check_size("chunk_size", chunk_size)
    floating = [array for array in samples[:-1] if array is not None]
    dtype = accumulation_dtype(*floating, *([] if state is None else [state]))
    time, key = samples.q.shape[0], samples.q.shape[-1]
    heads, value = samples.v.shape[-2], samples.v.shape[-1] + counted
    check_length(length, time)
    check_resets(resets, time)
    shape = (heads, value, key) if value_first else (heads, key, value)
    start = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    if time == 0:
        return jnp.zeros((0, heads, value), dtype), start
    if resets is not None:
        samples = samples._replace(resets=zero_padding(resets, length))
    steps = samples.k.shape[1] if samples.k.ndim == 4 else 1
    rule = Rule(erases, erase_first, counted, value_first)
    over_time = ft.partial(
        _over_time, rule, max(1, chunk_size // steps), jnp.asarray(scale, dtype), length
    )

    def summary():
        last = over_time(jnp.zeros_like(start), samples)[0]
        if erases:
            # What the samples make of each unit vector of the key: a matrix for each head.
            nothing = jnp.zeros((*samples.v.shape[:-1], key), samples.v.dtype)
            unit = jnp.broadcast_to(jnp.eye(key, dtype=dtype), (heads, key, key))
            return over_time(unit, samples._replace(v=nothing))[0], last
        whole = zero_padding(_each_sample(samples.log_decay, time), length).astype(dtype)
        if samples.resets is not None:  # which leave nothing to decay
            whole = jnp.where(samples.resets.any(), 0, whole)
        return jnp.exp(whole.sum(0)).reshape(heads, -1, 1), last

    multiply = jnp.matmul if erases else jnp.multiply
    before = incoming_state(start, summary, samples.resets, multiply)
    last, y = over_time(before, samples)
    return y, last


@ft.partial(jax.jit, static_argnums=(0, 1))
def _over_time(
    rule: Rule,
    per_chunk: int,
    scale: Float[Array, ""],
    length: Int[Array, ""] | int | None,
    state: State,
    samples: Samples,
):
    is_one = samples.q.shape[0] == 1
    advance = _sample if is_one else _chunk
    turned = lambda state: state.mT if rule.value_first and not is_one else state
    # A weight of all chunks, so that its gradient is not as long as the sequence.
    constant = samples.log_decay if samples.log_decay.ndim == 1 else None
    samples = samples if constant is None else samples._replace(log_decay=None)

    def run(weights, state, samples, left):
        scale, constant = weights
        if constant is not None:
            samples = samples._replace(log_decay=_each_sample(constant, samples.q.shape[0]))
        if not isinstance(left, int) or left < samples.q.shape[0]:
            # Padding becomes a decay of one and writes nothing: the identity on the state.
            samples = jax.tree.map(lambda array: zero_padding(array, left), samples)
        wide = jax.tree.map(
            lambda array: array if array.dtype == bool else array.astype(state.dtype), samples
        )
        v = jnp.pad(wide.v, [(0, 0), (0, 0), (0, 1)], constant_values=1) if rule.counted else wide.v
        return advance(rule, state, wide._replace(q=scale * wide.q, v=v))

    after, y = scan_chunks_in_place(
        run, (scale, constant), turned(state), samples, length, per_chunk
    )
    return turned(after), y


def _each_sample(log_decay: Array, time: int) -> Float[Array, "time heads *key"]:
    constant = log_decay.ndim == 1
    return jnp.broadcast_to(log_decay, (time, *log_decay.shape)) if constant else log_decay


def _sample(rule: Rule, state: State, samples: Samples) -> tuple[State, Array]:
    """The equation as it stands."""
    heads, groups = state.shape[0], samples.q.shape[1]
    q, log_decay, resets = samples.q[0], samples.log_decay[0], samples.resets
    erase = samples.k if samples.erase is None else samples.erase
    in_steps = lambda array: array[0] if samples.k.ndim == 4 else array
    k, v, beta, erase = jax.tree.map(in_steps, (samples.k, samples.v, samples.beta, erase))
    by_group = lambda array: array.reshape(groups, heads // groups, *array.shape[1:])
    order = "vk" if rule.value_first else "kv"
    before = by_group(state)
    if resets is not None:
        before = jnp.where(resets[0], 0, before)

    def read(rows, state):
        # Repeated for each head: for a product with rows that heads share, XLA copies the states
        # into another order.
        rows = jnp.broadcast_to(rows[:, None], (*state.shape[:2], rows.shape[-1]))
        return jnp.einsum(f"ghk,gh{order}->ghv", rows, state)

    alpha = jnp.exp(log_decay).reshape(groups, heads // groups, -1, 1)
    after = alpha * before
    for step in range(k.shape[0]):
        w = by_group(v[step])
        if rule.erases:
            w = w - read(erase[step], before if step == 0 and rule.erase_first else after)
        if beta is not None:
            w = by_group(beta[step])[..., None] * w
        written = w[..., None] * k[step][:, None, None]
        after = after + (written if rule.value_first else written.mT)
    return after.reshape(state.shape), read(q, after).reshape(1, heads, -1)


def _chunk(rule: Rule, state: State, samples: Samples) -> tuple[State, Array]:
    r"""With $s_i$ the logarithm of the decay up to sample $i$, $w_i$ what is written at $i$ in the
    end, and $S$ the state before the chunk:

    $$w_i + \beta_i \sum_{j < i} e^{s_i - s_j} (e_i^T k_j)\, w_j = \beta_i (v_i - e^{s_i} S^T e_i),
    \qquad y_i = e^{s_i} S^T q_i + \sum_{j \le i} e^{s_i - s_j} (q_i^T k_j)\, w_j$$
    """
    (heads, _, value), (time, groups, _) = state.shape, samples.q.shape
    steps = samples.k.shape[1] if samples.k.ndim == 4 else 1
    samples = _one_step_each(samples) if samples.k.ndim == 4 else samples
    vector = samples.log_decay.ndim == 3
    if vector or rule.erases:  # which go by halves
        samples = whole_chunks(samples, 1 << (samples.q.shape[0] - 1).bit_length())
    resets = samples.resets
    seen = jnp.tri(samples.q.shape[0], dtype=bool)  # does sample i still know of sample j
    if resets is not None:
        sequence = jnp.cumsum(resets)
        seen = seen & (sequence[:, None] == sequence[None])
        samples, state, spoilt = _without_broken(samples, state, seen, sequence == 0)
    heads_first = ft.partial(_heads_first, groups=groups)
    q, k, v, log_decay = map(heads_first, (samples.q, samples.k, samples.v, samples.log_decay))
    erase = k if samples.erase is None else heads_first(samples.erase)
    state = _by_group(state, groups)
    decay = (VectorDecay if vector else ScalarDecay)(log_decay, seen)

    def read(rows, before=False):
        past = decay.read(rows, state, before=before)
        return past if resets is None else jnp.where(sequence[:, None] == 0, past, 0)

    def scaled(array):
        return array if samples.beta is None else heads_first(samples.beta)[..., None] * array

    w = scaled(v - read(erase, rule.erase_first) if rule.erases else v)
    if rule.erases:
        erased = jnp.tril(decay.scores(erase, k, before=rule.erase_first), -1)
        w = solve_unit_lower(scaled(erased), w)
    y = read(q) + decay.scores(q, k) @ w
    past = decay.carry(state)
    if resets is not None:
        spoilt = _by_group(spoilt, groups)[..., None]
        y = jnp.where(spoilt, nan_where(spoilt, y.dtype), y)
        past = jnp.where(sequence[-1] == 0, past, 0)
        last = spoilt[..., -1:, :]
        past = jnp.where(last, nan_where(last, past.dtype), past)
        k = jnp.where(seen[-1][:, None], k, 0)
    state = past + decay.write(k, w)
    y = jnp.moveaxis(y.reshape(heads, -1, value), 0, 1)
    return state.reshape(heads, -1, value), y[steps - 1 : time * steps : steps]


def _by_group(array: Float[Array, "heads ..."], groups: int) -> Float[Array, "groups ..."]:
    """The heads that share a key together, in an axis of their own if there are several."""
    heads = array.shape[0]
    return array if heads == groups else array.reshape(groups, heads // groups, *array.shape[1:])


def _heads_first(array: Float[Array, "time heads ..."], groups: int) -> Float[Array, "groups ..."]:
    """The products then run head by head over adjacent numbers."""
    # XLA would merge this with a transposition that a product asks for, and on CPU copy number by
    # number, which takes longer than the product.
    return lax.optimization_barrier(_by_group(jnp.moveaxis(array, 0, 1), groups))


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
) -> tuple[Samples, State, Bool[Array, "heads time"]]:
    """Zero for the samples and states that are not finite, and where they are known of; the `first`
    sequence knows of the state.

    A product with a NaN is NaN in every row, those before it and those behind a reset included.
    """
    broken = jnp.isnan(samples.log_decay)
    broken = broken.any(-1) if samples.log_decay.ndim == 3 else broken
    shared = is_broken((samples.k, samples.erase), 2)
    each_head = state.shape[0] // shared.shape[1]
    broken = broken | jnp.repeat(shared, each_head, 1) | is_broken((samples.v, samples.beta), 2)
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
    known_of = jnp.einsum("ij,jh->hi", seen.astype(int), broken.astype(int)) > 0
    lost = is_broken(state, 1)
    state = jnp.where(lost[..., None, None], 0, state)
    return samples, state, known_of | (lost[..., None] & first[None])
