"""What the operations on a matrix state take, checked and brought into one form."""

import jax.numpy as jnp
from jaxtyping import Array

from discretax._timeseries import known
from discretax.ops._checks import check_array
from discretax.ops._matrix_state.run import Samples


def as_samples(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array | None,
    erase: Array | None,
    initial_state: Array | None,
    *,
    in_steps: bool = False,
) -> Samples:
    """With `in_steps`, a sample may have several."""
    if q.ndim != 3 or v.ndim != k.ndim or k.ndim not in ((3, 4) if in_steps else (3,)):
        raise ValueError(
            "`q` and `k` must be (time, key_heads, key) and `v` (time, heads, value); got "
            f"q: {q.shape}, k: {k.shape} and v: {v.shape}. Use `jax.vmap` to batch."
        )
    (time, groups, key), (heads, value) = q.shape, v.shape[-2:]
    if groups == 0 or heads == 0 or heads % groups:
        raise ValueError(
            "the heads of `v` must be a multiple of those of `q` and `k`; got "
            f"v: {v.shape}, {heads} heads, and q: {q.shape}, {groups} key heads."
        )
    steps = {"steps": k.shape[1]} if k.ndim == 4 else {}
    if 0 in steps.values():
        raise ValueError(f"a sample has at least one step; got k: {k.shape}, none.")
    check_array("q", q, time=time, key_heads=groups, key=key)
    for name, array in (("k", k), ("erase", erase)):
        check_array(name, array, time=time, **steps, key_heads=groups, key=key)
    check_array("v", v, time=time, **steps, heads=heads, value=value)
    check_array("beta", beta, time=time, **steps, heads=heads)
    check_array("initial_state", initial_state, heads=heads, key=key, value=value)
    log_decay = _log_decay(log_decay, v.dtype, time=time, heads=heads, key=key)
    return Samples(q, k, v, beta, log_decay, erase)


def _log_decay(log_decay: Array | None, dtype, **axes: int) -> Array:
    if log_decay is None:
        return jnp.zeros(axes["heads"], dtype)
    kinds = {1: ("heads",), 2: ("time", "heads")}.get(log_decay.ndim, tuple(axes))
    check_array("log_decay", log_decay, **{axis: axes[axis] for axis in kinds})
    return log_decay


def check_decay(log_decay: Array | None) -> None:
    numbers = None if log_decay is None else known(log_decay)
    if numbers is not None and (numbers > 0).any():
        raise ValueError(
            "`log_decay` is the logarithm of a decay of at most one and must not be positive; got "
            f"{numbers.max()}."
        )
