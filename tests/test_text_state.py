"""Texts that go on from a state: against reading all of them again from the beginning."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, changed

from discretax import TextState, Timeseries, generate, stream_tokens
from discretax.architectures import LanguageModel
from discretax.encoder import EmbeddingEncoder
from discretax.heads import ClassificationHead
from discretax.sequence_mixers import AttentionSequenceMixer, MambaSequenceMixer

pytestmark = pytest.mark.slow

VOCABULARY, NEW, STOP = 7, 6, 2
# Two turns; what stands beside the valid tokens may be anything.
PROMPTS = np.array([[3, 1, 4, 1], [5, 99, -1, 0], [0, 6, -1, 7]]), np.array([4, 1, 2])
REPLIES = np.array([[5, 3, 1], [6, 0, -1], [-1, 9, 9]]), np.array([3, 2, 0])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@ft.cache
def make():
    """A recurrence, and attention whose cache has a clock and grows."""
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0),
        vocab_size=VOCABULARY,
        hidden_dim=8,
        num_blocks=2,
        pattern=(
            ft.partial(MambaSequenceMixer, state_dim=2),
            ft.partial(AttentionSequenceMixer, num_heads=2),
        ),
        tie_embeddings=False,
        initializer_range=0.3,
    )
    return changed(model, seed=2), state


@ft.cache
def first_turn():
    model, state = make()
    prompts, length = PROMPTS
    return generate(model, state, prompts, NEW, key=jr.key(0), length=length, stop_tokens=(STOP, 4))


@ft.cache
def whole():
    model, state = make()
    model = eqx.nn.inference_mode(model)
    return eqx.filter_jit(lambda tokens: jax.nn.log_softmax(model(tokens, state)[0]))


def log_probs_of(context, text):
    """Of each token of the text, all of it read at once."""
    tokens = np.concatenate([context, text])
    padded = np.pad(tokens, (0, 32 - len(tokens)))
    log_p = np.asarray(whole()(jnp.asarray(padded)))
    return log_p[np.arange(len(context) - 1, len(tokens) - 1), text]


def valid(rows, length):
    return [row[:count] for row, count in zip(np.asarray(rows), np.asarray(length), strict=True)]


class Chain(eqx.Module):
    """After each token comes the next one."""

    on_trace: object = eqx.field(static=True, default=lambda: None)

    def __call__(self, x, state, *, key=None):
        self.on_trace()
        tokens = x.values if isinstance(x, Timeseries) else x
        return 5 * jax.nn.one_hot((tokens + 1) % 6, 6) - 10, state


# Going on


def test_a_conversation_is_one_text():
    """Rows of unequal prompts, of which some end early, and one of which says nothing."""
    model, _ = make()
    said = first_turn()
    lengths = np.asarray(said.length)
    assert lengths.min() < NEW
    replies, length = REPLIES
    answered = generate(model, said.state, replies, NEW, key=jr.key(1), length=length)
    spoken = valid(*PROMPTS), valid(said.tokens, said.length), valid(*REPLIES)
    for b, (prompt, text, reply) in enumerate(zip(*spoken, strict=True)):
        context = np.concatenate([prompt, text, reply])
        answer = np.asarray(answered.tokens[b])
        assert_close(said.log_probs[b, : len(text)], log_probs_of(prompt, text), rtol=1e-12)
        assert (said.log_probs[b, len(text) :] == 0).all()
        assert_close(answered.log_probs[b], log_probs_of(context, answer), rtol=1e-12)
        after = answered.state[b]
        assert int(after.length) == len(context) + NEW
        assert int(after.last_token) == answer[-1]
        assert_equal(np.flatnonzero(after.seen), np.unique(np.concatenate([context, answer])))


def test_going_back_is_keeping_a_state():
    """And one text may go on in many ways: of a state nothing is used up."""
    model, _ = make()
    replies, length = REPLIES
    again = ft.partial(generate, model, first_turn().state, replies, NEW, length=length)
    before = jax.tree.map(np.array, first_turn().state)
    first, other = again(key=jr.key(1)), again(key=jr.key(2))
    assert (first.tokens != other.tokens).any()
    assert_equal(again(key=jr.key(1)), first)
    assert_equal(first_turn().state, before)
    # One row, for three texts.
    many = generate(model, first_turn().state[1], replies, NEW, key=jr.key(1), length=length)
    assert_equal(many.tokens[1], first.tokens[1])
    context = np.concatenate([PROMPTS[0][1][:1], valid(*first_turn()[:2])[1]])
    for b, reply in enumerate(valid(*REPLIES)):
        expected = log_probs_of(np.concatenate([context, reply]), np.asarray(many.tokens[b]))
        assert_close(many.log_probs[b], expected, rtol=1e-12)


def test_one_by_one():
    """The state between two tokens is that of the text so far, read and written alike."""
    model, state = make()
    prompts, length = PROMPTS
    options = {"key": jr.key(0), "length": length, "stop_tokens": (STOP, 4)}
    stream = stream_tokens(model, state, prompts, NEW, **options)
    tokens = [next(stream) for _ in range(2)]
    middle = stream.state
    said = first_turn()
    assert_equal(middle.last_token, said.tokens[:, 1])
    tokens += list(stream)
    assert_equal(np.stack(tokens, 1), said.tokens[:, : len(tokens)])
    assert_close(stream.state, said.state, rtol=1e-12)
    assert_equal(middle.length, length + np.minimum(said.length, 2))


def test_a_prefix_alone():
    """With no tokens to write, it is read; with no prompt, the text goes on where it stands."""
    chain = Chain()
    state = eqx.nn.State(chain)
    read = generate(chain, state, [2, 3], 0)
    assert read.tokens.shape == (0,)
    assert int(read.state.length) == 2
    text = generate(chain, read.state, (), 3, temperature=0)
    assert_equal(text.tokens, np.array([4, 5, 0]))
    more = generate(chain, text.state, np.zeros((2, 0), int), 2, temperature=0)
    assert_equal(more.tokens, np.array([[1, 2]] * 2))
    assert_equal(more.state.length, np.array([7, 7]))
    assert list(stream_tokens(chain, read.state, [3], 0)) == []
    # All of a text counts as seen, whichever call has read it: of six tokens all but one.
    rare = generate(chain, text.state, [2], 1, temperature=0, repetition_penalty=1e9)
    assert int(rare.tokens[0]) == 1


def test_padding_on_the_left_and_between():
    """The texts and their log-probabilities, bit by bit, and so those of each prompt alone."""
    model, state = make()
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 0, 1]]) == 1
    prompts = np.array([[3, 1, 4, 1], [-1, 99, 0, 5], [99, 0, -1, 6]])
    options = {"key": jr.key(0), "stop_tokens": (STOP, 4)}
    assert_equal(generate(model, state, prompts, NEW, mask=mask, **options), first_turn())
    one = generate(Chain(), eqx.nn.State(Chain()), [3, -7], 2, temperature=0, mask=[True, False])
    assert_equal(one.tokens, np.array([4, 5]))


# Room


def slots(state):
    """Of the attention's cache, of keys and values of two heads of four."""
    return {leaf.shape[-3] for leaf in jax.tree.leaves(state.caches) if leaf.shape[-2:] == (2, 4)}


