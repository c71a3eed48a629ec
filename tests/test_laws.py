"""The laws that every sequence mixer obeys, each one test over `cases.CASES`."""

import functools as ft
import io
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
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
step = eqx.filter_jit(lambda mixer, x, cache, **options: mixer.step(x, cache, **options))


# Lengths of pieces, here and below, are 0, 1 and 5: each is compiled once for a case.
CUTS = (5, 5, 6, 7, 8)
RESETS = (1, 2, 7, 8)


@ft.cache
def make(case: Case, seed: int = 0, double: bool = False) -> tuple[Any, Any]:
    with jax.enable_x64(double):
        mixer_key, x_key = jr.split(jr.key(seed))
        return case.make(mixer_key), np.asarray(jr.normal(x_key, (TIME, FEATURES)))


def draw(*shape, seed):
    """Normal numbers, from numpy: neither they nor their slices compile anything."""
    values = np.random.default_rng(seed).normal(size=(*shape, FEATURES))
    return values.astype(jnp.zeros(0).dtype)


def empty_cache(mixer):
    """Of one size for every length that the tests run, where a cache grows with time."""
    return mixer.allocate_inference_cache(max_seqlen=2 * TIME)


@ft.cache
def used_cache(case: Case, double: bool = False):
    """As earlier samples left it; None where nothing streams."""
    if not case.streams:
        return None
    with jax.enable_x64(False):
        mixer, _ = make(case)
        cache = run(mixer, draw(5, seed=7), empty_cache(mixer))[1]
    with jax.enable_x64(double):
        kinds = {"f": float, "i": int, "b": bool}
        return jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), kinds[leaf.dtype.kind]), cache
        )


def in_double(case: Case):
    return *make(case, double=True), used_cache(case, double=True)


def floats(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


def zeros(tree):
    return jax.tree.map(np.zeros_like, floats(tree))


def weights(tree):
    """Another for every entry of every floating leaf."""
    leaves, structure = jax.tree.flatten(floats(tree))
    return jax.tree.unflatten(
        structure,
        [
            np.cos(np.arange(leaf.size) + i).reshape(leaf.shape).astype(leaf.dtype)
            for i, leaf in enumerate(leaves)
        ],
    )


def dot(a, b):
    products = jax.tree.map(jnp.vdot, jax.tree.leaves(floats(a)), jax.tree.leaves(floats(b)))
    return jnp.stack(products).sum()


def assert_close(actual, expected, rtol=1e-5):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(np.abs(e).max(initial=0), 1e-30)
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * scale)


def whole(mixer, x, cache, **options):
    return mixer(x, cache, **options)


def in_steps(mixer, x, cache):
    def body(cache, sample):
        y, cache = mixer.step(sample, cache)
        return cache, y

    cache, y = jax.lax.scan(body, cache, x)
    return y, cache


@eqx.filter_jit
def pull(view, cotangent, mixer, x, cache=None, **options):
    """What `view` gives, and what its product with `cotangent` gives mixer, samples and cache."""

    def product(arguments):
        outcome = view(*arguments, **options)
        return dot(outcome, cotangent), outcome

    (_, outcome), gradients = eqx.filter_value_and_grad(product, has_aux=True)((mixer, x, cache))
    return outcome, gradients


def pull_pieces(cotangent, mixer, x, cache, cuts, fresh=()):
    """As `pull`, one piece after the other and back again by the chain rule.

    Pieces that begin at a time in `fresh` start from the empty cache.
    """
    dy, dcache = cotangent
    edges = list(itertools.pairwise((0, *cuts, len(x))))
    ys, before = [], []
    for start, end in edges:
        if start in fresh and cache is not None:
            cache = empty_cache(mixer)
        before.append(cache)
        (y, cache), _ = pull(whole, (dy[start:end], dcache), mixer, x[start:end], cache)
        ys.append(y)
    dmixer, dxs = zeros(mixer), []
    for (start, end), earlier in zip(reversed(edges), reversed(before), strict=True):
        arguments = (dy[start:end], dcache), mixer, x[start:end], earlier
        _, (dpiece, dx, dcache) = pull(whole, *arguments)
        dmixer = jax.tree.map(np.add, dmixer, dpiece)
        dxs.append(dx)
        if start in fresh:
            dcache = zeros(dcache)
    return (np.concatenate(ys), cache), (dmixer, np.concatenate(dxs[::-1]), dcache)


