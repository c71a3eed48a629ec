"""memax 0.1.1 of the package index: its LRU."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from measuring import Job, training_job, versions
from memax.equinox.semigroups.lru import LRU

__all__ = ["prepare", "versions"]


def prepare(case: dict, arrays: dict) -> Job:
    params = {k[2:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("p.")}
    layer = LRU(case["state"], case["features"], jr.key(0))
    where = lambda m: [getattr(m, name) for name in params]
    layer = eqx.tree_at(where, layer, list(params.values()))

    def run(layer, x):
        start = jnp.zeros(x.shape[0], bool)
        return layer(layer.initialize_carry(), (x, start))[1]

    return training_job(run, layer, arrays, case)
