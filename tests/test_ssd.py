"""The scan of Mamba-2 against a loop in numpy, and its derivatives against the plain scan's."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, numbers
from jax import lax

from discretax import ops

TIME, HEADS, WIDTH, GROUPS, STATE = 11, 4, 3, 2, 2

scan = jax.jit(ops.ssd, static_argnames="chunk_size")


def draw(time=TIME, groups=GROUPS, seed=0):
    keys = jr.split(jr.key(seed), 7)
    normal = lambda i, *shape: jr.normal(keys[i], shape)
    return {
        "x": normal(0, time, HEADS, WIDTH),
        "dt": jnp.exp(normal(1, time, HEADS)),
        "A": -jnp.exp(normal(2, HEADS)),
        "B": normal(3, time, groups, STATE),
        "C": normal(4, time, groups, STATE),
        "D": normal(5, HEADS),
        "h0": normal(6, HEADS, WIDTH, STATE),
    }


def loop(x, dt, A, B, C, D=None, h0=None, resets=None):
    """One sample and head after the other, from the equations."""
    x, dt, A, B, C = map(numbers, (x, dt, A, B, C))
    time, heads, width = x.shape
    groups, state = B.shape[1:]
    h = np.zeros((heads, width, state)) if h0 is None else numbers(h0).copy()
    y = np.zeros(x.shape) if D is None else numbers(D).reshape(heads, -1) * x
    for t in range(time):
        if resets is not None and resets[t]:
            h[:] = 0
        for i in range(heads):
            group = i // (heads // groups)
            h[i] = np.exp(dt[t, i] * A[i]) * h[i] + dt[t, i] * np.outer(x[t, i], B[t, group])
            y[t, i] += h[i] @ C[t, group]
    return y, h


def plain(x, dt, A, B, C, D, h0):
    """The same as a scan over samples that JAX can differentiate."""
    each_head = lambda array: jnp.repeat(array, HEADS // array.shape[1], axis=1)

    def step(h, inputs):
        x, dt, B, C = inputs
        h = jnp.exp(dt * A)[:, None, None] * h + (dt[:, None] * x)[..., None] * B[:, None]
        return h, jnp.einsum("hpn,hn->hp", h, C) + D[:, None] * x

    h, y = lax.scan(step, h0, (x, dt, each_head(B), each_head(C)))
    return y, h


def weighted(tree):
    leaves = jax.tree.leaves(tree)
    return sum(jnp.vdot(jnp.cos(jnp.arange(a.size, dtype=a.dtype)), a.ravel()) for a in leaves)


def cut(arrays, *where):
    return {k: v if k in ("A", "D", "h0") else v[slice(*where)] for k, v in arrays.items()}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 4, 11, 12])
def test_is_the_loop(time, groups):
    """One sample, one chunk, and several with and without a rest."""
    with jax.enable_x64(True):
        arrays = draw(time, groups)
        assert_close(scan(**arrays, chunk_size=4), loop(**arrays), 1e-13)


def test_single_precision():
    arrays = draw(50)
    assert_close(scan(**arrays, chunk_size=16), loop(**arrays), 1e-6)


def test_skip_and_initial_state_may_be_left_out():
    arrays = {name: value for name, value in draw().items() if name not in ("D", "h0")}
    assert_close(scan(**arrays), loop(**arrays))


def test_skip_of_each_feature():
    arrays = draw() | {"D": jr.normal(jr.key(8), (HEADS, WIDTH))}
    assert_close(scan(**arrays), loop(**arrays))


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True], ids=["first order", "second order"])
def test_gradients_are_those_of_the_plain_scan(second):
    def derivatives(run):
        loss = lambda arrays: jnp.sum(jnp.tanh(weighted(run(**arrays))))
        gradient = jax.grad(loss)
        if not second:
            return jax.jit(gradient)(draw())
        slope = lambda arrays: weighted(gradient(arrays))
        return jax.jit(jax.grad(slope))(draw())

    with jax.enable_x64(True):
        chunked = lambda **arrays: ops.ssd(**arrays, chunk_size=4)
        assert_close(derivatives(chunked), derivatives(plain), 1e-11)


@pytest.mark.slow
def test_forward_derivative_is_that_of_the_plain_scan():
    with jax.enable_x64(True):
        arrays, direction = draw(), draw(seed=1)
        chunked = lambda arrays: ops.ssd(**arrays, chunk_size=4)
        expected = jax.jvp(lambda arrays: plain(**arrays), (arrays,), (direction,))
        assert_close(jax.jvp(chunked, (arrays,), (direction,)), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 3, TIME, 100])
def test_chunk_size_changes_nothing(chunk_size):
    with jax.enable_x64(True):
        arrays = draw()
        resets = jnp.arange(TIME) == 4
        run = lambda size: jax.jit(
            jax.value_and_grad(
                lambda arrays: weighted(
                    ops.ssd(**arrays, length=jnp.asarray(9), resets=resets, chunk_size=size)
                )
            )
        )(arrays)
        assert_close(run(chunk_size), run(5), 1e-12)


def test_pieces_are_the_whole():
    arrays = draw()
    y, h = scan(**arrays, chunk_size=4)
    ys, state = [], arrays["h0"]
    for start, end in ((0, 1), (1, 6), (6, 11)):
        piece, state = scan(**{**cut(arrays, start, end), "h0": state}, chunk_size=4)
        ys.append(piece)
    assert_close((jnp.concatenate(ys), state), (y, h))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_decays_that_underflow(scale):
    """Steps so long that nothing is left of the state: no overflow, no NaN in the gradients."""
    arrays = draw()
    arrays["dt"] = arrays["dt"].at[::3].multiply(scale)
    assert_close(scan(**arrays, chunk_size=4), loop(**arrays))
    gradients = [
        jax.jit(jax.grad(lambda a, f=f: weighted(f(**a)[0] / scale)))(arrays)
        for f in (lambda **a: ops.ssd(**a, chunk_size=4), plain)
    ]
    assert_close(*gradients)


def test_small_decays_after_large_ones_keep_their_digits():
    """Their sum goes to -5000, where float32 numbers lie 0.0005 apart."""
    with jax.enable_x64(False):
        arrays = draw(50)
        arrays["A"] = -jnp.ones(HEADS)
        arrays["dt"] = jnp.where(jnp.arange(50)[:, None] < 25, 200.0, 0.001 * arrays["dt"])
        assert_close(scan(**arrays)[0][26:], loop(**arrays)[0][26:], 1e-6)


def test_growing_states():
    """A positive rate is unusual but no mistake."""
    arrays = draw(40)
    arrays["A"], arrays["dt"] = jnp.full(HEADS, 0.5), jnp.full((40, HEADS), 4.0)
    assert_close(scan(**arrays), loop(**arrays))


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 7, TIME])
def test_length_ends_the_sequence(length):
    arrays = draw()
    valid = cut(arrays, length)
    padded = {
        k: v if k in ("A", "D", "h0") else v.at[length:].set(jnp.nan) for k, v in arrays.items()
    }
    resets = jnp.ones(TIME, bool).at[:length].set(False)  # those in the padding have no effect
    y, h = scan(**padded, length=jnp.asarray(length, jnp.uint8), resets=resets, chunk_size=4)
    y_valid, h_valid = loop(**valid)
    assert_close((y[:length], h), (y_valid, h_valid))
    assert_close(scan(**padded, length=length)[1], h_valid)
    if length == 0:
        return
    loss = lambda arrays, **options: weighted(ops.ssd(**arrays, **options)[0][:length])
    gradient = jax.jit(jax.grad(lambda a: loss({**padded, "A": a}, length=length, chunk_size=4)))
    expected = jax.jit(jax.grad(lambda a: loss({**valid, "A": a})))
    assert_close(gradient(arrays["A"]), expected(arrays["A"]))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_resets_begin_anew(chunk_size):
    arrays = draw()
    resets = jnp.zeros(TIME, bool).at[jnp.array([3, 4, 9])].set(True)
    actual = scan(**arrays, resets=resets, chunk_size=chunk_size)
    assert_close(actual, loop(**arrays, resets=resets))
    one = cut(arrays, 3, 4)
    assert_close(scan(**one, resets=resets[3:4]), loop(**one, resets=[True]))


@pytest.mark.slow
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "h0"])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_a_reset_stops_a_nan(name, value, chunk_size):
    """It spoils its own sequence from its sample on, and nothing before or behind."""
    arrays = draw()
    resets = jnp.zeros(TIME, bool).at[jnp.array([1, 5])].set(True)
    y, h = loop(**arrays, resets=resets)
    at = 0 if name == "h0" else 2
    arrays[name] = arrays[name].at[at].set(value)
    y_bad, h_bad = scan(**arrays, resets=resets, chunk_size=chunk_size)
    first = 0 if name == "h0" else 2
    assert not jnp.isfinite(y_bad[first]).all()
    assert_close((y_bad[:first], y_bad[5:], h_bad), (y[:first], y[5:], h))
    if name not in ("C", "h0"):
        assert not jnp.isfinite(y_bad[4]).all()
        cut_off, unfinished = scan(**cut(arrays, 5), resets=resets[:5], chunk_size=chunk_size)
        assert not jnp.isfinite(cut_off[4]).all()
        assert not jnp.isfinite(unfinished).all()


def test_vmap_is_a_loop():
    batch = [draw(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    batched = jax.jit(jax.vmap(lambda arrays: ops.ssd(**arrays, chunk_size=4)))(stacked)
    for i, arrays in enumerate(batch):
        single = scan(**arrays, chunk_size=4)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), single)


def test_no_samples():
    arrays = draw(0)
    y, h = ops.ssd(**arrays)
    assert y.shape == (0, HEADS, WIDTH)
    np.testing.assert_array_equal(h, arrays["h0"])


def test_bfloat16_accumulates_in_float32():
    """400 samples of one and no decay add up; bfloat16 itself would stop at 256."""
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    A = jnp.zeros(1, jnp.bfloat16)
    y, h = ops.ssd(ones(400, 1, 1), ones(400, 1), A, ones(400, 1, 1), ones(400, 1, 1))
    assert y.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert h == 400


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", jnp.ones((TIME, HEADS)), r"`x` must be \(time, heads, head_dim\).*jax.vmap"),
        ("B", jnp.ones((TIME, STATE)), r"`B` \(time, groups, state\); got .*B: \(11, 2\)"),
        ("B", jnp.ones((TIME, 3, STATE)), r"multiple of the number of groups; got .*4 .*3 groups"),
        ("B", jnp.ones((TIME, 0, STATE)), r"multiple of the number of groups; got .*0 groups"),
        ("dt", jnp.ones(TIME), r"`dt` must be .*\(time, heads\) = \(11, 4\); got float32\(11,\)"),
        ("A", jnp.ones((HEADS, 1)), r"`A` must be .*\(heads\) = \(4,\); got float32\(4, 1\)"),
        ("C", jnp.ones((TIME, GROUPS, 3)), r"`C` must be .* = \(11, 2, 2\); got .*\(11, 2, 3\)"),
        ("C", jnp.ones((TIME, GROUPS, STATE), int), r"`C` must be floating.*got int32"),
        ("D", jnp.ones((HEADS, 2)), r"`D` .*\(heads, head_dim\) = \(4, 3\); got float32\(4, 2\)"),
        ("D", jnp.ones(2), r"`D` must be .*\(heads\) = \(4,\); got float32\(2,\)"),
        ("h0", jnp.ones((4, 2, 3)), r"`h0` must be .*head_dim, state\) = \(4, 3, 2\)"),
        ("chunk_size", 0, "`chunk_size` must be .* at least 1; got 0"),
        ("length", 12, "between 0 and .*11; got 12"),
        ("resets", jnp.zeros(TIME), r"`resets` must be booleans.*got float32\(11,\)"),
    ],
)
def test_unfit_arguments_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        ops.ssd(**{**draw(), name: value})
