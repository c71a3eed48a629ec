"""A text as far as it has been read and written."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from discretax._projection import for_samples
from discretax._timeseries import Timeseries, batch_index
from discretax.inference._sampling import Sampling, draw_token, log_probability
from discretax.inference._streaming import inference_state, streaming_layers


class TextState(eqx.Module):
    """Where a text stands: what [`discretax.generate`][] gives back, and takes to go on from.

    Nothing changes it. Going back is going on from an older one; several texts may go on from the
    same one. The state of a batch has one text per row: `state[2]` is that of a row, and
    `state[np.array([2, 2, 0])]` one of three rows.
    """

    caches: eqx.nn.State
    """The model's state after all of the text but its last token."""
    last_token: Int[Array, "*batch"]
    """It is read with the next call."""
    length: Int[Array, "*batch"]
    """Tokens so far, prompts and the last one included."""
    seen: Bool[Array, "*batch vocabulary"]
    """Which tokens the text holds, for the repetition penalty."""
    max_seqlen: int = eqx.field(static=True)
    """How many tokens caches that grow with time have room for."""

    def __getitem__(self, index: Any) -> "TextState":
        if self.length.ndim == 0:
            raise TypeError("an index is for the rows of a batch; got the state of one text.")
        index = batch_index(index, len(self.length))
        return jax.tree.map(lambda leaf: leaf[index], self)


class Past(NamedTuple):
    """Of a [`discretax.TextState`][] what calls compiled for any `max_seqlen` are given."""

    caches: eqx.nn.State
    seen: Bool[Array, "*batch vocabulary"]


class Task(eqx.Module):
    prompt: Int[Array, "batch time"]  # to be read, the last token of the text before included
    length: Int[Array, " batch"]
    read: Int[Array, " batch"]  # tokens that the caches hold already
    keys: PRNGKeyArray | None  # one per row
    sampling: Sampling
    stop_tokens: Int[Array, " stops"]
    vocabulary: int = eqx.field(static=True)
    max_new_tokens: int = eqx.field(static=True)
    chunk_size: int = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    max_seqlen: int | None = eqx.field(static=True)  # None: the caches are there already
    dtype: Any = eqx.field(static=True)


class Text(NamedTuple):
    """One row as far as it has been written; the last token has not yet been read."""

    caches: eqx.nn.State
    token: Int[Array, ""]
    length: Int[Array, ""]
    ended: Bool[Array, ""]
    seen: Bool[Array, " vocabulary"]
    log_p: Float[Array, ""]


def begin(live: PyTree, start: eqx.nn.State | Past, task: Task) -> Text:
    """Reads all valid tokens but the last, whose logits are those of the first new token."""
    batch, time = task.prompt.shape
    caches, seen = past_of_rows(live, start, task)
    valid = jnp.arange(time)[None] < task.length[:, None]
    tokens = jnp.where(valid, task.prompt, task.vocabulary)
    mark = lambda seen, tokens: seen.at[tokens].set(True, mode="drop")
    return Text(
        read_prompts(live, caches, task),
        token=jnp.take_along_axis(task.prompt, task.length[:, None] - 1, axis=1)[:, 0],
        length=jnp.zeros(batch, int),
        ended=jnp.zeros(batch, bool),
        seen=jax.vmap(mark)(seen, tokens),
        log_p=jnp.zeros(batch),
    )


def past_of_rows(live: PyTree, start: eqx.nn.State | Past, task: Task) -> Past:
    """What each row has before it: nothing, one text for all, or a text of its own."""
    batch = len(task.prompt)
    if not isinstance(start, Past):
        assert task.max_seqlen is not None
        caches = inference_state(live, start, batch, task.max_seqlen, task.dtype)
        # Else XLA spends seconds on working out what is done to zeros.
        caches = lax.optimization_barrier(caches)
        return Past(caches, jnp.zeros((batch, task.vocabulary), bool))
    if start.seen.ndim == 2:
        return start
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), start)


