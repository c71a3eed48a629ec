"""Linear attention with a decay: what is written fades, and nothing is erased."""

from jaxtyping import Array, Bool, Float, Int

from discretax.ops._matrix_state.arguments import as_samples, check_decay
from discretax.ops._matrix_state.run import matrix_state


def gated_linear_attention(
    q: Float[Array, "time key_heads key"],
    k: Float[Array, "time key_heads key"],
    v: Float[Array, "time heads value"],
    beta: Float[Array, "time heads"] | None = None,
    log_decay: Float[Array, " heads"]
    | Float[Array, "time heads"]
    | Float[Array, "time heads key"]
    | None = None,
    initial_state: Float[Array, "heads key value"] | None = None,
    *,
    scale: float = 1.0,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "time heads value"], Float[Array, "heads key value"]]:
    r"""Each head is a matrix that decays and to which a product of two vectors is added.

    $$S_t = \mathrm{Diag}(\alpha_t)\, S_{t-1} + \beta_t k_t v_t^T, \qquad y_t = c\, S_t^T q_t$$

    with $\alpha = e^{\mathrm{log\_decay}}$ and $c$ the `scale`. Mamba-2's scan, RetNet, GLA, HGRN2
    and the mLSTM are of this kind ([The matrix state](../matrix-state.md)).

    Within a chunk the states are never formed. With $s_i$ the sum of the log decays up to sample $i$
    and $S$ the state before the chunk,

    $$y_i = \sum_{j \le i} \Big(\sum_n q_{in} k_{jn} e^{s_{in} - s_{jn}}\Big) \beta_j v_j
    + (e^{s_i} \odot S)^T q_i$$

    are products of matrices, and so is the state after it. The forward pass keeps one state per
    chunk, and the backward pass computes the rest again.

    **Arguments:**

    - `q`, `k`: queries and keys. Each head of them serves `heads / key_heads` heads of values: head
        $i$ takes those of $\lfloor i \cdot \mathrm{key\_heads} / \mathrm{heads} \rfloor$.
    - `v`: values.
    - `beta`: by how much each sample is written; one if left out.
    - `log_decay`: the logarithm of the decay, 0 or less: a constant per head, a number per sample
        and head, or one for each key channel too; 0, no decay, if left out.
    - `initial_state`: the state before the first sample; zero if left out.
    - `scale`: of the output. $1/\sqrt{\mathrm{key}}$ is usual, and not taken by itself.
    - `length`: number of valid samples; those at or past it leave the state as it is.
    - `resets`: where True at `t`, the state before `t` is zero. It is selected, not multiplied, so
        that a NaN in the past does not pass. For gradients put a finite number in its place before
        the call, `jnp.where(jnp.isfinite(x), x, 0)`: its product with a cotangent of zero is NaN.
    - `chunk_size`: samples in a chunk.

    **Returns:**

    The output, in the type of `v`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` if shapes do not fit, the heads cannot be shared out among the key heads, an input
    is not real, or a log decay is positive where the numbers are known (outside `jax.jit`).

    ??? cite

        Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, ICML 2024
        (arXiv:2312.06635).
    """
    samples = as_samples(q, k, v, beta, log_decay, None, initial_state)
    check_decay(log_decay)
    y, state = matrix_state(
        samples, initial_state, scale=scale, length=length, resets=resets, chunk_size=chunk_size
    )
    return y.astype(v.dtype), state
