"""`model_type` "xlstm": blocks of mLSTM, those of xLSTM 7B."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax.architectures import LanguageModel
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.pretrained._family import Config, Family, describe_sizes, told
from discretax.pretrained._stored import Stored
from discretax.pretrained._transformer import Tensors, linear_tensors, prefixed
from discretax.sequence_mixers import MLSTMSequenceMixer

NO_EFFECT = (
    # Of how the same numbers are computed.
    "add_forward_backend_padding",
    "autocast_kernel_dtype",
    "chunk_size",
    "chunkwise_kernel",
    "inference_state_dtype",
    "max_inference_chunksize",
    "mode",
    "norm_reduction_force_float32",
    "return_last_states",
    "sequence_kernel",
    "step_kernel",
    # Of training and tokens.
    "add_embedding_dropout",
    "force_bos_token_insert",
    "igate_bias_init_range",
    # The widths are compared with the tensors, however they were come by.
    "mlstm_round_up_to_multiple_of",
    # transformers ties nothing here, whatever it says: the files have both weights.
    "tie_word_embeddings",
)
# What lies in one tensor where `weight_mode` is "fused".
FUSED = {
    "mlstm_layer.qkv_opreact": [f"mlstm_layer.{name}" for name in ("q", "k", "v", "ogate_preact")],
    "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
    "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
}


def build(config: Config) -> Callable[[PRNGKeyArray], LanguageModel]:
    # Published files have the one name or the other.
    depth = "num_hidden_layers" if "num_hidden_layers" in config.entries else "num_blocks"
    num_blocks = config.layers(depth, "backbone.blocks.")
    hidden = hidden_size(config)
    eps, use_bias = config.number("norm_eps", 1e-6), has_bias(config)
    config.fixed(
        num_blocks=num_blocks,
        embedding_dim=hidden,
        add_out_norm=True,
        add_post_blocks_norm=True,
        add_post_norm=False,
        add_qk_norm=False,
        cell_norm_eps=eps,
        eps=1e-6,
    )
    norm = ft.partial(eqx.nn.RMSNorm, eps=eps)
    block = ft.partial(
        ResidualBlock,
        sequence_mixer=mixer(config, eps),
        channel_mixer=channel_mixer(config),
        norm=ft.partial(norm, use_bias=use_bias),
    )
    make = ft.partial(
        LanguageModel,
        vocab_size=config.size("vocab_size", of=("embeddings.weight", 0)),
        hidden_dim=hidden,
        num_blocks=num_blocks,
        blocks=[block],
        norm=ft.partial(norm, use_bias=False),
        tie_embeddings=False,
        soft_cap=config.number("output_logit_soft_cap", 30.0),
    )
    config.done(NO_EFFECT)
    return make


def hidden_size(config: Config) -> int:
    width = "hidden_size" if "hidden_size" in config.entries else "embedding_dim"
    return config.size(width, of=("embeddings.weight", 1))


def has_bias(config: Config) -> bool:
    return config.flag("use_bias", False, of="out_proj.bias")


def is_fused(config: Config) -> bool:
    mode = config.entry("weight_mode", "single")
    if mode not in ("single", "fused"):
        raise config.refused("weight_mode", mode, "'single' or 'fused'")
    return mode == "fused"


def mixer(config: Config, eps: float) -> Callable[..., MLSTMSequenceMixer]:
    hidden, num_heads = hidden_size(config), config.size("num_heads")
    qk, v = config.number("qk_dim_factor", 0.5), config.number("v_dim_factor", 1.0)
    keys, values = int(hidden * qk), int(hidden * v)
    config.fits("out_proj.weight", 1, values, v_dim_factor=v, hidden_size=hidden)
    if is_fused(config):
        both = 2 * (keys + values)
        entries = {"weight_mode": "fused", "qk_dim_factor": qk, "v_dim_factor": v}
        config.fits("qkv_opreact.weight", 0, both, **entries)
        config.fits("ifgate_preact.weight", 0, 2 * num_heads, num_heads=num_heads)
    else:
        config.fits("mlstm_layer.q.weight", 0, keys, qk_dim_factor=qk, hidden_size=hidden)
        config.fits("igate_preact.weight", 0, num_heads, num_heads=num_heads)
    for name, factor, width in (("qk_dim_factor", qk, keys), ("v_dim_factor", v, values)):
        if width % num_heads:
            rule = f"a factor by which num_heads={num_heads} divides the width; it is {width}"
            raise config.refused(name, factor, rule)
    config.fixed(head_dim=values // num_heads)
    return ft.partial(
        MLSTMSequenceMixer,
        num_heads=num_heads,
        head_dim=keys // num_heads,
        value_dim=values // num_heads,
        gate_soft_cap=config.number("gate_soft_cap", 15.0),
        norm_eps=eps,
        use_bias=has_bias(config),
    )


def channel_mixer(config: Config) -> Callable[..., SwiGLU]:
    factor = config.number("ffn_proj_factor", 2.667)
    multiple = config.size("ffn_round_up_to_multiple_of", 64)
    width = rounded(hidden_size(config) * factor, multiple)
    entries = {"ffn_proj_factor": factor, "ffn_round_up_to_multiple_of": multiple}
    config.fits("ffn.proj_down.weight", 1, width, **entries)
    return ft.partial(SwiGLU, intermediate_dim=width, use_bias=has_bias(config))


def rounded(width: float, multiple: int) -> int:
    """As the original rounds: 0.5 above a multiple stays there."""
    return int((width + multiple - 1) // multiple) * multiple


def describe(model: Any) -> dict[str, Any] | None:
    block = model.backbone.blocks[0]
    if not isinstance(block, ResidualBlock) or not isinstance(model.norm, eqx.nn.RMSNorm):
        return None
    mixer, mlp = block.sequence_mixer, block.channel_mixer
    if not isinstance(mixer, MLSTMSequenceMixer) or not isinstance(mlp, SwiGLU):
        return None
    sizes, hidden, width = mixer.projections, mixer.in_features, mlp.gate_proj.weight.shape[0]
    factor = lambda features: told(features, lambda f: int(hidden * f), features / hidden)
    return describe_sizes(model) | {
        "num_heads": sizes.value_heads,
        "qk_dim_factor": factor(sizes.key_heads * sizes.key_dim),
        "v_dim_factor": factor(sizes.value_heads * sizes.value_dim),
        "gate_soft_cap": mixer.gate_soft_cap,
        "output_logit_soft_cap": model.head.soft_cap,
        "norm_eps": model.norm.eps,
        "use_bias": mixer.output.out_proj.bias is not None,
        "weight_mode": "single",
        "ffn_proj_factor": told(width, lambda f: rounded(hidden * f, 1), width / hidden),
        "ffn_round_up_to_multiple_of": 1,
    }


def tensors(model: Any) -> Tensors:
    found: Tensors = {
        "backbone.embeddings.weight": model.encoder.embedding.weight,
        "backbone.out_norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.backbone.blocks):
        mixer, mlp, layer = block.sequence_mixer, block.channel_mixer, f"backbone.blocks.{i}."
        sizes, output = mixer.projections, mixer.output
        maps = {
            "mlstm_layer.q": sizes.q_proj,
            "mlstm_layer.k": sizes.k_proj,
            "mlstm_layer.v": sizes.v_proj,
            "mlstm_layer.ogate_preact": output.gate_proj,
            "mlstm_layer.igate_preact": mixer.input_proj,
            "mlstm_layer.fgate_preact": mixer.forget_proj,
            "mlstm_layer.out_proj": output.out_proj,
            "ffn.proj_up_gate": mlp.gate_proj,
            "ffn.proj_up": mlp.up_proj,
            "ffn.proj_down": mlp.down_proj,
            # They have the same two parts.
            "norm_mlstm": block.sequence_norm,
            "norm_ffn": block.channel_norm,
        }
        found |= prefixed(layer, linear_tensors(maps))
        for name, leaf in (("weight", output.norm_weight), ("bias", output.norm_bias)):
            of_all_heads = None if leaf is None else Stored((leaf,), form=(-1,))
            found[f"{layer}mlstm_layer.multihead_norm.{name}"] = of_all_heads
    return found


def fused_tensors(model: Any) -> Tensors:
    found = tensors(model)
    for i in range(len(model.backbone.blocks)):
        for together, names in FUSED.items():
            for part in ("weight", "bias"):
                popped = [found.pop(f"backbone.blocks.{i}.{name}.{part}") for name in names]
                leaves: list[Any] = [leaf for leaf in popped if leaf is not None]
                if leaves:
                    found[f"backbone.blocks.{i}.{together}.{part}"] = Stored(tuple(leaves))
    return found


XLSTM = Family(
    "xlstm",
    "xLSTMForCausalLM",
    build,
    describe,
    tensors,
    variant=lambda config: fused_tensors if is_fused(config) else None,
)
