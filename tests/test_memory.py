"""Temporary memory of forward and backward as XLA plans it: exact, and bounded here.

In megabytes; the bounds leave a tenth of room. Nothing is run, only compiled.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from discretax.models import LRU, remat_blocks, scan_blocks
from discretax.ops import (
    delta_rule,
    gated_linear_attention,
    linear_recurrence,
    mlstm,
    selective_scan,
    ssd,
)
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    RGLRUSequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
    S7SequenceMixer,
)

pytestmark = pytest.mark.slow


def megabytes(f, *shapes, params=None):
    """Of the value of `f(params, *arrays)` and its gradient in all its arguments."""
    params, static = eqx.partition(params, eqx.is_inexact_array)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(params, arrays, weights):
        return jnp.vdot(f(eqx.combine(params, static), *arrays), weights)

    weights = jax.eval_shape(lambda p, a: f(eqx.combine(p, static), *a), params, arrays)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory = gradient.lower(params, arrays, weights).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**20


MIXERS = {
    "LRU whole": (lambda: LRUSequenceMixer(64, jr.key(0), state_dim=64), (4096, 64), 7.8),
    "LRU chunks": (lambda: LRUSequenceMixer(64, jr.key(0), state_dim=64), (16384, 64), 5.5),
    "LRU chunks, batch": (
        lambda: LRUSequenceMixer(64, jr.key(0), state_dim=64),
        (8, 16384, 64),
        42.5,
    ),
    "LinOSS": (lambda: LinOSSSequenceMixer(64, jr.key(0), state_dim=64), (16384, 64), 6.4),
    "S5 chunks": (lambda: S5SequenceMixer(256, jr.key(0), state_dim=256), (16384, 256), 20.7),
    "S4D": (lambda: S4DSequenceMixer(256, jr.key(0), state_dim=64), (1024, 256), 3.8),
    "S4D blocks": (lambda: S4DSequenceMixer(256, jr.key(0), state_dim=64), (16384, 256), 28.1),
    "S4": (lambda: S4SequenceMixer(256, jr.key(0), state_dim=64), (1024, 256), 6.9),
    "S4 blocks": (lambda: S4SequenceMixer(64, jr.key(0), state_dim=32), (4096, 64), 4.3),
    "RG-LRU": (lambda: RGLRUSequenceMixer(256, jr.key(0), num_heads=4), (4096, 256), 12.3),
    "S7": (lambda: S7SequenceMixer(64, jr.key(0), state_dim=32), (4096, 64), 8.9),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name):
    make, shape, bound = MIXERS[name]
    one = lambda mixer, x: mixer(x)[0]
    run = one if len(shape) == 2 else jax.vmap(one, (None, 0))
    assert megabytes(run, shape, params=make()) < bound


def test_linear_recurrence():
    """The states alone are kept, and they are the output; each is written over its drive."""
    shape = (4096, 256)
    assert megabytes(lambda _, a, b: linear_recurrence(a, b), shape, shape) < 4.5


@pytest.mark.parametrize("batch", [(), (1,)])
@pytest.mark.parametrize(("time", "bound"), [(2048, 4.5), (65536, 107)])
def test_selective_scan(time, bound, batch):
    """States for all samples would fill 2048 * 256 * 16 * 4 bytes = 32 MB, and 1 GB."""
    inputs, states = (*batch, time, 256), (*batch, time, 16)
    one = lambda A, x, dt, B, C: selective_scan(x, dt, A, B, C)[0]
    run = jax.vmap(one, (None, 0, 0, 0, 0)) if batch else one
    assert megabytes(run, inputs, inputs, states, states, params=-jnp.ones((256, 16))) < bound


HEADS, KEY = 8, 64
SHARED = (1, KEY)  # by all heads
OWN, NUMBER = (HEADS, KEY), (HEADS,)
# Shapes of a sample; bounds for 1024 samples and for 4096.
MATRIX_STATE = {
    "ssd": (
        lambda x, dt, B, C: ssd(x, dt, -jnp.ones(HEADS), B, C)[0],
        (OWN, NUMBER, SHARED, SHARED),
        (6.4, 21.5),
    ),
    "ssd, a group for each head": (
        lambda x, dt, B, C: ssd(x, dt, -jnp.ones(HEADS), B, C)[0],
        (OWN, NUMBER, OWN, OWN),
        (5.8, 19.2),
    ),
    "linear attention": (
        lambda q, k, v, g, **options: gated_linear_attention(q, k, v, None, g, **options)[0],
        (OWN, OWN, OWN, NUMBER),
        (5.7, 18.9),
    ),
    "linear attention, vector decay": (
        lambda q, k, v, g, **options: gated_linear_attention(q, k, v, None, g, **options)[0],
        (OWN, OWN, OWN, OWN),
        (6.8, 19.3),
    ),
    "delta": (
        lambda *arrays, **options: delta_rule(*arrays, **options)[0],
        (OWN, OWN, OWN, NUMBER, NUMBER),
        (7.5, 27.3),
    ),
    "delta, vector decay": (
        lambda *arrays, **options: delta_rule(*arrays, **options)[0],
        (OWN, OWN, OWN, NUMBER, OWN),
        (7.6, 27.4),
    ),
    "mLSTM": (
        lambda *arrays: mlstm(*arrays)[0],
        (OWN, OWN, OWN, NUMBER, NUMBER),
        (11.8, 46.9),
    ),
}


@pytest.mark.parametrize("time", [1024, 4096])
@pytest.mark.parametrize("name", MATRIX_STATE)
def test_matrix_state(name, time):
    """States for all samples would fill 1024 * 8 * 64 * 64 * 4 bytes = 128 MB, and 512 MB."""
    run, shapes, bounds = MATRIX_STATE[name]
    used = megabytes(lambda _, *arrays: run(*arrays), *((time, *shape) for shape in shapes))
    assert used < dict(zip((1024, 4096), bounds, strict=True))[time]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("linear attention", 3.3), ("delta", 3.3), ("delta, vector decay", 3.3), ("mLSTM", 5.5)],
)
def test_matrix_state_of_a_long_sequence(name, inputs):
    """States for all samples would fill 16 GB. Kept are the output and a state for each chunk of 64
    or 32 samples, as much as two or three inputs; of the mLSTM also keys with their weights, and
    values with a column of ones."""
    run, shapes, _ = MATRIX_STATE[name]
    time = 2**17
    used = megabytes(lambda _, *arrays: run(*arrays), *((time, *shape) for shape in shapes))
    assert used < inputs * time * HEADS * KEY * 4 / 2**20


@pytest.mark.parametrize("name", ["linear attention", "delta, vector decay"])
def test_matrix_state_of_a_batch(name):
    """With lengths of their own: neither the batch nor the padding makes a copy of an input."""
    run, shapes, (bound, _) = MATRIX_STATE[name]
    batched = jax.vmap(lambda length, *arrays: run(*arrays, length=length))
    whole = lambda _, *arrays: batched(jnp.arange(8), *arrays)
    assert megabytes(whole, *((8, 1024, *shape) for shape in shapes)) < 8 * bound


def test_attention():
    """All scores, kept for the gradient, would fill 4 * 4096 * 4096 * 4 bytes = 256 MB."""
    run = lambda mixer, x: mixer(x)[0]
    mixer = AttentionSequenceMixer(16, num_heads=4, key=jr.key(0))
    assert megabytes(run, (4096, 16), params=mixer) < 28


def test_remat():
    """What is kept grows by one (time, hidden_dim) for each block, 1/8 MB."""
    model, state = eqx.nn.make_with_state(LRU)(
        jr.key(0), hidden_dim=32, num_blocks=8, state_dim=32, norm="layer", drop_rate=0.0
    )
    run = lambda model, x: model(x, jax.tree.map(lambda leaf: leaf, state))[0]
    plain = megabytes(run, (1024, 32), params=model)
    deep = megabytes(run, (1024, 32), params=remat_blocks(scan_blocks(model)))
    assert deep < 3.4 and plain > 3 * deep
