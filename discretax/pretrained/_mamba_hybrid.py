"""The Mamba-2 of Falcon-H1, Granite 4 and Bamba, by the names that their configurations have."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

from discretax.pretrained._family import Config
from discretax.pretrained._mamba2 import INFINITY, step_limit
from discretax.sequence_mixers import Mamba2SequenceMixer


def mamba2(
    config: Config, hidden: int, *, eps: float, inner: str | None = None, **options: Any
) -> Callable[..., Mamba2SequenceMixer]:
    """`inner`: the entry with the inner width, if it is not `mamba_expand` times the features."""
    expand = config.size("mamba_expand", 2)
    width = expand * hidden if inner is None else config.size(inner, expand * hidden)
    told = {"mamba_expand": expand} if inner is None else {inner: width}
    config.fits("mamba.out_proj.weight", 1, width, **told)
    num_heads = config.size("mamba_n_heads", of=("mamba.A_log", 0))
    if width % num_heads:
        raise config.refused("mamba_n_heads", num_heads, f"a divisor of the inner width {width}")
    head_dim = width // num_heads
    if config.entry("mamba_d_head", "auto") != "auto":
        config.fixed(mamba_d_head=head_dim)
    state_dim, num_groups = config.size("mamba_d_state"), config.size("mamba_n_groups")
    if num_heads % num_groups:
        raise config.refused("mamba_n_groups", num_groups, f"a divisor of the {num_heads} heads")
    convolved = width + 2 * num_groups * state_dim
    config.fits("conv1d.weight", 0, convolved, mamba_n_groups=num_groups, mamba_d_state=state_dim)
    return ft.partial(
        Mamba2SequenceMixer,
        state_dim=state_dim,
        conv_width=config.size("mamba_d_conv", of=("mamba.conv1d.weight", 2)),
        inner_dim=width,
        head_dim=head_dim,
        num_groups=num_groups,
        dt_limit=step_limit(config),
        norm_eps=eps,
        conv_bias=config.flag("mamba_conv_bias", of="mamba.conv1d.bias"),
        use_bias=config.flag("mamba_proj_bias", of="mamba.in_proj.bias"),
        **options,
    )


def describe_mamba2(mixer: Mamba2SequenceMixer) -> dict[str, Any]:
    num_heads, inner = mixer.A_log.shape[0], mixer.out_proj.weight.shape[1]
    return {
        "mamba_d_state": mixer.state_dim,
        "mamba_d_conv": mixer.conv_weight.shape[1],
        "mamba_n_heads": num_heads,
        "mamba_d_head": inner // num_heads,
        "mamba_n_groups": mixer.num_groups,
        "time_step_limit": [INFINITY if v == math.inf else v for v in mixer.dt_limit],
        "mamba_conv_bias": mixer.conv_bias is not None,
        "mamba_proj_bias": mixer.in_proj.bias is not None,
    }
