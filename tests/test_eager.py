"""Outside of `jax.jit`: what is called again with arrays alike finds all of it compiled."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import FEATURES, every_case
from helpers import assert_equal, draw

from discretax import sample_token
from discretax.architectures import LanguageModel
from discretax.models import scan_blocks
from discretax.ops import _attention, linear_recurrence
from discretax.ops._recurrence import projections
from discretax.sequence_mixers import AttentionSequenceMixer, LRUSequenceMixer
from discretax.sequence_mixers.ltv import rglru

pytestmark = pytest.mark.slow

TIME = 70  # more than the chunks of most mixers


@contextlib.contextmanager
def counted():
    compiled = []
    count = lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(count)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(count)


def assert_compiled_once(run):
    """`run()` twice, with nothing shared but what JAX keeps."""
    first = run()
    with counted() as compiled:
        assert_equal(run(), first)
    assert not compiled


@every_case
def test_mixers(case, monkeypatch):
    monkeypatch.setattr(projections, "WHOLE", 0)
    monkeypatch.setattr(projections, "CHUNK", 64)
    monkeypatch.setattr(rglru, "CHUNK", 64)
    mixer, x = case.make(jr.key(0)), draw(TIME, FEATURES)
    cache = mixer.allocate_inference_cache() if case.streams else None

    def run():
        gradient = jax.grad(lambda x: jnp.sin(mixer(x)[0]).sum())(x)
        return gradient, mixer.step(x[0], cache) if case.streams else None

    assert_compiled_once(run)


def test_attention_chooses_its_keys(monkeypatch):
    monkeypatch.setattr(_attention, "MANY", 8)
    mixer, x = AttentionSequenceMixer(FEATURES, jr.key(0), num_heads=2), draw(3, FEATURES)
    cache = mixer.allocate_inference_cache(max_seqlen=9)
    gradient = jax.grad(lambda x: jnp.sin(mixer.step(x, cache)[0]).sum())
    assert_compiled_once(lambda: (mixer.step(x[0], cache), gradient(x[0])))


def test_vectorised_operations():
    a, b = jnp.full(5, 0.5), jnp.ones((1, TIME, 5))
    run = jax.vmap(linear_recurrence, in_axes=(None, 0))
    with counted() as compiled:
        run(a, b)
    assert compiled
    assert_compiled_once(lambda: run(a, b))


def test_deep_language_models():
    """Blocks in a loop, and the logits of some samples after the other."""
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=7, hidden_dim=4, num_blocks=2, pattern=(LRUSequenceMixer,)
    )
    model, tokens = scan_blocks(model), np.arange(9) % 7
    assert_compiled_once(lambda: model.loss(tokens, state, chunk_size=4)[0])


def test_sampling():
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.01}
    assert_compiled_once(lambda: sample_token(draw(9), jr.key(0), **options))
