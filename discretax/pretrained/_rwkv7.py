"""RWKV-7: `model_type` "rwkv7", flash-linear-attention's layout, and the authors' own."""

import functools as ft
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import RWKV7Block
from discretax.pretrained._family import Config, Family, describe_sizes
from discretax.pretrained._stored import Rows, Stored
from discretax.pretrained._transformer import Tensors, linear_tensors, prefixed

NO_EFFECT = (
    # Of how the same numbers are computed.
    "attn_mode",
    "auto_map",
    "fuse_norm",
    # Of training.
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "max_position_embeddings",
    "use_l2warp",
    # `intermediate_size` and `head_dim` hold; published files have the same number of heads for all.
    "hidden_ratio",
    "num_heads",
    # A single layer has no such map.
    "v_low_rank_dim",
)
# Of the authors' layout, in which they are constants.
NORM_EPS, HEAD_NORM_EPS = 1e-5, 64e-5
UNUSED = tuple(f"blocks.0.att.v{i}" for i in range(3))
IN_EVERY_MODEL = "blocks.0.att.r_k"
# Entries of the authors' layout, which are the names in their code, and where the tensors say it.
RANKS = {
    "w": ("d_decay_lora", "blocks.0.att.w1"),
    "a": ("d_aaa_lora", "blocks.0.att.a1"),
    "v": ("d_mv_lora", "blocks.1.att.v1"),
    "g": ("d_gate_lora", "blocks.0.att.g1"),
}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    num_layers = config.layers("num_hidden_layers", "model.layers.")
    hidden = config.size("hidden_size", of=("embeddings.weight", 1))
    head_dim = head_size(config, "head_dim", hidden)
    eps = config.number("norm_eps", 1e-5)
    config.fixed(attn=None, hidden_act="sqrelu", norm_bias=True, norm_first=True)
    values = config.entry("value_dim", None)
    if values not in (None, hidden, [hidden] * num_layers):
        raise config.refused("value_dim", values, f"hidden_size={hidden}, for every layer")

    def rank(name: str, default: int, letter: str) -> int:
        return config.size(name, default, of=(f"attn.{letter}_lora.lora.0.weight", 0))

    make = model(
        vocab_size=config.size("vocab_size", of=("embeddings.weight", 0)),
        hidden_dim=hidden,
        num_layers=num_layers,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        head_dim=head_dim,
        decay_rank=rank("decay_low_rank_dim", 64, "w"),
        strength_rank=rank("a_low_rank_dim", 64, "a"),
        value_rank=rank("v_low_rank_dim", 16, "v") if num_layers > 1 else None,
        gate_rank=rank("gate_low_rank_dim", 128, "g"),
        intermediate_dim=intermediate_size(config, hidden),
        norm_eps=eps,
        head_norm_eps=head_dim * eps,
    )
    config.done(NO_EFFECT)
    return make


def head_size(config: Config, name: str, hidden: int) -> int:
    size = config.size(name, 64, of=(".r_k", 1))
    if hidden % size:
        raise config.refused(name, size, f"a divisor of the width {hidden}")
    return size


def intermediate_size(config: Config, hidden: int) -> int:
    width = config.entry("intermediate_size", None)
    if width is not None:
        return config.size("intermediate_size", of=("ffn.key.weight", 0))
    ratio = config.number("hidden_ratio", 4.0)
    width = 32 * math.ceil(int(hidden * ratio) / 32)
    config.fits("ffn.key.weight", 0, width, intermediate_size=None, hidden_ratio=ratio)
    return width


