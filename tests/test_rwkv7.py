"""RWKV-7: its states against the numbers of its author's code, and its values that travel between layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, changed, draw

from discretax import Timeseries, inference_state, streaming_mode
from discretax.blocks import RWKV7Block
from discretax.models import RWKV7
from discretax.pretrained import load
from discretax.sequence_mixers import RWKV7ChannelMixer, RWKV7SequenceMixer
from discretax.testing import check_streaming

LAYERS, WIDTH, HEAD = 3, 16, 8
RANKS = {"decay_rank": 4, "strength_rank": 5, "value_rank": 3, "gate_rank": 6}
SIZES = {"hidden_dim": WIDTH, "num_blocks": LAYERS, "head_dim": HEAD, "intermediate_dim": 48}


def noisy_model(**options):
    model, state = eqx.nn.make_with_state(RWKV7)(jr.key(0), **SIZES, **RANKS, **options)
    return changed(model), state


def test_states_are_the_original():
    """What a stream keeps after 37 samples: the last input of both mixers, and the matrices."""
    with jax.enable_x64():
        golden = Golden("hf/rwkv7_native/golden", "float64")
        model, state = load(FOLDER / "hf" / "rwkv7_native", dtype="float64")
        model = streaming_mode(eqx.nn.inference_mode(model))
        state = inference_state(model, state, dtype=jnp.float64)
        tokens = golden["input_ids_L37"].astype(int)
        _, after = eqx.filter_jit(model)(tokens[0], state)
        for i, block in enumerate(model.backbone.blocks):
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
