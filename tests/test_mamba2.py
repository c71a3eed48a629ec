"""Mamba-2: the numbers of the original implementation, its initialisation and its errors."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import changed, draw, normalise, numbers
from test_golden import TOLERANCE, assert_close, golden_gradients

from discretax import Timeseries, inference_state, streaming_mode
from discretax.models import Mamba2
from discretax.sequence_mixers import Mamba2SequenceMixer

NAME = "hf_mamba2_mixer_L48"
WEIGHTS = {
    "in_proj.weight": lambda m: m.in_proj.weight,
    "conv1d.weight": lambda m: m.conv_weight,
    "conv1d.bias": lambda m: m.conv_bias,
    "dt_bias": lambda m: m.dt_bias,
    "A_log": lambda m: m.A_log,
    "D": lambda m: m.D,
    "norm.weight": lambda m: m.norm_weight,
    "out_proj.weight": lambda m: m.out_proj.weight,
}
SMALL = {"state_dim": 3, "head_dim": 2, "num_groups": 2}


def leaves(mixer):
    return [leaf(mixer) for leaf in WEIGHTS.values()]


def golden_leaves(golden, kind):
    arrays = golden.fields(kind)
    arrays["conv1d.weight"] = arrays["conv1d.weight"][:, 0]
    return [arrays[name] for name in WEIGHTS]


def load(golden, **options):
    mixer = Mamba2SequenceMixer(16, jr.key(0), state_dim=8, head_dim=8, num_groups=2, **options)
    return eqx.tree_at(leaves, mixer, golden_leaves(golden, "p"))


def softplus(x):
    return np.log1p(np.exp(numbers(x)))


def silu(x):
    return x / (1 + np.exp(-x))


def reference(mixer, x):
    """Sample by sample and head by head, from the equations."""
    inner, (heads,) = mixer.norm_weight.shape[0], mixer.A_log.shape
    mlp = mixer.out_proj.weight.shape[1] - inner
    convolved, width = mixer.conv_weight.shape
    groups, head_dim = mixer.num_groups, inner // heads
    h = np.zeros((heads, head_dim, mixer.state_dim))
    if mixer.initial_state is not None:
        h += numbers(mixer.initial_state)
    window, ys = np.zeros((width, convolved)), []
    for sample in numbers(x):
        projected = numbers(mixer.in_proj.weight) @ sample
        gate, w, z, u, d = np.split(projected, np.cumsum([mlp, mlp, inner, convolved]))
        window = np.concatenate([window[1:], u[None]])
        v = silu((window * numbers(mixer.conv_weight).T).sum(0) + numbers(mixer.conv_bias))
        v, B, C = np.split(v, (inner, inner + groups * mixer.state_dim))
        v, B, C = v.reshape(heads, -1), B.reshape(groups, -1), C.reshape(groups, -1)
        dt = np.clip(softplus(d + numbers(mixer.dt_bias)), *mixer.dt_limit)
        y = numbers(mixer.D).reshape(heads, -1) * v
        for i in range(heads):
            group = i // (heads // groups)
            h[i] *= np.exp(-np.exp(numbers(mixer.A_log)[i]) * dt[i])
            h[i] += dt[i] * np.outer(v[i], B[group])
            y[i] += h[i] @ C[group]
        y = (y.ravel() * silu(z)).reshape(mixer.norm_groups, -1)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + mixer.norm_eps)
        y = np.concatenate([silu(gate) * w, y.ravel() * numbers(mixer.norm_weight)])
        ys.append(numbers(mixer.out_proj.weight) @ y)
    return np.stack(ys), h


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden(dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(NAME, dtype)
        run = jax.vmap(lambda mixer, x: mixer(x)[0], in_axes=(None, 0))
        d_mixer = golden_gradients(run, load(golden), golden, dtype)
        for actual, expected in zip(leaves(d_mixer), golden_leaves(golden, "g.p"), strict=True):
            assert_close(actual, expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.3)], ids=str)
def test_steps_are_clipped_in_the_whole_and_in_single_steps(limit):
    with jax.enable_x64(True):
        golden = Golden(NAME, "float64")
        mixer = load(golden, dt_limit=limit)

        @jax.jit
        def run(x):
            step = lambda cache, sample: mixer.step(sample, cache)[::-1]
            cache, y = jax.lax.scan(step, mixer.allocate_inference_cache(), x)
            return *mixer(x), y, cache

        x = golden["x"][0]
        y, cache, y_step, cache_step = run(x)
        expected, state = reference(mixer, x)
        unclipped = golden["y"][0]
        assert (np.abs(expected - unclipped).max() > 1e-3) == (limit[0] > 0)
        window = numbers(x)[-3:] @ numbers(mixer.in_proj.weight)[32:96].T
        for actual, end in ((y, cache), (y_step, cache_step)):
            assert_close(actual, expected, "float64")
            assert_close(end.state, state, "float64")
            assert_close(end.window, window, "float64")


@pytest.mark.slow
def test_initial_weights():
    mixer = Mamba2SequenceMixer(
        1000,
        jr.key(0),
        state_dim=2,
        head_dim=1,
        conv_width=9,
        dt_min=0.01,
        dt_max=0.1,
        A_init_range=(2.0, 6.0),
    )
    quantiles = np.linspace(0, 1, 11)
    steps = np.quantile(np.log(softplus(mixer.dt_bias)), quantiles)
    np.testing.assert_allclose(steps, np.log(0.01) + quantiles * np.log(10), atol=0.1)
    rates = np.quantile(np.exp(numbers(mixer.A_log)), quantiles)
    np.testing.assert_allclose(rates, 2 + 4 * quantiles, atol=0.2)
    assert 0.33 < np.abs(mixer.conv_weight).max() <= 1 / 3
    assert 0.33 < np.abs(mixer.conv_bias).max() <= 1 / 3
    np.testing.assert_array_equal(mixer.D, 1)
    np.testing.assert_array_equal(mixer.norm_weight, 1)
    floored = Mamba2SequenceMixer(100, jr.key(0), head_dim=1, dt_init_floor=0.05)
    steps = softplus(floored.dt_bias)
    np.testing.assert_allclose(steps.min(), 0.05, rtol=1e-5)
    assert (np.abs(steps - 0.05) < 1e-6).mean() > 0.5


@pytest.mark.slow
def test_biases_can_be_chosen():
    mixer = Mamba2SequenceMixer(4, jr.key(0), use_bias=True, conv_bias=False, **SMALL)
    assert mixer.in_proj.bias.shape == (8 + 8 + 2 * 2 * 3 + 4,)
    assert mixer.out_proj.bias.shape == (4,)
    assert mixer.conv_bias is None
    assert jnp.isfinite(mixer(jnp.ones((3, 4)))[0]).all()


def test_options_of_mamba_ssm():
    """A gated map beside the states, one norm over all groups, a skip per feature, a learned state that
    every sequence starts from: also in a chunk with resets and padding, and so its gradient."""
    with jax.enable_x64(True):
        options = {"ssm_dim": 8, "expand": 3, "norm_groups": 1, "D_has_hdim": True} | SMALL
        mixer = Mamba2SequenceMixer(4, jr.key(0), learnable_init_states=True, **options)
        np.testing.assert_array_equal(mixer.D, np.ones((4, 2)))
        np.testing.assert_array_equal(mixer.initial_state, np.zeros((4, 2, 3)))
        mixer, x = changed(mixer, dtype="float64"), draw(11, 4)
        cuts, end = (0, 2, 7, 10), 10  # where sequences begin; the last sample is padding
        resets = jnp.zeros(11, bool).at[jnp.array([2, 7, 10])].set(True)

        @eqx.filter_jit
        @eqx.filter_value_and_grad(has_aux=True)
        def whole(mixer, x, resets, length):
            y, cache = mixer(x, resets=resets, length=length)
            return jnp.sin(y[:end]).sum() + jnp.cos(cache.state).sum(), (y, cache)

        (_, (y, cache)), gradient = whole(mixer, x, resets, end)
        pieces = lambda mixer: [reference(mixer, x[s:e]) for s, e in itertools.pairwise(cuts)]
        ys, states = zip(*pieces(mixer), strict=True)
        assert_close(y[:end], np.concatenate(ys), "float64")
        assert_close(cache.state, states[-1], "float64")

        def loss(h0):
            ys, states = zip(
                *pieces(eqx.tree_at(lambda m: m.initial_state, mixer, h0)), strict=True
            )
            return np.sin(np.concatenate(ys)).sum() + np.cos(states[-1]).sum()

        h0, step = numbers(mixer.initial_state), 1e-5 * numbers(draw(4, 2, 3, seed=2))
        slope = loss(h0 + step) - loss(h0 - step)
        np.testing.assert_allclose(2 * (gradient.initial_state * step).sum(), slope, rtol=1e-6)


def test_timesteps_are_refused():
    mixer = Mamba2SequenceMixer(4, jr.key(0), **SMALL)
    with pytest.raises(ValueError, match=r"takes no integration timesteps.*the input's choice"):
        mixer(jnp.ones((3, 4)), integration_timesteps=jnp.ones(3))


def test_foreign_cache_is_refused():
    mixer = Mamba2SequenceMixer(4, jr.key(0), **SMALL)
    other = Mamba2SequenceMixer(4, jr.key(0), state_dim=3, head_dim=4, num_groups=2)
    with pytest.raises(ValueError, match=r"takes a cache of shapes Mamba2Cache\(window=\(3, 20\)"):
        mixer(jnp.ones((5, 4)), other.allocate_inference_cache())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "`state_dim` must be .*; got 0"),
        ({"conv_width": 0}, "`conv_width` must be .*; got 0"),
        ({"expand": 1.5}, "`expand` must be a whole number.*; got 1.5"),
        ({"ssm_dim": 0}, "`ssm_dim` must be .*; got 0"),
        ({"ssm_dim": 10}, "`ssm_dim` must be at most the inner width, .*, 8; got 10"),
        ({"ssm_dim": 6, "head_dim": 4}, "`head_dim` must divide ssm_dim = 6; got 4"),
        ({"head_dim": 3}, "`head_dim` must divide the inner width, .* = 8; got 3"),
        ({"num_groups": 3}, "`num_groups` must divide the number of heads, .* = 4; got 3"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max; got dt_min=0.2 and dt_max=0.1"),
        ({"dt_limit": (0.2, 0.1)}, r"0 <= low < high; got \(0.2, 0.1\)"),
        ({"dt_limit": (-1.0, 1.0)}, r"0 <= low < high; got \(-1.0, 1.0\)"),
        ({"A_init_range": (0.0, 1.0)}, r"0 < low <= high.*; got \(0.0, 1.0\)"),
        ({"A_init_range": (2.0, 1.0)}, r"0 < low <= high.*; got \(2.0, 1.0\)"),
        ({"norm_eps": 0.0}, "`norm_eps` must be positive; got 0.0"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2SequenceMixer(4, jr.key(0), **{**SMALL, **options})


@pytest.mark.slow
def test_model_is_mixers_around_the_residual_stream():
    options = {"conv_width": 2, "expand": 3, "use_bias": True, "conv_bias": False}
    options |= {"dt_min": 0.5, "dt_max": 0.5, "dt_init_floor": 1.0, "dt_limit": (0.1, 2.0)}
    options |= {"A_init_range": (3.0, 3.0), "norm_eps": 1e-3} | SMALL
    model, state = eqx.nn.make_with_state(Mamba2)(jr.key(0), hidden_dim=4, num_blocks=2, **options)
    x = jr.normal(jr.key(1), (9, 4))
    expected = x
    for block in model.blocks:
        mixer = block.sequence_mixer
        same = Mamba2SequenceMixer(4, jr.key(2), **options)
        assert eqx.tree_equal(*(jax.tree.map(jnp.shape, m) for m in (mixer, same)))
        for field in ("state_dim", "num_groups", "dt_limit", "norm_eps"):
            assert getattr(mixer, field) == getattr(same, field)
        for field in ("dt_bias", "A_log"):
            np.testing.assert_array_equal(getattr(mixer, field), getattr(same, field))
        normed = normalise("rms", block.norm, expected)
        expected = expected + numbers(mixer(jnp.asarray(normed, x.dtype))[0])
    np.testing.assert_allclose(model(x, state)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_model_streams():
    """Sample by sample and in chunks, a padded one among them, as over the whole."""
    make = lambda: Mamba2(jr.key(0), hidden_dim=4, num_blocks=2, **SMALL)
    model, state = eqx.nn.make_with_state(make)()
    x = jr.normal(jr.key(1), (9, 4))
    expected = model(x, state)[0]
    live = streaming_mode(eqx.nn.inference_mode(model))
    stream = inference_state(model, state)
    y, stream = live(Timeseries(jnp.pad(x[:3], ((0, 2), (0, 0))), length=3), stream)
    ys = [y.values[:3]]
    for start, end in ((3, 4), (4, 9)):
        y, stream = live(x[start:end], stream)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys), expected, rtol=1e-5, atol=1e-5)
