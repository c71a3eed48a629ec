"""What packed sequences leave behind is what separate runs leave."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import CASES
from helpers import assert_close, assert_equal, draw, lru, numbers

from discretax.sequence_mixers import Bidirectional, LRUSequenceMixer, states_at_resets

TIME, LENGTH = 13, 11
SPANS = ((0, 3), (3, 7), (7, 8), (8, LENGTH))  # chunks end at 4 and 8
RESETS = jnp.isin(jnp.arange(TIME), jnp.array([3, 7, 8, 12]))

# One for each kind of cache.
NAMES = (
    "S4DSequenceMixer.fft",
    "MambaSequenceMixer.event",
    "MLSTMSequenceMixer",
    "Mamba3SequenceMixer",
    "AttentionSequenceMixer",
    "AttentionSequenceMixer.window",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_they_are_those_of_separate_runs(name):
    case = next(case for case in CASES if str(case) == name)
    mixer = case.make(jr.key(0))
    x = draw(TIME, mixer.in_features)
    gaps = jnp.abs(draw(TIME, seed=2)) if case.options.get("takes_timesteps") else None

    @eqx.filter_jit
    def alone(mixer, x, gaps, length, cache):
        return mixer(x, cache, integration_timesteps=gaps, length=length)

    empty = mixer.allocate_inference_cache(max_seqlen=TIME)
    _, before = alone(mixer, draw(TIME, mixer.in_features, seed=3), gaps, jnp.asarray(2), empty)
    runs = []
    for start, end in SPANS:
        moved = [None if array is None else jnp.roll(array, -start, 0) for array in (x, gaps)]
        y, cache = alone(mixer, *moved, jnp.asarray(end - start), empty if start else before)
        runs.append((y[: end - start], cache))
    ys, caches = zip(*runs, strict=True)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches, caches[-1])

    options = {"integration_timesteps": gaps, "length": LENGTH, "num_sequences": 5}
    y, caches = states_at_resets(mixer, x, RESETS, before, chunk_size=4, **options)
    assert_close((y[:LENGTH], caches), (jnp.concatenate(ys), expected))


def lru_state(mixer, x):
    """From the last sample to the first: each is one power of lambda further away."""
    eigenvalues = np.exp(-np.exp(numbers(mixer.nu_log)) + 1j * np.exp(numbers(mixer.theta_log)))
    B = numbers(mixer.B_re) + 1j * numbers(mixer.B_im)
    drive = np.exp(numbers(mixer.gamma_log)) * (numbers(x) @ B.T)
    h = sum(eigenvalues ** (len(x) - 1 - t) * u for t, u in enumerate(drive))
    return np.stack([h.real, h.imag])


def test_as_many_as_there_are():
    mixer, x = LRUSequenceMixer(4, jr.key(0), state_dim=3), draw(6, 4)
    resets = jnp.arange(6) == 4
    whole = states_at_resets(mixer, x, resets)
    pieces = x[:4], x[4:]
    y = np.concatenate([lru(mixer, piece) for piece in pieces])
    assert_close(whole, (y, np.stack([lru_state(mixer, piece) for piece in pieces])))
    assert_equal(states_at_resets(mixer, x, list(map(bool, resets))), whole)
    # Under `jax.jit` room is asked for, and too little of it does not pass unseen.
    jitted = eqx.filter_jit(states_at_resets)
    y, caches = jitted(mixer, x, resets, num_sequences=1)
    assert_close(y, whole[0])
    assert jnp.isnan(caches).all()
    assert_close(jitted(mixer, x, resets, num_sequences=2), whole)
    with pytest.raises(ValueError, match=r"`num_sequences` must be given .*under `jax.jit`"):
        jitted(mixer, x, resets)
    with pytest.raises(ValueError, match=r"`num_sequences` must be at least the 2 .*; got 1"):
        states_at_resets(mixer, x, resets, num_sequences=1)


def test_no_samples():
    mixer = LRUSequenceMixer(4, jr.key(0), state_dim=3)
    before = jnp.ones((2, 3))
    y, caches = states_at_resets(mixer, jnp.ones((0, 4)), jnp.zeros(0, bool), before)
    assert y.shape == (0, 4)
    assert_equal(caches, before[None])
    _, caches = states_at_resets(mixer, jnp.ones((2, 4)), jnp.ones(2, bool), before, length=0)
    assert_equal(caches, before[None])


def test_what_does_not_fit_is_refused():
    mixer, x = LRUSequenceMixer(4, jr.key(0), state_dim=3), jnp.ones((6, 4))
    resets = jnp.zeros(6, bool)
    both = Bidirectional(4, forward=LRUSequenceMixer, key=jr.key(0))
    refusals = [
        (lambda: states_at_resets(mixer, x, resets[1:]), r"shape \(6,\); got bool\(5,\)"),
        (lambda: states_at_resets(mixer, x, resets, chunk_size=0), "`chunk_size` .*; got 0"),
        (lambda: states_at_resets(mixer, x, resets, num_sequences=0), "`num_sequences` .*; got 0"),
        (lambda: states_at_resets(mixer, x, resets, length=7), "between 0 and .*6; got 7"),
        (lambda: states_at_resets(both, x, resets), "cannot stream"),
    ]
    for attempt, message in refusals:
        with pytest.raises(ValueError, match=message):
            attempt()
