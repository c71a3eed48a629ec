"""`model_type` "mamba2"."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.pretrained._family import Config, Family
from discretax.pretrained._mamba import (
    NO_EFFECT,
    backbone_options,
    describe_backbone,
    first_mixer,
    tensors_with,
)
from discretax.sequence_mixers import Mamba2SequenceMixer

INFINITY = {"__float__": "Infinity"}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    expand, head_dim = config.size("expand"), config.size("head_dim")
    inner = expand * config.size("hidden_size")
    # What is redundant must agree.
    config.fixed(intermediate_size=inner, num_heads=inner // head_dim)
    mixer = ft.partial(
        Mamba2SequenceMixer,
        state_dim=config.size("state_size"),
        conv_width=config.size("conv_kernel"),
        expand=expand,
        head_dim=head_dim,
        num_groups=config.size("n_groups"),
        dt_limit=step_limit(config),
        norm_eps=config.number("layer_norm_epsilon"),
        conv_bias=config.flag("use_conv_bias"),
        use_bias=config.flag("use_bias"),
    )
    make = backbone_options(config, mixer, tie_word_embeddings=False)
    # transformers reads no `norm_before_gate`: the gate comes first, whatever published files say.
    config.done((*NO_EFFECT, "chunk_size", "norm_before_gate", "time_step_rank"))
    return make


def step_limit(config: Config) -> tuple[float, float]:
    limit = config.entry("time_step_limit", [0.0, math.inf])
    values = [math.inf if v == INFINITY else v for v in limit] if isinstance(limit, list) else []
    if len(values) != 2 or not all(type(v) in (int, float) for v in values):
        raise config.refused("time_step_limit", limit, "two numbers")
    return float(values[0]), float(values[1])


def describe(model: LanguageModel) -> dict[str, Any] | None:
    mixer = first_mixer(model)
    if not isinstance(mixer, Mamba2SequenceMixer):
        return None
    num_heads, inner = mixer.A_log.shape[0], mixer.norm_weight.shape[0]
    return describe_backbone(model) | {
        "state_size": mixer.state_dim,
        "conv_kernel": mixer.conv_weight.shape[1],
        "expand": inner // mixer.in_features,
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "n_groups": mixer.num_groups,
        "time_step_limit": [INFINITY if v == math.inf else v for v in mixer.dt_limit],
        "use_conv_bias": mixer.conv_bias is not None,
        "use_bias": mixer.in_proj.bias is not None,
    }


def mixer_tensors(mixer: Mamba2SequenceMixer) -> dict[str, Array | None]:
    return {
        "in_proj.weight": mixer.in_proj.weight,
        "in_proj.bias": mixer.in_proj.bias,
        "conv1d.weight": mixer.conv_weight,
        "conv1d.bias": mixer.conv_bias,
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "norm.weight": mixer.norm_weight,
        "out_proj.weight": mixer.out_proj.weight,
        "out_proj.bias": mixer.out_proj.bias,
    }


MAMBA2 = Family(
    "mamba2",
    "Mamba2ForCausalLM",
    build,
    describe,
    ft.partial(tensors_with, of_mixer=mixer_tensors),
)
