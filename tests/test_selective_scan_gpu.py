"""The GPU kernels of the selective scan, on a GPU or interpreted, against the operation in float64."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, gpu_interpreter, races_found

from discretax import ops
from discretax.ops._selective_scan.gpu import forward
from discretax.ops._selective_scan.gpu_backward import (
    STATES,
    backward,
    checkpoint_every,
    supports,
)
from discretax.sequence_mixers import MambaSequenceMixer

pytestmark = pytest.mark.slow

RESET = 5


def draw(
    batch, time, features, state, *, rates=1, resets=False, separate_steps=True, dtype=jnp.float32
):
    """The arguments of `forward`; `B`, `h0` and the resets are one for the whole batch."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    steps = lambda: jnp.exp(normal(batch, time, features))
    return {
        "x": normal(batch, time, features),
        "dt": steps(),
        "dt_A": steps() if separate_steps else None,
        "A": -jnp.exp(normal(rates, state, features).astype(jnp.float32)),
        "B": normal(1, time, state),
        "C": normal(batch, time, state),
        "h0": normal(1, state, features).astype(jnp.float32),
        "resets": jnp.arange(time)[None] == RESET if resets else None,
    }


def draw_cotangents(values):
    rng = np.random.default_rng(1)
    shape = values["x"].shape
    d_y = jnp.asarray(rng.normal(size=shape), values["x"].dtype)
    return d_y, jnp.asarray(rng.normal(size=(shape[0], *values["A"].shape[1:])), jnp.float32)


def kernels(values, every, d_y, d_h_last, detect_races=False):
    """The outputs, the last state and the derivatives, for each example of the batch."""
    options = {
        "checkpoint_every": every,
        "interpret": gpu_interpreter(detect_races=detect_races),
    }
    y, h_last, checkpoints = jax.jit(lambda values: forward(**values, **options))(values)
    assert not (detect_races and races_found())
    inputs = {name: value for name, value in values.items() if name != "h0"}
    kept = {"checkpoints": checkpoints, "d_y": d_y, "d_h_last": d_h_last}
    gradients = jax.jit(lambda values: backward(**values, **options))(inputs | kept)
    assert not (detect_races and races_found())
    return (y, h_last), gradients


def reference(values, d_y, d_h_last):
    """The same in float64, from the operation and its derivative rule."""

    def run(resets, x, dt, dt_A, A, B, C, h0):
        y, h = ops.selective_scan(x, dt, A.T, B, C, h0=h0.T, dt_A=dt_A, resets=resets)
        return y, h.T

    with jax.enable_x64(True):
        batch = len(d_y)
        shared = lambda value: np.broadcast_to(value, (batch, *value.shape[1:]))
        resets, *arguments = jax.tree.map(shared, [values[name] for name in ("resets", *NAMES)])
        arguments, cotangents = jax.tree.map(
            lambda value: jnp.asarray(value, jnp.float64), (arguments, (d_y, d_h_last))
        )
        outputs, pull = jax.vjp(lambda *values: jax.vmap(run)(resets, *values), *arguments)
        return jax.tree.map(np.asarray, (outputs, pull(cotangents)))


NAMES = ("x", "dt", "dt_A", "A", "B", "C", "h0")


@pytest.mark.parametrize(
    ("sizes", "every", "options"),
    [
        ((2, 13, 40, 4), 16, {"resets": True, "rates": 2}),
        ((1, 13, 136, 8), 16, {"separate_steps": False}),
    ],
    ids=["batch", "blocks"],
)
def test_equals_the_operation(sizes, every, options):
    values = draw(*sizes, **options)
    cotangents = draw_cotangents(values)
    assert_close(kernels(values, every, *cotangents), reference(values, *cotangents), rtol=1e-6)


def test_copies_do_not_race_with_the_lanes():
    values = draw(1, 13, 8, 16)  # two chunks of two tiles
    cotangents = draw_cotangents(values)
    results = kernels(values, 8, *cotangents, detect_races=True)
    assert_close(results, reference(values, *cotangents), rtol=1e-6)


