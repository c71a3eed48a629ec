import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from discretax._ensembles import check_one_member
from discretax._features import check_samples, check_size, described
from discretax._timeseries import known
from discretax._types import Values
from discretax.inspection._layers import mixers_within
from discretax.sequence_mixers import AbstractLTIMixer, AbstractSequenceMixer


class Memory(NamedTuple):
    """How long a mixer remembers, in samples: [`discretax.inspection.memory`][] finds it."""

    time_constants: PyTree[Float[Array, "..."]]
    r"""After how many samples $1/e$ is left; infinite if more is left for ever, or to the end."""
    half_lives: PyTree[Float[Array, "..."]]
    """After how many samples a half is left."""
    kept: PyTree[Float[Array, "lag ..."]] | None
    """How much is left after 0, 1, 2, ... samples; None where a formula says it for any number."""


def memory(mixer: AbstractSequenceMixer, x: Values | None = None, *, start: int = 0) -> Memory:
    r"""How long a mixer remembers: its time constants and half lives, in samples.

    **Of a time-invariant mixer**, without `x`, exactly. Each mode decays by $|\lambda|$ a sample, whether
    it swings or not, with $\lambda$ an eigenvalue of the transition
    ([`discretax.inspection.eigenvalues`][]):

    $$\tau = \frac{-1}{\ln|\lambda|}, \qquad t_{1/2} = \tau \ln 2$$

    **Of any mixer along an input** `x`, which in a mixer such as Mamba decides what is kept. The cache
    behind sample `start` is changed a little, and what becomes of the change is followed: the derivative
    $J_k$ of the cache $k$ samples later with respect to it. For each number of the cache

    $$\mathrm{kept}_k = \sqrt{\textstyle\sum_j (J_k)_{ij}^2}$$

    summed over the numbers $j$ of the same array: if noise of size one were added to that array, so much
    of it would be left at number $i$. Where every number decays by itself, that is the product of the
    $|a_t|$ between. Where a state is a matrix of which keys are erased, it is the length of a row of the
    product of the $(I - \beta_t k_t e_t^T)\,\mathrm{Diag}(\alpha_t)$; the root of the mean square over the
    keys is that product's Frobenius norm, divided by the root of their number. A convolution's window
    keeps all and then nothing.

    !!! example

        ```python
        memory(lru).time_constants  # (state,)
        along = memory(mamba, x)  # x: (time, 64)
        along.kept.state  # (time, state, inner), of a cache with a `window` and a `state`
        along.half_lives.state  # (state, inner)
        ```

    **Arguments:**

    - `mixer`: without `x` a time-invariant one, otherwise any that streams.
    - `x`: what the mixer is given, an array `(time, features)`; in a model, what stands before it makes
        it.
    - `start`: the sample of `x` behind which the state is followed, from 0.

    **Returns:** the numbers: one for each eigenvalue, or, with `x`, in the form of the cache, for each of
    its numbers; None for those that are not floating. Time constants and half lives are then where
    `kept` falls below $1/e$ and $1/2$ for the first time, between two samples as an exponential does.
    NaN where the state is NaN, and for eigenvalues that are.

    **Raises:** `TypeError` for what is no mixer, and an `x` that is no array; `ValueError` for one that is
    not time-invariant, without `x`, for one that cannot stream or keeps nothing, for an ensemble of mixers,
    for an `x` of other features or, where its numbers are known (outside `jax.jit`), that is not finite, and
    for a `start` without `x`, or one that leaves no sample behind it.
    """
    if not isinstance(mixer, AbstractSequenceMixer):
        raise TypeError(
            f"`memory(mixer)` takes a sequence mixer; got {described(mixer)}. Of a model, take "
            "`model.blocks[0].sequence_mixer`."
        )
    call = "memory(mixer)" if x is None else "memory(mixer, x)"
    check_one_member(mixer, f"eqx.filter_vmap(lambda mixer: {call})(mixers)")
    start = check_size("start", start, least=0)
    if x is not None:
        return _along(mixer, _checked(mixer, x, start), start)
    if start:
        raise ValueError(
            f"`start` is a sample of `x`; got start={start} and no `x`. Leave it out, or give the samples: "
            "`memory(mixer, x, start=start)`."
        )
    if not isinstance(mixer, AbstractLTIMixer):
        raise ValueError(
            f"how long a `{type(mixer).__name__}` remembers depends on its input, unlike a "
            "time-invariant mixer's memory; got no `x`. Give the samples that it mixes, (time, "
            f"features) = (time, {mixer.in_features}): `memory(mixer, x)`."
        )
    size = jnp.abs(mixer.discretize().eigenvalues())
    time_constants = jnp.where(size >= 1, jnp.inf, -1 / jnp.log(jnp.minimum(size, 1)))
    return Memory(time_constants, math.log(2) * time_constants, None)


