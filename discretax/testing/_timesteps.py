"""5. Gaps between samples. 6. Another way to compute the same."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from discretax.testing._compare import at, refuses, require, same
from discretax.testing._law import law
from discretax.testing._subject import (
    TIME,
    Gradients,
    Outcome,
    Pulled,
    Subject,
    call,
    weights,
    zeros,
)


@law(lambda subject: subject.takes_timesteps)
def timesteps(subject: Subject):
    """Timesteps of ones are none, others change the output, and steps with them are the whole."""
    mixer, x = subject.single()
    cache = subject.used_cache()
    plain = subject.run(mixer, x, cache)
    ones = subject.run(mixer, x, cache, integration_timesteps=np.ones(TIME, x.dtype))
    same(ones, plain, of="timesteps of ones", to="none")
    gaps = np.asarray(jr.uniform(jr.key(2), (TIME,), maxval=3.0))
    y, final = at(subject.run(mixer, x, cache, integration_timesteps=gaps))
    change = np.abs(y - plain.output).max()
    require(change > 1e-2, f"timesteps in [0, 3) change outputs by {change:.3g}; 0.01 is due")
    if subject.streams:
        for t in range(TIME):
            y_t, cache = subject.step(mixer, x[t], cache, integration_timestep=gaps[t])
            same(y_t, y[t], 1e-4, of=f"step {t} with a timestep of {gaps[t]:.3f}", to="the whole")
        pair = Outcome(None, cache), Outcome(None, final)
        same(*pair, of="steps with timesteps", to="the whole")


@law(lambda subject: not subject.takes_timesteps)
def timesteps_are_refused(subject: Subject):
    """A mixer without a continuous time refuses timesteps, rather than ignoring them."""
    mixer, x = subject.single()
    x = jnp.asarray(x)
    ones = jnp.ones(TIME, x.dtype)
    refuses(lambda: mixer(x, integration_timesteps=ones), "timesteps in a call", "timesteps")
    if subject.streams:
        cache = mixer.allocate_inference_cache()
        attempt = lambda: mixer.step(x[0], cache, integration_timestep=1.0)
        refuses(attempt, "a timestep in a step", "timesteps")


@law(lambda subject: subject.gap_is_zero_input)
def a_gap_is_zero_input(subject: Subject):
    """A gap of three is three samples, the last of them the input and the others zero."""
    mixer, x = subject.single()
    gaps = np.ones(TIME, x.dtype)
    gaps[4] = 3
    y, final = subject.run(mixer, np.insert(x, [4, 4], 0, axis=0), subject.used_cache())
    filled = Outcome(np.delete(np.asarray(y), [4, 5], axis=0), final)
    gap = subject.run(mixer, x, subject.used_cache(), integration_timesteps=gaps)
    same(gap, filled, of="a gap of 3 before time 4", to="two samples of zero there")


@law(lambda subject: subject.reference is not None)
def equals_its_reference(subject: Subject):
    """Outputs and gradients are those of the reference: a convolution, or the definition."""
    assert subject.reference is not None
    reference = subject.reference
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        written_out = lambda mixer, x, _: Outcome(reference(mixer, x), None)
        expected = subject.pull(written_out, Outcome(weights(x), None), mixer, x)
        cotangent = Outcome(weights(x), zeros(cache))
        outcome, gradients = subject.pull(call, cotangent, mixer, x, subject.empty_cache(mixer))
        without_cache = Pulled(
            Outcome(outcome.output, None), Gradients(gradients.mixer, gradients.samples, None)
        )
        same(without_cache, expected, 1e-12, of="the mixer", to="its reference")
