"""How much of what was written at a sample is left at a later one of the same chunk.

A decay is one number per head and sample, or one for each key channel too. Both kinds know the four
products that a chunk is made of. Arrays stand heads first, `(groups, heads, time, ...)`; rows and
columns are shared by the heads of a group, `(groups, time, key)`.
"""

from functools import cached_property

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from discretax.ops._matrix_state.halves import joined, two_halves
from discretax.ops._scaled import scaled

LEAST = -1000  # exp gives zero for less, infinities included


class ScalarDecay:
    r"""One number per head and sample; $s_i$ is the sum of their logarithms up to sample $i$."""

    def __init__(
        self, log_decay: Float[Array, "groups heads time"], seen: Bool[Array, "time time"]
    ):
        self._sums, self._sums_before = _sums(log_decay, seen, axis=-1)
        self._seen = seen

    @cached_property
    def _between(self) -> Float[Array, "groups heads time time"]:
        return _exp(self._sums[..., :, None] - self._sums[..., None, :], self._seen)

    def scores(self, rows, columns, *, before=False):
        r"""$e^{s_i - s_j} r_i^T c_j$, zero where sample $j$ is not seen from $i$, and on the
        diagonal too if what is read is the state `before` the sample's own decay."""
        seen, between = self._seen, self._between
        if before:
            seen = seen & ~jnp.eye(seen.shape[0], dtype=bool)
            between = _exp(self._sums_before[..., :, None] - self._sums[..., None, :], seen)
        return scaled(between, jnp.where(seen, rows @ columns.mT, 0), 1)

    def read(self, rows, state, *, before=False):
        r"""$e^{s_i} S^T r_i$."""
        left = _exp(self._sums_before if before else self._sums)
        return left[..., None] * jnp.einsum("gtk,ghkv->ghtv", rows, state)

    def write(self, columns, values):
        r"""$\sum_j e^{s - s_j} c_j w_j^T$, $s$ the sum over all samples."""
        return jnp.einsum("gtk,ghtv->ghkv", columns, self._between[..., -1, :, None] * values)

    def carry(self, state):
        """The state before the chunk, decayed by all of it."""
        return _exp(self._sums[..., -1])[..., None, None] * state


class VectorDecay:
    """One number per head, sample and key channel; the samples are a power of two.

    There is no factor common to rows and columns, and $e^{-s}$ by itself overflows. An earlier half
    of samples and a later one meet at the start of the later one, from which both exponents are
    negative; then the halves of each half do.
    """

    def __init__(
        self, log_decay: Float[Array, "groups heads time key"], seen: Bool[Array, "time time"]
    ):
        # Over all samples, so that what is left from one to a later one never exceeds one.
        everything = jnp.tri(log_decay.shape[-2], dtype=bool)
        self._sums, self._sums_before = _sums(log_decay, everything, axis=-2)
        self._seen = seen

    def scores(self, rows, columns, *, before=False):
        seen = self._seen
        if before:
            seen = seen & ~jnp.eye(seen.shape[0], dtype=bool)
        rows, columns = rows[:, None], columns[:, None]
        alone = (rows * columns).sum(-1)[..., None, None]
        scores = jnp.broadcast_to(alone, (*self._sums.shape[1:-1], 1, 1))
        half = 1
        while half < seen.shape[0]:
            ends, _ = two_halves(self._sums, half)
            _, starts = two_halves(self._sums_before, half)
            _, reached = two_halves(self._sums_before if before else self._sums, half)
            start = starts[..., :1, :]
            (earlier, _), (_, later) = two_halves(columns, half), two_halves(rows, half)
            across = (later * _exp(reached - start)) @ (earlier * _exp(start - ends)).mT
            scores = joined(scores, across)
            half *= 2
        return jnp.where(seen, scores[..., 0, :, :], 0)

    def read(self, rows, state, *, before=False):
        return (rows[:, None] * _exp(self._sums_before if before else self._sums)) @ state

    def write(self, columns, values):
        left = _exp(self._sums[..., -1:, :] - self._sums)
        return jnp.einsum("ghtk,ghtv->ghkv", columns[:, None] * left, values)

    def carry(self, state):
        return _exp(self._sums[..., -1, :])[..., None] * state


def _sums(log_decay: Array, over: Bool[Array, "time time"], axis: int) -> tuple[Array, Array]:
    """Over the samples up to each, and over those before it, each in two parts.

    Those of a scalar decay are `over` the samples of one sequence: then no decay before a reset has a
    derivative behind it, not even one of rounding.

    A difference of large sums has the rounding of the sums. Those of multiples of 1/16 are exact, so
    what is rounded is the rest. (The derivative of rounding is zero: all of it is the rest's.)
    """
    log_decay = jnp.maximum(log_decay, LEAST)
    coarse = jnp.round(16 * log_decay) / 16
    parts = jnp.stack([coarse, log_decay - coarse])
    product = {-1: "...t,it->...i", -2: "...tk,it->...ik"}[axis]
    sums = jnp.einsum(product, parts, over.astype(parts.dtype), precision="highest")
    return sums, sums - parts


def _exp(sums: Float[Array, "2 ..."], where: Bool[Array, "..."] | None = None) -> Array:
    # Masked before the exponential: behind it, the gradient of what overflows would be NaN.
    total = sums[0] + sums[1]
    return jnp.exp(total if where is None else jnp.where(where, total, -jnp.inf))
