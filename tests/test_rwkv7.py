"""RWKV-7 against the numbers of its author's code, and its values that travel between layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, changed, draw
from safetensors.numpy import load_file

from discretax import Timeseries, inference_state, streaming_mode
from discretax.blocks import RWKV7Block
from discretax.models import RWKV7
from discretax.sequence_mixers import RWKV7ChannelMixer, RWKV7SequenceMixer
from discretax.testing import check_streaming

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


def noisy_model(**options):
    model, state = eqx.nn.make_with_state(RWKV7)(jr.key(0), **SIZES, **RANKS, **options)
    return changed(model), state


def test_states_are_the_original(blank):
    """What a stream keeps after 37 samples: the last input of both mixers, and the matrices."""
    with jax.enable_x64():
        golden = Golden("hf_rwkv7_native", "float64")
        file = load_file(FOLDER / "hf" / "rwkv7_native" / "model.safetensors")
        p = {name: jnp.asarray(array, float) for name, array in file.items()}
        model, state = blank
        places = lambda model: [ours for ours, _ in weights(model, p)]
        model = eqx.tree_at(places, model, [theirs for _, theirs in weights(model, p)])
        model = streaming_mode(eqx.nn.inference_mode(model))
        state = inference_state(model, state, dtype=jnp.float64)
        tokens = golden["input_ids_L37"].astype(int)
        _, after = jax.jit(lambda ids: model(p["emb.weight"][ids], state))(tokens[0])
        for i, block in enumerate(model.blocks):
            time, channels = after.get(block.cache_index)
            assert_close((time.last, channels), tuple(golden["state_shift_L37"][0, i]), 1e-10)
            assert_close(time.state.mT, golden["state_wkv_L37"][0, i], 1e-10)


def test_streams():
    model, state = noisy_model()
    check_streaming(model, state, draw(6, WIDTH))


def test_values_of_the_first_layer_reach_the_last():
    """Two mixers without and with their connection: the second leans on the first one's values."""
    gives, takes = (
        changed(RWKV7SequenceMixer(8, jr.key(0), head_dim=4, value_residual=role, **RANKS))
        for role in ("gives", "takes")
    )
    y, values = jnp.split(gives(draw(5, 8))[0], 2, axis=-1)
    out, handed_on = jnp.split(takes(jnp.concatenate([y, values], -1))[0], 2, axis=-1)
    np.testing.assert_array_equal(handed_on, values)
    other, _ = jnp.split(takes(jnp.concatenate([y, 2 * values], -1))[0], 2, axis=-1)
    assert jnp.abs(out - other).max() > 0.01


def test_starts_as_the_authors_code():
    """Outputs are zero, decays spread over the features, and both depend on where a layer stands."""
    model, state = eqx.nn.make_with_state(RWKV7)(jr.key(0), **SIZES, **RANKS)
    x = draw(5, WIDTH)
    y, _ = model(x, state)
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert_close(y, norm(x))  # the first layer's norm alone
    place = np.arange(WIDTH) / WIDTH
    along = np.arange(WIDTH) / (WIDTH - 1)
    in_head = (np.arange(WIDTH) % HEAD - (HEAD - 1) / 2) / ((HEAD - 1) / 2)
    for layer, block in enumerate(model.blocks):
        mixer, late = block.sequence_mixer, layer / (LAYERS - 1)
        decay = -6 + 6 * along ** (1 + late**0.3) + 0.5 + 2.5 * in_head * np.abs(in_head)
        assert_close(mixer.decay.bias, decay)
        assert_close(mixer.shift[1], 1 - place ** (0.9 * (1 - layer / LAYERS)))
        assert_close(block.channel_mixer.shift, 1 - place ** ((1 - layer / LAYERS) ** 4))
        assert_close(mixer.norm_weight, np.full((2, HEAD), ((1 + layer) / LAYERS) ** 0.7))
        for scale, layer in ((1, mixer.r_proj), (0.1, mixer.k_proj), (1, mixer.v_proj)):
            assert_close(layer.weight @ layer.weight.T, scale**2 * np.eye(WIDTH), 2e-6)


def test_one_block_is_a_whole_model():
    model, state = eqx.nn.make_with_state(RWKV7)(
        jr.key(0), hidden_dim=WIDTH, num_blocks=1, head_dim=HEAD
    )
    y, _ = changed(model)(draw(4, WIDTH), state)
    assert y.shape == (4, WIDTH)
    assert model.blocks[0].sequence_mixer.decay.down.shape == (32, WIDTH)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (RWKV7SequenceMixer, {"head_dim": 3}, "`head_dim` must divide in_features = 8"),
        (RWKV7SequenceMixer, {"value_residual": "both"}, "`value_residual` must be one of"),
        (RWKV7SequenceMixer, {"decay_rank": 0}, "`decay_rank` must be a whole number"),
        (RWKV7SequenceMixer, {"layer": 2, "num_layers": 2}, "`layer` must be one of the 2"),
        (RWKV7ChannelMixer, {"intermediate_dim": 0}, "`intermediate_dim` must be a whole number"),
        (RWKV7ChannelMixer, {"layer": -1}, "`layer` must be one of the 1"),
        (RWKV7Block, {"norm_eps": float("nan")}, "`norm_eps` must be positive; got nan"),
        (RWKV7Block, {"drop_rate": 1.0}, "`drop_rate` must lie in"),
    ],
)
def test_refuses_options(make, options, message):
    sizes = {} if make is RWKV7ChannelMixer else {"head_dim": 4}
    with pytest.raises(ValueError, match=message):
        make(8, jr.key(0), **{**sizes, **options})


def test_takes_no_timesteps():
    model, state = noisy_model()
    with pytest.raises(ValueError, match="takes no integration timesteps"):
        model(Timeseries(draw(4, WIDTH), timesteps=jnp.ones(4)), state)