def at(batch, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], batch)


# Law 1


@pytest.mark.parametrize("view", ["chunks", "steps"])
@streaming_case
def test_whole_is_chunks_is_steps(case, view):
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        arguments = weights((x, cache)), mixer, x, cache
        pieces = pull_pieces(*arguments, CUTS) if view == "chunks" else pull(in_steps, *arguments)
        assert_close(pieces, pull(whole, *arguments), 1e-12)


@pytest.mark.parametrize("view", ["chunks", "steps"])
@streaming_case
def test_whole_is_chunks_is_steps_in_single_precision(case, view):
    mixer, x = make(case)
    expected = run(mixer, x, used_cache(case))
    cache, ys = used_cache(case), []
    for piece in np.split(x, CUTS) if view == "chunks" else x:
        y, cache = (run if view == "chunks" else step)(mixer, piece, cache)
        ys.append(np.atleast_2d(y))
    assert_close((np.concatenate(ys), cache), expected)


@streaming_case
def test_no_cache_is_the_allocated_cache(case):
    mixer, x = make(case)
    assert_close(run(mixer, x), run(mixer, x, mixer.allocate_inference_cache(max_seqlen=TIME)), 0)


@streaming_case
def test_batched_cache_is_for_vmap(case):
    mixer, x = make(case)
    batch = np.stack([x, 2 * x, -x])
    outcome = eqx.filter_vmap(run, in_axes=(None, 0, 0))(
        mixer, batch, mixer.allocate_inference_cache(batch_size=3, max_seqlen=TIME)
    )
    for i in range(3):
        assert_close(at(outcome, i), run(mixer, batch[i]))


# Law 3


@streaming_case
def test_causal(case):
    mixer, x = make(case)
    now = 6
    after = np.arange(TIME)[:, None] > now
    y, _ = run(mixer, x)
    moved, _ = run(mixer, x + 100 * after.astype(x.dtype))
    difference = np.abs(np.asarray(moved) - np.asarray(y))
    rounding = 1e-6 if case.rounds_the_past else 0.0
    assert difference[: now + 1].max() <= rounding * np.abs(moved).max()
    assert difference[now + 1 :].max(axis=1).min() > 0.1

    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        cotangent = np.where(after, 0, weights(x)), zeros(cache)
        past = np.asarray(pull(whole, cotangent, mixer, x, cache)[1][1])
    assert np.abs(past[now + 1 :]).max() <= rounding * np.abs(past).max()
    assert (past[: now + 1] != 0).all()


# Law 4


def padded(case, x, length):
    """Samples of which those from `length` on are NaN, options, and the options up to there."""
    options = {}
    if case.takes_timesteps:
        gaps = np.random.default_rng(3).uniform(size=TIME)
        options = {"integration_timesteps": gaps.astype(x.dtype)}
    cut = {name: value[:length] for name, value in options.items()}
    return np.where(np.arange(TIME)[:, None] < length, x, np.nan).astype(x.dtype), options, cut


@pytest.mark.parametrize("length", [0, 1, 5, TIME])
@every_case
def test_length_ends_the_sequence(case, length):
    mixer, x = make(case)
    cache = used_cache(case)
    with_nan, options, cut = padded(case, x, length)
    y, final = run(mixer, with_nan, cache, length=jnp.asarray(length), **options)
    if length == 0:
        assert_close(final, cache, 0)
        return
    assert_close((at(y, slice(length)), final), run(mixer, x[:length], cache, **cut))
    if case.streams and length == 5:  # a static length takes the same route or another
        assert_close(run(mixer, with_nan, cache, length=length, **options)[1], final)


@every_case
def test_length_ends_the_gradients(case):
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        dy, dcache = weights((x, cache))
        with_nan, options, cut = padded(case, x, 5)
        valid = np.arange(TIME)[:, None] < 5
        _, (dmixer, dx, dbefore) = pull(
            *(whole, (dy * valid, dcache), mixer, with_nan, cache), length=jnp.asarray(5), **options
        )
        expected = pull(whole, (dy[:5], dcache), mixer, x[:5], cache, **cut)[1]
        assert_close((dmixer, at(dx, slice(5)), dbefore), expected, 1e-12)


