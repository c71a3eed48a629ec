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
    """A layer that remembers: it keeps a cache in its state from one chunk of a stream to the next.

    What looks at other samples than the one of the moment is such a layer: a causal convolution, a
    pooling. It says what it remembers before the first sample, reads that, and writes what it remembers
    after the last valid one. In training and evaluation on whole sequences it reads the same beginning,
    and nothing is written. [`discretax.inference_state`][] finds the layer wherever it stands in a
    model.

    !!! example

        ```python
        class Difference(AbstractEncoder, AbstractStreamingLayer):
            def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
                return zero_cache(batch_size, (2,), dtype)  # the last sample, of two features

            def __call__(self, x, state, key=None):
                before, last = token_shift(x, self.read_cache(state))
                return x - before, self.write_cache(state, last)
        ```

    [`discretax.testing.check_streaming`][] says whether it does what it should.
    """

    cache_index: eqx.nn.StateIndex = eqx.field(init=False)
    """Where in the state the cache is. It starts out as None: a model in training holds no cache, so
    none is counted as a parameter, saved or moved about."""
    streaming: bool = eqx.field(init=False)
    """Set by [`discretax.streaming_mode`][]."""

    def __new__(cls, *args: Any, **options: Any):
        del args, options
        layer = super().__new__(cls)
        # Here, and not in an `__init__` that every layer would have to call.
        object.__setattr__(layer, "cache_index", eqx.nn.StateIndex(None))
        object.__setattr__(layer, "streaming", False)
        return layer

    @abc.abstractmethod
    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree:
        """What the layer remembers before the first sample: a PyTree of arrays.

        **Arguments:** `batch_size`, None for one stream, a number for an axis in front to `jax.vmap`
        over; `max_seqlen`, how many samples a cache that grows with time must hold; `dtype` of the
        cache, float32 by default. [`discretax.sequence_mixers.zero_cache`][] makes zeros of them.
        """

    def read_cache(self, state: eqx.nn.State) -> PyTree:
        """What is remembered of the samples so far; of none, unless the layer is streaming.

        **Raises:** `ValueError` if the state holds no cache for it.
        """
        check_state(state, self)
        if not self.streaming:
            return self.allocate_inference_cache()
        cache = read_state(state, self.cache_index, self)
        if cache is None:
            raise ValueError(
                f"The state holds no inference cache for `{type(self).__name__}`. Make one with "
                "`state = discretax.inference_state(model, state)`; with "
                "`discretax.inference_state(model, state, batch_size=8)` for "
                "`jax.vmap(model)(chunk, state)`."
            )
        return cache

    def write_cache(self, state: eqx.nn.State, cache: PyTree) -> eqx.nn.State:
        """The state with the cache in it, in the types that it had; unless streaming, as it was.

        **Raises:** `ValueError` for a cache of other shapes than the one that was read; `TypeError`
        for one of a kind that does not fit into what was read, such as complex numbers into real ones.
        """
        if not self.streaming:
            return state
        before = self.read_cache(state)
        shapes, expected = (jax.tree.map(jnp.shape, tree) for tree in (cache, before))
        if shapes != expected:
            raise ValueError(
                f"`{type(self).__name__}` must write a cache of the shapes that it has read, "
                f"{expected}; got {shapes}."
            )
        return state.set(self.cache_index, jax.tree.map(self._typed, cache, before))

    def _typed(self, new: Any, old: Array) -> Array:
        received, expected = jnp.result_type(new), jnp.result_type(old)
        if received != expected and not jnp.can_cast(received, expected, "same_kind"):
            raise TypeError(
                f"`{type(self).__name__}` must write a cache of the kind that it has read, {expected}; "
                f"got {received}. Allocate one of that kind in `allocate_inference_cache`, or convert "
                "what is written."
            )
        return jnp.asarray(new, expected)


def found(tree: PyTree, kind: Any) -> dict[str, Any]:
    """The outermost nodes of a kind, by what leads to them: `{".blocks[0]": block}`."""
    is_kind = lambda node: isinstance(node, kind)
    nodes, _ = jax.tree.flatten_with_path(tree, is_leaf=is_kind)
    return {jax.tree_util.keystr(path): node for path, node in nodes if is_kind(node)}


def found_within(tree: PyTree, kind: Any) -> dict[str, Any]:
    """All nodes of a kind, those within others too, by what leads to them."""
    is_inner = lambda node: isinstance(node, kind) and node is not tree
    nodes, _ = jax.tree.flatten_with_path(tree, is_leaf=is_inner)
    all_found = {"": tree} if isinstance(tree, kind) else {}
    for path, node in nodes:
        if is_inner(node):
            inner = found_within(node, kind)
            all_found |= {jax.tree_util.keystr(path) + rest: inner[rest] for rest in inner}
    return all_found


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
