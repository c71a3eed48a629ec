"""8. Activations or parameters of half the width. 9. Stable, however trained and however long."""

import functools as ft

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from discretax.testing._compare import at, kind, require, same
from discretax.testing._law import law
from discretax.testing._subject import TIME, Subject, call, floats, parameters, take_step, weights


@law()
def bfloat16_activations(subject: Subject):
    """bfloat16 samples give bfloat16 outputs near those of float32; all else stays float32."""
    mixer, x = subject.single()
    low = jnp.asarray(x, jnp.bfloat16)

    @eqx.filter_jit
    def descend(mixer):
        def loss(mixer):
            outcome = call(mixer, low)
            return outcome.output.astype(jnp.float32).sum(), outcome

        gradient, outcome = eqx.filter_grad(loss, has_aux=True)(mixer)
        return outcome, eqx.apply_updates(mixer, gradient)

    outcome, stepped = descend(mixer)
    expected = subject.run(mixer, np.asarray(low, x.dtype))
    for path, leaf in parameters(outcome.cache).items():
        require(leaf.dtype == jnp.float32, f"cache.{path} becomes {kind(leaf)}")
    same(outcome, expected, 2e-2, of="samples in bfloat16", to="the same in float32")
    for path, new in parameters(stepped).items():
        before = parameters(mixer)[path]
        require(before.dtype == jnp.float32, f"mixer.{path} starts as {kind(before)}")
        require(new.dtype == jnp.float32, f"mixer.{path} becomes {kind(new)} in a training step")
        require(np.isfinite(new).all(), f"mixer.{path} is not finite after a training step")


@law(variants=["bfloat16", "float16"])
def narrow_parameters(subject: Subject, narrow: str):
    """Parameters of half the width give what the same rounded numbers give in float32."""
    mixer, _ = subject.single()
    rounded = _cast(mixer, narrow)
    x = subject.draw(subject.longest, seed=4)
    expected = subject.run(_cast(rounded, "float32"), x)
    of, to = f"parameters in {narrow}", "the same numbers in float32"
    same(subject.run(rounded, x), expected, of=of, to=to)


@law()
def gradients_of_narrow_parameters(subject: Subject):
    """Gradients of bfloat16 parameters are those of the same rounded numbers in float32, rounded."""
    mixer, x = subject.single()
    rounded = _cast(mixer, "bfloat16")
    cotangent = weights(subject.run(mixer, x))
    pull = lambda mixer: subject.pull(call, cotangent, mixer, x).gradients
    of, to = "parameters in bfloat16", "the same numbers in float32"
    same(pull(rounded), pull(_cast(rounded, "float32")), 1e-2, of=of, to=to)


@law(lambda subject: subject.streams)
def a_stream_goes_on_with_x64(subject: Subject):
    """A float32 cache is taken, and keeps its types, once x64 is on."""
    mixer, x = subject.single()
    cache = subject.used_cache()
    expected = subject.run(mixer, x[:1], cache)
    with jax.enable_x64(True):
        for options in ({}, {"length": 5, "resets": np.arange(TIME) == 2}):
            eqx.filter_eval_shape(ft.partial(call, **options), mixer, x, cache)
        eqx.filter_eval_shape(take_step, mixer, x[0], cache)
        outcome = subject.run(mixer, x[:1], cache)
        same(outcome, expected, of="a sample with x64", to="without")


@law(lambda subject: subject.transition_size is not None)
def stable_whatever_the_training(subject: Subject):
    """No transition is larger than one, at the start and after 100 random steps of Adam."""
    assert subject.transition_size is not None
    mixer, _ = subject.single()
    transition_size = eqx.filter_jit(subject.transition_size)
    size = np.max(transition_size(mixer))
    require(size <= 1, f"the largest transition starts at {size:.9g}")
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
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    noise = np.random.default_rng(3).normal(size=(100, count)).astype(np.float32)
    moved = eqx.combine(walk(params, noise), mixer)
    for path, after in parameters(moved).items():
        distance = np.abs(np.asarray(after) - np.asarray(parameters(mixer)[path])).max()
        require(distance > 0.1, f"mixer.{path} moves by {distance:.3g} only: is it a parameter?")
    size = np.max(transition_size(moved))
    require(size <= 1, f"the largest transition is {size:.9g} after training")


@law()
def long_sequences_stay_finite(subject: Subject):
    """The outputs of a long sequence of normal samples are finite and below 1000."""
    mixer, _ = subject.single()
    outcome = at(subject.run(mixer, subject.draw(subject.longest, seed=4)))
    for name, leaf in (("output", outcome.output), *parameters(outcome.cache).items()):
        require(np.isfinite(leaf).all(), f"{name} is not finite after {subject.longest} samples")
    largest = np.abs(outcome.output).max()
    require(largest < 1e3, f"an output of {largest:.3g} in {subject.longest} samples")


def _cast(tree: PyTree, dtype: str) -> PyTree:
    """`tree` with its floating arrays in another type."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )
