"""The layout of the package mamba_ssm: Mamba and Mamba-2, in files without a `model_type`."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock, StandardBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import (
    Config,
    Family,
    describe_residual_stream,
    residual_stream,
    rms_norm,
)
from discretax.pretrained._mamba import (
    Names as MambaNames,
    describe_mamba as mamba_entries,
    mamba_of,
    mixer_tensors as mamba_tensors,
)
from discretax.pretrained._mamba2 import (
    Names as Mamba2Names,
    describe_mamba2 as mamba2_entries,
    mamba2_of,
    mixer_tensors as mamba2_tensors,
)
from discretax.pretrained._stored import Stored
from discretax.pretrained._transformer import Tensors, prefixed
from discretax.sequence_mixers import Mamba2SequenceMixer, MambaSequenceMixer

EPS = 1e-5  # of every norm
MULTIPLE = 128  # the width of an MLP is rounded up to one of it
# Of the weights before training, and of how the same numbers are computed.
NO_EFFECT = ("dt_init_floor", "dt_max", "dt_min", "layer_idx")
NO_EFFECT_MAMBA = (*NO_EFFECT, "dt_init", "dt_scale", "use_fast_path")
NO_EFFECT_MAMBA2 = (
    *NO_EFFECT,
    "A_init_range",
    "chunk_size",
    "conv_init",
    "sequence_parallel",
    "use_mem_eff_path",
)

# What holds where `ssm_cfg` does not say it.
MAMBA = {"d_state": 16, "d_conv": 4, "expand": 2, "conv_bias": True, "bias": False}
MAMBA2 = MAMBA | {
    "d_state": 128,
    "headdim": 64,
    "ngroups": 1,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    # An option of Mamba2Simple, which is no layer of the package's language models.
    "learnable_init_states": False,
    "dt_limit": [0.0, math.inf],
}
MAMBA_NAMES = MambaNames("d_state", "d_conv", "dt_rank", "conv_bias", "bias")
MAMBA2_NAMES = Mamba2Names(
    "d_state",
    "d_conv",
    head_dim="headdim",
    num_groups="ngroups",
    conv_bias="conv_bias",
    use_bias="bias",
    step_limit="dt_limit",
)


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    indices = config.entry("attn_layer_idx", None)
    if indices not in (None, []):
        raise config.refused("attn_layer_idx", indices, "[]", " Attention is not supported here.")
    hidden = config.size("d_model", of=("embedding.weight", 1))
    num_tokens, multiple = config.size("vocab_size"), config.size("pad_vocab_size_multiple", 8)
    vocab_size = math.ceil(num_tokens / multiple) * multiple
    sizes = {"vocab_size": num_tokens, "pad_vocab_size_multiple": multiple}
    config.fits("embedding.weight", 0, vocab_size, **sizes)
    norm = norm_of(config)
    ssm = config.part("ssm_cfg", {})
    layer = ssm.entry("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ssm.refused("layer", layer, "'Mamba1' or 'Mamba2'")
    whole = ssm.with_defaults(MAMBA if layer == "Mamba1" else MAMBA2)
    mixer = mamba(whole, hidden) if layer == "Mamba1" else mamba2(whole, hidden)
    ssm.done(NO_EFFECT_MAMBA if layer == "Mamba1" else NO_EFFECT_MAMBA2)
    make = ft.partial(
        LanguageModel,
        vocab_size=vocab_size,
        hidden_dim=hidden,
        num_blocks=config.layers("n_layer", "backbone.layers."),
        pattern=(mixer,),
        channel_mixer=channel_mixer(config),
        norm=norm,
        tie_embeddings=config.flag("tie_embeddings", True),
        **residual_stream(config, "embedding.weight"),
    )
    config.done(("attn_cfg", "fused_add_norm"))
    return make


def norm_of(config: Config) -> Callable[[int], Any]:
    is_rms = config.flag("rms_norm", True)
    if config.shapes is not None and is_rms == ("backbone.norm_f.bias" in config.shapes):
        rule = f"{not is_rms}, as there is {'a' if is_rms else 'no'} tensor 'backbone.norm_f.bias'"
        raise config.refused("rms_norm", is_rms, rule)
    return rms_norm(EPS) if is_rms else ft.partial(eqx.nn.LayerNorm, eps=EPS)


def channel_mixer(config: Config) -> Callable[..., SwiGLU] | None:
    width = config.entry("d_intermediate", 0)
    if width == 0 and not isinstance(width, bool):
        return None
    width = config.size("d_intermediate")
    rounded = math.ceil(width / MULTIPLE) * MULTIPLE
    config.fits("mlp.fc2.weight", 1, rounded, d_intermediate=width)
    return ft.partial(SwiGLU, intermediate_dim=rounded)


def mamba(ssm: Config, hidden: int) -> Callable[..., MambaSequenceMixer]:
    expand = ssm.size("expand")
    ssm.fits("mixer.A_log", 0, expand * hidden, expand=expand, d_model=hidden)
    if ssm.entry("dt_rank", "auto") == "auto":
        ssm.fits("mixer.dt_proj.weight", 1, math.ceil(hidden / 16), dt_rank="auto")
    return mamba_of(ssm, MAMBA_NAMES, expand=expand)


def mamba2(ssm: Config, hidden: int) -> Callable[..., Mamba2SequenceMixer]:
    expand = ssm.size("expand")
    inner = expand * hidden
    ssm.fits("mixer.out_proj.weight", 1, inner, expand=expand, d_model=hidden)
    width = inner if ssm.entry("d_ssm", None) is None else ssm.size("d_ssm")
    if width > inner:
        raise ssm.refused("d_ssm", width, f"at most expand * d_model = {inner}")
    head_dim = ssm.size("headdim")
    if width % head_dim:
        raise ssm.refused("headdim", head_dim, f"a divisor of d_ssm = {width}")
    num_heads = width // head_dim
    ssm.fits("mixer.A_log", 0, num_heads, headdim=head_dim, d_ssm=width)
    has_norm = ssm.flag("rmsnorm", of="mixer.norm.weight")
    norm_first = ssm.flag("norm_before_gate")
    per_feature = ssm.flag("D_has_hdim")
    ssm.fits("mixer.D", 0, width if per_feature else num_heads, D_has_hdim=per_feature)
    return mamba2_of(
        ssm,
        num_heads,
        head_dim,
        MAMBA2_NAMES,
        inner_dim=inner,
        ssm_dim=width,
        gate_norm=("before" if norm_first else "after") if has_norm else None,
        D_has_hdim=per_feature,
        learnable_init_states=ssm.flag("learnable_init_states", of="mixer.init_states"),
        norm_eps=EPS,
    )


def describe(model: Any) -> dict[str, Any] | None:
    block = model.backbone.blocks[0]
    if not isinstance(model.norm, eqx.nn.RMSNorm | eqx.nn.LayerNorm):
        return None
    width = 0
    if isinstance(block, ResidualBlock) and isinstance(block.channel_mixer, SwiGLU):
        width = block.channel_mixer.gate_proj.weight.shape[0]
    elif not isinstance(block, StandardBlock):
        return None
    mixer = block.sequence_mixer
    if isinstance(mixer, MambaSequenceMixer):
        ssm = describe_mamba(mixer)
    elif isinstance(mixer, Mamba2SequenceMixer):
        ssm = describe_mamba2(mixer)
    else:
        return None
    vocab_size, hidden = model.encoder.embedding.weight.shape
    return {
        "d_model": hidden,
        "n_layer": len(model.backbone.blocks),
        "vocab_size": vocab_size,
        "pad_vocab_size_multiple": 1,  # it is padded already
        "ssm_cfg": ssm,
        "rms_norm": isinstance(model.norm, eqx.nn.RMSNorm),
        **describe_residual_stream(model),
        "fused_add_norm": True,
        "tie_embeddings": model.tie_embeddings,
        # Older versions of the package do not know it.
        **({"d_intermediate": width} if width else {}),
    }


def others_than(defaults: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Published files have no more."""
    return {k: entries[k] for k, default in defaults.items() if entries[k] != default}


