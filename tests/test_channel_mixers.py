import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    FEATURES,
    TIME,
    assert_close,
    assert_equal,
    changed,
    draw,
    gelu,
    glu,
    linear,
    numbers,
    parameters,
    sigmoid,
)

from discretax.channel_mixers import GLU, HalfGLU, IdentityChannelMixer, MLPChannelMixer, SwiGLU

PHI = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "swish": lambda x: x * sigmoid(x),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


def mlp(mixer, x):
    return PHI[mixer.non_linearity](linear(mixer.linear, x))


def swiglu(mixer, x):
    gate = linear(mixer.gate_proj, x)
    return linear(mixer.down_proj, gate * sigmoid(gate) * linear(mixer.up_proj, x))


def half_glu(phi, mixer, x):
    return numbers(x) * sigmoid(linear(mixer.linear, phi(numbers(x))))


SmallSwiGLU = ft.partial(SwiGLU, intermediate_dim=5)
CASES = {
    "GLU": (GLU, glu),
    "GLU without bias": (ft.partial(GLU, use_bias=False), glu),
    "GLU to another width": (ft.partial(GLU, out_features=3), glu),
    "HalfGLU": (HalfGLU, ft.partial(half_glu, lambda x: x)),
    "HalfGLU without bias": (
        ft.partial(HalfGLU, use_bias=False),
        ft.partial(half_glu, lambda x: x),
    ),
    "HalfGLU through gelu": (
        ft.partial(HalfGLU, gate_activation=jax.nn.gelu),
        ft.partial(half_glu, gelu),
    ),
    "SwiGLU": (SmallSwiGLU, swiglu),
    "SwiGLU with bias": (ft.partial(SmallSwiGLU, use_bias=True), swiglu),
    "SwiGLU to another width": (ft.partial(SmallSwiGLU, out_features=3), swiglu),
    "MLP": (MLPChannelMixer, mlp),
    "MLP with bias": (ft.partial(MLPChannelMixer, use_bias=True), mlp),
    "MLP to another width": (ft.partial(MLPChannelMixer, out_features=3), mlp),
    "identity": (IdentityChannelMixer, lambda mixer, x: numbers(x)),
} | {phi: (ft.partial(MLPChannelMixer, non_linearity=phi), mlp) for phi in PHI}

every_case = pytest.mark.parametrize("make, formula", CASES.values(), ids=CASES.keys())
WITH_PARAMETERS = (GLU, HalfGLU, SmallSwiGLU, MLPChannelMixer)
with_parameters = pytest.mark.parametrize("cls", WITH_PARAMETERS)


@every_case
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_formula_over_any_leading_axes(make, formula, leading):
    mixer = changed(make(FEATURES, jr.key(0)))
    x = draw(*leading, FEATURES)
    assert_close(mixer(x), formula(mixer, x))


@every_case
def test_formula_in_float64(make, formula):
    mixer = make(FEATURES, jr.key(0))
    with jax.enable_x64(True):
        mixer = changed(mixer, dtype=jnp.float64)
        x = draw(TIME, FEATURES)
        assert x.dtype == jnp.float64
        assert_close(mixer(x), formula(mixer, x), rtol=1e-12)


@every_case
def test_bfloat16_in_bfloat16_out(make, formula):
    mixer = changed(make(FEATURES, jr.key(0)))
    x = draw(TIME, FEATURES).astype(jnp.bfloat16)
    y = mixer(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), formula(mixer, x), rtol=2e-2)


@with_parameters
@pytest.mark.parametrize("use_bias", [True, False])
def test_use_bias_is_for_all_maps(cls, use_bias):
    mixer = cls(FEATURES, jr.key(0), use_bias=use_bias)
    maps = {path.split(".")[1] for path in parameters(mixer)}
    biases = {path.split(".")[1] for path in parameters(mixer) if path.endswith(".bias")}
    assert biases == (maps if use_bias else set())


def test_default_bias():
    has_bias = lambda cls: any(p.endswith(".bias") for p in parameters(cls(FEATURES, jr.key(0))))
    assert [has_bias(cls) for cls in WITH_PARAMETERS] == [True, True, False, False]


