"""The laws find what they are made to find: for each of them a mixer that breaks it."""

import functools
import inspect
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import FEATURES, Leaky

from discretax.sequence_mixers import AbstractSequenceMixer, refuse_timesteps, refuse_to_stream
from discretax.testing import check_mixer, mixer_laws
from discretax.testing._check import LAWS

pytestmark = pytest.mark.slow

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"

make = lambda key: Leaky(FEATURES, key)


class Altered(AbstractSequenceMixer[Any]):
    """`Leaky`, of which one method does something else."""

    mixer: Leaky
    extra: Any = None
    called: Callable = eqx.field(
        default=lambda mixer, x, cache, **o: mixer(x, cache, **o), static=True
    )
    stepped: Callable = eqx.field(
        default=lambda mixer, x, cache, **o: mixer.step(x, cache, **o), static=True
    )
    allocated: Callable = eqx.field(
        default=lambda mixer, *sizes: mixer.allocate_inference_cache(*sizes), static=True
    )
    in_features: int = eqx.field(default=FEATURES, static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return self.allocated(self.mixer, batch_size, max_seqlen, dtype)

    def __call__(self, x, cache=None, *, key=None, **options):
        return self.called(self.mixer, x, cache, **options)

    def step(self, x, cache, **options):
        return self.stepped(self.mixer, x, cache, **options)


def altered(**methods):
    return lambda key: Altered(make(key), **methods)


def output(change):
    """The output, changed by a function of it, of the samples and of the rate."""

    def called(mixer, x, cache, **options):
        y, cache = mixer(x, cache, **options)
        return change(y, x, mixer.rate[None]), cache

    return altered(called=called)


def but(**replaced):
    """The call with these options, whatever they should have been."""
    return altered(
        called=lambda mixer, x, cache, **options: mixer(x, cache, **{**options, **replaced})
    )


def shifted(shift):
    return output(lambda y, x, rate: y + shift)


def step_off_by(factor):
    def stepped(mixer, x, cache, **options):
        y, cache = mixer.step(x, cache, **options)
        return y * factor, cache

    return altered(stepped=stepped)


def gradient_alone(f):
    return f - jax.lax.stop_gradient(f)


def unlike_a_zero_cache(mixer, x, cache, **options):
    y, after = mixer(x, cache, **options)
    return (y + 1 if cache is None else y), after


def forgets_the_batch(mixer, batch_size, max_seqlen, dtype):
    return mixer.allocate_inference_cache(None, max_seqlen, dtype)


def refused_timesteps(mixer, x, cache, integration_timesteps=None, **options):
    refuse_timesteps(mixer, integration_timesteps, "it has none")
    return mixer(x, cache, **options)


def coarse_timesteps(mixer, x, cache, integration_timesteps=None, **options):
    if integration_timesteps is not None:
        integration_timesteps = jnp.sqrt(integration_timesteps)
    return mixer(x, cache, integration_timesteps=integration_timesteps, **options)


def later_timesteps(mixer, x, cache, integration_timesteps=None, resets=None, **options):
    if integration_timesteps is not None and resets is not None:
        integration_timesteps = jnp.roll(integration_timesteps, 1)
    options = {"integration_timesteps": integration_timesteps, "resets": resets, **options}
    return mixer(x, cache, **options)


def gradient_of_padding(mixer, x, cache, length=None, **options):
    y, cache = mixer(x, cache, length=length, **options)
    valid = jnp.arange(len(x))[:, None] < (len(x) if length is None else length)
    return y + jnp.where(valid, mixer.rate[None] * x, 0), cache


def whole_number(mixer, x, cache, length=None, **options):
    return mixer(x, cache, length=None if length is None else int(length), **options)


def checks_nothing(mixer, x, cache, **options):
    return x, cache


def batched_otherwise(y, x, rate):
    @jax.custom_batching.custom_vmap
    def factor(number):
        return number * 0 + 1

    @factor.def_vmap
    def _(size, batched, number):
        return number * 0 + 2, True

    return y * jax.lax.stop_gradient(factor(jax.lax.stop_gradient(y[0, 0])))


def grows_with_x64(mixer, x, cache, **options):
    y, after = mixer(x, cache, **options)
    widen = lambda leaf: leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf
    return y, jax.tree.map(widen, after)


def untrained_if_narrow(y, x, rate):
    rate = jax.lax.stop_gradient(rate) if rate.dtype == jnp.bfloat16 else rate
    return y * rate.astype(y.dtype)


@jax.custom_vjp
def once_differentiable(y):
    return y**2


once_differentiable.defvjp(lambda y: (y**2, y), lambda y, dy: (2 * jax.lax.stop_gradient(y) * dy,))
calls = itertools.count(1)


def same_array_twice(key):
    mixer = make(key)
    return Altered(mixer, extra=mixer.rate)


NO_STREAM = {
    "allocated": lambda mixer, *sizes: refuse_to_stream(mixer),
    "stepped": lambda mixer, *arguments: refuse_to_stream(mixer),
}

# Law, a mixer that breaks it, the options, and what the report says.
BROKEN = [
    (
        "whole_is_chunks_is_steps-chunks",
        output(lambda y, x, rate: y + x.mean(axis=0, keepdims=True)),
        {},
        r"chunks, against the whole:\n +outcome.output at time \d+, feature \d: .*, not .*\n"
        r" +difference .*, allowed .*; first at time 0",
    ),
    (
        "whole_is_chunks_is_steps-steps",
        step_off_by(1.001),
        {},
        r"steps, against the whole:\n +outcome.output at time",
    ),
    (
        "whole_is_chunks_is_steps_in_single_precision-steps",
        step_off_by(1.001),
        {},
        r"steps, against the whole:\n +output at time",
    ),
    ("no_cache_is_the_allocated_cache", altered(called=unlike_a_zero_cache), {}, "output at time"),
    (
        "batched_cache_is_for_vmap",
        altered(allocated=forgets_the_batch),
        {},
        r"with batch_size=3, a cache of shapes .*\(3, 4\).* is due; got .*\(4,\)",
    ),
    (
        "causal",
        output(lambda y, x, rate: y + jnp.roll(x, -1, axis=0)),
        {},
        "samples after time 6 moves the output at time 6 by 100; allowed 0",
    ),
    (
        "causal",
        output(lambda y, x, rate: y + gradient_alone(jnp.roll(x, -1, axis=0))),
        {},
        "have a gradient in the sample at time 7: ",
    ),
    (
        "length_ends_the_sequence-5",
        but(length=None),
        {},
        r"length 5 of 13 samples, against those 5 alone:\n +cache.count: 18, not 10",
    ),
    (
        "length_ends_the_gradients",
        altered(called=gradient_of_padding),
        {},
        "mixer.mixer.rate at .*nan",
    ),
    (
        "padded_batch_is_single_runs",
        altered(called=whole_number),
        {},
        r"ConcretizationTypeError: .*\n.*raised by mixer\(float32\(13, 4\), cache, length=int32\(\)\), traced",
    ),
    ("resets_are_separate_runs-(0,)", but(resets=None), {}, r"output at .*\n.*first at time 0"),
    (
        "resets_begin_with_their_own_timestep",
        altered(called=later_timesteps),
        {"takes_timesteps": True},
        r"each piece alone, against the whole with resets at \(1, 2, 7, 8\):\n +output",
    ),
    ("resets_gradients", but(resets=None), {}, "gradients.samples at time"),
    (
        "nan_before_a_reset_does_not_leak",
        output(lambda y, x, rate: y + 0 * jnp.cumsum(x, axis=0)),
        {},
        "output at time 0, feature 0: nan, not",
    ),
    (
        "nan_before_a_reset_does_not_leak",
        output(lambda y, x, rate: y + 0 * rate * x),
        {},
        "gradients of what follows a NaN at 6 and a reset at 8, .*\n.*rate at .*nan",
    ),
    (
        "a_broken_sample_is_causal-nan",
        output(lambda y, x, rate: y + 0 * jnp.roll(x, -1, axis=0)),
        {},
        "output at time 5, feature 0: nan, not",
    ),
    (
        "a_broken_sample_is_causal-inf",
        output(lambda y, x, rate: y + 0 * rate * x),
        {},
        "gradients of what is before a sample of inf, .*\n.*rate at .*nan",
    ),
    (
        "a_broken_sample_is_causal-nan",
        altered(called=lambda mixer, x, cache, **o: mixer(jnp.nan_to_num(x), cache, **o)),
        {},
        "a sample of nan at time 6 gives an output that is finite",
    ),
    (
        "a_broken_sample_in_pieces-steps",
        altered(stepped=lambda mixer, x, cache: mixer.step(jnp.nan_to_num(x), cache)),
        {},
        r"a sample of nan at time 2: in steps and in the whole, .* at time \[2\]",
    ),
    (
        "timesteps",
        but(integration_timesteps=None),
        {"takes_timesteps": True},
        r"timesteps in \[0, 3\) change outputs by 0; 0.01 is due",
    ),
    (
        "timesteps_are_refused",
        but(integration_timesteps=None),
        {},
        "timesteps in a call: a ValueError that says 'timesteps' is due; it was accepted",
    ),
    (
        "timesteps_are_refused",
        altered(called=refused_timesteps, stepped=checks_nothing),
        {},
        "a timestep in a step",
    ),
    (
        "a_gap_is_zero_input",
        altered(called=coarse_timesteps),
        {"takes_timesteps": True, "gap_is_zero_input": True},
        "a gap of 3 before time 4, against two samples of zero there:\n.*\n.*first at time 4",
    ),
    (
        "equals_its_reference",
        make,
        {"reference": lambda mixer, x: x},
        "the mixer, against its reference:",
    ),
    (
        "jit_is_eager",
        output(lambda y, x, rate: y if isinstance(y, jax.core.Tracer) else y + 1),
        {},
        "a call under jit, against without:",
    ),
    ("vmap_is_a_loop", output(batched_otherwise), {}, "the gradient of a batch"),
    (
        "checkpoint_and_scan",
        output(lambda y, x, rate: y * next(calls)),
        {},
        r"against the chain rule:\n +mixer.mixer.rate at \[\d\]: .*, not ",
    ),
    (
        "second_order_in_reverse",
        output(lambda y, x, rate: once_differentiable(y)),
        {},
        "the gradient of the gradient, against the difference of gradients:",
    ),
    (
        "bfloat16_activations",
        output(lambda y, x, rate: y.astype(jnp.float32)),
        {},
        r"mixer\(bfloat16\(13, 4\)\) gives back an output of the kind of the samples; got float32",
    ),
    (
        "narrow_parameters-float16",
        output(lambda y, x, rate: y * jnp.exp(rate).astype(y.dtype)),
        {"longest": 100},
        "parameters in float16, against the same numbers in float32:",
    ),
    (
        "gradients_of_narrow_parameters",
        output(untrained_if_narrow),
        {},
        r"parameters in bfloat16, against .*:\n +mixer.mixer.rate at",
    ),
    (
        "a_stream_goes_on_with_x64",
        altered(called=grows_with_x64),
        {},
        r"gives back a cache of the kind that it was given, .*float32\(4,\).*; got .*float64\(4,\)",
    ),
    (
        "a_stream_goes_on_with_x64",
        output(lambda y, x, rate: y * jnp.zeros(()).dtype.itemsize),
        {},
        "a sample with x64, against without:",
    ),
    (
        "stable_whatever_the_training",
        make,
        {"transition_size": lambda mixer: jnp.exp(-mixer.rate)},
        "the largest transition is .* after training",
    ),
    (
        "long_sequences_stay_finite",
        output(lambda y, x, rate: y * 1.1 ** jnp.arange(len(x), dtype=y.dtype)[:, None]),
        {"longest": 100},
        "an output of .* in 100 samples",
    ),
    (
        "serialise_and_deserialise",
        lambda key: shifted(float(jr.uniform(key)))(key),
        {},
        "read again, against the one saved:",
    ),
    (
        "one_key_one_mixer",
        lambda key: Altered(make(key), extra=jnp.zeros(2)),
        {},
        "mixer.extra has numbers that two keys share",
    ),
    ("one_key_one_mixer", make, {"not_drawn": ["rate"]}, "mixer.rate of `not_drawn` is drawn"),
    (
        "no_array_stands_twice",
        same_array_twice,
        {},
        "mixer.extra and mixer.mixer.rate are one array",
    ),
    (
        "no_type_is_weak",
        lambda key: Altered(make(key), extra=jnp.full(3, 0.5)),
        {},
        "mixer.extra is of a weak type",
    ),
    (
        "unfit_input_is_refused-a batch",
        altered(called=checks_nothing),
        {},
        r"mixer\(float32\(2, 13, 4\)\): a ValueError that says '\(2, 13, 4\)' is due; it was accepted",
    ),
    (
        "unfit_input_is_refused-too wide",
        altered(called=lambda mixer, x, cache: (x @ jnp.eye(FEATURES), cache)),
        {},
        r"mixer\(float32\(13, 5\)\): a ValueError .* is due; got TypeError",
    ),
    (
        "unfit_cache_is_refused",
        altered(called=checks_nothing),
        {},
        r"mixer\(x, batched cache\): .* it was accepted",
    ),
    (
        "what_cannot_stream_says_so",
        make,
        {"streams": False},
        r"allocate_inference_cache\(\): a ValueError that says 'stream' is due; it was accepted",
    ),
    (
        "what_cannot_stream_says_so",
        altered(
            **NO_STREAM,
            called=lambda mixer, x, cache: mixer(x) if cache is None else refuse_to_stream(mixer),
        ),
        {"streams": False},
        "without streams, a call gives back None for a cache; got",
    ),
]


def law(name, make, **options):
    (found,) = (law for law in mixer_laws(make, **options) if law.name == name)
    return found


@pytest.mark.parametrize(("name", "make", "options", "report"), BROKEN)
def test_broken_laws_are_found(name, make, options, report):
    broken = law(name, make, **options)
    with pytest.raises(AssertionError, match=report) as caught:
        broken()
    assert str(caught.value).startswith(f"{name}: {broken.states}\n")


def test_every_law_is_broken_by_a_mixer_here():
    assert {name.partition("-")[0] for name, *_ in BROKEN} == {law.name for law in LAWS}


def test_all_broken_laws_are_reported():
    without = {law.name for law in LAWS} - {"no_array_stands_twice", "unfit_input_is_refused"}
    with pytest.raises(AssertionError) as caught:
        check_mixer(altered(called=checks_nothing), without=without)
    first, *reports = str(caught.value).split("\n\n")
    assert first == f"{len(reports)} of 13 laws broken"
    assert len(reports) == 12
    assert all(report.startswith("unfit_input_is_refused-") for report in reports)
    check_mixer(make, without=without)


def test_one_set_of_options():
    options = [inspect.signature(function).parameters for function in (check_mixer, mixer_laws)]
    assert options[0] == options[1]


def test_what_is_no_maker_of_mixers():
    with pytest.raises(
        TypeError, match=r"`make` is a function of a key .*; got an instance of Leaky"
    ):
        check_mixer(make(jr.key(0)))
    with pytest.raises(TypeError, match="`make` must give an `AbstractSequenceMixer`; got Linear"):
        check_mixer(lambda key: eqx.nn.Linear(2, 2, key=key))
    with pytest.raises(ValueError, match=r"`without` names laws, whole_is.*; got casual"):
        check_mixer(make, without=["casual"])


def in_the_docs(as_written="", instead=""):
    """How to make the page's own mixer, with or without a mistake."""
    code = re.search(r"```python\n(import .*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert as_written in code
    namespace = {"__name__": "docs"}
    exec(code.replace(as_written, instead), namespace)
    return functools.partial(namespace["MovingAverage"], 3)


def test_the_report_in_the_docs():
    with pytest.raises(AssertionError) as caught:
        law(
            "length_ends_the_sequence-5", in_the_docs("len(x) if length is None else length", "-1")
        )()
    number = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")
    shown = re.search(r"```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)[1]
    found = str(caught.value)
    assert number.sub("#", found) == number.sub("#", shown)
    numbers = [[float(n) for n in number.findall(text)] for text in (found, shown)]
    np.testing.assert_allclose(*numbers, rtol=1e-3)


@pytest.mark.parametrize("name", ["whole_is_chunks_is_steps-steps", "bfloat16_activations"])
def test_the_mixer_in_the_docs_under_strict_promotion(name):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    law(name, in_the_docs())()
