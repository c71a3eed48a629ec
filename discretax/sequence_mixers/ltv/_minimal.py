"""What minGRU and minLSTM share: the candidate, the recurrence, and the way back to the features."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from discretax._broken import mended
from discretax._features import linear
from discretax._types import Length, Resets, Timesteps, Values, widened
from discretax.ops._recurrence.chunked import chunked_recurrence
from discretax.ops._recurrence.projections import choose_chunk_size
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

Gates = Float[Array, "time state"]


class AbstractMinimalMixer(AbstractRecurrentMixer[Float[Array, " state"]]):
    """A mean of the past and of a candidate, weighed by gates that do not see the past."""

    candidate_proj: eqx.AbstractVar[eqx.nn.Linear]
    out_proj: eqx.AbstractVar[eqx.nn.Linear | None]

    contains_broken_samples: ClassVar[bool] = True

    @abc.abstractmethod
    def log_odds(self, x: Values) -> Gates:
        """Of the candidate against the past."""

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, " state"]:
        del max_seqlen
        return zero_cache(batch_size, (self.candidate_proj.weight.shape[0],), dtype)

    def mix(
        self,
        x: Values,
        cache: Float[Array, " state"],
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Float[Array, " state"]]:
        refuse_timesteps(self, integration_timesteps, "how it forgets is the input's choice")
        mixer = widened(self, x)
        h, y = chunked_recurrence(
            _terms,
            _read_out,
            mixer,
            cache.astype(mixer.candidate_proj.weight.dtype),
            x,
            resets=resets,
            length=length,
            chunk_size=choose_chunk_size(x.shape[0], cache.shape[0]),
        )
        return y, h


def _terms(mixer, x, _):
    narrow = mended(x)
    wide = narrow.astype(mixer.candidate_proj.weight.dtype)
    odds, candidate = mixer.log_odds(wide), linear(mixer.candidate_proj, wide)
    # sigmoid(-z) holds the past where 1 - sigmoid(z) is rounded to zero.
    return jax.nn.sigmoid(-odds), jax.nn.sigmoid(odds) * _positive(candidate), narrow


def _positive(x):
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


def _read_out(mixer, h, x):
    h = h.astype(x.dtype)
    return h if mixer.out_proj is None else linear(mixer.out_proj, h)
