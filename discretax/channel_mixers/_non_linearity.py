"""Non-linearities by name."""

from typing import Literal

import jax
import jax.numpy as jnp

NonLinearity = Literal["relu", "gelu", "swish", "silu", "tanh", "relu2"]

NON_LINEARITIES = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swish": jax.nn.swish,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
}
