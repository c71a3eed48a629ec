from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._dropout import make_dropout
from discretax._features import check_positive, check_size
from discretax._stateful import samples_of
from discretax._timeseries import with_values
from discretax._types import check_floating
from discretax.blocks._parts import (
    ChannelMixerMaker,
    Norm,
    NormLayer,
    SequenceMixerMaker,
    make_channel_mixer,
    make_norm,
    make_sequence_mixer,
)
from discretax.blocks.base import AbstractBlock, Samples, normalise, residual
from discretax.channel_mixers import AbstractChannelMixer
from discretax.sequence_mixers import AbstractSequenceMixer


class ResidualBlock(AbstractBlock):
    r"""The block of transformers and of Griffin: each mixer has a norm and a sum of its own.

    $$x \leftarrow x + \mathrm{drop}(\mathrm{sequence}(\mathrm{norm}(x))), \qquad
    x \leftarrow x + \mathrm{drop}(\mathrm{channel}(\mathrm{norm}(x)))$$

    With `prenorm=False` each norm comes after its sum. With a `branch_norm` what a mixer puts out is
    normalised before it is added (beside a norm before it: sandwich norms; alone, with `norm=None`:
    the order of OLMo 2), and with a `residual_scale` it is multiplied by that constant. Dropout,
    arrays and [`discretax.Timeseries`][] are treated as in [`discretax.blocks.StandardBlock`][].

    ??? cite

        De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
        Language Models, 2024 (arXiv:2402.19427).
    """

    sequence_norm: NormLayer
    sequence_mixer: AbstractSequenceMixer
    channel_norm: NormLayer
    channel_mixer: AbstractChannelMixer
    sequence_branch_norm: NormLayer
    channel_branch_norm: NormLayer
    dropout: eqx.nn.Dropout
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    prenorm: bool = eqx.field(static=True)
    residual_scale: float = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: AbstractSequenceMixer | SequenceMixerMaker,
        channel_mixer: AbstractChannelMixer | ChannelMixerMaker,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "rms",
        branch_norm: Norm = None,
        residual_scale: float = 1.0,
        dtype: Any = None,
    ):
        """**Arguments:**

        - `in_features`: width of the residual stream.
        - `key`: for the mixers' initialisation.
        - `sequence_mixer`, `channel_mixer`: a mixer, or a function `(in_features, *, key)` that
            makes one: `functools.partial(GriffinSequenceMixer, num_heads=4)`.
        - `drop_rate`: probability with which dropout zeroes a feature.
        - `prenorm`: norm before each mixer (True) or after each sum (False).
        - `norm`: as in [`discretax.blocks.StandardBlock`][].
        - `branch_norm`: alike, of what each mixer puts out; None for none.
        - `residual_scale`: what each mixer's output is multiplied by, as in Granite.
        - `dtype`: what the mixers compute in, beside a residual stream of another type; that of the
            samples if left out.

        **Raises:**

        `ValueError` for an unknown norm, a rate outside [0, 1), a scale that is not positive, or
        mixers of another width.
        """
        in_features = check_size("in_features", in_features)
        sequence_key, channel_key = draw.split(key)
        self.sequence_mixer, mixed_features = make_sequence_mixer(
            sequence_mixer, in_features, sequence_key
        )
        if mixed_features != in_features:
            raise ValueError(
                "`sequence_mixer` must put out the block's width, to be added to the residual "
                f"stream, in_features={in_features}; got {type(self.sequence_mixer).__name__} with "
                f"an output of width {mixed_features}. Use `StandardBlock`."
            )
        self.channel_mixer = make_channel_mixer(
            channel_mixer, in_features, in_features, channel_key
        )
        self.sequence_norm = make_norm(norm, in_features)
        self.channel_norm = make_norm(norm, in_features)
        self.sequence_branch_norm = make_norm(branch_norm, in_features)
        self.channel_branch_norm = make_norm(branch_norm, in_features)
        check_positive("residual_scale", residual_scale)
        self.dropout = make_dropout(drop_rate)
        self.in_features = self.out_features = in_features
        self.prenorm = prenorm
        self.residual_scale = residual_scale
        check_floating("dtype", dtype)
        self.dtype = dtype

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        u = samples_of(x, state, self, self.in_features)
        mixer_key, *drop_keys = (None,) * 3 if key is None else jr.split(key, 3)

        def mix(u, state):
            u, state = self.mix(u, x, state, mixer_key)
            u, state = normalise(self.sequence_branch_norm, u, state, x)
            return self.residual_scale * self.drop(u, drop_keys[0]), state

        def mix_channels(u, state):
            u = each_sample(x, self.channel_mixer, u)
            u, state = normalise(self.channel_branch_norm, u, state, x)
            return self.residual_scale * self.drop(u, drop_keys[1]), state

        for branch, norm in (mix, self.sequence_norm), (mix_channels, self.channel_norm):
            u, state = residual(branch, norm, self.prenorm, u, state, x, self.dtype)
        return with_values(x, u), state
