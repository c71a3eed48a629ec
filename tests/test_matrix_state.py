"""Gated linear attention, the delta rule and the mLSTM against loops over their equations."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, numbers
from jax import lax

from discretax.ops import delta_rule, gated_linear_attention, mlstm
from discretax.ops._matrix_state.halves import solve_unit_lower

TIME, KEY_HEADS, HEADS, KEY, VALUE = 11, 2, 4, 5, 3
RESETS = np.isin(np.arange(TIME), (3, 4, 9))

KINDS = {
    "linear": {"decay": None, "erase": None},
    "constant decay": {"decay": "head", "erase": None},
    "scalar decay": {"decay": "scalar", "erase": None},
    "vector decay": {"decay": "vector", "erase": None},
    "delta": {"decay": None, "erase": "key"},
    "delta, scalar decay": {"decay": "scalar", "erase": "key"},
    "delta, vector decay": {"decay": "vector", "erase": "key"},
    "delta, erase key": {"decay": "vector", "erase": "own"},
    "delta, erase first": {"decay": "vector", "erase": "first"},
    "delta, scalar, erase first": {"decay": "scalar", "erase": "first"},
    "delta, three steps": {"decay": "scalar", "erase": "key", "steps": 3},
    "delta, two steps, vector decay": {"decay": "vector", "erase": "first", "steps": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize(
    "kind", ["vector decay", "delta, scalar decay", "delta, two steps, vector decay"]
)


def draw(kind, time=TIME, seed=0):
    """Arguments by name; keys of length one, beta up to two."""
    kind = KINDS[kind]
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    steps = (kind["steps"],) if "steps" in kind else ()
    k = normal(time, *steps, KEY_HEADS, KEY)
    decay = {"head": (HEADS,), "scalar": (time, HEADS), "vector": (time, HEADS, KEY)}
    arrays = {
        "q": normal(time, KEY_HEADS, KEY),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(time, *steps, HEADS, VALUE),
        "beta": 2 * rng.random((time, *steps, HEADS)),
        "log_decay": None if kind["decay"] is None else -np.abs(normal(*decay[kind["decay"]])),
        "initial_state": normal(HEADS, KEY, VALUE),
    }
    if kind["erase"] in ("own", "first"):
        arrays["erase"] = arrays["k"] + 0.1 * normal(*k.shape)
    return {name: None if a is None else jnp.asarray(a, float) for name, a in arrays.items()}


def operation(kind, chunk_size=4, **options):
    erase = KINDS[kind]["erase"]
    if erase is None:
        return ft.partial(gated_linear_attention, chunk_size=chunk_size, **options)
    return ft.partial(delta_rule, chunk_size=chunk_size, erase_first=erase == "first", **options)


def plain(kind, arrays, resets=None):
    """The equations as a scan over samples, for NumPy's eyes and JAX's derivatives."""
    rule = KINDS[kind]["erase"]
    arrays = dict(arrays)
    S0 = arrays.pop("initial_state")
    log_decay = arrays.pop("log_decay")
    time = arrays["q"].shape[0]
    log_decay = jnp.zeros(HEADS) if log_decay is None else log_decay
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (time, HEADS))
    alpha = jnp.exp(log_decay).reshape(time, HEADS, -1, 1)
    if "steps" not in KINDS[kind]:
        arrays.update({n: arrays[n][:, None] for n in ("k", "v", "beta", "erase") if n in arrays})
    each_head = lambda array: jnp.repeat(array, HEADS // KEY_HEADS, axis=-2)
    arrays["erase"] = arrays.get("erase", arrays["k"])
    arrays.update({n: each_head(arrays[n]) for n in ("q", "k", "erase")})
    fresh = jnp.zeros(time, bool) if resets is None else jnp.asarray(resets)

    def sample(S, inputs):
        arrays, alpha, is_fresh = inputs
        S = jnp.where(is_fresh, 0, S)
        for i in range(arrays["k"].shape[0]):
            k, v, beta, e = (arrays[n][i] for n in ("k", "v", "beta", "erase"))
            decayed = alpha * S if i == 0 else S
            held = jnp.einsum("hk,hkv->hv", e, S if rule == "first" else decayed)
            w = beta[:, None] * (v if rule is None else v - held)
            S = decayed + k[..., None] * w[:, None]
        return S, jnp.einsum("hk,hkv->hv", arrays["q"], S)

    S, y = lax.scan(sample, S0, (arrays, alpha, fresh))
    return y, S


def weighted(tree):
    leaves = jax.tree.leaves(tree)
    return sum(jnp.vdot(jnp.cos(jnp.arange(a.size, dtype=a.dtype)), a.ravel()) for a in leaves)


def cut(arrays, *where):
    whole = ("initial_state",)
    return {
        n: a if a is None or n in whole or a.shape[0] == HEADS else a[slice(*where)]
        for n, a in arrays.items()
    }


@every_kind
def test_is_the_equation(kind):
    """Outputs, state and gradients, in several chunks with a rest, with resets and without."""
    with jax.enable_x64(True):
        arrays = draw(kind)
        both = lambda run: jax.jit(
            jax.value_and_grad(
                lambda arrays: (lambda out: (jnp.tanh(weighted(out) / 9), out))(run(arrays)),
                has_aux=True,
            )
        )(arrays)
        for resets in (None, RESETS):
            fresh = None if resets is None else jnp.asarray(resets)
            actual = both(lambda arrays, fresh=fresh: operation(kind, resets=fresh)(**arrays))
            expected = both(lambda arrays, resets=resets: plain(kind, arrays, resets))
            assert_close(actual, expected, 1e-12)


@pytest.mark.slow
@some_kinds
def test_second_order(kind):
    with jax.enable_x64(True):
        arrays, direction = draw(kind), draw(kind, seed=1)

        def curvature(run):
            gradient = jax.grad(lambda arrays: jnp.tanh(weighted(run(arrays)) / 9))
            slope = lambda arrays: sum(
                map(jnp.vdot, jax.tree.leaves(gradient(arrays)), jax.tree.leaves(direction))
            )
            forward = lambda arrays: jax.jvp(run, (arrays,), (direction,))[1]
            return jax.jit(lambda arrays: (jax.grad(slope)(arrays), forward(arrays)))(arrays)

        actual = curvature(lambda arrays: operation(kind)(**arrays))
        assert_close(actual, curvature(lambda arrays: plain(kind, arrays)), 1e-11)


@pytest.mark.slow
@some_kinds
def test_pieces_and_steps_are_the_whole(kind):
    with jax.enable_x64(True):
        arrays = draw(kind)
        run = jax.jit(operation(kind))
        expected = run(**arrays)
        for edges in ((0, 1, 6, TIME), range(TIME + 1)):
            ys, state = [], arrays["initial_state"]
            for start, end in itertools.pairwise(edges):
                y, state = run(**{**cut(arrays, start, end), "initial_state": state})
                ys.append(y)
            assert_close((jnp.concatenate(ys), state), expected, 1e-13)


@pytest.mark.slow
@some_kinds
@pytest.mark.parametrize("length", [0, 1, 7])
def test_length_ends_the_sequence(kind, length):
    with jax.enable_x64(True):
        arrays = draw(kind)
        whole = ("initial_state",)
        bad = {
            n: a if n in whole or a is None else a.at[length:].set(jnp.nan)
            for n, a in arrays.items()
        }
        resets = jnp.asarray(RESETS) | (jnp.arange(TIME) >= length)  # of padding: no effect

        @jax.jit
        def padded(arrays, length):
            def loss(arrays):
                y, state = operation(kind, length=length, resets=resets)(**arrays)
                valid = (jnp.arange(TIME) < length)[:, None, None]
                return weighted((jnp.where(valid, y, 0), state)), state

            return jax.grad(loss, has_aux=True)(arrays)

        gradients, state = padded(bad, jnp.asarray(length))
        if length == 0:
            assert_close(state, arrays["initial_state"], 0)
            return

        def loss(arrays):
            out = plain(kind, arrays, RESETS[:length])
            return weighted(out), out[1]

        expected, last = jax.jit(jax.grad(loss, has_aux=True))(cut(arrays, length))
        assert_close(state, last, 1e-12)
        assert_close(cut(gradients, length), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar decay", "delta, scalar decay", "delta, vector decay"])
@pytest.mark.parametrize("decay", [0.0, -1e-3, -20.0])
def test_hard_keys(kind, decay):
    """Keys nearly parallel (cosine 1 - 1e-7) and repeated, beta up to two, decays of one and far
    below: float32 keeps its digits, and its gradients are finite."""
    time = 4096
    with jax.enable_x64(True):
        arrays = draw(kind, time)
        rng = np.random.default_rng(2)
        one = np.ones(KEY) / np.sqrt(KEY)
        k = one + 2e-4 * rng.normal(size=arrays["k"].shape)
        k[::7] = one
        k = jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True))
        beta = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 1.999, 2.0], arrays["beta"].shape))
        if decay == 0 and KINDS[kind]["erase"] is None:
            beta = beta / 100  # a plain sum grows
        arrays = {**arrays, "k": k, "beta": beta}
        log_decay = jnp.full_like(arrays["log_decay"], decay)
        arrays["log_decay"] = log_decay.at[::3].set(0.0)
        run = jax.jit(
            jax.value_and_grad(
                lambda arrays: (lambda out: (jnp.vdot(out[0], out[0]), out))(
                    operation(kind, 64)(**arrays)
                ),
                has_aux=True,
            )
        )
        (_, expected), _ = run(arrays)
        single = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
        (_, actual), gradients = run(single)
        assert_close(actual, expected, 1e-4)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", ["scalar decay", "vector decay"])
def test_what_came_before_rounds_nothing(kind):
    """A sample that forgets nearly all leaves the slow decays behind it their digits."""
    with jax.enable_x64(True):
        arrays = draw(kind, 32)
        arrays["log_decay"] = (arrays["log_decay"] / 100).at[1].set(-900)
        single = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
        run = jax.jit(operation(kind, 32))
        assert_close(run(**single), run(**arrays), 1e-6)


def test_triangular_systems():
    """With all ones times two below the diagonal, powers of the matrix reach 1e30."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for lower in (2 * np.ones((64, 64)), rng.normal(size=(64, 64)) / 8):
            lower = np.tril(lower, -1)
            right = rng.normal(size=(64, 3))
            w = solve_unit_lower(jnp.asarray(lower), jnp.asarray(right))
            np.testing.assert_allclose((np.eye(64) + lower) @ w, right, atol=1e-12)
            single = solve_unit_lower(jnp.float32(lower), jnp.float32(right))
            assert_close(single, w, 1e-5)


