"""How much of what was written at a sample is left at a later one of the same chunk.

A decay is one number per head and sample, or one for each key channel too. Both kinds know the four
products that a chunk is made of. Arrays stand heads first, `(groups, *heads, time, ...)`, without an
axis of heads where each group has one; rows and columns are shared by the heads of a group,
`(groups, time, key)`.
"""

from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from discretax.ops._matrix_state.halves import earlier_and_later, in_one, in_parts, joined
from discretax.ops._scaled import scaled

LEAST = -1000  # exp gives zero for less, infinities included


class ScalarDecay:
    r"""One number per head and sample; $s_i$ is the sum of their logarithms up to sample $i$."""

    def __init__(
        self, log_decay: Float[Array, "groups *heads time"], seen: Bool[Array, "time time"]
    ):
        self._sums, self._sums_before = _sums(log_decay, seen)
        self._seen = seen

    @cached_property
    def _between(self) -> Float[Array, "groups *heads time time"]:
        return self._since_columns(self._sums, self._seen)

    def _since_columns(self, rows: "Sums", seen: Bool[Array, "time time"]) -> Array:
        since = lambda rows, columns: rows[..., :, None] - columns[..., None, :]
        return _exp(jax.tree.map(since, rows, self._sums), seen)

    def scores(self, rows, columns, *, before=False):
        r"""$e^{s_i - s_j} r_i^T c_j$, zero where sample $j$ is not seen from $i$, and on the
        diagonal too if what is read is the state `before` the sample's own decay."""
        seen, between = self._seen, self._between
        if before:
            seen = seen & ~jnp.eye(seen.shape[0], dtype=bool)
            between = self._since_columns(self._sums_before, seen)
        product = jnp.where(seen, rows @ columns.mT, 0)
        return between * product if between.ndim == 3 else scaled(between, product, 1)

    def read(self, rows, state, *, before=False):
        r"""$e^{s_i} S^T r_i$."""
        left = _exp(self._sums_before if before else self._sums)
        return left[..., None] * jnp.einsum("gtk,g...kv->g...tv", rows, state)

    def write(self, columns, values):
        r"""$\sum_j e^{s - s_j} c_j w_j^T$, $s$ the sum over all samples."""
        return jnp.einsum("gtk,g...tv->g...kv", columns, self._between[..., -1, :, None] * values)

    def carry(self, state):
        """The state before the chunk, decayed by all of it."""
        last = jax.tree.map(lambda sums: sums[..., -1], self._sums)
        return _exp(last)[..., None, None] * state


class VectorDecay:
    """One number per head, sample and key channel; the samples are a power of two.

    There is no factor common to rows and columns, and $e^{-s}$ by itself overflows. An earlier half
    of samples and a later one meet at the start of the later one, from which both exponents are
    negative; then the halves of each half do.
    """

    def __init__(
        self, log_decay: Float[Array, "groups *heads time key"], seen: Bool[Array, "time time"]
    ):
        alone = jnp.maximum(log_decay, LEAST)[..., None, :]
        nothing = jnp.zeros_like(alone)
        self._parts = [Within(upto=alone, before=nothing, behind=nothing)]
        while self._parts[-1].upto.shape[-3] > 1:
            self._parts.append(self._parts[-1].joined())
        self._seen = seen

    @property
    def _whole(self) -> "Within":
        return jax.tree.map(lambda sums: sums[..., 0, :, :], self._parts[-1])

    def scores(self, rows, columns, *, before=False):
        seen = self._seen
        if before:
            seen = seen & ~jnp.eye(seen.shape[0], dtype=bool)
        alone = self._each_head((rows * columns).sum(-1))
        scores = jnp.broadcast_to(alone, self._whole.upto.shape[:-1])[..., None, None]
        for within in self._parts[:-1]:
            (_, later), (earlier, _) = (
                earlier_and_later(in_parts(self._each_head(array), within.upto.shape[-3]))
                for array in (rows, columns)
            )
            _, reached = earlier_and_later(within.before if before else within.upto)
            left, _ = earlier_and_later(within.behind)
            across = (later * jnp.exp(reached)) @ (earlier * jnp.exp(left)).mT
            scores = joined(scores, across)
        return jnp.where(seen, scores[..., 0, :, :], 0)

    def read(self, rows, state, *, before=False):
        left = jnp.exp(self._whole.before if before else self._whole.upto)
        return (self._each_head(rows) * left) @ state

    def write(self, columns, values):
        left = jnp.exp(self._whole.behind)
        return jnp.einsum("g...tk,g...tv->g...kv", self._each_head(columns) * left, values)

    def carry(self, state):
        return jnp.exp(self._whole.upto[..., -1, :])[..., None] * state

    def _each_head(self, shared):
        heads = self._whole.upto.ndim == 4
        return shared[:, None] if heads else shared


class Within(NamedTuple):
    """Sums of log decays over the samples of one part: none is a difference, which would round."""

    upto: Float[Array, "*heads parts samples key"]  # each sample
    before: Float[Array, "*heads parts samples key"]
    behind: Float[Array, "*heads parts samples key"]

    def joined(self) -> "Within":
        """For parts twice as long."""
        first, second = earlier_and_later(self.upto[..., -1:, :])

        def further(sums):
            earlier, later = earlier_and_later(sums)
            return in_one(earlier, first + later)

        earlier, later = earlier_and_later(self.behind)
        return Within(further(self.upto), further(self.before), in_one(earlier + second, later))


class Sums(NamedTuple):
    """A difference of large sums has the rounding of the sums. Those of multiples of 1/16 are exact,
    so what is rounded is the rest.
    """

    coarse: Array  # without a derivative: that of rounding is zero, and all of it is the rest's
    rest: Array


def _sums(
    log_decay: Float[Array, "*lead time"], over: Bool[Array, "time time"]
) -> tuple[Sums, Sums]:
    """Over the samples up to each, and over those before it; `over` those of one sequence, so that
    no decay before a reset has a derivative behind it, not even one of rounding.
    """
    log_decay = jnp.maximum(log_decay, LEAST)
    coarse = lax.stop_gradient(jnp.round(16 * log_decay) / 16)
    parts = Sums(coarse, log_decay - coarse)
    add = lambda part: jnp.einsum(
        "...t,it->...i", part, over.astype(part.dtype), precision="highest"
    )
    sums = Sums(*map(add, parts))
    return sums, Sums(*map(jnp.subtract, sums, parts))


def _exp(sums: Sums, where: Bool[Array, "..."] | None = None) -> Array:
    # Masked before the exponential: behind it, the gradient of what overflows would be NaN.
    total = sums.coarse + sums.rest
    return jnp.exp(total if where is None else jnp.where(where, total, -jnp.inf))
