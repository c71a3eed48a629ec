"""Texts with a draft and by beams: against those without, and against all sequences."""

import functools as ft
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, changed

from discretax import Timeseries, beam_search, generate
from discretax.architectures import LanguageModel
from discretax.sequence_mixers import AttentionSequenceMixer, LRUSequenceMixer

pytestmark = pytest.mark.slow

VOCABULARY, NEW, STOP = 5, 9, 2
PROMPTS, LENGTHS = np.array([[3, 1, 4], [0, 3, 2], [1, 0, 0]]), np.array([3, 2, 1])
OPTIONS = {
    "key": jr.key(0),
    "temperature": 1.5,
    "top_k": 4,
    "repetition_penalty": 1.2,
    "stop_tokens": (STOP,),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@ft.cache
def make():
    """A recurrence, and attention whose cache has a clock and a length."""
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0),
        vocab_size=VOCABULARY,
        hidden_dim=4,
        num_blocks=2,
        pattern=(
            ft.partial(LRUSequenceMixer, state_dim=3),
            ft.partial(AttentionSequenceMixer, num_heads=1),
        ),
        tie_embeddings=False,
        initializer_range=0.3,
    )
    return changed(model, seed=2), state


def nearly(model):
    """A draft that agrees with the model often, not always."""
    noisy = lambda w: w + 0.3 * jr.normal(jr.key(7), w.shape, w.dtype)
    return eqx.tree_at(lambda m: m.head.weight, model, replace_fn=noisy)


class Chain(eqx.Module):
    """The logits after each token stand in a table."""

    table: jax.Array
    on_read: object = eqx.field(static=True, default=None)

    def __call__(self, x, state, *, key=None):
        tokens = x.values if isinstance(x, Timeseries) else x
        if self.on_read is not None:
            jax.debug.callback(self.on_read, tokens)
        return self.table[tokens], state


def chain(seed, size=VOCABULARY, **hooks):
    model = Chain(2 * jr.normal(jr.key(seed), (size, size)), **hooks)
    return model, eqx.nn.State(model)


# Speculative decoding


def test_a_draft_changes_no_text():
    """Drawn at random, with rows that accept unequally much and that end; and their states."""
    model, state = make()
    draft = nearly(model)
    write = ft.partial(generate, model)
    expected = write(state, PROMPTS, NEW, length=LENGTHS, **OPTIONS)
    assert len(set(expected.length.tolist())) > 1
    text = write(state, PROMPTS, NEW, length=LENGTHS, draft=(draft, state), ahead=3, **OPTIONS)
    assert_equal((text.tokens, text.length), (expected.tokens, expected.length))
    assert_close((text.log_probs, text.state), (expected.log_probs, expected.state), rtol=1e-12)
    # The draft's state is that of the same text, and both go on.
    alone = generate(draft, state, PROMPTS, 0, length=LENGTHS).state
    assert_equal(text.draft_state.length, expected.state.length)
    replies, more = np.array([[1], [0], [3]]), {"temperature": 0}
    after = write(text.state, replies, NEW, draft=(draft, text.draft_state), ahead=3, **more)
    assert_equal(after.tokens, write(expected.state, replies, NEW, **more).tokens)
    assert_equal(after.draft_state.length, after.state.length)
    with pytest.raises(ValueError, match=r"the draft must have read what `state` has"):
        write(text.state, replies, NEW, draft=(draft, alone), **more)
    with pytest.raises(ValueError, match=r"the draft must have read what `state` has"):
        write(text.state, replies, NEW, draft=(draft, state), **more)


def test_a_draft_writes_what_it_alone_would_have_read():
    """Its state after the text is the one that reading the text gives."""
    model, state = make()
    draft = nearly(model)
    options = {"length": LENGTHS, "ahead": 3, **OPTIONS}
    text = generate(model, state, PROMPTS, NEW, draft=(draft, state), **options)
    for b, count in enumerate(LENGTHS):
        whole = np.concatenate([PROMPTS[b, :count], text.tokens[b, : int(text.length[b])]])
        padded = np.pad(whole, (0, PROMPTS.shape[1] + NEW - len(whole)))
        read = generate(draft, state, padded, 0, length=len(whole), max_seqlen=11).state
        assert_close(text.draft_state[b], read, rtol=1e-10)


@pytest.mark.parametrize("agrees", [True, False])
def test_how_much_is_read(agrees):
    """A draft that is always right saves readings; one that is never right costs some."""
    reads = []
    table = 5 * np.roll(np.eye(20), 1, axis=1)
    model = Chain(jnp.asarray(table), on_read=lambda tokens: reads.append(np.size(tokens)))
    draft = Chain(jnp.asarray(table if agrees else table.T))
    state = eqx.nn.State(model)
    text = generate(model, state, [1], 8, temperature=0, draft=(draft, state), ahead=3)
    jax.effects_barrier()
    assert_equal(text.tokens, np.arange(2, 10))
    assert reads == [4] * (2 if agrees else 2 * 8 - 1)


