import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from discretax._types import accumulation_dtype


def masked_attention(
    q: Float[Array, "time heads head"],
    k: Float[Array, "keys kv_heads head"],
    v: Float[Array, "keys kv_heads head"],
    seen: Bool[Array, "time keys"],
    guard: bool = False,
) -> Float[Array, "time heads head"]:
    """Softmax attention of each query to the keys it has `seen`.

    With `guard`, a key or value that is not finite makes those outputs NaN that see it, and no
    others: a weight of zero alone would not stop it on its way into the sums.
    """
    if not guard:
        return _attention(q, k, v, seen)
    finite = jnp.isfinite(k).all((1, 2)) & jnp.isfinite(v).all((1, 2))
    k, v = (jnp.where(finite[:, None, None], part, 0) for part in (k, v))
    y = _attention(q, k, v, seen)
    return jnp.where((seen & ~finite).any(1)[:, None, None], jnp.nan, y)


# `jax.nn.dot_product_attention` takes the softmax in float32 even of float64, and its derivative in
# bfloat16 does not run under strict dtype promotion.
def _attention(q, k, v, seen):
    time, heads, head_dim = q.shape
    dtype = accumulation_dtype(q)
    grouped = q.reshape(time, k.shape[1], -1, head_dim)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k).astype(dtype) * head_dim**-0.5
    # Not -inf: a query that sees nothing, as padding may, would be NaN, and so all gradients.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(dtype).min), axis=-1)
    return jnp.einsum("kgts,skd->tkgd", weights.astype(v.dtype), v).reshape(time, heads, head_dim)
