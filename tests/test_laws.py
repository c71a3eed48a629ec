"""The laws that every sequence mixer obeys, each one test over `cases.CASES`."""

import functools as ft
import io
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from cases import CASES, FEATURES, TIME, Case
from helpers import parameters


def each_case(having=lambda case: True):
    """Grouped by case: one worker runs a case's laws, and compiles its mixer once."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=str(case), marks=pytest.mark.xdist_group(str(case)))
            for case in CASES
            if having(case)
        ],
    )


every_case = each_case()
streaming_case = each_case(lambda case: case.streams)

run = eqx.filter_jit(lambda mixer, x, cache=None, **options: mixer(x, cache, **options))
step = eqx.filter_jit(lambda mixer, x, cache: mixer.step(x, cache))


def make(case: Case, seed: int = 0):
    mixer_key, x_key = jr.split(jr.key(seed))
    return case.make(mixer_key), jr.normal(x_key, (TIME, FEATURES))


def empty_cache(mixer):
    """Of one size for every length that the tests run, where a cache grows with time."""
    return mixer.allocate_inference_cache(max_seqlen=2 * TIME)


def used_cache(mixer):
    """As earlier samples left it."""
    return run(mixer, jr.normal(jr.key(7), (5, FEATURES)), empty_cache(mixer))[1]


def weighted(tree):
    """A scalar that sees every entry of every floating leaf with another weight."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return sum(
        jnp.vdot(jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype) + i), leaf.ravel())
        for i, leaf in enumerate(leaves)
    )


def assert_close(actual, expected, rtol=1e-5):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(np.abs(e).max(initial=0), 1e-30)
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * scale)


def in_chunks(mixer, x, cache, cuts):
    edges = (0, *cuts, x.shape[0])
    ys = []
    for start, end in itertools.pairwise(edges):
        y, cache = mixer(x[start:end], cache)
        ys.append(y)
    return jnp.concatenate(ys), cache


def in_steps(mixer, x, cache):
    def body(cache, sample):
        y, cache = mixer.step(sample, cache)
        return cache, y

    cache, y = jax.lax.scan(body, cache, x)
    return y, cache


def whole(mixer, x, cache):
    return mixer(x, cache)


VIEWS = {
    "chunks": ft.partial(in_chunks, cuts=(1, 2, 2, 9)),  # of length one, empty and uneven
    "steps": in_steps,
}


@eqx.filter_jit
def value_and_gradients(view, mixer, x, cache):
    def loss(arguments):
        outcome = view(*arguments)
        return weighted(outcome), outcome

    (_, outcome), gradients = eqx.filter_value_and_grad(loss, has_aux=True)((mixer, x, cache))
    return outcome, gradients


# Law 1


@pytest.mark.parametrize("view", VIEWS)
@streaming_case
def test_whole_is_chunks_is_steps(case, view):
    with jax.enable_x64(True):
        mixer, x = make(case)
        cache = used_cache(mixer)
        pieces = value_and_gradients(VIEWS[view], mixer, x, cache)
        expected = value_and_gradients(whole, mixer, x, cache)
        assert_close(pieces, expected, 1e-12)


@pytest.mark.parametrize("view", VIEWS)
@streaming_case
def test_whole_is_chunks_is_steps_in_single_precision(case, view):
    mixer, x = make(case)
    cache = used_cache(mixer)
    assert_close(eqx.filter_jit(VIEWS[view])(mixer, x, cache), run(mixer, x, cache))


@streaming_case
def test_no_cache_is_the_allocated_cache(case):
    mixer, x = make(case)
    assert_close(run(mixer, x), run(mixer, x, mixer.allocate_inference_cache(max_seqlen=TIME)), 0)


@streaming_case
def test_batched_cache_is_for_vmap(case):
    mixer, x = make(case)
    batch = jnp.stack([x, 2 * x, -x])
    y, cache = eqx.filter_vmap(run, in_axes=(None, 0, 0))(
        mixer, batch, mixer.allocate_inference_cache(batch_size=3, max_seqlen=TIME)
    )
    for i in range(3):
        assert_close((y[i], jax.tree.map(lambda leaf, i=i: leaf[i], cache)), run(mixer, batch[i]))


# Law 3


@streaming_case
def test_causal(case):
    mixer, x = make(case)
    now = 6
    y, _ = run(mixer, x)
    moved, _ = run(mixer, x.at[now + 1 :].add(100.0))
    rounding = 1e-6 if case.rounds_the_past else 0.0
    assert np.abs(moved - y)[: now + 1].max() <= rounding * np.abs(moved).max()
    assert np.abs(moved - y)[now + 1 :].max(axis=1).min() > 0.1

    past = eqx.filter_jit(jax.grad(lambda x: weighted(mixer(x)[0][: now + 1])))(x)
    assert np.abs(past[now + 1 :]).max() <= rounding * np.abs(past).max()
    assert (past[: now + 1] != 0).all()


