"""What families share whose layers are of Gated DeltaNet or attention."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, describe_sizes
from discretax.pretrained._transformer import describe_attention
from discretax.sequence_mixers import AttentionSequenceMixer, GatedDeltaNetSequenceMixer

LINEAR, FULL = "linear_attention", "full_attention"
TENSORS = {LINEAR: "linear_attn.", FULL: "self_attn."}
MIXERS = {LINEAR: GatedDeltaNetSequenceMixer, FULL: AttentionSequenceMixer}


def layer_kinds(config: Config, interval: int = 4) -> list[str]:
    """As the list says, or with attention in every layer whose number is a multiple of `interval`."""
    count = config.layers("num_hidden_layers", "model.layers.")
    default = [LINEAR if i % interval else FULL for i in range(1, count + 1)]
    kinds = config.entry("layer_types", default)
    known = isinstance(kinds, list) and all(kind in list(TENSORS) for kind in kinds)
    if not known or len(kinds) != count:
        raise config.refused("layer_types", kinds, f"a list of {count} names among {list(TENSORS)}")
    config.kinds_fit("layer_types", kinds, TENSORS)
    return kinds


def gated_delta_net(
    config: Config, occurs: bool, *, rows: tuple[str, int], conv: str, norm: str, **options: Any
) -> Callable[..., GatedDeltaNetSequenceMixer]:
    """Its sizes, compared to the tensors where the mixer `occurs`.

    `rows`: a tensor with the rows of all keys, how often it has them, and, if that is twice, those of
    the values; `conv` and `norm`: the tensors of the convolution and the norm."""
    told = lambda tensor, axis: (f"linear_attn.{tensor}", axis) if occurs else None
    key_heads = config.size("linear_num_key_heads")
    value_heads = config.size("linear_num_value_heads", of=told("A_log", 0))
    head_dim = config.size("linear_key_head_dim")
    value_dim = config.size("linear_value_head_dim", of=told(norm, 0))
    if value_heads % key_heads:
        rule = f"a divisor of linear_num_value_heads={value_heads}"
        raise config.refused("linear_num_key_heads", key_heads, rule)
    if occurs:
        tensor, times = rows
        values = value_heads * value_dim if times == 2 else 0
        sizes = {"linear_num_key_heads": key_heads, "linear_key_head_dim": head_dim}
        config.fits(f"linear_attn.{tensor}", 0, times * key_heads * head_dim + values, **sizes)
    return ft.partial(
        GatedDeltaNetSequenceMixer,
        num_heads=key_heads,
        num_value_heads=value_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        conv_width=config.size("linear_conv_kernel_dim", of=told(conv, 2)),
        **options,
    )


def describe_hybrid(model: Any) -> dict[str, Any] | None:
    """None for a model that has not both kinds of layers, and no others."""
    blocks: Sequence[Any] = model.backbone.blocks
    kinds = [
        kind
        for block in blocks
        for kind, mixer in MIXERS.items()
        if isinstance(block, ResidualBlock)
        and isinstance(block.sequence_mixer, mixer)
        and isinstance(block.channel_mixer, SwiGLU)
    ]
    if len(kinds) < len(blocks) or set(kinds) != set(MIXERS):
        return None
    return (
        describe_sizes(model)
        | describe_attention(mixer_of(model, FULL))
        | describe_gated_delta_net(mixer_of(model, LINEAR))
        | {
            "rms_norm_eps": model.norm.eps,
            "hidden_act": "silu",
            "intermediate_size": blocks[0].channel_mixer.gate_proj.weight.shape[0],
            "layer_types": kinds,
        }
    )


def describe_gated_delta_net(mixer: GatedDeltaNetSequenceMixer) -> dict[str, Any]:
    sizes = mixer.projections
    return {
        "linear_num_key_heads": sizes.key_heads,
        "linear_num_value_heads": sizes.value_heads,
        "linear_key_head_dim": sizes.key_dim,
        "linear_value_head_dim": sizes.value_dim,
        "linear_conv_kernel_dim": None if sizes.conv_weight is None else sizes.conv_weight.shape[1],
    }


def mixer_of(model: Any, kind: str) -> Any:
    """The first of the kind."""
    mixers = (block.sequence_mixer for block in model.backbone.blocks)
    return next(mixer for mixer in mixers if isinstance(mixer, MIXERS[kind]))
