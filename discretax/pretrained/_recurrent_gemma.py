"""`model_type` "recurrent_gemma": Griffin."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import OffsetRMSNorm, ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, describe_sizes
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    describe_rotary,
    linear_tensors,
    mlp_tensors,
    prefixed,
)
from discretax.sequence_mixers import AttentionSequenceMixer, GriffinSequenceMixer

NO_EFFECT = ("final_w_init_variance_scale", "w_init_variance_scale")
BLOCK_TYPES = {"recurrent": GriffinSequenceMixer, "attention": AttentionSequenceMixer}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    num_blocks = config.layers("num_hidden_layers", "model.layers.")
    kinds = block_types(config)
    config.fixed(
        attention_dropout=0.0,
        embeddings_scale_by_sqrt_dim=True,
        hidden_activation="gelu_pytorch_tanh",
        rope_scaling=None,
    )
    num_heads = config.size("num_attention_heads")
    # A kind of block that does not occur has no tensors.
    occurring = kinds[:num_blocks]
    mixers = {
        "recurrent": recurrent_mixer(config, hidden, num_heads, "recurrent" in occurring),
        "attention": attention_mixer(config, hidden, num_heads, "attention" in occurring),
    }
    both_branches = config.size("intermediate_size")
    if both_branches % 2:
        raise config.refused(
            "intermediate_size", both_branches, "even, twice the width of each branch of the MLP"
        )
    width = both_branches // 2
    config.fits("gate_proj.weight", 0, width, intermediate_size=both_branches)
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=hidden,
        num_blocks=num_blocks,
        pattern=[mixers[kind] for kind in kinds],
        channel_mixer=ft.partial(
            SwiGLU, intermediate_dim=width, use_bias=True, non_linearity="gelu"
        ),
        norm=ft.partial(OffsetRMSNorm, eps=config.number("rms_norm_eps")),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        # The original keeps it in bfloat16: 50.5, not 50.596, for a width of 2560.
        embedding_scale=float(np.asarray(hidden**0.5).astype(jnp.bfloat16)),
        soft_cap=config.number("logits_soft_cap"),
    )
    config.done(NO_EFFECT)
    return make


def block_types(config: Config) -> list[str]:
    default = config.entry("_block_types", ["recurrent", "recurrent", "attention"])
    name = "block_types" if "block_types" in config.entries else "_block_types"
    kinds = config.entry("block_types", default)
    known = isinstance(kinds, list) and all(kind in list(BLOCK_TYPES) for kind in kinds)
    if not known or not kinds:
        raise config.refused(name, kinds, f"a list of names among {list(BLOCK_TYPES)}")
    config.fixed(_block_types=kinds)  # they must agree if both are there
    return kinds


def recurrent_mixer(
    config: Config, hidden: int, num_heads: int, occurs: bool
) -> Callable[..., GriffinSequenceMixer]:
    lru_width = config.size("lru_width", hidden)
    conv_width = config.size("conv1d_width", 4)
    if occurs:
        gates = "rg_lru.recurrent_gate_weight"
        config.fits(gates, 0, num_heads, num_attention_heads=num_heads)
        config.fits("rg_lru.recurrent_param", 0, lru_width, lru_width=lru_width)
        config.fits("conv_1d.weight", 2, conv_width, conv1d_width=conv_width)
        if lru_width % num_heads:
            rule = f"a divisor of lru_width={lru_width}"
            raise config.refused("num_attention_heads", num_heads, rule)
    return ft.partial(
        GriffinSequenceMixer, lru_width=lru_width, num_heads=num_heads, conv_width=conv_width
    )


def attention_mixer(
    config: Config, hidden: int, num_heads: int, occurs: bool
) -> Callable[..., AttentionSequenceMixer]:
    return attention(
        config,
        hidden,
        occurs=occurs,
        out="o_proj",
        rotary_fraction=0.5,
        rotary_base=10_000.0,
        rope_types=("default",),
        window=config.size("attention_window_size", 2048),
        use_bias=config.flag("attention_bias", False, of="q_proj.bias" if occurs else None),
        out_bias=True,
    )


def describe(model: Any) -> dict[str, Any] | None:
    blocks = model.backbone.blocks
    if not isinstance(model.norm, OffsetRMSNorm):
        return None
    kinds = [
        kind
        for block in blocks
        for kind, mixer in BLOCK_TYPES.items()
        if isinstance(block, ResidualBlock)
        and isinstance(block.sequence_mixer, mixer)
        and isinstance(block.channel_mixer, SwiGLU)
    ]
    if len(kinds) < len(blocks):
        return None
    config = describe_sizes(model) | {
        "block_types": kinds,
        "intermediate_size": 2 * blocks[0].channel_mixer.gate_proj.weight.shape[0],
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": model.norm.eps,
        "logits_soft_cap": model.head.soft_cap,
    }
    for mixer in (block.sequence_mixer for block in blocks):
        config |= describe_mixer(mixer)
    return config


def describe_mixer(mixer: Any) -> dict[str, Any]:
    if isinstance(mixer, GriffinSequenceMixer):
        lru_width, conv_width = mixer.conv_weight.shape
        return {
            "num_attention_heads": mixer.rg_lru.a_weight.shape[0],
            "lru_width": lru_width,
            "conv1d_width": conv_width,
        }
    return {
        **describe_attention(mixer),
        **describe_rotary(mixer, rotary_fraction=None),
        "attention_window_size": mixer.window,
    }


def tensors(model: Any) -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        "model.final_norm.weight": model.norm.offset,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer = block.sequence_mixer
        is_recurrent = isinstance(mixer, GriffinSequenceMixer)
        of_mixer = recurrent_tensors(mixer) if is_recurrent else attention_tensors(mixer)
        layer = f"model.layers.{i}."
        tensors[f"{layer}temporal_pre_norm.weight"] = block.sequence_norm.offset
        tensors[f"{layer}channel_pre_norm.weight"] = block.channel_norm.offset
        tensors |= prefixed(f"{layer}mlp_block.", mlp_tensors(block.channel_mixer))
        tensors |= prefixed(f"{layer}temporal_block.", of_mixer)
    return tensors


def recurrent_tensors(mixer: GriffinSequenceMixer) -> Tensors:
    return {
        **linear_tensors(
            {name: getattr(mixer, name) for name in ("linear_x", "linear_y", "linear_out")}
        ),
        "conv_1d.weight": mixer.conv_weight,
        "conv_1d.bias": mixer.conv_bias,
        "rg_lru.recurrent_param": mixer.rg_lru.Lambda,
        "rg_lru.recurrent_gate_weight": mixer.rg_lru.a_weight,
        "rg_lru.recurrent_gate_bias": mixer.rg_lru.a_bias,
        "rg_lru.input_gate_weight": mixer.rg_lru.input_weight,
        "rg_lru.input_gate_bias": mixer.rg_lru.input_bias,
    }


RECURRENT_GEMMA = Family("recurrent_gemma", "RecurrentGemmaForCausalLM", build, describe, tensors)
