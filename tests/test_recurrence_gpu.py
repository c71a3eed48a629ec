"""The linear recurrence's GPU kernels against XLA's form, on a GPU or interpreted; their lowering."""

import functools as ft
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, gpu_interpreter, races_found

from discretax.ops import linear_recurrence
from discretax.ops._recurrence import gpu, kernels
from discretax.ops._recurrence.gpu import derivatives_gpu, states_gpu
from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import MATRICES, NUMBERS, PLANES
from discretax.ops._running.walk_gpu import make_plan

pytestmark = pytest.mark.slow

BATCH, TILE = 2, 8
interpreter = gpu_interpreter()


def draw(planes, constant, resets, time=19, state=4, dtype="float32"):
    rng = np.random.default_rng(time + state)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    a = normal(BATCH, 1 if constant else time, planes, state) * 0.6
    flags = jnp.asarray(rng.random((BATCH, time)) < 0.2) if resets else None
    return a, normal(BATCH, time, planes, state), normal(BATCH, planes, state), flags


def reference(a, b, h0, resets, reverse):
    def one(a, b, h0, resets):
        a = a[0] if a.shape[0] == 1 else a
        options = {"reverse": reverse, "transitions": PLANES if b.shape[1] == 2 else NUMBERS}
        return recurrence(a, b, h0, resets, **options, implementation="sequential")

    return jax.vmap(one, in_axes=(0, 0, 0, None if resets is None else 0))(a, b, h0, resets)


@ft.partial(jax.jit, static_argnames=("reverse", "chunks", "races"))
def by_kernels(a, b, h0, resets, g, *, reverse, chunks=1, races=False):
    interpret = gpu_interpreter(detect_races=races)
    options = {"reverse": reverse, "tile": TILE, "chunks": chunks, "interpret": interpret}
    h = states_gpu(a, b, h0, resets, **options)
    return h, *derivatives_gpu(a, h0, resets, h, g, **options)


def check(arguments, reverse, chunks=1, rtol=2e-6, races=False):
    a, b, h0, resets = arguments
    g = jnp.cos(jnp.arange(b.size, dtype=float)).reshape(b.shape).astype(b.dtype)
    h, d_a, d_b, d_h0 = by_kernels(*arguments, g, reverse=reverse, chunks=chunks, races=races)
    assert not (races and races_found())
    wide = lambda x: None if x is None else x.astype(float) if x.dtype != bool else x
    with jax.enable_x64(True):
        run = lambda a, b, h0: reference(a, b, h0, resets, reverse)
        expected, pull = jax.vjp(run, *map(wide, (a, b, h0)))
        assert_close((h, d_a, d_b, d_h0), (expected, *pull(wide(g))), rtol)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "resets", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["", "resets"]
)
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
@pytest.mark.parametrize("planes", [1, 2], ids=["real", "planes"])
def test_states_and_derivatives(planes, constant, resets, reverse):
    """In two chunks, the last of which ends within a tile."""
    check(draw(planes, constant, resets), reverse, chunks=2)


@pytest.mark.parametrize(
    ("time", "state", "chunks"), [(1, 4, 1), (8, 4, 1), (24, 132, 1), (31, 4, 4)]
)
def test_shapes(time, state, chunks):
    """One sample; whole tiles; more tiles than are under way at once, and channels of two programs;
    a chunk for every tile. No copy races with a read."""
    check(draw(1, False, True, time, state), reverse=False, chunks=chunks, races=True)


def test_values_that_the_batch_shares():
    a, b, h0, resets = draw(2, True, True)
    assert resets is not None
    h = states_gpu(
        a[:1], b, h0[:1], resets[:1], reverse=False, tile=TILE, chunks=2, interpret=interpreter
    )
    shared = [jnp.broadcast_to(value[:1], value.shape) for value in (a, h0, resets)]
    assert_close(h, reference(shared[0], b, shared[1], shared[2], False), 2e-6)


