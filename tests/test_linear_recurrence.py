"""`ops.linear_recurrence` and `ops.diagonal_ssm` against a plain loop, in every variant."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close
from jax import export

from discretax.ops import diagonal_ssm, linear_recurrence, oscillator_ssm
from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import MATRICES
from discretax.ops._running.split_time import split_time

TIME, STATE = 7, (2, 3)


def loop(a, b, h0, resets, reverse):
    """The definition, sample by sample; what is not selected has no influence."""
    a = jnp.broadcast_to(a, b.shape)
    resets = None if resets is None else np.asarray(resets)
    order = range(b.shape[0])[::-1] if reverse else range(b.shape[0])
    h, states = h0, {}
    for t in order:
        h = b[t] if resets is not None and resets[t] else a[t] * h + b[t]
        states[t] = h
    return jnp.stack([states[t] for t in range(b.shape[0])])


def draw(dtype, constant, seed=0):
    keys = jr.split(jr.key(seed), 3)
    a = jr.normal(keys[0], STATE if constant else (TIME, *STATE), dtype)
    return a, jr.normal(keys[1], (TIME, *STATE), dtype), jr.normal(keys[2], STATE, dtype)


def weights(shape, dtype):
    """Fixed numbers, all different."""
    w = jnp.cos(jnp.arange(np.prod(shape), dtype=float)).reshape(shape)
    return jax.lax.complex(w, jnp.sin(3 * w)) if dtype == "complex128" else w


@pytest.mark.parametrize("implementation", ["sequential", "associative", None])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("resets", [None, (0, 3, 4)], ids=["", "resets"])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_states_and_gradients(dtype, constant, resets, reverse, implementation):
    with jax.enable_x64(True):
        arguments = draw(dtype, constant)
        if resets is not None:
            resets = jnp.zeros(TIME, bool).at[jnp.array(resets)].set(True)
        w = weights((TIME, *STATE), dtype)
        ours = ft.partial(
            linear_recurrence, resets=resets, reverse=reverse, implementation=implementation
        )
        reference = lambda a, b, h0: loop(a, b, h0, resets, reverse)
        assert_close(jax.jit(ours)(*arguments), reference(*arguments), 1e-12)

        def gradients(f):
            loss = lambda *args: jnp.sum(w * f(*args)).real
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)

        assert_close(gradients(ours), gradients(reference), 1e-12)


def matrix_loop(a, b, h0, resets, reverse):
    """Dense 2 x 2 matrices, one for each state."""
    a = jnp.stack(
        [jnp.stack([a[..., 0, :], a[..., 2, :]], -2), jnp.stack([a[..., 3, :], a[..., 1, :]], -2)],
        -3,
    )
    a = jnp.broadcast_to(a, (TIME, 2, *STATE))
    order, h, states = range(TIME)[::-1] if reverse else range(TIME), h0, {}
    for t in order:
        past = 0 if resets is not None and resets[t] else jnp.einsum("ijn,jn->in", a[t], h)
        states[t] = h = past + b[t]
    return jnp.stack([states[t] for t in range(TIME)])


@pytest.mark.parametrize("implementation", ["sequential", "associative", None])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("resets", [None, (0, 3, 4)], ids=["", "resets"])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
def test_matrices(constant, resets, reverse, implementation):
    with jax.enable_x64(True):
        _, b, h0 = draw("float64", constant)
        a = jr.normal(jr.key(1), (4, STATE[1]) if constant else (TIME, 4, STATE[1]))
        if resets is not None:
            resets = np.isin(np.arange(TIME), resets)
        options = {"reverse": reverse, "transitions": MATRICES, "implementation": implementation}
        ours = lambda a, b, h0: recurrence(a, b, h0, resets, **options)
        reference = lambda a, b, h0: matrix_loop(a, b, h0, resets, reverse)
        w = weights((TIME, *STATE), "float64")
        both = lambda f: jax.jit(lambda *x: (f(*x), jax.vjp(f, *x)[1](w)))(a, b, h0)
        assert_close(both(ours), both(reference), 1e-12)
        along = a, b, h0
        push = lambda f: jax.jit(lambda *x: jax.jvp(f, x, along)[1])(a, b, h0)
        assert_close(push(ours), push(reference), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_second_order(dtype, constant):
    with jax.enable_x64(True):
        arguments = draw(dtype, constant)
        directions = draw(dtype, constant, seed=1)

        def product(f):
            gradient = jax.grad(lambda args: jnp.sum(jnp.abs(f(*args)) ** 4) / 4, holomorphic=False)
            along = lambda args: sum(
                jnp.sum(g * d).real for g, d in zip(gradient(args), directions, strict=True)
            )
            return jax.jit(jax.grad(along))(arguments)

        assert_close(
            product(linear_recurrence),
            product(lambda a, b, h0: loop(a, b, h0, None, False)),
            1e-11,
        )


def test_vmap_over_any_argument():
    a, b, h0 = draw("float32", constant=False)
    together = jax.vmap(linear_recurrence, in_axes=(0, None, 0))(
        jnp.stack([a, -a]), b, jnp.stack([h0, 2 * h0])
    )
    assert_close(together[0], linear_recurrence(a, b, h0), 1e-6)
    assert_close(together[1], linear_recurrence(-a, b, 2 * h0), 1e-6)


def test_no_initial_state_is_zero():
    a, b, h0 = draw("float32", constant=True)
    assert_close(linear_recurrence(a, b), linear_recurrence(a, b, 0 * h0), 0)


def test_bfloat16_accumulates_in_float32():
    a = jnp.full((3,), 0.99609375, jnp.bfloat16)
    b = jnp.ones((500, 3), jnp.bfloat16)
    h = linear_recurrence(a, b)
    exact = (1 - 0.99609375**500) / (1 - 0.99609375)
    assert h.dtype == jnp.bfloat16
    np.testing.assert_allclose(h[-1].astype(jnp.float32), exact, rtol=2**-8)


def test_empty_and_single():
    a, b, h0 = draw("float32", constant=True)
    assert linear_recurrence(a, b[:0], h0).shape == (0, *STATE)
    for implementation in ("sequential", "associative"):
        h = linear_recurrence(a, b[:1], h0, implementation=implementation)
        assert_close(h, (a * h0 + b[0])[None], 1e-6)


def test_saves_the_states_alone():
    """Residuals of the rule: a, h0 and one array of the size of the states."""
    a, b, h0 = draw("float32", constant=True)
    _, backward = jax.vjp(linear_recurrence, a, b, h0)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size"))
    assert sum(size == b.size for size in sizes) == 1
    assert sum(sizes) <= b.size + a.size + h0.size


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("platform", "loops"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_implementation_is_chosen_when_lowering(platform, loops, direction):
    a, b, h0 = draw("float32", constant=True)
    f = linear_recurrence
    if direction == "backward":
        f = jax.grad(lambda *args: linear_recurrence(*args).sum(), argnums=(0, 1, 2))
    text = jax.jit(f).trace(a, b, h0).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == loops


ONES = jnp.ones((TIME, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ONES[:, :2], ONES), {}, ValueError, r"got a: \(7, 2\) and b: \(7, 3\)"),
        ((jnp.ones(()), ONES), {}, ValueError, "`a` must have the shape of `b`.*broadcast_to"),
        ((ONES[0], ONES, ONES), {}, ValueError, r"`h0` .* one state, \(3,\); got \(7, 3\)"),
        ((ONES, ONES), {"resets": jnp.zeros(6, bool)}, ValueError, r"\(7,\); got bool\(6,\)"),
        ((ONES, ONES), {"resets": jnp.zeros(7)}, ValueError, r"boolean.*got float32\(7,\)"),
        ((ONES, ONES), {"implementation": "fast"}, ValueError, "'sequential'.*got 'fast'"),
        ((ONES.astype(jnp.bfloat16), ONES), {}, TypeError, "one floating.*bfloat16, float32"),
        ((ONES.astype(int), ONES.astype(int)), {}, TypeError, "one floating.*int32"),
    ],
)
def test_unfit_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_recurrence(*arguments, **options)


# diagonal_ssm

FEATURES, STATES, OUT = 4, 3, 2


def system(varying, seed=0):
    keys = jr.split(jr.key(seed), 5)
    return (
        0.5 * jr.normal(keys[0], (TIME, 2, STATES) if varying else (2, STATES)),
        jr.normal(keys[1], (2, STATES, FEATURES)),
        jr.normal(keys[2], (OUT, 2, STATES)),
        jr.normal(keys[3], (TIME, FEATURES)),
        jr.normal(keys[4], (2, STATES)),
    )


def complex_loop(A, B, C, x, h0, length, resets):
    """h_t = A h_{t-1} + B x_t, y_t = Re(C h_t) in complex arithmetic."""
    A = jnp.broadcast_to(A, (TIME, 2, STATES))
    A = jax.lax.complex(A[:, 0], A[:, 1])
    B = jax.lax.complex(*B)
    C = jax.lax.complex(C[:, 0], -C[:, 1])
    h = final = jax.lax.complex(h0[0], h0[1])
    resets = () if resets is None else np.flatnonzero(resets)
    ys = []
    for t in range(TIME):
        h = jnp.zeros_like(h) if t in resets else h
        h = A[t] * h + B @ x[t].astype(B.dtype)
        ys.append((C @ h).real)
        final = h if t < length else final
    return jnp.stack(ys), jnp.stack([final.real, final.imag])


@pytest.mark.parametrize("length", [None, 5, "traced"])
@pytest.mark.parametrize("chunk_size", [None, 3], ids=lambda size: f"chunk_{size}")
@pytest.mark.parametrize("resets", [None, (2, 3)], ids=["", "resets"])
@pytest.mark.parametrize("varying", [False, True], ids=["constant", "varying"])
def test_diagonal_ssm(varying, resets, chunk_size, length):
    with jax.enable_x64(True):
        arguments = system(varying)
        if resets is not None:
            resets = jnp.zeros(TIME, bool).at[jnp.array(resets)].set(True)
        valid = {None: TIME, "traced": 4}.get(length, length)
        length = jnp.asarray(valid) if length == "traced" else length
        w = weights((valid, OUT), "float64")

        @jax.jit
        def ours(*args):
            y, final = diagonal_ssm(*args, length=length, resets=resets, chunk_size=chunk_size)
            return y[:valid], final

        def reference(*args):
            y, final = complex_loop(*args, valid, resets)
            return y[:valid], final

        def gradients(f):
            def loss(*args):
                y, final = f(*args)
                return jnp.vdot(w, y) + final[0].sum() - 2 * final[1].sum()

            return jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*arguments)

        assert_close(ours(*arguments), jax.jit(reference)(*arguments), 1e-12)
        assert_close(gradients(ours), gradients(reference), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 3], ids=lambda size: f"chunk_{size}")
def test_input_factor_that_changes_with_time(chunk_size):
    """Sample by sample, gamma_t is part of B."""
    A, B, C, x, h0 = system(varying=False)
    gamma = jr.normal(jr.key(8), (TIME, 2, STATES))
    y, final = diagonal_ssm(A, B, C, x, h0, gamma=gamma, chunk_size=chunk_size)
    h, ys = h0, []
    for t in range(TIME):
        g, B_t = jax.lax.complex(*gamma[t]), jax.lax.complex(*B)
        B_t = g[:, None] * B_t
        y_t, h = diagonal_ssm(A, jnp.stack([B_t.real, B_t.imag]), C, x[t : t + 1], h)
        ys.append(y_t)
    assert_close((y, final), (jnp.concatenate(ys), h), 1e-5)


def test_diagonal_ssm_on_nothing():
    A, B, C, x, h0 = system(varying=False)
    y, final = diagonal_ssm(A, B, C, x[:0], h0)
    assert y.shape == (0, OUT)
    assert_close(final, h0, 0)
    assert_close(diagonal_ssm(A, B, C, x[:0], h0, length=jnp.asarray(0))[1], h0, 0)


def test_long_sequences_run_in_chunks_with_equal_numbers():
    keys = jr.split(jr.key(0), 3)
    A = 0.7 * jr.uniform(keys[0], (2, 64), minval=-1.0)
    B, C = jr.normal(keys[1], (2, 64, 1)), jr.normal(keys[2], (1, 2, 64))
    x, h0 = jnp.ones((5000, 1)), jnp.zeros((2, 64))
    chosen = jax.jit(diagonal_ssm)
    whole = jax.jit(ft.partial(diagonal_ssm, chunk_size=5000))
    assert_close(chosen(A, B, C, x, h0), whole(A, B, C, x, h0), 1e-5)

    def residual_floats(f):
        _, backward = jax.vjp(f, A, B, C, x, h0)
        return sum(leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size"))

    assert residual_floats(diagonal_ssm) < residual_floats(whole) / 10


def test_backward_in_time_is_not_split_over_devices():
    b = jnp.ones((4, 2))
    with split_time("seq", jnp.array(0), 2), pytest.raises(ValueError, match="got reverse=True"):
        linear_recurrence(0.5 * b, b, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None), (0, None, None), (None, 1, 0)])
@pytest.mark.parametrize("outer", [(0, 0, 0), (None, 0, None), (0, None, 1)])
def test_nested_vmap(outer, axes):
    """What an inner or outer map shares stays one array, with one gradient."""
    arguments = []
    for shape, at, at_outer in zip(((4,), (TIME, 4), (4,)), axes, outer, strict=True):
        shape = list(shape) if at is None else [*shape[:at], 2, *shape[at:]]
        shape = shape if at_outer is None else [*shape[:at_outer], 3, *shape[at_outer:]]
        arguments.append(jr.normal(jr.key(len(shape)), shape))

    def results(implementation):
        one = ft.partial(linear_recurrence, implementation=implementation)
        run = jax.vmap(jax.vmap(one, in_axes=axes), in_axes=outer)
        values, pull = jax.vjp(run, *arguments)
        return values, pull(jnp.cos(values))

    assert_close(results(None), results("sequential"), rtol=1e-6)


REFUSED = {  # by both
    "chunk_size": (0, "`chunk_size` must be .* at least 1; got 0"),
    "x": (jnp.ones((5, 3)), r"`B` must be floating, of shape \(planes, state, features\)"),
    "C": (jnp.ones((4, 3)), r"`x` must be \(time, features\) and `C` \(out, 2, state\)"),
    "D": (jnp.ones(3), r"`D` must be floating, of shape \(out\) = \(4,\)"),
    "h0": (jnp.ones((2, 5)), "`h0` must be floating"),
    "length": (9, "`length` must lie between 0 and the number of samples, 5; got 9"),
    "resets": (jnp.ones(5), "`resets` must be booleans"),
    "implementation": ("fast", "`implementation` must be one of"),
}
OWN = {
    "diagonal": [("A", (4, 2, 3), "`A` must be floating"), ("gamma", (2, 3), "`gamma` must be")],
    "oscillator": [("M", (4, 2, 2, 3), "`M` must be floating"), ("F", (5, 2, 3), "`F` must be")],
}


@pytest.mark.parametrize("kind", OWN)
def test_what_does_not_fit_between_projections(kind):
    given = {"B": jnp.ones((2, 3, 4)), "C": jnp.ones((4, 2, 3)), "x": jnp.ones((5, 4))}
    if kind == "diagonal":
        call, given = diagonal_ssm, {**given, "A": jnp.ones((2, 3)), "h0": jnp.ones((2, 3))}
    else:
        call = oscillator_ssm
        M, F, h0 = jnp.ones((2, 2, 3)), jnp.ones((2, 3)), jnp.ones((2, 2, 3))
        given = {**given, "M": M, "F": F, "h0": h0}
    wrong = {name: (jnp.ones(shape), message) for name, shape, message in OWN[kind]}
    for name, (value, message) in {**REFUSED, **wrong}.items():
        with pytest.raises(ValueError, match=message):
            call(**{**given, name: value})


def test_an_export_leaves_the_batch_open():
    """For platforms with kernels too, which are launched with numbers."""
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, TIME, *STATE), jnp.float32)
    program = export.export(jax.jit(jax.vmap(linear_recurrence)), platforms=["cpu", "cuda", "tpu"])
    a, b, _ = jax.vmap(lambda seed: draw("float32", False, seed))(jnp.arange(3))
    h = jnp.stack([loop(*each, jnp.zeros(STATE), None, False) for each in zip(a, b, strict=True)])
    assert_close(program(shape, shape).call(a, b), h)
