"""What families share whose blocks are those of transformers: attention, a gated MLP, a norm each."""

import functools as ft
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array

from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import REQUIRED, Config
from discretax.pretrained._stored import Stored
from discretax.sequence_mixers import AttentionSequenceMixer
from discretax.sequence_mixers.rotary_scaling import (
    Linear,
    Llama3,
    Proportional,
    RotaryScaling,
    Yarn,
)

ROPE_TYPES = ("default", "linear", "llama3", "proportional", "yarn")
Tensors = dict[str, Array | Stored | None]


def attention(
    config: Config,
    hidden: int,
    *,
    occurs: bool,
    out: str = "self_attn.o_proj",
    rotary_fraction: float = 1.0,
    rotary_base: Any = REQUIRED,
    rope_types: Sequence[str] = ROPE_TYPES,
    has_positions: bool = True,
    no_effect: Iterable[str] = (),
    **options: Any,
) -> Callable[..., AttentionSequenceMixer]:
    """Its heads, compared to the tensors where attention `occurs`, whose last map is called `out`; the
    part of each that is turned, and the base, unless the configuration says so; the kinds of
    positions that are supported, and what is said of them to `no_effect`; other `options` of the
    mixer."""
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    head_dim = config.size("head_dim", max(1, hidden // num_heads))
    if occurs:
        sizes = {"num_attention_heads": num_heads, "head_dim": head_dim}
        config.fits(f"{out}.weight", 1, num_heads * head_dim, **sizes)
        sizes = {"num_key_value_heads": num_kv_heads, "head_dim": head_dim}
        config.fits("k_proj.weight", 0, num_kv_heads * head_dim, **sizes)
        if num_heads % num_kv_heads:
            rule = f"a divisor of num_attention_heads={num_heads}"
            raise config.refused("num_key_value_heads", num_kv_heads, rule)
    positions = {"rotary_fraction": 0.0}
    if has_positions:
        positions = rotary(config, head_dim, rotary_fraction, rotary_base, rope_types, no_effect)
    else:
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
            config.entry(name, None)
    return ft.partial(
        AttentionSequenceMixer,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **positions,
        **options,
    )


def rotary(
    config: Config,
    head_dim: int,
    fraction: float,
    base: Any,
    types: Sequence[str],
    no_effect: Iterable[str],
) -> dict[str, Any]:
    """One entry with all, or, in files of transformers 4, an entry for each."""
    rope = config.entry("rope_parameters", None)
    if rope is None:
        if base is REQUIRED and "rope_theta" not in config.entries:
            raise config.refused("rope_parameters", None, "an object with rope_theta")
        rope, stretched = config, config.entry("rope_scaling", None)
        if stretched is not None:
            stretched = config.part("rope_scaling")
    else:
        rope = stretched = config.part("rope_parameters")
    fraction = rope.number("partial_rotary_factor", fraction)
    if rope is not config:  # it must be the same if it is there, too
        config.fixed(partial_rotary_factor=fraction)
    pairs = fraction * head_dim / 2
    if fraction > 1 or abs(pairs - round(pairs)) > 1e-6:
        rule = f"at most 1, for an even number of head_dim={head_dim} features"
        raise rope.refused("partial_rotary_factor", fraction, rule)
    scaling = None if stretched is None else _scaling(stretched, fraction, types)
    theta = rope.number("rope_theta", base)
    if isinstance(scaling, Yarn) and theta <= 1:
        raise rope.refused("rope_theta", theta, "above 1")
    for part in (rope, stretched):
        if part not in (None, config):
            part.done(no_effect)
    return {
        "rotary_fraction": 1.0 if isinstance(scaling, Proportional) else fraction,
        "rotary_base": theta,
        "rotary_scaling": scaling,
    }


def _scaling(rope: Config, fraction: float, types: Sequence[str]) -> RotaryScaling | None:
    kind = rope.entry("rope_type", rope.entry("type", "default"))
    if kind not in types:
        rule = f"one of {', '.join(types)}" if len(types) > 1 else repr(types[0])
        raise rope.refused("rope_type", kind, rule)
    if kind == "default":
        return None
    if kind == "proportional":
        return Proportional(fraction)
    factor = rope.number("factor")
    if kind == "linear":
        return Linear(factor)
    original = rope.size("original_max_position_embeddings")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not low < high:
            raise rope.refused("high_freq_factor", high, f"above low_freq_factor={low}")
        return Llama3(factor, low, high, original)
    attention_factor = None
    if rope.entry("attention_factor", None) is not None:
        attention_factor = rope.number("attention_factor")
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    return Yarn(factor, original, fast, slow, attention_factor)


def describe_attention(mixer: AttentionSequenceMixer) -> dict[str, Any]:
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": mixer.q_proj.bias is not None,
    }


def describe_rotary(
    mixer: AttentionSequenceMixer, rotary_fraction: float | None = 1.0
) -> dict[str, Any]:
    """`rotary_fraction`: the one that is left out, as it is what the configuration means without."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": mixer.rotary_base}
    fraction = mixer.rotary_dim / mixer.head_dim
    if fraction != rotary_fraction:
        rope["partial_rotary_factor"] = fraction
    scaling = mixer.rotary_scaling
    if isinstance(scaling, Linear):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Proportional):
        rope |= {"rope_type": "proportional", "partial_rotary_factor": scaling.fraction}
    elif isinstance(scaling, Llama3 | Yarn):
        entries = {name: value for name, value in scaling._asdict().items() if value is not None}
        entries["original_max_position_embeddings"] = entries.pop("original_length")
        rope |= {"rope_type": "llama3" if isinstance(scaling, Llama3) else "yarn", **entries}
    return {"rope_parameters": rope}


def attention_tensors(mixer: AttentionSequenceMixer, out: str = "o_proj") -> Tensors:
    layers = {"q_proj": mixer.q_proj, "k_proj": mixer.k_proj, "v_proj": mixer.v_proj}
    return linear_tensors(layers | {out: mixer.out_proj})


def linear_tensors(layers: Mapping[str, eqx.nn.Linear]) -> Tensors:
    """Weight and bias of each."""
    found: Tensors = {}
    for name, layer in layers.items():
        found |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return found


def mlp(config: Config, tensor: str, **options: Any) -> Callable[..., SwiGLU]:
    width = config.size("intermediate_size", of=(tensor, 0))
    config.fixed(hidden_act="silu")
    return ft.partial(SwiGLU, intermediate_dim=width, **options)


def mlp_tensors(mixer: SwiGLU) -> Tensors:
    names = ("gate_proj", "up_proj", "down_proj")
    return linear_tensors({name: getattr(mixer, name) for name in names})


def prefixed(prefix: str, tensors: Mapping[str, Array | Stored | None]) -> Tensors:
    return {f"{prefix}{name}": leaf for name, leaf in tensors.items()}
