import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from discretax._features import check_size
from discretax.inference._generate import Generated
from discretax.inference._streaming import live_model
from discretax.inference._task import Reading, checked_task
from discretax.inference._text import (
    Past,
    Task,
    TextState,
    alone,
    begin,
    outcome,
    read_last,
    written,
)


def beam_search(
    model: PyTree,
    state: eqx.nn.State | TextState,
    prompt: Int[Array, "*batch time"],
    max_new_tokens: int,
    *,
    num_beams: int,
    stop_tokens: Sequence[int] = (),
    length: Int[Array, "*batch"] | int | None = None,
    mask: Bool[Array, "*batch time"] | None = None,
    chunk_size: int = 1024,
    max_seqlen: int | None = None,
    dtype: Any = None,
) -> Generated:
    r"""The likeliest texts after a prompt, as far as a beam of `num_beams` finds them.

    After each token, of all ways in which the texts of a beam may go on, those stay whose
    log-probability

    $$\sum_t \log p(\mathrm{token}_t \mid \mathrm{prompt}, \mathrm{token}_{<t})$$

    is largest. A text that has ended keeps its own, and its place as long as no others are likelier.
    With one beam it is the greedy text.

    !!! example

        ```python
        texts = discretax.beam_search(model, state, prompt, 20, num_beams=4, stop_tokens=(end,))
        texts.tokens[0]  # the likeliest; texts.log_probs.sum(-1) falls from text to text
        ```

    **Arguments:** `num_beams`; the others as in [`discretax.generate`][].

    **Returns:** [`discretax.Generated`][], with an axis of beams, the likeliest first, behind that of
    the batch: tokens are `(*batch, num_beams, max_new_tokens)`, and the state has
    `(*batch, num_beams)` texts. To go on from the likeliest of each prompt of a batch,
    `jax.tree.map(lambda leaf: leaf[:, 0], texts.state)`.

    **Raises:** `ValueError` for a `num_beams` below 1, and as [`discretax.generate`][].
    """
    num_beams = check_size("num_beams", num_beams)
    reading = Reading(length, mask, chunk_size, max_seqlen, dtype)
    greedy = (0, None, None, None, None)
    start, task = checked_task(
        model, state, prompt, max_new_tokens, stop_tokens, None, greedy, reading
    )
    *found, after = _search(model, start.given, task, num_beams)
    return Generated(*found, state=TextState(*after, max_seqlen=start.max_seqlen))


@eqx.filter_jit
def _search(model: PyTree, start: eqx.nn.State | Past, task: Task, num_beams: int) -> tuple:
    live = live_model(model)
    batch, size = len(task.prompt), task.max_new_tokens
    texts = _taken(begin(live, start, task), jnp.repeat(jnp.arange(batch), num_beams))
    # All beams of a prompt are the same text yet: it counts once.
    scores = jnp.where(jnp.arange(num_beams) == 0, jnp.zeros((batch, num_beams)), -jnp.inf)

    def going_on(carry):
        step, texts, *_ = carry
        return (step < size) & ~texts.ended.all()

    def advance(carry):
        step, texts, scores, tokens, log_probs = carry
        logits, caches = read_last(live, texts, task)
        log_p = jax.nn.log_softmax(jnp.asarray(logits, float))
        # A text that has ended goes on in one way.
        is_last = jnp.arange(task.vocabulary)[None] == texts.token[:, None]
        log_p = jnp.where(texts.ended[:, None], jnp.where(is_last, 0, -jnp.inf), log_p)
        sums = scores[..., None] + log_p.reshape(batch, num_beams, -1)
        scores, best = lax.top_k(sums.reshape(batch, -1), num_beams)
        best = best.astype(int)
        beam, token = best // task.vocabulary, (best % task.vocabulary).reshape(-1)
        rows = (beam + num_beams * jnp.arange(batch)[:, None]).reshape(-1)
        texts, log_p, tokens, log_probs = _taken(
            (texts._replace(caches=caches), log_p, tokens, log_probs), rows
        )
        log_p = jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
        tokens, log_probs = tokens.at[:, step].set(token), log_probs.at[:, step].set(log_p)
        texts = jax.vmap(written, in_axes=(0, 0, None))(texts, token, task)
        return step + 1, texts, scores, tokens, log_probs

    shape = batch * num_beams, size
    carry = 0, texts, scores, jnp.zeros(shape, int), jnp.zeros(shape)
    if size > 0:
        carry = lax.while_loop(going_on, advance, carry)
    _, texts, _, tokens, log_probs = carry
    length, read = (jnp.repeat(of_prompt, num_beams) for of_prompt in (task.length, task.read))
    of_beams = dataclasses.replace(task, length=length, read=read, batched=True)
    found = outcome(texts, tokens, log_probs, of_beams)
    return alone(
        jax.tree.map(lambda leaf: leaf.reshape(batch, num_beams, *leaf.shape[1:]), found), task
    )


def _taken(rows: Any, index: Int[Array, " rows"]) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], rows)
