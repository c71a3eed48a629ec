from typing import ClassVar

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_positive, check_size
from discretax._types import accumulation_dtype
from discretax.ops import gated_linear_attention
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    LowRank,
    Output,
    Projections,
    keys_of_half,
)


class GLASequenceMixer(AbstractMatrixMixer):
    r"""Gated linear attention: a matrix for each head, with a decay for each key channel.

    $$[q, k, v] = W x, \qquad \log\alpha = \log\sigma(W_{f2} W_{f1} x + b_f) / \tau$$
    $$S_t = \mathrm{Diag}(\alpha_t)\, S_{t-1} + k_t v_t^T, \qquad
    y_t = W_o\, \big(w \odot \mathrm{rms}(S_t^T q_t / \sqrt{\mathrm{key}}) \odot
    \mathrm{silu}(W_g x_t)\big)$$

    The temperature $\tau$ keeps the decays near one. With a `conv_width` queries, keys and values go
    through a short convolution and a silu. See [`discretax.ops.gated_linear_attention`][] and [The
    matrix state](../matrix-state.md).

    The paper's equations normalise each head by mean and variance, its authors' code by the root of
    the mean square, as here.

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(heads,
    key, value)`.

    !!! example

        ```python
        mixer = GLASequenceMixer(64, num_heads=2, key=key)
        y, cache = mixer(x, resets=resets)  # x, y: (time, 64), resets: (time,)
        ```

    ??? cite

        Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, ICML 2024
        (arXiv:2312.06635).
    """

    projections: Projections
    decay_proj: LowRank
    output: Output
    temperature: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int | None = None,
        decay_rank: int = 16,
        temperature: float = 16.0,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: length of the keys of a head; half of `value_dim`, rounded up, if left out.
        - `value_dim`: length of the values of a head; `in_features / num_heads` if left out.
        - `conv_width`: how many samples the convolution sees, its own included; None for none.
        - `decay_rank`: of $W_{f2} W_{f1}$.
        - `temperature`: $\tau$.
        - `norm_eps`: added to the mean squares of the norm.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or a temperature that is not positive.
        """
        head_dim, value_dim = keys_of_half(in_features, num_heads, head_dim, value_dim)
        decay_rank = check_size("decay_rank", decay_rank)
        check_positive("temperature", temperature)
        projections_key, decay_key, gate_key, out_key = draw.split(key, 4)
        self.projections = sizes = Projections(
            in_features,
            projections_key,
            num_heads,
            head_dim,
            value_dim,
            conv_width=conv_width,
            activation=None if conv_width is None else "silu",
        )
        self.decay_proj = LowRank(sizes, decay_rank, sizes.key_dim, decay_key, use_bias=True)
        gate_proj = sizes.for_each_head(sizes.value_dim, gate_key)
        self.output = Output(sizes, out_key, gate_proj=gate_proj, norm_eps=norm_eps)
        self.temperature = temperature

    def attend(self, x, q, k, v, state, **options):
        f = self.decay_proj(x).reshape(k.shape)
        log_decay = jax.nn.log_sigmoid(f.astype(accumulation_dtype(f))) / self.temperature
        scale = q.shape[-1] ** -0.5
        return gated_linear_attention(q, k, v, None, log_decay, state, scale=scale, **options)
