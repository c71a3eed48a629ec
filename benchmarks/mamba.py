"""The selective scan, forward and backward, against the usual way to write it in JAX.

The usual way: `lax.associative_scan` over transition and drive for every sample, feature and state.
Both get the same parameters, run in one process in turns, and must agree. Run
`python benchmarks/mamba.py` on an otherwise idle machine.

The work that enters the floor is one exponential forward and one backward for every sample, feature
and state.
"""

import argparse

import jax
import jax.numpy as jnp
import jax.random as jr
from common import compare, header

from discretax.ops import selective_scan

STATE = 16


def ours(A, inputs):
    x, dt, B, C = inputs
    return selective_scan(x, dt, A, B, C)[0]


def usual(A, inputs):
    x, dt, B, C = inputs

    def combine(earlier, later):
        (a_i, b_i), (a_j, b_j) = earlier, later
        return a_j * a_i, a_j * b_i + b_j

    drive = (dt * x)[:, :, None] * B[:, None, :]
    _, h = jax.lax.associative_scan(combine, (jnp.exp(dt[:, :, None] * A), drive))
    return jnp.einsum("ldn,ln->ld", h, C)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    rates = header(repeats, "time | features | state | batch")
    # Without batch there is nothing to transpose: `vmap` moves the batch behind time.
    for length, width, batch in (
        (2048, 256, None),
        (1024, 256, 1),
        (4096, 256, 1),
        (1024, 256, 4),
        (1024, 1024, 1),
    ):
        keys = jr.split(jr.key(0), 4)
        leading = () if batch is None else (batch,)
        x, B, C = (
            jr.normal(key, (*leading, length, size))
            for key, size in zip(keys[:3], (width, STATE, STATE), strict=True)
        )
        dt = jax.nn.softplus(jr.normal(keys[3], x.shape) - 3)
        A = -jnp.tile(jnp.arange(1.0, STATE + 1), (width, 1))
        compare(
            f"{length} | {width} | {STATE} | {'none' if batch is None else batch}",
            {"usual": (usual, A), "ours": (ours, A)},
            (x, dt, B, C),
            repeats,
            rates,
            work=2 * x.size * STATE / rates.exponentials,
            batched=batch is not None,
        )


if __name__ == "__main__":
    main()
