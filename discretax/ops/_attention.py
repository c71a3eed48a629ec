import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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


def _attention(q, k, v, seen):
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=seen[None])
    # JAX's own takes the softmax in float32, whatever it is given.
    time, heads, head_dim = q.shape
    q = q.reshape(time, k.shape[1], -1, head_dim) * head_dim**-0.5
    scores = jnp.where(seen, jnp.einsum("tkgd,skd->kgts", q, k), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(time, heads, head_dim)
