"""What blocks are made of."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax._features import described, is_layer, made, out_features
from discretax.blocks._batch_norm import BatchNorm
from discretax.blocks._offset_rms_norm import OffsetRMSNorm
from discretax.channel_mixers import AbstractChannelMixer
from discretax.sequence_mixers import AbstractSequenceMixer

NormLayer = BatchNorm | eqx.nn.LayerNorm | eqx.nn.RMSNorm | OffsetRMSNorm | None
Norm = Literal["batch", "layer", "rms"] | Callable[[int], NormLayer] | None
Activation = Callable[[Array], Array] | None
SequenceMixerMaker = Callable[..., AbstractSequenceMixer]
ChannelMixerMaker = Callable[..., AbstractChannelMixer]


def make_norm(norm: Norm, in_features: int) -> NormLayer:
    # 1e-6, not Equinox's 1e-5, is what the S5 and LRU code normalises with.
    if norm == "batch":
        return BatchNorm(in_features)
    if norm == "layer":
        return eqx.nn.LayerNorm(in_features, eps=1e-6)
    if norm == "rms":
        return eqx.nn.RMSNorm(in_features, eps=1e-6, use_bias=False)
    if norm is None:
        return None
    if callable(norm) and not is_layer(norm):
        layer = norm(in_features)
        _check_layer(layer)
        return layer
    raise ValueError(
        "`norm` must be 'batch', 'layer', 'rms', None or a function of the width that makes a "
        f"layer; got {described(norm)}."
    )


def _check_layer(layer: Any) -> None:
    if layer is not None and (isinstance(layer, type) or not callable(layer)):
        raise TypeError(
            "`norm(in_features)` must be a layer, such as `equinox.nn.LayerNorm(in_features)`, or "
            f"None; got {described(layer)}."
        )


def make_sequence_mixer(
    mixer: AbstractSequenceMixer | SequenceMixerMaker,
    in_features: int,
    key: PRNGKeyArray,
) -> tuple[AbstractSequenceMixer, int]:
    """The mixer, and the width of what it puts out."""
    mixer = made("sequence_mixer", mixer, AbstractSequenceMixer, in_features, key=key)
    if mixer.in_features != in_features:
        raise ValueError(
            f"`sequence_mixer` must have the block's width, in_features={in_features}; got "
            f"{type(mixer).__name__} of width {mixer.in_features}."
        )
    return mixer, out_features(mixer, in_features, key=key)


def make_channel_mixer(
    mixer: AbstractChannelMixer | ChannelMixerMaker,
    mixed_features: int,
    in_features: int,
    key: PRNGKeyArray,
) -> AbstractChannelMixer:
    """A mixer from the width of what it is given to the width of the residual stream."""
    widths = {} if mixed_features == in_features else {"out_features": in_features}
    mixer = made("channel_mixer", mixer, AbstractChannelMixer, mixed_features, key=key, **widths)
    if mixer.in_features != mixed_features:
        raise ValueError(
            "`channel_mixer` must have the width of what the sequence mixer puts out, "
            f"in_features={mixed_features}; got {type(mixer).__name__} of width "
            f"{mixer.in_features}."
        )
    width = out_features(mixer, mixed_features)
    if width != in_features:
        raise ValueError(
            f"`channel_mixer` must lead to the block's width, in_features={in_features}, to be "
            f"added to the residual stream; got {type(mixer).__name__} with "
            f"out_features={width}."
        )
    return mixer
