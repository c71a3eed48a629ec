"""Text: against recomputing everything for each token, and against chains of known probabilities."""

import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, changed

from discretax import (
    Timeseries,
    generate,
    inference_state,
    sample_token,
    stream_tokens,
    streaming_mode,
)
from discretax._features import linear
from discretax._projection import for_samples
from discretax.architectures import LanguageModel
from discretax.channel_mixers import GLU
from discretax.encoder import EmbeddingEncoder
from discretax.heads import ClassificationHead
from discretax.models import scan_blocks
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    Bidirectional,
    GriffinSequenceMixer,
    LRUSequenceMixer,
    MambaSequenceMixer,
)

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH, NEW = 7, 8, 8
PROMPTS = np.array([[3, 1, 4, 1, 5, 2, 6], [2, -1, 99, -1, 0, 0, 0], [5, 0, 6, 3, -1, -1, 7]])
LENGTHS = np.array([7, 1, 4])
LRU = ft.partial(LRUSequenceMixer, state_dim=4)
PATTERNS = {
    "LRU": (LRU,),
    "Mamba": (ft.partial(MambaSequenceMixer, state_dim=2),),
    "Griffin": (
        ft.partial(GriffinSequenceMixer, num_heads=2),
        ft.partial(AttentionSequenceMixer, num_heads=2, window=4),
    ),
    "attention": (ft.partial(AttentionSequenceMixer, num_heads=2),),
}
every_model = pytest.mark.parametrize("name", PATTERNS)


@ft.cache
def make(name):
    """In training mode; `generate` has to switch off its dropout."""
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0),
        vocab_size=VOCABULARY,
        hidden_dim=WIDTH,
        num_blocks=2,
        pattern=PATTERNS[name],
        channel_mixer=GLU,
        drop_rate=0.5,
        tie_embeddings=False,
        initializer_range=0.3,
    )
    return changed(model, seed=2), state


class Chain(eqx.Module):
    """A Markov chain: the logits after each token stand in a table."""

    table: jax.Array
    on_trace: Any = eqx.field(static=True, default=lambda: None)
    on_read: Any = eqx.field(static=True, default=None)

    def __call__(self, x, state, *, key=None):
        self.on_trace()
        tokens = x.values if isinstance(x, Timeseries) else x
        if self.on_read is not None:
            jax.debug.callback(self.on_read, tokens)
        return self.table[tokens], state


def counting(size, **hooks):
    """After each token comes the next one."""
    chain = Chain(5 * jnp.roll(jnp.eye(size), 1, axis=1), **hooks)
    return chain, eqx.nn.State(chain)


@ft.cache
def forward(name):
    model, state = make(name)
    model = eqx.nn.inference_mode(model)
    return eqx.filter_jit(lambda tokens: model(tokens, state)[0])


def rewritten(name, prompt, choose):
    """The text of one prompt, the whole forward pass again for each token."""
    text = list(prompt)
    for i in range(NEW):
        padded = np.array(text + [0] * (PROMPTS.shape[1] + NEW - len(text)))
        logits = forward(name)(padded)[len(text) - 1]
        text.append(int(choose(logits, i, np.isin(np.arange(VOCABULARY), text))))
    return np.array(text[len(prompt) :])


def rows():
    return [list(prompt[:length]) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]


def pairs(texts):
    return set(zip(texts[:, :-1].flat, texts[:, 1:].flat, strict=True))


# Against recomputing


@every_model
def test_greedy_text_of_padded_prompts(name):
    model, state = make(name)
    generated = generate(model, state, PROMPTS, NEW, temperature=0, length=LENGTHS, chunk_size=4)
    greedy = lambda logits, i, seen: np.argmax(logits)
    expected = np.array([rewritten(name, row, greedy) for row in rows()])
    assert_equal(generated[:2], (expected, np.full(len(PROMPTS), NEW)))
    assert len(pairs(expected)) > len(np.unique(expected[:, :-1])), "each token tells the next"