class Along(NamedTuple):
    mixer: AbstractSequenceMixer
    x: Values
    start: Array
    cache: PyTree


def _checked(mixer: AbstractSequenceMixer, x: Any, start: int) -> Values:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(
            f"`x` must be an array, (time, features) = (time, {mixer.in_features}); got {described(x)}. "
            "Of one sequence of a `discretax.Timeseries`, give the valid samples, `x.values[:length]`: "
            "`memory` takes them to be one interval apart."
        )
    x = jnp.asarray(x)
    check_samples(mixer, x, mixer.in_features)
    time = x.shape[0]
    if time < 2:
        raise ValueError(
            f"`x` must have at least two samples, to follow what is kept; got {x.shape}."
        )
    if start > time - 2:
        raise ValueError(
            f"`start` must be a sample of `x` with another behind it, from 0 to {time - 2}; got "
            f"start={start} and {time} samples."
        )
    numbers = known(x)
    if numbers is not None and not (finite := np.isfinite(numbers)).all():
        t, feature = np.argwhere(~finite)[0]
        raise ValueError(
            f"`x` must be finite, since a broken sample breaks the state that is followed; got "
            f"x[{t}, {feature}] = {numbers[t, feature]}. Put a number in its place: "
            "`jnp.where(jnp.isfinite(x), x, 0)`."
        )
    return x


def _along(mixer: AbstractSequenceMixer, x: Values, start: int) -> Memory:
    try:
        cache = mixer.allocate_inference_cache(max_seqlen=x.shape[0])
    except ValueError as error:
        within = mixers_within(mixer)
        raise ValueError(
            f"`memory` follows a state from sample to sample; got `{type(mixer).__name__}`, which keeps "
            f"none. Take {within or 'a mixer that streams'}."
        ) from error
    leaves, structure = jax.tree.flatten(eqx.filter(cache, eqx.is_inexact_array))
    if not any(leaf.size for leaf in leaves):
        raise ValueError(
            f"`{type(mixer).__name__}` keeps nothing of the past; got a cache without numbers."
        )
    along = Along(mixer, x, jnp.asarray(start), cache)
    changes = _bases(along, leaves)
    kept = [size[start:] for size in _sizes(along, changes)]
    until = lambda level: structure.unflatten([_first_below(level, size) for size in kept])
    return Memory(until(math.exp(-1)), until(0.5), structure.unflatten(kept))


def _bases(along: Along, leaves: list[Array]) -> list[Array]:
    """Changes of each array, `(changes, *shape)`, which tell its derivatives apart: one for each number
    along the axes along which numbers act on one another, alike along all others."""
    halves = [_halves(leaf.shape) for leaf in leaves]
    rng = np.random.default_rng(0)
    changes = [jnp.asarray(rng.normal(size=half.shape) * half, float) for half in halves]
    reached = _reached(along, changes, [jnp.asarray(~half) for half in halves])
    return [
        _basis(leaf.shape, _coupled(leaf.shape, known(flags)))
        for leaf, flags in zip(leaves, reached, strict=True)
    ]


def _halves(shape: tuple[int, ...]) -> np.ndarray:
    """Of each axis, halves of its numbers: any two are parted by one of them, either way round."""
    halves = [np.zeros((0, *shape), bool)]
    for axis, bit in _bits(shape):
        place = np.arange(shape[axis]) >> bit & 1 == 1
        half = np.broadcast_to(place.reshape(-1, *(1,) * (len(shape) - axis - 1)), shape)
        halves += [half[None], ~half[None]]
    return np.concatenate(halves)