@every_case
def test_padded_batch_is_single_runs(case):
    mixer, _ = make(case)
    batch = draw(3, TIME, seed=1)
    lengths = [TIME, 5, 1]
    cache = empty_cache(mixer) if case.streams else None
    y, final = eqx.filter_jit(jax.vmap(lambda x, length: mixer(x, cache, length=length)))(
        batch, np.array(lengths, np.int32)
    )
    for i, length in enumerate(lengths):
        single = run(mixer, batch[i, :length], cache)
        assert_close((at(y, (i, slice(length))), at(final, i)), single)


@pytest.mark.parametrize("starts", [(0,), RESETS, (5, 6, 7, 12)], ids=str)
@every_case
def test_resets_are_separate_runs(case, starts):
    mixer, x = make(case)
    cache = used_cache(case)
    expected = run(mixer, x, cache, resets=np.isin(np.arange(TIME), starts))
    pieces = []
    for start, end in itertools.pairwise(sorted({0, *starts, TIME})):
        if start in starts and case.streams:
            cache = empty_cache(mixer)
        y, last = run(mixer, x[start:end], cache)
        pieces.append(y)
    assert_close((np.concatenate(pieces), last), expected)


@every_case
def test_resets_gradients(case):
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        cotangent = weights((x, cache))
        resets = np.isin(np.arange(TIME), RESETS)
        together = pull(whole, cotangent, mixer, x, cache, resets=resets)
        assert_close(together, pull_pieces(cotangent, mixer, x, cache, RESETS, RESETS), 1e-12)


@every_case
def test_nan_before_a_reset_does_not_leak(case):
    mixer, x = make(case)
    cache = empty_cache(mixer) if case.streams else None
    times = np.arange(TIME)
    with_nan = np.where(times[:, None] == 6, np.nan, x).astype(x.dtype)
    y, final = run(mixer, with_nan, cache, resets=times == 8)
    assert_close((at(y, slice(8, None)), final), run(mixer, x[8:], cache))


# Law 5


@every_case
def test_timesteps(case):
    mixer, x = make(case)
    ones = np.ones(TIME, x.dtype)
    if not case.takes_timesteps:
        with pytest.raises(ValueError, match="takes no integration timesteps"):
            mixer(x, integration_timesteps=ones)
        with pytest.raises(ValueError, match="takes no integration timesteps"):
            mixer.step(x[0], mixer.allocate_inference_cache(), integration_timestep=1.0)
        return
    cache = used_cache(case)
    plain = run(mixer, x, cache)
    assert_close(run(mixer, x, cache, integration_timesteps=ones), plain)
    gaps = np.asarray(jr.uniform(jr.key(2), (TIME,), maxval=3.0))
    y, final = at(run(mixer, x, cache, integration_timesteps=gaps), ...)
    assert np.abs(y - plain[0]).max() > 1e-2
    if case.streams:
        for t in range(TIME):
            y_t, cache = step(mixer, x[t], cache, integration_timestep=gaps[t])
            assert_close(y_t, y[t], 1e-4)
        assert_close(cache, final)


@each_case(lambda case: case.gap_is_zero_input)
def test_a_gap_is_zero_input(case):
    mixer, x = make(case)
    gaps = np.ones(TIME, x.dtype)
    gaps[4] = 3
    filled, final_filled = run(mixer, np.insert(x, [4, 4], 0, axis=0), used_cache(case))
    expected = np.delete(np.asarray(filled), [4, 5], axis=0), final_filled
    assert_close(run(mixer, x, used_cache(case), integration_timesteps=gaps), expected)


# Law 6


@each_case(lambda case: case.convolve is not None)
def test_scan_is_convolution(case):
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        convolution = lambda mixer, x, _: (case.convolve(mixer, x), None)
        expected, gradients = pull(convolution, (weights(x), None), mixer, x)
        cotangent = weights(x), zeros(cache)
        (y, _), (dmixer, dx, _) = pull(whole, cotangent, mixer, x, empty_cache(mixer))
        assert_close(((y, None), (dmixer, dx, None)), (expected, gradients), 1e-12)


# Law 7


@every_case
def test_jit_is_eager(case):
    mixer, x = make(case)
    assert_close(run(mixer, x), mixer(jnp.asarray(x)))
    if case.streams:
        sample, cache = jnp.asarray(x[0]), used_cache(case)
        assert_close(step(mixer, sample, cache), mixer.step(sample, cache))


