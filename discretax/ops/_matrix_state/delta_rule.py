"""The delta rule: what a key already holds is taken away before a new value is written to it."""

from jaxtyping import Array, Bool, Float, Int

from discretax.ops._matrix_state.arguments import as_samples, check_decay
from discretax.ops._matrix_state.run import matrix_state


def delta_rule(
    q: Float[Array, "time key_heads key"],
    k: Float[Array, "time *steps key_heads key"],
    v: Float[Array, "time *steps heads value"],
    beta: Float[Array, "time *steps heads"] | None = None,
    log_decay: Float[Array, " heads"]
    | Float[Array, "time heads"]
    | Float[Array, "time heads key"]
    | None = None,
    initial_state: Float[Array, "heads key value"] | None = None,
    *,
    erase: Float[Array, "time *steps key_heads key"] | None = None,
    erase_first: bool = False,
    scale: float = 1.0,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Array, "time heads value"], Float[Array, "heads key value"]]:
    r"""Each head is a matrix that decays, forgets along one key and is written to along another.

    $$S_t = (I - \beta_t k_t e_t^T)\, \mathrm{Diag}(\alpha_t)\, S_{t-1} + \beta_t k_t v_t^T, \qquad
    y_t = c\, S_t^T q_t$$

    with $\alpha = e^{\mathrm{log\_decay}}$, $c$ the `scale`, and $e = k$ unless an `erase` key is
    given: the state is led towards $S^T k = v$, all the way where $\beta = 1$ and
    $\lVert k \rVert = 1$. $\beta$ up to 2 reflects along $k$ instead: eigenvalues down to -1, which
    counting modulo a number needs (arXiv:2411.12537). DeltaNet, Gated DeltaNet, Kimi Delta Attention
    and their kin are of this kind ([The matrix state](../matrix-state.md)).

    What each sample writes in the end depends on what those before it in its chunk wrote: a
    triangular system of equations, solved by halves. All else is as in
    [`discretax.ops.gated_linear_attention`][].

    **Arguments:**

    - `q`, `k`, `v`, `beta`, `log_decay`, `initial_state`, `scale`, `length`, `resets`: as in
        [`discretax.ops.gated_linear_attention`][]. Keys are of length one, or $\beta \lVert k
        \rVert^2$ at most 2: beyond, the state grows without bound.
    - `k`, `v`, `beta`, `erase` may have an axis of `steps` behind the time: so many follow one
        another within a sample. The decay comes before the first, and the output is read behind the
        last (DeltaProduct).
    - `erase`: $e$; None for $k$.
    - `erase_first`: whether $e$ reads the state before the decay of its sample instead of after it:
        $\mathrm{Diag}(\alpha_t) S_{t-1} - \beta_t k_t e_t^T S_{t-1}$.
    - `chunk_size`: steps in a chunk, best a power of two, to which a chunk is filled up.

    **Returns:**

    The output, in the type of `v`, and the state after the last valid sample, in the type in which
    it accumulates: float32, or float64 if any input is.

    **Raises:**

    `ValueError` as [`discretax.ops.gated_linear_attention`][], and for an `erase` that is not like
    `k`.

    ??? cite

        Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
        NeurIPS 2024 (arXiv:2406.06484).
    """
    samples = as_samples(q, k, v, beta, log_decay, erase, initial_state, in_steps=True)
    check_decay(log_decay)
    y, state = matrix_state(
        samples,
        initial_state,
        erases=True,
        erase_first=erase_first,
        scale=scale,
        length=length,
        resets=resets,
        chunk_size=chunk_size,
    )
    return y.astype(v.dtype), state
