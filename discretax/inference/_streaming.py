from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from discretax._ensembles import check_one_member
from discretax._features import check_size
from discretax._stateful import AbstractStreamingLayer, found, found_within
from discretax.blocks import BatchNorm
from discretax.encoder import EmbeddingEncoder
from discretax.sequence_mixers import AbstractLTIMixer, AbstractSequenceMixer, Discretized

Model = TypeVar("Model", bound=PyTree)


def streaming_mode(model: Model, value: bool = True) -> Model:
    """The model with its layers carrying their caches in the state from call to call.

    `live = streaming_mode(eqx.nn.inference_mode(model))`. The concatenated outputs of its calls on
    chunks of any lengths, one included, then equal the output on the whole. A head that pools
    answers with what it has seen so far. To call such a model from Python, [`discretax.live`][] is
    the faster way.

    A model in training mode streams as well, but for batch norm and dropout, which refuse: what they
    do to a chunk is not a part of what they do to the whole.

    **Arguments:** `model`: any PyTree of layers; `value`: False to go back.
    """
    kinds = AbstractStreamingLayer | BatchNorm | EmbeddingEncoder
    flags = lambda tree: [layer.streaming for layer in found_within(tree, kinds).values()]
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

    `ValueError` if a layer cannot stream, `batch_size` or `max_seqlen` is below 1, two layers
    keep their caches in one place, or the state is that of another model; `TypeError` for anything but a state.
    """
    if not isinstance(state, eqx.nn.State):
        raise TypeError(
            "`inference_state(model, state)` takes the model first, then its state; got "
            f"{type(model).__name__}, then {type(state).__name__}. A model's first state comes with "
            "it from `eqx.nn.make_with_state(Model)(...)`."
        )
    if batch_size is not None:
        batch_size = check_size("batch_size", batch_size)
    max_seqlen = check_size("max_seqlen", max_seqlen)
    for mixer in found(model, AbstractSequenceMixer).values():
        check_one_member(mixer, "eqx.filter_vmap(discretax.inference_state)(models, states)")
    layers = streaming_layers(model)
    _check_caches_apart(model)
    if _is_batched(layers, state):
        state = jax.tree.map(lambda leaf: leaf[0], state)
    state = _completed(model, layers, state)
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

    Outputs stay the same. It is for inference: the matrices no longer follow the parameters. What
    is no LTI mixer stays as it is, so that one code serves every model: without any, the model comes
    back as it was.

    **Arguments:** `model`: any PyTree of layers.

    **Raises:** `ValueError` for an ensemble of models; map over its members.
    """
    is_lti = lambda node: isinstance(node, AbstractLTIMixer)

    def precompute(node):
        return Discretized(node) if is_lti(node) and not isinstance(node, Discretized) else node

    return jax.tree.map(precompute, model, is_leaf=is_lti)


def live_model(model: Model) -> Model:
    return discretized(streaming_mode(eqx.nn.inference_mode(model)))


def streaming_layers(tree: PyTree) -> list[AbstractStreamingLayer]:
    return list(found_within(tree, AbstractStreamingLayer).values())


def _check_caches_apart(model: PyTree) -> None:
    first = {}
    for path, layer in found_within(model, AbstractStreamingLayer).items():
        other = first.setdefault(layer.cache_index.marker, path)
        if other != path:
            raise ValueError(
                f"every layer needs a cache of its own; got one for both `model{other}` and "
                f"`model{path}`, as it is when a layer stands twice in a model or comes from "
                f"another one. Give it a place of its own: `model = eqx.tree_at(lambda model: "
                f"model{path}.cache_index, model, eqx.nn.StateIndex(None))`."
            )


def _is_batched(layers: list[AbstractStreamingLayer], state: eqx.nn.State) -> bool:
    _, known = state.tree_flatten()
    for layer in layers:
        if layer.cache_index.marker in known:
            cache = jax.tree.leaves(state.get(layer.cache_index))
            if cache:
                return cache[0].ndim > jax.tree.leaves(layer.allocate_inference_cache())[0].ndim
    return False


def _completed(
    model: PyTree, layers: list[AbstractStreamingLayer], state: eqx.nn.State
) -> eqx.nn.State:
    """With the initial values of layers that were put into the model later."""
    values, known = state.tree_flatten()
    indices = found(model, eqx.nn.StateIndex)
    caches = {layer.cache_index.marker for layer in layers}
    new = {
        index.marker: (path, index) for path, index in indices.items() if index.marker not in known
    }
    if len(new.keys() - caches) > 0 and all(index.marker in new for index in indices.values()):
        raise ValueError(
            f"`state` must be the model's; got one that knows no layer of this "
            f"`{type(model).__name__}`. Take both from one call, "
            "`model, state = eqx.nn.make_with_state(Model)(...)`."
        )
    initial = {
        marker: None if marker in caches else _initial_value(path, index)
        for marker, (path, index) in new.items()
    }
    return eqx.nn.State.tree_unflatten((*known, *initial), (*values, *initial.values()))


def _initial_value(path: str, index: eqx.nn.StateIndex) -> Any:
    try:
        return eqx.nn.State(index).get(index)
    except ValueError:
        raise ValueError(
            f"the state must have a value for `model{path}`, which comes from another model; got "
            f"none. Take it over from that one's state: `model = eqx.tree_at(lambda model: model"
            f"{path}, model, eqx.nn.StateIndex(other_state.get(model{path})))`."
        ) from None
