"""Sequences packed into one row, and the state that each of them leaves."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from discretax._broken import spoilt
from discretax._features import check_size
from discretax._timeseries import known, valid_samples
from discretax._types import Length, Resets, Timesteps, Values
from discretax.ops._running.chunks import scan_chunks
from discretax.sequence_mixers.base import AbstractSequenceMixer, Cache, check_call


def states_at_resets(
    mixer: AbstractSequenceMixer[Cache],
    x: Values,
    resets: Resets,
    cache: Cache | None = None,
    *,
    num_sequences: int | None = None,
    integration_timesteps: Timesteps | None = None,
    length: Length | None = None,
    chunk_size: int = 128,
) -> tuple[Values, Cache]:
    """Mixes several sequences packed into one row, and keeps the cache that each of them leaves.

    They are those of separate runs: each goes on as a stream of its own.

    The row is mixed once, in chunks, and the cache before each chunk is kept. From the one before its
    last chunk, each sequence is then mixed to its end, all of them side by side: of `n` sequences, `n`
    chunks are mixed twice.

    !!! example

        ```python
        resets = jnp.zeros(10, bool).at[jnp.array([0, 3, 7])].set(True)
        y, caches = states_at_resets(mixer, x, resets)  # of samples 0 to 2, 3 to 6, 7 to 9
        next_y, caches = jax.vmap(mixer.step)(next_samples, caches)  # (3, features)
        ```

    **Arguments:**

    - `mixer`: any that streams.
    - `x`, `length`, `integration_timesteps`: as in its call.
    - `resets`: `(time,)`, True where a sequence begins. One begins with the first sample in any case.
    - `cache`: before the first sample, if the first sequence has begun before and sample 0 is no
        reset. Left out, one that holds as many samples as `x` has.
    - `num_sequences`: how many there are, where `resets` is not known, as under `jax.jit`.
    - `chunk_size`: samples in a chunk.

    **Returns:**

    The output, as the mixer's call gives it, and the caches, with a leading axis of `num_sequences`.
    If there are fewer sequences, the last one's cache is repeated.

    **Raises:**

    `ValueError` for what the mixer's call refuses, for more sequences than `num_sequences`, and for a
    number of them that is neither given nor known. Under `jit`, caches are NaN if there are more.
    """
    time, resets = x.shape[0], jnp.asarray(resets)
    if cache is None:
        cache = mixer.allocate_inference_cache(max_seqlen=max(1, time))
    arguments = integration_timesteps, length, resets
    x, cache, timesteps = check_call(mixer, x, cache, cache, *arguments)
    size = _number_of_sequences(num_sequences, resets, length)
    chunk_size = check_size("chunk_size", chunk_size)
    return _run(mixer, x, cache, timesteps, length, resets, size, chunk_size)


def _number_of_sequences(given: int | None, resets: Resets, length: Length | None) -> int:
    begins, end = known(resets), known(len(resets) if length is None else length)
    count = None if begins is None or end is None else 1 + int(np.sum(begins[1 : int(end)]))
    if given is None:
        if count is None:
            raise ValueError(
                "`num_sequences` must be given where `resets` or `length` is not known, as under "
                "`jax.jit`: it is the size of what is returned. With more room than sequences, the "
                "last one is repeated."
            )
        return count
    given = check_size("num_sequences", given)
    if count is not None and count > given:
        raise ValueError(f"`num_sequences` must be at least the {count} in `resets`; got {given}.")
    return given


@eqx.filter_jit
def _run(
    mixer: AbstractSequenceMixer[Cache],
    x: Values,
    cache: Cache,
    timesteps: Timesteps | None,
    length: Length | None,
    resets: Resets,
    size: int,
    chunk_size: int,
) -> tuple[Values, Cache]:
    time = x.shape[0]

    def mix(inputs: PyTree, cache: Cache, left: Any) -> tuple[Values, Cache]:
        x, timesteps, resets = inputs
        options = {"integration_timesteps": timesteps, "length": left, "resets": resets}
        return mixer(x, cache, **options)

    def run(cache, inputs, left):
        y, after = mix(inputs, cache, left)
        return after, (y, jax.tree.map(lambda leaf: leaf[None], cache))

    inputs = x, timesteps, resets
    cache, (y, before) = scan_chunks(run, cache, inputs, length, chunk_size)
    if time == 0:
        return y, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), cache)

    end = time if length is None else jnp.asarray(length).astype(int)
    begins = (resets | (jnp.arange(time) == 0)) & valid_samples(time, end)
    starts = jnp.nonzero(begins, size=size + 1, fill_value=time)[0]
    within = jnp.arange(min(time, chunk_size))

    @jax.vmap
    def at_end(end):
        chunk = jnp.maximum(end - 1, 0) // chunk_size
        samples = jnp.minimum(chunk * chunk_size + within, time - 1)
        inputs_before = jax.tree.map(lambda array: array[samples], inputs)
        cache = jax.tree.map(lambda leaf: leaf[chunk], before)
        return mix(inputs_before, cache, end - chunk * chunk_size)[1]

    too_many = jnp.broadcast_to(begins.sum() > size, (size,))
    return y, spoilt(at_end(jnp.minimum(starts[1:], end)), too_many)
