from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from discretax._features import check_size
from discretax.inference._speculative import checked_draft, write_with_draft
from discretax.inference._streaming import live_model
from discretax.inference._task import Reading, Start, checked_task
from discretax.inference._text import (
    Past,
    Task,
    Text,
    TextState,
    begin,
    next_tokens,
    outcome,
    parts,
)


class Generated(NamedTuple):
    """New tokens, the prompt left out, how many of them there are, and where the text stands.

    `tokens` and `log_probs` are `(max_new_tokens,)` or `(batch, max_new_tokens)`, `length` is `()`
    or `(batch,)`. The stop token that ends a text counts; what stands after it repeats it, with a
    log-probability of zero. `log_probs` are those of the model's logits, before penalty, temperature
    and other options: their sum is the log-probability of the text. `state` is a
    [`discretax.TextState`][], to go on from; `draft_state` is that of the draft's model, if there is
    one.
    """

    tokens: Int[Array, "*batch new"]
    length: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    state: TextState
    draft_state: TextState | None = None


def generate(
    model: PyTree,
    state: eqx.nn.State | TextState,
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
    mask: Bool[Array, "*batch time"] | None = None,
    chunk_size: int = 1024,
    max_seqlen: int | None = None,
    dtype: Any = None,
    draft: tuple[PyTree, eqx.nn.State | TextState] | None = None,
    ahead: int = 4,
) -> Generated:
    """The text that a language model writes after a prompt.

    The prompt is read in chunks, each in parallel; the text is written token by token in one
    compiled loop, which ends when every row has. Other values of the arrays and of the sampling
    options compile nothing anew, as long as shapes stay; that `temperature` is 0 or an option is
    None does count.

    The text of row `b` is what `prompt[b]` alone gives with the key `jax.random.fold_in(key, b)`,
    to rounding, whatever stands in the other rows.

    The `state` that comes back is that of the whole text. With it in the place of the model's, the
    text goes on: with what is said next as the `prompt`, of which nothing needs to be there.

    !!! example

        ```python
        first = discretax.generate(model, state, question, 100, temperature=0)
        second = discretax.generate(model, first.state, next_question, 100, temperature=0)
        other = discretax.generate(model, first.state, another_question, 100, temperature=0)
        ```

    With a `draft`, the text is the same, and may be there sooner. The smaller model writes `ahead`
    tokens; the model reads them in parallel, and as many count as it would have written itself,
    and then its own next one. Drawing at random, both are given the same noise, so that the same key
    gives the text that it gives without a draft, as far as rounding lets it. It pays where reading
    some tokens takes hardly longer than reading one, and the two models mostly agree.

    ??? cite

        Drafts: Leviathan et al., Fast Inference from Transformers via Speculative Decoding
        (arXiv:2211.17192). The same noise for both: Daliri et al., Coupling without Communication
        and Drafter-Invariant Speculative Decoding (arXiv:2408.07978).

    **Arguments:**

    - `model`: `(tokens, state) -> (logits, state)`, from `(time,)` to `(time, vocabulary)`, and
        from a [`discretax.Timeseries`][] as well. Inference and streaming mode are switched on here.
    - `state`: the model's, after training or made for streams of any number that have not begun; or
        a [`discretax.TextState`][], to go on from: that of one text, for all rows, or one text per
        row.
    - `prompt`: whole numbers, `(time,)` or `(batch, time)`.
    - `max_new_tokens`: how many tokens to write at most. With 0 the prompt is read, to go on from.
    - `key`: needed unless `temperature` is 0. Each call wants another.
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: as in
        [`discretax.sample_token`][]. The penalty is for the tokens of the whole text, prompts and
        what a `TextState` has read included.
    - `stop_tokens`: those after which a text ends.
    - `length`: how many tokens of each prompt are valid, `()` or `(batch,)`; padding stands on the
        right. None: all of them.
    - `mask`: in the place of `length`, which tokens of each prompt are valid, wherever padding
        stands.
    - `chunk_size`: the most tokens of a prompt to read at once; the memory for reading grows with
        it.
    - `max_seqlen`: how many tokens, of all calls that go on from here, caches that grow with time
        have room for, so that later calls need not copy them and compile anew. At least what this
        call needs. Other caches are of the same size always.
    - `dtype`: of the caches, as in [`discretax.inference_state`][].
    - `draft`: a smaller model of the same vocabulary and its state, `(model, state)`, which writes
        ahead. Where the prompt goes on from a `TextState`, its state is `draft_state` of that call.
    - `ahead`: how many tokens it writes before the model reads them.

    **Returns:** [`discretax.Generated`][]: the new tokens, their number, their log-probabilities and
    the state.

    **Raises:**

    `ValueError` for a prompt that is empty or holds tokens outside of the vocabulary, a length or
    a sampling option out of range, a missing key, a stream's state that has read a context, a
    `TextState` of another model or number of rows, a text longer than the positions that a model has
    learned, a model that cannot stream or does not give logits for every token, and a draft of
    another vocabulary, or which has read something else; `TypeError` for a `key`, a `state` or a
    `draft` that is none, and for a text that is no tokens yet.
    """
    options = (temperature, top_k, top_p, min_p, repetition_penalty)
    reading = Reading(length, mask, chunk_size, max_seqlen, dtype)
    start, task = checked_task(
        model, state, prompt, max_new_tokens, stop_tokens, key, options, reading
    )
    if draft is None:
        *generated, after = _write(model, start.given, task)
        return Generated(*generated, state=TextState(*after, max_seqlen=start.max_seqlen))
    draft_model, draft_start = checked_draft(draft, state, prompt, task, reading)
    *generated, after, draft_after = write_with_draft(
        model, start.given, draft_model, draft_start.given, task, check_size("ahead", ahead)
    )
    return Generated(
        *generated,
        state=TextState(*after, max_seqlen=start.max_seqlen),
        draft_state=TextState(*draft_after, max_seqlen=draft_start.max_seqlen),
    )