def build_native(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    """Releases have no configuration: what an entry does not say, the tensors do."""
    if config.shapes is not None:
        config = config.with_defaults(stored_sizes(config.shapes))
    num_layers = config.layers("n_layer", "blocks.")
    hidden = config.size("n_embd", of=("emb.weight", 1))

    def rank(letter: str) -> int | None:
        name, tensor = RANKS[letter]
        return config.size(name, of=(tensor, 1)) if name in config.entries else None

    make = model(
        vocab_size=config.size("vocab_size", of=("emb.weight", 0)),
        hidden_dim=hidden,
        num_layers=num_layers,
        tie_embeddings=False,
        head_dim=head_size(config, "head_size", hidden),
        decay_rank=rank("w"),
        strength_rank=rank("a"),
        value_rank=rank("v"),
        gate_rank=rank("g"),
        intermediate_dim=config.size("dim_ffn", 4 * hidden, of=("ffn.key.weight", 0)),
        norm_eps=NORM_EPS,
        head_norm_eps=HEAD_NORM_EPS,
    )
    config.done(("layout",))
    return make


def stored_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    places = {
        "n_embd": ("emb.weight", 1),
        "vocab_size": ("emb.weight", 0),
        "head_size": (IN_EVERY_MODEL, 1),
        "dim_ffn": ("blocks.0.ffn.key.weight", 0),
        **{name: (tensor, 1) for name, tensor in RANKS.values()},
    }
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {"n_layer": len(layers)} | {
        name: shapes[tensor][axis]
        for name, (tensor, axis) in places.items()
        if len(shapes.get(tensor, ())) == 2
    }


def model(
    *,
    vocab_size: int,
    hidden_dim: int,
    num_layers: int,
    tie_embeddings: bool,
    norm_eps: float,
    **options: Any,
) -> Callable[[PRNGKeyArray], LanguageModel]:
    block = ft.partial(RWKV7Block, num_layers=num_layers, norm_eps=norm_eps, **options)
    return ft.partial(
        LanguageModel,
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        num_blocks=num_layers,
        blocks=[ft.partial(block, layer=layer) for layer in range(num_layers)],
        norm=ft.partial(eqx.nn.LayerNorm, eps=norm_eps),
        tie_embeddings=tie_embeddings,
    )


def describe(model: Any) -> dict[str, Any] | None:
    sizes = describe_native(model)
    if sizes is None:
        return None
    ranks = {"w": "decay", "a": "a", "v": "v", "g": "gate"}
    return describe_sizes(model) | {
        "head_dim": sizes["head_size"],
        "intermediate_size": sizes["dim_ffn"],
        **{
            f"{name}_low_rank_dim": sizes[RANKS[letter][0]]
            for letter, name in ranks.items()
            if RANKS[letter][0] in sizes
        },
        "attn": None,
        "hidden_act": "sqrelu",
        "norm_bias": True,
        "norm_eps": model.norm.eps,
        "norm_first": True,
    }


def describe_native(model: Any) -> dict[str, Any] | None:
    first, last = model.backbone.blocks[0], model.backbone.blocks[-1]
    if not isinstance(first, RWKV7Block) or not isinstance(last, RWKV7Block):
        return None
    if not isinstance(model.norm, eqx.nn.LayerNorm):
        return None
    vocab_size, hidden = model.encoder.embedding.weight.shape
    mixer = last.sequence_mixer
    return {
        "n_layer": len(model.backbone.blocks),
        "n_embd": hidden,
        "head_size": mixer.bonus.shape[1],
        "vocab_size": vocab_size,
        "dim_ffn": last.channel_mixer.k_proj.weight.shape[0],
        **{RANKS[k][0]: part.down.shape[0] for k, part in low_rank_maps(mixer).items()},
    }


def tensors(model: Any, *, are_joined: bool = False) -> Tensors:
    found: Tensors = {
        "model.embeddings.weight": model.encoder.embedding.weight,
        **linear_tensors({"model.norm": model.norm}),
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        time, channels, layer = block.sequence_mixer, block.channel_mixer, f"model.layers.{i}."
        layers = {
            "attn_norm": block.sequence_norm,
            "ffn_norm": block.channel_norm,
            "attn.r_proj": time.r_proj,
            "attn.k_proj": time.k_proj,
            "attn.v_proj": time.v_proj,
            "attn.o_proj": time.out_proj,
            "ffn.key": channels.k_proj,
            "ffn.value": channels.v_proj,
        }
        if block.input_norm is not None:
            layers["pre_norm"] = block.input_norm
        found |= prefixed(layer, linear_tensors(layers))
        for letter, part in low_rank_maps(time).items():
            at = f"{layer}attn.{letter}_lora.lora."
            found |= {
                f"{at}0.weight": part.down,
                f"{at}2.weight": part.up,
                f"{at}2.bias": part.bias,
            }
        of_mixer: Tensors = {
            "k_k": time.erase_scale,
            "k_a": time.strength_scale,
            "r_k": time.bonus,
            "g_norm.weight": Stored((time.norm_weight,), form=(-1,)),
            "g_norm.bias": Stored((time.norm_bias,), form=(-1,)),
            **({"x_x": time.shift} if are_joined else shifts(time.shift)),
        }
        found |= prefixed(f"{layer}attn.", of_mixer)
        found[f"{layer}ffn.x_k"] = channels.shift
    return found


def native_tensors(model: Any) -> Tensors:
    found: Tensors = {
        "emb.weight": model.encoder.embedding.weight,
        **linear_tensors({"ln_out": model.norm}),
        "head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        time, channels, layer = block.sequence_mixer, block.channel_mixer, f"blocks.{i}."
        layers = {
            "ln1": block.sequence_norm,
            "ln2": block.channel_norm,
            "att.receptance": time.r_proj,
            "att.key": time.k_proj,
            "att.value": time.v_proj,
            "att.output": time.out_proj,
            "ffn.key": channels.k_proj,
            "ffn.value": channels.v_proj,
        }
        if block.input_norm is not None:
            layers["ln0"] = block.input_norm
        found |= prefixed(layer, linear_tensors(layers))
        of_mixer: Tensors = {
            "k_k": row(time.erase_scale),
            "k_a": row(time.strength_scale),
            "r_k": time.bonus,
            "ln_x.weight": Stored((time.norm_weight,), form=(-1,)),
            "ln_x.bias": Stored((time.norm_bias,), form=(-1,)),
            **shifts(time.shift),
        }
        for letter, part in low_rank_maps(time).items():
            of_mixer[f"{letter}0"] = None if part.bias is None else row(part.bias)
            of_mixer[f"{letter}1"] = Stored((part.down,), is_transposed=True)
            of_mixer[f"{letter}2"] = Stored((part.up,), is_transposed=True)
        found |= prefixed(f"{layer}att.", of_mixer)
        found[f"{layer}ffn.x_k"] = row(channels.shift)
    return found


def low_rank_maps(mixer: Any) -> dict[str, Any]:
    """By the letters that both layouts have for them."""
    maps = {"w": mixer.decay, "a": mixer.strength, "v": mixer.value_gate, "g": mixer.gate}
    return {letter: part for letter, part in maps.items() if part is not None}


def row(leaf: Any) -> Stored:
    return Stored((leaf,), form=(1, 1, -1))


def shifts(shift: Any) -> Tensors:
    """A tensor for each of what the six rows are for."""
    return {f"x_{letter}": row(Rows(shift, i, i + 1)) for i, letter in enumerate("rwkvag")}


def used(names: Iterable[str]) -> dict[str, str]:
    """Releases also have maps by which the first layer would lean on its own values."""
    return {name: name for name in names if name not in UNUSED}


def variant(config: Config) -> Any:
    """Older files have the six in one."""
    are_joined = any(name.endswith(".x_x") for name in config.shapes or ())
    return ft.partial(tensors, are_joined=True) if are_joined else None


RWKV7 = Family("rwkv7", "RWKV7ForCausalLM", build, describe, tensors, variant=variant)
RWKV7_NATIVE = Family(
    "rwkv7_native",
    "RWKV-7",
    build_native,
    describe_native,
    native_tensors,
    names=used,
    layout="rwkv_lm",
)