def test_room_for_the_tokens_and_no_more():
    """The last one is not read."""
    model, _ = make()
    said = first_turn()
    assert slots(said.state) == {4 + NEW - 1} == {said.state.max_seqlen}
    read = lambda state, **options: jax.eval_shape(
        lambda: generate(model, state, [1, 2], 3, temperature=0, **options).state
    )
    longest = int(said.state.length.max())
    longer = read(said.state[np.argmax(said.state.length)])
    assert slots(longer) == {longest + 2 + 3 - 1} == {longer.max_seqlen}
    roomy = read(said.state[1], max_seqlen=40)
    assert slots(roomy) == {40} == {roomy.max_seqlen}
    # In `jax.jit` it is not known how much room there is yet.
    unknown = jax.eval_shape(lambda state: generate(model, state, [1], 3, temperature=0), roomy)
    assert slots(unknown.state) == {40 + 1 + 3 + 1 - 1}


def test_learned_positions_are_used_to_the_last():
    encoder = EmbeddingEncoder(jr.key(0), num_classes=6, out_features=4, max_position_embeddings=7)
    head = ClassificationHead(4, 6, jr.key(1), reduce=False)
    model, state = eqx.nn.make_with_state(eqx.nn.Sequential)([encoder, head])
    text = generate(model, state, [1, 2, 3], 3, temperature=0)
    last = generate(model, text.state, [4], 1, temperature=0)
    assert np.isfinite(last.log_probs).all()
    assert int(last.state.length) == 8  # of which seven have been read
    with pytest.raises(ValueError, match=r"at most the 7 positions .*; got 8.*write fewer"):
        generate(model, last.state, (), 1, temperature=0)
    with pytest.raises(ValueError, match=r"at most the 7 positions .*; got 8.*write fewer"):
        generate(model, state, [1, 2, 3], 6, temperature=0)


