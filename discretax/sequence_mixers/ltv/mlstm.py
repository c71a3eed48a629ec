from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_positive, linear, soft_capped
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.ops import mlstm
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache
from discretax.sequence_mixers.ltv._matrix_memory import (
    Output,
    Projections,
    keys_of_half,
    layer_normalised,
)


class MLSTMCache(NamedTuple):
    """The memory with the normaliser as its last column, both divided by $e^m$, and the maximum $m$."""

    memory: Float[Array, "heads key value+1"]
    maximum: Float[Array, " heads"]


class MLSTMSequenceMixer(AbstractRecurrentMixer[MLSTMCache]):
    r"""The mLSTM of the xLSTM: a matrix for each head, written to with exponential weights.

    $$C_t = \sigma(f_t)\, C_{t-1} + e^{i_t} k_t v_t^T, \qquad
    n_t = \sigma(f_t)\, n_{t-1} + e^{i_t} k_t, \qquad
    r_t = \frac{C_t^T q_t}{\max(|n_t^T q_t|, \sqrt{\mathrm{key}})}$$
    $$y_t = W_o\, \big(w \odot \mathrm{norm}(r_t) \odot \sigma(W_g x_t)\big), \qquad
    [q, k, v] = W x, \qquad i = a \tanh\frac{W_i x + b_i}{a}, \qquad
    f = a \tanh\frac{W_f x + b_f}{a}$$

    with one $i$ and one $f$ for each head, bent by the `gate_soft_cap` $a$, and $\mathrm{norm}$ taking
    off each head's mean and dividing by its standard deviation. $C$ and $n$ are kept divided by
    $e^m$, with a running maximum $m$ of the exponents: [`discretax.ops.mlstm`][]. The layer is that of
    xLSTM 7B; the first paper's has a convolution and a skip around the mLSTM, and no cap.

    The cache holds $C$ with $n$ as its last column, `(heads, key, value + 1)`, and $m$, `(heads,)`.

    !!! example

        ```python
        mixer = MLSTMSequenceMixer(64, num_heads=2, forget_bias=(3.0, 6.0), key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Beck et al., xLSTM: Extended Long Short-Term Memory, NeurIPS 2024 (arXiv:2405.04517); xLSTM 7B:
        A Recurrent LLM for Fast and Efficient Inference, ICML 2025 (arXiv:2503.13427).
    """

    projections: Projections
    input_proj: eqx.nn.Linear
    forget_proj: eqx.nn.Linear
    output: Output
    in_features: int = eqx.field(static=True)
    gate_soft_cap: float | None = eqx.field(static=True)

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
        input_bias: float = -10.0,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        gate_soft_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
        use_bias: bool = False,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: matrices.
        - `head_dim`: length of the keys of a head; half of `value_dim`, rounded up, if left out.
        - `value_dim`: length of the values of a head; `in_features / num_heads` if left out.
        - `input_bias`: where $b_i$ starts, $W_i$ starting at zero.
        - `forget_bias`: between which $b_f$ starts, evenly over the heads, $W_f$ starting at zero.
        - `gate_soft_cap`: $a$; None for no cap.
        - `norm_eps`: added to the variances of the norm.
        - `use_bias`: of the norm and of all maps; those of $i$ and $f$ have one in any case.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or a cap that is not positive.
        """
        head_dim, value_dim = keys_of_half(in_features, num_heads, head_dim, value_dim)
        if gate_soft_cap is not None:
            check_positive("gate_soft_cap", gate_soft_cap)
        projections_key, gate_key, out_key = draw.split(key, 3)
        self.projections = sizes = Projections(
            in_features,
            projections_key,
            num_heads,
            head_dim,
            value_dim,
            activation=None,
            use_bias=use_bias,
        )
        self.in_features, heads = sizes.in_features, sizes.value_heads
        self.input_proj = _constant(sizes.in_features, jnp.full(heads, input_bias, float))
        self.forget_proj = _constant(sizes.in_features, jnp.linspace(*forget_bias, heads))
        self.output = Output(
            sizes,
            out_key,
            gate_proj=sizes.for_each_head(sizes.value_dim, gate_key, use_bias=use_bias),
            activation="sigmoid",
            norm=layer_normalised,
            norm_eps=norm_eps,
            use_bias=use_bias,
        )
        self.gate_soft_cap = gate_soft_cap

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> MLSTMCache:
        del max_seqlen
        heads, key = self.projections.value_heads, self.projections.key_dim
        columns = self.projections.value_dim + 1
        return MLSTMCache(
            zero_cache(batch_size, (heads, key, columns), dtype),
            zero_cache(batch_size, (heads,), dtype),
        )

    def mix(
        self,
        x: Values,
        cache: MLSTMCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, MLSTMCache]:
        refuse_timesteps(self, integration_timesteps, "how it forgets is the input's choice")
        q, k, v, _ = self.projections(x, None, length, resets)
        dtype = accumulation_dtype(x, self.forget_proj.weight)
        # What an exponent is off by, its weight is off by as a factor.
        gate = lambda layer: soft_capped(linear(layer, x.astype(dtype)), self.gate_soft_cap)
        y, state = mlstm(
            q,
            k,
            v,
            gate(self.input_proj),
            gate(self.forget_proj),
            (cache.memory, cache.maximum),
            scale=q.shape[-1] ** -0.5,
            length=length,
            resets=resets,
        )
        return self.output(y, x), MLSTMCache(*state)


def _constant(in_features: int, bias: Float[Array, " heads"]) -> eqx.nn.Linear:
    """What starts at the same numbers whatever the input."""
    return draw.linear_of(jnp.zeros((len(bias), in_features)), bias)
