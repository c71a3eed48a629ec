"""The kernels of the recurrences on an accelerator, against XLA's forms and the memory's floor."""

import argparse
import datetime
import functools as ft
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr

from benchmarks.report import quartiles
from discretax.ops import linear_recurrence, selective_scan

STATES = 16  # of each feature of the selective scan
ITEMSIZE = {"bfloat16": 2, "float32": 4, "complex64": 8}
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5, "complex64": 1e-5}
COLUMNS = "| op | sizes | type | a | pass | form | us (quartiles) | MB | of the floor | XLA takes |"
NOT_MEASURED = (
    "Not yet measured: this needs an NVIDIA GPU from Hopper on, or a TPU, and there "
    "`python -m benchmarks --table kernels --write`."
)


class Case(NamedTuple):
    op: str
    batch: int
    time: int
    channels: int
    dtype: str
    a: str = "varying"  # or "constant"
    few: bool = False  # channels, so that a GPU cuts time into chunks and reads its inputs twice

    def __str__(self) -> str:
        return f"{self.op} {self.batch}x{self.time}x{self.channels} {self.dtype} {self.a}"


def cases() -> list[Case]:
    sizes = [(8, 2048, 2048, False), (1, 65536, 64, True), (1, 2048, 1024, True)]
    return [
        Case("linear_recurrence", batch, time, channels, dtype, a, few)
        for batch, time, channels, few in sizes
        for dtype in ITEMSIZE
        for a in ("constant", "varying")
    ] + [
        Case("selective_scan", batch, time, channels, dtype)
        for batch, time, channels in ((8, 2048, 2048), (1, 65536, 1024))
        for dtype in ("float32", "bfloat16")
    ]


def measure(
    cases: Sequence[Case],
    options: argparse.Namespace,
    *,
    on: Sequence[str] = ("gpu", "tpu"),
    copied: int = 2**30,
) -> dict:
    """What they take on this machine's device, if it is one of `on`; no cases otherwise."""
    device = jax.devices()[0]
    about = about_device()
    table: dict[str, Any] = {"about": about, "cases": []}
    if device.platform in on:
        about["bytes"] = copying_rate(copied, options.repeats)
    print(f"\n## kernels\n\n{_heading(table)}", flush=True)
    for case in cases if device.platform in on else ():
        for backward in (False, True):
            outcome = compare(case, backward, about["bytes"], options, device.platform)
            table["cases"].append(outcome)
            print(_row(outcome), flush=True)
    return table


def about_device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.device_kind} ({device.platform})",
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}",
    }