@pytest.mark.parametrize(
    "in_features, options, width",
    [
        (FEATURES, {}, 256),
        (96, {}, 256),  # 96 * 4 * 2/3 = 256
        (97, {}, 512),
        (200, {"hidden_ratio": 2}, 512),  # 266.7
        (385, {"hidden_ratio": 1}, 512),  # 256.7
        (1, {"hidden_ratio": 1}, 256),  # 0.7
        (1, {"hidden_ratio": 0.5}, 256),
        (FEATURES, {"intermediate_dim": 7}, 7),
    ],
)
def test_inner_width_of_swiglu(in_features, options, width):
    mixer = eqx.filter_eval_shape(SwiGLU, in_features, jr.key(0), **options)
    assert mixer.gate_proj.weight.shape == (width, in_features)
    assert mixer.up_proj.weight.shape == (width, in_features)
    assert mixer.down_proj.weight.shape == (in_features, width)


@pytest.mark.parametrize("cls", [*WITH_PARAMETERS, IdentityChannelMixer])
def test_key_by_position_or_by_name(cls):
    assert_equal(cls(FEATURES, jr.key(3)), cls(FEATURES, key=jr.key(3)))


def test_identity_needs_no_key():
    x = draw(TIME, FEATURES)
    assert_equal(IdentityChannelMixer(FEATURES)(x), x)
    assert_equal(IdentityChannelMixer(FEATURES, out_features=FEATURES)(x), x)


@pytest.mark.parametrize("cls", [*WITH_PARAMETERS, IdentityChannelMixer])
@pytest.mark.parametrize(
    "x, received",
    [
        (jnp.zeros((TIME, 3)), r"float32\(11, 3\)"),
        (jnp.zeros(()), r"float32\(\)"),
        (
            jnp.zeros((TIME, FEATURES), jnp.int32),
            r"int32\(11, 4\)\. Convert it: `\.astype\(float\)`",
        ),
    ],
)
def test_input_that_does_not_fit(cls, x, received):
    mixer = cls(FEATURES, jr.key(0))
    name = type(mixer).__name__
    with pytest.raises(ValueError, match=f"`{name}` takes floating .* size 4; got {received}"):
        mixer(x)


@with_parameters
@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize("size", [0, -1, 4.0])
def test_sizes_are_whole_numbers_from_one(cls, name, size):
    sizes = {"in_features": FEATURES, name: size}
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number .* got {size}"):
        cls(key=jr.key(0), **sizes)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"intermediate_dim": 5, "hidden_ratio": 4},
            r"`intermediate_dim` and `hidden_ratio` both .* got 5 and 4\. Give one",
        ),
        ({"intermediate_dim": 0}, "`intermediate_dim` must be a whole number .* got 0"),
        ({"hidden_ratio": 0}, "`hidden_ratio` must be .*got 0"),
        ({"hidden_ratio": -1.0}, "`hidden_ratio` must be .*got -1.0"),
    ],
)
def test_inner_widths_that_swiglu_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SwiGLU(FEATURES, jr.key(0), **options)


def test_unknown_non_linearity():
    with pytest.raises(ValueError, match=r"`non_linearity` must be one of 'relu', 'gelu'.*'rleu'"):
        MLPChannelMixer(FEATURES, jr.key(0), non_linearity="rleu")


@pytest.mark.parametrize(
    "cls, remedy", [(IdentityChannelMixer, "MLPChannelMixer"), (HalfGLU, "GLU")]
)
def test_mixers_that_cannot_change_the_width(cls, remedy):
    assert cls(FEATURES, jr.key(0), out_features=FEATURES).in_features == FEATURES
    with pytest.raises(ValueError, match=rf"out_features=5\. Use `{remedy}`"):
        cls(FEATURES, jr.key(0), out_features=5)


def test_gate_activation_is_a_function():
    with pytest.raises(TypeError, match=r"`gate_activation` must be None or .*got 'gelu'"):
        HalfGLU(FEATURES, jr.key(0), gate_activation="gelu")


@pytest.mark.parametrize("cls", [GLU, HalfGLU, SwiGLU, MLPChannelMixer, IdentityChannelMixer])
def test_unknown_keyword(cls):
    with pytest.raises(TypeError, match="out_feature"):
        cls(FEATURES, jr.key(0), out_feature=3)
