import functools as ft

from jaxtyping import PRNGKeyArray

from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm, SequenceMixerMaker
from discretax.models._backbone import standard_blocks
from discretax.sequence_mixers import GatedSequenceMixer


def gated_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    mixer: SequenceMixerMaker,
    bottleneck: int | None,
    gate: int | None,
    channel_mixer: ChannelMixerMaker,
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
    activation: Activation,
) -> tuple[StandardBlock, ...]:
    """The blocks of S4: mixer, activation and channel mixer, with a bottleneck or a gate around the
    mixer.

    The activation stands right behind the system. If maps follow there before the block's end, so
    does it, and nothing is left for the block to do.
    """
    if bottleneck is not None or gate is not None:
        mixer = ft.partial(
            GatedSequenceMixer,
            sequence_mixer=mixer,
            bottleneck=bottleneck,
            gate=gate,
            activation=activation,
        )
        activation = None
    return standard_blocks(
        key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
    )
