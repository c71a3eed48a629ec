"""The LRU mixer, forward and backward, against the usual way to write it in JAX.

The usual way: `lax.associative_scan` over a complex transition repeated along time, with complex
projections of a real input. Both get the same parameters, run in one process in turns, and must
agree. Run `python benchmarks/lru.py` on an otherwise idle machine.

Prints the median time of forward and backward (in parameters and input), the quartiles, the
temporary memory that XLA reports, and the time in units of the floor: the matrix products' work at
the machine's measured rate, or input, output and their gradients once through memory at its
measured copy rate, whichever takes longer.
"""

import argparse
import platform
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

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


def compile_training(f, mixer, x):
    """Forward and backward over a batch, with respect to parameters and input."""
    params, static = eqx.partition(mixer, eqx.is_inexact_array)

    @jax.jit
    def run(params, x, weights):
        def loss(params, x):
            y = jax.vmap(lambda x: f(eqx.combine(params, static), x))(x)
            return jnp.vdot(y, weights)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    arguments = (params, x, jr.normal(jr.key(2), x.shape))
    return run.lower(*arguments).compile(), arguments


def temporary_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def seconds(f, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def measured_rates() -> tuple[float, float]:
    """The best of eleven: matrix products in GFLOP/s, copies in GB/s read and written."""
    a, long = jnp.ones((2048, 2048)), jnp.ones(2**25)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda v: v + 1)
    product = min(seconds(multiply, a, a) for _ in range(11))
    copied = min(seconds(copy, long) for _ in range(11))
    return 2 * 2048**3 / product / 1e9, 2 * long.nbytes / copied / 1e9


def compare(length: int, width: int, batch: int, repeats: int, rates: tuple[float, float]) -> None:
    mixer = LRUSequenceMixer(width, jr.key(0), state_dim=width, r_min=0.9, r_max=0.999)
    x = jr.normal(jr.key(1), (batch, length, width))
    compiled = {f.__name__: compile_training(f, mixer, x) for f in (usual, ours)}

    results = [f(*args) for f, args in compiled.values()]
    leaves = zip(*map(jax.tree.leaves, results), strict=True)
    error = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in leaves)
    if not error < 1e-4:
        raise AssertionError(f"the two disagree by {error:.1e} of the largest value")

    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, (f, args) in compiled.items():
            times[name].append(seconds(f, *args))

    # Two products forward, four backward, each of (length, width) with (width, 2 * state).
    work = 6 * 2 * batch * length * width * 2 * width / (rates[0] * 1e9)
    traffic = 4 * x.nbytes / (rates[1] * 1e9)
    base = statistics.median(times["usual"])
    memory = {name: temporary_bytes(f) for name, (f, _) in compiled.items()}
    for name in compiled:
        low, median, high = statistics.quantiles(times[name], n=4)
        print(
            f"| {length} | {width} | {batch} | {name} | {median * 1e3:.1f} "
            f"({low * 1e3:.1f}-{high * 1e3:.1f}) | {base / median:.2f}x | {memory[name] / 2**20:.1f} | "
            f"{memory['usual'] / memory[name]:.1f}x | {median / max(work, traffic):.1f} | {error:.0e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rates = measured_rates()
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].platform}: "
        f"products at {rates[0]:.0f} GFLOP/s, copies at {rates[1]:.1f} GB/s; {repeats} repeats\n"
    )
    print(
        "| time | features = state | batch | | ms, median (quartiles) | speed | temporary MB "
        "| leaner | x floor | disagree |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for length, width, batch in (
        (1024, 64, 1),
        (1024, 64, 8),
        (4096, 64, 8),
        (16384, 64, 1),
        (1024, 256, 1),
        (4096, 256, 1),
        (4096, 256, 8),
    ):
        compare(length, width, batch, repeats, rates)


if __name__ == "__main__":
    main()
