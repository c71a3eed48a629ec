"""The bottleneck and the gate around a mixer, and the S4 block made of them, against numpy."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, changed, draw, glu, linear, numbers, sigmoid

from discretax import discretized, inference_state, resampled, streaming_mode
from discretax.models import S4, S4D
from discretax.optim import recurrent_labels
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    Bidirectional,
    GatedSequenceMixer,
    LRUSequenceMixer,
    S4SequenceMixer,
)

pytestmark = pytest.mark.slow

FEATURES, TIME = 4, 7
inner = ft.partial(S4SequenceMixer, state_dim=4, dt_min=0.1, dt_max=1.0, route="scan")
run = eqx.filter_jit(lambda mixer, x: mixer(x)[0])
run_on = eqx.filter_jit(lambda mixer, x, cache: mixer(x, cache))
step = eqx.filter_jit(lambda mixer, x, cache: mixer.step(x, cache))


def make(sequence_mixer: Any = inner, **options):
    options["sequence_mixer"] = sequence_mixer
    return changed(GatedSequenceMixer(FEATURES, jr.key(0), **options))


def s4(mixer, x):
    """h_t = A_bar h_{t-1} + B_bar x_t, y_t = Re(C h_t) + D x_t: dense, bilinear, one by one."""
    join = lambda p: numbers(p[..., 0]) + 1j * numbers(p[..., 1])
    pairs = lambda p: np.concatenate([p, p.conj()], axis=-1)
    Lambda = pairs(-np.exp(numbers(mixer.A_real)) - 1j * numbers(mixer.A_imag))
    B, C, D = pairs(join(mixer.B)), pairs(join(mixer.C)), numbers(mixer.D)
    P = pairs(join(mixer.P)) if isinstance(mixer, S4SequenceMixer) else np.zeros((1, *B.shape))
    x, eye = numbers(x), np.eye(Lambda.shape[-1])
    y = np.zeros((len(x), *D.shape))
    for i in range(x.shape[1]):
        half_A = (
            np.exp(numbers(mixer.inv_dt)[i]) / 2 * (np.diag(Lambda[i]) - P[:, i].T @ P[:, i].conj())
        )
        backward = np.linalg.inv(eye - half_A)
        A_bar, B_bar = backward @ (eye + half_A), backward @ B[i] * np.exp(numbers(mixer.inv_dt)[i])
        h = np.zeros(len(eye), complex)
        for t, sample in enumerate(x[:, i]):
            h = A_bar @ h + B_bar * sample
            y[t, :, i] = (C[:, i] @ h).real + D[:, i] * sample
    return y.reshape(len(x), -1)


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gated(mixer, x, activation=gelu, gate_activation=lambda v: v):
    u = x if mixer.input_linear is None else linear(mixer.input_linear, x)
    y = activation(s4(mixer.sequence_mixer, u))
    if mixer.output_gate is not None:
        y = linear(mixer.output_gate, y)
    return y if mixer.input_gate is None else y * gate_activation(linear(mixer.input_gate, x))


@pytest.mark.parametrize(
    ("bottleneck", "gate", "channels", "maps"),
    [
        (2, None, 2, {"input_linear": (4, 2)}),
        (None, 2, 1, {"input_gate": (4, 8), "output_gate": (4, 8)}),
        (None, 2, 2, {"input_gate": (4, 8)}),  # the mixer is as wide as the gate
        (2, 3, 2, {"input_linear": (4, 2), "input_gate": (4, 12), "output_gate": (4, 12)}),
    ],
)
def test_equations(bottleneck, gate, channels, maps):
    with jax.enable_x64(True):
        mixer = make(
            sequence_mixer=ft.partial(inner, channels=channels), bottleneck=bottleneck, gate=gate
        )
        x = draw(TIME, FEATURES)
        assert_close(run(mixer, x), gated(mixer, x), 1e-10)
        layers = {n: getattr(mixer, n) for n in ("input_linear", "input_gate", "output_gate")}
        widths = {n: (m.in_features, m.out_features) for n, m in layers.items() if m is not None}
        assert widths == maps


@pytest.mark.parametrize("activation", [None, jnp.tanh])
def test_activations(activation):
    with jax.enable_x64(True):
        mixer = make(bottleneck=2, gate=1, activation=activation, gate_activation=jax.nn.sigmoid)
        x = draw(TIME, FEATURES)
        expected = gated(mixer, x, np.tanh if activation else lambda y: y, sigmoid)
        assert_close(run(mixer, x), expected, 1e-10)


def test_every_weight_has_its_gradient():
    """Along one direction for each array, against central differences of the numpy statement."""
    with jax.enable_x64(True):
        mixer = make(bottleneck=2, gate=1)
        x, weights = draw(TIME, FEATURES), draw(TIME, FEATURES, seed=2)
        gradient = eqx.filter_jit(eqx.filter_grad(lambda mixer: jnp.vdot(weights, mixer(x)[0])))
        params, static = eqx.partition(mixer, eqx.is_inexact_array)
        leaves, structure = jax.tree.flatten(params)
        assert len(leaves) == 6 + 7
        for i, d_leaf in enumerate(jax.tree.leaves(gradient(mixer))):
            direction = numbers(draw(*d_leaf.shape, seed=3 + i))

            def loss(eps, i=i, direction=direction):
                moved = [*leaves[:i], numbers(leaves[i]) + eps * direction, *leaves[i + 1 :]]
                y = gated(eqx.combine(jax.tree.unflatten(structure, moved), static), numbers(x))
                return float(np.vdot(weights, y))

            difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
            assert abs(difference) > 1e-3
            assert_close(np.vdot(d_leaf, direction), difference, 1e-6)


def test_both_directions():
    """A mixer that cannot stream is gated all the same, padding included."""
    with jax.enable_x64(True):
        forward, backward = (LRUSequenceMixer(2, jr.key(i), state_dim=3) for i in (1, 2))
        mixer = make(sequence_mixer=Bidirectional(forward, backward), bottleneck=2, gate=1)
        x = draw(TIME, FEATURES)
        y = eqx.filter_jit(lambda x: mixer(x, length=5)[0])(x.at[5:].set(jnp.nan))
        assert_close(y[:5], run(mixer, x[:5]), 1e-12)
        with pytest.raises(ValueError, match="cannot stream"):
            mixer.allocate_inference_cache()


def test_a_cache_that_grows_with_time():
    """That of attention without a window is as long as the stream, whoever wraps it."""
    mixer = make(ft.partial(AttentionSequenceMixer, num_heads=1), bottleneck=2, gate=1)
    x = draw(TIME, FEATURES)
    y, cache = run_on(mixer, x[:4], mixer.allocate_inference_cache(max_seqlen=TIME))
    pieces = [y]
    for sample in x[4:]:
        y, cache = step(mixer, sample, cache)
        pieces.append(y[None])
    assert_close(jnp.concatenate(pieces), run(mixer, x))
    with pytest.raises(ValueError, match=r"takes a cache of shapes .*; got .*2.*vmap"):
        mixer.step(x[0], mixer.allocate_inference_cache(batch_size=2, max_seqlen=TIME))


# The models


def build(model, **options):
    options = {"bottleneck": 2, "gate": 1, "norm": None, "drop_rate": 0.0} | options
    with_state = eqx.nn.make_with_state(model)
    shape = {"hidden_dim": FEATURES, "num_blocks": 2, "state_dim": 4}
    return with_state(jr.key(0), dt_min=0.1, dt_max=1.0, route="scan", **shape, **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (S4, {}),
        (S4, {"bottleneck": None}),
        (S4D, {"gate": None, "discretization": "bilinear", "channels": 2}),
    ],
)
def test_model(model, options):
    """x + GLU(GELU(mixer(W_u x)) ...), where nothing comes between the product and the GLU."""
    with jax.enable_x64(True):
        model, state = build(model, **options)
        model, x = changed(model), draw(TIME, FEATURES)
        expected = numbers(x)
        for block in model.blocks:
            expected = expected + glu(block.channel_mixer, gated(block.sequence_mixer, expected))
        assert_close(eqx.filter_jit(model)(x, state)[0], expected, 1e-10)


@pytest.mark.parametrize("model", [S4, S4D])
def test_without_both_the_mixer_stands_alone(model):
    model, _ = build(model, bottleneck=None, gate=None)
    for block in model.blocks:
        assert not isinstance(block.sequence_mixer, GatedSequenceMixer)
        assert_close(block.activation(jnp.array([-1.0, 2.0])), gelu(np.array([-1.0, 2.0])), 1e-6)


def test_streaming():
    with jax.enable_x64(True):
        model, state = build(S4)
        x = draw(TIME, FEATURES)
        whole, _ = eqx.filter_jit(model)(x, state)
        live = eqx.filter_jit(streaming_mode(eqx.nn.inference_mode(discretized(model))))
        state, pieces = inference_state(model, state), []
        for start, end in ((0, 1), (1, 5), (5, 7)):
            y, state = live(x[start:end], state)
            pieces.append(y)
        assert_close(jnp.concatenate(pieces), whole, 1e-12)


def test_the_inner_mixer_is_found():
    """By `resampled`, and by the labels of what is recurrent."""
    with jax.enable_x64(True):
        slower, state = build(S4, step_rescale=2.0)
        model, _ = build(S4)
        x = draw(TIME, FEATURES)
        outputs = [eqx.filter_jit(m)(x, state)[0] for m in (resampled(model, 0.5), slower, model)]
        assert_equal(outputs[0], outputs[1])
        assert np.abs(outputs[0] - outputs[2]).max() > 1e-2
    labels = recurrent_labels(eqx.filter(model.blocks[0].sequence_mixer, eqx.is_inexact_array))
    named, _ = jax.tree.flatten_with_path(labels)
    recurrent = {jax.tree_util.keystr(path) for path, label in named if label == "recurrent"}
    names = S4SequenceMixer.recurrent_parameters
    assert recurrent == {f".sequence_mixer.{name}" for name in names}


# What a caller may get wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "`bottleneck`, `gate` or both; got neither"),
        ({"bottleneck": 3}, ValueError, "`bottleneck` must divide in_features = 4; got 3"),
        ({"bottleneck": 0}, ValueError, "`bottleneck` must be .* at least 1; got 0"),
        ({"gate": 0}, ValueError, "`gate` must be .* at least 1; got 0"),
        ({"gate": 0.5}, ValueError, "`gate` must be a whole number .*; got 0.5"),
        ({"gate": 1, "activation": "gelu"}, TypeError, "`activation` must be .*; got 'gelu'"),
        ({"gate": 1, "gate_activation": "glu"}, TypeError, "`gate_activation` must be .*'glu'"),
        (
            {"bottleneck": 2, "sequence_mixer": LRUSequenceMixer(4, jr.key(0), state_dim=2)},
            ValueError,
            r"in_features // bottleneck = 2; got LRUSequenceMixer of width 4",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
