from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._dropout import make_dropout
from discretax._features import check_function, check_size
from discretax._stateful import samples_of
from discretax._timeseries import with_values
from discretax._types import check_floating
from discretax.blocks._parts import (
    Activation,
    ChannelMixerMaker,
    Norm,
    NormLayer,
    SequenceMixerMaker,
    make_channel_mixer,
    make_norm,
    make_sequence_mixer,
)
from discretax.blocks.base import AbstractBlock, Samples, residual
from discretax.channel_mixers import AbstractChannelMixer
from discretax.sequence_mixers import AbstractSequenceMixer


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

    norm: NormLayer
    sequence_mixer: AbstractSequenceMixer
    channel_mixer: AbstractChannelMixer
    dropout: eqx.nn.Dropout
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    prenorm: bool = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: AbstractSequenceMixer | SequenceMixerMaker,
        channel_mixer: AbstractChannelMixer | ChannelMixerMaker,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "batch",
        activation: Activation = jax.nn.gelu,
        dtype: Any = None,
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
        - `norm`: `"batch"` over batch and time, as the papers have it, which in training looks at
            later samples and at other sequences: to forecast, and for reinforcement learning, take
            another; `"layer"` or `"rms"` over the features of each sample; a function
            `(in_features) -> layer`, for a norm of other options: `functools.partial(OffsetRMSNorm, eps=1e-5)`; None.
        - `activation`: what the sequence mixer's output goes through: `jax.nn.gelu`, in its
            approximation by tanh; `functools.partial(jax.nn.gelu, approximate=False)`; None for
            none.
        - `dtype`: what the mixers compute in, beside a residual stream of another type; that of the
            samples if left out.

        **Raises:**

        `ValueError` for an unknown norm, a rate outside [0, 1), or mixers of widths that do not
        fit; `TypeError` for an activation that is no function.
        """
        in_features = check_size("in_features", in_features)
        check_function("activation", activation)
        sequence_key, channel_key = draw.split(key)
        self.sequence_mixer, mixed_features = make_sequence_mixer(
            sequence_mixer, in_features, sequence_key
        )
        self.channel_mixer = make_channel_mixer(
            channel_mixer, mixed_features, in_features, channel_key
        )
        self.norm = make_norm(norm, in_features)
        self.dropout = make_dropout(drop_rate)
        self.in_features = self.out_features = in_features
        self.prenorm = prenorm
        self.activation = activation
        check_floating("dtype", dtype)
        self.dtype = dtype

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        u = samples_of(x, state, self, self.in_features)
        mixer_key, *drop_keys = (None,) * 3 if key is None else jr.split(key, 3)

        def branch(u, state):
            u, state = self.mix(u, x, state, mixer_key)
            u = self.drop(u if self.activation is None else self.activation(u), drop_keys[0])
            return self.drop(each_sample(x, self.channel_mixer, u), drop_keys[1]), state

        u, state = residual(branch, self.norm, self.prenorm, u, state, x, self.dtype)
        return with_values(x, u), state
