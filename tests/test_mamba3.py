"""Mamba-3 against the numbers of the original implementation."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from helpers import assert_close, assert_equal, changed, draw

from discretax.models import Mamba3
from discretax.ops import TrapezoidalState, cumulative_phase, ssd, trapezoidal_ssd
from discretax.ops._rotary import turned
from discretax.sequence_mixers import Mamba3SequenceMixer
from discretax.testing import check_streaming

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)
NOT_INPUTS = ("y", "w", "y_f32", "angle_final", "S_final", "K_final", "V_final")


def as_called_here(a):
    """Outputs and states from one sequence's inputs by the original's names."""
    mimo = "MIMO_V" in a
    heads, pairs = a["V"].shape[1], a["Angles"].shape[-1]
    with_rank = lambda array: array if mimo else array[:, None]
    by_rank = lambda array: jnp.swapaxes(array, 0, 1) if mimo else array[None]
    angle0 = a.get("angle0")
    phases, phase = cumulative_phase(
        jnp.tanh(a["Angles"]) * a["DT"].T[..., None] / 2,
        None if angle0 is None else angle0 / (2 * jnp.pi),
    )
    angles = 2 * jnp.pi * phases

    def rows(name):
        array = jnp.repeat(with_rank(a[name]), heads, axis=2) + by_rank(a[f"{name}_bias"])[None]
        first, second = array[..., ::2], array[..., 1::2]
        both = turned(first[..., :pairs], second[..., :pairs], angles[:, None])
        both = [
            jnp.concatenate([new, old[..., pairs:]], -1)
            for new, old in zip(both, (first, second), strict=True)
        ]
        return jnp.stack(both, -1).reshape(array.shape)

    weight = lambda name: by_rank(a[name])[None] if mimo else 1
    v = a["V"][:, None] * weight("MIMO_V")
    start = None
    if "S0" in a:
        start = TrapezoidalState(a["S0"], by_rank(a["V0"]), by_rank(a["K0"]))
    lam = jax.nn.sigmoid(a["Trap"].T)
    y, state = trapezoidal_ssd(v, a["DT"].T, a["ADT"].T, lam, rows("K"), rows("Q"), start)
    y = y + a["D"][None, None, :, None] * v
    y = y * jax.nn.silu(a["Z"][:, None] * weight("MIMO_Z")) * weight("MIMO_O")
    last = lambda array: jnp.swapaxes(array, 0, 1) if mimo else array[0]
    states = {"angle": 2 * jnp.pi * phase, "S": state.h, "K": last(state.B), "V": last(state.x)}
    return y.sum(1), {f"{name}_final": value for name, value in states.items()}


@PRECISIONS
@pytest.mark.parametrize("start", ["", "_s0"])
@pytest.mark.parametrize("name", ["mamba3_siso_step", "mamba3_mimo_step"])
def test_scan_is_the_original(name, start, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"{name}{start}_L64", dtype)
        sequences = ("Q", "K", "V", "Z", "ADT", "DT", "Trap", "Angles", "angle0", "S0", "K0", "V0")
        inputs = {
            n: array[0] if n in sequences else array
            for n, array in golden.arrays.items()
            if n not in NOT_INPUTS and not n.startswith("g.")
        }

        def loss(inputs):
            y, states = as_called_here(inputs)
            return jnp.sum(y * golden["w"][0]), (y, states)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, (y, states)), gradients = run(inputs)
        assert_close(y, golden["y"][0], tolerance)
        on_circle = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        angle = states.pop("angle_final")
        assert_close(on_circle(angle), on_circle(golden["angle_final"][0]), tolerance)
        for n, state in states.items():
            assert_close(state, golden[n][0], tolerance)
        assert gradients.keys() == golden.fields("g").keys()
        for n, gradient in gradients.items():
            stored = golden[f"g.{n}"]
            assert_close(gradient, stored[0] if n in sequences else stored, tolerance)


MIXERS = {
    "mamba3_siso_mixer_L64": {"rate": "heavy_tail"},
    "mamba3_siso_mixer_softplus_norm_L64": {
        "num_groups": 2,
        "rotary_fraction": 1.0,
        "output_norm": True,
    },
    "mamba3_mimo_mixer_L64": {"rank": 2, "rate": "heavy_tail"},
    "mamba3_mimo_mixer_softplus_norm_L64": {
        "rank": 2,
        "num_groups": 2,
        "rotary_fraction": 1.0,
        "output_norm": True,
    },
}


def weights(mixer, p):
    """The mixer's arrays beside the original's, by its names."""
    yield mixer.in_proj.weight, p["in_proj.weight"]
    yield mixer.out_proj.weight, p["out_proj.weight"]
    yield mixer.dt_bias, p["dt_bias"]
    yield mixer.D, p["D"]
    for n in "BC":
        yield getattr(mixer, f"{n}_weight"), p[f"{n}_norm.weight"]
        yield getattr(mixer, f"{n}_bias"), p[f"{n}_bias"]
    for ours, theirs in (("in", "mimo_x"), ("gate", "mimo_z"), ("out", "mimo_o")):
        if theirs in p:
            yield getattr(mixer, f"{ours}_weight"), p[theirs]
    if "norm.weight" in p:
        yield mixer.norm_weight, p["norm.weight"].reshape(len(p["D"]), -1)


# In float32 one entry of the gradient of `dt_bias` is 4e-5 off: derivatives of decays that cancel,
# summed over a chunk.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 5e-5)])
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_is_the_original(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(name, dtype)
        params, x = golden.fields("p"), golden["x"][0]
        blank = Mamba3SequenceMixer(8, jr.key(0), state_dim=8, head_dim=4, **MIXERS[name])
        places = lambda mixer: [ours for ours, _ in weights(mixer, params)]
        assert len(places(blank)) == len(jax.tree.leaves(eqx.filter(blank, eqx.is_array)))

        def loss(params, x):
            values = [theirs for _, theirs in weights(blank, params)]
            y, _ = eqx.tree_at(places, blank, values)(x)
            return jnp.sum(y * golden["w"][0]), y

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), (d_params, d_x) = run(params, x)
        assert_close(y, golden["y"][0], tolerance)
        assert_close(d_x, golden["g.x"][0], tolerance)
        expected = golden.fields("g.p")
        assert expected.keys() == d_params.keys()
        for n, stored in expected.items():
            assert_close(d_params[n], stored, tolerance)


def random_scan(time, rank=1, heads=2, head_dim=3, state=4):
    each = (time, rank, heads)
    x, B, C = draw(*each, head_dim), draw(*each, state, seed=2), draw(*each, state, seed=3)
    dt = jax.nn.softplus(draw(time, heads, seed=4))
    return x, dt, -dt * jnp.arange(1.0, 1 + heads)[None], B, C


def test_euler_is_ssd():
    x, dt, log_decay, B, C = random_scan(11)
    y, state = trapezoidal_ssd(x, dt, log_decay, jnp.ones_like(dt), B, C)
    A = -jnp.arange(1.0, 3.0)
    expected, h = ssd(x[:, 0], dt, A, B[:, 0], C[:, 0])
    assert_close((y[:, 0], state.h), (expected, h))


def test_half_is_of_second_order():
    r"""Of $\dot h = -h + x$ with $x = \sin t$: half the step, a quarter of the error."""

    def error(steps, trapezoid):
        step = 4 / steps
        at = step * jnp.arange(steps + 1.0)
        x = jnp.sin(at)[:, None, None, None]
        dt, one = jnp.full((steps + 1, 1), step), jnp.ones_like(x)
        y, _ = trapezoidal_ssd(x, dt, -dt, jnp.full_like(dt, trapezoid), one, one)
        exact = (jnp.sin(at) - jnp.cos(at) + jnp.exp(-at)) / 2
        return jnp.abs(y[:, 0, 0, 0] - exact).max()

    with jax.enable_x64():
        for trapezoid, order in ((0.5, 2), (1.0, 1)):
            ratio = error(64, trapezoid) / error(128, trapezoid)
            assert abs(jnp.log2(ratio) - order) < 0.1


def test_inputs_of_a_rank_are_a_sum():
    """Two inputs write what two scans would, and each output reads all of it."""
    x, dt, log_decay, B, C = random_scan(9, rank=2)
    trapezoid = jax.nn.sigmoid(draw(9, 2, seed=5))
    together, _ = trapezoidal_ssd(x, dt, log_decay, trapezoid, B, C)
    alone = lambda i, o: trapezoidal_ssd(
        x[:, i : i + 1], dt, log_decay, trapezoid, B[:, i : i + 1], C[:, o : o + 1]
    )[0][:, 0]
    for o in range(2):
        assert_close(together[:, o], alone(0, o) + alone(1, o))


def test_late_phases_are_as_exact_as_early_ones():
    turns = draw(100_000, 2) + 1
    resets = jnp.zeros(100_000, bool).at[70_000].set(True)
    start = jnp.array([0.25, -0.4])
    phases, last = jax.jit(cumulative_phase)(turns, start, resets=resets)
    exact = np.array(turns, float)
    exact[0] += start
    exact = np.concatenate([np.cumsum(part, axis=0) for part in np.split(exact, [70_000])])
    off = np.asarray(phases, float) - exact
    assert np.abs(off - np.rint(off)).max() < 1e-6
    assert jnp.abs(phases).max() <= 0.5
    assert_equal(last, phases[-1])


def test_derivative_of_phases_is_that_of_their_sum():
    turns, weights = draw(6, 3), draw(6, 3, seed=2)
    resets = jnp.arange(6) == 4
    loss = lambda turns: jnp.sum(weights * cumulative_phase(turns, length=5, resets=resets)[0])
    first, second = weights[:4], weights[4:5] + weights[5:]
    expected = jnp.concatenate([jnp.cumsum(first[::-1], 0)[::-1], second, jnp.zeros((1, 3))])
    assert_close(jax.grad(loss)(turns), expected)


def test_phase_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="`start` must be floating"):
        cumulative_phase(draw(4, 3), jnp.zeros(2))
    with pytest.raises(ValueError, match="`turns` must be floating"):
        cumulative_phase(jnp.zeros((4, 3), int))
    with pytest.raises(ValueError, match=r"`turns` must be \(time, \*phases\); got a scalar"):
        cumulative_phase(jnp.ones(()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 5}, "`state_dim` must be even"),
        ({"rotary_fraction": 0.0}, "`rotary_fraction` must be above 0"),
        ({"rotary_fraction": 1.5}, "`rotary_fraction` must be above 0"),
        ({"rotary_fraction": float("nan")}, "`rotary_fraction` must be above 0"),
        ({"state_dim": 2, "rotary_fraction": 0.5}, "at least one pair"),
        ({"head_dim": 3}, "`head_dim` must divide the inner width"),
        ({"num_groups": 3}, "`num_groups` must divide the number of heads"),
        ({"rank": 0}, "`rank` must be a whole number of at least 1"),
        ({"rate": "exp"}, "`rate` must be one of 'softplus', 'heavy_tail'"),
        ({"A_floor": 0.0}, "`A_floor` must be positive"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba3SequenceMixer(4, jr.key(0), **{"state_dim": 4, "head_dim": 4, **options})


def test_scan_refuses_what_does_not_fit():
    x, dt, log_decay, B, C = random_scan(5)
    with pytest.raises(ValueError, match=r"`x` must be \(time, rank, heads, head_dim\)"):
        trapezoidal_ssd(x[:, 0], dt, log_decay, dt, B, C)
    with pytest.raises(ValueError, match="of at least one rank and head"):
        trapezoidal_ssd(x[:, :0], dt, log_decay, dt, B, C)
    with pytest.raises(ValueError, match=r"`trapezoid` must be floating, of shape \(time, heads\)"):
        trapezoidal_ssd(x, dt, log_decay, dt[:, :1], B, C)
    with pytest.raises(ValueError, match="must not be positive"):
        trapezoidal_ssd(x, dt, -log_decay, dt, B, C)
    with pytest.raises(ValueError, match=r"`initial_state.B` must be floating"):
        state = TrapezoidalState(jnp.zeros((2, 3, 4)), jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)))
        trapezoidal_ssd(x, dt, log_decay, dt, B, C, state)


SMALL = {"state_dim": 4, "head_dim": 4, "intermediate_dim": 12}


def test_model_is_a_stack_of_its_blocks():
    model, state = eqx.nn.make_with_state(Mamba3)(jr.key(0), hidden_dim=4, num_blocks=2, **SMALL)
    model, x = changed(model), draw(6, 4)
    expected = x
    for block in model.blocks:
        normed = jax.vmap(block.sequence_norm)(expected)
        expected = expected + block.sequence_mixer(normed)[0]
        expected = expected + block.channel_mixer(jax.vmap(block.channel_norm)(expected))
    assert_close(model(x, state)[0], expected)
    check_streaming(model, state, x)


def test_options_of_the_model_reach_the_mixer():
    options = {
        "state_dim": 6,
        "expand": 4,
        "head_dim": 2,
        "num_groups": 2,
        "rank": 3,
        "rotary_fraction": 1.0,
        "rate": "heavy_tail",
        "A_floor": 0.1,
        "dt_min": 0.2,
        "dt_max": 0.9,
        "dt_init_floor": 0.3,
        "output_norm": True,
        "norm_eps": 0.2,
    }
    model, _ = eqx.nn.make_with_state(Mamba3)(
        jr.key(0), hidden_dim=4, num_blocks=1, intermediate_dim=12, **options
    )
    (block_key,) = jr.split(jr.key(0), 1)
    mixer = Mamba3SequenceMixer(4, jr.split(block_key)[0], **options)
    assert eqx.tree_equal(model.blocks[0].sequence_mixer, mixer)
    default = inspect.signature(Mamba3SequenceMixer).parameters
    assert options.keys() == default.keys() - {"in_features", "key"}
    assert all(value != default[name].default for name, value in options.items())
