"""`model_type` "olmo_hybrid": layers of Gated DeltaNet, normalised before, or attention, normalised after."""

import functools as ft
import re
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.pretrained._delta_hybrid import (
    FULL,
    LINEAR,
    describe_hybrid,
    gated_delta_net,
    layer_kinds,
    mixer_of,
)
from discretax.pretrained._family import Config, Family, renamed, rms_norm
from discretax.pretrained._stored import Rows, Stored
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_rotary,
    linear_tensors,
    mlp,
    mlp_tensors,
    prefixed,
)
from discretax.sequence_mixers import AttentionSequenceMixer, GatedDeltaNetSequenceMixer

NO_EFFECT = (
    "attention_dropout",
    "max_position_embeddings",
    # Of the weights before training.
    "linear_a_log_max",
    "linear_a_log_min",
    "linear_dt_init_floor",
    "linear_dt_max",
    "linear_dt_min",
)
PADDING = 100277
# Published files and transformers call the same norms otherwise.
LINEAR_NORMS = {
    "input_layernorm.weight": "attention_layer_norm.weight",
    "post_attention_layernorm.weight": "feedforward_layer_norm.weight",
}
ATTENTION_NORMS = {"feedforward_layer_norm.weight": "post_attention_layernorm.weight"}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    kinds = layer_kinds(config)
    config.fixed(linear_use_gate=True)
    norm = rms_norm(config.number("rms_norm_eps"))
    bias = config.flag("attention_bias", False, of="q_proj.bias" if FULL in kinds else None)
    block = ft.partial(ResidualBlock, channel_mixer=mlp(config, "mlp.gate_proj.weight"))
    blocks = {
        LINEAR: ft.partial(
            block,
            sequence_mixer=gated_delta_net(
                config,
                LINEAR in kinds,
                rows=("q_proj.weight", 1),
                conv="q_conv1d.weight",
                norm="o_norm.weight",
                negative_eigenvalues=config.flag("linear_allow_neg_eigval", True),
                norm_eps=1e-5,  # whatever that of the others is
            ),
            norm=norm,
        ),
        FULL: ft.partial(
            block,
            sequence_mixer=attention(
                config,
                hidden,
                occurs=FULL in kinds,
                has_positions=has_positions(config),
                qk_norm=norm,
                norm_over="all",
                use_bias=bias,
                out_bias=bias,
            ),
            norm=None,
            branch_norm=norm,
        ),
    }
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=hidden,
        num_blocks=len(kinds),
        blocks=[blocks[kind] for kind in kinds],
        norm=norm,
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )
    config.done(NO_EFFECT)
    return make


def has_positions(config: Config) -> bool:
    """Files of a model without say so by a `rope_theta` of null."""
    rope = config.entries.get("rope_parameters")
    entries = config.entries if rope is None else rope
    return not isinstance(entries, dict) or entries.get("rope_theta", 0) is not None


def describe(model: Any) -> dict[str, Any] | None:
    config = describe_hybrid(model) if isinstance(model.norm, eqx.nn.RMSNorm) else None
    if config is None:
        return None
    heads = mixer_of(model, FULL)
    rope: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    # What transformers takes for it is no token of a small vocabulary, and refused there.
    padding = {"pad_token_id": None} if config["vocab_size"] <= PADDING else {}
    return (
        config
        | padding
        | (describe_rotary(heads) if heads.rotary_dim else rope)
        | {"linear_allow_neg_eigval": mixer_of(model, LINEAR).negative_eigenvalues}
    )


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, layer = block.sequence_mixer, f"model.layers.{i}."
        found |= prefixed(f"{layer}mlp.", mlp_tensors(block.channel_mixer))
        if isinstance(mixer, AttentionSequenceMixer):
            norms = {
                "post_attention_layernorm": block.sequence_branch_norm,
                "post_feedforward_layernorm": block.channel_branch_norm,
            }
            found |= prefixed(f"{layer}self_attn.", normed_attention_tensors(mixer))
        else:
            norms = {
                "attention_layer_norm": block.sequence_norm,
                "feedforward_layer_norm": block.channel_norm,
            }
            found |= prefixed(f"{layer}linear_attn.", gated_delta_net_tensors(mixer))
        found |= {f"{layer}{name}.weight": norm.weight for name, norm in norms.items()}
    return found


def normed_attention_tensors(mixer: Any) -> Tensors:
    norms = {"q_norm.weight": mixer.q_norm.weight, "k_norm.weight": mixer.k_norm.weight}
    return attention_tensors(mixer) | norms


def gated_delta_net_tensors(mixer: GatedDeltaNetSequenceMixer) -> Tensors:
    projections, output = mixer.projections, mixer.output
    layers: dict[str, Any] = {
        "q_proj": projections.q_proj,
        "k_proj": projections.k_proj,
        "v_proj": projections.v_proj,
        "g_proj": output.gate_proj,
        "b_proj": mixer.beta_proj,
        "a_proj": mixer.decay_proj,
        "o_proj": output.out_proj,
    }
    keys = projections.key_heads * projections.key_dim
    values = projections.value_heads * projections.value_dim
    filters = ft.partial(Rows, projections.conv_weight)
    return {
        **linear_tensors(layers),
        "q_conv1d.weight": Stored((filters(0, keys),)),
        "k_conv1d.weight": Stored((filters(keys, 2 * keys),)),
        "v_conv1d.weight": Stored((filters(2 * keys, 2 * keys + values),)),
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "o_norm.weight": output.norm_weight,
    }


def names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    linear = {name.split("linear_attn.")[0] for name in names if ".linear_attn." in name}

    def new(name: str) -> str:
        layer = re.match(r"model\.layers\.\d+\.", name)
        start = "" if layer is None else layer[0]
        end = name[len(start) :]
        norms = LINEAR_NORMS if start in linear else ATTENTION_NORMS
        return start + norms.get(end, end)

    return renamed(names, new)


OLMO_HYBRID = Family("olmo_hybrid", "OlmoHybridForCausalLM", build, describe, tensors, names)
