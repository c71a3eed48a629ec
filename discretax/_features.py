"""What layers do to the last axis, and the checks that every layer makes of its arguments."""

import functools as ft
import operator
from typing import Any, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from discretax._projection import projected
from discretax._types import conversion

Kind = TypeVar("Kind")
BATCH = "Use `jax.vmap` to batch, or `discretax.batched`."


def linear(layer: eqx.nn.Linear, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
    """Applies `layer` to the last axis, in the type of `x`: activations choose the precision."""
    y = projected(x, layer.weight.astype(x.dtype))
    if layer.bias is None:
        return y
    return y + lax.broadcast_to_rank(layer.bias.astype(x.dtype), y.ndim)


def soft_capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`x`, bent so that its size stays below the cap if there is one."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def out_features(layer: eqx.Module, in_features: int, **options: Any) -> int:
    """The width of what `layer` makes of samples `in_features` wide, without computing it.

    Of layers that differ by their numbers alone, which most of a deep model's do, it is found once.
    """
    samples = jax.ShapeDtypeStruct((1, in_features), jnp.result_type(float))
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    leaves, kind = jax.tree.flatten((layer, samples, options))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x for x in leaves)
    try:
        hash((shapes, kind))
    except TypeError:  # fields of a kind that has no hash, such as lists
        return _width.__wrapped__(kind, shapes)
    return _width(kind, shapes)


@ft.lru_cache(maxsize=256)
def _width(kind: Any, leaves: tuple[Any, ...]) -> int:
    def call(layer, samples, options):
        y = layer(samples, **options)
        return y[0] if isinstance(y, tuple) else y

    return eqx.filter_eval_shape(call, *jax.tree.unflatten(kind, leaves)).shape[-1]


def check_features(layer: eqx.Module, x: Array, features: int) -> None:
    if x.ndim == 0 or x.shape[-1] != features or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`{type(layer).__name__}` takes floating arrays whose last axis has size {features}; "
            f"got {x.dtype}{x.shape}.{conversion(x, float)}"
        )


def check_samples(layer: eqx.Module, x: Array, features: int) -> None:
    if x.ndim != 2:
        is_sample = x.ndim == 1
        remedy = "One sample is a sequence of one: `x[None]`." if is_sample else BATCH
        raise ValueError(
            f"`{type(layer).__name__}` takes one sequence, (time, features) = (time, {features}); "
            f"got {x.shape}. {remedy}"
        )
    check_features(layer, x, features)


def check_size(name: str, value: Any, least: int = 1) -> int:
    """The size as a whole number of Python's, from NumPy's or whichever kind; True is none."""
    try:
        size = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = least - 1
    if size < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}; got {value!r}.")
    return size


def divided(what: str, size: int, name: str, parts: int) -> int:
    """`size / parts`, a whole number."""
    quotient, rest = divmod(size, parts)
    if rest:
        raise ValueError(f"`{name}` must divide {what} = {size}; got {parts}.")
    return quotient


def size_of_head(name: str, size: Any, in_features: Any, num_heads: Any) -> int:
    """The `size`, or each head's part of the features where it is None."""
    if size is not None:
        return check_size(name, size)
    in_features = check_size("in_features", in_features)
    size, rest = divmod(in_features, check_size("num_heads", num_heads))
    if rest:
        raise ValueError(
            f"`num_heads` must divide in_features = {in_features}; got {num_heads}. Or give "
            f"`{name}`."
        )
    return check_size(name, size)


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")


def made(argument: str, maker: Any, kind: type[Kind], width: int, **options: Any) -> Kind:
    """`maker`, if it is of the `kind`, or what it makes of the width and the options."""
    if isinstance(maker, kind):
        return maker
    check_maker(argument, maker, kind)
    instance = maker(width, **options)
    check_instance(f"{argument}(in_features, key=key)", instance, kind)
    return instance


def check_maker(argument: str, maker: Any, kind: type) -> None:
    """Refuses what makes nothing of the `kind`, such as one that is made."""
    is_other = isinstance(maker, type) and not issubclass(maker, kind)
    if is_layer(maker) or is_other or not callable(maker):
        shared = ", whose arrays all blocks would share" if isinstance(maker, kind) else ""
        raise TypeError(
            f"`{argument}` must be a function `(in_features, *, key)` that makes an "
            f"`{kind.__name__}`; got {described(maker)}{shared}. Give the class, or "
            "`functools.partial` of the class and its other arguments."
        )


def check_instance(argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        is_class = isinstance(value, type) and issubclass(value, kind)
        remedy = f" Make one: `{value.__name__}(in_features, key)`." if is_class else ""
        raise TypeError(
            f"`{argument}` must be an `{kind.__name__}`; got {described(value)}.{remedy}"
        )


def is_layer(value: Any) -> bool:
    """A module, but for the one that is a function with some of its arguments."""
    return isinstance(value, eqx.Module) and not isinstance(value, eqx.Partial)


def described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class `{value.__name__}`"
    return f"an instance of `{type(value).__name__}`" if is_layer(value) else repr(value)


def check_function(argument: str, value: Any, optional: bool = True) -> None:
    """Refuses what is neither None, if that is allowed, nor a function of an array, without
    parameters of its own."""
    has_parameters = any(map(eqx.is_array, jax.tree.leaves(value)))
    if optional and value is None:
        return
    if not callable(value) or isinstance(value, type) or has_parameters:
        raise TypeError(
            f"`{argument}` must be {'None or ' if optional else ''}a function of an array, such as `jax.nn.gelu`, without "
            f"parameters; got {described(value)}."
        )


def check_name(argument: str, value: Any, names: Any) -> None:
    """`names` is the `Literal` of the known ones."""
    known_names = [n for name in get_args(names) for n in (get_args(name) or [name])]
    known_names = [None if name is type(None) else name for name in known_names]
    if value not in known_names:
        known = ", ".join(map(repr, known_names))
        raise ValueError(f"`{argument}` must be one of {known}; got {value!r}.")