@pytest.mark.slow
@some_kinds
def test_vmap_is_a_loop(kind):
    with jax.enable_x64(True):
        batch = [draw(kind, seed=seed) for seed in range(3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
        run = jax.jit(lambda arrays: operation(kind)(**arrays))
        batched = jax.jit(jax.vmap(lambda arrays: operation(kind)(**arrays)))(stacked)
        for i, arrays in enumerate(batch):
            assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), run(arrays), 1e-13)


@pytest.mark.slow
@some_kinds
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_reset_stops_a_nan(kind, value):
    """It spoils its own sequence from its sample on, and nothing before or behind."""
    with jax.enable_x64(True):
        run = jax.jit(operation(kind, resets=jnp.asarray(RESETS)))
        arrays = draw(kind)
        y, state = run(**arrays)
        for name in ("q", "k", "v", "beta", "log_decay", "initial_state"):
            if name == "log_decay" and value == jnp.inf:
                continue
            at = 0 if name == "initial_state" else 5
            bad = {**arrays, name: arrays[name].at[at].set(value)}
            y_bad, state_bad = run(**bad)
            last = 3 if name == "initial_state" else 9
            spoilt = slice(at, at + 1) if name == "q" else slice(at, last)
            assert not jnp.isfinite(y_bad[spoilt]).all(axis=(1, 2)).any()
            fine = np.setdiff1d(np.arange(TIME), np.arange(TIME)[spoilt])
            assert_close((y_bad[fine], state_bad), (y[fine], state), 1e-12)


