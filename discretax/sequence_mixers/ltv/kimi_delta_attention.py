from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import linear
from discretax._types import Values
from discretax.init import log_rate, step_bias
from discretax.ops import delta_rule
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    LowRank,
    Output,
    Projections,
    l2_normalised,
    rate_and_biased,
    softplus_decay,
    write_strength,
)


class KimiDeltaAttentionSequenceMixer(AbstractMatrixMixer):
    r"""Kimi Delta Attention: the delta rule with a decay for each key channel.

    $$[q, k, v] = \mathrm{silu}(\mathrm{conv}(W x)), \qquad \beta = \sigma(W_b x), \qquad
    \log\alpha = -e^{\mathrm{A\_log}}\, \mathrm{softplus}(f + \mathrm{dt\_bias}), \qquad
    f = W_{f2} W_{f1} x$$
    $$S_t = (I - \beta_t \bar k_t \bar k_t^T)\, \mathrm{Diag}(\alpha_t)\, S_{t-1}
    + \beta_t \bar k_t v_t^T, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T \bar q_t / \sqrt{\mathrm{key}}) \odot
    \sigma(W_{g2} W_{g1} x_t)\big)$$

    with $\bar k = k / \lVert k \rVert$ and $\bar q$ likewise. With a `lower_bound` $b < 0$ the decay is
    $\log\alpha = b\, \sigma(e^{\mathrm{A\_log}} (f + \mathrm{dt\_bias}))$ instead, and no channel
    forgets by more than $e^b$ a sample. See [`discretax.ops.delta_rule`][] and [The matrix
    state](../matrix-state.md). It is the mixer of Kimi Linear.

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(value
    heads, key, value)`.

    !!! example

        ```python
        mixer = KimiDeltaAttentionSequenceMixer(64, num_heads=2, head_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Kimi Team, Kimi Linear: An Expressive, Efficient Attention Architecture, 2025
        (arXiv:2510.26692).
    """

    projections: Projections
    beta_proj: eqx.nn.Linear
    decay_proj: LowRank
    A_log: Float[Array, " heads"]
    dt_bias: Float[Array, "heads key"]
    output: Output
    negative_eigenvalues: bool = eqx.field(static=True)
    lower_bound: float | None = eqx.field(static=True)

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
        lower_bound: float | None = None,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        gate_bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: of queries and keys.
        - `num_value_heads`: of values, decays and outputs, a multiple of `num_heads`, which it is if
            left out.
        - `head_dim`: length of the keys of a head; `in_features / num_heads` if left out.
        - `value_dim`: length of the values of a head, and the rank of $W_{f2} W_{f1}$ and
            $W_{g2} W_{g1}$; `head_dim` if left out.
        - `conv_width`: how many samples the convolution sees, its own included; None for none.
        - `negative_eigenvalues`: $\beta$ up to 2 instead of 1.
        - `lower_bound`: $b$, the least log decay; None for none.
        - `A_init_range`: $e^{\mathrm{A\_log}}$ starts uniform between these; at one with a
            `lower_bound`.
        - `dt_min`, `dt_max`, `dt_init_floor`: the softplus starts, without input, log-uniform between
            the first two, and never below the third.
        - `gate_bias`: of $W_{g2}$.
        - `norm_eps`: added to the mean squares of the norm.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, ranges that are none or a lower bound
        that is not negative.
        """
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(
                "`lower_bound` is the least logarithm of a decay: negative, or None for none; got "
                f"{lower_bound}."
            )
        keys = draw.split(key, 7)
        self.projections = sizes = Projections(
            in_features,
            keys[0],
            num_heads,
            head_dim,
            value_dim,
            num_value_heads=num_value_heads,
            conv_width=conv_width,
        )
        rank, channels = sizes.value_dim, (sizes.value_heads, sizes.key_dim)
        self.beta_proj = sizes.for_each_head(1, keys[1])
        self.decay_proj = LowRank(sizes, rank, sizes.key_dim, keys[2], use_bias=False)
        self.A_log = (
            log_rate(keys[3], channels[:1], *A_init_range)
            if lower_bound is None
            else jnp.zeros(channels[:1])
        )
        self.dt_bias = step_bias(keys[4], channels, dt_min, dt_max, dt_init_floor)
        self.output = Output(
            sizes,
            keys[6],
            gate_proj=LowRank(sizes, rank, sizes.value_dim, keys[5], use_bias=gate_bias),
            activation="sigmoid",
            norm_eps=norm_eps,
        )
        self.negative_eigenvalues = negative_eigenvalues
        self.lower_bound = lower_bound

    def attend(self, x, q, k, v, state, **options):
        q, k = l2_normalised(q), l2_normalised(k)
        beta = write_strength(linear(self.beta_proj, x), self.negative_eigenvalues)
        log_decay = self._log_decay(self.decay_proj(x))
        return delta_rule(q, k, v, beta, log_decay, state, scale=q.shape[-1] ** -0.5, **options)

    def _log_decay(self, f: Values) -> Float[Array, "time heads key"]:
        if self.lower_bound is None:
            return softplus_decay(f, self.A_log, self.dt_bias)
        rate, biased = rate_and_biased(f, self.A_log, self.dt_bias)
        return self.lower_bound * jax.nn.sigmoid(rate * biased)