def test_complex_numbers_and_states_of_several_axes(monkeypatch):
    for name in ("states_gpu", "derivatives_gpu"):
        kernel = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, ft.partial(kernel, tile=TILE, interpret=interpreter))
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(*shape, 2)).view("complex128")[..., 0])
    a, b, h0, g = normal(3, 2) / 2, normal(1, 11, 3, 2), normal(1, 3, 2), normal(1, 11, 3, 2)
    one = lambda a, b, h0: linear_recurrence(a, b, h0, implementation="sequential")
    with jax.enable_x64(True):
        a, b, h0, g = (jnp.asarray(value, "complex128") for value in (a, b, h0, g))
        h, pull = jax.vjp(one, a, b[0], h0[0])
        expected = h, *pull(g[0])
    a, b, h0, g = (value.astype("complex64") for value in (a[None], b, h0, g))
    h = jax.jit(lambda *x: kernels.states("mosaic_gpu", False, False, *x))(a, b, h0)
    derivatives = jax.jit(lambda *x: kernels.derivatives(False, False, *x))(a, h0, h, g)
    for ours, theirs in zip((h, *derivatives), expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("chunks", [1, 2])
def test_nothing_passes_a_reset(chunks):
    a, b, h0, _ = draw(1, False, False)
    resets = jnp.zeros(b.shape[:2], bool).at[:, 10].set(True)
    h, d_a, d_b, d_h0 = by_kernels(
        a, b.at[:, 3].set(jnp.nan), h0, resets, jnp.ones_like(b).at[:, :10].set(0), reverse=False,
        chunks=chunks,
    )  # fmt: skip
    expected = reference(a[:, 10:], b[:, 10:], jnp.zeros_like(h0), None, False)
    assert_close(h[:, 10:], expected, 2e-6)
    for cotangent in (d_a[:, 10], d_b[:, :10], d_h0):
        np.testing.assert_array_equal(cotangent, 0)


def test_bfloat16_accumulates_in_float32():
    """In bfloat16 the sum would stay at 256, to which it is too coarse to add one."""
    time = 300
    ones = jnp.ones((1, time, 1, 8), jnp.bfloat16)
    h = states_gpu(
        ones[:, :1], ones, ones[:, 0], None, reverse=False, tile=64, interpret=interpreter
    )
    np.testing.assert_array_equal(h[0, :, 0, 0], jnp.arange(2.0, time + 2).astype(jnp.bfloat16))


def test_bfloat16_derivatives():
    a, b, h0, resets = draw(1, False, True, state=8, dtype=jnp.bfloat16)
    check((a, b, h0, resets), reverse=False, chunks=2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("varying", [False, True], ids=["constant", "varying"])
def test_lowering(dtype, varying):
    """Both kernels at a size of use; shared memory beyond the limit is refused here."""
    time, channels, batch = 2048, 1024, 32
    b = jax.ShapeDtypeStruct((batch, time, channels), dtype)
    h0 = jax.ShapeDtypeStruct((batch, channels), dtype)
    a = b if varying else jax.ShapeDtypeStruct((channels,), dtype)
    resets = jax.ShapeDtypeStruct((batch, time), bool) if varying else None

    @jax.jit
    def gradients(*arguments):
        run = lambda a, b, h0, r: linear_recurrence(a, b, h0, resets=r, reverse=varying)
        axes = (0, 0, 0, 0) if varying else (None, 0, 0, None)
        loss = lambda *x: jnp.abs(jax.vmap(run, in_axes=axes)(*x)).sum()
        return jax.grad(loss, (0, 1, 2))(*arguments)

    traced = gradients.trace(a, b, h0, resets)
    for platform, name in (("cuda", "mosaic_gpu"), ("tpu", "tpu_custom_call")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        on_xla = platform == "tpu" and dtype == "float16"
        assert text.count(f"custom_call @{name}") == (0 if on_xla else 2)
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_few_channels_are_computed_in_chunks():
    """A pass of sums, one of states; as many programs as two for each multiprocessor."""
    run = jax.jit(lambda b: linear_recurrence(jnp.full(b.shape[1:], 0.9), b))
    text = run.trace(jax.ShapeDtypeStruct((65536, 64), jnp.float32))
    text = text.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    streams = {
        "a": jnp.zeros((1, 1, 1, 64)),
        "b": jax.ShapeDtypeStruct((1, 65536, 1, 64), "float32"),
    }
    plan = make_plan(streams, [jnp.float32], False, None, None)
    assert plan.chunks == 256
    assert plan.chunk * plan.chunks == 65536


@pytest.mark.parametrize(
    ("b", "reason"),
    [
        (jnp.zeros((4, 6)), "16 bytes, which is a multiple of 4 channels of float32; got 6"),
        (jnp.zeros((4, 12), jnp.bfloat16), "a multiple of 8 channels of bfloat16; got 12"),
        (jnp.zeros((4, 0)), "there is nothing in"),
    ],
)
def test_what_a_kernel_does_not_take(b, reason):
    """By name it is refused; left to the library, XLA computes it."""
    a = jnp.ones(b.shape[1:], b.dtype)
    by_name = jax.jit(ft.partial(linear_recurrence, implementation="mosaic_gpu"))
    with pytest.raises(ValueError, match=reason):
        by_name.trace(a, b).lower(lowering_platforms=("cuda",))
    text = jax.jit(linear_recurrence).trace(a, b).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text


def test_planes_with_more_axes_are_computed_by_xla():
    b = jnp.zeros((4, 3, 2, 8))
    run = jax.jit(
        lambda b, implementation=None: recurrence(
            b, b, b[0], None, transitions=PLANES, implementation=implementation
        ),
        static_argnames="implementation",
    )
    with pytest.raises(ValueError, match=r"planes as \(time, 2, state\); got \(4, 3, 2, 8\)"):
        run.trace(b, implementation="mosaic_gpu").lower(lowering_platforms=("cuda",))
    text = run.trace(b).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text


@pytest.mark.parametrize(("kernel", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")])
def test_matrices_are_computed_by_xla(kernel, platform):
    a, b = jnp.zeros((4, 8)), jnp.zeros((5, 2, 8))
    run = jax.jit(ft.partial(recurrence, resets=None, transitions=MATRICES))
    named = jax.jit(
        ft.partial(recurrence, resets=None, transitions=MATRICES, implementation=kernel)
    )
    with pytest.raises(ValueError, match="carried on by numbers; got matrices"):
        named.trace(a, b, b[0]).lower(lowering_platforms=(platform,))
    text = run.trace(a, b, b[0]).lower(lowering_platforms=(platform,)).as_text()
    assert kernel not in text and "tpu_custom_call" not in text


def test_a_gpu_before_hopper_computes_by_xla(monkeypatch):
    b = jnp.zeros((6, 8))  # a shape of its own: JAX keeps what it has lowered
    run = jax.jit(linear_recurrence, static_argnames="implementation").trace
    traced, by_name = run(b, b), run(b, b, implementation="mosaic_gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match=r"GPUs from Hopper.*got 8\.0"):
        by_name.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_float64_is_computed_by_xla():
    with jax.enable_x64(True):
        b = jnp.zeros((4, 8))
        run = jax.jit(linear_recurrence, static_argnames="implementation")
        with pytest.raises(ValueError, match=r"it computes in float32.*got float64"):
            run.trace(b, b, implementation="mosaic_tpu").lower(lowering_platforms=("tpu",))
        text = run.trace(b, b).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" not in text


@pytest.mark.parametrize(
    ("implementation", "devices"),
    [("mosaic_gpu", "NVIDIA GPUs from Hopper"), ("mosaic_tpu", "TPUs")],
)
def test_another_platform_is_refused_by_name(implementation, devices):
    b = jnp.ones((4, 8))
    run = jax.jit(ft.partial(linear_recurrence, implementation=implementation))
    with pytest.raises(ValueError, match=rf"it runs on {devices}.*got the platform 'cpu'"):
        run.trace(b, b).lower(lowering_platforms=("cpu",))
    own = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}[implementation]
    assert "custom_call" in run.trace(b, b).lower(lowering_platforms=(own,)).as_text()
