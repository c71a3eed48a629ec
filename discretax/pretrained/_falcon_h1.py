"""`model_type` "falcon_h1": a Mamba-2 and attention side by side in every block."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, describe_sizes, rms_norm, told
from discretax.pretrained._mamba2 import mixer_tensors
from discretax.pretrained._mamba_hybrid import describe_mixer, mamba2
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    describe_rotary,
    mlp,
    mlp_tensors,
    prefixed,
)
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    Mamba2SequenceMixer,
    SumSequenceMixer,
)

NO_EFFECT = (
    "attention_dropout",
    "mamba_chunk_size",
    "mamba_use_mlp",
    "max_position_embeddings",
    "num_logits_to_keep",
)


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    num_blocks = config.layers("num_hidden_layers", "model.layers.")
    eps = config.number("rms_norm_eps")
    config.fixed(attn_layer_indices=None)
    head_dim = config.size("head_dim", max(1, hidden // config.size("num_attention_heads")))
    has_norm = config.flag("mamba_rms_norm", of="mamba.norm.weight")
    norm_first = config.flag("mamba_norm_before_gate")
    gate_norm = ("before" if norm_first else "after") if has_norm else None
    mamba = mamba2(
        config,
        hidden,
        eps=eps,
        inner="mamba_d_ssm",
        gate_norm=gate_norm,
        scales=config.numbers("ssm_multipliers", 5, [1.0] * 5),
        out_bias=config.flag("projectors_bias", of="mamba.out_proj.bias"),
    )
    has_bias = config.flag("attention_bias", of="q_proj.bias")
    heads = attention(
        config,
        hidden,
        occurs=True,
        scale=config.number("key_multiplier", 1.0) * head_dim**-0.5,
        use_bias=has_bias,
        out_bias=has_bias,
    )
    gate_scale, out_scale = config.numbers("mlp_multipliers", 2, [1.0] * 2)
    channel_mixer = mlp(
        config,
        "feed_forward.gate_proj.weight",
        use_bias=config.flag("mlp_bias", of="feed_forward.gate_proj.bias"),
        gate_scale=gate_scale,
        out_scale=out_scale,
    )
    scale = lambda *names: tuple(config.number(f"{name}_multiplier", 1.0) for name in names)
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=hidden,
        num_blocks=num_blocks,
        pattern=(
            ft.partial(
                SumSequenceMixer,
                mixers=(mamba, heads),
                in_scales=scale("ssm_in", "attention_in"),
                out_scales=scale("ssm_out", "attention_out"),
            ),
        ),
        channel_mixer=channel_mixer,
        norm=rms_norm(eps),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=config.number("lm_head_multiplier", 1.0),
    )
    config.done(NO_EFFECT)
    return make


def describe(model: Any) -> dict[str, Any] | None:
    block = model.backbone.blocks[0]
    if not isinstance(block, ResidualBlock) or not isinstance(model.norm, eqx.nn.RMSNorm):
        return None
    mixer = block.sequence_mixer
    if not isinstance(mixer, SumSequenceMixer) or not isinstance(block.channel_mixer, SwiGLU):
        return None
    if [type(each) for each in mixer.mixers] != [Mamba2SequenceMixer, AttentionSequenceMixer]:
        return None
    return (
        describe_sizes(model)
        | describe_block(block)
        | {
            "rms_norm_eps": model.norm.eps,
            "embedding_multiplier": model.embedding_scale,
            "lm_head_multiplier": model.head.scale,
        }
    )


def describe_block(block: Any) -> dict[str, Any]:
    mixer, channels = block.sequence_mixer, block.channel_mixer
    mamba, heads = mixer.mixers
    root = heads.head_dim**-0.5
    ssm_in, attention_in = mixer.in_scales
    ssm_out, attention_out = mixer.out_scales
    return {
        **describe_mixer(mamba),
        "mamba_d_ssm": mamba.out_proj.weight.shape[1],
        "mamba_rms_norm": mamba.gate_norm is not None,
        "mamba_norm_before_gate": mamba.gate_norm == "before",
        "projectors_bias": mamba.out_proj.bias is not None,
        **describe_attention(heads),
        **describe_rotary(heads),
        "intermediate_size": channels.gate_proj.weight.shape[0],
        "hidden_act": "silu",
        "mlp_bias": channels.gate_proj.bias is not None,
        "key_multiplier": told(heads.scale, lambda m: m * root, heads.scale / root),
        "mlp_multipliers": [channels.gate_scale, channels.out_scale],
        "ssm_multipliers": list(mamba.scales),
        "ssm_in_multiplier": ssm_in,
        "ssm_out_multiplier": ssm_out,
        "attention_in_multiplier": attention_in,
        "attention_out_multiplier": attention_out,
    }


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        "model.final_layernorm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mamba, heads = block.sequence_mixer.mixers
        layer = f"model.layers.{i}."
        found[f"{layer}input_layernorm.weight"] = block.sequence_norm.weight
        found[f"{layer}pre_ff_layernorm.weight"] = block.channel_norm.weight
        found |= prefixed(f"{layer}mamba.", mixer_tensors(mamba))
        found |= prefixed(f"{layer}self_attn.", attention_tensors(heads))
        found |= prefixed(f"{layer}feed_forward.", mlp_tensors(block.channel_mixer))
    return found


FALCON_H1 = Family("falcon_h1", "FalconH1ForCausalLM", build, describe, tensors)
