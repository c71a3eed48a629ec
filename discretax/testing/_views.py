"""1. Three views of one recurrence: the whole, chunks and steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from discretax.testing._compare import at, require, same
from discretax.testing._law import law
from discretax.testing._subject import (
    CUTS,
    TIME,
    Outcome,
    Subject,
    allocate,
    call,
    in_steps,
    weights,
)

streaming = lambda subject: subject.streams


@law(streaming, ["chunks", "steps"])
def whole_is_chunks_is_steps(subject: Subject, view: str):
    """Chunks and steps give the outputs, the final cache and the gradients of the whole."""
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        arguments = weights(Outcome(x, cache)), mixer, x, cache
        if view == "chunks":
            pieces = subject.pull_pieces(*arguments, CUTS)
        else:
            pieces = subject.pull(in_steps, *arguments)
        same(pieces, subject.pull(call, *arguments), 1e-12, of=view, to="the whole")


@law(streaming, ["chunks", "steps"])
def whole_is_chunks_is_steps_in_single_precision(subject: Subject, view: str):
    """Chunks and steps give the outputs and the final cache of the whole, in float32 too."""
    mixer, x = subject.single()
    expected = subject.run(mixer, x, subject.used_cache())
    cache, ys = subject.used_cache(), []
    for piece in np.split(x, CUTS) if view == "chunks" else x:
        y, cache = (subject.run if view == "chunks" else subject.step)(mixer, piece, cache)
        ys.append(np.atleast_2d(y))
    same(Outcome(np.concatenate(ys), cache), expected, of=view, to="the whole")


@law(streaming)
def no_cache_is_the_allocated_cache(subject: Subject):
    """A call without a cache begins as one with the allocated cache."""
    mixer, x = subject.single()
    from_allocated = subject.run(mixer, x, allocate(mixer, max_seqlen=TIME))
    same(subject.run(mixer, x), from_allocated, 0, of="without a cache", to="the allocated one")


@law(streaming)
def batched_cache_is_for_vmap(subject: Subject):
    """The cache allocated for a batch is mapped over with `jax.vmap`."""
    mixer, x = subject.single()
    batch = np.stack([x, 2 * x, -x])
    single, cache = (allocate(mixer, batch_size=size, max_seqlen=TIME) for size in (None, 3))
    due = jax.tree.map(lambda leaf: (3, *leaf.shape), single)
    shapes = jax.tree.map(jnp.shape, cache)
    require(shapes == due, f"with batch_size=3, a cache of shapes {due} is due; got {shapes}")
    outcome = eqx.filter_vmap(subject.run, in_axes=(None, 0, 0))(mixer, batch, cache)
    for i in range(3):
        alone = subject.run(mixer, batch[i])
        same(at(outcome, i), alone, of=f"sequence {i} of the batch", to="it alone")
