"""A batch through a model that takes one sequence."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from discretax._constructors import shape_of_one_key
from discretax._stateful import AbstractStreamingLayer, check_state, found
from discretax._timeseries import Timeseries, batch_ndim_of


def batched(
    model: Callable[..., tuple[Any, eqx.nn.State]],
) -> Callable[..., tuple[Any, eqx.nn.State]]:
    """The model for a batch: `y, state = batched(model)(x, state, key=key)`.

    One state serves all sequences of the batch, and each gets a key of its own:

    ```python
    jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        x, state, key=jax.random.split(key, len(x))
    )
    ```

    The axis is named `"batch"` for batch normalisation, which averages over it in training. In
    [`discretax.streaming_mode`][] each stream has a state of its own, so the state is mapped over
    as well: make it with `discretax.inference_state(model, state, batch_size=len(x))`.

    !!! example

        ```python
        log_probs, state = discretax.batched(model)(x, state, key=key)  # in training
        log_probs, _ = discretax.batched(eqx.nn.inference_mode(model))(x, state)
        losses, state = discretax.batched(language_model.loss)(tokens, state, key=key)
        ```

    **Arguments:** `model`: `(x, state, *, key) -> (y, state)`, a model of one sequence or a method
    of one, also in a `functools.partial`. Of a function it is not seen whether it streams.

    **Returns:** a function `(x, state, key=None) -> (y, state)`:

    - `x`: `(batch, time, features)`, for tokens whole numbers `(batch, time)`, or a
        [`discretax.Timeseries`][] of a batch. It may be of NumPy.
    - `state`: the model's.
    - `key`: one, which is split, or one for each sequence. None where nothing random happens.

    It raises `ValueError` for one sequence where a batch is meant, a batch of none, and for keys or
    states of streams that are not as many as the batch.
    """

    def call(
        x: Array | np.ndarray | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        owner = model
        while isinstance(owner, ft.partial):
            owner = owner.func
        owner = getattr(owner, "__self__", owner)  # of a method
        if isinstance(owner, eqx.Module):  # a function's state may be anything
            check_state(state, owner)
        size = _batch_size(x)
        layers = found(owner, AbstractStreamingLayer).values()
        streams = any(layer.streaming for layer in layers)
        if streams:
            _check_streams(state, size)
        axis = 0 if streams else None
        run = jax.vmap(model, axis_name="batch", in_axes=(0, axis), out_axes=(0, axis))
        keys = {} if key is None else {"key": _keys(key, size)}
        try:
            return run(x, state, **keys)
        except ValueError as error:
            if not isinstance(owner, eqx.Module):
                error.add_note(
                    "If a model in streaming mode is called within this function: `batched` sees "
                    "that it streams only of a model, its method, or a `functools.partial` of these."
                )
            raise

    return call


def _batch_size(x: Any) -> int:
    if isinstance(x, Timeseries):
        values, batch_ndim = x.values, batch_ndim_of(x)
    elif isinstance(x, jax.Array | np.ndarray):
        values, batch_ndim = x, None
    else:
        raise TypeError(
            f"a batch must be an array or a `Timeseries`; got {type(x).__name__}. `discretax.pad` "
            "makes one of sequences of unequal length."
        )
    of_one = 2 if jnp.issubdtype(values.dtype, jnp.inexact) else 1
    if batch_ndim == 0 or (batch_ndim is None and values.ndim <= of_one):
        raise ValueError(
            "`batched` takes a batch: (batch, time, features), or whole numbers (batch, time); got "
            f"{values.dtype}{values.shape}, one sequence. Call the model itself, "
            "`y, state = model(x, state)`, or give a batch of one, `x[None]`."
        )
    if values.shape[0] == 0:
        raise ValueError(
            f"`batched` takes at least one sequence; got a batch of none, {values.dtype}"
            f"{values.shape}. Leave it out."
        )
    return values.shape[0]


def _keys(key: Any, size: int) -> Array:
    one = shape_of_one_key(key)
    if key.shape not in (one, (size, *one)):
        raise ValueError(
            f"`key` must be one key, of shape {one}, or one for each of the {size} sequences, of "
            f"shape {(size, *one)}; got {key.shape}."
        )
    return jr.split(key, size) if key.shape == one else key


def _check_streams(state: eqx.nn.State, size: int) -> None:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    if any(shape[:1] != (size,) for shape in shapes):
        raise ValueError(
            f"the model is in streaming mode, where each of the {size} streams has a state of its "
            "own; got a state that has none for each. Make it with `discretax.inference_state("
            f"model, state, batch_size={size})`."
        )