def test_bfloat16_accumulates_in_float32():
    """400 samples of one and no decay add up; bfloat16 itself would stop at 256."""
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    y, S = gated_linear_attention(ones(400, 1, 1), ones(400, 1, 1), ones(400, 1, 1))
    assert y.dtype == jnp.bfloat16
    assert S.dtype == jnp.float32
    assert S == 400


def test_no_samples():
    arrays = cut(draw("delta, scalar decay"), 0)
    y, S = delta_rule(**arrays)
    assert y.shape == (0, HEADS, VALUE)
    np.testing.assert_array_equal(S, arrays["initial_state"])


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_to_plain_products(platform):
    arrays = draw("delta, vector decay")
    loss = lambda arrays: weighted(delta_rule(**arrays, chunk_size=4))
    text = jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text and "custom_call" not in text


def loop_mlstm(q, k, v, i, f):
    """Without stabilisation, in float64."""
    q, k, v, i, f = map(numbers, (q, k, v, i, f))
    each = HEADS // KEY_HEADS
    C, n, ys = np.zeros((HEADS, KEY, VALUE)), np.zeros((HEADS, KEY)), []
    for t in range(len(q)):
        forget = 1 / (1 + np.exp(-f[t]))
        for h in range(HEADS):
            write = np.exp(i[t, h]) * k[t, h // each]
            C[h] = forget[h] * C[h] + np.outer(write, v[t, h])
            n[h] = forget[h] * n[h] + write
        q_t = np.repeat(q[t], each, 0)
        size = np.maximum(np.abs((n * q_t).sum(-1)), 1)
        ys.append(np.einsum("hk,hkv->hv", q_t, C) / size[:, None])
    return np.stack(ys)


def test_mlstm():
    """The equation without a running maximum; pieces, resets, lengths; gates that would overflow."""
    with jax.enable_x64(True):
        arrays = draw("delta")
        q, k, v = (arrays[n] for n in "qkv")
        rng = np.random.default_rng(1)
        i, f = (jnp.asarray(rng.normal(size=(TIME, HEADS))) for _ in range(2))
        run = jax.jit(ft.partial(mlstm, chunk_size=4, eps=0.0))
        assert_close(run(q, k, v, i, f)[0], loop_mlstm(q, k, v, i, f), 1e-12)

        whole = run(q, k, v, i, f, resets=jnp.asarray(RESETS))
        ys, state = [], None
        for start, end in ((0, 1), (1, 3), (3, 4), (4, 9), (9, TIME)):
            piece = [array[start:end] for array in (q, k, v, i, f)]
            state = None if RESETS[start] else state
            y, state = run(*piece, state)
            ys.append(y)
        assert_close((jnp.concatenate(ys), state), whole, 1e-12)

        bad = [array.at[7:].set(jnp.nan) for array in (q, k, v, i, f)]
        y, state = run(*bad, length=jnp.asarray(7), resets=jnp.asarray(RESETS))
        expected = run(*(array[:7] for array in (q, k, v, i, f)), resets=jnp.asarray(RESETS[:7]))
        assert_close((y[:7], state), expected, 1e-13)

        large = run(q, k, v, i + 800, f)[0]  # e^800 overflows, and weighs alike everywhere
        assert_close(large, run(q, k, v, i + 400, f)[0], 1e-12)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", jnp.ones((TIME, KEY)), r"`q` and `k` must be \(time, key_heads, key\).*jax.vmap"),
        (
            "v",
            jnp.ones((TIME, 3, VALUE)),
            r"multiple of those of `q` and `k`; got .*3 heads.*2 key",
        ),
        ("v", jnp.ones((TIME, 0, VALUE)), r"multiple of those of `q` and `k`; got .*0 heads"),
        ("k", jnp.ones((TIME, KEY_HEADS, 4)), r"`k` must be .*= \(11, 2, 5\); got .*\(11, 2, 4\)"),
        ("k", jnp.ones((TIME, KEY_HEADS, KEY), int), r"`k` must be floating.*got int32"),
        ("beta", jnp.ones(TIME), r"`beta` must be .*\(time, heads\) = \(11, 4\); got .*\(11,\)"),
        ("log_decay", jnp.ones((TIME, 2)), r"`log_decay` must be .*\(11, 4\); got .*\(11, 2\)"),
        ("log_decay", jnp.ones(3), r"`log_decay` must be .*\(heads\) = \(4,\); got .*\(3,\)"),
        ("log_decay", jnp.full(HEADS, 0.5), r"must not be positive; got 0.5"),
        ("erase", jnp.ones((TIME, HEADS, KEY)), r"`erase` must be .*\(11, 2, 5\); got .*11, 4, 5"),
        ("initial_state", jnp.ones((4, 3, 5)), r"`initial_state` must be .*\(4, 5, 3\)"),
        ("chunk_size", 0, "`chunk_size` must be .* at least 1; got 0"),
        ("length", 12, "between 0 and .*11; got 12"),
        ("resets", jnp.zeros(TIME), r"`resets` must be booleans.*got float32\(11,\)"),
    ],
)
def test_unfit_arguments_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**draw("delta, scalar decay"), name: value})


def test_steps_are_refused_where_nothing_erases():
    arrays = draw("delta, three steps")
    with pytest.raises(ValueError, match=r"`k` must be \(time, key_heads, key\)|`q` and `k` must"):
        gated_linear_attention(**arrays)
    arrays = {n: a[:, :0] if n in ("k", "v", "beta") else a for n, a in arrays.items()}
    with pytest.raises(ValueError, match=r"at least one step; got k: .*none"):
        delta_rule(**arrays)