def test_copies_do_not_race_with_the_lanes_forward():
    values = draw(1, 18, 8, 4)  # five tiles: slots are used again
    options = {"checkpoint_every": 4, "interpret": gpu_interpreter(detect_races=True)}
    y, h_last, checkpoints = jax.jit(lambda values: forward(**values, **options))(values)
    assert not races_found()
    (expected, last), _ = reference(values, *draw_cotangents(values))
    assert_close((y, h_last), (expected, last), rtol=1e-6)
    assert_close(checkpoints[:, 0], values["h0"])


def test_bfloat16_loses_only_what_its_outputs_round_away():
    values = draw(1, 6, 8, 4, dtype=jnp.bfloat16)
    cotangents = draw_cotangents(values)
    (y, h_last), gradients = kernels(values, 16, *cotangents)
    expected = reference(values, *cotangents)
    in_float32 = {"A", "h0"}
    for name, value in zip(NAMES, gradients, strict=True):
        assert value.dtype == (jnp.float32 if name in in_float32 else jnp.bfloat16)
    assert (y.dtype, h_last.dtype) == (jnp.bfloat16, jnp.float32)
    as_float32 = jax.tree.map(lambda value: value.astype(jnp.float32), ((y, h_last), gradients))
    assert_close(as_float32, expected, rtol=2**-8)
    exact = [name in in_float32 for name in NAMES]
    pick = lambda values: [value for value, keep in zip(values, exact, strict=True) if keep]
    assert_close((h_last, pick(gradients)), (expected[0][1], pick(expected[1])), rtol=1e-6)


def test_nan_before_a_reset_does_not_pass():
    values = draw(1, 9, 8, 4, resets=True)
    d_y, d_h_last = draw_cotangents(values)
    d_y = d_y.at[:, :RESET].set(0)
    (y, h_last), gradients = kernels(values | {"h0": values["h0"] * jnp.nan}, 16, d_y, d_h_last)
    (expected_y, expected_last), expected = reference(values, d_y, d_h_last)
    after = lambda value: value[:, RESET:]
    assert_close((after(y), h_last), (after(expected_y), expected_last), rtol=1e-6)
    of_samples = [name not in ("A", "h0") for name in NAMES]
    for value, reference_value, keep in zip(gradients, expected, of_samples, strict=True):
        if keep:
            assert_close(after(value), after(reference_value), rtol=1e-6)
    assert not np.any(gradients[-1])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "options",
    [{"resets": True}, {"separate_steps": False, "dtype": jnp.bfloat16}],
    ids=["most", "least"],
)
def test_lowers_at_real_sizes(state, options):
    """Which refuses a kernel that wants more shared memory than there is."""
    values = jax.eval_shape(lambda: draw(2, 2048, 1024, state, **options))
    every = checkpoint_every(state)
    names = ("x", "dt", "dt_A", "A", "B", "C")
    assert supports(*(values[name] for name in names), checkpoint_every=every) is None

    def both(values, d_y, d_h_last):
        y, _, checkpoints = forward(**values, checkpoint_every=every)
        inputs = {name: value for name, value in values.items() if name != "h0"}
        kept = {"checkpoints": checkpoints, "d_y": d_y, "d_h_last": d_h_last}
        return y, backward(**inputs, **kept, checkpoint_every=every)

    cotangents = jax.eval_shape(draw_cotangents, values)
    lowered = jax.jit(both).trace(values, *cotangents).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize(
    ("sizes", "every", "reason"),
    [
        ((1, 8, 8, 5), 16, "states"),
        ((1, 8, 6, 8), 16, "16 bytes"),
        ((1, 8, 8, 8), 12, "multiple of 8"),
        ((1, 8, 8, 32), 32, "shared memory"),
    ],
)
def test_says_what_it_does_not_take(sizes, every, reason):
    values = draw(*sizes)
    refusal = lambda: supports(
        *(values[name] for name in ("x", "dt", "dt_A", "A", "B", "C")), checkpoint_every=every
    )
    assert reason in (refusal() or "")
    values["x"] = values["x"].astype(jnp.float16)
    assert "float32" in (refusal() or "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("separate_steps", [False, True])
def test_the_operation_takes_the_kernels(dtype, separate_steps):
    """Mapped over a batch, and with its gradient; on a CPU not a trace of them is left."""
    batch, time, features, state = 8, 2048, 1024, 16
    wide = jax.ShapeDtypeStruct((batch, time, features), dtype)
    narrow = jax.ShapeDtypeStruct((batch, time, state), dtype)
    A = jax.ShapeDtypeStruct((features, state), "float32")
    resets = jax.ShapeDtypeStruct((batch, time), bool)

    @jax.jit
    def gradients(A, x, dt, dt_A, B, C, resets):
        def loss(A, x, dt, dt_A, B, C):
            run = lambda x, dt, dt_A, B, C, resets: ops.selective_scan(
                x, dt, A, B, C, dt_A=dt_A, resets=resets
            )[0]
            axes = (0, 0, 0 if separate_steps else None, 0, 0, 0)
            dt_A = dt_A if separate_steps else None
            y = jax.vmap(run, in_axes=axes)(x, dt, dt_A, B, C, resets)
            return jnp.square(y.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 4, 5))(A, x, dt, dt_A, B, C)

    traced = gradients.trace(A, wide, wide, wide, narrow, narrow, resets)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    for platform in ("cpu", "tpu"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"discretization": "zoh"}, "`discretization` must be 'mamba'; got 'zoh'"),
        ({"chunk_size": 10}, "`checkpoint_every` must be a multiple of 16"),
        ({}, None),
    ],
)
def test_the_kernels_by_name(options, reason):
    x, B, A = jnp.ones((64, 8)), jnp.ones((64, 4)), -jnp.ones((8, 4))
    run = jax.jit(
        lambda *inputs: ops.selective_scan(*inputs, implementation="mosaic_gpu", **options)
    ).trace(x, x, A, B, B)
    with pytest.raises(ValueError, match=r"runs on NVIDIA GPUs from Hopper.*the platform 'cpu'"):
        run.lower(lowering_platforms=("cpu",))
    if reason is None:
        assert "mosaic_gpu" in run.lower(lowering_platforms=("cuda",)).as_text()
    else:
        with pytest.raises(ValueError, match=reason):
            run.lower(lowering_platforms=("cuda",))


