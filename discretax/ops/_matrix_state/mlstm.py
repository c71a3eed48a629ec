"""The matrix memory of the xLSTM: exponential gates, held in range by a running maximum."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from discretax._timeseries import check_length, check_resets, valid_samples, zero_padding
from discretax._types import accumulation_dtype
from discretax.ops._checks import check_array
from discretax.ops._matrix_state.arguments import as_samples
from discretax.ops._matrix_state.run import matrix_state
from discretax.ops._running.split_time import incoming_state

MLSTMState = tuple[Float[Array, "heads key value+1"], Float[Array, " heads"]]


def mlstm(
    q: Float[Array, "time key_heads key"],
    k: Float[Array, "time key_heads key"],
    v: Float[Array, "time heads value"],
    input_gate: Float[Array, "time heads"],
    forget_gate: Float[Array, "time heads"],
    initial_state: MLSTMState | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    length: Int[Array, ""] | int | None = None,
    resets: Bool[Array, " time"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "time heads value"], MLSTMState]:
    r"""The mLSTM: what is written weighs exponentially, and what is read is a weighted mean.

    $$C_t = \sigma(f_t)\, C_{t-1} + e^{i_t} k_t v_t^T, \qquad
    n_t = \sigma(f_t)\, n_{t-1} + e^{i_t} k_t, \qquad
    y_t = \frac{c\, C_t^T q_t}{\max(|c\, n_t^T q_t|, 1)}$$

    $e^{i}$ overflows, so $C$ and $n$ are kept divided by $e^{m}$, with the running maximum
    $m_t = \max(\log\sigma(f_t) + m_{t-1},\; i_t)$: then they are
    [`discretax.ops.gated_linear_attention`][] with the log decay
    $\log\sigma(f_t) + m_{t-1} - m_t \le 0$ and the weights $e^{i_t - m_t} \le 1$, $n$ being one more
    column of values, all ones.

    **Arguments:**

    - `q`, `k`, `v`, `scale`, `length`, `resets`, `chunk_size`: as in
        [`discretax.ops.gated_linear_attention`][].
    - `input_gate`, `forget_gate`: $i$ and $f$, before their activations.
    - `initial_state`: $C$ with $n$ as its last column, both divided by $e^m$, and $m$; zero if left
        out.
    - `eps`: added to the denominator.

    **Returns:**

    The output, in the type of `v`, and the state after the last valid sample.

    **Raises:**

    `ValueError` if shapes do not fit.

    ??? cite

        Beck et al., xLSTM: Extended Long Short-Term Memory, NeurIPS 2024 (arXiv:2405.04517).
    """
    if v.ndim != 3:
        raise ValueError(
            f"`v` must be (time, heads, value); got {v.shape}. Use `jax.vmap` to batch."
        )
    time, heads, _ = v.shape
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        check_array(name, gate, time=time, heads=heads)
    check_length(length, time)
    check_resets(resets, time)
    memory, start = (None, None) if initial_state is None else initial_state
    check_array("the running maximum", start, heads=heads)
    dtype = accumulation_dtype(*jax.tree.leaves((q, k, v, input_gate, forget_gate, initial_state)))
    start = jnp.zeros(heads, dtype) if start is None else start.astype(dtype)
    i, log_f = input_gate.astype(dtype), jax.nn.log_sigmoid(forget_gate.astype(dtype))
    if length is not None:  # padding neither writes nor forgets
        valid = valid_samples(time, length)[:, None]
        i, log_f = jnp.where(valid, i, -jnp.inf), jnp.where(valid, log_f, 0)
    fresh = None if resets is None else zero_padding(resets, length)[:, None]
    m, before = _running_maximum(log_f, i, start, fresh)
    samples = as_samples(q, k, v, jnp.exp(i - m), log_f + before - m, None, None)
    check_array("initial_state", memory, heads=heads, key=q.shape[-1], value=v.shape[-1] + 1)
    y, memory = matrix_state(
        samples,
        memory,
        counted=True,
        scale=scale,
        length=length,
        resets=resets,
        chunk_size=chunk_size,
    )
    # Where gates are all but closed, 1 / e^m is not finite, and its derivative times zero is NaN.
    largest = jnp.log(jnp.finfo(dtype).max) - 1
    size = jnp.maximum(jnp.abs(y[..., -1:]), jnp.exp(jnp.minimum(-m, largest))[..., None]) + eps
    last = m[-1] if time else start
    return (y[..., :-1] / size).astype(v.dtype), (memory, last)


def _running_maximum(log_f, i, start, fresh):
    """Of each sample, and of the one before it, which is zero where a sequence begins."""
    if fresh is None:
        gain, own = log_f, i
    else:
        gain = jnp.where(fresh, -jnp.inf, log_f)
        own = jnp.where(fresh, jnp.maximum(log_f, i), i)

    def unless_cut(gain, past, otherwise):
        """A reset has a gain of -inf, and a NaN before it, to which that is added, does not pass."""
        return past if fresh is None else jnp.where(gain == -jnp.inf, otherwise, past)

    def combine(earlier, later):
        (gain_i, m_i), (gain_j, m_j) = earlier, later
        m = jnp.maximum(m_i + gain_j, m_j)
        return unless_cut(gain_j, gain_i + gain_j, gain_j), unless_cut(gain_j, m, m_j)

    gain, own = lax.associative_scan(combine, (gain, own))
    summary = lambda: (gain[-1], own[-1])
    resets = None if fresh is None else fresh[:, 0]
    start = incoming_state(start, summary, resets, jnp.add, jnp.maximum)
    m = unless_cut(gain, jnp.maximum(start[None] + gain, own), own)
    before = jnp.concatenate([start[None], m[:-1]])
    return m, before if fresh is None else jnp.where(fresh, 0, before)
