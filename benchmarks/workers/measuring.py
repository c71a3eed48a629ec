"""What the workers share that run JAX."""

import functools as ft
import platform
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from job import Job, peak_bytes


def versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "jax": f"{jax.__version__} on {jax.devices()[0].platform}",
    }


def parameters(arrays: dict) -> dict[str, jax.Array]:
    return {name[2:]: jnp.asarray(value) for name, value in arrays.items() if name.startswith("p.")}


def load(module: Any, params: dict[str, jax.Array]) -> Any:
    """The module with these in the place of what was drawn, by name."""
    where = lambda module: [getattr(module, name) for name in params]
    for name, drawn, given in zip(params, where(module), params.values(), strict=True):
        assert drawn.shape == given.shape, (name, drawn.shape, given.shape)
    return eqx.tree_at(where, module, list(params.values()))


def training_job(f: Callable[[Any, Any], jax.Array], model: Any, arrays: dict, case: dict) -> Job:
    """Forward and backward of `f(model, x)`, with respect to the model's parameters and to x.

    `arrays["x"]`, or `arrays["x.0"]` and so on where `f` takes several, has a leading axis of batch
    unless the case's batch is None. Where the case says `exact`, the facts have the error of output
    and gradient against the same in double precision.
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    names = sorted(name for name in arrays if name == "x" or name.startswith("x."))
    x = [jnp.asarray(arrays[name]) for name in names]

    def forward(params, x):
        one = lambda *x: f(eqx.combine(params, static), x[0] if names == ["x"] else x)
        return (one if case["batch"] is None else jax.vmap(one))(*x)

    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, x, weights):
        return jnp.vdot(forward(params, x), weights)

    args = params, x, jnp.asarray(arrays["weights"])
    compiled, facts = compiled_with_facts(loss, *args)

    def results(run, params, x, weights):
        _, (_, d_x) = run(params, x, weights)
        y = jax.jit(forward)(params, x)
        return {"y": np.asarray(y)} | {
            f"d_{n}": np.asarray(d) for n, d in zip(names, d_x, strict=True)
        }

    outcome = lambda: results(compiled, *args)
    if case["exact"]:
        with jax.enable_x64(True):
            double = lambda leaf: jnp.asarray(leaf, float)
            expected = results(loss, *jax.tree.map(double, args))
        pairs = [(value, expected[name]) for name, value in outcome().items()]
        facts["error"] = max(float(abs(a - e).max() / abs(e).max()) for a, e in pairs)

    return Job(lambda: jax.block_until_ready(compiled(*args)), outcome, facts)


def classifier_step(
    make: Callable[[jax.Array], Any], x: np.ndarray, labels: np.ndarray
) -> tuple[Any, tuple]:
    """A training step of a model of `make(key)`, not compiled yet, and what it is given at first."""
    model, state = eqx.nn.make_with_state(make)(jax.random.key(0))

    def loss(model, state, x, labels, key):
        run = lambda x, state, key: model(x, state, key=key)
        batched = jax.vmap(run, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        log_p, state = batched(x, state, jax.random.split(key, len(labels)))
        return -log_p[jnp.arange(len(labels)), labels].mean(), state

    step, args = adam_step(model, state, loss)
    return step, (*args, jnp.asarray(x), jnp.asarray(labels), jax.random.key(1))


def adam_step(model: Any, state: Any, loss: Callable[..., tuple]) -> tuple[Any, tuple]:
    """Gradients of `loss(model, state, *inputs)`, which also gives the state after it, and Adam."""
    import optax

    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = optax.adam(1e-3)

    @jax.jit
    def step(params, state, opt_state, *inputs):
        of = lambda params: loss(eqx.combine(params, static), state, *inputs)
        (value, after), gradients = jax.value_and_grad(of, has_aux=True)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), after, opt_state, value

    return step, (params, state, optimiser.init(params))


def classifier_job(make: Callable[[jax.Array], Any], arrays: dict) -> Job:
    return step_job(lambda: classifier_step(make, arrays["x"], arrays["labels"]))


def step_job(
    make: Callable[[], tuple[Any, tuple]], outcome: Callable[[tuple], dict] = lambda _: {}
) -> Job:
    """A whole training step; the outcome is of what the step gives."""
    start = time.perf_counter()
    step, args = make()
    build_seconds = time.perf_counter() - start
    compiled, facts = compiled_with_facts(step, *args)
    run = lambda: jax.block_until_ready(compiled(*args))
    run()
    facts |= {"build_seconds": build_seconds, **peak_bytes(run)}
    return Job(run, lambda: outcome(run()), facts)


def decoding_job(step: Callable[[Any, Any], tuple], cache: Any, x: jax.Array, tokens: int) -> Job:
    """A jitted loop of single steps, each of which reads what the one before has put out."""

    @jax.jit
    def generate(x, cache):
        def body(carry, _):
            y, cache = step(*carry)
            return (0.01 * y, cache), y  # so small that rounding errors fade

        return jax.lax.scan(body, (x, cache), length=tokens)[1]

    compiled, facts = compiled_with_facts(generate, x, cache)
    run = lambda: jax.block_until_ready(compiled(x, cache))
    return Job(run, lambda: {"y": np.asarray(compiled(x, cache))}, facts)


def calling_job(
    step: Callable[[Any, Any, Any], tuple], params: Any, cache: Any, x: jax.Array, tokens: int
) -> Job:
    """Single steps, each of them a call from Python that is given the parameters."""

    @jax.jit
    def call(params, x, cache):
        y, cache = step(params, x, cache)
        return 0.01 * y, cache, y

    compiled, facts = compiled_with_facts(call, params, x, cache)

    def run():
        following, state, outputs = x, cache, []
        for _ in range(tokens):
            following, state, y = compiled(params, following, state)
            outputs.append(y)
        return jax.block_until_ready(outputs)

    return Job(run, lambda: {"y": np.stack(run())}, facts)


def compiled_with_facts(f, *args) -> tuple[Any, dict[str, float]]:
    start = time.perf_counter()
    compiled = f.lower(*args).compile()
    seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return compiled, {"compile_seconds": seconds, "temporary_bytes": temporary}
