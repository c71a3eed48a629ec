"""Where the key stands among the arguments of a constructor, and what is refused in its place."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

Arguments = ParamSpec("Arguments")


def keyed(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A constructor that refuses to be without its `key`, or to be given something else for it."""
    parameters = list(inspect.signature(init).parameters.values())
    place = [parameter.name for parameter in parameters].index("key")
    is_needed = parameters[place].default is inspect.Parameter.empty

    @ft.wraps(init)
    def checked(*args: Arguments.args, **named: Arguments.kwargs):
        name = type(args[0]).__name__
        in_place = args[place : place + 1]
        if in_place and "key" in named:
            raise TypeError(
                f"`{name}` takes one key; got one by name, and {in_place[0]!r} in its place. Give "
                "what stands there by name."
            )
        key = in_place[0] if in_place else named.get("key")
        if is_needed or key is not None:
            check_key(key, f"`key` of `{name}`")
        init(*args, **named)

    return checked


def sizes_first(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of sizes and a `key` whose key may also stand before, between or behind the sizes.

    `init` has the sizes first and the key by name; its overloads say what callers may choose.
    """

    @ft.wraps(init)
    def sorted_out(self, *args, **named):
        keys = [value for value in args if _is_key(value)]
        if len(keys) + ("key" in named) > 1:
            raise TypeError(f"`{type(self).__name__}` takes one key; got several.")
        if keys:
            args = [value for value in args if not _is_key(value)]
            named["key"] = keys[0]
        checked(self, *args, **named)

    checked = keyed(init)
    return sorted_out


def check_key(key: Any, what: str = "`key`") -> None:
    shape = shape_of_one_key(key, what)
    if key.shape != shape:
        raise ValueError(f"{what} must be a single key, of shape {shape}; got {key.shape}.")


def shape_of_one_key(key: Any, what: str = "`key`") -> tuple[int, ...]:
    """Of its kind: `jax.random.PRNGKey` gives the numbers of a key as an array of their own."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_typed and not (is_array and key.dtype == np.uint32):
        raise TypeError(f"{what} must be a key, such as `jax.random.key(0)`; got {key!r}.")
    return () if is_typed else jax.eval_shape(jr.PRNGKey, 0).shape


def _is_key(value: Any) -> bool:
    """Sizes are scalars, be they arrays."""
    return hasattr(value, "dtype") and (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or jnp.ndim(value) > 0
    )
