from collections.abc import Callable
from typing import overload

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import sizes_first
from discretax._features import check_features, check_function, check_size, linear
from discretax.channel_mixers.base import AbstractChannelMixer


class HalfGLU(AbstractChannelMixer):
    r"""Gates the features themselves, $y = x \odot \sigma(W g(x) + b)$: a GLU with one map for two.

    $g$ is the `gate_activation`, or nothing.

    ??? cite

        Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling,
        ICLR 2023 (arXiv:2208.04933).
    """

    linear: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    gate_activation: Callable[[Array], Array] | None = eqx.field(static=True)

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        gate_activation: Callable[[Array], Array] | None = None,
        use_bias: bool = True,
    ): ...
    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        out_features: int | None = None,
        gate_activation: Callable[[Array], Array] | None = None,
        use_bias: bool = True,
    ): ...
    @sizes_first
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        key: PRNGKeyArray,
        gate_activation: Callable[[Array], Array] | None = None,
        use_bias: bool = True,
    ):
        """**Arguments:** `in_features`; `key`; `gate_activation`, a function such as `jax.nn.gelu`,
        on the way to the gate alone; `use_bias`.

        **Raises:** `ValueError` if `out_features` is given and differs from `in_features`;
        `TypeError` for a gate activation that is no function.
        """
        out_features = in_features if out_features is None else out_features
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        if out_features != in_features:
            raise ValueError(
                "`HalfGLU` gates its own input and cannot change the width; got in_features="
                f"{in_features} and out_features={out_features}. Use `GLU`."
            )
        check_function("gate_activation", gate_activation)
        self.linear = draw.linear(in_features, in_features, use_bias, key=key)
        self.in_features = in_features
        self.gate_activation = gate_activation

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        check_features(self, x, self.in_features)
        u = x if self.gate_activation is None else self.gate_activation(x)
        return x * jax.nn.sigmoid(linear(self.linear, u))
