"""What constructors are given: the place of the key, and what is refused for it and for numbers."""

import functools as ft
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, get_args, get_origin

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer

Arguments = ParamSpec("Arguments")
Real = float | int | np.floating | np.integer


def keyed(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A constructor that refuses to be without its `key`, or to be given something else for it.

    Options of the type `float`, `float | None` or `tuple[float, float]` must be such, and finite; from
    NumPy or JAX they become Python's, for they are part of a mixer's structure and have no type that
    activations could take on.
    """
    parameters = list(inspect.signature(init).parameters.values())
    place = [parameter.name for parameter in parameters].index("key")
    is_needed = parameters[place].default is inspect.Parameter.empty
    of_numbers = {p.name: p for p in parameters if _how_many_numbers(p.annotation)}

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
        given = {option: value for option, value in named.items() if option in of_numbers}
        for option, value in given.items():
            _check_kind(f"`{option}` of `{name}`", value, of_numbers[option])
            named[option] = _plain(value)
        init(*args, **named)  # which knows better what a number must be
        for option, value in given.items():
            _check_finite(f"`{option}` of `{name}`", value, of_numbers[option].default)

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


def _how_many_numbers(annotation: Any) -> int:
    """Of an option of such a type; none if it is of another one."""
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        return len(parts) if all(part is float for part in parts) else 0
    return int(annotation in (float, float | None))


def _check_kind(what: str, value: Any, parameter: inspect.Parameter) -> None:
    if value is None and type(None) in get_args(parameter.annotation):
        return
    count = _how_many_numbers(parameter.annotation)
    many = value if get_origin(parameter.annotation) is tuple else (value,)
    if not isinstance(many, tuple | list) or len(many) != count or not all(map(_is_number, many)):
        rule = "a number" if many is not value else f"{count} numbers, such as {parameter.default}"
        raise TypeError(f"{what} must be {rule}; got {value!r}.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    is_array = hasattr(value, "dtype") and not isinstance(value, Tracer)
    return value.item() if is_array else value


def _check_finite(what: str, value: Any, default: Any) -> None:
    for number in value if isinstance(value, tuple | list) else (value,):
        is_broken = isinstance(number, Real) and not math.isfinite(number)
        if is_broken and not (isinstance(default, tuple) and number in default):
            raise ValueError(f"{what} must be finite; got {value!r}.")


def _is_number(value: Any) -> bool:
    is_scalar = hasattr(value, "dtype") and jnp.ndim(value) == 0
    is_number = is_scalar and jnp.issubdtype(value.dtype, jnp.number)
    return is_number or (isinstance(value, Real) and not isinstance(value, bool))
