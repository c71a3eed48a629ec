from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._types import accumulation_dtype
from discretax.ops import gated_linear_attention
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    Output,
    Projections,
    rms_of_all_heads,
)


class HGRN2SequenceMixer(AbstractMatrixMixer):
    r"""HGRN2: what a key channel forgets of its past makes room for the new value.

    $$q = \mathrm{silu}(W_q x), \qquad f = b + (1 - b)\, \sigma(W_f x), \qquad i = W_i x$$
    $$S_t = \mathrm{Diag}(f_t)\, S_{t-1} + (1 - f_t)\, i_t^T, \qquad
    y_t = W_o\, (w \odot \mathrm{rms}(S_t^T q_t))$$

    with the `lower_bound` $b$ of the forget gate $f$, which the paper raises from layer to layer, from
    0 in the first, and trains: the model [`discretax.models.HGRN2`][] does. Each row of a head's state is a weighted mean of the $i$ so far. The norm is one
    over the heads together. The authors' code reads with $q / \sqrt{\mathrm{key}}$, which the norm
    undoes but for its `norm_eps`. See [`discretax.ops.gated_linear_attention`][] and [The matrix
    state](../matrix-state.md).

    $W_f$ is the `k_proj` of the projections, $W_i$ the `v_proj`. The cache holds an empty window and
    the state, `(heads, key, value)`.

    !!! example

        ```python
        mixer = HGRN2SequenceMixer(64, num_heads=2, lower_bound=0.5, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Qin et al., HGRN2: Gated Linear RNNs with State Expansion, COLM 2024 (arXiv:2404.07904).
    """

    projections: Projections
    output: Output
    lower_bound: float | Float[Array, "heads key"]

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
        lower_bound: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: forget gates of a head, the paper's expansion; `in_features / num_heads` if left
            out.
        - `value_dim`: length of the values $i$ of a head; `head_dim` if left out.
        - `lower_bound`: $b$, one number.
        - `norm_eps`: added to the mean square of the norm.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or a lower bound not in [0, 1).
        """
        if not 0 <= lower_bound < 1:
            raise ValueError(
                "`lower_bound` is the least that a forget gate leaves, at least 0 and below 1; got "
                f"{lower_bound}."
            )
        projections_key, out_key = draw.split(key)
        self.projections = sizes = Projections(
            in_features, projections_key, num_heads, head_dim, value_dim, activation=None
        )
        self.output = Output(
            sizes, out_key, gate_proj=None, norm=rms_of_all_heads, norm_eps=norm_eps
        )
        self.lower_bound = lower_bound

    def attend(self, x, q, k, v, state, **options):
        raw = k.astype(accumulation_dtype(k))
        b = lax.broadcast_to_rank(jnp.asarray(self.lower_bound, raw.dtype), raw.ndim)
        # The derivative of log b is not finite at 0, where nothing depends on it.
        log_b = jnp.where(b > 0, jnp.log(jnp.where(b > 0, b, 1)), -jnp.inf)
        # f is also sigma(raw) + b sigma(-raw). Not its logarithm: where the gate closes, f has no digits
        # left, nor has 1 - f where it opens.
        log_f = jnp.logaddexp(jax.nn.log_sigmoid(raw), log_b + jax.nn.log_sigmoid(-raw))
        room = (1 - b) * jax.nn.sigmoid(-raw)
        return gated_linear_attention(jax.nn.silu(q), room, v, None, log_f, state, **options)
