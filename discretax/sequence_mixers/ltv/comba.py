from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import linear
from discretax.init import log_rate, step_bias
from discretax.ops import delta_rule
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    Output,
    Projections,
    l2_normalised,
    softplus_decay,
    write_strength,
)


class CombaSequenceMixer(AbstractMatrixMixer):
    r"""Comba: a delta rule that erases less than it writes, and corrects the query.

    $$[q, k, v] = \mathrm{silu}(\mathrm{conv}(W x)), \qquad \beta = \sigma(W_b x), \qquad
    \log\alpha = -e^{\mathrm{A\_log}}\, \mathrm{softplus}(W_a x + \mathrm{dt\_bias})$$
    $$S_t = \alpha_t S_{t-1} + \beta_t \bar k_t\, (v_t - \sigma(b)\, S_{t-1}^T \bar k_t)^T, \qquad
    r = q - d\, \sigma(b)\, k, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T \bar r_t / \sqrt{\mathrm{key}}) \odot
    \sigma(W_g x_t)\big)$$

    with $\bar k = k / \lVert k \rVert$ and $\bar r$ likewise, and $b$, the `inner_decay`, and $d$, the
    `correction`, one number for each head. What is erased is read before the decay of the sample
    ([`discretax.ops.delta_rule`][] with `erase_first`, [The matrix state](../matrix-state.md)).

    flash-linear-attention's layer brings $\sigma(b)\,k$ to length one too, by which $\sigma(b)$ has no
    effect on what is erased. Here it has, as in the paper.

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(value
    heads, key, value)`.

    !!! example

        ```python
        mixer = CombaSequenceMixer(64, num_heads=2, head_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Hu et al., Comba: Improving Bilinear RNNs with Closed-loop Control, 2025 (arXiv:2506.02475).
    """

    projections: Projections
    beta_proj: eqx.nn.Linear
    decay_proj: eqx.nn.Linear
    A_log: Float[Array, " heads"]
    dt_bias: Float[Array, " heads"]
    inner_decay: Float[Array, " key_heads"]
    correction: Float[Array, " key_heads"]
    output: Output

    recurrent_parameters: ClassVar[tuple[str, ...]] = (
        "A_log",
        "dt_bias",
        "inner_decay",
        "correction",
    )

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        num_heads: int = 4,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int | None = 4,
        correction: float = 1.0,
        A_init_range: tuple[float, float] = (0.01, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: of queries and keys.
        - `num_value_heads`: of values, decays and outputs, a multiple of `num_heads`, which it is if
            left out.
        - `head_dim`: length of the keys of a head; `in_features / num_heads` if left out.
        - `value_dim`: length of the values of a head; twice `head_dim` if left out.
        - `conv_width`: how many samples the convolution sees, its own included; None for none.
        - `correction`: where $d$ starts; the authors take 1, and 0.02 for small models.
        - `A_init_range`: $e^{\mathrm{A\_log}}$ starts uniform between these.
        - `dt_min`, `dt_max`, `dt_init_floor`: the softplus starts, without input, log-uniform between
            the first two, and never below the third.
        - `norm_eps`: added to the mean squares of the norm.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or ranges that are none.
        """
        keys = draw.split(key, 7)
        self.projections = sizes = Projections(
            in_features,
            keys[0],
            num_heads,
            head_dim,
            value_dim,
            num_value_heads=num_value_heads,
            value_ratio=2,
            conv_width=conv_width,
        )
        heads = (sizes.value_heads,)
        self.beta_proj = sizes.for_each_head(1, keys[1])
        self.decay_proj = sizes.for_each_head(1, keys[2])
        self.A_log = log_rate(keys[3], heads, *A_init_range)
        self.dt_bias = step_bias(keys[4], heads, dt_min, dt_max, dt_init_floor)
        self.inner_decay = jnp.ones(sizes.key_heads)
        self.correction = jnp.full(sizes.key_heads, correction, jnp.result_type(float))
        self.output = Output(
            sizes,
            keys[6],
            gate_proj=sizes.for_each_head(sizes.value_dim, keys[5]),
            activation="sigmoid",
            norm_eps=norm_eps,
        )

    def attend(self, x, q, k, v, state, **options):
        inner = jax.nn.sigmoid(self.inner_decay.astype(state.dtype))[None, :, None]
        correction = self.correction.astype(state.dtype)[None, :, None]
        q, k = q.astype(state.dtype), k.astype(state.dtype)
        q, k = l2_normalised(q - correction * inner * k), l2_normalised(k)
        return delta_rule(
            q,
            k,
            v,
            write_strength(linear(self.beta_proj, x), False),
            softplus_decay(linear(self.decay_proj, x), self.A_log, self.dt_bias),
            state,
            erase=inner * k,
            erase_first=True,
            scale=q.shape[-1] ** -0.5,
            **options,
        )
