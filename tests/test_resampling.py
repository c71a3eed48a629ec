"""A model at another sampling rate: against the differential equation that it has learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Leaky, assert_close, assert_equal, draw

from discretax import discretized, inference_state, resampled, streaming_mode
from discretax.models import LRU, S5
from discretax.sequence_mixers import (
    Bidirectional,
    BidirectionalS5,
    Discretized,
    LRUSequenceMixer,
    S5SequenceMixer,
)

pytestmark = pytest.mark.slow

TIME = 12
FREQUENCIES = np.array([0.02, 0.05, 0.11])  # cycles per sample of training


def s5(seed=0, features=2, **options):
    options = {"state_dim": 4, "dt_min": 0.1, "dt_max": 0.3} | options
    return S5SequenceMixer(features, jr.key(seed), **options)


def signal(time):
    """Two features, each a sum of sinusoids in continuous time."""
    phase = 2 * np.pi * FREQUENCIES * time[:, None]
    return np.stack([np.sin(phase) @ [1.0, 0.5, 0.25], np.cos(phase) @ [0.3, -1.0, 0.5]], axis=-1)


def exact(mixer, time):
    """The solution of h' = Lambda Delta h + Delta B x, h(0) = 0, for this signal.

    Each e^{i w t} in x adds (e^{i w t} - e^{Lambda Delta t}) / (i w - Lambda Delta) to h.
    """
    dt = np.exp(np.asarray(mixer.log_step)[:, 0])
    rates = dt * (np.asarray(mixer.Lambda_re) + 1j * np.asarray(mixer.Lambda_im))
    B, C = (np.asarray(p[..., 0]) + 1j * np.asarray(p[..., 1]) for p in (mixer.B, mixer.C))
    sines, cosines = np.array([1.0, 0.5, 0.25]), np.array([0.3, -1.0, 0.5])
    h = 0
    for frequency, sine, cosine in zip(FREQUENCIES, sines, cosines, strict=True):
        for sign in (1, -1):
            w = sign * 2 * np.pi * frequency
            amplitude = np.array([sine * sign / 2j, cosine / 2])
            response = (np.exp(1j * w * time)[:, None] - np.exp(np.outer(time, rates))) / (
                1j * w - rates
            )
            h = h + response * (dt * (B @ amplitude))
    return 2 * (h @ C.T).real + np.asarray(mixer.D) * signal(time)


def error_bound(mixer, rate):
    """Of the output, where the input is held for 1 / rate in place of moving on at most that long.

    |h error| <= Delta |B| |x held - x| / |Re Lambda Delta|, with |x held - x| <= max|x'| / rate.
    """
    B, C = (np.hypot(p[..., 0], p[..., 1]) for p in (mixer.B, mixer.C))
    slope = 2 * np.pi * np.array([FREQUENCIES @ [1.0, 0.5, 0.25], FREQUENCIES @ [0.3, 1.0, 0.5]])
    return 2 * C @ ((B @ slope) / np.abs(mixer.Lambda_re)) / rate


def at_coarse_times(mixer, rate):
    """Outputs at times 1, 2, ..., from `rate` samples per unit of time."""
    fine = np.arange(1, 40 * rate + 1) / rate
    return mixer(jnp.asarray(signal(fine)))[0][rate - 1 :: rate]


def test_a_known_signal_at_other_rates():
    with jax.enable_x64(True):
        mixer = s5()
        expected = exact(mixer, np.arange(1, 41))
        errors = {}
        for rate in (1, 2, 4, 8):
            y = at_coarse_times(resampled(mixer, rate), rate)
            assert (np.abs(y - expected).max(0) <= error_bound(mixer, rate)).all()
            errors[rate] = np.abs(y - expected).max()
        # A held input is a method of first order.
        for rate in (1, 2, 4):
            assert 1.8 < errors[rate] / errors[2 * rate] < 2.2
        as_trained = np.abs(at_coarse_times(mixer, 2) - expected).max()
        assert as_trained > 5 * errors[2]


@pytest.mark.parametrize("rate", [2, 3])
@pytest.mark.parametrize("x64", [False, True])
def test_exact_for_an_input_that_is_constant_between_samples(x64, rate):
    with jax.enable_x64(x64):
        mixer, x = s5(), draw(TIME, 2)
        y, cache = mixer(x)
        y_fine, cache_fine = resampled(mixer, rate)(jnp.repeat(x, rate, axis=0))
        rtol = 1e-12 if x64 else 1e-5
        assert_close((y_fine[rate - 1 :: rate], cache_fine), (y, cache), rtol)
        assert np.abs(mixer(jnp.repeat(x, rate, axis=0))[0][rate - 1 :: rate] - y).max() > 0.1


def model(**options):
    options = {"hidden_dim": 2, "num_blocks": 1, "state_dim": 4, "dt_min": 0.1} | options
    return eqx.nn.make_with_state(S5)(jr.key(0), **options)


def test_a_model_and_its_stream():
    """One block: what its S5 is given is constant between samples where the input is."""
    layers, state = model(norm="layer")
    layers, x = eqx.nn.inference_mode(layers), draw(TIME, 2)
    expected, _ = layers(x, state)
    fine = resampled(layers, 2)
    twice = jnp.repeat(x, 2, axis=0)
    assert_close(fine(twice, state)[0][1::2], expected)
    live, stream = streaming_mode(discretized(fine)), inference_state(fine, state)
    first, stream = live(twice[:7], stream)
    second, _ = live(twice[7:], stream)
    assert_close(jnp.concatenate([first, second])[1::2], expected)


def test_it_composes_and_touches_nothing_else():
    layers, _ = model(num_blocks=2, step_rescale=3.0)
    half = resampled(layers, 0.5)
    assert [block.sequence_mixer.step_rescale for block in half.blocks] == [6.0, 6.0]
    assert eqx.tree_equal(resampled(half, 2), layers)
    assert_equal(eqx.filter(half, eqx.is_array), eqx.filter(layers, eqx.is_array))
    assert isinstance(resampled(s5(), np.float64(0.5)).step_rescale, float)
    nested = resampled({"one": (s5(), s5(1)), "two": jnp.ones(3)}, 4)
    assert [mixer.step_rescale for mixer in nested["one"]] == [0.25, 0.25]


def test_wrappers_are_resampled_within():
    both = Bidirectional(s5(0), s5(1))
    x = draw(TIME, 2)
    expected = Bidirectional(resampled(both.forward, 2), resampled(both.backward, 2))
    assert_equal(resampled(both, 2)(x), expected(x))
    shared = resampled(BidirectionalS5(2, jr.key(0), state_dim=4), 2)
    assert shared.forward.step_rescale == 0.5
    layers, _ = model(bidirectional=True)
    assert resampled(layers, 2).blocks[0].sequence_mixer.forward.step_rescale == 0.5
    within = Bidirectional(both, Bidirectional(s5(2), s5(3)))
    assert resampled(within, 2).backward.forward.step_rescale == 0.5


def test_a_model_without_recurrence_has_no_rate():
    layer = eqx.nn.Linear(2, 2, key=jr.key(0))
    assert eqx.tree_equal(resampled(layer, 2), layer)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_rates_that_are_refused(rate):
    with pytest.raises(ValueError, match=f"`rate`.*must be positive; got {rate}"):
        resampled(s5(), rate)


def discrete():
    return s5(discretization="no_discretization")


def lru():
    return LRUSequenceMixer(2, jr.key(0), state_dim=3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lru, "`LRUSequenceMixer` has no continuous time"),
        (lambda: LRU(jr.key(0), hidden_dim=2, num_blocks=1), "`LRUSequenceMixer` has no"),
        (lambda: Leaky(2, jr.key(0)), "`Leaky` has no continuous time"),
        (discrete, r"S5SequenceMixer\(discretization=\"no_discretization\"\)` has no continuous"),
        (lambda: Bidirectional(s5(), discrete()), "no_discretization"),
        (lambda: [s5(), Bidirectional(s5(), lru())], "`LRUSequenceMixer` has no"),
        (
            lambda: Discretized(s5()),
            r"discretized: .*`S5SequenceMixer`.*`discretized\(resampled\(model, rate\)\)`",
        ),
        (lambda: discretized(model()[0]), "Resample first"),
    ],
)
def test_models_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        resampled(make(), 2)
