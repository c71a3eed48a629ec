from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._counts import count_after, counts_before
from discretax._features import check_positive
from discretax._timeseries import zero_padding
from discretax._types import Length, Resets, Timesteps, Values
from discretax.ops import gated_linear_attention
from discretax.ops._rotary import frequencies, rotated
from discretax.ops._running.split_time import incoming_state
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache
from discretax.sequence_mixers.ltv._matrix_memory import Output, Projections


class RetentionCache(NamedTuple):
    """The state, and how many samples of the sequence have been seen: a clock that runs over."""

    state: Float[Array, "heads key value"]
    clock: Int[Array, ""]


class RetentionSequenceMixer(AbstractRecurrentMixer[RetentionCache]):
    r"""Multi-scale retention, of the RetNet: rotary keys, and a constant decay for each head.

    $$S_t = \gamma S_{t-1} + (R_t k_t)\, v_t^T, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T R_t q_t / \sqrt{\mathrm{key}}) \odot
    \mathrm{silu}(W_g x_t)\big), \qquad [q, k, v] = W x$$

    with $\gamma = 1 - 2^{-5-h}$ for the head $h = 0, 1, \dots$. $R_t$ turns pairs of features, $i$
    and $i + \mathrm{key}/2$, by the angle $t\, \theta^{-2i/\mathrm{key}}$: as in attention a key
    counts by its distance alone, and $\gamma$ per sample less. See
    [`discretax.ops.gated_linear_attention`][] and [The matrix state](../matrix-state.md).

    The paper also divides by sums of decays and of weights, which the norm undoes. Its own code turns
    neighbouring features instead, which is another order of the rows of $W$.

    The cache holds the state, `(heads, key, value)`, and a count of samples, from which the angles
    come. It is a whole number that runs over where the angles do, so that late samples are as exact
    as early ones; at a reset it begins at zero again.

    !!! example

        ```python
        mixer = RetentionSequenceMixer(64, num_heads=4, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, 2023
        (arXiv:2307.08621).
    """

    projections: Projections
    output: Output
    in_features: int = eqx.field(static=True)
    rotary_base: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rotary_base: float = 10_000.0,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: length of the keys of a head, even; `in_features / num_heads` if left out.
        - `value_dim`: length of the values of a head; twice `head_dim` if left out.
        - `rotary_base`: $\theta$; the longest wavelength is $2\pi\theta$ samples.
        - `norm_eps`: added to the mean squares of the norm.

        **Raises:**

        `ValueError` for sizes below one, that do not divide or are odd, or a base that is not
        positive.
        """
        check_positive("rotary_base", rotary_base)
        projections_key, gate_key, out_key = draw.split(key, 3)
        self.projections = sizes = Projections(
            in_features,
            projections_key,
            num_heads,
            head_dim,
            value_dim,
            value_ratio=2,
            activation=None,
        )
        if sizes.key_dim % 2:
            raise ValueError(
                "`head_dim` must be even, for its features are turned in pairs; got "
                f"{sizes.key_dim}."
            )
        gate_proj = sizes.for_each_head(sizes.value_dim, gate_key)
        self.output = Output(sizes, out_key, gate_proj=gate_proj, norm_eps=norm_eps)
        self.in_features = sizes.in_features
        self.rotary_base = rotary_base

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> RetentionCache:
        del max_seqlen
        return RetentionCache(
            self.projections.allocate(batch_size, dtype).state, zero_cache(batch_size, (), int)
        )

    def mix(
        self,
        x: Values,
        cache: RetentionCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, RetentionCache]:
        refuse_timesteps(self, integration_timesteps, "its positions are counted in samples")
        q, k, v, _ = self.projections(x, None, length, resets)
        counts, clock = _counted(cache.clock, len(x), length, resets)
        turns = frequencies(q.shape[-1], self.rotary_base)
        turned = lambda heads: rotated(heads, counts, turns)
        y, state = gated_linear_attention(
            turned(q),
            turned(k),
            v,
            None,
            jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(v.shape[1])))), float),
            cache.state,
            scale=q.shape[-1] ** -0.5,
            length=length,
            resets=resets,
        )
        return self.output(y, x), RetentionCache(state, clock)


def _counted(
    clock: Int[Array, ""], time: int, length: Length | None, resets: Resets | None
) -> tuple[Int[Array, " time"], Int[Array, ""]]:
    """The samples before each one, those on other devices too, and before the one after the last."""
    resets = None if resets is None else zero_padding(resets, length)
    counts = lambda start: counts_before(start, time, resets)
    after = lambda start: count_after(start, counts(start), time if length is None else length)
    start = jnp.asarray(clock, int)
    start = incoming_state(start, lambda: (jnp.ones((), int), after(0)), resets)
    return counts(start), after(start)
