"""Models with a matrix state: the numbers of the originals, their blocks in NumPy, and their options."""

import functools as ft
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close, assert_equal, changed, draw, gelu, glu, linear, numbers, sigmoid
from test_delta_mixers import namesake_norm
from test_linear_attention_mixers import hgrn2

from discretax.models import (
    GLA,
    HGRN2,
    XLSTM,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    RetNet,
)
from discretax.sequence_mixers import (
    DeltaNetSequenceMixer,
    GatedDeltaNetSequenceMixer,
    GLASequenceMixer,
    HGRN2SequenceMixer,
    KimiDeltaAttentionSequenceMixer,
    MLSTMSequenceMixer,
    RetentionSequenceMixer,
)
from discretax.testing import check_streaming

pytestmark = pytest.mark.slow

TIME, WIDTH = 9, 8
MODELS = {
    DeltaNet: DeltaNetSequenceMixer,
    GatedDeltaNet: GatedDeltaNetSequenceMixer,
    KimiDeltaAttention: KimiDeltaAttentionSequenceMixer,
    GLA: GLASequenceMixer,
    RetNet: RetentionSequenceMixer,
    HGRN2: HGRN2SequenceMixer,
    XLSTM: MLSTMSequenceMixer,
}
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
NARROW = {make: {} if make is DeltaNet else {"intermediate_dim": 12} for make in MODELS}


def small(make, **options):
    options = {"hidden_dim": WIDTH, "num_blocks": 2, "num_heads": 2} | NARROW[make] | options
    return eqx.nn.make_with_state(make)(jr.key(0), **options)


@eqx.filter_jit
def evaluate(model, state, x):
    return eqx.nn.inference_mode(model)(x, state)[0]


def rms(layer, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.eps) * numbers(layer.weight)


def swiglu(mixer, x):
    gate = linear(mixer.gate_proj, x)
    return linear(mixer.down_proj, gate * sigmoid(gate) * linear(mixer.up_proj, x))


# Numbers