# Law 4


def padded(case, length):
    """A mixer, its cache, options, and samples of which those from `length` on are NaN."""
    mixer, x = make(case)
    cache = used_cache(mixer) if case.streams else None
    options = {}
    if case.takes_timesteps:
        options = {"integration_timesteps": jr.uniform(jr.key(3), (TIME,))}
    cut = {name: value[:length] for name, value in options.items()}
    return mixer, x.at[length:].set(jnp.nan), cache, options, cut


# Lengths of pieces, here and below, are among few: each is compiled once for a case.
@pytest.mark.parametrize("length", [0, 1, 5, TIME])
@every_case
def test_length_ends_the_sequence(case, length):
    mixer, x, cache, options, cut = padded(case, length)
    y, final = run(mixer, x, cache, length=jnp.asarray(length), **options)
    if length == 0:
        assert_close(final, cache, 0)
        return
    assert_close((y[:length], final), run(mixer, x[:length], cache, **cut))
    if case.streams:  # a static length takes the same route or another; the numbers agree
        assert_close(run(mixer, x, cache, length=length, **options)[1], final)


@every_case
def test_length_ends_the_gradients(case):
    mixer, x, _, options, cut = padded(case, 8)

    @eqx.filter_jit
    def gradients(mixer, x, options, **length):
        loss = lambda mixer: weighted(mixer(x, **options, **length)[0][:8])
        return eqx.filter_grad(loss)(mixer)

    assert_close(gradients(mixer, x, options, length=jnp.asarray(8)), gradients(mixer, x[:8], cut))


@every_case
def test_padded_batch_is_single_runs(case):
    mixer, _ = make(case)
    batch = jr.normal(jr.key(1), (3, TIME, FEATURES))
    lengths = jnp.array([TIME, 5, 1])
    cache = empty_cache(mixer) if case.streams else None
    y, final = eqx.filter_jit(jax.vmap(lambda x, length: mixer(x, cache, length=length)))(
        batch, lengths
    )
    for i, length in enumerate(lengths.tolist()):
        single = run(mixer, batch[i, :length], cache)
        assert_close((y[i, :length], jax.tree.map(lambda leaf, i=i: leaf[i], final)), single)


@pytest.mark.parametrize("starts", [(0,), (1,), (5, 6, 7, 8), (TIME - 1,)], ids=str)
@every_case
def test_resets_are_separate_runs(case, starts):
    mixer, x = make(case)
    resets = jnp.zeros(TIME, bool).at[jnp.array(starts)].set(True)
    cache = empty = None
    if case.streams:
        cache, empty = used_cache(mixer), empty_cache(mixer)
    y, final = run(mixer, x, cache, resets=resets)
    edges = sorted({0, *starts, TIME})
    pieces = []
    for start, end in itertools.pairwise(edges):
        piece, last = run(mixer, x[start:end], cache if start not in starts else empty)
        pieces.append(piece)
    assert_close((y, final), (jnp.concatenate(pieces), last))


@every_case
def test_resets_gradients(case):
    mixer, x = make(case)
    resets = jnp.arange(TIME) == 5
    together = lambda mixer, x: mixer(x, resets=resets)[0]
    apart = lambda mixer, x: jnp.concatenate([mixer(x[:5])[0], mixer(x[5:])[0]])
    gradients = [
        eqx.filter_jit(eqx.filter_grad(lambda args, f=f: weighted(f(*args))))((mixer, x))
        for f in (together, apart)
    ]
    assert_close(*gradients)


@every_case
def test_nan_before_a_reset_does_not_leak(case):
    mixer, x = make(case)
    resets = jnp.arange(TIME) == 5
    cache = empty_cache(mixer) if case.streams else None
    y, final = run(mixer, x.at[3].set(jnp.nan), cache, resets=resets)
    clean, clean_final = run(mixer, x[5:], cache)
    assert_close((y[5:], final), (clean, clean_final))


# Law 5


@every_case
def test_timesteps(case):
    mixer, x = make(case)
    ones = jnp.ones(TIME)
    if not case.takes_timesteps:
        with pytest.raises(ValueError, match="takes no integration timesteps"):
            mixer(x, integration_timesteps=ones)
        with pytest.raises(ValueError, match="takes no integration timesteps"):
            mixer.step(x[0], mixer.allocate_inference_cache(), integration_timestep=1.0)
        return
    assert_close(run(mixer, x, integration_timesteps=ones), run(mixer, x))
    gaps = jr.uniform(jr.key(2), (TIME,), maxval=3.0)
    y, final = run(mixer, x, integration_timesteps=gaps)
    assert np.abs(y - run(mixer, x)[0]).max() > 1e-2
    if case.streams:
        cache = mixer.allocate_inference_cache()
        for t in range(TIME):
            y_t, cache = mixer.step(x[t], cache, integration_timestep=gaps[t])
            assert_close(y_t, y[t], 1e-4)
        assert_close(cache, final)


