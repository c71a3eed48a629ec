import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from discretax._types import accumulation_dtype


def masked_attention(
    q: Float[Array, "time heads head"],
    k: Float[Array, "keys kv_heads head"],
    v: Float[Array, "keys kv_heads head"],
    seen: Bool[Array, "time keys"],
    scale: float,
) -> Float[Array, "time heads head"]:
    """Softmax attention of each query to the keys it has `seen`, whose scores are scaled."""
    # `jax.nn.dot_product_attention` takes the softmax in float32 even of float64, and its derivative in
    # bfloat16 does not run under strict dtype promotion.
    time, heads, head_dim = q.shape
    dtype = accumulation_dtype(q)
    grouped = q.reshape(time, k.shape[1], -1, head_dim)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k).astype(dtype) * scale
    # Not -inf: a query that sees nothing, as padding may, would be NaN, and so all gradients.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(dtype).min), axis=-1)
    return jnp.einsum("kgts,skd->tkgd", weights.astype(v.dtype), v).reshape(time, heads, head_dim)
