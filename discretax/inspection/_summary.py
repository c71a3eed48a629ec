import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from discretax._ensembles import check_one_member
from discretax._features import check_size, described
from discretax._stateful import AbstractStreamingLayer, found, found_within
from discretax._timeseries import Timeseries
from discretax._types import check_floating
from discretax.blocks import BatchNorm
from discretax.inference import inference_state, streaming_mode
from discretax.inspection._layers import Layer, named
from discretax.inspection._operations import MOVING, Origin, operations_by_layer
from discretax.inspection._table import LayerSummary, Summary
from discretax.rates import Downsample
from discretax.sequence_mixers import AbstractSequenceMixer


def summary(
    model: PyTree,
    x: Any | None = None,
    state: eqx.nn.State | None = None,
    *,
    max_seqlen: int | None = None,
    dtype: Any = None,
    depth: int | None = None,
) -> Summary:
    """A table of a model's layers: parameters, what they keep of a stream, operations per sample.

    Nothing is computed or compiled: the model is traced, in inference mode.

    - Parameters are the floating arrays. Caches and running averages are none. A weight that is tied
        stands in the model once, and is counted once.
    - The cache is what is kept of one stream, as by [`discretax.inference_state`][].
    - Operations are those of the traced program, on floating point numbers: what the next sample of a
        stream costs. A multiplication and an addition are two, and a linear map of `n` features to `m`
        costs `2 * m * n`, and `m` more with a bias; `exp`, `tanh` and the like are one each; to move,
        convert, compare or choose is none. What is made of parameters alone is left out: it is the same
        for all samples, and [`discretax.discretized`][] computes it once. A model that cannot stream is
        counted over a whole sequence.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(LRU)(hidden_dim=64, num_blocks=4, key=key)
        print(summary(model))
        summary(model).total.parameters
        ```

    **Arguments:**

    - `model`: any layer of the library or of Equinox, and what is made of them. Its arrays may be mere
        shapes, as of `eqx.filter_eval_shape`.
    - `x`: an example of what the model is called with, such as `(time, features)`, `(time,)` tokens or a
        [`discretax.Timeseries`][]; its numbers do not matter. Operations are then those of the call,
        divided by its samples, on the whole sequence: many at once are mixed in another way than one by
        one. If left out, one sample, or one window of a model that downsamples, of what the first layer
        takes that says so.
    - `state`: the model's, where layers that are not of the library keep something in it.
    - `max_seqlen`: length of the streams, for caches that grow with time, and for what the next sample does
        with them; the samples of the call if left out.
    - `dtype`: of the caches; float32 by default.
    - `depth`: how many levels of layers within layers to list; all if left out.

    **Returns:** the lines of the table, `summary(model).layers`; `print(summary(model))` prints it.

    **Raises:** `TypeError` for what is no layer, an `x` that is not of arrays, a `state` that is none and a
    `dtype` that is not floating; `ValueError` for an ensemble of models, for a model whose input cannot be
    known without `x` or its state without `state`, for an `x` without samples, and for another model's
    `state`.
    """
    if not (isinstance(model, eqx.Module) and callable(model)):
        raise TypeError(
            "`summary(model)` takes a model, an `eqx.Module` that can be called; got "
            f"{described(model)}. Of several make one: `discretax.Sequential([encoder, model, head])`."
        )
    for mixer in found(model, AbstractSequenceMixer).values():
        check_one_member(
            mixer,
            "summary(jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, models))",
        )
    check_floating("dtype", dtype)
    _check_state(model, state)
    levels = math.inf if depth is None else check_size("depth", depth, least=0)
    inference = eqx.nn.inference_mode(model)
    layers = named(eqx.nn.delete_init_state(inference)).layers
    example = _first_input(layers) if x is None else _shapes(x)
    samples = _number_of_samples(example)
    max_seqlen = samples if max_seqlen is None else check_size("max_seqlen", max_seqlen)
    caches = [_cache(layer.module, max_seqlen, dtype) for layer in layers]
    sizes = [_bytes_within(i, layers, caches) for i in range(len(layers))]
    streams = sizes[0] is not None
    is_next_sample = streams and x is None
    called = streaming_mode(inference) if is_next_sample else inference
    before = caches[0] if is_next_sample and isinstance(model, AbstractSequenceMixer) else None
    if _is_stateful(model):
        before = _state(called, state, max_seqlen, dtype, streams)
    try:
        parameters, operations = _counted(called, example, before)
    except Exception as error:
        shapes = ", ".join(f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(example))
        guess = ", which its first layers seem to take: give it an example, `summary(model, x)`"
        error.add_note(f"`summary` called the model with {shapes}{'' if x is not None else guess}.")
        raise
    lines = [
        LayerSummary(
            path=layer.path,
            depth=layer.depth,
            kind=type(layer.module).__name__,
            parameters=sum(parameters[i : layer.end]),
            cache=caches[i],
            cache_bytes=sizes[i],
            operations=sum(operations[i : layer.end]) / samples,
        )
        for i, layer in enumerate(layers)
    ]
    costs = lambda line: (line.parameters, line.cache_bytes, line.operations) != (0, 0, 0)
    listed = tuple(
        line for line in lines if line.depth <= levels and (line.depth == 0 or costs(line))
    )
    return Summary(listed, samples, max_seqlen)


