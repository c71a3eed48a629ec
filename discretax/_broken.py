"""Samples that are not finite: kept out of the computation, and NaN in what depends on them.

A product with NaN is NaN, even if the other factor is zero: a weight that is none, or the derivative of
a loss that does not look there. So a broken sample enters no product. Zero stands in its place, and NaN
is put into the outputs that depend on it; all others, and their gradients, are what they would be.
"""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from discretax._timeseries import Timeseries, resets_of

Tree = TypeVar("Tree", bound=PyTree)
State = TypeVar("State", bound=PyTree)
Flags = Bool[Array, "..."]


def is_broken(tree: PyTree[Array], lead: int = 0) -> Flags:
    """Where along the first `lead` axes a number is not finite. Whole numbers and flags always are."""
    broken = [
        ~jnp.isfinite(leaf).all(tuple(range(lead, leaf.ndim)))
        for leaf in jax.tree.leaves(tree)
        if eqx.is_inexact_array(leaf)
    ]
    return ft.reduce(operator.or_, broken)


def mended(tree: Tree) -> Tree:
    """Zero in place of what is not finite."""
    mend = lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf))
    return jax.tree.map(lambda leaf: mend(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def spoilt(tree: Tree, broken: Flags) -> Tree:
    """NaN where `broken`, which has the leading axes of each array.

    No gradient comes through: what is made of a NaN may have a derivative of NaN, and that times zero.
    """

    def spoil(leaf):
        flags = jnp.expand_dims(broken, tuple(range(broken.ndim, leaf.ndim)))
        return jnp.where(flags, nan_where(flags, leaf.dtype), leaf)

    return jax.tree.map(lambda leaf: spoil(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def nan_where(broken: Flags, dtype: Any) -> Float[Array, "..."]:
    """NaN where `broken`, and a number elsewhere.

    `jax.debug_nans` reports a constant NaN outside of `jax.jit`, though nothing may be broken.
    """
    return jnp.sqrt(jnp.where(broken, -1.0, 1.0)).astype(dtype)


def sample_by_sample(
    function: Callable[..., Float[Array, "*lead out"]], *samples: Float[Array, "*lead _"]
) -> Float[Array, "*lead out"]:
    """`function(*samples)`, which makes an output of each sample by itself."""
    broken = ft.reduce(operator.or_, (is_broken(each, each.ndim - 1) for each in samples))
    return spoilt(function(*map(mended, samples)), broken)


def each_sample(
    x: Array | Timeseries,
    function: Callable[..., Float[Array, "*lead out"]],
    *samples: Float[Array, "*lead _"],
) -> Float[Array, "*lead out"]:
    """`function(*samples)`, sample by sample where resets part the sequences of `x`.

    There a loss may look at the sequences beside a broken one alone. Elsewhere it costs nothing.
    """
    guarded = resets_of(x) is not None
    return sample_by_sample(function, *samples) if guarded else function(*samples)


def contained(
    run: Callable[[State], tuple[Any, State]],
    state: State,
    samples: Float[Array, "time ..."],
    resets: Bool[Array, " time"] | None = None,
    left: Int[Array, ""] | int | None = None,
    *,
    incoming: Callable[..., Flags] = lambda before, *_: before,
    by_feature: bool = False,
) -> tuple[Any, State]:
    """`outputs, state = run(state)`, a recurrence over `samples`, of which `left` are valid.

    From a broken sample on outputs are NaN, up to the next reset; so is the state if there is none. A
    state that is broken from the start counts like a sample before the first. `run` is given a state
    that is finite, and is to mend the samples where it takes them up: a copy of them need not be kept.

    `incoming(before, broken, resets)` knows of samples that came before the first ones and are not in
    the state. With `by_feature`, each feature is a recurrence of its own: an entry of the second axis
    of samples, of the last of outputs and of the first of the state.
    """
    time = samples.shape[0]
    if time == 0:
        return run(state)
    broken = is_broken(samples, 2 if by_feature else 1)
    index = jnp.arange(time)
    if left is not None and not (isinstance(left, int) and left >= time):
        valid = index < left
        broken &= jnp.expand_dims(valid, tuple(range(1, broken.ndim)))
        resets = None if resets is None else resets & valid
    before = incoming(is_broken(state, 1 if by_feature else 0), broken, resets)
    broken = broken_since_reset(broken, before, resets)
    outputs, state = run(mended(state))

    def spoil(output):
        between = tuple(range(1, output.ndim - 1)) if by_feature else ()
        return spoilt(output, jnp.expand_dims(broken, between))

    return jax.tree.map(spoil, outputs), spoilt(state, broken[-1])


def contained_step(
    run: Callable[[Array, State], tuple[Array, State]],
    sample: Float[Array, " features"],
    state: State,
    *,
    by_feature: bool = False,
) -> tuple[Float[Array, "..."], State]:
    """`contained` for one sample, which `run` is given mended."""
    lead = 1 if by_feature else 0
    broken = is_broken((state, sample), lead)
    output, state = run(mended(sample), mended(state))
    between = tuple(range(output.ndim - 1)) if by_feature else ()
    return spoilt(output, jnp.expand_dims(broken, between)), spoilt(state, broken)


def broken_since_reset(
    broken: Bool[Array, "time ..."], before: Flags, resets: Bool[Array, " time"] | None
) -> Bool[Array, "time ..."]:
    """Whether a sample since the last reset is broken, or, without a reset, what was `before`."""
    time = broken.shape[0]
    index = jnp.arange(time).reshape(time, *(1,) * (broken.ndim - 1))
    before = jnp.expand_dims(before, 0)
    if resets is None:
        return before | (index >= jnp.where(broken, index, time).min(0, keepdims=True))
    # The last of the events decides. Those that break are odd numbers, in the order of time.
    reset = jnp.where(resets.reshape(index.shape), 2 * index, jnp.where(before, -1, -2))
    return lax.cummax(jnp.where(broken, 2 * index + 1, reset)) % 2 == 1
