"""A training step of language models of 130 million parameters, by the kernels and by XLA's forms."""

import contextlib
import functools as ft
import math
import statistics
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import discretax
from benchmarks.kernels import failures, form_of
from benchmarks.report import quartiles
from discretax import ops
from discretax.architectures import LanguageModel
from discretax.models import scan_blocks
from discretax.sequence_mixers import (
    GatedDeltaNetSequenceMixer,
    Mamba2SequenceMixer,
    MambaSequenceMixer,
)

MIXERS = {
    "Mamba": MambaSequenceMixer,
    "Mamba-2": Mamba2SequenceMixer,
    # Keys of three quarters of the width, as in the paper.
    "Gated DeltaNet": ft.partial(GatedDeltaNetSequenceMixer, num_heads=6, head_dim=96),
}
# What the library chooses, and XLA's form; that is one where no kernel can be chosen.
FORMS = {"Mamba": ("chosen", "xla"), "Mamba-2": ("chosen",), "Gated DeltaNet": ("chosen",)}
TOLERANCE = 2e-2  # between two forms, as for bfloat16 elsewhere
COLUMNS = (
    "| model | form | tokens/s | ms per step (quartiles) | peak GB | compile s | loss | differs |"
)
NOT_MEASURED = (
    "Not yet measured: this needs an NVIDIA GPU from Hopper on, and there "
    "`python -m benchmarks.on_a_gpu`."
)


class Case(NamedTuple):
    model: str
    form: str
    width: int = 768
    blocks: int = 24
    vocabulary: int = 50280
    batch: int = 8
    time: int = 2048

    def __str__(self) -> str:
        return f"{self.model} {self.form}"


def cases(tiny: bool = False) -> list[Case]:
    sizes = (32, 2, 64, 2, 9) if tiny else ()
    return [Case(model, form, *sizes) for model, forms in FORMS.items() for form in forms]


class Training(NamedTuple):
    """What a step takes: parameters and optimiser's state, which it replaces, and the rest."""

    params: Any
    opt_state: Any
    state: eqx.nn.State
    tokens: jax.Array


optimiser = optax.adamw(3e-4)


def build(case: Case) -> tuple[Training, Any]:
    """What a step takes, the same for each form, and the model's other part."""
    make = ft.partial(
        LanguageModel,
        vocab_size=case.vocabulary,
        hidden_dim=case.width,
        num_blocks=case.blocks,
        pattern=(MIXERS[case.model],),
        dtype=jnp.bfloat16,
    )
    model, state = eqx.nn.make_with_state(make)(jr.key(0))
    params, static = eqx.partition(scan_blocks(model), eqx.is_inexact_array)
    tokens = jr.randint(jr.key(1), (case.batch, case.time), 0, case.vocabulary)
    return Training(params, optimiser.init(params), state, tokens), static


def shapes(case: Case) -> tuple[Training, Any]:
    """Of the same, computing nothing."""
    return eqx.filter_eval_shape(build, case)


def lower(case: Case, training: Training, static: Any, platform: str | None = None) -> Any:
    """The step, lowered: `(params, opt_state, state, tokens)` to the first two, loss and norm."""

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, state, tokens):
        def loss_of(params):
            model = eqx.combine(params, static)
            losses, _ = discretax.batched(model.loss)(tokens, state)
            return losses.total.sum() / losses.count.sum()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradients)))
        return optax.apply_updates(params, updates), opt_state, loss, norm

    way = ops.without_kernels() if case.form == "xla" else contextlib.nullcontext()
    with way:
        platforms = None if platform is None else (platform,)
        return step.trace(*training).lower(lowering_platforms=platforms)


def measure(case: Case, *, repeats: int, seconds: float) -> dict:
    """Compiles, and runs `repeats` steps after a first one, fewer if they need more than `seconds`,
    but three at least."""
    device = jax.devices()[0]
    with jax.default_device(jax.devices("cpu")[0]):  # hundreds of small programs
        training, static = build(case)
    count = sum(leaf.size for leaf in jax.tree.leaves(training.params))
    params, opt_state, state, tokens = jax.device_put(training, device)
    training = Training(params, opt_state, state, tokens)
    start = time.perf_counter()
    lowered = lower(case, training, static)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start

    losses, norms, times = [], [], []
    begin = time.perf_counter()
    while len(times) <= repeats and (len(times) < 4 or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        params, opt_state, loss, norm = compiled(params, opt_state, state, tokens)
        losses.append(float(loss))
        norms.append(float(norm))
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times[1:], n=4)
    planned = compiled.memory_analysis()
    sizes = ("argument", "temp", "output")
    total = sum(getattr(planned, f"{size}_size_in_bytes") for size in sizes)
    total -= planned.alias_size_in_bytes
    return {
        "case": case._asdict(),
        "form": form_of(lowered.as_text()),
        "parameters": count,
        "compile_seconds": compile_seconds,
        "low": low,
        "median": median,
        "high": high,
        "losses": losses,
        "norms": norms,
        "planned_bytes": total,
        # The most that there was at once in this process; not every device counts it.
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def difference(one: dict, other: dict) -> float:
    """The largest between the losses of two forms, of the steps that both took, and the norms of the
    first gradient, relative to the other's."""
    several = lambda outcome: [*outcome["norms"][:1], *outcome["losses"]]
    pairs = zip(several(one), several(other), strict=False)
    return max(abs(a - b) / abs(b) if math.isfinite(a - b) else math.inf for a, b in pairs)


def differing(found: dict[str, dict]) -> dict[str, str]:
    """Of the outcomes by their cases, those whose forms differ, and by how much."""
    differences = {name: _differs(name, found) for name in found}
    return {
        name: f"its forms differ by {value:.1e}"
        for name, value in differences.items()
        if value is not None and not value < TOLERANCE
    }


def _differs(name: str, found: dict[str, dict]) -> float | None:
    model, _, form = name.rpartition(" ")
    other = found.get(f"{model} xla")
    return None if form == "xla" or other is None else difference(found[name], other)


def page(table: dict) -> str:
    if not table["cases"]:
        return "\n".join([NOT_MEASURED, *failures(table), ""])
    about, found = table["about"], {str(Case(**o["case"])): o for o in table["cases"]}
    case = Case(**table["cases"][0]["case"])
    rule = f"|{'---|' * (COLUMNS.count('|') - 1)}"
    heading = (
        f"{about['date']}, {about['device']}, {about['versions']}. {case.batch} texts of {case.time} "
        f"tokens, {case.width} features, {case.blocks} blocks, {case.vocabulary} tokens to choose from."
    )
    rows = (_row(outcome, found) for outcome in table["cases"])
    return "\n".join([heading, "", COLUMNS, rule, *rows, *failures(table), ""])


def _row(outcome: dict, found: dict[str, dict]) -> str:
    case = Case(**outcome["case"])
    peak = outcome["planned_bytes"] if outcome["peak_bytes"] is None else outcome["peak_bytes"]
    differs = _differs(str(case), found)
    cells = [
        f"{case.model}, {outcome['parameters'] / 1e6:.0f} million",
        outcome["form"],
        f"{case.batch * case.time / outcome['median']:.0f}",
        quartiles(outcome, 1e3),
        f"{peak / 2**30:.3g}",
        f"{outcome['compile_seconds']:.1f}",
        f"{outcome['losses'][0]:.3f} to {outcome['losses'][-1]:.3f}",
        "" if differs is None else f"{differs:.0e}",
    ]
    return f"| {' | '.join(cells)} |"
