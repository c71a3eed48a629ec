"""memax 0.1.1 of the package index: its LRU."""

import jax.numpy as jnp
import jax.random as jr
from job import Job
from measuring import load, parameters, training_job, versions
from memax.equinox.semigroups.lru import LRU

__all__ = ["prepare", "versions"]


def prepare(case: dict, arrays: dict) -> Job:
    layer = load(LRU(case["state"], case["features"], jr.key(0)), parameters(arrays))

    def run(layer, x):
        start = jnp.zeros(x.shape[0], bool)
        return layer(layer.initialize_carry(), (x, start))[1]

    return training_job(run, layer, arrays, case)
