"""Drawing a token: each filter against numpy, and frequencies against probabilities."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from discretax import sample_token
from discretax.inference._sampling import filtered

LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.3, -4.0, 1.9])
INF, NAN = np.inf, np.nan
SEEN = np.array([False, True, True, False, False, False, False])
VOCABULARY = len(LOGITS)
TOP_K_THEN_TOP_P = {"temperature": 2.5, "top_k": 5, "top_p": 0.8}
TOP_P_THEN_MIN_P = {"top_p": 0.7, "min_p": 0.1}


def probabilities(
    logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None, seen=None
):
    """The definitions, by sorting; the tokens of no probability are those that are left out."""
    logits = np.array(logits, np.float64)
    if repetition_penalty is not None:
        for token in np.flatnonzero(seen):
            down = logits[token] > 0
            logits[token] *= 1 / repetition_penalty if down else repetition_penalty
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    ranking = sorted(range(len(p)), key=lambda token: (-p[token], token))
    if top_k is not None:
        p[ranking[top_k:]] = 0
        p /= p.sum()
    if top_p is not None and top_p < 1:
        reached = np.cumsum(p[ranking])
        p[ranking[np.argmax(reached >= top_p - 1e-9) + 1 :]] = 0
        p /= p.sum()
    if min_p is not None:
        p[p < min_p * p.max()] = 0
        p /= p.sum()
    return p


def frequencies(key, size, **options):
    draw = lambda key: sample_token(jnp.asarray(LOGITS, float), key, **options)
    tokens = jax.jit(jax.vmap(draw))(jr.split(key, size))
    return np.bincount(tokens, minlength=VOCABULARY)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"repetition_penalty": 1.7, "seen": SEEN},
        {"repetition_penalty": 0.6, "seen": SEEN},
        TOP_K_THEN_TOP_P,
        TOP_P_THEN_MIN_P,
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_frequencies_are_the_probabilities(options):
    size = 20_000
    expected = size * probabilities(LOGITS, **options)
    counts = frequencies(jr.key(0), size, **options)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    assert degrees > 0
    assert chi_square < degrees + 3 * np.sqrt(2 * degrees)


def test_another_order_would_show_above():
    def possible(options, order):
        logits = LOGITS
        for name in order:
            p = probabilities(logits, **{name: options[name]})
            logits = np.log(np.maximum(p, 1e-300))
        return set(np.flatnonzero(p))

    for options, order, others in (
        (
            TOP_K_THEN_TOP_P,
            ("temperature", "top_k", "top_p"),
            [("temperature", "top_p", "top_k"), ("top_k", "top_p", "temperature")],
        ),
        (TOP_P_THEN_MIN_P, ("top_p", "min_p"), [("min_p", "top_p")]),
    ):
        assert possible(options, order) == set(np.flatnonzero(probabilities(LOGITS, **options)))
        for other in others:
            assert possible(options, other) != possible(options, order)


# Filters


def kept(logits, top_k=None, top_p=None, min_p=None):
    array = lambda values, kind: None if values is None else jnp.asarray(values, kind)
    options = array(top_k, int), array(top_p, float), array(min_p, float)
    run = jax.jit(jax.vmap(lambda logits, *options: filtered(logits, jnp.ones(()), *options)))
    return np.isfinite(run(jnp.asarray(logits, float), *options))


@pytest.mark.parametrize("names", [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")])
def test_filters_against_sorting(names):
    """Every second row is of whole numbers, many of which are equal."""
    rng, rows = np.random.default_rng(0), 300
    logits = (2 * rng.normal(size=(rows, 9))).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    values = {
        "top_k": rng.integers(1, 12, rows),
        "top_p": np.where(np.arange(rows) < 40, 1, rng.uniform(0.01, 1, rows)),
        "min_p": np.where(np.arange(rows) < 40, np.arange(rows) % 2, rng.uniform(0, 1, rows)),
    }
    values = {name: values[name] for name in names}
    row_options = [{name: v[i] for name, v in values.items()} for i in range(rows)]
    expected = [
        probabilities(row, **options) > 0 for row, options in zip(logits, row_options, strict=True)
    ]
    np.testing.assert_array_equal(kept(logits, **values), expected)


@pytest.mark.parametrize(
    "logits, options, expected",
    [
        # Of equals the lower token stays, minus zero being zero.
        ([1.0, 2.0, 2.0, 2.0], {"top_k": 2}, [1, 2]),
        ([-0.0, 0.0, -0.0, -1.0], {"top_k": 1}, [0]),
        ([0.0, -0.0, 0.0, -1.0], {"top_k": 2}, [0, 1]),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, [0, 1]),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.51}, [0, 1, 2]),
        # A set that reaches p exactly is enough.
        (np.log2([8, 4, 2, 2]) * np.log(2), {"top_p": 0.4}, [0]),
        (np.log2([2, 8, 2, 4]) * np.log(2), {"top_p": 0.6}, [1, 3]),
        # One token at least; all that have any probability at most.
        ([0.0, 3.0, 1.0, 2.0], {"top_p": 1e-30}, [1]),
        ([0.0, -30.0, -80.0, -60.0], {"top_p": 1.0}, [0, 1, 2, 3]),
        ([0.0, -20.0, -30.0, -1.0], {"top_p": 1 - 1e-6}, [0, 3]),
        ([0.0, 3.0, 3.0, 2.0], {"min_p": 1.0}, [1, 2]),
        ([0.0, -80.0, 1.0, 2.0], {"min_p": 0.0}, [0, 1, 2, 3]),
        ([5.0, -np.inf, 1.0, -np.inf], {"top_k": 3, "top_p": 1.0, "min_p": 0.0}, [0, 2]),
        ([3.0, 1.0, 2.0, 0.0], {"top_k": 99}, [0, 1, 2, 3]),
    ],
)
def test_edges_of_the_filters(logits, options, expected):
    options = {name: [value] for name, value in options.items()}
    np.testing.assert_array_equal(np.flatnonzero(kept([logits], **options)), expected)


def test_filters_that_keep_all_change_nothing():
    keys, logits = jr.split(jr.key(1), 50), jnp.asarray(LOGITS, float)
    draw = lambda **options: jax.vmap(lambda key: sample_token(logits, key, **options))(keys)
    np.testing.assert_array_equal(draw(top_k=VOCABULARY, top_p=1.0, min_p=0.0), draw())


def test_the_most_likely_token():
    logits = jnp.asarray([0.0, 3.0, -1.0, 3.0])
    seen = jnp.array([False, True, False, False])
    assert sample_token(logits, temperature=0) == 1
    assert sample_token(logits, jr.key(0), top_k=1) == 1
    assert sample_token(logits, temperature=0.0, repetition_penalty=1.1, seen=seen) == 3
    # A logit below zero moves down as well.
    assert sample_token(-1 - logits, temperature=0, repetition_penalty=1.1, seen=seen) == 2
    below = jnp.array([-1.0, -1.05])
    assert sample_token(below, temperature=0, repetition_penalty=1.1, seen=seen[1::-1]) == 1


@pytest.mark.parametrize(
    ("logits", "options", "expected"),
    [
        *(([1, 2, 5, 3], {"temperature": t}, {2}) for t in (1e-8, 1e-37, 1e-38, 1e-39, 1e-60)),
        ([-1, -3, -2, -9], {"temperature": 1e-60}, {0}),
        ([0, 3e38, -3e38, 1], {"temperature": 1e-38}, {1}),
        ([3, 3, 3, 0], {"temperature": 1e-45}, {0, 1, 2}),
        ([1, 2, 5, 3], {"temperature": 3e38}, {0, 1, 2, 3}),
        ([1, -INF, 5, -INF], {"temperature": 1e300}, {0, 2}),
        ([INF, -INF, 5, 0], {"temperature": 1e300}, {0}),
        ([1, -INF, INF, INF], {"min_p": 0.1}, {2, 3}),
        ([1, INF, 2, 3], {"top_p": 1.0}, {1}),
        ([INF, 0, -INF, INF], {"top_p": 0.5}, {0}),
        ([1, INF, 2, 3], {"top_k": 3, "top_p": 0.9, "min_p": 0.0}, {1}),
        ([-INF, -INF, -INF, 0], {"top_k": 3, "top_p": 1.0, "min_p": 0.0}, {3}),
        ([-INF, -INF, -2, -INF], {"temperature": 1e-60, "min_p": 1.0}, {2}),
        ([-INF] * 4, {"min_p": 0.5}, {0, 1, 2, 3}),
        ([NAN, 1, NAN, 1], {"top_p": 0.9}, {1, 3}),
        ([NAN, 1, -INF, INF], {"min_p": 0.5}, {3}),
        ([0, 1, 2, 9], {"top_p": 1e-60}, {3}),
        ([9, 9, 2, 9], {"top_p": 1e-9}, {0}),
        ([0, 1, 2, 9], {"min_p": 1e-60, "temperature": 1e-60}, {3}),
        ([0, -1, 2, -3], {"repetition_penalty": 1e-60, "temperature": 1e-3}, {2}),
        ([1, 0, -2, 3], {"repetition_penalty": 1e60, "temperature": 1e-60}, {0, 1, 3}),
    ],
)
def test_numbers_at_the_edge(logits, options, expected):
    """What is drawn from logits, and with options, that float32 can hardly hold or cannot."""
    seen = {"seen": np.ones(4, bool)} if "repetition_penalty" in options else {}
    draw = lambda key: sample_token(jnp.asarray(logits, float), key, **options, **seen)
    tokens = jax.vmap(draw)(jr.split(jr.key(0), 100))
    assert set(tokens.tolist()) == expected


def test_the_most_likely_of_what_is_hardly_a_number():
    for logits, expected in (([NAN, 1, 2], 2), ([1, NAN, INF], 2), ([-INF, NAN, -5], 2)):
        assert sample_token(jnp.asarray(logits, float), temperature=0) == expected


@pytest.mark.parametrize("top_k", [2**31, 2**70, np.int64(2**31), np.uint32(2**31), 7])
def test_more_than_all_tokens(top_k):
    keys, logits = jr.split(jr.key(1), 50), jnp.asarray(LOGITS, float)
    draw = lambda **options: jax.vmap(lambda key: sample_token(logits, key, **options))(keys)
    np.testing.assert_array_equal(draw(top_k=top_k), draw())


def test_double_precision():
    with jax.enable_x64(True):
        logits = jnp.array([1.0, 1 + 1e-12, 0.0])
        assert sample_token(logits, temperature=0) == 1
        np.testing.assert_array_equal(kept([logits], top_k=[1]), [[False, True, False]])
        p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
        for difference, size in ((-1e-12, 1), (1e-12, 2)):
            assert kept([[1.0, 0.0]], top_p=[p[0] + difference]).sum() == size


def test_half_precision_is_widened():
    """In bfloat16, 1 / 256 is lost beside one."""
    logits = jnp.array([1.0, 1.0], jnp.bfloat16)
    seen = jnp.array([True, False])
    assert sample_token(logits, temperature=0, repetition_penalty=1 + 2**-10, seen=seen) == 1


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, r"`temperature` must be at least 0 and finite; got -0\.1"),
        ({"temperature": np.inf}, r"`temperature` must .* got inf"),
        ({"temperature": np.nan}, r"`temperature` must .* got nan"),
        ({"temperature": None}, r"`temperature` must .* got None"),
        ({"temperature": "hot"}, r"`temperature` must .* got hot"),
        ({"temperature": np.ones(2)}, r"`temperature` must .* got \[1\. 1\.\]"),
        ({"top_k": 0}, r"`top_k` must be a whole number of at least 1; got 0"),
        ({"top_k": 2.0}, r"`top_k` must be a whole number of at least 1; got 2\.0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]; got 0\.0"),
        ({"top_p": 1.1}, r"`top_p` must be in \(0, 1\]; got 1\.1"),
        ({"min_p": -0.1}, r"`min_p` must be in \[0, 1\]; got -0\.1"),
        ({"min_p": 1.1}, r"`min_p` must be in \[0, 1\]; got 1\.1"),
        (
            {"repetition_penalty": 0.0, "seen": SEEN},
            r"`repetition_penalty` must be positive.* 0\.0",
        ),
        ({"repetition_penalty": 1.2}, r"both or neither; got repetition_penalty=1\.2 .*missing"),
        ({"seen": SEEN}, r"both or neither; got repetition_penalty=None and `seen` \(7,\)"),
        (
            {"key": None},
            r"temperature=1\.0\) needs a `key`.*jax\.random\.key\(0\).*`temperature=0`",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample_token(jnp.asarray(LOGITS, float), **{"key": jr.key(0)} | options)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (3, TypeError, r"`key` must be a key, such as `jax\.random\.key\(0\)`; got 3\."),
        (np.int32(3), TypeError, r"`key` must be a key.*got "),
        ("seed", TypeError, r"`key` must be a key.*got 'seed'"),
        (jnp.zeros(2), TypeError, r"`key` must be a key.*got Array"),
        (jr.split(jr.key(0), 3), ValueError, r"single key, of shape \(\); got \(3,\)"),
        (jr.split(jr.PRNGKey(0), 3), ValueError, r"single key, of shape \(2,\); got \(3, 2\)"),
    ],
)
def test_what_is_no_key(key, error, message):
    with pytest.raises(error, match=message):
        sample_token(jnp.asarray(LOGITS, float), key)


@pytest.mark.parametrize(
    "logits, seen, message",
    [
        (np.zeros((2, 7), np.float32), None, r"\(vocabulary,\); got float32\(2, 7\).*`jax\.vmap`"),
        (np.zeros(7, np.int32), None, r"must be floating.*got int32\(7,\)"),
        (np.zeros(7, np.float32), SEEN[:3], r"`seen` .*one per token, \(7,\); got bool\(3,\)"),
        (np.zeros(7, np.float32), np.ones(7, int), r"`seen` must be booleans.*got int64\(7,\)"),
    ],
)
def test_arrays_that_are_refused(logits, seen, message):
    with pytest.raises(ValueError, match=message):
        sample_token(
            logits, temperature=0, repetition_penalty=None if seen is None else 2.0, seen=seen
        )
