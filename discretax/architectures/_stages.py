"""Stages of blocks at different rates: what the architectures made of them share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from discretax._features import check_maker, check_size, described, is_layer
from discretax._stateful import check_state, found_within
from discretax._timeseries import Timeseries
from discretax.encoder import AbstractEncoder
from discretax.rates import Downsample
from discretax.rates._windows import check_chunk


def check_stages(widths: Any, strides: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As whole numbers of Python's: a width for each rate, and a stride between two of them."""
    widths, strides = _sizes("widths", widths), _sizes("strides", strides)
    if len(widths) != len(strides) + 1:
        raise ValueError(
            "`widths` must have one more number than `strides`, which stand between two of them; got "
            f"widths={widths} and strides={strides}."
        )
    return widths, strides


def _sizes(name: str, sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(
            f"`{name}` must be a sequence of whole numbers, such as `(4, 4)`; got {described(sizes)}."
        )
    return tuple(check_size(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def make_encoder(maker: Callable[..., AbstractEncoder], *sizes: int, key: Any) -> AbstractEncoder:
    check_maker("encoder", maker, AbstractEncoder)
    encoder = maker(*sizes, key=key)
    if not (is_layer(encoder) and callable(encoder)):
        raise TypeError(
            "`encoder` must be a function `(in_features, out_features, *, key)` that makes an encoder; "
            f"it made {described(encoder)}. Give the class, or `functools.partial` of it."
        )
    return encoder


def check_call(model: eqx.Module, x: Any, state: eqx.nn.State, layers: Any) -> None:
    """Refuses a chunk of a stream that is not whole windows of all `layers` that downsample."""
    check_state(state, model)
    downsamples = found_within(layers, Downsample).values()
    if any(layer.streaming for layer in downsamples):
        values = x.values if isinstance(x, Timeseries) else x
        one_sequence = 2 if jnp.issubdtype(jnp.result_type(values), jnp.inexact) else 1
        if jnp.ndim(values) != one_sequence:
            return  # which the encoder refuses
        strides = tuple(layer.stride for layer in downsamples)
        what = f"`{type(model).__name__}` with strides of {strides}"
        check_chunk(what, jnp.shape(values)[0], math.prod(strides))
