"""Eigenvalues, impulse and frequency response, against sums written out and against the DFT."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, Leaky, assert_close

from discretax import resampled
from discretax.inspection import eigenvalues, frequency_response, impulse_response
from discretax.models import LRU
from discretax.sequence_mixers import (
    Bidirectional,
    BidirectionalS5,
    Centaurus,
    Discretized,
    LRUSequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
)

pytestmark = pytest.mark.slow

LENGTH = 256


def lru():
    return LRUSequenceMixer(FEATURES, jr.key(0), state_dim=3, r_min=0.3, r_max=0.8)


def s5(**options):
    options = {"state_dim": 6, "dt_min": 0.3, "dt_max": 1.0} | options
    return S5SequenceMixer(FEATURES, jr.key(1), **options)


def s4(make, **options):
    return make(FEATURES, jr.key(2), state_dim=4, dt_min=0.3, dt_max=1.0, **options)


# All decay to nothing within `LENGTH`.
MIXERS = {
    "LRU": lru,
    "S5": s5,
    "S5 without symmetry": lambda: s5(conj_sym=False, discretization="dirac"),
    "S5 resampled": lambda: resampled(s5(), 0.5),
    "S4D, two channels": lambda: s4(S4DSequenceMixer, channels=2),
    "S4": lambda: s4(S4SequenceMixer),
    "Centaurus": lambda: Centaurus(FEATURES, jr.key(3), dt_min=0.3, dt_max=1.0),
    "discretized": lambda: Discretized(lru()),
}
every_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS.keys())
# Compiled whole: alone, each of the many small operations takes longer.
built = lambda make: eqx.filter_jit(make)()
impulse_response_jit, frequency_response_jit = map(
    eqx.filter_jit, (impulse_response, frequency_response)
)
precisions = pytest.mark.parametrize(("x64", "rtol"), [(False, 1e-5), (True, 1e-12)])


@precisions
def test_eigenvalues_of_the_lru(x64, rtol):
    with jax.enable_x64(x64):
        mixer = lru()
        decay, phase = np.exp(np.asarray(mixer.nu_log)), np.exp(np.asarray(mixer.theta_log))
        assert_close(eigenvalues(mixer), np.exp(-decay + 1j * phase), rtol)


@precisions
def test_eigenvalues_of_s5(x64, rtol):
    with jax.enable_x64(x64):
        mixer = resampled(built(s5), 0.5)
        Lambda = np.asarray(mixer.Lambda_re) + 1j * np.asarray(mixer.Lambda_im)
        dt = np.exp(np.asarray(mixer.log_step)[:, 0])
        assert_close(eigenvalues(mixer), np.exp(2 * dt * Lambda), rtol)


@pytest.mark.parametrize("make", [lru, s5], ids=["LRU", "S5"])
@precisions
def test_impulse_response_is_the_sum_over_states(make, x64, rtol):
    with jax.enable_x64(x64):
        mixer = built(make)
        system = eqx.filter_jit(lambda mixer: mixer.discretize())(mixer)
        A_bar, B_bar, C = (np.asarray(part) for part in system)
        D = np.diag(np.asarray(system.D))
        expected = [(C * A_bar**lag @ B_bar).real + (lag == 0) * D for lag in range(20)]
        assert_close(impulse_response_jit(mixer, 20), np.stack(expected), rtol)


@every_mixer
@precisions
def test_frequency_response_is_the_transform_of_the_impulse_response(make, x64, rtol):
    with jax.enable_x64(x64):
        mixer = built(make)
        K = np.asarray(impulse_response_jit(mixer, LENGTH))
        assert np.abs(K[-1]).max() < 1e-12 * np.abs(K).max()
        expected = np.fft.fft(K, axis=0)
        frequencies = np.fft.fftfreq(LENGTH)  # positive and negative
        assert_close(frequency_response_jit(mixer, frequencies), expected, rtol)


def test_frequency_response_is_what_becomes_of_an_oscillation():
    with jax.enable_x64(True):
        mixer, frequency, amplitude = s5(), 0.07, np.array([1.0, -0.5, 2.0, 0.0])
        time = np.arange(400)
        y, _ = mixer(jnp.asarray(np.cos(2 * np.pi * frequency * time)[:, None] * amplitude))
        H = np.asarray(frequency_response(mixer, jnp.array(frequency)))  # any shape, none here
        lasting = (H @ amplitude * np.exp(2j * np.pi * frequency * time)[:, None]).real
        assert_close(y[300:], lasting[300:], 1e-10)


def test_output_and_input_are_not_mixed_up():
    mixer = s5()
    K = impulse_response(mixer, 5)
    x = jnp.zeros((5, FEATURES)).at[0, 1].set(2.0)
    assert_close(mixer(x)[0], 2 * np.asarray(K[:, :, 1]), 1e-6)


@pytest.mark.parametrize(
    ("make", "name", "within"),
    [
        (lambda: Leaky(FEATURES, jr.key(0)), "Leaky", ""),
        (
            lambda: Bidirectional(lru(), lru()),
            "Bidirectional",
            "; of this mixer, `mixer.forward` or `mixer.backward`",
        ),
        (
            lambda: BidirectionalS5(FEATURES, jr.key(0), state_dim=4),
            "BidirectionalS5",
            "; of this mixer, `mixer.forward`",
        ),
        (lambda: LRU(jr.key(0), hidden_dim=FEATURES, num_blocks=1, state_dim=3), "LRU", ""),
    ],
)
def test_what_is_not_time_invariant_is_refused(make, name, within):
    layer = make()
    remedy = (
        rf"time-invariant mixer.*got {name}\. "
        rf".*`model\.blocks\[0\]\.sequence_mixer`{re.escape(within)}\.$"
    )
    for look in (eigenvalues, lambda m: impulse_response(m, 5), lambda m: frequency_response(m, 0)):
        with pytest.raises(TypeError, match=remedy):
            look(layer)


def test_length_is_a_whole_number_from_one():
    with pytest.raises(ValueError, match=r"`length` must be .*got 0"):
        impulse_response(lru(), 0)
