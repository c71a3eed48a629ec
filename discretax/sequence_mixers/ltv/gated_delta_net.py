from typing import ClassVar

import equinox as eqx
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


class GatedDeltaNetSequenceMixer(AbstractMatrixMixer):
    r"""Gated DeltaNet: the delta rule with a decay of one number per head and sample.

    $$[q, k, v] = \mathrm{silu}(\mathrm{conv}(W x)), \qquad \beta = \sigma(W_b x), \qquad
    \log\alpha = -e^{\mathrm{A\_log}}\, \mathrm{softplus}(W_a x + \mathrm{dt\_bias})$$
    $$S_t = \alpha_t (I - \beta_t \bar k_t \bar k_t^T) S_{t-1} + \beta_t \bar k_t v_t^T, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T \bar q_t / \sqrt{\mathrm{key}}) \odot
    \mathrm{silu}(W_g x_t)\big)$$

    with $\bar k = k / \lVert k \rVert$ and $\bar q$ likewise. $\alpha$ lets everything fade at once,
    $\beta$ replaces one key's value ([`discretax.ops.delta_rule`][], [The matrix
    state](../matrix-state.md)). It is the mixer of Qwen3-Next, Qwen3.5 and, with
    `negative_eigenvalues`, of Olmo-Hybrid.

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(value
    heads, key, value)`.

    !!! example

        ```python
        mixer = GatedDeltaNetSequenceMixer(64, num_heads=2, num_value_heads=4, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Yang, Kautz and Hatamizadeh, Gated Delta Networks: Improving Mamba2 with Delta Rule, ICLR 2025
        (arXiv:2412.06464).
    """

    projections: Projections
    beta_proj: eqx.nn.Linear
    decay_proj: eqx.nn.Linear
    A_log: Float[Array, " heads"]
    dt_bias: Float[Array, " heads"]
    output: Output
    negative_eigenvalues: bool = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

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
        negative_eigenvalues: bool = False,
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
        - `negative_eigenvalues`: $\beta$ up to 2 instead of 1.
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
        gate_proj = sizes.for_each_head(sizes.value_dim, keys[5])
        self.output = Output(sizes, keys[6], gate_proj=gate_proj, norm_eps=norm_eps)
        self.negative_eigenvalues = negative_eigenvalues

    def attend(self, x, q, k, v, state, **options):
        q, k = l2_normalised(q), l2_normalised(k)
        beta = write_strength(linear(self.beta_proj, x), self.negative_eigenvalues)
        log_decay = softplus_decay(linear(self.decay_proj, x), self.A_log, self.dt_bias)
        return delta_rule(q, k, v, beta, log_decay, state, scale=q.shape[-1] ** -0.5, **options)
