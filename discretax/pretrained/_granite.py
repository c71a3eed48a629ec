"""`model_type` "granitemoehybrid" (Granite 4) without experts, and "bamba": layers of Mamba-2 or attention."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, describe_sizes, rms_norm, told
from discretax.pretrained._mamba2 import mixer_tensors
from discretax.pretrained._mamba_hybrid import describe_mamba2, mamba2
from discretax.pretrained._stored import Stored
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    describe_rotary,
    mlp_tensors,
    prefixed,
)
from discretax.sequence_mixers import AttentionSequenceMixer, Mamba2SequenceMixer

NO_EFFECT = (
    "attention_dropout",
    "init_method",
    "intermediate_size",  # of the experts
    "logits_to_keep",
    "mamba_chunk_size",
    "max_position_embeddings",
    "num_logits_to_keep",
    "output_router_logits",
    "router_aux_loss_coef",
    "z_loss_coefficient",
)
# Older files have the names behind.
KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
TENSORS = {"mamba": "mamba.", "attention": "self_attn."}
KINDS |= {name: name for name in KINDS.values()}


def build_granite(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    if config.entry("num_local_experts", 0) != 0:
        raise config.refused(
            "num_local_experts",
            config.entry("num_local_experts"),
            "0",
            " Mixtures of experts are not supported.",
        )
    config.fixed(num_experts_per_tok=0, normalization_function="rmsnorm", hidden_act="silu")
    kinds = layer_kinds(config)
    position = config.entry("position_embedding_type", None)
    if position not in (None, "nope", "rope"):
        raise config.refused("position_embedding_type", position, "'rope', 'nope' or null")
    width = config.size("shared_intermediate_size")
    config.fits("shared_mlp.output_linear.weight", 1, width, shared_intermediate_size=width)
    return hybrid(
        config,
        kinds,
        ft.partial(SwiGLU, intermediate_dim=width),
        has_positions=position == "rope",
        scale=config.number("attention_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )


def build_bamba(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    config.fixed(hidden_act="silu", mlp_bias=False)
    indices = config.entry("attn_layer_indices", None) or []
    count = config.layers("num_hidden_layers", "model.layers.")
    known = isinstance(indices, list) and all(i in range(count) for i in indices)
    if not known:
        raise config.refused("attn_layer_indices", indices, f"a list of layers, 0 to {count - 1}")
    kinds = ["attention" if i in indices else "mamba" for i in range(count)]
    config.kinds_fit("attn_layer_indices", kinds, TENSORS)
    width = config.size("intermediate_size", of=("feed_forward.gate_proj.weight", 0))
    return hybrid(config, kinds, ft.partial(SwiGLU, intermediate_dim=width), rotary_fraction=0.5)


def layer_kinds(config: Config) -> list[str]:
    count = config.layers("num_hidden_layers", "model.layers.")
    names = config.entry("layer_types", config.entry("layers_block_type", None))
    known = isinstance(names, list) and all(name in list(KINDS) for name in names)
    if not known or len(names) != count:
        raise config.refused(
            "layer_types", names, f"a list of {count} names, 'linear_attention' or 'full_attention'"
        )
    kinds = [KINDS[name] for name in names]
    config.kinds_fit("layer_types", kinds, TENSORS)
    return kinds


def hybrid(
    config: Config,
    kinds: Sequence[str],
    channel_mixer: Callable[..., SwiGLU],
    *,
    rotary_fraction: float = 1.0,
    has_positions: bool = True,
    scale: float | None = None,
    residual_scale: float = 1.0,
    **options: Any,
) -> Callable[[PRNGKeyArray], LanguageModel]:
    """A block for each of the kinds, of a Mamba-2 or attention and the channel mixer."""
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
        mixers["mamba"] = mamba2(config, hidden, eps=eps)
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
        num_blocks=config.layers("num_hidden_layers", "model.layers."),
        blocks=[ft.partial(block, sequence_mixer=mixers[kind]) for kind in kinds],
        norm=rms_norm(eps),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        **options,
    )
    config.done(NO_EFFECT)
    return make


def describe_hybrid(model: Any) -> tuple[dict[str, Any], list[str]] | None:
    """What the two families have, and the kind of each block; None for other models."""
    blocks = model.backbone.blocks
    names = {Mamba2SequenceMixer: "mamba", AttentionSequenceMixer: "attention"}
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
            config |= describe_mamba2(mixer)
            config["mamba_expand"] = mixer.out_proj.weight.shape[1] // mixer.in_features
    return config, [str(kind) for kind in kinds]


def attention_of(model: Any) -> Any:
    mixers = (block.sequence_mixer for block in model.backbone.blocks)
    return next((mixer for mixer in mixers if isinstance(mixer, AttentionSequenceMixer)), None)


def describe_granite(model: Any) -> dict[str, Any] | None:
    found = describe_hybrid(model)
    heads = attention_of(model)
    if found is None or heads is None or heads.rotary_dim not in (0, heads.head_dim):
        return None
    config, kinds = found
    block = model.backbone.blocks[0]
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    rotary = describe_rotary(heads) if heads.rotary_dim else {}
    return (
        config
        | rotary
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": block.channel_mixer.gate_proj.weight.shape[0],
            "layer_types": [names[kind] for kind in kinds],
            "position_embedding_type": "rope" if heads.rotary_dim else "nope",
            "attention_multiplier": heads.scale,
            "residual_multiplier": block.residual_scale,
            "embedding_multiplier": model.embedding_scale,
            "logits_scaling": told(model.head.scale, lambda s: 1 / s, 1 / model.head.scale),
        }
    )


def describe_bamba(model: Any) -> dict[str, Any] | None:
    found = describe_hybrid(model)
    heads = attention_of(model)
    if found is None or heads is None or heads.scale != heads.head_dim**-0.5:
        return None
    config, kinds = found
    return (
        config
        | describe_rotary(heads, rotary_fraction=None)
        | {
            "intermediate_size": model.backbone.blocks[0].channel_mixer.gate_proj.weight.shape[0],
            "mlp_bias": False,
            "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"],
        }
    )


def tensors(
    model: Any, *, norm: str, channel_norm: str, mlp: Callable[[SwiGLU], Tensors]
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
            found |= prefixed(f"{layer}mamba.", mixer_tensors(mixer))
        found |= prefixed(layer, mlp(block.channel_mixer))
    return found


def joined_mlp(mixer: SwiGLU) -> Tensors:
    return {
        "shared_mlp.input_linear.weight": Stored((mixer.gate_proj.weight, mixer.up_proj.weight)),
        "shared_mlp.output_linear.weight": mixer.down_proj.weight,
    }


GRANITE = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    build_granite,
    describe_granite,
    ft.partial(tensors, norm="norm", channel_norm="post_attention_layernorm", mlp=joined_mlp),
)
BAMBA = Family(
    "bamba",
    "BambaForCausalLM",
    build_bamba,
    describe_bamba,
    ft.partial(
        tensors,
        norm="final_layernorm",
        channel_norm="pre_ff_layernorm",
        mlp=lambda mixer: prefixed("feed_forward.", mlp_tensors(mixer)),
    ),
)
