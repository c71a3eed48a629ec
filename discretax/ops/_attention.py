import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from discretax._types import accumulation_dtype
from discretax.ops._running.derivatives import differentiated, push_through
from discretax.ops._running.manual_axes import vary_alike


def masked_attention(
    q: Float[Array, "time heads head"],
    k: Float[Array, "keys kv_heads head"],
    v: Float[Array, "keys kv_heads head"],
    seen: Bool[Array, "time keys"],
    scale: float,
) -> Float[Array, "time heads head"]:
    """Softmax attention of each query to the keys it has `seen`, whose scores are scaled.

    Of many keys, a quarter after the other is left out as long as no query has seen any of the rest:
    those after the queries themselves, and the places of a cache that are empty.
    """
    keys = k.shape[0]
    if not isinstance(keys, int) or keys < MANY:
        return _attention(q, k, v, seen, scale)
    upto = _of_all(jnp.where(seen.any(0), jnp.arange(1, keys + 1), 0).max())
    first = sum((upto > size).astype(int) for size in _sizes(keys)[:-1])
    return _of_first(scale, *vary_alike(q, k, v, seen, first))


def _sizes(keys: int) -> list[int]:
    return [-(-keys * quarters // 4) for quarters in (1, 2, 3, 4)]


def _to_some(size, scale, seen, q, k, v):
    return _attention(q, k[:size], v[:size], seen[:, :size], scale)


# Compiled where the caller is not, too: a choice is, and of new functions it would be at each call.
@ft.partial(jax.jit, static_argnums=0)
def _choose(scale, q, k, v, seen, first):
    of = lambda size: lambda: _to_some(size, scale, seen, q, k, v)
    return lax.switch(first, list(map(of, _sizes(k.shape[0]))))


def _forward(scale, *arguments):
    return _of_first(scale, *arguments), arguments


def _push(scale, arguments, tangents):
    return push_through(ft.partial(_choose, scale), arguments, tangents)


@ft.partial(jax.jit, static_argnums=0)
def _pull(scale, arguments, cotangent):
    """Chosen once more, and computed again: JAX would keep what the derivatives of all four need."""
    q, k, v, seen, first = arguments

    def pull(size):
        return lambda: jax.vjp(ft.partial(_to_some, size, scale, seen), q, k, v)[1](cotangent)

    return *lax.switch(first, list(map(pull, _sizes(k.shape[0])))), None, None


_of_first = differentiated(_choose, _forward, _push, _pull)


MANY = 512  # fewer keys are not worth a choice


@custom_vmap
def _of_all(number: Int[Array, ""]) -> Int[Array, ""]:
    """The largest in a batch, for all of it: what would be chosen for each would all be computed."""
    return number


@_of_all.def_vmap
def _(size, is_batched, numbers):
    del size, is_batched
    return _of_all(numbers.max(0)), False


def _attention(q, k, v, seen, scale):
    # `jax.nn.dot_product_attention` takes the softmax in float32 even of float64, and its derivative in
    # bfloat16 does not run under strict dtype promotion.
    time, _, head_dim = q.shape
    keys, kv_heads = k.shape[:2]
    dtype = accumulation_dtype(q)
    # Heads in front, where the products leave them: no scores are copied from one order into another.
    grouped = q.reshape(time, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    scores = jnp.einsum("kid,skd->kis", grouped.reshape(kv_heads, -1, head_dim), k).astype(dtype)
    # Not -inf: a query that sees nothing, as padding may, would be NaN, and so all gradients.
    scores = jnp.where(seen, scores.reshape(*grouped.shape[:3], -1) * scale, jnp.finfo(dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    narrow = weights.reshape(kv_heads, -1, keys).astype(v.dtype)
    y = jnp.einsum("kis,skd->kid", narrow, v).reshape(grouped.shape).astype(dtype)
    y = y / weights.sum(-1, keepdims=True)
    return y.astype(v.dtype).transpose(2, 0, 1, 3).reshape(q.shape)


def queries_at_a_time(heads: int, keys: int) -> int:
    """So many that their scores stay in the processor's caches."""
    return max(SHORTEST, SCORES[jax.default_backend() == "cpu"] // (heads * keys))


# Of all heads, elsewhere and on a CPU. 512 queries of eight heads to 2048 keys take two busy cores
# 31 ms at 128 a time, 42 ms at 64 a time, 78 ms all at once.
SCORES = 2**25, 2**21
SHORTEST = 16
