import functools as ft
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_size
from discretax._timeseries import Timeseries
from discretax.architectures._stages import check_call, check_stages, make_encoder
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm, SequenceMixerMaker
from discretax.channel_mixers import GLU
from discretax.encoder import AbstractEncoder, LinearEncoder
from discretax.heads import ClassificationHead
from discretax.heads.pooling import Kind
from discretax.models import AbstractBackbone, Backbone, DeepBackbone
from discretax.rates import Downsample
from discretax.rates.downsample import Downsampling


class Classifier(eqx.nn.StatefulLayer):
    r"""Stages of blocks, with fewer samples and more features from one to the next; log-probabilities.

    $$x = \mathrm{encoder}(x), \qquad x \leftarrow \mathrm{down}_i(\mathrm{blocks}_i(x)), \qquad
    y = \mathrm{log\_softmax}(W\,\mathrm{pool}(\mathrm{blocks}_n(x)) + b)$$

    Long recordings and streams of events are read at a rate that falls: most of the work is done
    where there are few samples. A length that is no multiple of the strides ends in windows that are
    not full: see [`discretax.rates.Downsample`][], which also says what becomes of timesteps, resets
    and streams. While streaming, a chunk is a multiple of the product of all strides, and the answer
    is that so far.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Classifier)(
            12,
            10,
            key,
            sequence_mixer=functools.partial(S5SequenceMixer, state_dim=64),
            widths=(32, 64, 128),
            strides=(4, 4),
        )
        log_probs, state = discretax.batched(model)(x, state, key=key)  # (batch, time, 12): (batch, 10)
        ```

    ??? cite

        Pooling between event-driven blocks: Schöne et al., Scalable Event-by-event Processing of
        Neuromorphic Sensory Signals With Deep State-Space Models, 2024 (arXiv:2404.18508).
    """

    encoder: AbstractEncoder
    stages: tuple[AbstractBackbone | DeepBackbone, ...]
    downsamples: tuple[Downsample, ...]
    head: ClassificationHead

    @keyed
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        key: PRNGKeyArray,
        *,
        sequence_mixer: SequenceMixerMaker,
        widths: Sequence[int] = (64, 128),
        strides: Sequence[int] = (4,),
        blocks_per_stage: int = 2,
        encoder: Callable[..., AbstractEncoder] = LinearEncoder,
        downsample: Downsampling = "mean",
        pooling: Kind = "mean",
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "layer",
        channel_mixer: ChannelMixerMaker = GLU,
        activation: Activation = jax.nn.gelu,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `in_features`: width of the samples; for tokens, how many there are.
        - `num_classes`: number of classes.
        - `key`: for the initialisation.
        - `sequence_mixer`: a function `(in_features, *, key)` that makes a mixer, called once per
            block, with the width of its stage.
        - `widths`: of the stages, one after the other.
        - `strides`: between two stages, how many samples become one.
        - `blocks_per_stage`: how many blocks to stack at each rate.
        - `encoder`: a function `(in_features, out_features, *, key)` that makes an encoder:
            [`discretax.encoder.EmbeddingEncoder`][] for tokens,
            `functools.partial(PatchEncoder, patch_size=16)` for raw signals.
        - `downsample`: between the stages, as `how` of [`discretax.rates.Downsample`][].
        - `pooling`: of all that comes out of the last stage, as in
            [`discretax.heads.ClassificationHead`][].
        - `drop_rate`, `prenorm`, `norm`, `channel_mixer`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].

        **Raises:** `ValueError` for sizes below one, strides that are not one fewer than the widths, and
        an unknown `downsample`; `TypeError` for mixers or an encoder that are made already.
        """
        num_classes = check_size("num_classes", num_classes)
        widths, strides = check_stages(widths, strides)
        check_name("downsample", downsample, Downsampling)
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
        encoder_key, head_key, *keys = draw.split(key, 2 + len(widths) + len(strides))
        self.encoder = make_encoder(encoder, in_features, widths[0], key=encoder_key)
        self.stages = tuple(stage(keys.pop(), hidden_dim=width) for width in widths)
        self.downsamples = tuple(
            Downsample(width, stride, keys.pop(), how=downsample, out_features=out_features)
            for width, stride, out_features in zip(widths, strides, widths[1:], strict=False)
        )
        self.head = ClassificationHead(widths[-1], num_classes, head_key, pooling=pooling)

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)`, or what the encoder takes, or a
        [`discretax.Timeseries`][] of such; `state`; `key`, for dropout.

        **Returns:** the log-probabilities, and the new state.

        **Raises:** `ValueError` while streaming for a chunk that is no multiple of the strides.
        """
        check_call(self, x, state, (self.encoder, self.downsamples))
        num_stages = len(self.stages)
        keys = (None,) * (num_stages + 1) if key is None else jr.split(key, num_stages + 1)
        u, state = self.encoder(x, state, key=keys[-1])
        for i, stage in enumerate(self.stages):
            if i > 0:
                u, state = self.downsamples[i - 1](u, state)
            u, state = stage(u, state, key=keys[i])
        return self.head(u, state)
