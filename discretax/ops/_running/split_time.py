"""Time split over devices: what a device needs to know of the samples before its own.

Within [`split_time`][discretax.ops._running.split_time.split_time] each device holds one part of the
samples, the parts in order. An operation that carries something along time asks for what comes in
from the parts before; outside, it is given back what it has. What is sent are states and the few
rows that a short convolution sees, whatever the number of samples.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from discretax._broken import broken_since_reset, mended, spoilt


@dataclasses.dataclass
class Split:
    axis_name: str
    index: Int[Array, ""]  # of this device's part
    parts: int
    handed_over: int = 0  # arrays of the cache that operations have asked for


_split: contextvars.ContextVar[Split | None] = contextvars.ContextVar("split", default=None)


@contextlib.contextmanager
def split_time(axis_name: str, index: Int[Array, ""], parts: int) -> Iterator[Split]:
    """For what is traced inside, time is split over the `parts` devices of `axis_name`.

    The axis is that of a `jax.shard_map`. Lengths and resets are those of the device's own samples.
    """
    split = Split(axis_name, index, parts)
    token = _split.set(split)
    try:
        yield split
    finally:
        _split.reset(token)


def time_parts() -> int:
    split = _split.get()
    return 1 if split is None else split.parts


def has_past() -> Bool[Array, ""] | bool:
    """Are there samples on devices before this one?"""
    split = _split.get()
    if split is None:
        return False
    split.handed_over += 1
    return split.index > 0


def incoming_state(
    h0: Num[Array, "*state"],
    summary: Callable[[], tuple[Num[Array, "*decay"], Num[Array, "*state"]]],
    resets: Bool[Array, " time"] | None,
    multiply: Callable[[Array, Array], Array] = jnp.multiply,
    add: Callable[[Array, Array], Array] = jnp.add,
) -> Num[Array, "*state"]:
    r"""The state before the device's samples, `h0` being the one before the whole sequence.

    Over the samples of a part, $h \mapsto p \odot h + q$: the `summary` is $p$, by what a state is
    multiplied, and $q$, to where zero is led. All devices gather all summaries, and each goes
    through those before its own. Behind a reset in the part, $q$ is all there is. `multiply` and `add`
    stand for the product and the sum where these are others.
    """
    split = _split.get()
    if split is None:
        return h0
    split.handed_over += 1
    cut = jnp.zeros((), bool) if resets is None else resets.any()

    def advance(h, part):
        *terms, cut = part
        through = lambda h, decay, last: jnp.where(cut, last, add(multiply(decay, h), last))
        # Computed of what is finite: the derivative of a NaN is one, also where nothing depends on it.
        broken = ~jnp.isfinite(through(h, *terms))
        return spoilt(through(*mended((h, *terms))), broken), h

    _, before = lax.scan(advance, h0, lax.all_gather((*summary(), cut), split.axis_name))
    return before[split.index]


def incoming_broken(
    before: Bool[Array, "..."], broken: Bool[Array, "time ..."], resets: Bool[Array, " time"] | None
) -> Bool[Array, "..."]:
    """Whether a sample before the device's own, and behind the last reset, is broken."""
    split = _split.get()
    if split is None:
        return before
    cut = jnp.zeros((), bool) if resets is None else resets.any()
    here = broken_since_reset(broken, jnp.zeros_like(before), resets)[-1]

    def advance(so_far, part):
        here, cut = part
        return here | (so_far & ~cut), so_far

    _, before = lax.scan(advance, before, lax.all_gather((here, cut), split.axis_name))
    return before[split.index]


def incoming_window(
    window: Float[Array, "past features"],
    after: Callable[[], Float[Array, "past features"]],
    time: int,
) -> Float[Array, "past features"]:
    """The samples before the device's own; `window` are those before the whole sequence, and `after`
    gives what the device's `time` samples leave for the next one."""
    split = _split.get()
    if split is None:
        return window
    split.handed_over += 1
    past = window.shape[0]
    if time < past:
        raise ValueError(
            f"a convolution that sees {past} samples before its own takes at least so many on each "
            f"device; got {time}. Split the time over fewer devices."
        )
    following = [(part, part + 1) for part in range(split.parts - 1)]
    return jnp.where(split.index == 0, window, lax.ppermute(after(), split.axis_name, following))
