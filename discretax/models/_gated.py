import functools as ft
from collections.abc import Callable

from jaxtyping import Array

from discretax.sequence_mixers import AbstractSequenceMixer, GatedSequenceMixer
from discretax.sequence_mixers.wrappers.gated import exact_gelu


def gated(
    sequence_mixer: Callable[..., AbstractSequenceMixer], bottleneck: int | None, gate: int | None
) -> tuple[Callable[..., AbstractSequenceMixer], Callable[[Array], Array] | None]:
    """The sequence mixer of an S4 block and the activation that the block puts after it.

    The GELU stands right behind the system. If maps follow there before the block's end, so does
    it, and nothing is left for the block to do.
    """
    if bottleneck is None and gate is None:
        return sequence_mixer, exact_gelu
    wrapped = ft.partial(
        GatedSequenceMixer,
        sequence_mixer=sequence_mixer,
        bottleneck=bottleneck,
        gate=gate,
        activation=exact_gelu,
    )
    return wrapped, None