def _cache(module: eqx.Module, max_seqlen: int, dtype: Any) -> PyTree[jax.ShapeDtypeStruct] | None:
    if not isinstance(module, AbstractStreamingLayer | AbstractSequenceMixer):
        return None
    allocate = lambda module, length: module.allocate_inference_cache(None, length, dtype)
    try:
        cache = eqx.filter_eval_shape(allocate, module, 1)
    except ValueError:  # what cannot stream has none
        return None
    return cache if max_seqlen == 1 else eqx.filter_eval_shape(allocate, module, max_seqlen)


def _bytes_within(i: int, layers: list[Layer], caches: list[PyTree]) -> int | None:
    """Each cache once: that of a block is that of its mixer."""
    total, behind = 0, 0
    for j in range(i, layers[i].end):
        module = layers[j].module
        is_mixer = isinstance(module, AbstractSequenceMixer) and j >= behind
        if isinstance(module, AbstractStreamingLayer) or is_mixer:
            if caches[j] is None:
                return None
            leaves = jax.tree.leaves(caches[j])
            total += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            behind = max(behind, layers[j].end)
    return total


def _first_input(layers: list[Layer]) -> jax.ShapeDtypeStruct:
    """As little as may come of a stream, of what the first layer takes that says so."""
    windows = (layer.module for layer in layers if isinstance(layer.module, Downsample))
    time = math.prod(window.stride for window in windows)
    for layer in layers:
        if isinstance(layer.module, eqx.nn.Embedding):
            return jax.ShapeDtypeStruct((time,), jnp.result_type(int))
        features = getattr(layer.module, "in_features", None)
        if isinstance(features, int):
            return jax.ShapeDtypeStruct((time, features), jnp.result_type(float))
    raise ValueError(
        f"`summary` must know what the model takes, and none of its layers says so by an "
        f"`in_features`; got {type(layers[0].module).__name__}. Give it an example, "
        "`summary(model, x)`."
    )


def _shapes(x: Any) -> PyTree[jax.ShapeDtypeStruct]:
    leaves = jax.tree.leaves(x)
    is_array = lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    if isinstance(x, eqx.nn.State) or not leaves or not all(map(is_array, leaves)):
        raise TypeError(
            "`x` must be what the model is called with, such as an array (time, features) or a "
            f"`discretax.Timeseries`; got {described(x)}. A state is given by its name, "
            "`summary(model, state=state)`; of numbers make an array, `jnp.asarray(x)`."
        )
    dtype = lambda leaf: jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(leaf)), x)


def _number_of_samples(x: PyTree[jax.ShapeDtypeStruct]) -> int:
    shape = jax.tree.leaves(x)[0].shape
    if not shape or shape[0] == 0:
        raise ValueError(
            "`x` must have an axis of time with at least one sample, such as (time, features); got "
            f"{shape}. One sample is a sequence of one: `x[None]`."
        )
    return shape[0]