def test_turns_of_one_size_compile_once():
    traces = []
    chain = Chain(lambda: traces.append(1))
    state = generate(chain, eqx.nn.State(chain), [1, 0], 3, temperature=0, length=1).state
    state = generate(chain, state, [1, 0], 3, temperature=0, length=2).state
    before = len(traces)
    for length in range(3):
        state = generate(chain, state, [1, 2], 3, temperature=0, length=length).state
    assert len(traces) == before
    assert int(state.length) == 1 + 2 + 0 + 1 + 2 + 5 * 3


# Errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"mask": [1, 1]}, ValueError, r"`mask` must be one boolean.*got int64\(2,\).*`mask == 1`"),
        ({"mask": [True]}, ValueError, r"one boolean per token, bool\(2,\); got bool\(1,\)"),
        ({"mask": [False] * 2}, ValueError, r"`mask` must leave at least 1 token .*lengths of 0"),
        ({"mask": [True] * 2, "length": 2}, ValueError, r"`length` and `mask` .*give one of them"),
        ({"prompt": "hello"}, TypeError, r"`prompt` must be tokens.*got text, <U5\(\).*encode"),
        ({"prompt": ["a", "b"]}, TypeError, r"`prompt` must be tokens.*got text, <U1\(2,\)"),
    ],
)
def test_what_is_no_prompt(options, error, message):
    chain = Chain()
    with pytest.raises(error, match=message):
        generate(chain, eqx.nn.State(chain), **{"prompt": [1, 2]} | options, max_new_tokens=0)


def test_what_is_no_state_to_go_on_from():
    chain = Chain()
    fresh = eqx.nn.State(chain)
    text = generate(chain, fresh, [1, 2], 2, temperature=0)
    rows = generate(chain, text.state, [[1], [2]], 2, temperature=0)
    go_on = ft.partial(generate, chain, max_new_tokens=1, temperature=0)
    with pytest.raises(TypeError, match=r"`state` must be .*got Generated\. .*`text\.state`"):
        go_on(text, prompt=[1])
    with pytest.raises(ValueError, match=r"one row for each of the 2 texts .*got \(1,\)"):
        go_on(rows.state, prompt=[1])
    with pytest.raises(ValueError, match=r"one row for each of the 2 texts .*got \(3, 1\)"):
        go_on(rows.state, prompt=[[1], [2], [3]])
    with pytest.raises(ValueError, match=r"`dtype` is of caches that begin.*got .*bfloat16"):
        go_on(text.state, prompt=[1], dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"rows of a batch; got the state of one text"):
        text.state[0]
    with pytest.raises(IndexError, match=r"the batch has 2"):
        rows.state[2]
    model, _ = make()
    other = TextState(fresh, text.state.last_token, text.state.length, text.state.seen, 5)
    with pytest.raises(ValueError, match=r"without a cache for its `\w+`\. Read the text with"):
        generate(model, other, [1], 1, temperature=0)
