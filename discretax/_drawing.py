"""The numbers that parameters start at: those of `jax.random`, of programs that shapes share.

`jax.random` compiles a program for every shape. But number `i` of a draw depends on the key and on `i`
alone, so that the first of many numbers are those of a smaller draw, in whatever shape.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

NUMBERS = 2**16  # drawn in a millisecond or two; where most are thrown away, more take too long
KEYS = 16

Shape = tuple[int, ...]


def uniform(
    key: PRNGKeyArray, shape: Shape, minval: float = 0.0, maxval: float = 1.0
) -> Float[Array, "..."]:
    return _drawn(_uniform, key, shape, minval, maxval)


def normal(key: PRNGKeyArray, shape: Shape) -> Float[Array, "..."]:
    return _drawn(_normal, key, shape)


def truncated_normal(
    key: PRNGKeyArray, shape: Shape, lower: float, upper: float
) -> Float[Array, "..."]:
    return _drawn(_truncated_normal, key, shape, lower, upper)


def split(key: PRNGKeyArray, num: int = 2) -> tuple[PRNGKeyArray, ...]:
    if num > KEYS or not _is_shared(key):
        return tuple(jr.split(key, num))
    keys = _split(key)
    return tuple(_at(keys, i) for i in range(num))


def linear(
    in_features: int, out_features: int, use_bias: bool = True, *, key: PRNGKeyArray
) -> eqx.nn.Linear:
    """With the numbers that `eqx.nn.Linear` draws."""
    weight_key, bias_key = split(key)
    bound = 1 / math.sqrt(in_features)
    return linear_of(
        uniform(weight_key, (out_features, in_features), -bound, bound),
        uniform(bias_key, (out_features,), -bound, bound) if use_bias else None,
    )


def linear_of(
    weight: Float[Array, "out in"], bias: Float[Array, " out"] | None = None
) -> eqx.nn.Linear:
    """Nothing is drawn for it."""
    out_features, in_features = weight.shape
    arrays = [weight] if bias is None else [weight, bias]
    return jax.tree.unflatten(_linear(in_features, out_features, bias is not None), arrays)


def embedding(num_embeddings: int, embedding_size: int, *, key: PRNGKeyArray) -> eqx.nn.Embedding:
    """With the numbers that `eqx.nn.Embedding` draws."""
    return eqx.nn.Embedding(weight=normal(key, (num_embeddings, embedding_size)))


@ft.cache
def _linear(in_features: int, out_features: int, use_bias: bool) -> Any:
    make = lambda key: eqx.nn.Linear(in_features, out_features, use_bias, key=key)
    return jax.tree.structure(eqx.filter_eval_shape(make, jr.key(0)))


def _drawn(
    draw: Callable[..., Array], key: PRNGKeyArray, shape: Shape, *bounds: float
) -> Float[Array, "..."]:
    count = math.prod(shape)
    if count > NUMBERS or not _is_shared(key):
        return draw(key, *bounds, shape=shape)
    # Whole numbers, and those of NumPy, have types of their own, and so another program.
    bounds = tuple(bound if isinstance(bound, Tracer) else float(bound) for bound in bounds)
    return _first(draw(key, *bounds, shape=(NUMBERS,)), count, shape)


def _is_shared(key: PRNGKeyArray) -> bool:
    """Whether few numbers are the first of many, and no program is traced that these would go into."""
    is_traced = isinstance(jr.key_data(key), Tracer)  # or what has a key from outside is
    is_partitionable = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    return not is_traced and jr.key_impl(key) == "threefry2x32" and is_partitionable


@ft.partial(jax.jit, static_argnames="shape")
def _uniform(key, minval, maxval, *, shape):
    return jr.uniform(key, shape, minval=minval, maxval=maxval)


@ft.partial(jax.jit, static_argnames="shape")
def _normal(key, *, shape):
    return jr.normal(key, shape)


@ft.partial(jax.jit, static_argnames="shape")
def _truncated_normal(key, lower, upper, *, shape):
    return jr.truncated_normal(key, lower, upper, shape)


@jax.jit
def _split(key):
    return jr.split(key, KEYS)


@jax.jit
def _at(keys, i):
    return lax.dynamic_index_in_dim(keys, i, keepdims=False)


@ft.partial(jax.jit, static_argnames=("count", "shape"))
def _first(numbers, count, shape):
    return numbers[:count].reshape(shape)