@pytest.mark.parametrize("name", ["LRU", "Griffin"])
def test_drawn_text_of_padded_prompts(name):
    """Each row has a key of its own, and each token one of the row's."""
    model, state = make(name)
    options = {"temperature": 2.0, "top_k": 5, "top_p": 0.95, "min_p": 0.05}
    options["repetition_penalty"] = 1.5
    key = jr.key(3)
    generated = generate(model, state, PROMPTS, NEW, key=key, length=LENGTHS, **options)
    draw = jax.jit(ft.partial(sample_token, **options))
    for b, row in enumerate(rows()):
        row_key = jr.fold_in(key, b)
        choose = lambda logits, i, seen: draw(logits, jr.fold_in(row_key, i), seen=seen)  # noqa: B023
        assert_equal(generated.tokens[b], rewritten(name, row, choose))
    alone = generate(model, state, rows()[2], NEW, key=jr.fold_in(key, 2), **options)
    assert_equal(alone[:2], (generated.tokens[2], np.array(NEW)))


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_of_the_prompt(chunk_size):
    model, state = make("Griffin")
    draw = lambda size: (
        generate(model, state, PROMPTS, NEW, key=jr.key(0), length=LENGTHS, chunk_size=size).tokens
    )
    assert_equal(draw(chunk_size), draw(512))


def test_blocks_in_a_loop():
    model, state = make("Mamba")
    options = {"key": jr.key(0), "length": LENGTHS}
    expected = generate(model, state, PROMPTS, NEW, **options).tokens
    assert_equal(generate(scan_blocks(model), state, PROMPTS, NEW, **options).tokens, expected)


def test_inside_jit_and_vmap():
    model, state = make("LRU")
    prompts = jnp.asarray(PROMPTS[:, :1])
    keys = jax.vmap(lambda row: jr.fold_in(jr.key(0), row))(jnp.arange(len(prompts)))
    write = lambda prompt, key: generate(model, state, prompt, NEW, key=key).tokens
    texts = jax.jit(jax.vmap(write))(prompts, keys)
    assert_equal(texts, generate(model, state, prompts, NEW, key=jr.key(0)).tokens)


def test_type_of_the_caches():
    """Token by token, with caches that are rounded after each; in the long run it tells."""
    model, state = make("LRU")
    step = eqx.filter_jit(streaming_mode(eqx.nn.inference_mode(model)))
    draw = jax.jit(sample_token)
    key, prompt, text = jr.key(0), PROMPTS[0], []
    stream = inference_state(model, state, dtype=jnp.bfloat16)
    for token in prompt[:-1]:
        _, stream = step(np.array([token]), stream)
    token = prompt[-1]
    for i in range(200):
        logits, stream = step(np.array([token]), stream)
        token = draw(logits[0], jr.fold_in(key, i))
        text.append(int(token))
    write = lambda dtype: (
        generate(model, state, prompt, len(text), key=key, chunk_size=1, dtype=dtype).tokens
    )
    assert_equal(write(jnp.bfloat16), np.array(text))
    assert (write(None) != np.array(text)).any()


# What is drawn


def test_texts_of_a_chain():
    """Pairs of tokens are as likely as the chain says: draws of steps and rows are independent."""
    size, rows = 3, 6000
    table = np.array([[0.0, 1.0, -0.5], [0.7, -1.0, 0.2], [-0.3, 0.4, 0.0]])
    chain = Chain(jnp.asarray(table, float))
    prompts = np.ones((rows, 1), int)
    tokens = generate(chain, eqx.nn.State(chain), prompts, 4, key=jr.key(0)).tokens
    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    first = np.eye(size)[1] @ p
    for step in range(3):
        expected = rows * first[:, None] * p
        counts = np.zeros((size, size))
        np.add.at(counts, (tokens[:, step], tokens[:, step + 1]), 1)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 8 + 3 * np.sqrt(2 * 8)
        first = first @ p


