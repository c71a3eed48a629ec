"""What attention keeps of the samples before."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._counts import count_after


class AttentionCache(NamedTuple):
    """Rotated keys and values of the current sequence, each where its position modulo the number
    of slots puts it, which of them are of broken samples, and how many samples of the sequence have
    been seen, in two ways without end.

    `position` is counted anew from a multiple of the slots once all are full; `clock` runs on, and
    where its integers end, over to the negative ones."""

    keys: Float[Array, "slots heads head"]
    values: Float[Array, "slots heads head"]
    broken: Bool[Array, " slots"]
    position: Int[Array, ""]
    clock: Int[Array, ""]


def latest(position: Int[Array, ""], slots: int) -> Int[Array, " slots"]:
    """The position of the last of `position` samples that went to each slot; negative for none."""
    slot = jnp.arange(slots)
    return position - 1 - (position - 1 - slot) % slots


def past(cache: AttentionCache) -> tuple[Array, ...]:
    """What is cached, its positions and its sequence."""
    slots = cache.broken.shape[0]
    return *cache[:3], latest(cache.position, slots), jnp.zeros(slots, int)


def moved(
    cache: AttentionCache,
    samples: tuple[Array, Array, Array],
    positions: Int[Array, " time"],
    clocks: Int[Array, " time"],
    left: Int[Array, ""] | int,
    emptied: bool,
) -> AttentionCache:
    """The cache after the first `left` of the samples, some of which may have `emptied` it."""
    time, slots = positions.shape[0], cache.keys.shape[0]
    last = jnp.minimum(left, time) - 1
    position = count_after(cache.position, positions, left)
    clock = count_after(cache.clock, clocks, left)
    wanted = latest(position, slots)
    source = last - (position - 1 - wanted)  # the sample's index, negative if it came before

    def move(old, new):
        new = new[jnp.clip(source, 0, time - 1)].astype(old.dtype)
        each = lambda slot: slot.reshape(slots, *(1,) * (old.ndim - 1))
        now = jnp.where(each(source >= 0), new, old)
        return jnp.where(each(wanted >= 0), now, jnp.zeros_like(old)) if emptied else now

    keys, values, broken = map(move, cache[:3], samples)
    return AttentionCache(keys, values, broken, position, clock)


def moved_by_one(cache, samples, left):
    """`moved` where one slot changes at most."""
    slot = cache.position % cache.keys.shape[0]
    is_valid = jnp.asarray(left) > 0

    def move(old, new):
        new = jnp.where(is_valid, new.astype(old.dtype), lax.dynamic_slice_in_dim(old, slot, 1))
        return lax.dynamic_update_slice_in_dim(old, new, slot, axis=0)

    seen = is_valid.astype(int)
    keys, values, broken = map(move, cache[:3], samples)
    return AttentionCache(keys, values, broken, cache.position + seen, cache.clock + seen)
