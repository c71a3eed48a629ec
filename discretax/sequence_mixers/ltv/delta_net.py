from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_function, linear
from discretax.ops import delta_rule
from discretax.ops._rms import rms_normalised
from discretax.sequence_mixers.ltv._matrix_memory import (
    AbstractMatrixMixer,
    Output,
    Projections,
    l2_normalised,
    write_strength,
)


class DeltaNetSequenceMixer(AbstractMatrixMixer):
    r"""DeltaNet: a matrix for each head, in which a key's old value makes room for the new one.

    $$[q, k, v] = \mathrm{silu}(\mathrm{conv}(W x)), \qquad \beta = \sigma(W_b x)$$
    $$S_t = (I - \beta_t \bar k_t \bar k_t^T) S_{t-1} + \beta_t \bar k_t v_t^T, \qquad
    y_t = W_o\, (w \odot \mathrm{rms}(c\, S_t^T \bar q_t))$$

    with $\bar k = k / \lVert k \rVert$, $\bar q$ likewise, and $c$ the `scale`, $1/\sqrt{\mathrm{key}}$
    if left out. Nothing decays: what is written stays until the same key is written to again
    ([`discretax.ops.delta_rule`][], [The matrix state](../matrix-state.md)).

    The cache holds the convolution's window, `(conv_width - 1, convolved)`, and the state, `(heads,
    key, value)`.

    !!! example

        ```python
        mixer = DeltaNetSequenceMixer(64, num_heads=2, negative_eigenvalues=True, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
        NeurIPS 2024 (arXiv:2406.06484); negative eigenvalues: Grazzi et al., Unlocking
        State-Tracking in Linear RNNs Through Negative Eigenvalues, ICLR 2025 (arXiv:2411.12537).
    """

    projections: Projections
    beta_proj: eqx.nn.Linear
    output: Output
    negative_eigenvalues: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    key_norm: Callable[[Array], Array] = eqx.field(static=True)

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
        conv_width: int | None = 4,
        shared_beta: bool = False,
        negative_eigenvalues: bool = False,
        gate: bool = False,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        scale: float | None = None,
        activation: Literal["silu"] | None = "silu",
        key_norm: Callable[[Array], Array] = l2_normalised,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: length of the keys of a head; `in_features / num_heads` if left out.
        - `value_dim`: length of the values of a head; `head_dim` if left out.
        - `conv_width`: how many samples the convolution sees, its own included; None for none.
        - `shared_beta`: one $\beta$ for all heads instead of one each.
        - `negative_eigenvalues`: $\beta$ up to 2 instead of 1.
        - `gate`: multiplies what is read by $\mathrm{silu}(W_g x)$.
        - `output_norm`, `norm_eps`: whether each head's output is normalised, and what is added to
            its mean square.
        - `scale`: $c$.
        - `activation`: of queries, keys and values, `"silu"`; None for none.
        - `key_norm`: brings queries and keys to length one, a function of the last axis.

        **Raises:**

        `ValueError` for sizes below one or that do not divide; `TypeError` for a `key_norm` that is no
        function.
        """
        check_function("key_norm", key_norm, optional=False)
        projections_key, beta_key, gate_key, out_key = draw.split(key, 4)
        self.projections = sizes = Projections(
            in_features,
            projections_key,
            num_heads,
            head_dim,
            value_dim,
            conv_width=conv_width,
            activation=activation,
        )
        self.beta_proj = (
            draw.linear(sizes.in_features, 1, use_bias=False, key=beta_key)
            if shared_beta
            else sizes.for_each_head(1, beta_key)
        )
        self.output = Output(
            sizes,
            out_key,
            gate_proj=sizes.for_each_head(sizes.value_dim, gate_key) if gate else None,
            norm=rms_normalised if output_norm else None,
            norm_eps=norm_eps,
        )
        self.negative_eigenvalues = negative_eigenvalues
        self.scale = sizes.key_dim**-0.5 if scale is None else scale
        self.key_norm = key_norm

    def attend(self, x, q, k, v, state, **options):
        q, k = self.key_norm(q), self.key_norm(k)
        beta = write_strength(linear(self.beta_proj, x), self.negative_eigenvalues)
        beta = jnp.broadcast_to(beta, v.shape[:2])
        return delta_rule(q, k, v, beta, None, state, scale=self.scale, **options)
