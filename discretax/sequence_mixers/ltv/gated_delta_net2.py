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
    LowRank,
    Output,
    Projections,
    l2_normalised,
    softplus_decay,
    write_strength,
)


class GatedDeltaNet2SequenceMixer(AbstractMatrixMixer):
    r"""Gated DeltaNet-2: what is erased and what is written are gated channel by channel.

    $$[q, k, v] = \mathrm{silu}(\mathrm{conv}(W x)), \qquad b = \sigma(W_b x), \quad
    u = \sigma(W_u x), \qquad
    \log\alpha = -e^{\mathrm{A\_log}}\, \mathrm{softplus}(W_{f2} W_{f1} x + \mathrm{dt\_bias})$$
    $$S_t = \big(I - \bar k_t (b_t \odot \bar k_t)^T\big)\, \mathrm{Diag}(\alpha_t)\, S_{t-1}
    + \bar k_t (u_t \odot v_t)^T, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T \bar q_t / \sqrt{\mathrm{key}}) \odot
    \sigma(W_{g2} W_{g1} x_t)\big)$$

    with $\bar k = k / \lVert k \rVert$ and $\bar q$ likewise; $b$ has one number for each key channel,
    $u$ one for each value channel, where Kimi Delta Attention has one $\beta$ for both
    ([`discretax.ops.delta_rule`][], [The matrix state](../matrix-state.md)).

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(heads,
    key, value)`.

    !!! example

        ```python
        mixer = GatedDeltaNet2SequenceMixer(64, num_heads=2, head_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Gated DeltaNet-2, 2026 (arXiv:2605.22791).
    """

    projections: Projections
    erase_proj: eqx.nn.Linear
    write_proj: eqx.nn.Linear
    decay_proj: LowRank
    A_log: Float[Array, " heads"]
    dt_bias: Float[Array, "heads key"]
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
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = False,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: length of the keys of a head; `in_features / num_heads` if left out.
        - `value_dim`: length of the values of a head, and the rank of $W_{f2} W_{f1}$ and
            $W_{g2} W_{g1}$; `head_dim` if left out.
        - `conv_width`: how many samples the convolution sees, its own included; None for none.
        - `negative_eigenvalues`: $b$ up to 2 instead of 1.
        - `A_init_range`: $e^{\mathrm{A\_log}}$ starts uniform between these.
        - `dt_min`, `dt_max`, `dt_init_floor`: the softplus starts, without input, log-uniform between
            the first two, and never below the third.
        - `norm_eps`: added to the mean squares of the norm.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or ranges that are none.
        """
        keys = draw.split(key, 8)
        self.projections = sizes = Projections(
            in_features, keys[0], num_heads, head_dim, value_dim, conv_width=conv_width
        )
        rank, channels = sizes.value_dim, (sizes.value_heads, sizes.key_dim)
        self.erase_proj = sizes.for_each_head(sizes.key_dim, keys[1])
        self.write_proj = sizes.for_each_head(sizes.value_dim, keys[2])
        self.decay_proj = LowRank(sizes, rank, sizes.key_dim, keys[3], use_bias=False)
        self.A_log = log_rate(keys[4], channels[:1], *A_init_range)
        self.dt_bias = step_bias(keys[5], channels, dt_min, dt_max, dt_init_floor)
        self.output = Output(
            sizes,
            keys[7],
            gate_proj=LowRank(sizes, rank, sizes.value_dim, keys[6], use_bias=True),
            activation="sigmoid",
            norm_eps=norm_eps,
        )
        self.negative_eigenvalues = negative_eigenvalues

    def attend(self, x, q, k, v, state, **options):
        q, k = l2_normalised(q), l2_normalised(k)
        erase = write_strength(linear(self.erase_proj, x), self.negative_eigenvalues)
        write = write_strength(linear(self.write_proj, x), False)
        return delta_rule(
            q,
            k,
            write.reshape(v.shape) * v.astype(write.dtype),
            None,
            softplus_decay(self.decay_proj(x), self.A_log, self.dt_bias),
            state,
            erase=erase.reshape(k.shape) * k,
            scale=q.shape[-1] ** -0.5,
            **options,
        )
