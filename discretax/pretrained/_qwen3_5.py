"""`model_type` "qwen3_5_text", and "qwen3_5", whose text part it is: layers of Gated DeltaNet or gated attention."""

import functools as ft
from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import OffsetRMSNorm, ResidualBlock
from discretax.pretrained._delta_hybrid import (
    FULL,
    LINEAR,
    describe_hybrid,
    gated_delta_net,
    layer_kinds,
    mixer_of,
)
from discretax.pretrained._family import Config, Family, renamed
from discretax.pretrained._stored import Stored
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
    "mamba_ssm_dtype",
    "max_position_embeddings",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
)
# Of what is skipped, and which tokens stand for it.
OF_OTHER_PARTS = (
    "image_token_id",
    "language_model_only",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
)
# Positions of text are the same in all three sections.
SECTIONS = ("mrope_interleaved", "mrope_section")
# Heads that predict several tokens, and the tower of images and videos.
SKIPPED = ("mtp.", "model.visual.")
TEXT = "model.language_model."


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    kinds = layer_kinds(config, config.size("full_attention_interval", 4))
    config.fixed(
        attention_bias=False, attn_output_gate=True, mlp_only_layers=[], output_gate_type="swish"
    )
    eps = config.number("rms_norm_eps")
    norm = ft.partial(OffsetRMSNorm, eps=eps)
    mixers = {
        LINEAR: gated_delta_net(
            config,
            LINEAR in kinds,
            rows=("in_proj_qkv.weight", 2),
            conv="conv1d.weight",
            norm="norm.weight",
            norm_eps=eps,
        ),
        FULL: attention(
            config,
            hidden,
            occurs=FULL in kinds,
            rotary_fraction=config.number("partial_rotary_factor", 0.25),
            no_effect=SECTIONS,
            qk_norm=norm,
            gate="element",
        ),
    }
    block = ft.partial(ResidualBlock, channel_mixer=mlp(config, "mlp.gate_proj.weight"), norm=norm)
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=hidden,
        num_blocks=len(kinds),
        blocks=[ft.partial(block, sequence_mixer=mixers[kind]) for kind in kinds],
        norm=norm,
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )
    config.done(NO_EFFECT)
    return make


def build_multimodal(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    """The text part of it."""
    entries = config.entry("text_config")
    if not isinstance(entries, dict):
        raise config.refused("text_config", entries, "an object, which says what the text part is")
    if config.shapes == {}:
        raise ValueError(
            f"{config.where} is of a model with a text part, but there is no tensor whose name "
            f"begins with {TEXT!r}."
        )
    tied = config.flag("tie_word_embeddings", entries.get("tie_word_embeddings", False))
    where = f"{config.where}, text_config"
    text = Config({"tie_word_embeddings": tied} | entries, where, *config.context)
    text.fixed(model_type="qwen3_5_text", tie_word_embeddings=tied)
    config.done(OF_OTHER_PARTS)
    return build(text)


def describe(model: Any) -> dict[str, Any] | None:
    config = describe_hybrid(model) if isinstance(model.norm, OffsetRMSNorm) else None
    if config is None:
        return None
    return config | describe_rotary(mixer_of(model, FULL), rotary_fraction=None)


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        "model.norm.weight": model.norm.offset,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, layer = block.sequence_mixer, f"model.layers.{i}."
        found[f"{layer}input_layernorm.weight"] = block.sequence_norm.offset
        found[f"{layer}post_attention_layernorm.weight"] = block.channel_norm.offset
        found |= prefixed(f"{layer}mlp.", mlp_tensors(block.channel_mixer))
        if isinstance(mixer, AttentionSequenceMixer):
            found |= prefixed(f"{layer}self_attn.", gated_attention_tensors(mixer))
        else:
            found |= prefixed(f"{layer}linear_attn.", gated_delta_net_tensors(mixer))
    return found


def gated_attention_tensors(mixer: Any) -> Tensors:
    """Each head's gate lies behind its query."""
    parts = (mixer.q_proj.weight, mixer.gate_proj.weight)
    return {
        **attention_tensors(mixer),
        "q_proj.weight": Stored(parts, groups=mixer.num_heads),
        "q_norm.weight": mixer.q_norm.offset,
        "k_norm.weight": mixer.k_norm.offset,
    }


def gated_delta_net_tensors(mixer: GatedDeltaNetSequenceMixer) -> Tensors:
    projections, output = mixer.projections, mixer.output
    q, k, v = projections.q_proj, projections.k_proj, projections.v_proj
    layers: dict[str, Any] = {
        "in_proj_z": output.gate_proj,
        "in_proj_b": mixer.beta_proj,
        "in_proj_a": mixer.decay_proj,
        "out_proj": output.out_proj,
    }
    return {
        **linear_tensors(layers),
        "in_proj_qkv.weight": Stored((q.weight, k.weight, v.weight)),
        "conv1d.weight": projections.conv_weight,
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "norm.weight": output.norm_weight,
    }


def names_of_text(names: Iterable[str]) -> dict[str, str]:
    """The heads that predict several tokens are skipped."""
    return {name: name for name in names if not name.startswith("mtp.")}


def names_of_multimodal(names: Iterable[str]) -> dict[str, str]:
    """Those of the text part are as if there were no other part; none if it is not there."""
    kept = [name for name in names if not name.startswith(SKIPPED)]
    if not any(name.startswith(TEXT) for name in kept):
        return {}
    return renamed(kept, lambda name: name.replace(TEXT, "model.", 1))


QWEN3_5_TEXT = Family("qwen3_5_text", "Qwen3_5ForCausalLM", build, describe, tensors, names_of_text)
# Of a model that has been loaded, the text part alone can be saved.
QWEN3_5 = Family(
    "qwen3_5",
    "Qwen3_5ForConditionalGeneration",
    build_multimodal,
    describe,
    tensors,
    names_of_multimodal,
)
