"""Dropout whose mask is one of features, for all samples of a sequence."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def make_dropout(drop_rate: float) -> eqx.nn.Dropout:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"`drop_rate` must lie in [0, 1); got {drop_rate}.")
    return eqx.nn.Dropout(drop_rate)


def dropped(
    u: Float[Array, "time features"],
    dropout: eqx.nn.Dropout,
    key: PRNGKeyArray | None,
    layer: Any,
) -> Float[Array, "time features"]:
    """`u` without the features that `layer` drops, by its `dropout`."""
    if dropout.inference or dropout.p == 0:
        return u
    if layer.streaming:
        raise ValueError(
            f"`{type(layer).__name__}` with dropout (drop_rate={dropout.p}) streams in inference mode "
            "only: in training it drops the same features of a whole sequence, and of each chunk "
            "others. Use `discretax.streaming_mode(eqx.nn.inference_mode(model))`, or, to train on "
            'chunks, build the model with drop_rate=0 and norm="layer".'
        )
    if key is None:
        raise ValueError(
            f"`{type(layer).__name__}` drops features at random (drop_rate={dropout.p}) and got no "
            "key. Call `model(x, state, key=key)`, or `eqx.nn.inference_mode(model)` to evaluate, "
            "or build the model with `drop_rate=0`."
        )
    mask: Array = dropout(jnp.ones(u.shape[1], u.dtype), key=key)
    return u * mask[None]
