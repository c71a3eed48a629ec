"""Mamba: the numbers of two original implementations, its initialisation and its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import normalise, numbers
from test_golden import assert_close, golden_gradients

from discretax import Timeseries, inference_state, streaming_mode
from discretax.init import inverse_softplus
from discretax.models import Mamba
from discretax.sequence_mixers import MambaSequenceMixer

NAMES = sorted(path.stem for path in FOLDER.glob("*mamba_*.npz"))
# Those that also run in single precision: one of each form.
SINGLE = ("hf_mamba_mixer_L48", "lrnnx_mamba_zoh_event_L56")

WEIGHTS = {
    "A_log": lambda m: m.A_log,
    "D": lambda m: m.D,
    "in_proj.weight": lambda m: m.in_proj.weight,
    "conv1d.weight": lambda m: m.conv_weight,
    "conv1d.bias": lambda m: m.conv_bias,
    "x_proj.weight": lambda m: m.x_proj.weight,
    "dt_proj.weight": lambda m: m.dt_proj.weight,
    "dt_proj.bias": lambda m: m.dt_proj.bias,
    "out_proj.weight": lambda m: m.out_proj.weight,
}


def build(name):
    event = name.endswith("_event_L56")
    mixer = MambaSequenceMixer(
        16 if name.startswith("hf") else 6,
        jr.key(0),
        state_dim=4,
        dt_rank=3,
        discretization="mamba" if name.startswith("hf") else name.split("_")[2],
        event=event,
    )
    return mixer, {**WEIGHTS, "dtA_proj.bias": lambda m: m.dt_A_bias} if event else WEIGHTS


def golden_leaves(golden, kind, weights):
    arrays = golden.fields(kind)
    # dirac does not see the steps of the input where the decay has its own: a gradient of zero.
    leaves = {k: arrays[k] if k in arrays else jnp.zeros_like(golden[f"p.{k}"]) for k in weights}
    leaves["conv1d.weight"] = leaves["conv1d.weight"][:, 0]
    return list(leaves.values())


def leaves(mixer, weights):
    return [leaf(mixer) for leaf in weights.values()]


def load(name, golden):
    mixer, weights = build(name)
    loaded = golden_leaves(golden, "p", weights)
    return eqx.tree_at(lambda m: leaves(m, weights), mixer, loaded), weights


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in NAMES] + [(name, "float32") for name in SINGLE],
)
def test_golden(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        mixer, weights = load(name, golden)
        timesteps = golden.arrays.get("dt")

        def run(arguments, x):
            mixer, timesteps = arguments
            return jax.vmap(lambda x, tau: mixer(x, integration_timesteps=tau)[0])(x, timesteps)

        d_mixer, d_timesteps = golden_gradients(run, (mixer, timesteps), golden, dtype)
        expected = golden_leaves(golden, "g.p", weights)
        for actual, gradient in zip(leaves(d_mixer, weights), expected, strict=True):
            assert_close(actual, gradient, dtype)
        if timesteps is not None:
            assert_close(d_timesteps, golden["g.dt"], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if "final_state" in Golden(n, "float32").arrays])
def test_golden_steps_and_final_state(name):
    with jax.enable_x64(True):
        golden = Golden(name, "float64")
        mixer, _ = load(name, golden)

        @jax.jit
        @jax.vmap
        def run(x, timesteps):
            whole = mixer(x, integration_timesteps=timesteps)[1]

            def step(cache, inputs):
                y, cache = mixer.step(inputs[0], cache, integration_timestep=inputs[1])
                return cache, y

            return whole, *jax.lax.scan(step, mixer.allocate_inference_cache(), (x, timesteps))

        whole, stepped, y = run(golden["x"], golden.arrays.get("dt"))
        # Its step discretises "bilinear" unlike its whole, which is the right one.
        assert_close(y, golden["y" if "bilinear" in name else "y_step"], "float64")
        u = golden["x"][:, -3:] @ golden["p.in_proj.weight"][:12].T
        for cache in (whole, stepped):
            assert_close(cache.window, u, "float64")
            if "bilinear" not in name:
                assert_close(cache.state.mT, golden["final_state"], "float64")


def test_there_are_golden_numbers():
    assert len(NAMES) == 9


@pytest.mark.slow
def test_steps_start_between_their_bounds():
    mixer = MambaSequenceMixer(1000, jr.key(0), dt_min=0.01, dt_max=0.1, expand=3, event=True)
    quantiles = np.linspace(0, 1, 11)
    for bias in (mixer.dt_proj.bias, mixer.dt_A_bias):
        steps = np.log1p(np.exp(numbers(bias)))
        expected = np.log(0.01) + quantiles * np.log(10)
        np.testing.assert_allclose(np.quantile(np.log(steps), quantiles), expected, atol=0.1)
    floored = MambaSequenceMixer(100, jr.key(0), dt_init_floor=0.05)
    steps = np.log1p(np.exp(numbers(floored.dt_proj.bias)))
    np.testing.assert_allclose(steps.min(), 0.05, rtol=1e-5)
    assert (np.abs(steps - 0.05) < 1e-6).mean() > 0.5


def test_inverse_softplus_keeps_small_and_large():
    with jax.enable_x64(False):
        y = jnp.array([1e-30, 1e-7, 0.1, 1.0, 50.0, 1e4])
        expected = [np.log(1e-30), np.log(1e-7), np.log(np.expm1(0.1)), np.log(np.e - 1), 50, 1e4]
        np.testing.assert_allclose(inverse_softplus(y), expected, rtol=1e-6)


def test_initial_weights():
    mixer = MambaSequenceMixer(64, jr.key(0), state_dim=5, conv_width=9, dt_scale=2.0, dt_rank=16)
    np.testing.assert_allclose(np.exp(numbers(mixer.A_log)), np.tile(np.arange(1, 6), (128, 1)))
    np.testing.assert_array_equal(mixer.D, 1)
    assert 0.49 < np.abs(mixer.dt_proj.weight).max() <= 0.5
    assert 0.33 < np.abs(mixer.conv_weight).max() <= 1 / 3
    constant = MambaSequenceMixer(64, jr.key(0), dt_init="constant", dt_rank=16)
    np.testing.assert_array_equal(constant.dt_proj.weight, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize(("in_features", "rank"), [(6, 1), (16, 1), (17, 2), (64, 4)])
def test_automatic_rank_is_a_sixteenth_rounded_up(in_features, rank):
    mixer = MambaSequenceMixer(in_features, jr.key(0), state_dim=2)
    assert mixer.dt_proj.weight.shape == (2 * in_features, rank)


@pytest.mark.slow
def test_normalised_step_and_projections():
    """For one sample: a plain mixer whose maps to d, B and C are divided by the root mean squares."""
    mixer = MambaSequenceMixer(4, jr.key(0), state_dim=3, dt_rank=2, b_c_dt_rms_eps=0.5)
    plain = MambaSequenceMixer(4, jr.key(0), state_dim=3, dt_rank=2)
    x = jr.normal(jr.key(1), (1, 4))
    u = numbers(x[0]) @ numbers(mixer.in_proj.weight)[:8].T
    u = u * numbers(mixer.conv_weight)[:, -1] + numbers(mixer.conv_bias)
    u = u / (1 + np.exp(-u))
    parts = np.split(numbers(mixer.x_proj.weight) @ u, (2, 5))
    scales = [(np.mean(part**2) + 0.5) ** -0.5 for part in parts]
    rows = np.repeat(scales, (2, 3, 3))[:, None] * numbers(mixer.x_proj.weight)
    scaled = eqx.tree_at(lambda m: m.x_proj.weight, plain, jnp.asarray(rows, x.dtype))
    for actual, expected in zip(jax.tree.leaves(mixer(x)), jax.tree.leaves(scaled(x)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_timesteps_multiply_the_decay_and_nothing_else():
    """From a state and without input, gaps that add up to the same leave the same state."""
    mixer = MambaSequenceMixer(4, jr.key(0), conv_bias=False, event=True)
    cache = mixer.allocate_inference_cache()
    cache = cache._replace(state=jr.normal(jr.key(1), cache.state.shape))
    ends = [
        mixer(jnp.zeros((len(gaps), 4)), cache, integration_timesteps=jnp.array(gaps))[1].state
        for gaps in ([3.0], [0.5, 2.5], [1.0, 0.0, 2.0])
    ]
    rates = np.exp(numbers(mixer.A_log)) * np.log1p(np.exp(numbers(mixer.dt_A_bias)))[:, None]
    for end in ends:
        np.testing.assert_allclose(end, np.exp(-3 * rates.T) * numbers(cache.state), rtol=1e-5)


def test_timesteps_need_event():
    mixer = MambaSequenceMixer(4, jr.key(0))
    with pytest.raises(ValueError, match=r"takes no integration timesteps.*unless event=True"):
        mixer(jnp.ones((3, 4)), integration_timesteps=jnp.ones(3))


def test_negative_timestep_is_refused():
    mixer = MambaSequenceMixer(4, jr.key(0), event=True)
    cache = mixer.allocate_inference_cache()
    with pytest.raises(ValueError, match=r"must not be negative; got -1.0"):
        mixer.step(jnp.ones(4), cache, integration_timestep=-1.0)
    with pytest.raises(ValueError, match=r"one per sample: shape \(1,\); got float32\(1, 2\)"):
        mixer.step(jnp.ones(4), cache, integration_timestep=jnp.ones(2))


def test_foreign_cache_is_refused():
    mixer = MambaSequenceMixer(4, jr.key(0), state_dim=3, conv_width=2)
    wider = MambaSequenceMixer(4, jr.key(0), state_dim=3, conv_width=3)
    for cache in (wider.allocate_inference_cache(), jnp.zeros((2, 3)), {"state": jnp.zeros(2)}):
        with pytest.raises(
            ValueError, match=r"takes a cache of shapes MambaCache\(window=\(1, 8\)"
        ):
            mixer(jnp.ones((5, 4)), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "`state_dim` must be .*; got 0"),
        ({"conv_width": 0}, "`conv_width` must be .*; got 0"),
        ({"expand": 1.5}, "`expand` must be a whole number.*; got 1.5"),
        ({"dt_rank": 0}, "`dt_rank` must be .*; got 0"),
        ({"dt_rank": "full"}, "`dt_rank` must be a whole number.*; got 'full'"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max; got dt_min=0.2 and dt_max=0.1"),
        ({"dt_init": "zeros"}, "`dt_init` must be one of 'random', 'constant'; got 'zeros'"),
        ({"b_c_dt_rms_eps": 0.0}, "`b_c_dt_rms_eps` must be positive; got 0.0"),
        ({"discretization": "async"}, "one of 'mamba', 'zoh', 'bilinear', 'dirac'; got 'async'"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MambaSequenceMixer(4, jr.key(0), **options)


@pytest.mark.slow
def test_model_is_mixers_around_the_residual_stream():
    options = {"state_dim": 3, "conv_width": 2, "expand": 3, "dt_rank": 2, "use_bias": True}
    options |= {"conv_bias": False, "discretization": "zoh", "event": True}
    options |= {"dt_min": 0.5, "dt_max": 0.5, "dt_init": "constant", "dt_scale": 3.0}
    options |= {"dt_init_floor": 1.0}
    model, state = eqx.nn.make_with_state(Mamba)(jr.key(0), hidden_dim=4, num_blocks=2, **options)
    x = jr.normal(jr.key(1), (9, 4))
    expected = x
    for block in model.blocks:
        mixer = block.sequence_mixer
        same = MambaSequenceMixer(4, jr.key(2), **options)
        assert eqx.tree_equal(*(jax.tree.map(jnp.shape, m) for m in (mixer, same)))
        for field in ("discretization", "dt_rank"):
            assert getattr(mixer, field) == getattr(same, field)
        np.testing.assert_array_equal(mixer.dt_proj.weight, same.dt_proj.weight)
        np.testing.assert_array_equal(mixer.dt_proj.bias, same.dt_proj.bias)
        normed = normalise("rms", block.norm, expected)
        expected = expected + numbers(mixer(jnp.asarray(normed, x.dtype))[0])
    np.testing.assert_allclose(model(x, state)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_model_streams():
    """Event by event and in chunks, a padded one among them, as over the whole."""
    make = lambda: Mamba(jr.key(0), hidden_dim=4, num_blocks=2, state_dim=3, event=True)
    model, state = eqx.nn.make_with_state(make)()
    x, gaps = jr.normal(jr.key(1), (9, 4)), jr.exponential(jr.key(2), (9,))
    expected = model(Timeseries(x, gaps), state)[0].values
    live = streaming_mode(eqx.nn.inference_mode(model))
    stream = inference_state(model, state)
    padded = Timeseries(jnp.pad(x[:3], ((0, 2), (0, 0))), jnp.pad(gaps[:3], (0, 2)), length=3)
    y, stream = live(padded, stream)
    ys = [y.values[:3]]
    for start, end in ((3, 4), (4, 9)):
        y, stream = live(Timeseries(x[start:end], gaps[start:end]), stream)
        ys.append(y.values)
    np.testing.assert_allclose(jnp.concatenate(ys), expected, rtol=1e-5, atol=1e-5)
