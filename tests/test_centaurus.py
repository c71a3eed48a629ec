"""Centaurus: lrnnx's numbers, the orders of contraction, the rules of its modes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import Golden
from test_golden import assert_close, golden_gradients

from discretax.ops import matrix_convolution, projected_convolution
from discretax.sequence_mixers import (
    Centaurus,
    CentaurusDWS,
    CentaurusFull,
    CentaurusNeck,
    CentaurusPWNeck,
)

MODES = {
    "neck": (CentaurusNeck, {"in_features": 6, "state_dim": 8, "sub_state_dim": 4}),
    "pointwise": (CentaurusPWNeck, {"in_features": 6, "state_dim": 4, "sub_state_dim": 3}),
    "dws": (CentaurusDWS, {"in_features": 6, "sub_state_dim": 4}),
    "full": (CentaurusFull, {"in_features": 4, "sub_state_dim": 3}),
}
ROUTES = [(mode, route) for mode in MODES for route in ("scan", "chunks", "fft")]
ROUTES = [pair for pair in ROUTES if pair[0] != "pointwise" or pair[1] == "scan"]


def load(mixer, arrays):
    """lrnnx's parameters in ours, differentiably: its Re A is free, ours -exp(log_A_real)."""
    fields = ["log_A_real", "A_imag", "log_delta", "B", "C", *(["E"] if "E" in arrays else [])]
    arrays = {**arrays, "log_A_real": jnp.log(-arrays["A.re"]), "A_imag": arrays["A.im"]}
    leaves = lambda m: [getattr(m, field) for field in fields]
    return eqx.tree_at(leaves, mixer, [arrays[field] for field in fields])


def build(mode, route=None):
    make, options = MODES[mode]
    return make(key=jr.key(0), discretization="euler", route=route, **options)


@pytest.mark.parametrize(("mode", "route"), ROUTES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden(mode, route, dtype):
    with jax.enable_x64(dtype == "float64"):
        golden = Golden(f"lrnnx_centaurus_{mode}_L56", dtype)
        mixer = build(mode, route)
        run = lambda arrays, x: jax.vmap(lambda x: load(mixer, arrays)(x)[0])(x)
        d_arrays = golden_gradients(run, golden.fields("p"), golden, dtype)
        for name, expected in golden.fields("g.p").items():
            assert_close(d_arrays[name], expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_golden_steps(mode):
    with jax.enable_x64(True):
        golden = Golden(f"lrnnx_centaurus_{mode}_L56", "float64")
        mixer = load(build(mode), golden.fields("p"))

        def run(x):
            cache = mixer.allocate_inference_cache()
            return jax.lax.scan(lambda c, u: mixer.step(u, c)[::-1], cache, x)

        state, y = jax.jit(jax.vmap(run))(golden["x"])
        final = jnp.stack([golden["final_state.re"], golden["final_state.im"]], axis=-2)
        assert_close(y, golden["y_step"], "float64")
        assert_close(state, final, "float64")


@pytest.mark.parametrize("order", ["project", "transform", "merge", None])
@pytest.mark.parametrize(("time", "lags"), [(20, 20), (7, 20), (1, 1)])
def test_orders_of_contraction_agree(order, time, lags):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        kernel, x = rng.normal(size=(lags, 5)), rng.normal(size=(time, 3))
        B, C = rng.normal(size=(5, 3)), rng.normal(size=(2, 5))
        expected = np.zeros((time, 2))
        for t in range(time):
            for lag in range(min(t + 1, lags)):
                expected[t] += C @ (kernel[lag] * (B @ x[t - lag]))
        arguments = [jnp.asarray(v) for v in (kernel, B, C, x)]
        y = jax.jit(lambda *a: projected_convolution(*a, order=order))(*arguments)
        np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "order"),
    [
        # (time, channels, features, out): the cheapest, counted by hand
        ((1024, 512, 16, 16), "transform"),  # 32 transforms instead of 1024
        ((1024, 16, 512, 512), "project"),  # 32 transforms instead of 1024
        ((1024, 4096, 2, 2), "merge"),  # four kernels instead of 4096
    ],
)
def test_the_cheapest_order_is_taken(shapes, order):
    time, channels, features, out = shapes
    shape = jax.ShapeDtypeStruct
    arguments = [
        shape(s, jnp.float32)
        for s in ((time, channels), (channels, features), (out, channels), (time, features))
    ]
    text = lambda order: str(
        jax.make_jaxpr(lambda *a: projected_convolution(*a, order=order))(*arguments)
    )
    assert text(None) == text(order)
    assert len({text("project"), text("transform"), text("merge")}) == 3


def test_matrix_convolution_is_a_sum_over_inputs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        kernel, x = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 3))
        y = matrix_convolution(jnp.asarray(kernel), jnp.asarray(x))
        expected = [sum(kernel[lag] @ x[t - lag] for lag in range(t + 1)) for t in range(6)]
        np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.slow
def test_discretization_is_honoured():
    """A constant input: zero-order hold is exact, and twice the rate changes nothing."""
    with jax.enable_x64(True):
        options = {"sub_state_dim": 3, "dt_min": 0.1, "dt_max": 0.5}
        run = eqx.filter_jit(lambda mixer, x: mixer(x)[0])
        outputs = {}
        for name in ("zoh", "bilinear", "dirac", "euler"):
            slow = Centaurus(2, jr.key(0), discretization=name, **options)
            fast = Centaurus(2, jr.key(0), discretization=name, step_rescale=0.5, **options)
            y_slow, y_fast = run(slow, jnp.ones((8, 2))), run(fast, jnp.ones((16, 2)))[1::2]
            outputs[name] = y_slow
            error = np.abs(y_slow - y_fast).max() / np.abs(y_slow).max()
            assert (error < 1e-12) == (name == "zoh")
        assert len({float(y.sum()) for y in outputs.values()}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "`mode` must be one of 'neck', .*; got 'dense'"),
        ({"mode": "dws", "state_dim": 5}, "state_dim = in_features = 4 channels; got state_dim=5"),
        ({"mode": "full", "state_dim": 4}, r"in_features \*\* 2 = 16 channels; got state_dim=4"),
        ({"discretization": "async"}, "`discretization` must be one of .*; got 'async'"),
        ({"route": "conv"}, "`route` must be one of 'scan', 'chunks', 'fft', None; got 'conv'"),
        ({"mode": "s5", "route": "fft"}, "runs by scan; got route='fft'"),
        ({"sub_state_dim": 0}, "`sub_state_dim` must be a whole number of at least 1; got 0"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max; got dt_min=0.2 and dt_max=0.1"),
        ({"step_rescale": 0.0}, "`step_rescale` must be positive; got 0.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Centaurus(4, jr.key(0), **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_chunk_with_timesteps(mode):
    mixer = build(mode)
    cache = mixer.allocate_inference_cache() + 1
    y, after = mixer(jnp.zeros((0, mixer.in_features)), cache, integration_timesteps=jnp.zeros(0))
    assert y.shape == (0, mixer.in_features)
    np.testing.assert_array_equal(after, cache)


def test_names_of_the_pointwise_mode():
    assert {Centaurus(4, jr.key(0), mode=m).mode for m in ("pw", "s5", "pointwise")} == {
        "pointwise"
    }
    with pytest.raises(TypeError, match="modes"):
        CentaurusNeck(4, jr.key(0), modes="dws")
