"""What the benchmarks share: two ways to compute the same, in turns in one process.

Each benchmark prints the median time of forward and backward, the quartiles, the temporary memory
that XLA reports, and the time in units of a floor that it names: input, output and their gradients
once through memory at the machine's measured copy rate, or the work that it counts at the measured
rate for such work, whichever takes longer.
"""

import functools as ft
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree


class Rates(NamedTuple):
    products: float  # of matrices, in floating point operations per second
    exponentials: float  # per second
    copies: float  # bytes read and written per second


def header(repeats: int, columns: str) -> Rates:
    """Prints the machine and the head of a table whose first columns are those; returns the rates."""
    rates = measured_rates()
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].platform}: "
        f"products at {rates.products / 1e9:.0f} GFLOP/s, exponentials at "
        f"{rates.exponentials / 1e9:.2f}e9/s, copies at {rates.copies / 1e9:.1f} GB/s; "
        f"{repeats} repeats\n"
    )
    print(
        f"| {columns} | | ms, median (quartiles) | speed | temporary MB | leaner | x floor "
        "| disagree |"
    )
    print("|" + "---|" * (columns.count("|") + 8))
    return rates


def compare(
    label: str,
    variants: dict[str, tuple[Callable[..., Any], PyTree]],
    x: PyTree[jax.Array],
    repeats: int,
    rates: Rates,
    *,
    work: float = 0.0,
    batched: bool = True,
) -> None:
    """Prints a row for each variant, `(f, model)` by name, the first of them the one to compare with.

    `f(model, x)` takes one sequence; `x` has a leading axis of batch, unless `batched` is False. `work` is the least time in
    seconds that computing takes.
    """
    compiled = {
        name: compile_training(f, model, x, batched) for name, (f, model) in variants.items()
    }
    results = [f(*args) for f, args in compiled.values()]
    if len({id(model) for _, model in variants.values()}) > 1:  # other parameters, other gradients
        results = [(value, d_x) for value, (_, d_x) in results]
    error = max(disagreement(results[0], result) for result in results)
    if not error < 1e-4:
        raise AssertionError(f"they disagree by {error:.1e} of the largest value")

    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, (f, args) in compiled.items():
            times[name].append(seconds(f, *args))

    traffic = 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(x)) / rates.copies
    memory = {name: temporary_bytes(f) for name, (f, _) in compiled.items()}
    usual = next(iter(variants))
    base = statistics.median(times[usual])
    for name in compiled:
        low, median, high = statistics.quantiles(times[name], n=4)
        print(
            f"| {label} | {name} | {median * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f}) | "
            f"{base / median:.2f}x | {memory[name] / 2**20:.1f} | "
            f"{memory[usual] / memory[name]:.1f}x | {median / max(work, traffic):.1f} | "
            f"{error:.0e} |",
            flush=True,
        )


def compile_training(f, model, x, batched=True):
    """Forward and backward over a batch, with respect to parameters and input."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def run(params, x):
        one = lambda x: f(eqx.combine(params, static), x)
        return (jax.vmap(one) if batched else one)(x)

    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, x, weights):
        return jnp.vdot(run(params, x), weights)

    weights = jr.normal(jr.key(2), jax.eval_shape(run, params, x).shape)
    return loss.lower(params, x, weights).compile(), (params, x, weights)


def disagreement(expected, actual) -> float:
    """The largest difference, relative to the largest entry of its leaf."""
    leaves = zip(*map(jax.tree.leaves, (expected, actual)), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in leaves)


def temporary_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def seconds(f, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def measured_rates() -> Rates:
    """The best of eleven of each."""
    a, long = jnp.ones((2048, 2048)), jnp.ones(2**25)

    def best(f, *args):
        f = jax.jit(f)
        return min(seconds(f, *args) for _ in range(11))

    return Rates(
        products=2 * 2048**3 / best(jnp.matmul, a, a),
        exponentials=long.size / best(lambda v: jnp.exp(v).sum(), long),
        copies=2 * long.nbytes / best(lambda v: v + 1, long),
    )
