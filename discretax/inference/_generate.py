from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from discretax._timeseries import Timeseries
from discretax.inference._sampling import draw_token
from discretax.inference._streaming import inference_state, live_model
from discretax.inference._task import Task, checked_task


class Generated(NamedTuple):
    """New tokens, the prompt left out, and how many of them there are.

    `tokens` are `(max_new_tokens,)` or `(batch, max_new_tokens)`, `length` is `()` or `(batch,)`.
    The stop token that ends a text counts; what stands after it repeats it.
    """

    tokens: Int[Array, "*batch new"]
    length: Int[Array, "*batch"]


def generate(
    model: PyTree,
    state: eqx.nn.State,
    prompt: Int[Array, "*batch time"],
    max_new_tokens: int,
    *,
    key: PRNGKeyArray | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float | None = None,
    min_p: Float[Array, ""] | float | None = None,
    repetition_penalty: Float[Array, ""] | float | None = None,
    stop_tokens: Sequence[int] = (),
    length: Int[Array, "*batch"] | int | None = None,
    chunk_size: int = 512,
    dtype: Any = None,
) -> Generated:
    """The text that a language model writes after a prompt.

    The prompt is read in chunks, each in parallel; the text is written token by token in one
    compiled loop, which ends when every row has. Other values of the arrays and of the sampling
    options compile nothing anew, as long as shapes stay; that `temperature` is 0 or an option is
    None does count.

    The text of row `b` is what `prompt[b]` alone gives with the key `jax.random.fold_in(key, b)`,
    to rounding, whatever stands in the other rows.

    **Arguments:**

    - `model`: `(tokens, state) -> (logits, state)`, from `(time,)` to `(time, vocabulary)`, and
        from a [`discretax.Timeseries`][] as well. Inference and streaming mode are switched on here.
    - `state`: the model's, after training or made for streams of any number that have not begun.
    - `prompt`: whole numbers, `(time,)` or `(batch, time)`.
    - `max_new_tokens`: how many tokens to write at most.
    - `key`: needed unless `temperature` is 0.
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: as in
        [`discretax.sample_token`][]. The penalty is for the tokens of the prompt and the text.
    - `stop_tokens`: those after which a text ends.
    - `length`: how many tokens of each prompt are valid, `()` or `(batch,)`; padding stands on the
        right. None: all of them.
    - `chunk_size`: the most tokens of a prompt to read at once; the memory for reading grows with
        it.
    - `dtype`: of the caches, as in [`discretax.inference_state`][].

    **Returns:** [`discretax.Generated`][]: the new tokens and their number.

    **Raises:**

    `ValueError` for a prompt that is empty or holds tokens outside of the vocabulary, a length or
    a sampling option out of range, a missing key, a state that has read a context, and a model that
    cannot stream or does not give logits for every token; `TypeError` for a `key` that is none.
    """
    options = (temperature, top_k, top_p, min_p, repetition_penalty)
    task = checked_task(
        model, state, prompt, max_new_tokens, key, options, stop_tokens, length, chunk_size, dtype
    )
    generated = _write(model, state, task)
    return generated if np.ndim(prompt) == 2 else jax.tree.map(lambda leaf: leaf[0], generated)


def stream_tokens(
    model: PyTree,
    state: eqx.nn.State,
    prompt: Int[Array, "*batch time"],
    max_new_tokens: int,
    *,
    key: PRNGKeyArray | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float | None = None,
    min_p: Float[Array, ""] | float | None = None,
    repetition_penalty: Float[Array, ""] | float | None = None,
    stop_tokens: Sequence[int] = (),
    length: Int[Array, "*batch"] | int | None = None,
    chunk_size: int = 512,
    dtype: Any = None,
) -> Iterator[Int[Array, "*batch"]]:
    """The tokens of [`discretax.generate`][] one by one, each as soon as it is known.

    Slower than `generate` by one call from Python per token. A model that is
    [`discretax.discretized`][] does not compute its discrete matrices anew for each.

    **Arguments:** those of [`discretax.generate`][].

    **Returns:** an iterator over tokens, `()` or `(batch,)`. It ends when every row has ended; a
    row that ends before the others goes on giving its stop token.

    **Raises:** as `generate`, before the first token is asked for.
    """
    options = (temperature, top_k, top_p, min_p, repetition_penalty)
    task = checked_task(
        model, state, prompt, max_new_tokens, key, options, stop_tokens, length, chunk_size, dtype
    )
    return _written_one_by_one(model, state, task, batched=np.ndim(prompt) == 2)