def copying_rate(size: int, repeats: int) -> float:
    """Bytes a second at which the device copies an array of `size` bytes, read and written."""
    x = jnp.zeros(size // 4)
    copy = ft.partial(jax.jit(jnp.negative), x)
    return 2 * x.nbytes / statistics.median(_seconds(copy, 20) for _ in range(repeats))


def compare(
    case: Case, backward: bool, rate: float, options: argparse.Namespace, device: str
) -> dict:
    """The form that the library chooses and XLA's, in turns; they must agree, or this raises."""
    arguments, cotangent = _draw(case)
    forms = {"chosen": None, "xla": "xla"}
    run = {name: jax.jit(_function(case, form, backward)) for name, form in forms.items()}
    text = run["chosen"].lower(arguments, cotangent).as_text()
    form = form_of(text)

    actual = run["chosen"](arguments, cotangent)
    with jax.enable_x64(device != "tpu"), jax.default_matmul_precision("highest"):
        wide = jax.tree.map(_widen, (arguments, cotangent))
        expected = run["xla"](*wide)
        pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
        error = max(float(abs(_widen(a) - e).max() / abs(e).max()) for a, e in pairs)
    if not error < TOLERANCE[case.dtype]:
        raise AssertionError(f"{case}: the forms disagree by {error:.1e} of the largest entry")
    del actual, expected, wide

    calls = {name: ft.partial(one, arguments, cotangent) for name, one in run.items()}
    # Many calls wait in a row, so that the device does not wait for Python.
    count = {name: max(1, min(100, int(0.05 / _seconds(call)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(_seconds(call, count[name]))
    moved = floor_bytes(case, backward, device)
    result: dict[str, Any] = {"case": case._asdict(), "backward": backward, "form": form}
    result |= {"bytes": moved, "floor": moved / rate, "error": error}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"low": low, "median": median, "high": high}
    return result


def lower(case: Case, backward: bool, platform: str) -> Any:
    """The form that is chosen there, from shapes alone."""
    run = jax.jit(_function(case, None, backward))
    return run.trace(*jax.eval_shape(ft.partial(_draw, case))).lower(lowering_platforms=(platform,))


def form_of(text: str) -> str:
    """The kernel of a lowered program; "xla" if it has none."""
    kernels = {"mosaic_gpu": "@mosaic_gpu", "mosaic_tpu": "@tpu_custom_call"}
    return next((name for name, call in kernels.items() if call in text), "xla")


def floor_bytes(case: Case, backward: bool, device: str) -> int:
    """What has to pass through memory: inputs, outputs and, backward, states and cotangents, once.

    Where a GPU cuts time into chunks, `a` and the drive, or its cotangent, are read a second time.
    """
    array = case.batch * case.time * case.channels * ITEMSIZE[case.dtype]
    if case.op == "selective_scan":
        projections = 2 * case.batch * case.time * STATES * ITEMSIZE[case.dtype]
        forward = 3 * array + projections
        return forward + backward * (5 * array + 2 * projections)
    read = 2 if case.a == "varying" else 1
    again = read if case.few and device == "gpu" else 0
    forward = (read + 1 + again) * array
    return forward + backward * (2 * read + 1 + again) * array


def _draw(case: Case) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The arguments, and the cotangent of the output."""
    keys = jr.split(jr.key(0), 6)
    shape, dtype = (case.batch, case.time, case.channels), jnp.dtype(case.dtype)
    x, cotangent = (jr.normal(key, shape, dtype) for key in keys[:2])
    if case.op == "selective_scan":
        dt = jax.nn.softplus(jr.normal(keys[2], shape, dtype) - 3)
        A = -jnp.exp(jr.normal(keys[3], (case.channels, STATES)))
        B, C = (jr.normal(key, (*shape[:2], STATES), dtype) for key in keys[4:])
        return (x, dt, A, B, C), cotangent
    shape = shape[2:] if case.a == "constant" else shape
    a = jr.uniform(keys[2], shape, minval=0.9, maxval=0.99)
    if jnp.iscomplexobj(x):
        angle = jr.uniform(keys[3], shape)
        a = jax.lax.complex(a * jnp.cos(angle), a * jnp.sin(angle))
    return (a.astype(dtype), x), cotangent


def _function(case: Case, implementation: Any, backward: bool) -> Callable:
    def one(*arguments):
        if case.op == "selective_scan":
            return selective_scan(*arguments, implementation=implementation)[0]
        return linear_recurrence(*arguments, implementation=implementation)

    axes = (0, 0, None, 0, 0) if case.op == "selective_scan" else (0, 0)
    axes = (None, 0) if case.a == "constant" else axes

    batch = jax.vmap(one, in_axes=axes)

    def run(arguments, cotangent):
        if not backward:
            return batch(*arguments)
        y, pull = jax.vjp(batch, *arguments)
        return y, pull(cotangent)

    return run


def _widen(value: jax.Array) -> jax.Array:
    """In double precision, where that is enabled."""
    wide = complex if jnp.iscomplexobj(value) else float
    return value.astype(jax.dtypes.canonicalize_dtype(wide))


def _seconds(call: Callable[[], Any], count: int = 1) -> float:
    jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def page(table: dict) -> str:
    return "\n".join([_heading(table), *map(_row, table["cases"]), *failures(table), ""])


def failures(table: dict) -> list[str]:
    """What of a table is not in it, and why."""
    lines = [f"{name}: {reason}" for name, reason in table.get("failed", {}).items()]
    if missing := table.get("not_reached", 0):
        lines.append(f"{missing} of the rows, for want of time")
    return [f"\nNot right, or not run: {'; '.join(lines)}."] if lines else []


def _heading(table: dict) -> str:
    about = table["about"]
    if "bytes" not in about:
        return NOT_MEASURED
    rate = f"Measured in the same run: copies at {about['bytes'] / 1e9:.0f} GB/s."
    if about.get("tests"):
        rate += f" Tests of the kernels on it: {about['tests']} passed."
    rule = f"|{'---|' * (COLUMNS.count('|') - 1)}"
    return f"{about['date']}, {about['device']}, {about['versions']}. {rate}\n\n{COLUMNS}\n{rule}"


def _row(outcome: dict) -> str:
    case, chosen = Case(**outcome["case"]), outcome["chosen"]
    cells = [
        case.op,
        f"{case.batch} x {case.time} x {case.channels}",
        case.dtype,
        case.a if case.op == "linear_recurrence" else "",
        "both" if outcome["backward"] else "forward",
        outcome["form"],
        quartiles(chosen, 1e6),
        f"{outcome['bytes'] / 2**20:.3g}",
        f"{outcome['floor'] / chosen['median']:.0%}",
        f"{outcome['xla']['median'] / chosen['median']:.2f}x",
    ]
    return f"| {' | '.join(cells)} |"
