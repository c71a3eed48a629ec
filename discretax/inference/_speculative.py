"""A small model writes ahead, and the large one reads all at once what it has written."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from discretax._timeseries import known
from discretax.inference._sampling import draw_token, log_probability
from discretax.inference._streaming import live_model
from discretax.inference._task import Reading, Start, started, vocabulary_of
from discretax.inference._text import (
    Past,
    Task,
    Text,
    TextState,
    begin,
    outcome,
    parts,
    past_of_rows,
    read,
    read_prompts,
)


class _Verdict(NamedTuple):
    """What the model writes where the draft stands, and how much of it counts."""

    tokens: Int[Array, " ahead+1"]
    log_probs: Float[Array, " ahead+1"]
    kept: Int[Array, ""]


def checked_draft(
    draft: Any, state: Any, prompt: Any, task: Task, reading: Reading
) -> tuple[PyTree, Start]:
    """The draft's model, and where it begins: where `state` does."""
    if not isinstance(draft, tuple) or len(draft) != 2:
        raise TypeError(
            "`draft` must be a model and its state, `draft=(small_model, small_state)`; got "
            f"{type(draft).__name__}."
        )
    model, draft_state = draft
    vocabulary = vocabulary_of(model, draft_state)
    if vocabulary != task.vocabulary:
        raise ValueError(
            f"the draft must have the model's vocabulary, {task.vocabulary}; got {vocabulary}."
        )
    _check_same_text(state, draft_state)
    return model, started(model, draft_state, np.shape(prompt), task.max_new_tokens, reading)


def _check_same_text(state: Any, draft_state: Any) -> None:
    both = [s for s in (state, draft_state) if isinstance(s, TextState)]
    if not both:
        return
    same = len(both) == 2
    for name in ("length", "last_token") if same else ():
        expected, received = (known(getattr(s, name)) for s in both)
        if expected is not None and received is not None:
            same &= np.array_equal(expected, received)
    if not same:
        raise ValueError(
            "the draft must have read what `state` has; got another text. Take both states from one "
            "call, `text.state` and `text.draft_state`."
        )


@eqx.filter_jit
def write_with_draft(
    model: PyTree,
    start: eqx.nn.State | Past,
    draft: PyTree,
    draft_start: eqx.nn.State | Past,
    task: Task,
    ahead: int,
) -> tuple:
    """As `generate` without a draft, and what the draft's state is made of."""
    live, live_draft = live_model(model), live_model(draft)

    def going_on(carry):
        texts = carry[0]
        return (~texts.ended & (texts.length < task.max_new_tokens)).any()

    def advance(carry):
        texts, draft_caches, tokens, log_probs = carry
        left = jnp.where(texts.ended, 0, task.max_new_tokens - texts.length)
        reads = jnp.minimum(left, ahead + 1)  # what cannot be kept has no room in the caches
        drafts = _drafts(live_draft, draft_caches, texts, reads, task, ahead)
        chunk = jnp.concatenate([texts.token[:, None], drafts], axis=1)
        logits, caches = read(live, chunk, reads, texts.caches)
        verdict = jax.vmap(_verdict, in_axes=(0, 0, 0, 0, 0, None))(
            logits, chunk, reads, texts, task.keys, task
        )
        # No state goes back: where a draft was refused, what counts of it is read once more.
        again = lambda: read(live, chunk, verdict.kept, texts.caches)[1]
        caches = lax.cond((verdict.kept == reads).all(), lambda: caches, again)
        draft_caches = read(live_draft, chunk, verdict.kept, draft_caches)[1]
        write = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))
        tokens = write(tokens, verdict.tokens, texts.length)
        log_probs = write(log_probs, verdict.log_probs, texts.length)
        texts = jax.vmap(_after, in_axes=(0, 0, None))(texts, verdict, task)
        return texts._replace(caches=caches), draft_caches, tokens, log_probs

    texts = begin(live, start, task)
    draft_caches = past_of_rows(live_draft, draft_start, task).caches
    draft_caches = read_prompts(live_draft, draft_caches, task)
    shape = len(task.prompt), task.max_new_tokens + ahead + 1
    carry = texts, draft_caches, jnp.zeros(shape, int), jnp.zeros(shape)
    if task.max_new_tokens > 0:
        carry = lax.while_loop(going_on, advance, carry)
    texts, draft_caches, tokens, log_probs = carry
    tokens, log_probs = tokens[:, : task.max_new_tokens], log_probs[:, : task.max_new_tokens]
    draft_parts = parts(texts._replace(caches=draft_caches), task)
    return *outcome(texts, tokens, log_probs, task), draft_parts


def _drafts(
    live: PyTree,
    caches: eqx.nn.State,
    texts: Text,
    reads: Int[Array, " batch"],
    task: Task,
    ahead: int,
) -> Int[Array, "batch ahead"]:
    """What the small model writes, each token by the noise that the large one will have for it."""

    def draw(logits, key, length, seen):
        key = None if key is None else jr.fold_in(key, length)
        token = draw_token(logits, key, task.sampling, seen)
        return token, seen.at[token].set(True)

    def advance(carry, i):
        caches, token, seen = carry
        logits, caches = read(live, token[:, None], (i < reads).astype(int), caches)
        token, seen = jax.vmap(draw)(logits[:, 0], task.keys, texts.length + i, seen)
        return (caches, token, seen), token

    start = caches, texts.token, texts.seen
    return lax.scan(advance, start, jnp.arange(ahead))[1].T


def _verdict(
    logits: Float[Array, "ahead+1 vocabulary"],
    chunk: Int[Array, " ahead+1"],
    reads: Int[Array, ""],
    text: Text,
    key: PRNGKeyArray | None,
    task: Task,
) -> _Verdict:
    count = len(chunk)

    def draw(i, logits, seen):
        return draw_token(
            logits, None if key is None else jr.fold_in(key, text.length + i), task.sampling, seen
        )

    marks = jax.nn.one_hot(chunk, task.vocabulary, dtype=int)
    seen = text.seen[None] | (jnp.cumsum(marks, axis=0) > 0)
    tokens = jax.vmap(draw)(jnp.arange(count), logits, seen)
    agreed = jnp.cumprod((tokens[:-1] == chunk[1:]).astype(int)).sum()
    stops = jnp.isin(tokens, task.stop_tokens)
    to_stop = jnp.where(stops.any(), jnp.argmax(stops) + 1, count)
    kept = jnp.minimum(jnp.minimum(agreed + 1, to_stop), reads)
    return _Verdict(tokens, jax.vmap(log_probability)(logits, tokens), kept)


def _after(text: Text, verdict: _Verdict, task: Task) -> Text:
    kept = jnp.arange(len(verdict.tokens)) < verdict.kept
    token = jnp.where(verdict.kept > 0, verdict.tokens[verdict.kept - 1], text.token)
    tokens = jnp.where(kept, verdict.tokens, task.vocabulary)
    return text._replace(
        token=token,
        length=text.length + verdict.kept,
        ended=text.ended | (kept & jnp.isin(verdict.tokens, task.stop_tokens)).any(),
        seen=text.seen.at[tokens].set(True, mode="drop"),
    )
