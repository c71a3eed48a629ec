"""What is asked of `generate` and `stream_tokens`, checked before anything is compiled."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from discretax._features import check_size
from discretax._stateful import AbstractStreamingLayer
from discretax._timeseries import known
from discretax.inference._sampling import checked_sampling
from discretax.inference._streaming import inference_state, live_model, streaming_layers
from discretax.inference._text import Past, Task, TextState, with_room


class Reading(NamedTuple):
    """How a prompt is read: options of `generate`, as they were given."""

    length: Any
    mask: Any
    chunk_size: Any
    max_seqlen: Any
    dtype: Any


class Start(NamedTuple):
    """Where a model begins, and for how many tokens its caches have room."""

    given: eqx.nn.State | Past
    max_seqlen: int


def checked_task(
    model, state, prompt, max_new_tokens, stop_tokens, key, options, reading: Reading
) -> tuple[Start, Task]:
    """Where to begin and what to do."""
    max_new_tokens = check_size("max_new_tokens", max_new_tokens, least=0)
    chunk_size = check_size("chunk_size", reading.chunk_size)
    if max_new_tokens == 0 and key is None:
        options = (0, *options[1:])  # nothing is drawn
    sampling = checked_sampling(key, *options)
    vocabulary = vocabulary_of(model, state)
    goes_on = isinstance(state, TextState)
    prompt, length = _checked_prompt(prompt, reading, vocabulary, at_least=0 if goes_on else 1)
    start = started(model, state, prompt.shape, max_new_tokens, reading)
    stops = np.asarray(stop_tokens)
    stops = stops if stops.size else stops.astype(int)
    if stops.ndim != 1:
        raise ValueError(
            f"`stop_tokens` must be a sequence of whole numbers; got {stop_tokens!r}. For a single "
            "one: `stop_tokens=(0,)`."
        )
    _check_tokens("stop_tokens", stops, vocabulary)
    if key is not None:
        rows = jnp.arange(len(prompt))
        key = key[None] if prompt.ndim == 1 else jax.vmap(lambda row: jr.fold_in(key, row))(rows)
    tokens, length = jnp.atleast_2d(prompt).astype(int), jnp.atleast_1d(length).astype(int)
    read = jnp.zeros_like(length)
    if isinstance(state, TextState):
        of_rows = lambda array: jnp.broadcast_to(array, length.shape)
        read = of_rows(state.length - 1)
        tokens = jnp.concatenate([of_rows(state.last_token)[:, None], tokens], axis=1)
        length = length + 1
    task = Task(
        tokens,
        length,
        read,
        key,
        sampling,
        jnp.asarray(stops, int),
        vocabulary,
        max_new_tokens,
        chunk_size,
        batched=prompt.ndim == 2,
        max_seqlen=None if goes_on else start.max_seqlen,
        dtype=reading.dtype,
    )
    return start, task


def started(
    model: PyTree, state: Any, shape: tuple[int, ...], max_new_tokens: int, reading: Reading
) -> Start:
    """Where the model begins with a prompt of this shape; its state has been looked at."""
    max_seqlen = _room(state, shape[-1] + max_new_tokens - 1, reading.max_seqlen)
    if not isinstance(state, TextState):
        return Start(state, max_seqlen)
    rows = state.length.shape
    if rows and rows != shape[:-1]:
        raise ValueError(
            f"`prompt` must be (batch, time) with one row for each of the {rows[0]} texts of "
            f"`state`; got {shape}. A row of a state is `state[0]`."
        )
    if reading.dtype is not None:
        raise ValueError(
            "`dtype` is of caches that begin, and those of `state` are there already; got "
            f"{reading.dtype}. Give it to the call that reads the first prompt."
        )
    return Start(Past(with_room(model, state, max_seqlen), state.seen), max_seqlen)


@eqx.filter_jit
def _logits(model: PyTree, state: eqx.nn.State) -> Any:
    live = live_model(model)
    return live(jnp.zeros(2, int), inference_state(live, state, max_seqlen=2))[0]


def vocabulary_of(model: PyTree, state: Any) -> int:
    """By shapes alone; traced once per model, since `_logits` is jitted."""
    _check_state(model, state)
    caches = state.caches if isinstance(state, TextState) else state
    logits = eqx.filter_eval_shape(_logits, model, caches)
    is_array = isinstance(logits, jax.ShapeDtypeStruct)
    received = f"{logits.dtype}{logits.shape}" if is_array else type(logits).__name__
    if not is_array or len(logits.shape) != 2 or logits.shape[0] != 2 or not _is_float(logits):
        raise ValueError(
            "`model` must give logits for every token, floating and (time, vocabulary); for two "
            f"tokens got {received}. Build its head with `reduce=False`."
        )
    return logits.shape[1]


def _check_state(model: PyTree, state: Any) -> None:
    """Caches as they were allocated may be so again; what others hold would be lost."""
    if not isinstance(state, eqx.nn.State | TextState):
        raise TypeError(
            "`state` must be the model's, or the `state` that an earlier call gave back; got "
            f"{type(state).__name__}. After `text = generate(...)` it is `text.state`."
        )
    caches = state.caches if isinstance(state, TextState) else state
    _, places = caches.tree_flatten()
    for layer in streaming_layers(model):
        is_there = layer.cache_index.marker in places
        if isinstance(state, TextState):
            if not is_there:
                raise ValueError(
                    "`state` must be that of a text which this model has read; got one without a "
                    f"cache for its `{type(layer).__name__}`. Read the text with this model: "
                    "`generate(model, model_state, text, 0).state`."
                )
        elif is_there and not _is_empty(layer, state):
            raise ValueError(
                "`state` must be one that has read nothing, or the `state` that an earlier call gave "
                f"back; got one with a cache of `{type(layer).__name__}` that has, or inside "
                "`jax.jit` may have. Let `generate` read it, `text = generate(model, state, tokens, "
                "0)`, and go on from `text.state`; or give the state that came with the model or "
                "`discretax.inference_state(model, state)`."
            )


def _room(state: Any, tokens: int, max_seqlen: Any) -> int:
    """For how many tokens to have room, if the next call adds so many."""
    least = 1 if max_seqlen is None else check_size("max_seqlen", max_seqlen)
    if not isinstance(state, TextState):
        return max(least, tokens)
    lengths = known(state.length)
    if lengths is None:
        return max(least, state.max_seqlen + 1 + tokens)
    return max(least, state.max_seqlen, int(lengths.max()) + tokens)


def _is_empty(layer: AbstractStreamingLayer, state: eqx.nn.State) -> bool:
    cache = state.get(layer.cache_index)
    if cache is None:
        return True
    if any(known(leaf) is None for leaf in jax.tree.leaves(cache)):
        return False

    def is_equal(leaf, empty):
        """The empty one is that of one stream, and of one sample where it grows with time."""
        return bool((leaf == jnp.broadcast_to(empty.astype(leaf.dtype), leaf.shape)).all())

    with jax.ensure_compile_time_eval():
        empty = layer.allocate_inference_cache()
        return all(jax.tree.leaves(jax.tree.map(is_equal, cache, empty)))


def _numbers(values: Any) -> Any:
    """As they are: JAX would wrap those that its whole numbers do not hold."""
    traced = any(isinstance(value, jax.Array) for value in jax.tree.leaves(values))
    return jnp.asarray(values) if traced else np.asarray(values)


def _checked_prompt(
    prompt: Any, reading: Reading, vocabulary: int, at_least: int
) -> tuple[Any, Any]:
    """The tokens, padding on the right, and how many are valid; `at_least` so many."""
    prompt = _numbers(prompt)
    if prompt.dtype.kind in "US":
        raise TypeError(
            f"`prompt` must be tokens, whole numbers; got text, {prompt.dtype}{prompt.shape}. Turn it "
            "into those that the model was trained with, such as by "
            '`tokenizers.Tokenizer.from_file("tokenizer.json").encode(text).ids`.'
        )
    if at_least == 0 and prompt.size == 0 and not isinstance(prompt, jax.Array):
        prompt = prompt.astype(int)
    is_enough = prompt.ndim in (1, 2) and min(prompt.shape[:-1], default=1) > 0
    if not is_enough or prompt.shape[-1] < at_least or not _is_whole(prompt):
        raise ValueError(
            "`prompt` must be whole numbers, (time,) or (batch, time), at least one for each text; "
            f"got {prompt.dtype}{prompt.shape}. With nothing to go on from, begin with the token "
            "that stands for the start of a text."
        )
    if reading.mask is None:
        length = _checked_length(reading.length, prompt, at_least)
    else:
        prompt, length = _gathered(prompt, reading, at_least)
    _check_tokens("prompt", _valid_tokens(prompt, length), vocabulary)
    return prompt, length


def _gathered(prompt: Any, reading: Reading, at_least: int) -> tuple[Any, Any]:
    """The valid tokens before all others, in their order, and their number."""
    if reading.length is not None:
        raise ValueError("`length` and `mask` both say which tokens are valid; give one of them.")
    mask = _numbers(reading.mask)
    if mask.shape != prompt.shape or mask.dtype != bool:
        raise ValueError(
            f"`mask` must be one boolean per token, bool{prompt.shape}; got {mask.dtype}{mask.shape}. "
            "Of zeros and ones, it is `mask == 1`."
        )
    lengths = known(mask.sum(-1))
    if lengths is not None and lengths.min() < at_least:
        raise ValueError(
            f"`mask` must leave at least {at_least} token of each prompt; got lengths of {lengths}."
        )
    is_traced = isinstance(mask, jax.Array) or isinstance(prompt, jax.Array)
    library: Any = jnp if is_traced else np
    order = library.argsort(~mask, axis=-1, stable=True)
    return library.take_along_axis(library.asarray(prompt), order, axis=-1), mask.sum(-1)


def _checked_length(length: Any, prompt: Any, at_least: int) -> Any:
    time, batch = prompt.shape[-1], prompt.shape[:-1]
    length = np.full(batch, time) if length is None else _numbers(length)
    if length.shape != batch or not _is_whole(length):
        raise ValueError(
            f"`length` must be one whole number per prompt, of shape {batch}; got "
            f"{length.dtype}{length.shape}."
        )
    lengths = known(length)
    if lengths is not None and ((lengths < at_least) | (lengths > time)).any():
        raise ValueError(
            f"`length` must lie between {at_least} and the number of tokens, {time}; got {lengths}."
            + (" A text goes on from at least one token." if at_least else "")
        )
    return length


def _valid_tokens(prompt: Any, length: Any) -> np.ndarray | None:
    tokens, lengths = known(prompt), known(length)
    if tokens is None or lengths is None:
        return None
    return tokens[np.arange(prompt.shape[-1]) < lengths[..., None]]


def _check_tokens(name: str, tokens: np.ndarray | None, vocabulary: int) -> None:
    if tokens is None or tokens.size == 0:
        return
    if not _is_whole(tokens) or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"`{name}` must hold whole numbers in [0, {vocabulary}), the model's vocabulary; got "
            f"{tokens.dtype} from {tokens.min()} to {tokens.max()}."
        )


def _is_whole(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