def describe_mamba(mixer: MambaSequenceMixer) -> dict[str, Any]:
    rank = {"dt_rank": math.ceil(mixer.in_features / 16)}
    expand = {"expand": mixer.A_log.shape[0] // mixer.in_features}
    return others_than(MAMBA | rank, mamba_entries(mixer, MAMBA_NAMES) | expand)


def describe_mamba2(mixer: Mamba2SequenceMixer) -> dict[str, Any]:
    inner = mixer.out_proj.weight.shape[1]
    entries = mamba2_entries(mixer, MAMBA2_NAMES) | {
        "expand": inner // mixer.in_features,
        "d_ssm": mixer.ssm_dim,
        "rmsnorm": mixer.gate_norm is not None,
        "norm_before_gate": mixer.gate_norm == "before",
        "D_has_hdim": mixer.D.ndim == 2,
        "learnable_init_states": mixer.initial_state is not None,
        "dt_limit": list(mixer.dt_limit),
    }
    return {"layer": "Mamba2", **others_than(MAMBA2 | {"d_ssm": inner}, entries)}


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "backbone.embedding.weight": model.encoder.embedding.weight,
        **norm_tensors("backbone.norm_f", model.norm),
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, layer = block.sequence_mixer, f"backbone.layers.{i}."
        is_first = isinstance(mixer, MambaSequenceMixer)
        of_mixer = mamba_tensors(mixer) if is_first else mamba2_tensors_of(mixer)
        found |= prefixed(f"{layer}mixer.", of_mixer)
        if isinstance(block, StandardBlock):
            found |= norm_tensors(f"{layer}norm", block.norm)
        else:
            found |= norm_tensors(f"{layer}norm", block.sequence_norm)
            found |= norm_tensors(f"{layer}norm2", block.channel_norm)
            mlp = block.channel_mixer
            found[f"{layer}mlp.fc1.weight"] = Stored((mlp.up_proj.weight, mlp.gate_proj.weight))
            found[f"{layer}mlp.fc2.weight"] = mlp.down_proj.weight
    return found


def mamba2_tensors_of(mixer: Any) -> Tensors:
    options = {"D": Stored((mixer.D,), form=(-1,)), "init_states": mixer.initial_state}
    return mamba2_tensors(mixer) | options


def norm_tensors(name: str, norm: Any) -> Tensors:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


MAMBA_SSM = Family("mamba_ssm", "MambaLMHeadModel", build, describe, tensors, layout="mamba_ssm")
