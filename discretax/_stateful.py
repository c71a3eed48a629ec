"""How a layer keeps something in `eqx.nn.State` from one chunk of a stream to the next."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from discretax._features import check_samples
from discretax._timeseries import Timeseries, values_of


class AbstractStreamingLayer(eqx.nn.StatefulLayer):
    """A layer that carries a cache in its state while streaming, and only then.

    `cache_index` starts out as `StateIndex(None)`: a model in training holds no cache, so none is
    counted as a parameter, saved or moved about. [`discretax.inference_state`][] fills it.
    """

    cache_index: eqx.AbstractVar[eqx.nn.StateIndex]
    streaming: eqx.AbstractVar[bool]
    inference: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree:
        """The cache before the first sample."""

    def check_inference(self) -> None:
        if self.streaming and not self.inference:
            raise ValueError(
                f"`{type(self).__name__}` streams in inference mode only: in training a norm "
                "needs whole batches and dropout differs from chunk to chunk. Use "
                "`discretax.streaming_mode(eqx.nn.inference_mode(model))`."
            )

    def read_cache(self, state: eqx.nn.State) -> PyTree:
        self.check_inference()
        cache = read_state(state, self.cache_index, self)
        if cache is None:
            raise ValueError(
                f"The state holds no inference cache for `{type(self).__name__}`. Make one with "
                "`state = discretax.inference_state(model, state)`; with "
                "`discretax.inference_state(model, state, batch_size=8)` for "
                "`jax.vmap(model)(chunk, state)`."
            )
        return cache


def found(tree: PyTree, kind: type) -> dict[str, Any]:
    """The outermost nodes of a kind, by what leads to them: `{".blocks[0]": block}`."""
    is_kind = lambda node: isinstance(node, kind)
    nodes, _ = jax.tree.flatten_with_path(tree, is_leaf=is_kind)
    return {jax.tree_util.keystr(path): node for path, node in nodes if is_kind(node)}


def check_state(state: Any, layer: Any) -> None:
    if not isinstance(state, eqx.nn.State):
        # `eqx.nn.Sequential` passes a bare object where it was given no state.
        received = "nothing" if type(state) is object else type(state).__name__
        raise ValueError(
            f"`{type(layer).__name__}` needs the model's state: call it as "
            f"`y, state = model(x, state)`; got {received} for `state`. Make it with "
            "`model, state = eqx.nn.make_with_state(Model)(...)`, or with "
            "`state = eqx.nn.State(model)`."
        )


def read_state(state: eqx.nn.State, index: eqx.nn.StateIndex, layer: eqx.Module) -> Any:
    try:
        return state.get(index)
    except KeyError:
        raise ValueError(
            f"The state knows nothing of this `{type(layer).__name__}`: take model and state from "
            "one call, `model, state = eqx.nn.make_with_state(Model)(...)`. Of a layer that was put "
            "into the model later, it learns by "
            "`state = discretax.inference_state(model, state)`."
        ) from None


def samples_of(
    x: Array | Timeseries, state: Any, layer: eqx.Module, features: int
) -> Float[Array, "time features"]:
    """What `layer` computes with: the samples of `x`, if it can take them, and if there is a state."""
    check_state(state, layer)
    values = values_of(x)
    check_samples(layer, values, features)
    return values


def check_cache(layer: eqx.Module, cache: PyTree, expected: PyTree) -> None:
    shapes, expected_shapes = (jax.tree.map(jnp.shape, tree) for tree in (cache, expected))
    if shapes != expected_shapes:
        raise ValueError(
            f"`{type(layer).__name__}` takes a cache of shapes {expected_shapes}; got {shapes}. "
            "Make one with `allocate_inference_cache()`; one with a batch axis goes through "
            "`jax.vmap`."
        )