def _check_state(model: eqx.Module, state: Any) -> None:
    if state is None:
        return
    if not isinstance(state, eqx.nn.State):
        raise TypeError(
            f"`state` must be the model's, an `eqx.nn.State`; got {described(state)}. Leave it out, or "
            "take it from `model, state = eqx.nn.make_with_state(Model)(...)`."
        )
    _, known = state.tree_flatten()
    markers = {index.marker for index in found(model, eqx.nn.StateIndex).values()}
    if known and markers.isdisjoint(known):
        raise ValueError(
            f"`state` must be the model's; got one that knows no layer of this `{type(model).__name__}`"
            f"{'' if markers else ', which keeps nothing in a state'}. Leave it out, or take model and "
            "state from one call, `model, state = eqx.nn.make_with_state(Model)(...)`."
        )


def _is_stateful(model: eqx.Module) -> bool:
    is_layer = isinstance(model, eqx.nn.StatefulLayer) and model.is_stateful()
    return is_layer or bool(found(model, eqx.nn.StateIndex))


def _state(
    model: PyTree, state: eqx.nn.State | None, max_seqlen: int, dtype: Any, streams: bool
) -> eqx.nn.State:
    """By shapes, what the model is called with: with caches, which a call on a whole leaves alone."""

    def make(model, state):
        state = _initial_state(model) if state is None else state
        return inference_state(model, state, None, max_seqlen, dtype) if streams else state

    return eqx.filter_eval_shape(make, model, state)


def _initial_state(model: PyTree) -> eqx.nn.State:
    """Also of a model from which it has been taken out."""
    norms = {norm.statistics.marker: norm for norm in found_within(model, BatchNorm).values()}
    caches = _caches_in(model)
    values = {}
    for path, index in found(model, eqx.nn.StateIndex).items():
        try:
            values[index.marker] = eqx.nn.State(index).get(index)
        except ValueError:
            if index.marker in caches:
                values[index.marker] = None
            elif index.marker in norms:
                fresh = BatchNorm(norms[index.marker].weight.shape[0]).statistics
                values[index.marker] = eqx.nn.State(fresh).get(fresh)
            else:
                raise ValueError(
                    f"`summary` must know what the model keeps in its state, and `model{path}` no "
                    "longer has its initial value. Give the state: `summary(model, state=state)`."
                ) from None
    return eqx.nn.State.tree_unflatten(tuple(values), tuple(values.values()))


def _caches_in(model: PyTree) -> set[Any]:
    return {
        layer.cache_index.marker for layer in found_within(model, AbstractStreamingLayer).values()
    }


def _counted(live: eqx.Module, x: Any, before: Any) -> tuple[list[int], list[float]]:
    """Parameters and operations of each layer, without those within it."""
    model, layers, owners = named(eqx.nn.delete_init_state(live))
    is_array = lambda leaf: eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    arrays = [
        (leaf, owner)
        for leaf, owner in zip(jax.tree.leaves(model), owners, strict=True)
        if is_array(leaf)
    ]
    parameters = [0] * len(layers)
    for leaf, owner in arrays:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            parameters[owner] += leaf.size
    origins = [Origin(owner=owner) for _, owner in arrays]
    origins += _origins(live, before) + [MOVING] * len(jax.tree.leaves(x))
    program, *_ = eqx.filter_make_jaxpr(_call)(model, before, x)
    return parameters, operations_by_layer(program, origins, layers)


def _origins(model: PyTree, before: Any) -> list[Origin]:
    """Caches move on with the samples; running averages do not."""
    if not isinstance(before, eqx.nn.State):
        return [MOVING] * len(jax.tree.leaves(before))
    caches = _caches_in(model)
    values, markers = before.tree_flatten()
    return [
        MOVING if marker in caches else Origin()
        for marker, value in zip(markers, values, strict=True)
        for _ in jax.tree.leaves(value)
    ]


def _call(model: Any, before: Any, x: Any) -> Any:
    if isinstance(model, AbstractSequenceMixer) and isinstance(x, Timeseries):
        # As a block gives it.
        return model(
            x.values,
            before,
            integration_timesteps=x.timesteps,
            length=x.length,
            resets=x.resets,
        )
    if isinstance(model, AbstractSequenceMixer) or isinstance(before, eqx.nn.State):
        return model(x, before)
    takes_sequences = found(model, AbstractSequenceMixer)
    return model(x) if takes_sequences else jax.vmap(model)(x)