def read_prompts(live: PyTree, caches: eqx.nn.State, task: Task) -> eqx.nn.State:
    """The caches of all rows after all valid tokens but the last."""
    prompt, before = task.prompt[:, :-1], task.length - 1
    time = prompt.shape[1]
    if time == 0:
        return caches
    num_chunks = -(-time // task.chunk_size)
    size = -(-time // num_chunks)
    prompt = jnp.pad(prompt, ((0, 0), (0, num_chunks * size - time)))

    def read_chunk(i, caches):
        chunk = lax.dynamic_slice_in_dim(prompt, i * size, size, axis=1)
        return read(live, chunk, jnp.clip(before - i * size, 0, size), caches)[1]

    # No further than the longest prompt reaches, however much padding there is.
    return lax.fori_loop(0, -(-before.max() // size), read_chunk, caches)


def read(
    live: PyTree,
    tokens: Int[Array, "batch time"],
    length: Int[Array, " batch"] | None,
    caches: eqx.nn.State,
) -> tuple[Float[Array, "batch time vocabulary"], eqx.nn.State]:
    with for_samples(tokens.size):
        if length is None:
            return jax.vmap(live)(tokens, caches)
        return jax.vmap(lambda x, length, caches: live(Timeseries(x, length=length), caches))(
            tokens, length, caches
        )


def read_last(live: PyTree, texts: Text, task: Task) -> tuple[Array, eqx.nn.State]:
    """Reads the last token of each text: the logits after it, (batch, vocabulary), and the caches.

    A text that has ended stays where it is."""
    goes_on_alone = task.stop_tokens.size == 0 or len(texts.token) == 1
    length = None if goes_on_alone else jnp.where(texts.ended, 0, 1)
    logits, caches = read(live, texts.token[:, None], length, texts.caches)
    return logits[:, 0], caches


def next_tokens(live: PyTree, texts: Text, task: Task) -> Text:
    logits, caches = read_last(live, texts, task)

    def advance(caches, logits, text: Text, key: PRNGKeyArray | None) -> Text:
        key = None if key is None else jr.fold_in(key, text.length)
        token = draw_token(logits, key, task.sampling, text.seen)
        token = jnp.where(text.ended, text.token, token)
        log_p = jnp.where(text.ended, 0, log_probability(logits, token))
        return written(text, token, task)._replace(caches=caches, log_p=log_p)

    return jax.vmap(advance)(caches, logits, texts, task.keys)


def written(text: Text, token: Int[Array, ""], task: Task) -> Text:
    """With one more token; a text that has ended is given its last one again."""
    return text._replace(
        token=token,
        length=jnp.where(text.ended, text.length, text.length + 1),
        ended=text.ended | jnp.isin(token, task.stop_tokens),
        seen=text.seen.at[token].set(True),
    )


def with_room(model: PyTree, state: TextState, max_seqlen: int) -> eqx.nn.State:
    """The caches, those that grow with time having room for `max_seqlen` tokens.

    What they hold stays at the beginning of an axis that is longer then."""
    if max_seqlen <= state.max_seqlen:
        return state.caches
    batch_size = None if state.length.ndim == 0 else len(state.length)
    return _longer(model, state.caches, batch_size, max_seqlen)


@eqx.filter_jit
def _longer(model, caches, batch_size, max_seqlen):
    def grown(old, new):
        if old.shape == new.shape:
            return old
        return lax.dynamic_update_slice(new.astype(old.dtype), old, (0,) * new.ndim)

    layers = streaming_layers(model)
    where = lambda caches: [caches.get(layer.cache_index) for layer in layers]
    new = [layer.allocate_inference_cache(batch_size, max_seqlen) for layer in layers]
    return eqx.tree_at(where, caches, jax.tree.map(grown, where(caches), new))


def outcome(
    texts: Text, tokens: Int[Array, "batch new"], log_probs: Float[Array, "batch new"], task: Task
) -> tuple:
    """The fields of `Generated` and of its state; what stands behind a text repeats its last token."""
    is_new = jnp.arange(tokens.shape[1])[None] < texts.length[:, None]
    tokens = jnp.where(is_new, tokens, texts.token[:, None])
    rows = tokens, texts.length, jnp.where(is_new, log_probs, 0)
    return (*alone(rows, task), parts(texts, task))


def parts(texts: Text, task: Task) -> tuple:
    """What a `TextState` is made of, but for its `max_seqlen`."""
    length = task.read + task.length + texts.length
    return alone((texts.caches, texts.token, length, texts.seen), task)


def alone(rows: tuple, task: Task) -> tuple:
    """The only row, where the prompt was no batch."""
    return rows if task.batched else jax.tree.map(lambda leaf: leaf[0], rows)