def test_one_key_one_text():
    model, state = make("LRU")
    texts = [
        generate(model, state, PROMPTS[:, :1], NEW, key=jr.key(seed)).tokens for seed in (0, 0, 1)
    ]
    assert_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).sum() > NEW
    assert_equal(texts[0], generate(model, state, PROMPTS[:, :1], NEW, key=jr.PRNGKey(0)).tokens)


@pytest.mark.parametrize("options", [{}, {"batch_size": 5, "max_seqlen": 3, "dtype": jnp.bfloat16}])
@pytest.mark.parametrize("name", ["LRU", "attention"])
def test_streams_that_have_not_begun_are_as_good_as_none(name, options):
    model, state = make(name)
    write = lambda state: generate(model, state, PROMPTS[0], NEW, temperature=0).tokens
    assert_equal(write(inference_state(model, state, **options)), write(state))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("write", [generate, stream_tokens])
@every_model
def test_a_context_is_not_lost_without_a_word(name, write, batch_size):
    model, state = make(name)
    live = streaming_mode(eqx.nn.inference_mode(model))
    stream = inference_state(live, state, batch_size, max_seqlen=9)
    run = live if batch_size is None else jax.vmap(live)
    context = jnp.asarray(PROMPTS[0][:1] if batch_size is None else PROMPTS[:2, :1])
    _, used = eqx.filter_jit(run)(context, stream)
    message = r"must be one that has read nothing, or .*got one with a cache of .*`text.state`"
    with pytest.raises(ValueError, match=message):
        write(model, used, PROMPTS[0], NEW, temperature=0)
    with pytest.raises(ValueError, match=r"or inside `jax.jit` may have"):
        jax.jit(lambda state: generate(model, state, PROMPTS[0], NEW, temperature=0))(stream)


# Where texts end


@pytest.mark.parametrize("stop_tokens", [(5,), (9, 5)])
def test_stop_tokens(stop_tokens):
    model, state = counting(12)
    generated = generate(model, state, [[1], [3], [7]], 6, temperature=0, stop_tokens=stop_tokens)
    last = [8, 9, 9, 9, 9, 9] if 9 in stop_tokens else [8, 9, 10, 11, 0, 1]
    assert_equal(generated.tokens, np.array([[2, 3, 4, 5, 5, 5], [4, 5, 5, 5, 5, 5], last]))
    assert_equal(generated.length, np.array([4, 2, 2 if 9 in stop_tokens else 6]))


def test_a_stop_token_in_the_prompt_ends_nothing():
    model, state = counting(6)
    generated = generate(model, state, [2, 2], 3, temperature=0, stop_tokens=(2, 5))
    assert_equal(generated[:2], (np.array([3, 4, 5]), np.array(3)))


def test_nothing_is_read_in_vain():
    """Neither the padding of all prompts nor what would follow when all texts have ended."""
    read = []
    model, state = counting(20, on_read=lambda tokens: read.append(np.size(tokens)))
    prompts, length = np.zeros((2, 40), int), [3, 5]
    generated = generate(
        model,
        state,
        prompts,
        1000,
        temperature=0,
        length=length,
        chunk_size=3,
        stop_tokens=(4,),
    )
    jax.block_until_ready(generated)
    jax.effects_barrier()
    assert_equal(generated.length, np.array([4, 4]))
    assert read == [3, 3] * 2 + [1, 1] * 4


# Token by token


