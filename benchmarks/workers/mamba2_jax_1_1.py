"""mamba2-jax 1.1.2 of the package index: its scan of Mamba-2."""

import jax.numpy as jnp
from job import Job
from mamba2_jax import Mamba2Config, ssd_forward
from measuring import parameters, training_job, versions

__all__ = ["prepare", "versions"]


def prepare(case: dict, arrays: dict) -> Job:
    chunk_size = Mamba2Config().chunk_size

    def run(p, inputs):
        x, dt, B, C = inputs
        heads = jnp.zeros(x.shape[1])
        B, C = (jnp.broadcast_to(v, (len(x), x.shape[1], case["state"]))[None] for v in (B, C))
        before_softplus = jnp.log(jnp.expm1(dt))  # softplus being part of the scan
        return ssd_forward(
            x[None],
            before_softplus[None],
            p["A"],
            B,
            C,
            chunk_size,
            D=heads,
            dt_bias=heads,
            dt_min=0,
            dt_max=jnp.inf,
        )[0][0]

    return training_job(run, parameters(arrays), arrays, case)
