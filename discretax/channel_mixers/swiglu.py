import math
from typing import overload

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import sizes_first
from discretax._features import (
    check_features,
    check_name,
    check_positive,
    check_size,
    linear,
)
from discretax.channel_mixers._non_linearity import NON_LINEARITIES, NonLinearity
from discretax.channel_mixers.base import AbstractChannelMixer


class SwiGLU(AbstractChannelMixer):
    r"""$y = b\, W_{down}(\mathrm{swish}(a\, W_{gate} x) \odot W_{up} x)$.

    $a$ and $b$ are constants, one unless given. With `non_linearity="gelu"` it is the paper's GEGLU,
    as in Griffin.

    ??? cite

        Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
    """

    gate_proj: eqx.nn.Linear
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    non_linearity: NonLinearity = eqx.field(static=True)
    gate_scale: float = eqx.field(static=True)
    out_scale: float = eqx.field(static=True)

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        intermediate_dim: int | None = None,
        hidden_ratio: float | None = None,
        use_bias: bool = False,
        non_linearity: NonLinearity = "swish",
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
    ): ...
    @overload
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        out_features: int | None = None,
        intermediate_dim: int | None = None,
        hidden_ratio: float | None = None,
        use_bias: bool = False,
        non_linearity: NonLinearity = "swish",
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
    ): ...
    @sizes_first
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        key: PRNGKeyArray,
        intermediate_dim: int | None = None,
        hidden_ratio: float | None = None,
        use_bias: bool = False,
        non_linearity: NonLinearity = "swish",
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
    ):
        """**Arguments:**

        - `in_features`, `key`.
        - `out_features`: `in_features` if left out.
        - `intermediate_dim`: width between the maps.
        - `hidden_ratio`: instead of `intermediate_dim`, which then is
            `in_features * hidden_ratio * 2/3` (as many parameters as a plain MLP of that ratio),
            rounded up to a multiple of 256. 4 if both are left out.
        - `use_bias`: of all three maps.
        - `non_linearity`: what the gate goes through, by name.
        - `gate_scale`, `out_scale`: $a$ and $b$, as Falcon-H1 has them.

        **Raises:**

        `ValueError` if both `intermediate_dim` and `hidden_ratio` are given, for an unknown
        non-linearity, or scales that are not positive.
        """
        check_name("non_linearity", non_linearity, NonLinearity)
        if intermediate_dim is not None and hidden_ratio is not None:
            raise ValueError(
                "`intermediate_dim` and `hidden_ratio` both set the inner width; got "
                f"{intermediate_dim} and {hidden_ratio}. Give one of them."
            )
        if hidden_ratio is not None and not 0 < hidden_ratio < math.inf:
            raise ValueError(f"`hidden_ratio` must be positive and finite; got {hidden_ratio}.")
        out_features = in_features if out_features is None else out_features
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        if intermediate_dim is None:
            ratio = 4 if hidden_ratio is None else hidden_ratio
            intermediate_dim = 256 * math.ceil(round(in_features * ratio * 2 / 3, 6) / 256)
        intermediate_dim = check_size("intermediate_dim", intermediate_dim)
        gate_key, up_key, down_key = draw.split(key, 3)
        self.gate_proj = draw.linear(in_features, intermediate_dim, use_bias, key=gate_key)
        self.up_proj = draw.linear(in_features, intermediate_dim, use_bias, key=up_key)
        self.down_proj = draw.linear(intermediate_dim, out_features, use_bias, key=down_key)
        self.in_features = in_features
        self.non_linearity = non_linearity
        check_positive("gate_scale", gate_scale)
        check_positive("out_scale", out_scale)
        self.gate_scale = gate_scale
        self.out_scale = out_scale

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... out"]:
        check_features(self, x, self.in_features)
        gate = NON_LINEARITIES[self.non_linearity](self.gate_scale * linear(self.gate_proj, x))
        return self.out_scale * linear(self.down_proj, gate * linear(self.up_proj, x))