def block_weights(block, of_mixer):
    mlp = block.channel_mixer
    return [
        block.sequence_norm.weight,
        *of_mixer(block.sequence_mixer),
        block.channel_norm.weight,
        *(layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    ]


def gated_delta_net_weights(mixer):
    projections, output = mixer.projections, mixer.output
    layers = (projections.q_proj, projections.k_proj, projections.v_proj)
    maps = (mixer.beta_proj, mixer.decay_proj, output.gate_proj, output.out_proj)
    arrays = (projections.conv_weight, mixer.A_log, mixer.dt_bias, output.norm_weight)
    return [*(layer.weight for layer in (*layers, *maps)), *arrays]


def olmo_hybrid_weights(p):
    mixer = lambda name: p[f"linear_attn.{name}"]
    convolutions = [mixer(f"{n}_conv1d.weight")[:, 0] for n in "qkv"]
    return [
        p["attention_layer_norm.weight"],
        *(mixer(f"{n}_proj.weight") for n in "qkvbago"),
        jnp.concatenate(convolutions),
        *(mixer(n) for n in ("A_log", "dt_bias", "o_norm.weight")),
        p["feedforward_layer_norm.weight"],
        *(p[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")),
    ]


def mlstm_weights(mixer):
    projections, output = mixer.projections, mixer.output
    layers = (projections.q_proj, projections.k_proj, projections.v_proj)
    gates = (mixer.input_proj, mixer.forget_proj)
    return [
        *(layer.weight for layer in (*layers, *gates, output.gate_proj, output.out_proj)),
        *(layer.bias for layer in gates),
        output.norm_weight,
    ]


def xlstm_weights(p):
    mixer = lambda name: p[f"mlstm_layer.{name}"]
    maps = ("q", "k", "v", "igate_preact", "fgate_preact", "ogate_preact", "out_proj")
    return [
        p["norm_mlstm.weight"],
        *(mixer(f"{name}.weight") for name in maps),
        *(mixer(f"{name}gate_preact.bias") for name in "if"),
        mixer("multihead_norm.weight").reshape(2, 8),
        p["norm_ffn.weight"],
        *(p[f"ffn.{name}.weight"] for name in ("proj_up_gate", "proj_up", "proj_down")),
    ]


ORIGINALS = {
    "hf_olmo_hybrid_blocks_L37": (
        ft.partial(GatedDeltaNet, num_blocks=3, num_heads=4, head_dim=4, value_dim=6),
        {"negative_eigenvalues": True, "intermediate_dim": 24},
        lambda block: block_weights(block, gated_delta_net_weights),
        lambda golden, i: olmo_hybrid_weights(golden.fields("p", f"{i}.")),
        1e-10,
    ),
    "hf_xlstm_block_L37": (
        ft.partial(XLSTM, num_blocks=1, num_heads=2),
        {"intermediate_dim": 48},
        lambda block: block_weights(block, mlstm_weights),
        lambda golden, i: xlstm_weights(golden.fields("p")),
        2e-6,  # the original computes in float32 inside
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_blocks_are_the_original(name):
    make, options, weights, arrange, tolerance = ORIGINALS[name]
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        model, state = eqx.nn.make_with_state(make)(jr.key(0), hidden_dim=16, **options)
        for i, block in enumerate(model.blocks):
            block = eqx.tree_at(weights, block, arrange(golden, i))
            model = eqx.tree_at(lambda m, i=i: m.blocks[i], model, block)
        y = eqx.filter_jit(jax.vmap(lambda x: model(x, state)[0]))(golden["x"])
        assert_close(y, golden["y"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
def test_delta_net_is_the_model_of_its_namesake(dtype, tolerance):
    """A step of training, batch norms and all, with the options that the namesake's mixer stands for."""
    plain = {"conv_width": None, "activation": None, "shared_beta": True, "output_norm": False}
    options = plain | {"scale": 1.0, "key_norm": namesake_norm, "num_heads": 2, "head_dim": 4}

    def weights(model):
        for block in model.blocks:
            mixer, projections = block.sequence_mixer, block.sequence_mixer.projections
            yield from (projections.q_proj.weight, projections.k_proj.weight)
            yield from (projections.v_proj.weight, mixer.beta_proj.weight)
            yield from (mixer.output.out_proj.weight, block.channel_mixer.w1.weight)
            yield block.channel_mixer.w2.weight

    names = [f"sequence_mixer.{n}_proj" for n in ("q", "k", "v", "beta", "out")]
    names += ["channel_mixer.w1", "channel_mixer.w2"]
    order = [f"blocks.{i}.{name}.weight" for i in range(2) for name in names]

    with jax.enable_x64(dtype == "float64"):
        golden = Golden("dx_deltanet_model_L56", dtype)
        model, state = eqx.nn.make_with_state(DeltaNet)(
            jr.key(0), hidden_dim=6, num_blocks=2, drop_rate=0.0, **options
        )

        @eqx.filter_jit
        @ft.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(params, x):
            there = eqx.tree_at(lambda m: list(weights(m)), model, [params[n] for n in order])
            run = lambda x: there(x, state)
            y, _ = jax.vmap(run, axis_name="batch", out_axes=(0, None))(x)
            return jnp.sum(y * golden["w"]), y

        (_, y), (d_params, d_x) = loss(golden.fields("p"), golden["x"])
        assert_close(y, golden["y"], tolerance)
        assert_close(d_x, golden["g.x"], tolerance)
        assert_close(d_params, golden.fields("g.p"), tolerance)


@every_model
def test_is_a_stack_of_its_blocks(make):
    with jax.enable_x64(True):
        model, state = small(make, **({"norm": None} if make is DeltaNet else {}))
        model = changed(model)
        x = draw(TIME, WIDTH)
        u = numbers(x)
        if make is HGRN2:
            shares = np.exp(numbers(model.lower_bounds))
            shares /= shares.sum(0)
            bounds = np.cumsum(shares, 0) - shares[0]
        for i, block in enumerate(model.blocks):
            mix = lambda v, mixer=block.sequence_mixer: numbers(mixer(jnp.asarray(v))[0])
            if make is HGRN2:
                bounded = eqx.tree_at(lambda m: m.lower_bound, block.sequence_mixer, bounds[i])
                mix = lambda v, mixer=bounded: hgrn2(mixer, v)[0]
            if make is DeltaNet:
                u = u + glu(block.channel_mixer, gelu(mix(u)))
            else:
                u = u + mix(rms(block.sequence_norm, u))
                u = u + swiglu(block.channel_mixer, rms(block.channel_norm, u))
        assert_close(evaluate(model, state, x), u, 1e-10)


# HGRN2's lower bounds


def test_first_block_of_hgrn2_may_forget_all_and_the_others_ever_less():
    model, _ = eqx.nn.make_with_state(HGRN2)(
        jr.key(0), hidden_dim=4, num_blocks=5, num_heads=1, intermediate_dim=4
    )
    bounds = model.bounds()
    expected = np.arange(5)[:, None, None] / 5
    assert_close(bounds, np.broadcast_to(expected, (5, 1, 4)), 1e-6)
    bounds = changed(model).bounds()
    assert (bounds[0] == 0).all() and (np.diff(bounds, axis=0) > 0).all() and (bounds < 1).all()


def test_lower_bounds_are_trained_and_the_mixers_hold_none():
    model, state = small(HGRN2)
    x = draw(TIME, WIDTH)
    gradients = eqx.filter_grad(lambda model: jnp.sum(jnp.sin(evaluate(model, state, x))))(model)
    assert (np.abs(gradients.lower_bounds) > 1e-6).all()
    assert [block.sequence_mixer.lower_bound for block in model.blocks] == [0.0, 0.0]


# Options


def options_of(make):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if name not in ("in_features", "key")
    }


@every_model
def test_defaults_are_those_of_the_mixer(make):
    ours, theirs = options_of(make), options_of(MODELS[make])
    if make is HGRN2:
        del theirs["lower_bound"]  # the model's own
    assert {name: ours.get(name, "missing") for name in theirs} == theirs
    block = {"num_blocks": 4, "prenorm": True, "use_bias": False}
    namesake = {"drop_rate": 0.1, "norm": "batch"}
    block |= namesake if make is DeltaNet else {"drop_rate": 0.0, "norm": "rms"}
    assert {name: ours[name] for name in block} == block


OTHER = {
    "num_heads": 1,
    "num_value_heads": 2,
    "head_dim": 6,
    "value_dim": 5,
    "conv_width": 3,
    "shared_beta": True,
    "negative_eigenvalues": True,
    "gate": True,
    "output_norm": False,
    "norm_eps": 1e-3,
    "scale": 0.5,
    "activation": None,
    "key_norm": namesake_norm,
    "A_init_range": (2.0, 3.0),
    "dt_min": 0.02,
    "dt_max": 0.03,
    "dt_init_floor": 0.025,
    "lower_bound": -3.0,
    "gate_bias": False,
    "decay_rank": 2,
    "temperature": 4.0,
    "rotary_base": 100.0,
    "input_bias": -2.0,
    "forget_bias": (1.0, 2.0),
    "gate_soft_cap": 3.0,
    "use_bias": True,
}


@every_model
def test_options_reach_the_mixer(make):
    names = [name for name in options_of(MODELS[make]) if name in options_of(make)]
    options = {name: OTHER[name] for name in names}
    model, _ = small(make, num_blocks=1, **options)
    block_key, *_ = jr.split(jr.key(0), 1)
    mixer_key, _ = jr.split(block_key)
    assert_equal(model.blocks[0].sequence_mixer, MODELS[make](WIDTH, mixer_key, **options))
    assert eqx.tree_equal(model.blocks[0].sequence_mixer, MODELS[make](WIDTH, mixer_key, **options))


@every_model
def test_options_reach_the_blocks(make):
    options = {"drop_rate": 0.3, "prenorm": False, "use_bias": True, "norm": "layer"}
    model, _ = small(make, num_blocks=3, **options)
    assert len(model.blocks) == 3
    for block in model.blocks:
        norm = block.norm if make is DeltaNet else block.channel_norm
        mlp = block.channel_mixer
        first, last = (mlp.w1, mlp.w2) if make is DeltaNet else (mlp.gate_proj, mlp.down_proj)
        assert isinstance(norm, eqx.nn.LayerNorm)
        assert (block.dropout.p, block.prenorm) == (0.3, False)
        assert first.bias is not None and last.bias is not None
        assert first.out_features == (WIDTH if make is DeltaNet else 12)


@pytest.mark.parametrize(
    ("make", "hidden_dim", "options", "width"),
    [
        (GatedDeltaNet, 200, {}, 768),  # 8/3 of it, in steps of 256
        (RetNet, 300, {}, 512),  # 4/3 of it
        (GLA, 200, {"hidden_ratio": 6}, 1024),
        (XLSTM, 200, {}, 576),  # 8/3 of it, in steps of 64
        (XLSTM, 24, {}, 64),
        (HGRN2, 8, {"hidden_ratio": 2, "intermediate_dim": 9}, 9),
    ],
)
def test_width_of_the_mlp(make, hidden_dim, options, width):
    model, _ = eqx.nn.make_with_state(make)(
        jr.key(0), hidden_dim=hidden_dim, num_blocks=1, num_heads=2, **options
    )
    assert model.blocks[0].channel_mixer.gate_proj.out_features == width


@every_model
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_block": 2}, TypeError, "unexpected keyword argument 'num_block'"),
        ({"num_blocks": 0}, ValueError, "`num_blocks` must be a whole number .* got 0"),
        ({"num_blocks": 2.0}, ValueError, "`num_blocks` must be a whole number .* got 2.0"),
        ({"hidden_dim": 0}, ValueError, "`hidden_dim` must be a whole number .* got 0"),
        ({"num_heads": 3}, ValueError, "`num_heads` must divide in_features = 8; got 3"),
        ({"num_heads": 0}, ValueError, "`num_heads` must be a whole number .* got 0"),
        ({"norm_eps": 0.0}, ValueError, "`norm_eps` must be positive; got 0.0"),
        ({"drop_rate": 1}, ValueError, r"`drop_rate` must lie in \[0, 1\); got 1"),
        ({"norm": "instance"}, ValueError, "`norm` must be 'batch', .* got 'instance'"),
    ],
)
def test_unfit_options_are_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        small(make, **options)


@pytest.mark.parametrize("make", [make for make in MODELS if make is not DeltaNet])
def test_unfit_widths_are_refused(make):
    with pytest.raises(ValueError, match=r"`intermediate_dim` must be a whole number .* got 0"):
        small(make, intermediate_dim=0)
    if make is not XLSTM:
        with pytest.raises(ValueError, match="`hidden_ratio` must be positive and finite; got -1"):
            small(make, hidden_ratio=-1, intermediate_dim=None)


# Streaming


@pytest.mark.parametrize("make", [HGRN2, RetNet])
def test_streams(make):
    """One that sets its mixers' bounds when called, and one that counts samples."""
    model, state = small(make)
    check_streaming(changed(model), state, draw(TIME, WIDTH))
