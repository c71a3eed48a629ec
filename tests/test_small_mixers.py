"""What is their own: LFM2's numbers, gates that saturate, the shapes of Hydra's convolution."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close, draw, parameters
from test_golden import assert_close as assert_golden, golden_gradients

from discretax.models import Backbone
from discretax.sequence_mixers import (
    HydraSequenceMixer,
    IdentitySequenceMixer,
    MinGRUSequenceMixer,
    MinLSTMSequenceMixer,
    ShortConvSequenceMixer,
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_short_convolution_of_lfm2(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden("hf_lfm2_shortconv_L48", dtype)

        def leaves(mixer):
            into, out = mixer.in_proj, mixer.out_proj
            conv = mixer.conv_weight, mixer.conv_bias
            return [into.weight, into.bias, *conv, out.weight, out.bias]

        def original(kind):
            p = golden.fields(kind)
            into, out = (
                [p[f"{name}.{part}"] for part in ("weight", "bias")]
                for name in ("in_proj", "out_proj")
            )
            return [*into, p["conv.weight"][:, 0], p["conv.bias"], *out]

        mixer = ShortConvSequenceMixer(12, jr.key(0), use_bias=True)
        mixer = eqx.tree_at(leaves, mixer, original("p"))
        run = jax.vmap(lambda mixer, x: mixer(x)[0], in_axes=(None, 0))
        d_mixer = golden_gradients(run, mixer, golden, dtype)
        for ours, expected in zip(leaves(d_mixer), original("g.p"), strict=True):
            assert_golden(ours, expected, dtype)


@pytest.mark.parametrize("make", [MinGRUSequenceMixer, MinLSTMSequenceMixer])
@pytest.mark.parametrize("size", [1e2, 1e6])
def test_gates_that_saturate(make, size):
    """A candidate enters whole or not at all; a sum of logarithms would be none here."""
    mixer, x = make(3, jr.key(0)), size * draw(200, 3)
    y, pull = jax.vjp(eqx.filter_jit(lambda mixer, x: mixer(x)[0]), mixer, x)
    largest = np.abs(np.asarray(x) @ np.asarray(mixer.candidate_proj.weight).T).max() + 1.1
    assert (np.asarray(y) >= 0).all() and np.asarray(y).max() <= largest
    assert all(np.isfinite(leaf).all() for leaf in parameters(pull(jnp.ones_like(y))).values())


@pytest.mark.parametrize("make", [MinGRUSequenceMixer, MinLSTMSequenceMixer])
def test_what_is_held_is_held(make):
    """Of a gate that lets in 1e-12, the past loses no more, though 1 - 1e-12 is one in float32."""
    mixer = make(1, jr.key(0))
    mixer = jax.tree.map(jnp.zeros_like, mixer)
    logit = 27.6  # 1e-12 lets in
    if make is MinGRUSequenceMixer:
        mixer = eqx.tree_at(lambda m: m.gate_proj.bias, mixer, jnp.array([-logit]))
    else:
        biases = lambda m: (m.forget_proj.bias, m.input_proj.bias)
        mixer = eqx.tree_at(biases, mixer, (jnp.array([logit]), jnp.array([-logit])))
    _, h = mixer(jnp.zeros((100, 1)), jnp.array([3.0]))
    assert_close(h, np.array([3.0]), 1e-6)
    _, h = mixer(jnp.zeros((100, 1)), jnp.array([0.0]))
    assert_close(h, np.array([100 * np.exp(-logit) / 2]), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_width": 4}, r"`conv_width` must be odd.*got 4"),
        ({"head_dim": 5}, r"`head_dim`"),
        ({"num_groups": 3}, r"`num_groups`"),
    ],
)
def test_shapes_of_hydra_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HydraSequenceMixer(4, jr.key(0), **({"head_dim": 4} | options))


def test_hydra_sees_as_far_ahead_as_behind():
    """Mirrored samples, with mirrored filters and directions exchanged, give the mirrored answer."""
    mixer = HydraSequenceMixer(4, jr.key(0), state_dim=3, head_dim=4, conv_width=5)
    inner, states = 8, 6
    swap = lambda array: jnp.concatenate(
        [array[: -2 * states], array[-states:], array[-2 * states : -states]]
    )
    rows = mixer.in_proj.weight
    rows = jnp.concatenate([rows[:inner], swap(rows[inner:-4]), rows[-2:], rows[-4:-2]])
    other = eqx.tree_at(
        lambda m: (m.in_proj.weight, m.conv_weight, m.conv_bias),
        mixer,
        (rows, swap(mixer.conv_weight)[:, ::-1], swap(mixer.conv_bias)),
    )
    x = draw(12, 4)
    assert_close(other(x[::-1])[0][::-1], mixer(x)[0], 1e-5)


def test_a_broken_sample_reaches_all_of_its_sequence():
    """Also what came before it, but nothing across a reset."""
    mixer, x = HydraSequenceMixer(4, jr.key(0), state_dim=3, head_dim=4), draw(12, 4)
    resets = np.isin(np.arange(12), [4, 9])
    run = eqx.filter_jit(lambda x: mixer(x, resets=jnp.asarray(resets))[0])
    broken = np.isnan(np.asarray(run(x.at[6, 1].set(jnp.inf)))).all(1)
    np.testing.assert_array_equal(broken, (np.arange(12) >= 4) & (np.arange(12) < 9))
    assert_close(run(x.at[6, 1].set(jnp.nan))[~broken], run(x)[~broken], 0)


def test_identity_in_a_model():
    """A model without a memory answers every sample by itself."""
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=4, num_blocks=1, sequence_mixer=IdentitySequenceMixer, norm="layer"
    )
    model, x = eqx.nn.inference_mode(model), draw(5, 4)
    run = eqx.filter_jit(lambda x: model(x, state)[0])
    assert_close(run(x)[::-1], run(x[::-1]), 1e-6)
