"""`model_type` "mamba2"."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Names(NamedTuple):
    """What a family calls the entries about its Mamba-2, and what its tensors begin with."""

    state_dim: str = "state_size"
    conv_width: str = "conv_kernel"
    num_heads: str = "num_heads"
    head_dim: str = "head_dim"
    num_groups: str = "n_groups"
    conv_bias: str = "use_conv_bias"
    use_bias: str = "use_bias"
    step_limit: str = "time_step_limit"
    tensors: str = "mixer."


NAMES = Names()


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    hidden, expand = hidden_size(config), config.size("expand")
    inner = expand * hidden
    config.fits("mixer.norm.weight", 0, inner, expand=expand, hidden_size=hidden)
    head_dim = config.size("head_dim")
    num_heads, rest = divmod(inner, head_dim)
    if rest:
        raise config.refused("head_dim", head_dim, f"a divisor of expand * hidden_size = {inner}")
    config.fits("mixer.A_log", 0, num_heads, head_dim=head_dim)
    # What is redundant must agree.
    config.fixed(intermediate_size=inner, num_heads=num_heads)
    eps = config.number("layer_norm_epsilon")
    mixer = mamba2_of(config, num_heads, head_dim, inner_dim=inner, norm_eps=eps)
    make = backbone_options(config, mixer, tie_word_embeddings=False)
    # transformers reads no `norm_before_gate`: the gate comes first, whatever published files say.
    config.done((*NO_EFFECT, "chunk_size", "norm_before_gate", "time_step_rank"))
    return make


def mamba2_of(
    config: Config, num_heads: int, head_dim: int, names: Names = NAMES, **options: Any
) -> Callable[..., Mamba2SequenceMixer]:
    """Of heads that are known, and of an inner width that is in the `options`."""
    width = num_heads * head_dim
    state_dim, num_groups = config.size(names.state_dim), config.size(names.num_groups)
    if num_heads % num_groups:
        raise config.refused(names.num_groups, num_groups, f"a divisor of the {num_heads} heads")
    convolved = width + 2 * num_groups * state_dim
    sizes = {names.num_groups: num_groups, names.state_dim: state_dim}
    config.fits(f"{names.tensors}conv1d.weight", 0, convolved, **sizes)
    return ft.partial(
        Mamba2SequenceMixer,
        state_dim=state_dim,
        conv_width=config.size(names.conv_width, of=(f"{names.tensors}conv1d.weight", 2)),
        head_dim=head_dim,
        num_groups=num_groups,
        dt_limit=step_limit(config, names.step_limit),
        conv_bias=config.flag(names.conv_bias, of=f"{names.tensors}conv1d.bias"),
        use_bias=config.flag(names.use_bias, of=f"{names.tensors}in_proj.bias"),
        **options,
    )


def step_limit(config: Config, name: str) -> tuple[float, float]:
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
    inner = mixer.out_proj.weight.shape[1]
    if mixer.ssm_dim != inner:
        return None
    expand = {"expand": inner // mixer.in_features}
    return describe_backbone(model) | describe_mamba2(mixer) | expand


def describe_mamba2(mixer: Mamba2SequenceMixer, names: Names = NAMES) -> dict[str, Any]:
    num_heads = mixer.A_log.shape[0]
    return {
        names.state_dim: mixer.state_dim,
        names.conv_width: mixer.conv_weight.shape[1],
        names.num_heads: num_heads,
        names.head_dim: mixer.ssm_dim // num_heads,
        names.num_groups: mixer.num_groups,
        names.step_limit: [INFINITY if v == math.inf else v for v in mixer.dt_limit],
        names.conv_bias: mixer.conv_bias is not None,
        names.use_bias: mixer.in_proj.bias is not None,
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
