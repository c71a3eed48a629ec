from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_size, linear
from discretax._types import Length, Resets, Timesteps, Values
from discretax.init import short_convolution
from discretax.ops import depthwise_convolution
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache


class ShortConvSequenceMixer(AbstractRecurrentMixer[Float[Array, "past features"]]):
    r"""A short convolution between two gates, which remembers a few samples and no more.

    $$[b, c, u] = W_{in} x, \qquad y = W_{out}\,(c \odot \mathrm{conv}(b \odot u))$$

    The convolution is causal, one filter per feature. In LFM2 such layers stand between layers of
    attention. The cache holds the convolution's window, `(conv_width - 1, features)`.

    !!! example

        ```python
        mixer = ShortConvSequenceMixer(64, conv_width=3, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Liquid AI, LFM2 Technical Report, 2025 (arXiv:2511.23404).
    """

    in_proj: eqx.nn.Linear
    conv_weight: Float[Array, "features width"]
    conv_bias: Float[Array, " features"] | None
    out_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self, in_features: int, key: PRNGKeyArray, *, conv_width: int = 3, use_bias: bool = False
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `conv_width`: how many samples the convolution sees, its own included.
        - `use_bias`: of $W_{in}$, of the convolution and of $W_{out}$.

        **Raises:**

        `ValueError` for a size below one.
        """
        in_features = check_size("in_features", in_features)
        conv_width = check_size("conv_width", conv_width)
        in_key, conv_key, bias_key, out_key = draw.split(key, 4)
        self.in_proj = draw.linear(in_features, 3 * in_features, use_bias, key=in_key)
        self.conv_weight, self.conv_bias = short_convolution(
            conv_key, bias_key, in_features, conv_width, use_bias=use_bias
        )
        self.out_proj = draw.linear(in_features, in_features, use_bias, key=out_key)
        self.in_features = in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "past features"]:
        del max_seqlen
        features, width = self.conv_weight.shape
        return zero_cache(batch_size, (width - 1, features), dtype)

    def mix(
        self,
        x: Values,
        cache: Float[Array, "past features"],
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Float[Array, "past features"]]:
        refuse_timesteps(self, integration_timesteps, "its filters are per sample")
        b, c, u = jnp.split(linear(self.in_proj, x), 3, axis=-1)
        u, window = depthwise_convolution(
            b * u, self.conv_weight, self.conv_bias, cache, length=length, resets=resets
        )
        return linear(self.out_proj, c * u), window