def test_texts_of_a_draft_are_as_likely_as_without():
    """Pairs of tokens, over many rows: as the model says, whatever the draft thinks."""
    rows, size = 6000, 3
    model, draft = chain(1, size), chain(2, size)
    prompts = np.ones((rows, 1), int)
    text = generate(*model, prompts, 2, key=jr.key(0), draft=draft, ahead=2)
    p = np.asarray(jax.nn.softmax(model[0].table))
    expected = rows * p[1][:, None] * p
    counts = np.zeros((size, size))
    np.add.at(counts, (text.tokens[:, 0], text.tokens[:, 1]), 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 8 + 3 * np.sqrt(2 * 8)


def test_what_is_no_draft():
    model, state = chain(0)
    write = ft.partial(generate, model, state, [1], 2, temperature=0)
    with pytest.raises(ValueError, match=r"the model's vocabulary, 5; got 4"):
        write(draft=chain(1, 4))
    with pytest.raises(TypeError, match=r"`draft` must be a model and its state.*got Chain"):
        write(draft=model)
    with pytest.raises(ValueError, match=r"`ahead` must be .* at least 1; got 0"):
        write(draft=chain(1), ahead=0)


# Beams


@ft.cache
def whole():
    model, state = make()
    model = eqx.nn.inference_mode(model)
    return eqx.filter_jit(jax.vmap(lambda tokens: jax.nn.log_softmax(model(tokens, state)[0])))


def every_text(prompt, count):
    """All texts of so many tokens, the likeliest first; what ends early fills with its last."""
    texts = []
    for text in itertools.product(range(VOCABULARY), repeat=count):
        end = text.index(STOP) + 1 if STOP in text else count
        if set(text[end:]) <= {STOP}:
            texts.append((text, end))
    tokens = np.array([[*prompt, *text] for text, _ in texts])
    padding = PROMPTS.shape[1] - len(prompt)
    log_p = np.asarray(whole()(np.pad(tokens, ((0, 0), (0, padding)))))
    log_p = log_p[:, len(prompt) - 1 : len(prompt) + count - 1]
    log_p = np.take_along_axis(log_p, tokens[:, len(prompt) :, None], axis=-1)[..., 0]
    ends = np.array([end for _, end in texts])
    log_p = np.where(np.arange(count) < ends[:, None], log_p, 0)
    order = np.argsort(-log_p.sum(1))
    return tokens[order, len(prompt) :], ends[order], log_p[order]


def test_a_wide_beam_finds_the_likeliest_of_all_texts():
    model, state = make()
    found = beam_search(model, state, PROMPTS, 3, length=LENGTHS, num_beams=25, stop_tokens=(STOP,))
    for b, count in enumerate(LENGTHS):
        expected = every_text(PROMPTS[b, :count], 3)
        some = [leaf[:10] for leaf in expected]
        assert_equal((found.tokens[b, :10], found.length[b, :10]), some[:2])
        assert_close(found.log_probs[b, :10], some[2], rtol=1e-12)
    assert len(set(np.asarray(found.length).flat)) > 1
    # And each of them goes on.
    best = jax.tree.map(lambda leaf: leaf[:, 0], found.state)
    expected_length = LENGTHS + found.length[:, 0]
    assert_equal(best.length, expected_length)
    text = generate(model, best, [[1]] * 3, 2, temperature=0)
    b = 1
    said = [*PROMPTS[b, : LENGTHS[b]], *found.tokens[b, 0, : int(found.length[b, 0])], 1]
    padded = np.pad(said, (0, 8 - len(said)))
    again = generate(model, state, padded, 2, temperature=0, length=len(said))
    assert_equal(text.tokens[b], again.tokens)
    assert_close(text.log_probs[b], again.log_probs, rtol=1e-12)


def test_one_beam_is_the_greedy_text():
    model, state = chain(0)
    beams = beam_search(model, state, [1], 6, num_beams=1)
    text = generate(model, state, [1], 6, temperature=0)
    assert_equal(beams.tokens, text.tokens[None])
    assert_close(beams.log_probs, text.log_probs[None], rtol=1e-12)
    assert_equal(beams.state.length, text.state.length[None])
    with pytest.raises(ValueError, match=r"`num_beams` must be .* at least 1; got 0"):
        beam_search(model, state, [1], 6, num_beams=0)
