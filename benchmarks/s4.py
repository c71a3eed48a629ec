"""S4D and S4 mixers, forward and backward, against the usual way to write them in JAX.

The usual way: the whole kernel, then a convolution by FFT. S4D's kernel comes from a Vandermonde
matrix, one complex power for each state and lag; S4's from its generating function at the roots of
unity, through Cauchy sums and Woodbury's identity, with C (I - A^L) as its parameter, the matrix
power left out of the time. Both get the same parameters, run in one process in turns, and must
agree. Run `python benchmarks/s4.py` on an otherwise idle machine.

Prints the median time of forward and backward (in parameters and input), the quartiles, the
temporary memory that XLA reports, and the time in units of the floor: input, output and their
gradients once through memory at the machine's measured copy rate.
"""

import argparse

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from common import compare, header

from discretax.sequence_mixers import S4DSequenceMixer, S4SequenceMixer


def ours(mixer, x):
    return mixer(x)[0]


def convolve(kernel, x):
    size = 2 * x.shape[0]
    spectrum = jnp.fft.rfft(x.T, size) * jnp.fft.rfft(kernel, size)
    return jnp.fft.irfft(spectrum, size)[:, : x.shape[0]].T


def vandermonde(mixer, x):
    dt = jnp.exp(mixer.inv_dt)
    A = -jnp.exp(mixer.A_real) - 1j * mixer.A_imag
    B = mixer.B[..., 0] + 1j * mixer.B[..., 1]
    C = mixer.C[0, ..., 0] + 1j * mixer.C[0, ..., 1]
    C = 2 * C * B * (jnp.exp(dt * A) - 1) / A
    powers = jnp.exp((dt * A)[:, :, None] * jnp.arange(x.shape[0]))
    return convolve(jnp.einsum("hn,hnl->hl", C, powers).real, x) + mixer.D[0] * x


def cauchy(mixer, x):
    length = x.shape[0]
    pair = lambda v: jnp.concatenate([v, v.conj()], axis=-1)
    number = lambda v: v[..., 0] + 1j * v[..., 1]
    dt = jnp.exp(mixer.inv_dt)
    A = pair(-jnp.exp(mixer.A_real) - 1j * mixer.A_imag)
    B, P = pair(number(mixer.B)), pair(number(mixer.P[0]))
    C, Q = pair(number(mixer.C[0])), P.conj()
    omega = jnp.exp(-2j * jnp.pi / length * jnp.arange(length // 2 + 1))
    z = 2 * (1 - omega) / (1 + omega)
    resolvent = dt[..., None] / (z - (dt * A)[..., None])
    k00, k01, k10, k11 = (
        jnp.einsum("hn,hnf->hf", left * right, resolvent) for left in (C, Q) for right in (B, P)
    )
    spectrum = (k00 - k01 * k10 / (1 + k11)) * 2 / (1 + omega)
    return convolve(jnp.fft.irfft(spectrum, length), x) + mixer.D[0] * x


def truncated(mixer, length):
    """S4 with C (I - A^L) in place of C: what the generating function takes."""
    A_bar, _, C = mixer.discretize()
    power = jnp.linalg.matrix_power(A_bar, length)
    C = (C - jnp.einsum("chm,hmn->chn", C, power))[..., : mixer.A_real.shape[1]]
    return eqx.tree_at(lambda m: m.C, mixer, jnp.stack([C.real, C.imag], axis=-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    rates = header(repeats, "time | features | state | batch | mixer")
    s4d, s4 = (make(256, jr.key(0), state_dim=64) for make in (S4DSequenceMixer, S4SequenceMixer))
    rows = [("S4D", 1024, None), ("S4D", 4096, None), ("S4D", 16384, None), ("S4D", 1024, 1)]
    rows += [("S4D", 16384, 1), ("S4D", 1024, 8), ("S4", 1024, None), ("S4", 4096, None)]
    for name, length, batch in rows:
        x = jr.normal(jr.key(1), (length, 256) if batch is None else (batch, length, 256))
        variants = {"usual": (vandermonde, s4d), "ours": (ours, s4d)}
        if name == "S4":
            variants = {"usual": (cauchy, truncated(s4, length)), "ours": (ours, s4)}
        label = f"{length} | 256 | 64 | {'none' if batch is None else batch} | {name}"
        compare(label, variants, x, repeats, rates, batched=batch is not None)


if __name__ == "__main__":
    main()
