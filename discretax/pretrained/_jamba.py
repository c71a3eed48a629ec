"""`model_type` "jamba" without experts: layers of Mamba, with norms inside, or attention."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family
from discretax.pretrained._mamba import mixer_tensors
from discretax.pretrained._mamba_hybrid import TENSORS, describe_hybrid, hybrid, tensors
from discretax.pretrained._transformer import mlp_tensors, prefixed
from discretax.sequence_mixers import MambaSequenceMixer

NO_EFFECT = (
    "attention_dropout",
    "max_position_embeddings",
    "num_logits_to_keep",
    "output_router_logits",
    "router_aux_loss_coef",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
    # Of experts, where there are any.
    "expert_layer_offset",
    "expert_layer_period",
    "num_experts_per_tok",
)
OF_MAMBA = ("mamba_conv_bias", "mamba_d_conv", "mamba_d_state", "mamba_dt_rank", "mamba_expand")


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    experts = config.entry("num_experts", 16)
    if experts != 1 or isinstance(experts, bool):
        why = " Mixtures of experts are not supported."
        raise config.refused("num_experts", experts, "1", why)
    config.fixed(hidden_act="silu", sliding_window=None)
    kinds = layer_kinds(config)
    width = config.size("intermediate_size", of=("feed_forward.gate_proj.weight", 0))
    return hybrid(
        config,
        kinds,
        ft.partial(SwiGLU, intermediate_dim=width),
        no_effect=NO_EFFECT if "mamba" in kinds else (*NO_EFFECT, *OF_MAMBA, "mamba_proj_bias"),
        mamba=mamba,
        has_positions=False,
    )


def layer_kinds(config: Config) -> list[str]:
    """Attention is in every so many layers, from a first one on."""
    count = config.layers("num_hidden_layers", "model.layers.")
    period, offset = config.size("attn_layer_period", 8), config.entry("attn_layer_offset", 4)
    is_whole = isinstance(offset, int) and not isinstance(offset, bool)
    if not is_whole or not 0 <= offset < period:
        rule = f"a whole number from 0, below attn_layer_period={period}"
        raise config.refused("attn_layer_offset", offset, rule)
    kinds = ["attention" if i % period == offset else "mamba" for i in range(count)]
    # By its tensors, the first layer that is wrong is so by where attention begins, or by how often
    # it comes.
    first = kinds[: offset + 1]
    config.kinds_fit("attn_layer_offset", first, TENSORS)
    config.kinds_fit("attn_layer_period", kinds, TENSORS)
    return kinds


def mamba(config: Config, hidden: int, *, eps: float) -> Callable[..., MambaSequenceMixer]:
    expand = config.size("mamba_expand", 2)
    config.fits("mamba.A_log", 0, expand * hidden, mamba_expand=expand, hidden_size=hidden)
    rank = config.entry("mamba_dt_rank", "auto")
    if rank != "auto":
        rank = config.size("mamba_dt_rank", of=("mamba.dt_proj.weight", 1))
    return ft.partial(
        MambaSequenceMixer,
        state_dim=config.size("mamba_d_state", 16, of=("mamba.A_log", 1)),
        conv_width=config.size("mamba_d_conv", 4, of=("mamba.conv1d.weight", 2)),
        expand=expand,
        dt_rank=rank,
        conv_bias=config.flag("mamba_conv_bias", True, of="mamba.conv1d.bias"),
        use_bias=config.flag("mamba_proj_bias", False, of="mamba.in_proj.bias"),
        b_c_dt_rms_eps=eps,
        b_c_dt_weights=True,
    )


def describe(model: Any) -> dict[str, Any] | None:
    found = describe_hybrid(model, MambaSequenceMixer, describe_mamba)
    rhythm = None if found is None else rhythm_of(found[1])
    if found is None or rhythm is None:
        return None
    period, offset = rhythm
    return found[0] | {
        "intermediate_size": model.backbone.blocks[0].channel_mixer.gate_proj.weight.shape[0],
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "num_experts": 1,
    }


def rhythm_of(kinds: Sequence[str]) -> tuple[int, int] | None:
    """In every so many layers attention, from which one on; None if it does not come so."""
    count = len(kinds)
    at = [i for i, kind in enumerate(kinds) if kind == "attention"]
    if not at:
        return count + 1, count
    period = at[1] - at[0] if len(at) > 1 else max(count, at[0] + 1)
    regular = at[0] < period and at == list(range(at[0], count, period))
    return (period, at[0]) if regular else None


def describe_mamba(mixer: MambaSequenceMixer) -> dict[str, Any]:
    return {
        "mamba_d_state": mixer.A_log.shape[1],
        "mamba_d_conv": mixer.conv_weight.shape[1],
        "mamba_dt_rank": mixer.dt_rank,
        "mamba_conv_bias": mixer.conv_bias is not None,
        "mamba_proj_bias": mixer.in_proj.bias is not None,
    }


def mamba_tensors(mixer: MambaSequenceMixer) -> dict[str, Array | None]:
    dt, b, c = mixer.dt_b_c_weights or (None, None, None)
    norms = {"dt_layernorm.weight": dt, "b_layernorm.weight": b, "c_layernorm.weight": c}
    return mixer_tensors(mixer) | norms


JAMBA = Family(
    "jamba",
    "JambaForCausalLM",
    build,
    describe,
    ft.partial(
        tensors,
        norm="final_layernorm",
        channel_norm="pre_ff_layernorm",
        mlp=lambda mixer: prefixed("feed_forward.", mlp_tensors(mixer)),
        mamba=mamba_tensors,
    ),
)
