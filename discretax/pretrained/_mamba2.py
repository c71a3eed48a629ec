"""`model_type` "mamba2"."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.pretrained._family import LARGEST, Config, Family, is_number
from discretax.pretrained._mamba import (
    NO_EFFECT,
    backbone_options,
    describe_backbone,
    first_mixer,
    hidden_size,
    tensors_with,
)
from discretax.sequence_mixers import Mamba2SequenceMixer

INFINITY = {"__float__": "Infinity"}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden, expand = hidden_size(config), config.size("expand")
    inner = expand * hidden
    config.fits("mixer.norm.weight", 0, inner, expand=expand, hidden_size=hidden)
    head_dim, state_dim = config.size("head_dim"), config.size("state_size")
    num_heads, rest = divmod(inner, head_dim)
    if rest:
        raise config.refused("head_dim", head_dim, f"a divisor of expand * hidden_size = {inner}")
    config.fits("mixer.A_log", 0, num_heads, head_dim=head_dim)
    num_groups = config.size("n_groups")
    if num_heads % num_groups:
        raise config.refused("n_groups", num_groups, f"a divisor of the {num_heads} heads")
    convolved = inner + 2 * num_groups * state_dim
    config.fits("conv1d.weight", 0, convolved, n_groups=num_groups, state_size=state_dim)
    # What is redundant must agree.
    config.fixed(intermediate_size=inner, num_heads=num_heads)
    mixer = ft.partial(
        Mamba2SequenceMixer,
        state_dim=state_dim,
        conv_width=config.size("conv_kernel", of=("conv1d.weight", 2)),
        expand=expand,
        head_dim=head_dim,
        num_groups=num_groups,
        dt_limit=step_limit(config),
        norm_eps=config.number("layer_norm_epsilon"),
        conv_bias=config.flag("use_conv_bias", of="mixer.conv1d.bias"),
        use_bias=config.flag("use_bias", of="mixer.in_proj.bias"),
    )
    make = backbone_options(config, mixer, tie_word_embeddings=False)
    # transformers reads no `norm_before_gate`: the gate comes first, whatever published files say.
    config.done((*NO_EFFECT, "chunk_size", "norm_before_gate", "time_step_rank"))
    return make


def step_limit(config: Config, name: str = "time_step_limit") -> tuple[float, float]:
    limit = config.entry(name, [0.0, math.inf])
    values = [math.inf if v == INFINITY else v for v in limit] if isinstance(limit, list) else []
    are_two = len(values) == 2 and all(map(is_number, values))
    if not are_two or not 0 <= values[0] < values[1] or LARGEST < values[1] < math.inf:
        raise config.refused(name, limit, "two numbers, 0 <= low < high")
    return float(values[0]), float(values[1])


def describe(model: LanguageModel) -> dict[str, Any] | None:
    mixer = first_mixer(model)
    if not isinstance(mixer, Mamba2SequenceMixer):
        return None
    num_heads, inner = mixer.A_log.shape[0], mixer.out_proj.weight.shape[1]
    if mixer.ssm_dim != inner:
        return None
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
