from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree

from discretax._features import check_samples, check_size, out_features
from discretax._stateful import check_state
from discretax._timeseries import Timeseries, length_of, values_of, with_values
from discretax.blocks._batch_norm import BatchNorm
from discretax.blocks.base import AbstractBlock, Samples
from discretax.channel_mixers import AbstractChannelMixer
from discretax.sequence_mixers import AbstractSequenceMixer

Norm = Literal["batch", "layer", "rms"] | None


class StandardBlock(AbstractBlock):
    r"""The block of the S5 and LRU papers.

    $$x \leftarrow x + \mathrm{drop}(\mathrm{channel}(\mathrm{drop}(\phi(
    \mathrm{sequence}(\mathrm{norm}(x))))))$$

    with $\phi$ the `activation`, and with the norm before the mixer, or, with `prenorm=False`,
    after the sum. Dropout draws one mask of features per sequence and keeps it over time, as the
    papers' code does. A sequence mixer may put out another width than it takes; the channel mixer
    then leads back to the width of $x$.

    Takes an array or a [`discretax.Timeseries`][]; with the latter, the mixer sees its timesteps,
    length and resets, and padding enters neither norm nor state.
    """

    norm: BatchNorm | eqx.nn.LayerNorm | eqx.nn.RMSNorm | None
    sequence_mixer: AbstractSequenceMixer
    channel_mixer: AbstractChannelMixer
    dropout: eqx.nn.Dropout
    cache_index: eqx.nn.StateIndex
    streaming: bool
    inference: bool
    in_features: int = eqx.field(static=True)
    prenorm: bool = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: AbstractSequenceMixer | Callable[..., AbstractSequenceMixer],
        channel_mixer: AbstractChannelMixer | Callable[..., AbstractChannelMixer],
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "batch",
        activation: Callable[[Array], Array] = jax.nn.gelu,
    ):
        """**Arguments:**

        - `in_features`: width of the residual stream.
        - `key`: for the mixers' initialisation.
        - `sequence_mixer`, `channel_mixer`: a mixer, or a function `(in_features, *, key)` that
            makes one: `functools.partial(LRUSequenceMixer, state_dim=64)`. If the sequence mixer's
            output has another width, the function for the channel mixer is given that as its
            `in_features`, and the block's by the keyword `out_features`.
        - `drop_rate`: probability with which dropout zeroes a feature.
        - `prenorm`: norm before the mixer (True) or after the sum (False).
        - `norm`: `"batch"` over batch and time, as the papers have it; `"layer"` or `"rms"` over
            the features of each sample; None.
        - `activation`: what the sequence mixer's output goes through: `jax.nn.gelu`, in its
            approximation by tanh; `functools.partial(jax.nn.gelu, approximate=False)`;
            `lambda x: x` for none.

        **Raises:**

        `ValueError` for an unknown norm, a rate outside [0, 1), or mixers of widths that do not
        fit; `TypeError` for an activation that is no function.
        """
        check_size("in_features", in_features)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"`drop_rate` must lie in [0, 1); got {drop_rate}.")
        if not callable(activation):
            raise TypeError(
                "`activation` must be a function of an array, such as `jax.nn.gelu`, or "
                f"`lambda x: x` for none; got {activation!r}."
            )
        sequence_key, channel_key = jr.split(key)
        if not isinstance(sequence_mixer, AbstractSequenceMixer):
            sequence_mixer = sequence_mixer(in_features, key=sequence_key)
        if sequence_mixer.in_features != in_features:
            raise ValueError(
                f"`sequence_mixer` must have the block's width, in_features={in_features}; got "
                f"{type(sequence_mixer).__name__} of width {sequence_mixer.in_features}."
            )
        mix = lambda x: sequence_mixer(x, key=sequence_key)[0]
        mixed_features = out_features(mix, in_features)
        if not isinstance(channel_mixer, AbstractChannelMixer):
            widths = {} if mixed_features == in_features else {"out_features": in_features}
            channel_mixer = channel_mixer(mixed_features, key=channel_key, **widths)
        if channel_mixer.in_features != mixed_features:
            raise ValueError(
                "`channel_mixer` must have the width of what the sequence mixer puts out, "
                f"in_features={mixed_features}; got {type(channel_mixer).__name__} of width "
                f"{channel_mixer.in_features}."
            )
        width = out_features(channel_mixer, mixed_features)
        if width != in_features:
            raise ValueError(
                f"`channel_mixer` must lead to the block's width, in_features={in_features}, to be "
                f"added to the residual stream; got {type(channel_mixer).__name__} with "
                f"out_features={width}."
            )
        self.norm = _make_norm(norm, in_features)
        self.sequence_mixer = sequence_mixer
        self.channel_mixer = channel_mixer
        self.dropout = eqx.nn.Dropout(drop_rate)
        self.cache_index = eqx.nn.StateIndex(None)
        self.streaming = False
        self.inference = False
        self.in_features = in_features
        self.prenorm = prenorm
        self.activation = activation

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree:
        return self.sequence_mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def __call__(
        self, x: Samples, state: eqx.nn.State, *, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        check_state(state, self)
        self.check_inference()
        skip = values_of(x)
        check_samples(self, skip, self.in_features)
        mixer_key, *drop_keys = (None,) * 3 if key is None else jr.split(key, 3)
        u = skip
        if self.prenorm:
            u, state = self._normalise(u, state, length_of(x))
        u, state = self._mix(u, x, state, mixer_key)
        u = self._drop(self.activation(u), drop_keys[0])
        u = self._drop(self.channel_mixer(u), drop_keys[1])
        u = skip + u
        if not self.prenorm:
            u, state = self._normalise(u, state, length_of(x))
        return with_values(x, u), state

    def _mix(self, u, x, state, key):
        options = {}
        if isinstance(x, Timeseries):
            options = {
                "integration_timesteps": x.timesteps,
                "length": x.length,
                "resets": x.resets,
            }
        cache = self.read_cache(state) if self.streaming else None
        u, cache = self.sequence_mixer(u, cache, key=key, **options)
        if self.streaming:
            state = state.set(self.cache_index, cache)
        return u, state

    def _normalise(self, u, state, length):
        if isinstance(self.norm, BatchNorm):
            return self.norm(u, state, length=length)
        if self.norm is not None:
            u = jax.vmap(self.norm)(u)
        return u, state

    def _drop(self, u, key):
        if self.dropout.inference or self.dropout.p == 0:
            return u
        if key is None:
            raise ValueError(
                f"`StandardBlock` drops features at random (drop_rate={self.dropout.p}) and got "
                "no key. Call `model(x, state, key=key)`, or `eqx.nn.inference_mode(model)` to "
                "evaluate, or build the model with `drop_rate=0`."
            )
        mask: Array = self.dropout(jnp.ones(u.shape[1], u.dtype), key=key)
        return u * mask


def _make_norm(norm: Norm, in_features: int):
    # 1e-6, not Equinox's 1e-5, is what the S5 and LRU code normalises with.
    if norm == "batch":
        return BatchNorm(in_features)
    if norm == "layer":
        return eqx.nn.LayerNorm(in_features, eps=1e-6)
    if norm == "rms":
        return eqx.nn.RMSNorm(in_features, eps=1e-6, use_bias=False)
    if norm is None:
        return None
    raise ValueError(f"`norm` must be 'batch', 'layer', 'rms' or None; got {norm!r}.")
