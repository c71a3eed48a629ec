"""7. Under JAX's transformations a mixer is what it is without."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from discretax.testing._compare import at, same
from discretax.testing._law import law
from discretax.testing._subject import (
    TIME,
    Gradients,
    Outcome,
    Subject,
    call,
    dot,
    floats,
    take_step,
    weights,
    zeros,
)


@law()
def jit_is_eager(subject: Subject):
    """A compiled call and step are those that run operation by operation."""
    mixer, x = subject.single()
    eager = call(mixer, jnp.asarray(x))
    same(subject.run(mixer, x), eager, of="a call under jit", to="without")
    if subject.streams:
        sample, cache = jnp.asarray(x[0]), subject.used_cache()
        eager = take_step(mixer, sample, cache)
        same(subject.step(mixer, sample, cache), eager, of="a step under jit", to="without")


@law()
def vmap_is_a_loop(subject: Subject):
    """The gradient through `jax.vmap` is the sum of the gradients of single sequences."""
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        batch, cotangent = subject.draw(3, TIME, seed=5), weights(Outcome(x, cache))
        loss = lambda mixer, x: dot(call(mixer, x, cache), cotangent)
        batched = eqx.filter_jit(
            eqx.filter_grad(lambda mixer: jnp.sum(jax.vmap(ft.partial(loss, mixer))(batch)))
        )(mixer)
        singles = [subject.pull(call, cotangent, mixer, x, cache).gradients.mixer for x in batch]
        summed = jax.tree.map(lambda *leaves: sum(leaves), *singles)
        same(batched, summed, 1e-12, of="the gradient of a batch", to="the sum of single ones")


@law()
def checkpoint_and_scan(subject: Subject):
    """Twice in a row by `lax.scan` and `jax.checkpoint`, it has the gradients of the chain rule."""
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        dy = weights(x)
        twice = lambda mixer, x: jax.lax.scan(
            lambda u, _: (jax.checkpoint(lambda v: call(mixer, v, cache)[0])(u), None), x, length=2
        )[0]
        loss = lambda arguments: dot(twice(arguments.mixer, arguments.samples), dy)
        scanned = eqx.filter_jit(eqx.filter_grad(loss))(Gradients(mixer, x, None))
        pull = lambda dy, x: subject.pull(call, Outcome(dy, zeros(cache)), mixer, x, cache)
        y = pull(dy, x).outcome.output
        dsecond, dbetween, _ = pull(dy, y).gradients
        dfirst, dx, _ = pull(dbetween, x).gradients
        by_hand = Gradients(jax.tree.map(np.add, dfirst, dsecond), dx, None)
        same(scanned, by_hand, 1e-12, of="`lax.scan` of `jax.checkpoint`", to="the chain rule")


@law()
def second_order_in_reverse(subject: Subject):
    """The gradient of the gradient is the difference of gradients at close points."""
    # Of the product of cotangent and outcome, in all of its arguments, the cotangent among them.
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        cotangent = weights(Outcome(x, cache))
        point, static = eqx.partition((cotangent, mixer, x, cache), eqx.is_inexact_array)

        def gradient(point):
            outcome, gradients = subject.pull(call, *eqx.combine(point, static))
            return floats(outcome), *gradients

        rng = np.random.default_rng(9)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)
        product = jax.jit(jax.grad(lambda point: dot(gradient(point), direction)))(point)
        eps = 1e-5
        ahead, behind = (
            gradient(jax.tree.map(lambda p, d, s=s: np.asarray(p) + s * eps * d, point, direction))
            for s in (1, -1)
        )
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), at(ahead), at(behind))
        name = lambda tree: {"cotangent": tree[0], "gradients": Gradients(*tree[1:])}
        of, to = "the gradient of the gradient", "the difference of gradients"
        same(name(product), name(difference), 1e-6, of=of, to=to)
