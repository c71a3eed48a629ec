"""`model_type` "mamba", and what it shares with the families that came from it."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import StandardBlock
from discretax.pretrained._family import (
    Config,
    Family,
    describe_residual_stream,
    describe_sizes,
    residual_stream,
    rms_norm,
)
from discretax.sequence_mixers import AbstractSequenceMixer, MambaSequenceMixer

NO_EFFECT = (
    # Of the weights before training.
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    # Of how the same numbers are computed.
    "fused_add_norm",
    "use_associative_scan",
    "use_falcon_mambapy",
    "use_mambapy",
    # Names of the original code for what stands here under others, and its padding.
    "d_inner",
    "d_model",
    "n_layer",
    "pad_vocab_size_multiple",
)


def backbone_options(
    config: Config, mixer: Callable[..., AbstractSequenceMixer], *, tie_word_embeddings: bool
) -> Callable[[PRNGKeyArray], LanguageModel]:
    """The model around the mixers."""
    config.fixed(hidden_act="silu", rms_norm=True, ssm_cfg={})
    return ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embeddings.weight", 0)),
        hidden_dim=hidden_size(config),
        num_blocks=config.layers("num_hidden_layers", "backbone.layers."),
        pattern=(mixer,),
        norm=rms_norm(config.number("layer_norm_epsilon")),
        tie_embeddings=config.flag("tie_word_embeddings", tie_word_embeddings),
        **residual_stream(config, "embeddings.weight"),
    )


def hidden_size(config: Config) -> int:
    return config.size("hidden_size", of=("embeddings.weight", 1))


def expansion(config: Config) -> int:
    """Where the two entries differ, as in Falcon Mamba 7B, the inner width is what holds."""
    hidden, expand = hidden_size(config), config.size("expand", 2)
    if "intermediate_size" not in config.entries:
        config.fits("mixer.A_log", 0, expand * hidden, expand=expand, hidden_size=hidden)
        return expand
    inner = config.size("intermediate_size")
    if inner % hidden:
        raise config.refused("intermediate_size", inner, f"a multiple of hidden_size={hidden}")
    config.fits("mixer.A_log", 0, inner, intermediate_size=inner)
    return inner // hidden


class Names(NamedTuple):
    """What a family calls the entries about its Mamba, and what its tensors begin with."""

    state_dim: str = "state_size"
    conv_width: str = "conv_kernel"
    dt_rank: str = "time_step_rank"
    conv_bias: str = "use_conv_bias"
    use_bias: str = "use_bias"
    tensors: str = "mixer."


NAMES = Names()


def mamba_of(
    config: Config, names: Names = NAMES, **options: Any
) -> Callable[..., MambaSequenceMixer]:
    """But for its inner width, unless that is in the `options`."""
    tensors, rank = names.tensors, config.entry(names.dt_rank, "auto")
    if rank != "auto":
        rank = config.size(names.dt_rank, of=(f"{tensors}dt_proj.weight", 1))
    return ft.partial(
        MambaSequenceMixer,
        state_dim=config.size(names.state_dim, of=(f"{tensors}A_log", 1)),
        conv_width=config.size(names.conv_width, of=(f"{tensors}conv1d.weight", 2)),
        dt_rank=rank,
        conv_bias=config.flag(names.conv_bias, of=f"{tensors}conv1d.bias"),
        use_bias=config.flag(names.use_bias, of=f"{tensors}in_proj.bias"),
        **options,
    )


def build_with(
    config: Config, *, b_c_dt_rms_eps: float | None
) -> Callable[[PRNGKeyArray], LanguageModel]:
    mixer = mamba_of(config, b_c_dt_rms_eps=b_c_dt_rms_eps)
    mixer = ft.partial(mixer, expand=expansion(config))
    make = backbone_options(config, mixer, tie_word_embeddings=True)
    config.done(NO_EFFECT)
    return make


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    return build_with(config, b_c_dt_rms_eps=None)


def first_mixer(model: LanguageModel) -> AbstractSequenceMixer | None:
    """That of the first block, if the blocks and the norm are of the kind that Mamba has."""
    block = model.backbone.blocks[0]
    is_mamba_like = isinstance(block, StandardBlock) and isinstance(model.norm, eqx.nn.RMSNorm)
    return block.sequence_mixer if is_mamba_like else None


def describe_backbone(model: Any) -> dict[str, Any]:
    return (
        describe_sizes(model)
        | describe_residual_stream(model)
        | {"layer_norm_epsilon": model.norm.eps, "hidden_act": "silu"}
    )


def describe_mamba(mixer: MambaSequenceMixer, names: Names = NAMES) -> dict[str, Any]:
    return {
        names.state_dim: mixer.A_log.shape[1],
        names.conv_width: mixer.conv_weight.shape[1],
        names.dt_rank: mixer.dt_rank,
        names.conv_bias: mixer.conv_bias is not None,
        names.use_bias: mixer.in_proj.bias is not None,
    }


def describe_mixer(mixer: MambaSequenceMixer) -> dict[str, Any]:
    inner = mixer.A_log.shape[0]
    widths = {"intermediate_size": inner, "expand": inner // mixer.in_features}
    return describe_mamba(mixer) | widths


def describe(model: LanguageModel) -> dict[str, Any] | None:
    mixer = first_mixer(model)
    if not isinstance(mixer, MambaSequenceMixer) or mixer.b_c_dt_rms_eps is not None:
        return None
    return describe_backbone(model) | describe_mixer(mixer)


def tensors_with(
    model: Any, of_mixer: Callable[[Any], dict[str, Array | None]]
) -> dict[str, Array | None]:
    tensors: dict[str, Array | None] = {
        "backbone.embeddings.weight": model.encoder.embedding.weight,
        "backbone.norm_f.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        layer = f"backbone.layers.{i}."
        tensors[f"{layer}norm.weight"] = block.norm.weight
        for name, leaf in of_mixer(block.sequence_mixer).items():
            tensors[f"{layer}mixer.{name}"] = leaf
    return tensors


def mixer_tensors(mixer: MambaSequenceMixer) -> dict[str, Array | None]:
    return {
        "in_proj.weight": mixer.in_proj.weight,
        "in_proj.bias": mixer.in_proj.bias,
        "conv1d.weight": mixer.conv_weight,
        "conv1d.bias": mixer.conv_bias,
        "x_proj.weight": mixer.x_proj.weight,
        "dt_proj.weight": mixer.dt_proj.weight,
        "dt_proj.bias": mixer.dt_proj.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "out_proj.weight": mixer.out_proj.weight,
        "out_proj.bias": mixer.out_proj.bias,
    }


MAMBA = Family(
    "mamba",
    "MambaForCausalLM",
    build,
    describe,
    ft.partial(tensors_with, of_mixer=mixer_tensors),
)
