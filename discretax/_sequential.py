"""Layers one after the other, by position or by name."""

from collections.abc import Iterator
from typing import Any, overload

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from discretax._features import described
from discretax._stateful import check_state
from discretax._timeseries import Timeseries


class Sequential(eqx.nn.StatefulLayer):
    """Layers one after the other, `(x, state) -> (y, state)`: an encoder, a model and a head.

    The numbers are those of `eqx.nn.Sequential`, which may stand in its place. This one lets layers
    have names, takes the key in third place too, and tells a type checker that an array or a
    [`discretax.Timeseries`][] goes in.

    !!! example

        ```python
        model = discretax.Sequential(
            encoder=LinearEncoder(in_features=1, out_features=16, key=keys[0]),
            model=LRU(hidden_dim=16, key=keys[1]),
            head=ClassificationHead(in_features=16, out_features=2, key=keys[2]),
        )
        model["head"]  # by name
        model[-1], model.layers[-1]  # by position
        model[:2]  # without the head
        new_model = eqx.tree_at(lambda model: model["head"], model, new_head)
        ```
    """

    layers: tuple[Any, ...]
    names: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(self, *layers: Any, **named_layers: Any):
        """**Arguments:** either `layers`, one by one or in a list, or each by a name of its own.

        A layer that is an `eqx.nn.StatefulLayer` is called as `x, state = layer(x, state=state,
        key=key)`, any other as `x = layer(x, key=key)`.

        **Raises:** `TypeError` for anything that is no layer, and for layers with and without
        names; `ValueError` for none.
        """
        if layers and named_layers:
            raise TypeError(
                "`Sequential` takes a list of layers or layers by name; got both. Give all of them "
                "names."
            )
        if len(layers) == 1:
            (listed,) = layers
            if isinstance(listed, eqx.Module) or not _is_iterable(listed):
                raise TypeError(
                    f"`Sequential` takes a list of layers, `[encoder, model, head]`; got "
                    f"{described(listed)}."
                )
            layers = tuple(listed)
        self.names = tuple(named_layers) if named_layers else None
        self.layers = (*layers, *named_layers.values())
        if not self.layers:
            raise ValueError("`Sequential` must have at least one layer; got none.")
        for name, layer in zip(self.names or range(len(self.layers)), self.layers, strict=True):
            if not (isinstance(layer, eqx.Module) and callable(layer)):
                raise TypeError(
                    f"layer {name!r} must be an `eqx.Module` that can be called; got "
                    f"{described(layer)}. Make one of a class; `eqx.nn.Lambda` makes one of a "
                    "function of an array."
                )

    def __call__(
        self,
        x: Array | np.ndarray | Timeseries,
        state: eqx.nn.State,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Any, eqx.nn.State]:
        """**Arguments:** `x`: what the first layer takes; `state`; `key`, of which every layer gets
        one of its own.

        **Returns:** what the last layer returns, and the new state.

        **Raises:** `ValueError` without a state.
        """
        check_state(state, self)
        y: Any = x
        num_layers = len(self.layers)
        keys = (None,) * num_layers if key is None else jr.split(key, num_layers)
        for layer, layer_key in zip(self.layers, keys, strict=True):
            if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
                y, state = layer(y, state=state, key=layer_key)
            else:
                y = layer(y, key=layer_key)
        return y, state

    @overload
    def __getitem__(self, index: int | str) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> "Sequential": ...

    def __getitem__(self, index):
        """A layer by its name or position; a `Sequential` of those of a slice."""
        if isinstance(index, str):
            if index not in (self.names or ()):
                known = "no names" if self.names is None else ", ".join(map(repr, self.names))
                raise KeyError(f"no layer {index!r}; there are {known}.")
            return self.layers[(self.names or ()).index(index)]
        if isinstance(index, slice):
            if self.names is None:
                return Sequential(self.layers[index])
            return Sequential(**dict(zip(self.names[index], self.layers[index], strict=True)))
        return self.layers[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _is_iterable(layers: Any) -> bool:
    return hasattr(layers, "__iter__") and not isinstance(layers, str | dict)