class _Text(NamedTuple):
    """One row as far as it has been written; the last token has not yet been read."""

    state: eqx.nn.State
    token: Int[Array, ""]
    length: Int[Array, ""]
    ended: Bool[Array, ""]
    seen: Bool[Array, " vocabulary"] | None


@eqx.filter_jit
def _write(model: PyTree, state: eqx.nn.State, task: Task) -> Generated:
    live = live_model(model)

    def going_on(carry):
        step, texts, _ = carry
        return (step < task.max_new_tokens) & ~texts.ended.all()

    def advance(carry):
        step, texts, tokens = carry
        texts = _next_tokens(live, texts, task)
        return step + 1, texts, tokens.at[step].set(texts.token)

    start = _read_prompts(live, state, task)
    tokens = jnp.zeros((task.max_new_tokens, len(task.prompt)), int)
    _, texts, tokens = lax.while_loop(going_on, advance, (0, start, tokens))
    written = jnp.arange(task.max_new_tokens)[None] < texts.length[:, None]
    return Generated(jnp.where(written, tokens.T, texts.token[:, None]), texts.length)


def _read_prompts(live: PyTree, state: eqx.nn.State, task: Task) -> _Text:
    """Reads all valid tokens but the last, whose logits are those of the first new token."""
    prompt, before = task.prompt[:, :-1], task.length - 1
    batch, time = prompt.shape
    state = inference_state(live, state, batch, time + 1 + task.max_new_tokens, task.dtype)
    if time > 0:
        num_chunks = -(-time // task.chunk_size)
        size = -(-time // num_chunks)
        prompt = jnp.pad(prompt, ((0, 0), (0, num_chunks * size - time)))

        def read(tokens, length, state):
            return live(Timeseries(tokens, length=length), state)[1]

        def read_chunk(i, state):
            chunk = lax.dynamic_slice_in_dim(prompt, i * size, size, axis=1)
            return jax.vmap(read)(chunk, jnp.clip(before - i * size, 0, size), state)

        # No further than the longest prompt reaches, however much padding there is.
        state = lax.fori_loop(0, -(-before.max() // size), read_chunk, state)
    seen = None
    if task.sampling.repetition_penalty is not None:
        valid = jnp.arange(time + 1)[None] < task.length[:, None]
        tokens = jnp.where(valid, task.prompt, task.vocabulary)
        mark = lambda tokens: jnp.zeros(task.vocabulary, bool).at[tokens].set(True, mode="drop")
        seen = jax.vmap(mark)(tokens)
    return _Text(
        state,
        token=jnp.take_along_axis(task.prompt, before[:, None], axis=1)[:, 0],
        length=jnp.zeros(batch, int),
        ended=jnp.zeros(batch, bool),
        seen=seen,
    )


def _next_tokens(live: PyTree, texts: _Text, task: Task) -> _Text:
    def advance(text: _Text, key: PRNGKeyArray | None) -> _Text:
        logits, state = live(text.token[None], text.state)
        key = None if key is None else jr.fold_in(key, text.length)
        token = draw_token(logits[0], key, task.sampling, text.seen)
        token = jnp.where(text.ended, text.token, token)
        return _Text(
            state,
            token,
            length=jnp.where(text.ended, text.length, text.length + 1),
            ended=text.ended | jnp.isin(token, task.stop_tokens),
            seen=None if text.seen is None else text.seen.at[token].set(True),
        )

    return jax.vmap(advance)(texts, task.keys)


@eqx.filter_jit
def _begin(model: PyTree, state: eqx.nn.State, task: Task) -> _Text:
    return _read_prompts(live_model(model), state, task)


@eqx.filter_jit
def _advance(model: PyTree, texts: _Text, task: Task) -> _Text:
    return _next_tokens(live_model(model), texts, task)


def _written_one_by_one(
    model: PyTree, state: eqx.nn.State, task: Task, batched: bool
) -> Iterator[Int[Array, "*batch"]]:
    texts = _begin(model, state, task)
    for _ in range(task.max_new_tokens):
        texts = _advance(model, texts, task)
        yield texts.token if batched else texts.token[0]
        if texts.ended.all():
            return
