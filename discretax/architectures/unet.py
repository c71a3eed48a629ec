import functools as ft
from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._features import check_name, check_size, linear
from discretax._timeseries import Timeseries, values_of, with_values
from discretax.architectures._stages import check_call, check_stages, make_encoder
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm, SequenceMixerMaker
from discretax.blocks.base import Samples
from discretax.channel_mixers import GLU
from discretax.encoder import AbstractEncoder, LinearEncoder
from discretax.heads import RegressionHead
from discretax.models import AbstractBackbone, Backbone, DeepBackbone
from discretax.rates import Downsample, Upsample
from discretax.rates.downsample import Downsampling
from discretax.rates.upsample import Upsampling

Skip = Literal["add", "concat"]


class UNet(eqx.nn.StatefulLayer):
    r"""An answer for each sample, from blocks at falling and again at rising rates, with skips between.

    $$s_i = \mathrm{blocks}_i(x), \quad x \leftarrow \mathrm{down}_i(s_i), \qquad \dots \qquad
    x \leftarrow \mathrm{blocks}'_i(s_i + \mathrm{up}_i(x)), \qquad y = W x + b$$

    The blocks in the middle see the longest spans at the least cost; the skips bring the fine detail
    back. With `skip="concat"` the two lie side by side and go through a linear map in place of the sum.

    It is causal: what a window of samples has been made into is known when the window ends, and reaches
    the samples of the next one ([`discretax.rates.Upsample`][]). Then it streams, in chunks that are
    multiples of the product of the strides. With `causal=False` a sample also looks ahead to the end of
    its window, up to the product of the strides less one, for which a stream in such chunks waits
    anyway. A bidirectional one sees all, and does not stream.

    Any length will do: one that is no multiple ends in windows that are not full
    ([`discretax.rates.Downsample`][]), and as many answers come out as there are samples. Nothing needs
    to be padded.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(UNet)(
            1,
            1,
            key,
            sequence_mixer=functools.partial(LRUSequenceMixer, state_dim=64),
            widths=(16, 32, 64),
            strides=(4, 4),
        )
        y, state = discretax.batched(model)(noisy, state, key=key)  # noisy, y: (batch, time, 1)
        ```

    ??? cite

        Goel et al., It's Raw! Audio Generation with State-Space Models, 2022 (SaShiMi,
        arXiv:2202.09729); Pei et al., Real-time Speech Enhancement on Raw Signals with Deep State-space
        Modeling, 2024 (aTENNuate, arXiv:2409.03377).
    """

    encoder: AbstractEncoder
    down_stages: tuple[AbstractBackbone | DeepBackbone, ...]
    downsamples: tuple[Downsample, ...]
    bottleneck: AbstractBackbone | DeepBackbone
    upsamples: tuple[Upsample, ...]
    joins: tuple[eqx.nn.Linear | None, ...]
    up_stages: tuple[AbstractBackbone | DeepBackbone, ...]
    head: RegressionHead

    @keyed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: SequenceMixerMaker,
        widths: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (4, 4),
        blocks_per_stage: int = 2,
        encoder: Callable[..., AbstractEncoder] = LinearEncoder,
        downsample: Downsampling = "linear",
        upsample: Upsampling = "linear",
        skip: Skip = "add",
        causal: bool = True,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "layer",
        channel_mixer: ChannelMixerMaker = GLU,
        activation: Activation = jax.nn.gelu,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `in_features`: width of the samples; for tokens, how many there are.
        - `out_features`: width of the answers: numbers, of which `jax.nn.log_softmax` makes
            log-probabilities.
        - `key`: for the initialisation.
        - `sequence_mixer`: a function `(in_features, *, key)` that makes a mixer, called once per
            block, with the width of its stage.
        - `widths`: of the stages, from the finest to the coarsest, in the middle.
        - `strides`: between two stages, how many samples become one.
        - `blocks_per_stage`: how many blocks to stack on the way down, in the middle and on the way
            up, at each rate.
        - `encoder`: as in [`discretax.architectures.Classifier`][]. There is one answer for each
            sample that comes out of it.
        - `downsample`, `upsample`: as `how` of [`discretax.rates.Downsample`][] and of
            [`discretax.rates.Upsample`][].
        - `skip`: `"add"`, as in SaShiMi, or `"concat"`.
        - `causal`: no answer looks at a later sample, or, if False, at one past its window. Without
            effect on a bidirectional one.
        - `drop_rate`, `prenorm`, `norm`, `channel_mixer`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].

        **Raises:** `ValueError` for sizes below one, strides that are not one fewer than the widths, and
        an unknown `skip`, `downsample` or `upsample`; `TypeError` for mixers or an encoder that are made already.
        """
        widths, strides = check_stages(widths, strides)
        check_name("skip", skip, Skip)
        check_name("downsample", downsample, Downsampling)
        check_name("upsample", upsample, Upsampling)
        stage = ft.partial(
            Backbone,
            sequence_mixer=sequence_mixer,
            num_blocks=check_size("blocks_per_stage", blocks_per_stage),
            drop_rate=drop_rate,
            prenorm=prenorm,
            norm=norm,
            channel_mixer=channel_mixer,
            activation=activation,
            bidirectional=bidirectional,
        )
        depth = len(strides)
        ends_key, *keys = draw.split(key, 1 + len(widths) + depth)
        stage_keys, rate_keys = keys[: len(widths)], keys[len(widths) :]
        encoder_key, head_key = draw.split(ends_key)
        self.encoder = make_encoder(encoder, in_features, widths[0], key=encoder_key)
        self.head = RegressionHead(widths[0], out_features, head_key, reduce=False)
        self.bottleneck = stage(stage_keys[-1], hidden_dim=widths[-1])
        parts = []
        for i in range(depth):
            down_key, up_key = draw.split(stage_keys[i])
            shrink_key, grow_key, join_key = draw.split(rate_keys[i], 3)
            fine, coarse, stride = widths[i], widths[i + 1], strides[i]
            parts.append(
                (
                    stage(down_key, hidden_dim=fine),
                    Downsample(fine, stride, shrink_key, how=downsample, out_features=coarse),
                    Upsample(
                        coarse,
                        stride,
                        grow_key,
                        how=upsample,
                        out_features=fine,
                        causal=causal and not bidirectional,
                    ),
                    draw.linear(2 * fine, fine, key=join_key) if skip == "concat" else None,
                    stage(up_key, hidden_dim=fine),
                )
            )
        columns = zip(*parts, strict=True) if parts else ((),) * 5
        self.down_stages, self.downsamples, self.upsamples, self.joins, self.up_stages = columns

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "time out"], eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)`, or what the encoder takes, or a
        [`discretax.Timeseries`][] of such; `state`; `key`, for dropout.

        **Returns:** `(time, out_features)`, an answer for each sample, and the new state.

        **Raises:** `ValueError` while streaming for a chunk that is no multiple of the strides.
        """
        check_call(self, x, state, (self.encoder, self.downsamples))
        depth = len(self.downsamples)
        keys = iter((None,) * (2 * depth + 2) if key is None else jr.split(key, 2 * depth + 2))
        u, state = self.encoder(x, state, key=next(keys))
        skips = []
        for stage, downsample in zip(self.down_stages, self.downsamples, strict=True):
            u, state = stage(u, state, key=next(keys))
            skips.append(u)
            u, state = downsample(u, state)
        u, state = self.bottleneck(u, state, key=next(keys))
        for i in reversed(range(depth)):
            u, state = self.upsamples[i](u, state, like=skips[i])
            u, state = self.up_stages[i](_joined(self.joins[i], skips[i], u), state, key=next(keys))
        return self.head(u, state)


def _joined(join: eqx.nn.Linear | None, skip: Samples, u: Samples) -> Samples:
    fine, coarse = values_of(skip), values_of(u)
    if join is None:
        return with_values(skip, fine + coarse)
    both = jnp.concatenate([fine, coarse], axis=-1)
    return with_values(skip, each_sample(skip, ft.partial(linear, join), both))
