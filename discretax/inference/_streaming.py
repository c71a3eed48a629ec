from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from discretax._stateful import AbstractStreamingLayer
from discretax.sequence_mixers import AbstractLTIMixer, Discretized

Model = TypeVar("Model", bound=PyTree)


def streaming_mode(model: Model, value: bool = True) -> Model:
    """The model with its layers carrying their caches in the state from call to call.

    The model must be in inference mode when it is called:
    `live = streaming_mode(eqx.nn.inference_mode(model))`. The concatenated outputs of its calls on
    chunks of any lengths, one included, then equal the output on the whole. A head that pools
    answers with what it has seen so far.

    **Arguments:** `model`: any PyTree of layers; `value`: False to go back.
    """
    flags = lambda tree: [layer.streaming for layer in _streaming_layers(tree)]
    return eqx.tree_at(flags, model, replace_fn=lambda _: value) if flags(model) else model


def inference_state(
    model: PyTree,
    state: eqx.nn.State,
    batch_size: int | None = None,
    max_seqlen: int = 1,
    dtype: Any = None,
) -> eqx.nn.State:
    """A state to stream with: the trained statistics, and an empty cache for every layer.

    Call it again to start over, or with another batch size. `state` itself is left as it was.

    **Arguments:**

    - `model`: the model that `state` belongs to.
    - `state`: after training, or one that this function made.
    - `batch_size`: None for one stream, `live(chunk, state)`; a number for as many streams side by
        side, `jax.vmap(live)(chunk, state)`. Every array of the state then has a leading axis.
    - `max_seqlen`: length of the streams, for mixers whose cache grows with time.
    - `dtype`: of the caches; float32 by default.

    **Raises:**

    `ValueError` if a layer cannot stream, or `batch_size` is below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be None (one stream) or at least 1; got {batch_size}.")
    layers = _streaming_layers(model)
    if _is_batched(layers, state):
        state = jax.tree.map(lambda leaf: leaf[0], state)
    if batch_size is not None:
        state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *leaf.shape)), state)
    caches = [layer.allocate_inference_cache(batch_size, max_seqlen, dtype) for layer in layers]
    # `State.set` holds new values to the shapes of the old ones; here they are meant to differ.
    return eqx.tree_at(
        lambda s: [s.get(layer.cache_index) for layer in layers],
        state,
        caches,
        is_leaf=lambda leaf: leaf is None,
    )


def discretized(model: Model) -> Model:
    """The model with the discrete matrices of its LTI mixers computed once, for fast stepping.

    Outputs stay the same. It is for inference: the matrices no longer follow the parameters.
    """
    is_lti = lambda node: isinstance(node, AbstractLTIMixer)

    def precompute(node):
        return Discretized(node) if is_lti(node) and not isinstance(node, Discretized) else node

    return jax.tree.map(precompute, model, is_leaf=is_lti)


def _streaming_layers(tree: PyTree) -> list[AbstractStreamingLayer]:
    is_layer = lambda node: isinstance(node, AbstractStreamingLayer)
    return [node for node in jax.tree.leaves(tree, is_leaf=is_layer) if is_layer(node)]


def _is_batched(layers: list[AbstractStreamingLayer], state: eqx.nn.State) -> bool:
    for layer in layers:
        cache = jax.tree.leaves(state.get(layer.cache_index))
        if cache:
            return cache[0].ndim > jax.tree.leaves(layer.allocate_inference_cache())[0].ndim
    return False
