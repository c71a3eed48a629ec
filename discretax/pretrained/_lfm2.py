"""`model_type` "lfm2" and "lfm3": layers of a gated short convolution or attention."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, describe_sizes, rms_norm
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    describe_rotary,
    linear_tensors,
    prefixed,
)
from discretax.sequence_mixers import AttentionSequenceMixer, ShortConvSequenceMixer

NO_EFFECT = (
    "attention_dropout",
    "block_mlp_init_scale",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_use_xavier_init",
    "max_position_embeddings",
)
PADDING = 124_893  # LFM3's in transformers, where a file has none
FULL, SLIDING, CONVOLUTION = "full_attention", "sliding_attention", "conv"


def build_lfm2(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    count = config.layers("num_hidden_layers", "model.layers.")
    indices = config.entry("full_attn_idxs", None)
    indices = list(range(count)) if indices is None else indices
    if not isinstance(indices, list):
        raise config.refused("full_attn_idxs", indices, "a list of layers")
    default = [FULL if i in indices else CONVOLUTION for i in range(count)]
    kinds = layer_kinds(config, count, default, (FULL, CONVOLUTION))
    width = config.size("intermediate_size", config.entry("block_ff_dim", 12288))
    config.fixed(block_ff_dim=width)
    if config.flag("block_auto_adjust_ff_dim", True):
        multiple = config.size("block_multiple_of", 256)
        factor = config.number("block_ffn_dim_multiplier", 1.0)
        told: dict[str, float] = {"intermediate_size": width, "block_multiple_of": multiple}
        width = multiple * -(-int(factor * (2 * width // 3)) // multiple)
        told["block_ffn_dim_multiplier"] = factor
        config.fits("feed_forward.w1.weight", 0, width, **told)
    else:
        for name in ("block_multiple_of", "block_ffn_dim_multiplier"):
            config.entry(name, None)
    tied = config.flag("tie_word_embeddings", True)
    if "tie_embedding" in config.entries:
        tied = config.flag("tie_embedding")
    heads = attention(
        config,
        hidden,
        occurs=FULL in kinds,
        out="self_attn.out_proj",
        qk_norm=rms_norm(config.number("norm_eps")),
    )
    # Names of the original code for what stands here under others.
    config.fixed(
        attention_bias=False,
        block_dim=hidden,
        block_norm_eps=config.number("norm_eps"),
        block_use_swiglu=True,
        conv_dim=hidden,
        conv_dim_out=hidden,
        num_heads=config.size("num_attention_heads"),
        use_pos_enc=True,
    )
    return hybrid(config, kinds, width, {FULL: heads}, tied)


def build_lfm3(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embed_tokens.weight", 1))
    count = config.layers("num_hidden_layers", "model.layers.")
    every_fourth = [
        (CONVOLUTION if i == 0 else SLIDING, CONVOLUTION, FULL) for i in range(0, count, 4)
    ]
    default = [kind for start in every_fourth for kind in (*start, CONVOLUTION)][:count]
    kinds = layer_kinds(config, count, default, (FULL, SLIDING, CONVOLUTION))
    ropes = config.entry("rope_parameters")
    known = isinstance(ropes, dict) and all(isinstance(rope, dict) for rope in ropes.values())
    if not known or not set(ropes) <= {FULL, SLIDING}:
        raise config.refused("rope_parameters", ropes, f"an object for each of {FULL}, {SLIDING}")
    occurs = FULL in kinds or SLIDING in kinds
    bias = config.flag("attention_bias", False, of="q_proj.bias" if occurs else None)
    gate = "head" if config.flag("use_attention_gate", True) else None
    window = config.size("sliding_window", 256)
    mixers = {}
    for kind in (FULL, SLIDING):
        mixers[kind] = attention(
            config.with_entries(rope_parameters=ropes.get(kind)),
            hidden,
            occurs=kind in kinds,
            qk_norm=rms_norm(config.number("norm_eps")),
            window=window if kind == SLIDING else None,
            gate=gate,
            use_bias=bias,
            out_bias=bias,
        )
    branch_norm = None
    if config.flag("use_sandwich_norm", True):
        branch_norm = rms_norm(config.number("norm_eps"))
    width = config.size("intermediate_size")
    tied = config.flag("tie_word_embeddings", True)
    return hybrid(config, kinds, width, mixers, tied, branch_norm=branch_norm)


def layer_kinds(
    config: Config, count: int, default: list[str], known: tuple[str, ...]
) -> list[str]:
    kinds = config.entry("layer_types", None)
    kinds = default if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != count or any(k not in known for k in kinds):
        raise config.refused("layer_types", kinds, f"a list of {count} names among {list(known)}")
    name = "layer_types" if "layer_types" in config.entries else "full_attn_idxs"
    tensors = {FULL: "self_attn.", SLIDING: "self_attn.", CONVOLUTION: "conv."}
    config.kinds_fit(name, kinds, tensors)
    return kinds


def hybrid(
    config: Config,
    kinds: list[str],
    width: int,
    mixers: dict[str, Any],
    tied: bool,
    **options: Any,
) -> Callable[[PRNGKeyArray], LanguageModel]:
    config.fits("feed_forward.w1.weight", 0, width, intermediate_size=width)
    if CONVOLUTION in kinds:
        mixers[CONVOLUTION] = ft.partial(
            ShortConvSequenceMixer,
            conv_width=config.size("conv_L_cache", of=("conv.conv.weight", 2)),
            use_bias=config.flag("conv_bias", False, of="conv.conv.bias"),
        )
    norm = rms_norm(config.number("norm_eps"))
    block = ft.partial(
        ResidualBlock,
        channel_mixer=ft.partial(SwiGLU, intermediate_dim=width),
        norm=norm,
        **options,
    )
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embed_tokens.weight", 0)),
        hidden_dim=config.size("hidden_size"),
        num_blocks=len(kinds),
        blocks=[ft.partial(block, sequence_mixer=mixers[kind]) for kind in kinds],
        norm=norm,
        tie_embeddings=tied,
    )
    for name in ("conv_L_cache", "conv_bias"):
        config.entry(name, None)
    config.done(NO_EFFECT)
    return make


def kinds_of(model: Any) -> list[str] | None:
    """What each block is; None for another model."""
    blocks = model.backbone.blocks
    if not isinstance(model.norm, eqx.nn.RMSNorm) or not all(
        isinstance(block, ResidualBlock) and isinstance(block.channel_mixer, SwiGLU)
        for block in blocks
    ):
        return None
    kinds = []
    for mixer in (block.sequence_mixer for block in blocks):
        if isinstance(mixer, ShortConvSequenceMixer):
            kinds.append(CONVOLUTION)
        elif isinstance(mixer, AttentionSequenceMixer) and mixer.q_norm is not None:
            kinds.append(FULL if mixer.window is None else SLIDING)
        else:
            return None
    return kinds if CONVOLUTION in kinds else None


def describe_hybrid(model: Any, kinds: list[str]) -> dict[str, Any]:
    blocks = model.backbone.blocks
    config = describe_sizes(model) | {"norm_eps": model.norm.eps, "layer_types": kinds}
    config["intermediate_size"] = blocks[0].channel_mixer.gate_proj.weight.shape[0]
    for block in blocks:
        mixer = block.sequence_mixer
        if isinstance(mixer, ShortConvSequenceMixer):
            config["conv_L_cache"] = mixer.conv_weight.shape[1]
            config["conv_bias"] = mixer.conv_bias is not None
        else:
            config |= describe_attention(mixer)
    return config


def describe_lfm2(model: Any) -> dict[str, Any] | None:
    kinds = kinds_of(model)
    if kinds is None or model.backbone.blocks[0].sequence_branch_norm is not None:
        return None
    config = describe_hybrid(model, kinds) | {"block_auto_adjust_ff_dim": False}
    if FULL in kinds:
        config |= describe_rotary(model.backbone.blocks[kinds.index(FULL)].sequence_mixer)
    return config


def describe_lfm3(model: Any) -> dict[str, Any] | None:
    kinds = kinds_of(model)
    if kinds is None or model.backbone.blocks[0].sequence_branch_norm is None:
        return None
    config = describe_hybrid(model, kinds) | {"use_sandwich_norm": True, "rope_parameters": {}}
    if config["vocab_size"] <= PADDING:  # transformers refuses what is no token
        config["pad_token_id"] = None
    for kind in (FULL, SLIDING):
        if kind in kinds:
            mixer = model.backbone.blocks[kinds.index(kind)].sequence_mixer
            config["rope_parameters"][kind] = describe_rotary(mixer)["rope_parameters"]
            config["use_attention_gate"] = mixer.gate_proj is not None
            if mixer.window is not None:
                config["sliding_window"] = mixer.window
    return config


def tensors(model: Any, *, q_norm: str, k_norm: str, out: str) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": model.encoder.embedding.weight,
        "model.embedding_norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, channels, layer = block.sequence_mixer, block.channel_mixer, f"model.layers.{i}."
        norms = {
            "operator_norm": block.sequence_norm,
            "ffn_norm": block.channel_norm,
            "post_operator_norm": block.sequence_branch_norm,
            "post_ffn_norm": block.channel_branch_norm,
        }
        for name, norm in norms.items():
            found[f"{layer}{name}.weight"] = None if norm is None else norm.weight
        if isinstance(mixer, AttentionSequenceMixer):
            heads = attention_tensors(mixer, out=out)
            for name, part in {
                q_norm: mixer.q_norm,
                k_norm: mixer.k_norm,
                "gate_proj": mixer.gate_proj,
            }.items():
                heads[f"{name}.weight"] = getattr(part, "weight", None)
            found |= prefixed(f"{layer}self_attn.", heads)
        else:
            layers = {"in_proj": mixer.in_proj, "out_proj": mixer.out_proj}
            found |= prefixed(f"{layer}conv.", linear_tensors(layers))
            found[f"{layer}conv.conv.weight"] = mixer.conv_weight
            found[f"{layer}conv.conv.bias"] = mixer.conv_bias
        maps = {"w1": channels.gate_proj, "w2": channels.down_proj, "w3": channels.up_proj}
        found |= prefixed(f"{layer}feed_forward.", linear_tensors(maps))
    return found


LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    build_lfm2,
    describe_lfm2,
    ft.partial(tensors, q_norm="q_layernorm", k_norm="k_layernorm", out="out_proj"),
)
LFM3 = Family(
    "lfm3",
    "Lfm3ForCausalLM",
    build_lfm3,
    describe_lfm3,
    ft.partial(tensors, q_norm="q_norm", k_norm="k_norm", out="o_proj"),
)
