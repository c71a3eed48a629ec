"""Mamba-3 against the numbers of the original implementation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from golden_file import Golden
from helpers import assert_close

from discretax.ops import TrapezoidalState, cumulative_angles, trapezoidal_ssd
from discretax.ops._rotary import turned
from discretax.sequence_mixers import Mamba3SequenceMixer

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
    turns = jnp.pi * jnp.tanh(a["Angles"]) * a["DT"].T[..., None]
    angles, angle = cumulative_angles(turns, a.get("angle0"))

    def rows(name):
        array = jnp.repeat(with_rank(a[name]), heads, axis=2) + by_rank(a[f"{name}_bias"])
        first, second = array[..., ::2], array[..., 1::2]
        both = turned(first[..., :pairs], second[..., :pairs], angles[:, None])
        both = [
            jnp.concatenate([new, old[..., pairs:]], -1)
            for new, old in zip(both, (first, second), strict=True)
        ]
        return jnp.stack(both, -1).reshape(array.shape)

    weight = lambda name: by_rank(a[name]) if mimo else 1
    v = a["V"][:, None] * weight("MIMO_V")
    start = None
    if "S0" in a:
        start = TrapezoidalState(a["S0"], by_rank(a["V0"]), by_rank(a["K0"]))
    lam = jax.nn.sigmoid(a["Trap"].T)
    y, state = trapezoidal_ssd(v, a["DT"].T, a["ADT"].T, lam, rows("K"), rows("Q"), start)
    y = y + a["D"][:, None] * v
    y = y * jax.nn.silu(a["Z"][:, None] * weight("MIMO_Z")) * weight("MIMO_O")
    last = lambda array: jnp.swapaxes(array, 0, 1) if mimo else array[0]
    states = {"angle": angle, "S": state.h, "K": last(state.B), "V": last(state.x)}
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


# In float32 the derivatives of the decays add up over chunks of 64 samples. Sample by sample 3e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
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
