"""RG-LRU, forward and backward, against the usual way to write it in JAX.

The usual way: both gates for the whole sequence, then `lax.associative_scan`. Both get the same
parameters, run in one process in turns, and must agree. Run `python benchmarks/rglru.py` on an
otherwise idle machine.

The floor: matrix products of the gates' blocks and three exponentials for each sample and feature,
forward and twice backward.
"""

import argparse

import jax
import jax.numpy as jnp
import jax.random as jr
from common import compare, header

from discretax.sequence_mixers import RGLRUSequenceMixer

HEADS = 4


def ours(mixer, x):
    return mixer(x)[0]


def usual(mixer, x):
    heads = x.reshape(x.shape[0], HEADS, -1)
    gate = lambda w, b: jax.nn.sigmoid(jnp.einsum("thi,hij->thj", heads, w) + b).reshape(x.shape)
    log_a = -8 * gate(mixer.a_weight, mixer.a_bias) * jax.nn.softplus(mixer.Lambda)
    first = (jnp.arange(x.shape[0]) == 0)[:, None]
    share = jnp.where(first, 1, jnp.sqrt(-jnp.expm1(2 * log_a)))

    def combine(earlier, later):
        (a_i, b_i), (a_j, b_j) = earlier, later
        return a_j * a_i, a_j * b_i + b_j

    drive = share * gate(mixer.input_weight, mixer.input_bias) * x
    return jax.lax.associative_scan(combine, (jnp.exp(log_a), drive))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    rates = header(repeats, "time | features | batch")
    sizes = ((1024, 256), (4096, 256), (16384, 256), (1024, 1024), (4096, 1024))
    for length, width in sizes:
        mixer = RGLRUSequenceMixer(width, jr.key(0), num_heads=HEADS)
        numbers = length * width
        products = 3 * 2 * 2 * numbers * width / HEADS / rates.products
        compare(
            f"{length} | {width} | none",
            {"usual": (usual, mixer), "ours": (ours, mixer)},
            jr.normal(jr.key(1), (length, width)),
            repeats,
            rates,
            work=products + 9 * numbers / rates.exponentials,
            batched=False,
        )


if __name__ == "__main__":
    main()
