"""The LRU mixer, forward and backward, against the usual way to write it in JAX.

The usual way: `lax.associative_scan` over a complex transition repeated along time, with complex
projections of a real input. Both get the same parameters, run in one process in turns, and must
agree. Run `python benchmarks/lru.py` on an otherwise idle machine.

The work that enters the floor is that of the matrix products.
"""

import argparse

import jax
import jax.numpy as jnp
import jax.random as jr
from common import compare, header

from discretax.sequence_mixers import LRUSequenceMixer


def ours(mixer: LRUSequenceMixer, x: jax.Array) -> jax.Array:
    return mixer(x)[0]


def usual(mixer: LRUSequenceMixer, x: jax.Array) -> jax.Array:
    A = jnp.exp(-jnp.exp(mixer.nu_log) + 1j * jnp.exp(mixer.theta_log))
    B = (mixer.B_re + 1j * mixer.B_im) * jnp.exp(mixer.gamma_log)[:, None]
    C = mixer.C_re + 1j * mixer.C_im

    def combine(earlier, later):
        (a_i, b_i), (a_j, b_j) = earlier, later
        return a_j * a_i, a_j * b_i + b_j

    transitions = jnp.repeat(A[None], x.shape[0], axis=0)
    _, h = jax.lax.associative_scan(combine, (transitions, jax.vmap(lambda u: B @ u)(x)))
    return jax.vmap(lambda h, u: (C @ h).real + mixer.D * u)(h, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rates = header(repeats, "time | features = state | batch")
    for length, width, batch in (
        (1024, 64, 1),
        (1024, 64, 8),
        (4096, 64, 8),
        (16384, 64, 1),
        (1024, 256, 1),
        (4096, 256, 1),
        (4096, 256, 8),
    ):
        mixer = LRUSequenceMixer(width, jr.key(0), state_dim=width, r_min=0.9, r_max=0.999)
        # Two products forward, four backward, each of (length, width) with (width, 2 * state).
        operations = 6 * 2 * batch * length * width * 2 * width
        compare(
            f"{length} | {width} | {batch}",
            {"usual": (usual, mixer), "ours": (ours, mixer)},
            jr.normal(jr.key(1), (batch, length, width)),
            repeats,
            rates,
            work=operations / rates.products,
        )


if __name__ == "__main__":
    main()