@each_case(lambda case: case.gap_is_zero_input)
def test_a_gap_is_zero_input(case):
    mixer, x = make(case)
    gaps = jnp.ones(TIME).at[4].set(3.0)
    y, final = run(mixer, x, integration_timesteps=gaps)
    filled = jnp.insert(x, jnp.array([4, 4]), 0.0, axis=0)
    y_filled, final_filled = run(mixer, filled)
    assert_close((y, final), (jnp.delete(y_filled, jnp.array([4, 5]), axis=0), final_filled))


# Law 6


@each_case(lambda case: case.convolve is not None)
def test_scan_is_convolution(case):
    mixer, x = make(case)
    scan = lambda args: weighted(args[0](args[1])[0])
    convolution = lambda args: weighted(case.convolve(*args))
    assert_close(run(mixer, x)[0], eqx.filter_jit(case.convolve)(mixer, x))
    assert_close(*(eqx.filter_jit(eqx.filter_grad(f))((mixer, x)) for f in (scan, convolution)))


# Law 7


@every_case
def test_jit_is_eager(case):
    mixer, x = make(case)
    assert_close(run(mixer, x), mixer(x))
    if case.streams:
        cache = used_cache(mixer)
        assert_close(step(mixer, x[0], cache), mixer.step(x[0], cache))


@every_case
def test_vmap_is_a_loop(case):
    mixer, _ = make(case)
    batch = jr.normal(jr.key(5), (3, TIME, FEATURES))
    loss = lambda mixer, x: weighted(mixer(x)[0])
    batched = eqx.filter_jit(
        eqx.filter_grad(lambda mixer: jax.vmap(ft.partial(loss, mixer))(batch).sum())
    )(mixer)
    single = eqx.filter_jit(eqx.filter_grad(loss))
    singles = [single(mixer, x) for x in batch]
    assert_close(batched, jax.tree.map(lambda *leaves: sum(leaves), *singles))


@every_case
def test_checkpoint_and_scan(case):
    mixer, x = make(case)
    plain = lambda mixer, x: mixer(mixer(x)[0])[0]
    twice = lambda mixer, x: jax.lax.scan(
        lambda u, _: (jax.checkpoint(lambda v: mixer(v)[0])(u), None), x, length=2
    )[0]
    gradients = [
        eqx.filter_jit(eqx.filter_grad(lambda args, f=f: weighted(f(*args))))((mixer, x))
        for f in (plain, twice)
    ]
    assert_close(*gradients)


@every_case
def test_second_order_in_reverse(case):
    with jax.enable_x64(True):
        mixer, x = make(case)
        params, static = eqx.partition(mixer, eqx.is_inexact_array)
        loss = lambda args: jnp.sum(jnp.tanh(eqx.combine(args[0], static)(args[1])[0]) ** 2)
        gradient = jax.jit(jax.grad(loss))
        point = (params, x)
        keys = iter(jr.split(jr.key(9), 64))
        direction = jax.tree.map(lambda leaf: jr.normal(next(keys), leaf.shape), point)
        dot = lambda a, b: sum(
            jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        product = jax.jit(jax.grad(lambda args: dot(gradient(args), direction)))(point)
        eps = 1e-5
        ahead, behind = (
            gradient(jax.tree.map(lambda p, d, s=s: p + s * eps * d, point, direction))
            for s in (1, -1)
        )
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), ahead, behind)
        assert_close(product, difference, 1e-6)


# Law 8


@every_case
def test_bfloat16_activations(case):
    mixer, x = make(case)
    low = x.astype(jnp.bfloat16)
    y, final = run(mixer, low)
    expected, expected_final = run(mixer, low.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in parameters(final).values())
    assert_close(y.astype(jnp.float32), expected, 2e-2)
    assert_close(final, expected_final, 2e-2)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: m(low)[0].astype(jnp.float32).sum()))(mixer)
    stepped = eqx.apply_updates(mixer, gradient)
    for path, new in parameters(stepped).items():
        assert new.dtype == parameters(mixer)[path].dtype == jnp.float32
        assert jnp.isfinite(new).all()


# Law 9


