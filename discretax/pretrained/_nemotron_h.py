"""`model_type` "nemotron_h" without experts: every block a Mamba-2, attention or an MLP alone."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import StandardBlock
from discretax.channel_mixers import IdentityChannelMixer, MLPChannelMixer
from discretax.pretrained._family import (
    Config,
    Family,
    describe_residual_stream,
    describe_sizes,
    residual_stream,
    rms_norm,
)
from discretax.pretrained._mamba2 import Names, describe_mamba2, mamba2_of, mixer_tensors
from discretax.pretrained._transformer import (
    Tensors,
    attention,
    attention_tensors,
    describe_attention,
    linear_tensors,
    prefixed,
)
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    IdentitySequenceMixer,
    Mamba2SequenceMixer,
)

NO_EFFECT = (
    # About training, and about how the same numbers are computed.
    "attention_dropout",
    "chunk_size",
    "hidden_dropout",
    "mamba_ssm_cache_dtype",
    "max_position_embeddings",
    "num_logits_to_keep",
    "output_router_logits",
    "rescale_prenorm_residual",
    "use_mamba_kernels",
    # Of the steps before training. transformers raises those below `time_step_min` to it when it
    # reads a whole text, but not when it generates; the model was trained without that.
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    # The inner width is what the heads are together.
    "expand",
    # Of experts, and of layers that predict several tokens, where there are any.
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "topk_group",
)
MAMBA, ATTENTION, MLP, EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": EXPERTS}
# Older files have the names behind.
KINDS = {kind: kind for kind in LETTERS.values()} | {"mamba": MAMBA, "attention": ATTENTION}
TENSORS = {MAMBA: "mixer.A_log", ATTENTION: "mixer.q_proj.", MLP: "mixer.up_proj."}
LAYERS, PATTERN = "layers_block_type", "hybrid_override_pattern"
NAMES = Names("ssm_state_size", num_heads="mamba_num_heads", head_dim="mamba_head_dim")


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden = config.size("hidden_size", of=("embeddings.weight", 1))
    kinds = layer_kinds(config)
    eps = config.number("layer_norm_epsilon")
    # What is redundant must agree.
    config.fixed(
        attention_bias=False,
        hidden_act="relu2",
        mamba_hidden_act="silu",
        mamba_proj_bias=False,
        mlp_hidden_act="relu2",
        norm_eps=eps,
        num_nextn_predict_layers=0,
        rms_norm_eps=eps,
        sliding_window=None,
    )
    name = "head_dim" if "head_dim" in config.entries else "attention_head_dim"
    head_dim = config.size(name, 128)
    config.fixed(attention_head_dim=head_dim)
    mixers: dict[str, dict[str, Any]] = {
        ATTENTION: {
            "sequence_mixer": attention(
                config.with_entries(head_dim=head_dim),
                hidden,
                occurs=ATTENTION in kinds,
                out="mixer.o_proj",
                has_positions=False,
            )
        }
    }
    if MAMBA in kinds:
        mixers[MAMBA] = {"sequence_mixer": mamba2(config, eps)}
    if MLP in kinds:
        mixers[MLP] = {"sequence_mixer": IdentitySequenceMixer, "channel_mixer": mlp(config)}
    block = ft.partial(
        StandardBlock,
        channel_mixer=IdentityChannelMixer,
        norm=rms_norm(eps),
        activation=None,
        drop_rate=0.0,
    )
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embeddings.weight", 0)),
        hidden_dim=hidden,
        num_blocks=len(kinds),
        blocks=[ft.partial(block, **mixers[kind]) for kind in kinds],
        norm=rms_norm(eps),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        **residual_stream(config, "embeddings.weight", default=False),
    )
    absent = () if MAMBA in kinds else NAMES[:-1]
    absent = absent if MLP in kinds else (*absent, "intermediate_size", "mlp_bias")
    config.done((*NO_EFFECT, *absent))
    return make


def layer_kinds(config: Config) -> list[str]:
    """By a list of names or by a word of letters; if both are there, they must agree."""
    name = next((n for n in (LAYERS, "layer_types", PATTERN) if n in config.entries), LAYERS)
    given = config.entry(name, None)
    known = LETTERS if name == PATTERN else KINDS
    listed = list(given) if name == PATTERN and isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or any(k not in list(known) for k in listed):
        kind = "a word of the letters" if name == PATTERN else "a list of names among"
        raise config.refused(name, given, f"{kind} {', '.join(known)}")
    kinds = [known[kind] for kind in listed]
    if EXPERTS in kinds:
        rule = f"without {next(k for k in listed if known[k] == EXPERTS)!r}"
        raise config.refused(name, given, rule, " Mixtures of experts are not supported.")
    config.kinds_fit(name, kinds, TENSORS, "backbone.layers.")
    letters = {kind: letter for letter, kind in LETTERS.items()}
    config.fixed(num_hidden_layers=len(kinds))
    config.fixed(**{PATTERN: "".join(letters[kind] for kind in kinds), "layer_types": given})
    return kinds


def mamba2(config: Config, eps: float) -> Callable[..., Mamba2SequenceMixer]:
    num_heads = config.size(NAMES.num_heads, of=("mixer.A_log", 0))
    head_dim = config.size(NAMES.head_dim)
    sizes, inner = {NAMES.num_heads: num_heads, NAMES.head_dim: head_dim}, num_heads * head_dim
    config.fits("mixer.norm.weight", 0, inner, **sizes)
    return mamba2_of(config, num_heads, head_dim, NAMES, inner_dim=inner, norm_eps=eps)


def mlp(config: Config) -> Callable[..., MLPChannelMixer]:
    return ft.partial(
        MLPChannelMixer,
        intermediate_dim=config.size("intermediate_size", of=("mixer.up_proj.weight", 0)),
        use_bias=config.flag("mlp_bias", False, of="mixer.up_proj.bias"),
        non_linearity="relu2",
    )


def kind_of(block: Any) -> str | None:
    if not isinstance(block, StandardBlock):
        return None
    kinds: dict[type, str] = {Mamba2SequenceMixer: MAMBA, AttentionSequenceMixer: ATTENTION}
    if isinstance(block.channel_mixer, MLPChannelMixer):
        kinds = {IdentitySequenceMixer: MLP}
    return kinds.get(type(block.sequence_mixer))


def describe(model: Any) -> dict[str, Any] | None:
    """None for a Mamba-2, too, of whose blocks all are alike."""
    blocks = model.backbone.blocks
    kinds = [kind_of(block) for block in blocks]
    if None in kinds or set(kinds) == {MAMBA} or not isinstance(model.norm, eqx.nn.RMSNorm):
        return None
    config = describe_sizes(model) | describe_residual_stream(model, default=False)
    config |= {"layer_norm_epsilon": model.norm.eps, LAYERS: kinds}
    for kind, block in zip(kinds, blocks, strict=True):
        if kind == MAMBA:
            config |= describe_mamba2(block.sequence_mixer, NAMES)
        elif kind == ATTENTION:
            config |= describe_attention(block.sequence_mixer)
        elif block.channel_mixer.down_proj is not None:
            config["intermediate_size"] = block.channel_mixer.linear.weight.shape[0]
            config["mlp_bias"] = block.channel_mixer.linear.bias is not None
    return config


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "backbone.embeddings.weight": model.encoder.embedding.weight,
        "backbone.norm_f.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        kind, layer = kind_of(block), f"backbone.layers.{i}."
        found[f"{layer}norm.weight"] = block.norm.weight
        mixer = block.sequence_mixer
        if kind == MAMBA:
            of_mixer = mixer_tensors(mixer)
        elif kind == ATTENTION:
            of_mixer = attention_tensors(mixer)
        else:
            channels = block.channel_mixer
            of_mixer = linear_tensors({"up_proj": channels.linear, "down_proj": channels.down_proj})
        found |= prefixed(f"{layer}mixer.", of_mixer)
    return found


NEMOTRON_H = Family("nemotron_h", "NemotronHForCausalLM", build, describe, tensors)
