import functools as ft
from collections.abc import Callable

from jaxtyping import PRNGKeyArray

from discretax.blocks import StandardBlock
from discretax.blocks._parts import Norm
from discretax.channel_mixers import GLU
from discretax.models._backbone import standard_blocks
from discretax.sequence_mixers import AbstractSequenceMixer, GatedSequenceMixer
from discretax.sequence_mixers.wrappers.gated import exact_gelu


def gated_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    mixer: Callable[..., AbstractSequenceMixer],
    bottleneck: int | None,
    gate: int | None,
    use_bias: bool,
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
) -> tuple[StandardBlock, ...]:
    """The blocks of S4: mixer, exact GELU and GLU, with a bottleneck or a gate around the mixer.

    The GELU stands right behind the system. If maps follow there before the block's end, so does
    it, and nothing is left for the block to do.
    """
    activation = exact_gelu
    if bottleneck is not None or gate is not None:
        mixer = ft.partial(
            GatedSequenceMixer,
            sequence_mixer=mixer,
            bottleneck=bottleneck,
            gate=gate,
            activation=exact_gelu,
        )
        activation = None
    channel_mixer = ft.partial(GLU, use_bias=use_bias)
    return standard_blocks(
        key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
    )