@each_case(lambda case: case.transition_size is not None)
def test_stable_whatever_the_training(case):
    mixer, _ = make(case)
    assert case.transition_size(mixer).max() <= 1
    optimiser = optax.adam(0.3)
    params = eqx.filter(mixer, eqx.is_inexact_array)

    @eqx.filter_jit
    def walk(params, key):
        def body(carry, key):
            params, opt_state = carry
            leaves, structure = jax.tree.flatten(params)
            keys = jr.split(key, len(leaves))
            noise = [jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimiser.update(
                    jax.tree.unflatten(structure, noise), opt_state
                )
            return (eqx.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(body, (params, optimiser.init(params)), jr.split(key, 100))[0][0]

    moved = eqx.combine(walk(params, jr.key(3)), mixer)
    assert np.abs(jax.tree.leaves(moved)[0] - jax.tree.leaves(mixer)[0]).max() > 0.1
    assert case.transition_size(moved).max() <= 1


@every_case
def test_long_sequences_stay_finite(case):
    mixer, _ = make(case)
    x = jr.normal(jr.key(4), (case.longest, FEATURES))
    y, final = run(mixer, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((y, final)))
    assert jnp.abs(y).max() < 1e3


# Law 10


@every_case
def test_serialise_and_deserialise(case):
    mixer, x = make(case)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, mixer)
    file.seek(0)
    again = eqx.tree_deserialise_leaves(file, make(case, seed=1)[0])
    assert_close(run(again, x), run(mixer, x), 0)


@every_case
def test_one_key_one_mixer(case):
    leaves = [parameters(case.make(jr.key(seed))) for seed in (0, 0, 1)]
    for path, first in leaves[0].items():
        assert (first == leaves[1][path]).all()
        drawn = path.rpartition(".")[2] not in case.not_drawn
        assert (first != leaves[2][path]).all() == drawn, path


@each_case(lambda case: case.name != "Discretized")  # which keeps the skip of what it wraps
def test_no_array_stands_twice(case):
    """A training step that donates its parameters could not give away one buffer twice."""
    arrays = [leaf for leaf in jax.tree.leaves(case.make(jr.key(0))) if eqx.is_array(leaf)]
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


# What a caller may get wrong


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.ones(FEATURES), {}, r"one sequence, .*got \(4,\).*`jax.vmap`"),
        (jnp.ones((2, TIME, FEATURES)), {}, r"one sequence, .*got \(2, 13, 4\).*`jax.vmap`"),
        (jnp.ones((TIME, 5)), {}, r"last axis has size 4; got float32\(13, 5\)"),
        (jnp.ones((TIME, FEATURES), int), {}, r"floating arrays.*got int32\(13, 4\)"),
        (jnp.ones((TIME, FEATURES)), {"length": -1}, "between 0 and .*13; got -1"),
        (jnp.ones((TIME, FEATURES)), {"length": 14}, "between 0 and .*13; got 14"),
        (jnp.ones((TIME, FEATURES)), {"length": 2.0}, "whole number.*got float"),
        (jnp.ones((TIME, FEATURES)), {"length": jnp.ones(3, int)}, r"got int32\(3,\).*`jax.vmap`"),
        (
            jnp.ones((TIME, FEATURES)),
            {"resets": jnp.zeros(12, bool)},
            r"booleans, one per sample: shape \(13,\); got bool\(12,\)",
        ),
        (jnp.ones((TIME, FEATURES)), {"resets": jnp.zeros(13)}, r"got float32\(13,\)"),
        (
            jnp.ones((TIME, FEATURES)),
            {"integration_timesteps": jnp.ones(12)},
            r"one per sample: shape \(13,\); got float32\(12,\)",
        ),
        (
            jnp.ones((TIME, FEATURES)),
            {"integration_timesteps": -jnp.ones(13)},
            "must not be negative; got -1.0",
        ),
    ],
)
@every_case
def test_unfit_input_is_refused(case, x, options, message):
    mixer, _ = make(case)
    with pytest.raises(ValueError, match=message):
        mixer(x, **options)


@streaming_case
def test_unfit_cache_is_refused(case):
    mixer, x = make(case)
    batched = mixer.allocate_inference_cache(batch_size=2)
    with pytest.raises(ValueError, match=r"takes a cache of shapes .*; got .*2.*vmap"):
        mixer(x, batched)
    with pytest.raises(ValueError, match=r"takes a cache of shapes .*; got .*2.*vmap"):
        mixer.step(x[0], batched)
    with pytest.raises(ValueError, match=r"one floating sample of shape \(4,\); got float32\(13"):
        mixer.step(x, mixer.allocate_inference_cache())
    with pytest.raises(ValueError, match=r"`batch_size` must be None .* at least 1; got 0"):
        mixer.allocate_inference_cache(batch_size=0)


@each_case(lambda case: not case.streams)
def test_what_cannot_stream_says_so(case):
    mixer, x = make(case)
    for attempt in (
        lambda: mixer.allocate_inference_cache(),
        lambda: mixer.step(x[0], None),
        lambda: mixer(x, jnp.zeros(3)),
    ):
        with pytest.raises(ValueError, match="cannot stream"):
            attempt()