def test_models_side_by_side_and_groups():
    """Examples with rates of their own, a batch of them and one."""
    x, B, A = jnp.ones((3, 64, 16)), jnp.ones((3, 64, 4)), -jnp.ones((3, 16, 4))
    run = ft.partial(ops.selective_scan, implementation="mosaic_gpu")
    grouped = jnp.ones((64, 2, 4))
    calls = [
        (jax.vmap(run), x, x, A, B, B),
        (jax.vmap(run, (None, None, 0, None, None)), x[0], x[0], A, B[0], B[0]),
        (run, x[0], x[0], A[0], grouped, grouped),
    ]
    for call, *inputs in calls:
        lowered = jax.jit(call).trace(*inputs).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_without_kernels():
    """In a model and by its gradient, for as long as is asked; by name a kernel is insisted on."""
    mixer = MambaSequenceMixer(8, key=jr.key(0))
    x = jnp.ones((64, 8))
    runs = {
        "mixer": lambda x: jax.grad(lambda x: mixer(x)[0].sum())(x),
        "recurrence": lambda x: ops.linear_recurrence(x, x),
        "by name": ft.partial(ops.linear_recurrence, x, implementation="mosaic_gpu"),
    }
    runs = {name: jax.jit(run) for name, run in runs.items()}

    def kernels():
        lowered = {n: r.trace(x).lower(lowering_platforms=("cuda",)) for n, r in runs.items()}
        return {n: text.as_text().count("custom_call @mosaic_gpu") for n, text in lowered.items()}

    before = kernels()
    assert before == {"mixer": 2, "recurrence": 1, "by name": 1}
    with ops.without_kernels():
        assert kernels() == {"mixer": 0, "recurrence": 0, "by name": 1}
    assert kernels() == before
