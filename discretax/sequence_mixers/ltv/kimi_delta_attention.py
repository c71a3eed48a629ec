from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._features import linear
from discretax._types import accumulation_dtype
from discretax.init import log_rate, step_bias
from discretax.ops import delta_rule
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    LowRank,
    Output,
    Projections,
    l2_normalised,
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
    in_features: int = eqx.field(static=True)
    negative_eigenvalues: bool = eqx.field(static=True)
    lower_bound: float | None = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

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
        keys = jr.split(key, 7)
        self.projections = sizes = Projections(
            in_features,
            keys[0],
            key_heads=num_heads,
            value_heads=num_value_heads,
            key_dim=head_dim,
            value_dim=value_dim,
            conv_width=conv_width,
        )
        in_features, heads = sizes.in_features, sizes.value_heads
        self.beta_proj = eqx.nn.Linear(in_features, heads, use_bias=False, key=keys[1])
        self.decay_proj = LowRank(
            in_features, sizes.value_dim, heads * sizes.key_dim, keys[2], use_bias=False
        )
        self.A_log = (
            log_rate(keys[3], (heads,), *A_init_range) if lower_bound is None else jnp.zeros(heads)
        )
        self.dt_bias = step_bias(keys[4], (heads, sizes.key_dim), dt_min, dt_max, dt_init_floor)
        gate = LowRank(
            in_features, sizes.value_dim, heads * sizes.value_dim, keys[5], use_bias=gate_bias
        )
        self.output = Output(
            heads,
            sizes.value_dim,
            in_features,
            keys[6],
            gate_proj=gate,
            activation="sigmoid",
            norm_eps=norm_eps,
        )
        self.in_features = in_features
        self.negative_eigenvalues = negative_eigenvalues
        self.lower_bound = lower_bound

    def attend(self, x, q, k, v, state, *, length, resets):
        f = self.decay_proj(x).reshape(len(x), *self.dt_bias.shape)
        return delta_rule(
            l2_normalised(q),
            l2_normalised(k),
            v,
            write_strength(linear(self.beta_proj, x), self.negative_eigenvalues),
            self._log_decay(f),
            state,
            scale=q.shape[-1] ** -0.5,
            length=length,
            resets=resets,
        )

    def _log_decay(self, f: Float[Array, "time heads key"]) -> Float[Array, "time heads key"]:
        if self.lower_bound is None:
            return softplus_decay(f, self.A_log, self.dt_bias)
        dtype = accumulation_dtype(f, self.A_log)
        f, A_log, dt_bias = (array.astype(dtype) for array in (f, self.A_log, self.dt_bias))
        return self.lower_bound * jax.nn.sigmoid(jnp.exp(A_log)[:, None] * (f + dt_bias))
