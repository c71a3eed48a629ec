from typing import Any, overload

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from discretax._constructors import sizes_first
from discretax._features import check_size
from discretax._stateful import check_state
from discretax._timeseries import Timeseries, known, values_of, with_values
from discretax._types import conversion
from discretax.encoder.base import AbstractEncoder


class EmbeddingEncoder(AbstractEncoder):
    """A learned vector for each of `num_classes` tokens."""

    embedding: eqx.nn.Embedding

    @overload
    def __init__(self, num_classes: int, out_features: int, key: PRNGKeyArray): ...
    @overload
    def __init__(self, key: PRNGKeyArray, *, num_classes: int, out_features: int): ...
    @sizes_first
    def __init__(self, num_classes: int, out_features: int, *, key: PRNGKeyArray):
        """`EmbeddingEncoder(num_classes, out_features, key=key)`.

        **Arguments:** `num_classes`, size of the vocabulary; `out_features`, width of the model;
        `key`.
        """
        num_classes = check_size("num_classes", num_classes)
        out_features = check_size("out_features", out_features)
        self.embedding = eqx.nn.Embedding(num_classes, out_features, key=key)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: `(time,)` whole numbers in [0, num_classes), or a
        [`discretax.Timeseries`][] of such; `state`; `key`, unused.

        **Returns:** the same kind as `x`, with values `(time, out_features)`, and `state`.

        **Raises:** `ValueError` for another rank or type, and, where the numbers are known (outside
        `jax.jit`), for a token out of range. Under `jit` such a token gives NaN.
        """
        del key
        check_state(state, self)
        tokens = values_of(x)
        num_classes = int(self.embedding.num_embeddings)
        if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "`EmbeddingEncoder` takes one sequence of whole numbers, (time,); got "
                f"{tokens.dtype}{tokens.shape}. Use `jax.vmap` to batch.{conversion(tokens, int)}"
            )
        seen = known(tokens)
        if seen is not None and ((seen < 0) | (seen >= num_classes)).any():
            raise ValueError(
                f"tokens must lie in [0, {num_classes}); got values from {seen.min()} to "
                f"{seen.max()}. Raise `num_classes` or clean the data."
            )
        tokens = tokens.astype(int)  # int8 cannot hold every number of classes
        tokens = jnp.where(tokens < 0, num_classes, tokens)  # no wrapping around
        vectors = self.embedding.weight.at[tokens].get(mode="fill", fill_value=jnp.nan)
        return with_values(x, vectors), state
