"""RWKV-7 against the numbers of its author's code, and its values that travel between layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close
from safetensors.numpy import load_file

from discretax.models import RWKV7

LAYERS, WIDTH, HEAD = 3, 16, 8
RANKS = {"decay_rank": 4, "strength_rank": 5, "value_rank": 3, "gate_rank": 6}
SIZES = {"hidden_dim": WIDTH, "num_blocks": LAYERS, "head_dim": HEAD, "intermediate_dim": 48}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)


def weights(model, p):
    """The model's arrays beside the author's, by his names, the blocks' alone."""
    for i, block in enumerate(model.blocks):
        at = lambda name, i=i: p[f"blocks.{i}.{name}"]
        flat = lambda name, at=at: at(name).reshape(-1)
        time, channels = block.sequence_mixer, block.channel_mixer
        norms = {"ln1": block.sequence_norm, "ln2": block.channel_norm}
        norms |= {} if block.input_norm is None else {"ln0": block.input_norm}
        for name, norm in norms.items():
            yield norm.weight, at(f"{name}.weight")
            yield norm.bias, at(f"{name}.bias")
        yield time.shift, jnp.stack([flat(f"att.x_{c}") for c in "rwkvag"])
        names = ("receptance", "key", "value", "output")
        layers = (time.r_proj, time.k_proj, time.v_proj, time.out_proj)
        for name, layer in zip(names, layers, strict=True):
            yield layer.weight, at(f"att.{name}.weight")
        maps = {"w": time.decay, "a": time.strength, "g": time.gate, "v": time.value_gate}
        for name, low_rank in maps.items():
            if low_rank is not None:
                yield low_rank.down, at(f"att.{name}1").T
                yield low_rank.up, at(f"att.{name}2").T
                if low_rank.bias is not None:
                    yield low_rank.bias, flat(f"att.{name}0")
        yield time.erase_scale, flat("att.k_k")
        yield time.strength_scale, flat("att.k_a")
        yield time.bonus, at("att.r_k")
        yield time.norm_weight, at("att.ln_x.weight").reshape(-1, HEAD)
        yield time.norm_bias, at("att.ln_x.bias").reshape(-1, HEAD)
        yield channels.shift, flat("ffn.x_k")
        yield channels.k_proj.weight, at("ffn.key.weight")
        yield channels.v_proj.weight, at("ffn.value.weight")


@pytest.fixture(scope="module")
def blank():
    return eqx.nn.make_with_state(RWKV7)(jr.key(0), **SIZES, **RANKS)


def logits_of(blank, state, p, tokens):
    """Of the author's weights; the embedding, the last norm and the head stand here."""
    places = lambda model: [ours for ours, _ in weights(model, p)]
    model = eqx.tree_at(places, blank, [theirs for _, theirs in weights(blank, p)])
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def logits(ids):
        y, _ = model(p["emb.weight"][ids], state)
        y = norm(y) * p["ln_out.weight"][None] + p["ln_out.bias"][None]
        return y @ p["head.weight"].T

    return jax.vmap(logits)(tokens)


@PRECISIONS
def test_model_is_the_original(blank, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("hf_rwkv7_native", dtype)
        file = load_file(FOLDER / "hf" / "rwkv7_native" / "model.safetensors")
        p = {name: jnp.asarray(array, dtype) for name, array in file.items()}
        model, state = blank
        assert len(list(weights(model, p))) == len(jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        tokens = golden["input_ids_L37"].astype(int)

        def loss(p):
            logits = logits_of(model, state, p, tokens)
            return jnp.sum(logits * golden["w_L37"]), logits

        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(p)
        assert_close(logits, golden["logits_L37"], tolerance)
        expected = golden.fields("g_L37")
        assert expected
        for name, stored in expected.items():
            assert_close(gradients[name], stored, tolerance)
