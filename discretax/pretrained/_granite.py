"""`model_type` "granitemoehybrid" (Granite 4) without experts, and "bamba": layers of Mamba-2 or attention."""

import functools as ft
from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, told
from discretax.pretrained._mamba_hybrid import (
    TENSORS,
    attention_of,
    describe_hybrid,
    hybrid,
    tensors,
)
from discretax.pretrained._stored import Stored
from discretax.pretrained._transformer import Tensors, describe_rotary, mlp_tensors, prefixed

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
    "use_mamba_kernels",
    "z_loss_coefficient",
)
# Older files have the names behind.
KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
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
        no_effect=NO_EFFECT,
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
    channel_mixer = ft.partial(SwiGLU, intermediate_dim=width)
    features = config.size("hidden_size") // config.size("num_attention_heads")
    config.fixed(attn_rotary_emb=config.size("head_dim", max(1, features)) // 2)
    return hybrid(config, kinds, channel_mixer, no_effect=NO_EFFECT, rotary_fraction=0.5)


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
