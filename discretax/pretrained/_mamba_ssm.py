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
from discretax.pretrained._mamba import mixer_tensors as mamba_tensors
from discretax.pretrained._mamba2 import mixer_tensors as mamba2_tensors, step_limit
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
    mixer = mamba(ssm, hidden) if layer == "Mamba1" else mamba2(ssm, hidden)
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
    expand = ssm.size("expand", 2)
    ssm.fits("mixer.A_log", 0, expand * hidden, expand=expand, d_model=hidden)
    rank = ssm.entry("dt_rank", "auto")
    rank = math.ceil(hidden / 16) if rank == "auto" else ssm.size("dt_rank")
    ssm.fits("mixer.dt_proj.weight", 1, rank, dt_rank=rank)
    return ft.partial(
        MambaSequenceMixer,
        state_dim=ssm.size("d_state", 16, of=("mixer.A_log", 1)),
        conv_width=ssm.size("d_conv", 4, of=("mixer.conv1d.weight", 2)),
        expand=expand,
        dt_rank=rank,
        conv_bias=ssm.flag("conv_bias", True, of="mixer.conv1d.bias"),
        use_bias=ssm.flag("bias", False, of="mixer.in_proj.bias"),
    )


def mamba2(ssm: Config, hidden: int) -> Callable[..., Mamba2SequenceMixer]:
    expand = ssm.size("expand", 2)
    inner = expand * hidden
    ssm.fits("mixer.out_proj.weight", 1, inner, expand=expand, d_model=hidden)
    width = inner if ssm.entry("d_ssm", None) is None else ssm.size("d_ssm")
    if width > inner:
        raise ssm.refused("d_ssm", width, f"at most expand * d_model = {inner}")
    head_dim, state_dim = ssm.size("headdim", 64), ssm.size("d_state", 128)
    if width % head_dim:
        raise ssm.refused("headdim", head_dim, f"a divisor of d_ssm = {width}")
    num_heads, num_groups = width // head_dim, ssm.size("ngroups", 1)
    ssm.fits("mixer.A_log", 0, num_heads, headdim=head_dim, d_ssm=width)
    if num_heads % num_groups:
        raise ssm.refused("ngroups", num_groups, f"a divisor of the {num_heads} heads")
    convolved = width + 2 * num_groups * state_dim
    ssm.fits("conv1d.weight", 0, convolved, ngroups=num_groups, d_state=state_dim)
    has_norm = ssm.flag("rmsnorm", True, of="mixer.norm.weight")
    norm_first = ssm.flag("norm_before_gate", False)
    per_feature = ssm.flag("D_has_hdim", False)
    ssm.fits("mixer.D", 0, width if per_feature else num_heads, D_has_hdim=per_feature)
    return ft.partial(
        Mamba2SequenceMixer,
        state_dim=state_dim,
        conv_width=ssm.size("d_conv", 4, of=("mixer.conv1d.weight", 2)),
        expand=expand,
        ssm_dim=width,
        head_dim=head_dim,
        num_groups=num_groups,
        gate_norm=("before" if norm_first else "after") if has_norm else None,
        D_has_hdim=per_feature,
        learnable_init_states=ssm.flag("learnable_init_states", False, of="mixer.init_states"),
        dt_limit=step_limit(ssm, "dt_limit"),
        norm_eps=EPS,
        conv_bias=ssm.flag("conv_bias", True, of="mixer.conv1d.bias"),
        use_bias=ssm.flag("bias", False, of="mixer.in_proj.bias"),
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


def described(entries: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Each value that is not the other one, the default: published files have no more."""
    return {name: value for name, (value, default) in entries.items() if value != default}


def describe_mamba(mixer: MambaSequenceMixer) -> dict[str, Any]:
    inner, state_dim = mixer.A_log.shape
    return described(
        {
            "d_state": (state_dim, 16),
            "d_conv": (mixer.conv_weight.shape[1], 4),
            "expand": (inner // mixer.in_features, 2),
            "dt_rank": (mixer.dt_rank, math.ceil(mixer.in_features / 16)),
            "conv_bias": (mixer.conv_bias is not None, True),
            "bias": (mixer.in_proj.bias is not None, False),
        }
    )


def describe_mamba2(mixer: Mamba2SequenceMixer) -> dict[str, Any]:
    inner = mixer.out_proj.weight.shape[1]
    options = {
        "d_state": (mixer.state_dim, 128),
        "d_conv": (mixer.conv_weight.shape[1], 4),
        "expand": (inner // mixer.in_features, 2),
        "d_ssm": (mixer.ssm_dim, inner),
        "headdim": (mixer.ssm_dim // mixer.A_log.shape[0], 64),
        "ngroups": (mixer.num_groups, 1),
        "rmsnorm": (mixer.gate_norm is not None, True),
        "norm_before_gate": (mixer.gate_norm == "before", False),
        "D_has_hdim": (mixer.D.ndim == 2, False),
        # An option of Mamba2Simple, which is no layer of the package's language models.
        "learnable_init_states": (mixer.initial_state is not None, False),
        "dt_limit": (list(mixer.dt_limit), [0.0, math.inf]),
        "conv_bias": (mixer.conv_bias is not None, True),
        "bias": (mixer.in_proj.bias is not None, False),
    }
    return {"layer": "Mamba2", **described(options)}


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
