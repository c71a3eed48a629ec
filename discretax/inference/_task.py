"""What is asked of `generate` and `stream_tokens`, checked before anything is compiled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from discretax._features import check_size
from discretax._stateful import AbstractStreamingLayer
from discretax._timeseries import known
from discretax.inference._sampling import Sampling, checked_sampling
from discretax.inference._streaming import inference_state, live_model, streaming_layers


class Task(eqx.Module):
    prompt: Int[Array, "batch time"]
    length: Int[Array, " batch"]
    keys: PRNGKeyArray | None  # one per row
    sampling: Sampling
    stop_tokens: Int[Array, " stops"]
    vocabulary: int = eqx.field(static=True)
    max_new_tokens: int = eqx.field(static=True)
    chunk_size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)


def checked_task(
    model, state, prompt, max_new_tokens, key, options, stop_tokens, length, chunk_size, dtype
) -> Task:
    max_new_tokens = check_size("max_new_tokens", max_new_tokens)
    chunk_size = check_size("chunk_size", chunk_size)
    sampling = checked_sampling(key, *options)
    _refuse_used(model, state)
    prompt = _numbers(prompt)
    if prompt.ndim not in (1, 2) or prompt.size == 0 or not _is_whole(prompt):
        raise ValueError(
            "`prompt` must be whole numbers, (time,) or (batch, time), at least one for each text; "
            f"got {prompt.dtype}{prompt.shape}. With nothing to go on from, begin with the token "
            "that stands for the start of a text."
        )
    vocabulary = _vocabulary(model, state)
    length = _checked_length(length, prompt)
    _check_tokens("prompt", _valid_tokens(prompt, length), vocabulary)
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
    return Task(
        jnp.atleast_2d(prompt).astype(int),
        jnp.atleast_1d(length).astype(int),
        key,
        sampling,
        jnp.asarray(stops, int),
        vocabulary,
        max_new_tokens,
        chunk_size,
        dtype,
    )


@eqx.filter_jit
def _logits(model: PyTree, state: eqx.nn.State) -> Any:
    live = live_model(model)
    return live(jnp.zeros(2, int), inference_state(live, state, max_seqlen=2))[0]


def _vocabulary(model: PyTree, state: eqx.nn.State) -> int:
    """By shapes alone; traced once per model, since `_logits` is jitted."""
    logits = eqx.filter_eval_shape(_logits, model, state)
    is_array = isinstance(logits, jax.ShapeDtypeStruct)
    received = f"{logits.dtype}{logits.shape}" if is_array else type(logits).__name__
    if not is_array or len(logits.shape) != 2 or logits.shape[0] != 2 or not _is_float(logits):
        raise ValueError(
            "`model` must give logits for every token, floating and (time, vocabulary); for two "
            f"tokens got {received}. Build its head with `reduce=False`."
        )
    return logits.shape[1]


def _refuse_used(model: PyTree, state: eqx.nn.State) -> None:
    """Caches as they were allocated may be so again; what others hold would be lost."""
    _, places = state.tree_flatten()
    for layer in streaming_layers(model):
        if layer.cache_index.marker in places and not _is_empty(layer, state):
            raise ValueError(
                "`state` must be one that has read nothing, since a text begins with its `prompt`; "
                f"got one with a cache of `{type(layer).__name__}` that has, or inside `jax.jit` may "
                "have. Put what it has read before the prompt, and give the state that came with "
                "the model or `discretax.inference_state(model, state)`."
            )


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


def _checked_length(length: Any, prompt: Array) -> Array:
    time, batch = prompt.shape[-1], prompt.shape[:-1]
    length = np.full(batch, time) if length is None else _numbers(length)
    if length.shape != batch or not _is_whole(length):
        raise ValueError(
            f"`length` must be one whole number per prompt, of shape {batch}; got "
            f"{length.dtype}{length.shape}."
        )
    lengths = known(length)
    if lengths is not None and ((lengths < 1) | (lengths > time)).any():
        raise ValueError(
            f"`length` must lie between 1 and the number of tokens, {time}; got {lengths}. A text "
            "goes on from at least one token."
        )
    return length


def _valid_tokens(prompt: Array, length: Array) -> np.ndarray | None:
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
