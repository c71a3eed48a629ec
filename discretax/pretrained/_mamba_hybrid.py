"""What families share whose blocks are a Mamba or attention, and a gated MLP: the blocks, and Mamba-2's entries."""

import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, describe_sizes, rms_norm
from discretax.pretrained._mamba2 import Names, describe_mamba2, mamba2_of, mixer_tensors
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    prefixed,
)
from discretax.sequence_mixers import AttentionSequenceMixer, Mamba2SequenceMixer

TENSORS = {"mamba": "mamba.", "attention": "self_attn."}


NAMES = Names(
    state_dim="mamba_d_state",
    conv_width="mamba_d_conv",
    num_heads="mamba_n_heads",
    head_dim="mamba_d_head",
    num_groups="mamba_n_groups",
    conv_bias="mamba_conv_bias",
    use_bias="mamba_proj_bias",
    tensors="mamba.",
)
OF_MAMBA2 = (*NAMES[:-1], "mamba_expand")


def mamba2(
    config: Config, hidden: int, *, eps: float, inner: str | None = None, **options: Any
) -> Callable[..., Mamba2SequenceMixer]:
    """`inner`: the entry with the inner width, if it is not `mamba_expand` times the features."""
    expand = config.size("mamba_expand", 2)
    width = expand * hidden if inner is None else config.size(inner, expand * hidden)
    told = {"mamba_expand": expand} if inner is None else {inner: width}
    config.fits("mamba.out_proj.weight", 1, width, **told)
    num_heads = config.size("mamba_n_heads", of=("mamba.A_log", 0))
    if width % num_heads:
        raise config.refused("mamba_n_heads", num_heads, f"a divisor of the inner width {width}")
    if config.entry("mamba_d_head", "auto") != "auto":
        config.fixed(mamba_d_head=width // num_heads)
    options |= {"inner_dim": width, "norm_eps": eps}
    return mamba2_of(config, num_heads, width // num_heads, NAMES, **options)


def describe_mixer(mixer: Mamba2SequenceMixer) -> dict[str, Any]:
    return describe_mamba2(mixer, NAMES)


def hybrid(
    config: Config,
    kinds: Sequence[str],
    channel_mixer: Callable[..., SwiGLU],
    *,
    no_effect: Sequence[str],
    mamba: Callable[..., Callable[..., Any]] = mamba2,
    rotary_fraction: float = 1.0,
    has_positions: bool = True,
    scale: float | None = None,
    residual_scale: float = 1.0,
    **options: Any,
) -> Callable[[PRNGKeyArray], LanguageModel]:
    """A block for each of the kinds, of what `mamba` makes or attention and the channel mixer."""
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    eps = config.number("rms_norm_eps")
    occurs = "attention" in kinds
    bias = config.flag("attention_bias", False, of="q_proj.bias" if occurs else None)
    heads = attention(
        config,
        hidden,
        occurs=occurs,
        rotary_fraction=rotary_fraction,
        has_positions=has_positions,
        scale=scale,
        use_bias=bias,
        out_bias=bias,
    )
    mixers: dict[str, Any] = {"attention": heads}
    if "mamba" in kinds:
        mixers["mamba"] = mamba(config, hidden, eps=eps)
    else:
        no_effect = (*no_effect, *OF_MAMBA2)
    block = ft.partial(
        ResidualBlock,
        channel_mixer=channel_mixer,
        norm=rms_norm(eps),
        residual_scale=residual_scale,
    )
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=hidden,
        num_blocks=len(kinds),
        blocks=[ft.partial(block, sequence_mixer=mixers[kind]) for kind in kinds],
        norm=rms_norm(eps),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        **options,
    )
    config.done(no_effect)
    return make


def describe_hybrid(
    model: Any,
    mamba: type = Mamba2SequenceMixer,
    describe_mamba: Callable[[Any], dict[str, Any]] = describe_mixer,
) -> tuple[dict[str, Any], list[str]] | None:
    """What the families have, and the kind of each block; None for other models."""
    blocks = model.backbone.blocks
    names = {mamba: "mamba", AttentionSequenceMixer: "attention"}
    kinds = [
        names.get(type(block.sequence_mixer))
        for block in blocks
        if isinstance(block, ResidualBlock) and isinstance(block.channel_mixer, SwiGLU)
    ]
    if len(kinds) < len(blocks) or None in kinds or not isinstance(model.norm, eqx.nn.RMSNorm):
        return None
    config = describe_sizes(model) | {"hidden_act": "silu", "rms_norm_eps": model.norm.eps}
    for block in blocks:
        mixer = block.sequence_mixer
        if isinstance(mixer, AttentionSequenceMixer):
            config |= describe_attention(mixer)
        else:
            config |= describe_mamba(mixer)
            config["mamba_expand"] = mixer.out_proj.weight.shape[1] // mixer.in_features
    return config, [str(kind) for kind in kinds]


def attention_of(model: Any) -> Any:
    mixers = (block.sequence_mixer for block in model.backbone.blocks)
    return next((mixer for mixer in mixers if isinstance(mixer, AttentionSequenceMixer)), None)


def tensors(
    model: Any,
    *,
    norm: str,
    channel_norm: str,
    mlp: Callable[[SwiGLU], Tensors],
    mamba: Callable[[Any], Mapping[str, Array | None]] = mixer_tensors,
) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        f"model.{norm}.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, layer = block.sequence_mixer, f"model.layers.{i}."
        found[f"{layer}input_layernorm.weight"] = block.sequence_norm.weight
        found[f"{layer}{channel_norm}.weight"] = block.channel_norm.weight
        if isinstance(mixer, AttentionSequenceMixer):
            found |= prefixed(f"{layer}self_attn.", attention_tensors(mixer))
        else:
            found |= prefixed(f"{layer}mamba.", mamba(mixer))
        found |= prefixed(layer, mlp(block.channel_mixer))
    return found
