"""`check_streaming` finds what it is made to find: for each of its laws a model that breaks it."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import FEATURES, TIME, draw

from discretax import AbstractStreamingLayer, Timeseries
from discretax.models import Backbone
from discretax.sequence_mixers import Bidirectional, LRUSequenceMixer
from discretax.testing import check_streaming
from discretax.testing._streaming import LAWS

pytestmark = pytest.mark.slow

made = itertools.count(1)


class RunningSum(AbstractStreamingLayer):
    """Of the samples since the last reset, at each of them, or at the last of them alone."""

    fault: str = eqx.field(static=True)
    reduce: bool = eqx.field(static=True)

    def __init__(self, fault="", reduce=False):
        self.fault = fault
        self.reduce = reduce

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        batch = () if batch_size is None or self.fault == "forgets the batch" else (batch_size,)
        begin = next(made) if self.fault == "begins anywhere" else 0
        return jnp.full((*batch, FEATURES), begin, dtype or float)

    def __call__(self, x, state, key=None):
        x = x if isinstance(x, Timeseries) else Timeseries(x)
        time = jnp.arange(len(x.values))
        valid = time < (len(time) if x.length is None else x.length)
        resets = jnp.zeros(len(time), bool) if x.resets is None else x.resets & valid
        u = jnp.where(valid[:, None] | (self.fault == "padding in the cache"), x.values, 0)
        first = self.read_cache(state)

        def add(total, inputs):
            u, reset = inputs
            if self.fault == "multiplied by zero":
                total = total * jnp.where(reset, 0, 1)
            elif self.fault != "resets ignored":
                total = jnp.where(reset, 0, total)
            return total + u, total + u

        last, y = jax.lax.scan(add, first, (u, resets))
        if self.fault == "padding in the output":
            y = y + len(time)
        if self.fault == "wrong for one sample" and len(time) == 1:
            y = y + 1
        if self.fault != "forgets":
            state = self.write_cache(state, last)
        return (last if self.reduce else y), state


def streamed(fault, reduce=False, x=None):
    layer, state = eqx.nn.make_with_state(RunningSum)(fault, reduce)
    check_streaming(layer, state, draw(TIME, FEATURES) if x is None else x)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("time", [5, 8])
def test_what_streams_passes(reduce, time):
    streamed("", reduce, draw(time, FEATURES))


def test_timesteps_are_handed_on():
    class NeedsTimesteps(RunningSum):
        def __call__(self, x, state, key=None):
            assert x.timesteps.shape == x.values.shape[:1]
            return super().__call__(x, state, key)

    layer, state = eqx.nn.make_with_state(NeedsTimesteps)()
    check_streaming(layer, state, Timeseries(draw(TIME, FEATURES), timesteps=jnp.ones(TIME)))


NUMBERS = r".*, against .*:\n +{} .*, not .*\n +difference .*, allowed"
OUTPUT, ANSWER = NUMBERS.format(r"output at time \d+, feature \d:"), NUMBERS.format("answers at")
CACHE = r".*\n +caches.model at"
BROKEN = [
    ("chunks_are_the_whole", "forgets", False, OUTPUT),
    ("chunks_are_the_whole", "forgets", True, ANSWER),
    ("steps_are_the_whole", "wrong for one sample", False, OUTPUT),
    ("padded_chunks_are_the_whole", "padding in the cache", False, f"{OUTPUT}{CACHE}"),
    ("padding_is_without_effect", "padding in the output", False, OUTPUT),
    ("resets_are_separate_runs", "resets ignored", False, OUTPUT),
    ("resets_of_a_stream_are_separate_runs", "resets ignored", True, ANSWER),
    ("nan_before_a_reset_does_not_leak", "multiplied by zero", False, OUTPUT),
    ("streams_side_by_side_are_streams_alone", "forgets the batch", False, "ValueError: vmap"),
    ("inference_state_starts_over", "begins anywhere", False, NUMBERS.format("model at")),
]


@pytest.mark.parametrize("law, fault, reduce, found", BROKEN)
def test_a_fault_is_found_and_shown(law, fault, reduce, found):
    with pytest.raises(AssertionError, match=rf"of 9 laws broken\n(?:.|\n)*{law}: .*\n +{found}"):
        streamed(fault, reduce)


def test_every_law_is_broken_once():
    assert {law for law, *_ in BROKEN} == {law.name for law in LAWS}


@pytest.mark.parametrize(
    "x, message",
    [
        (Timeseries(draw(TIME, FEATURES), length=3), "with a length or resets"),
        (Timeseries(draw(TIME, FEATURES), resets=jnp.zeros(TIME, bool)), "with a length or resets"),
        (draw(4, FEATURES), "at least 5 samples; got 4"),
    ],
)
def test_samples_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        streamed("", x=x)


def test_what_cannot_stream_says_so():
    def both(in_features, *, key):
        return Bidirectional(*(LRUSequenceMixer(in_features, k) for k in jr.split(key)))

    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=FEATURES, sequence_mixer=both, num_blocks=1, norm=None
    )
    with pytest.raises(ValueError, match="`Bidirectional` cannot stream"):
        check_streaming(model, state, draw(TIME, FEATURES))