def _bits(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [
        (axis, bit)
        for axis, size in enumerate(shape)
        for bit in range(max(size - 1, 0).bit_length())
    ]


def _coupled(shape: tuple[int, ...], reached: np.ndarray | None) -> list[int]:
    """The axes of which a change of one half has reached the other; all, where that is not known yet."""
    if reached is None:
        return list(range(len(shape)))
    axes = [axis for axis, _ in _bits(shape) for _ in range(2)]
    return sorted({axis for axis, flag in zip(axes, reached, strict=True) if flag})


def _basis(shape: tuple[int, ...], axes: list[int]) -> Array:
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    number = math.prod(sizes)
    return jnp.asarray(
        np.broadcast_to(np.eye(number).reshape(number, *sizes), (number, *shape)), float
    )


@eqx.filter_jit
def _reached(along, changes, outside):
    """Of each change of an array, whether anything `outside` has ever moved."""
    moves = lambda i, moved: jnp.any((jnp.abs(moved) > 0) & outside[i], tuple(range(1, moved.ndim)))
    return [flags.any(0) for flags in _followed(along, changes, moves)]


@eqx.filter_jit
def _sizes(along, changes):
    """Behind each sample, of all changes of an array together."""
    size = lambda i, moved: jnp.sqrt(jnp.sum(moved**2, axis=0))
    return _followed(along, changes, size)


def _followed(
    along: Along, changes: list[Array], record: Callable[[int, Array], Array]
) -> list[Float[Array, "time ..."]]:
    """`record(i, moved)` of the i-th floating array behind each sample, with `moved` what has become of
    the changes that were made to it behind sample `start`."""
    mixer, x, start, cache = along
    leaves, structure = jax.tree.flatten(eqx.filter(cache, eqx.is_inexact_array))
    ends = np.cumsum([0, *map(len, changes)])
    own = list(itertools.starmap(slice, itertools.pairwise(ends)))
    made = [
        jnp.zeros((ends[-1], *leaf.shape), leaf.dtype).at[rows].set(change.astype(leaf.dtype))
        for leaf, rows, change in zip(leaves, own, changes, strict=True)
    ]
    made = structure.unflatten(made)

    def advance(carry, sample):
        (cache, moved), (t, value) = carry, sample
        floating, rest = eqx.partition(cache, eqx.is_inexact_array)

        def step(floating):
            _, after = mixer.step(value, eqx.combine(floating, rest))
            return eqx.partition(after, eqx.is_inexact_array)

        floating, push, rest = jax.linearize(step, floating, has_aux=True)
        moved = jax.tree.map(lambda a, b: jnp.where(t == start, a, b), made, jax.vmap(push)(moved))
        now = zip(jax.tree.leaves(floating), jax.tree.leaves(moved), own, strict=True)
        recorded = [
            # A broken state is NaN whatever it was before: the derivative, zero, says nothing of it.
            record(i, jnp.where(jnp.isnan(leaf)[None], jnp.nan, m[rows]))
            for i, (leaf, m, rows) in enumerate(now)
        ]
        return (eqx.combine(floating, rest), moved), recorded

    nothing = jax.tree.map(jnp.zeros_like, made)
    return lax.scan(advance, (cache, nothing), (jnp.arange(len(x)), x))[1]


def _first_below(level: float, kept: Float[Array, "lag ..."]) -> Float[Array, "..."]:
    below = ~(kept >= level)  # with NaN, of which the share is NaN
    lag = jnp.argmax(below, axis=0)
    at = lambda lag: jnp.take_along_axis(kept, lag[None], axis=0)[0]
    before, after = at(jnp.maximum(lag - 1, 0)), at(lag)
    share = jnp.log(before / level) / jnp.log(before / after)
    return jnp.where(below.any(0), lag.astype(kept.dtype) - 1 + share, jnp.inf)
