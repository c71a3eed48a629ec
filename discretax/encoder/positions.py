from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from discretax import _drawing as draw
from discretax._counts import count_after, counts_before
from discretax._stateful import AbstractStreamingLayer, check_cache
from discretax._timeseries import Timeseries, known, length_of, resets_of, valid_samples, values_of


class LearnedPositions(AbstractStreamingLayer):
    """A learned vector for each place in a sequence: the first, the second, and so on.

    After a reset it begins with the first again. While streaming it goes on where the last chunk
    ended: its cache is the number of samples since the last reset.
    """

    embedding: eqx.nn.Embedding

    def __init__(self, num_positions: int, out_features: int, *, key: PRNGKeyArray):
        self.embedding = draw.embedding(num_positions, out_features, key=key)

    @property
    def num_positions(self) -> int:
        return int(self.embedding.num_embeddings)

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Int[Array, "*batch"]:
        """**Raises:** `ValueError` for streams longer than there are positions."""
        del dtype
        if max_seqlen > self.num_positions:
            raise ValueError(
                f"`max_seqlen` must be at most the {self.num_positions} positions that an encoder of "
                f"the model has learned; got {max_seqlen}. Build it with a larger "
                "`max_position_embeddings`, or read and write fewer samples."
            )
        return jnp.zeros(() if batch_size is None else (batch_size,), int)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State
    ) -> tuple[Float[Array, "time out"], eqx.nn.State]:
        """The vectors of the samples of `x`, and the state."""
        time, resets = values_of(x).shape[0], resets_of(x)
        length = length_of(x)
        length = time if length is None else length
        start = jnp.zeros((), int)
        if self.streaming:
            start = self.read_cache(state)
            check_cache(self, start, jnp.zeros((), int))
        self._check_room(start, length, resets)
        positions = counts_before(start.astype(int), time, resets)
        if self.streaming:
            after = count_after(start.astype(int), positions, length)
            after = jnp.minimum(after, self.num_positions)  # counted on, integers would run over
            state = self.write_cache(state, after)
        positions = jnp.where(valid_samples(time, length), positions, 0)
        vectors = self.embedding.weight.at[positions].get(mode="fill", fill_value=jnp.nan)
        return vectors, state

    def _check_room(self, start: Any, length: Any, resets: Any) -> None:
        end = known(length)
        begins = known(np.zeros(0, bool) if resets is None else resets)
        if end is None or begins is None:
            return
        # Without a trace of it, a chunk begins a sequence: it has no fewer samples.
        before = known(start)
        edges = [-int(before or 0), *np.flatnonzero(begins[: int(end)]), int(end)]
        longest = int(np.diff(edges).max())
        if longest > self.num_positions:
            raise ValueError(
                f"an encoder with `max_position_embeddings={self.num_positions}` takes sequences of "
                f"at most {self.num_positions} samples; got one of at least {longest}. Build it for "
                "longer ones, or begin anew by a reset."
            )