@pytest.mark.parametrize("name", ["LRU", "Griffin"])
def test_streamed_tokens_are_those_of_the_text(name):
    model, state = make(name)
    options = {"key": jr.key(5), "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2}
    options |= {"length": LENGTHS, "stop_tokens": (0, 4), "chunk_size": 4}
    generated = generate(model, state, PROMPTS, NEW, **options)
    streamed = list(stream_tokens(model, state, PROMPTS, NEW, **options))
    assert len(streamed) == generated.length.max()
    assert len(set(generated.length.tolist())) > 1
    assert_equal(np.stack(streamed, 1), generated.tokens[:, : len(streamed)])


def test_one_streamed_text():
    model, state = counting(9)
    tokens = stream_tokens(model, state, [1, 2], 100, temperature=0, stop_tokens=(6,))
    assert next(tokens).shape == ()
    assert [int(token) for token in tokens] == [4, 5, 6]
    tokens = stream_tokens(model, state, [1, 2], 3, temperature=0)
    assert [int(token) for token in tokens] == [3, 4, 5]


# Compilation


@pytest.mark.parametrize("write", [generate, lambda *args, **kw: list(stream_tokens(*args, **kw))])
def test_new_values_compile_nothing(write):
    traces = []
    model, state = counting(6, on_trace=lambda: traces.append(1))
    first = {"temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5}
    other = {"temperature": 1, "top_k": 3, "top_p": 1, "min_p": 0.0, "repetition_penalty": 0.9}
    run = ft.partial(write, model, state)
    run([[1, 2], [3, 0]], 3, key=jr.key(0), length=[1, 2], stop_tokens=(5,), **first)
    before = len(traces)
    assert before > 0
    run([[2, 2], [0, 1]], 3, key=jr.key(1), length=[2, 2], stop_tokens=(4,), **other)
    assert len(traces) == before
    run([[2, 2], [0, 1]], 3, **other | {"temperature": 0})
    assert len(traces) > before


def test_logits_of_the_prompt_are_not_computed():
    """Of 40 tokens, the compiled code reads 39 together: never as wide as the vocabulary."""
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=113, hidden_dim=WIDTH, num_blocks=1, pattern=(LRU,)
    )
    write = lambda prompt: generate(model, state, prompt, 1, temperature=0).tokens
    text = jax.jit(write).lower(jnp.zeros(40, int)).compile().as_text()
    assert re.search(rf"\b39,{WIDTH}\]", text)
    assert re.search(r"\b1,113\]", text)
    assert not re.search(r"\b39,113\]", text)


# Errors


def bidirectional(in_features, *, key):
    return Bidirectional(*(LRU(in_features, key) for key in jr.split(key)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": []}, r"`prompt` must be whole numbers.*got float64\(0,\).*start of a text"),
        ({"prompt": np.zeros((2, 0), int)}, r"at least one for each text.*\(2, 0\)"),
        ({"prompt": np.zeros((0, 2), int)}, r"at least one for each text.*\(0, 2\)"),
        ({"prompt": [0.0, 1.0]}, r"`prompt` must be whole numbers.*got float64\(2,\)"),
        ({"prompt": 3}, r"`prompt` must be .*\(time,\) or \(batch, time\).*got int64\(\)"),
        ({"prompt": [0, 6]}, r"`prompt` must hold .* in \[0, 6\), .*vocabulary.* from 0 to 6"),
        ({"prompt": [2**32, 2]}, r"`prompt` must hold .* from 2 to 4294967296"),
        ({"prompt": [2**70, 2]}, r"`prompt` must be whole numbers.*got object\(2,\)"),
        ({"prompt": [-1, 2]}, r"`prompt` must hold .* in \[0, 6\), .* from -1 to 2"),
        ({"length": 0}, r"`length` must lie between 1 and .*, 3; got 0"),
        ({"length": 4}, r"`length` must lie between 1 and .*, 3; got 4"),
        ({"length": 2**32 + 1}, r"`length` must lie between 1 and .*, 3; got 4294967297"),
        ({"length": 2.0}, r"`length` must be one whole number per prompt.*got float64\(\)"),
        ({"length": [2, 2]}, r"`length` must be .* of shape \(\); got int64\(2,\)"),
        (
            {"prompt": [[1], [2]], "length": 1},
            r"`length` must be .* of shape \(2,\); got int64\(\)",
        ),
        ({"stop_tokens": (2, 6)}, r"`stop_tokens` must hold .* in \[0, 6\), .* from 2 to 6"),
        ({"stop_tokens": (-1,)}, r"`stop_tokens` must hold .* from -1 to -1"),
        ({"stop_tokens": (0.5,)}, r"`stop_tokens` must hold whole numbers .*got float64"),
        ({"stop_tokens": 3}, r"`stop_tokens` must be a sequence.*got 3.*`stop_tokens=\(0,\)`"),
        ({"max_new_tokens": -1}, r"`max_new_tokens` must be .* at least 0; got -1"),
        ({"max_seqlen": 0}, r"`max_seqlen` must be .* at least 1; got 0"),
        ({"chunk_size": 0}, r"`chunk_size` must be .* at least 1; got 0"),
        ({"temperature": -1.0}, r"`temperature` must be at least 0 and finite; got -1\.0"),
        ({"top_k": 0}, r"`top_k` must be .* at least 1; got 0"),
        ({"top_p": 1.5}, r"`top_p` must be in \(0, 1\]; got 1\.5"),
        ({"min_p": 2.0}, r"`min_p` must be in \[0, 1\]; got 2\.0"),
        ({"repetition_penalty": -1.0}, r"`repetition_penalty` must be positive.*got -1\.0"),
        ({"key": None}, r"needs a `key`.*`temperature=0`"),
    ],
)
@pytest.mark.parametrize("write", [generate, stream_tokens])
def test_what_is_refused(write, options, message):
    model, state = counting(6)
    given = {"prompt": [1, 2, 3], "max_new_tokens": 2, "key": jr.key(0)} | options
    with pytest.raises(ValueError, match=message):
        write(model, state, **given)


@pytest.mark.parametrize("write", [generate, stream_tokens])
def test_what_is_no_key(write):
    with pytest.raises(TypeError, match=r"`key` must be a key, .*; got 3"):
        write(*counting(6), [1], 2, key=3)
    with pytest.raises(ValueError, match=r"`key` must be a single key.*got \(2,\)"):
        write(*counting(6), [[1], [2]], 2, key=jr.split(jr.key(0)))


def test_sizes_of_numpy():
    model, state = counting(6)
    sizes = {"max_new_tokens": np.int64(3), "chunk_size": np.int32(1), "top_k": np.uint8(2)}
    generated = generate(model, state, [1, 2], key=jr.key(0), temperature=1e-9, **sizes)
    assert_equal(generated.tokens, np.array([3, 4, 5]))


def test_padding_may_be_anything():
    model, state = counting(6)
    prompt = [[1, -100, 1000], [1, 2, 3]]
    generated = generate(model, state, prompt, 2, temperature=0, length=[1, 3])
    assert_equal(generated.tokens, np.array([[2, 3], [4, 5]]))


def test_models_that_do_not_write():
    encoder = EmbeddingEncoder(jr.key(0), num_classes=6, out_features=WIDTH)
    pooling = eqx.nn.Sequential([encoder, ClassificationHead(WIDTH, 6, jr.key(1))])
    message = r"`model` must give logits for every token.*got float32\(6,\).*`reduce=False`"
    with pytest.raises(ValueError, match=message):
        generate(pooling, eqx.nn.State(pooling), [1], 2, temperature=0)
    model, state = eqx.nn.make_with_state(LanguageModel)(
        jr.key(0), vocab_size=6, hidden_dim=WIDTH, num_blocks=1, pattern=(bidirectional,)
    )
    with pytest.raises(ValueError, match=r"`Bidirectional` cannot stream"):
        generate(model, state, [1], 2, temperature=0)


@pytest.mark.parametrize("number, first", [(4, True), (65, False), (None, False)])
def test_few_samples_are_multiplied_with_the_weights_first(number, first):
    layer = eqx.nn.Linear(3, 5, key=jr.key(0))
    x = jr.normal(jr.key(1), (4, 1, 3))
    expected = np.asarray(x) @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    run = jax.jit(jax.vmap(lambda x: linear(layer, x)))
    assert_close(run(x), expected)
    with for_samples(number):
        assert ("optimization_barrier" in run.lower(x).as_text()) == first
        assert_close(run(x), expected)