def stream_tokens(
    model: PyTree,
    state: eqx.nn.State | TextState,
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
    mask: Bool[Array, "*batch time"] | None = None,
    chunk_size: int = 1024,
    max_seqlen: int | None = None,
    dtype: Any = None,
) -> "TokenStream":
    """The tokens of [`discretax.generate`][] one by one, each as soon as it is known.

    Slower than `generate` by one call from Python per token. A model that is
    [`discretax.discretized`][] does not compute its discrete matrices anew for each.

    **Arguments:** those of [`discretax.generate`][].

    **Returns:** a [`discretax.TokenStream`][], an iterator over tokens, `()` or `(batch,)`. It ends
    when every row has ended; a row that ends before the others goes on giving its stop token. Its
    `state` is that of the text so far.

    **Raises:** as `generate`, before the first token is asked for.
    """
    options = (temperature, top_k, top_p, min_p, repetition_penalty)
    reading = Reading(length, mask, chunk_size, max_seqlen, dtype)
    start, task = checked_task(
        model, state, prompt, max_new_tokens, stop_tokens, key, options, reading
    )
    return TokenStream(model, start, task)


class TokenStream(Iterator[Int[Array, "*batch"]]):
    """The tokens of a text, one after the other; made by [`discretax.stream_tokens`][].

    !!! example

        ```python
        tokens = discretax.stream_tokens(model, state, prompt, 1000, temperature=0)
        for token in tokens:
            print(decode(token))
            if interrupted():
                break
        answer = discretax.stream_tokens(model, tokens.state, remark, 1000, temperature=0)
        ```
    """

    def __init__(self, model: PyTree, start: Start, task: Task):
        self._model, self._start, self._task = model, start, task
        self._texts: Text | None = None
        self._count = 0

    def __next__(self) -> Int[Array, "*batch"]:
        texts = self._so_far()
        if self._count == self._task.max_new_tokens or texts.ended.all():
            raise StopIteration
        self._texts = texts = _advance(self._model, texts, self._task)
        self._count += 1
        return texts.token if self._task.batched else texts.token[0]

    @property
    def state(self) -> TextState:
        """Where the text stands after the tokens that have been given so far."""
        return TextState(*_parts(self._so_far(), self._task), max_seqlen=self._start.max_seqlen)

    def _so_far(self) -> Text:
        if self._texts is None:
            self._texts = _begin(self._model, self._start.given, self._task)
        return self._texts


@eqx.filter_jit
def _write(model: PyTree, start: eqx.nn.State | Past, task: Task) -> tuple:
    live = live_model(model)

    def going_on(carry):
        step, texts, *_ = carry
        return (step < task.max_new_tokens) & ~texts.ended.all()

    def advance(carry):
        step, texts, tokens, log_probs = carry
        texts = next_tokens(live, texts, task)
        tokens, log_probs = tokens.at[step].set(texts.token), log_probs.at[step].set(texts.log_p)
        return step + 1, texts, tokens, log_probs

    texts = begin(live, start, task)
    shape = task.max_new_tokens, len(task.prompt)
    carry = 0, texts, jnp.zeros(shape, int), jnp.zeros(shape)
    if task.max_new_tokens > 0:
        carry = lax.while_loop(going_on, advance, carry)
    _, texts, tokens, log_probs = carry
    return outcome(texts, tokens.T, log_probs.T, task)


@eqx.filter_jit
def _begin(model: PyTree, start: eqx.nn.State | Past, task: Task) -> Text:
    return begin(live_model(model), start, task)


@eqx.filter_jit
def _advance(model: PyTree, texts: Text, task: Task) -> Text:
    return next_tokens(live_model(model), texts, task)


_parts = eqx.filter_jit(parts)
