from typing import Any, overload

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import sizes_first
from discretax._dropout import dropped, make_dropout
from discretax._features import check_size
from discretax._stateful import check_state
from discretax._timeseries import Timeseries, known, values_of, with_values
from discretax._types import conversion
from discretax.encoder.base import AbstractEncoder
from discretax.encoder.positions import LearnedPositions


class EmbeddingEncoder(AbstractEncoder):
    r"""A learned vector for each of `num_classes` tokens.

    With `max_position_embeddings` another one is added for each place in the sequence,
    $E_{x_t} + P_t$. The first sample, and one with a reset, has place zero; a stream goes on where its
    last chunk ended.
    """

    embedding: eqx.nn.Embedding
    positions: LearnedPositions | None
    dropout: eqx.nn.Dropout | None
    streaming: bool

    @overload
    def __init__(
        self,
        num_classes: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        max_position_embeddings: int | None = None,
        drop_rate: float = 0.0,
    ): ...
    @overload
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        num_classes: int,
        out_features: int,
        max_position_embeddings: int | None = None,
        drop_rate: float = 0.0,
    ): ...
    @sizes_first
    def __init__(
        self,
        num_classes: int,
        out_features: int,
        *,
        key: PRNGKeyArray,
        max_position_embeddings: int | None = None,
        drop_rate: float = 0.0,
    ):
        """`EmbeddingEncoder(num_classes, out_features, key=key)`.

        **Arguments:**

        - `num_classes`: size of the vocabulary.
        - `out_features`: width of the model.
        - `key`: for the initialisation.
        - `max_position_embeddings`: length of the longest sequence that has learned positions; None
            for none.
        - `drop_rate`: probability with which dropout zeroes a feature, in all samples alike.

        **Raises:** `ValueError` for sizes below one and a rate outside [0, 1).
        """
        num_classes = check_size("num_classes", num_classes)
        out_features = check_size("out_features", out_features)
        self.positions = None
        if max_position_embeddings is not None:
            size = check_size("max_position_embeddings", max_position_embeddings)
            key, position_key = draw.split(key)
            self.positions = LearnedPositions(size, out_features, key=position_key)
        self.embedding = draw.embedding(num_classes, out_features, key=key)
        self.dropout = None if drop_rate == 0 else make_dropout(drop_rate)
        self.streaming = False

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: `(time,)` whole numbers in [0, num_classes), or a
        [`discretax.Timeseries`][] of such; `state`; `key`, for dropout.

        **Returns:** the same kind as `x`, with values `(time, out_features)`, and `state`.

        **Raises:** `ValueError` for another rank or type, and, where the numbers are known (outside
        `jax.jit`), for a token out of range and a sequence longer than `max_position_embeddings`.
        Under `jit` such a token, or what is beyond the last position, gives NaN.
        """
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
        if self.positions is not None:
            places, state = self.positions(x, state)
            vectors = vectors + places
        if self.dropout is not None:
            vectors = dropped(vectors, self.dropout, key, self)
        return with_values(x, vectors), state