@every_case
def test_vmap_is_a_loop(case):
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        batch, cotangent = draw(3, TIME, seed=5), weights((x, cache))
        loss = lambda mixer, x: dot(mixer(x, cache), cotangent)
        batched = eqx.filter_jit(
            eqx.filter_grad(lambda mixer: jnp.sum(jax.vmap(ft.partial(loss, mixer))(batch)))
        )(mixer)
        singles = [pull(whole, cotangent, mixer, x, cache)[1][0] for x in batch]
        assert_close(batched, jax.tree.map(lambda *leaves: sum(leaves), *singles), 1e-12)


@every_case
def test_checkpoint_and_scan(case):
    """The mixer twice, one after the other, against the chain rule written out."""
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        dy = weights(x)
        twice = lambda mixer, x: jax.lax.scan(
            lambda u, _: (jax.checkpoint(lambda v: mixer(v, cache)[0])(u), None), x, length=2
        )[0]
        gradients = eqx.filter_jit(eqx.filter_grad(lambda args: dot(twice(*args), dy)))((mixer, x))
        (y, _), _ = pull(whole, (dy, zeros(cache)), mixer, x, cache)
        _, (dsecond, dbetween, _) = pull(whole, (dy, zeros(cache)), mixer, y, cache)
        _, (dfirst, dx, _) = pull(whole, (dbetween, zeros(cache)), mixer, x, cache)
        assert_close(gradients, (jax.tree.map(np.add, dfirst, dsecond), dx), 1e-12)


@every_case
def test_second_order_in_reverse(case):
    """Of the product of cotangent and outcome, in all of its arguments, the cotangent among them."""
    with jax.enable_x64(True):
        mixer, x, cache = in_double(case)
        point, static = eqx.partition((weights((x, cache)), mixer, x, cache), eqx.is_inexact_array)

        def gradient(point):
            outcome, gradients = pull(whole, *eqx.combine(point, static))
            return floats(outcome), *gradients

        rng = np.random.default_rng(9)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)
        product = jax.jit(jax.grad(lambda point: dot(gradient(point), direction)))(point)
        eps = 1e-5
        ahead, behind = (
            gradient(jax.tree.map(lambda p, d, s=s: np.asarray(p) + s * eps * d, point, direction))
            for s in (1, -1)
        )
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), at(ahead, ...), at(behind, ...))
        assert_close(product, difference, 1e-6)


# Law 8


@every_case
def test_bfloat16_activations(case):
    mixer, x = make(case)
    low = jnp.asarray(x, jnp.bfloat16)

    @eqx.filter_jit
    def descend(mixer):
        def loss(mixer):
            y, final = mixer(low)
            return y.astype(jnp.float32).sum(), (y, final)

        gradient, outcome = eqx.filter_grad(loss, has_aux=True)(mixer)
        return outcome, eqx.apply_updates(mixer, gradient)

    (y, final), stepped = descend(mixer)
    expected, expected_final = run(mixer, np.asarray(low, x.dtype))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in parameters(final).values())
    assert_close(y, expected, 2e-2)
    assert_close(final, expected_final, 2e-2)
    for path, new in parameters(stepped).items():
        assert new.dtype == parameters(mixer)[path].dtype == jnp.float32
        assert np.isfinite(new).all()


# Law 9


@each_case(lambda case: case.transition_size is not None)
def test_stable_whatever_the_training(case):
    mixer, _ = make(case)
    transition_size = eqx.filter_jit(case.transition_size)
    assert transition_size(mixer).max() <= 1
    optimiser = optax.adam(0.3)

    @jax.jit
    def walk(params, noise):
        def body(carry, gradient):
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimiser.update(gradient, carry[1])
            return (carry[0] + updates, opt_state), None

        flat, unravel = jax.flatten_util.ravel_pytree(params)
        return unravel(jax.lax.scan(body, (flat, optimiser.init(flat)), noise)[0][0])

    params = floats(mixer)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    noise = np.random.default_rng(3).normal(size=(100, size)).astype(np.float32)
    moved = eqx.combine(walk(params, noise), mixer)
    for before, after in zip(*map(jax.tree.leaves, (params, floats(moved))), strict=True):
        assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0.1
    assert transition_size(moved).max() <= 1


@every_case
def test_long_sequences_stay_finite(case):
    mixer, _ = make(case)
    outcome = at(run(mixer, draw(case.longest, seed=4)), ...)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome))
    assert np.abs(outcome[0]).max() < 1e3


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
