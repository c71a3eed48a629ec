"""`model_type` "jamba" without experts: layers of Mamba, with norms inside, or attention."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family
from discretax.pretrained._mamba import Names, describe_mamba, mamba_of, mixer_tensors
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
NAMES = Names(
    state_dim="mamba_d_state",
    conv_width="mamba_d_conv",
    dt_rank="mamba_dt_rank",
    conv_bias="mamba_conv_bias",
    use_bias="mamba_proj_bias",
    tensors="mamba.",
)
DEFAULTS = {
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


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
        no_effect=NO_EFFECT if "mamba" in kinds else (*NO_EFFECT, *NAMES[:-1], "mamba_expand"),
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
    config = config.with_defaults(DEFAULTS)
    return mamba_of(config, NAMES, expand=expand, b_c_dt_rms_eps=eps, b_c_dt_weights=True)


def describe(model: Any) -> dict[str, Any] | None:
    found = describe_hybrid(model, MambaSequenceMixer, ft.partial(describe_mamba, names=NAMES))
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
