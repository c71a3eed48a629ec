"""Tables, the page of the documentation, and its figure.

python -m benchmarks.report    # writes and draws them again, from docs/performance.json
"""

import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cases import READ
from discretax.sequence_mixers.ltv.rglru import CHUNK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
RECORD = DOCS / "performance.json"
FIGURE = DOCS / "figures" / "performance.png"
NAMES = {
    "ours": "this library",
    "ours_other": "this library, the other way",
    "usual": "the usual way",
    "discretax_0_3": "discretax 0.3.0",
    "memax_0_1": "memax 0.1.1",
    "mamba2_jax_1_1": "mamba2-jax 1.1.2",
    "ejkernel_0_0_78": "ejkernel 0.0.78",
    "transformers_torch": "transformers",
    "mambapy_1_2": "mamba.py 1.2.0",
}
COLORS = {
    "ours": "#0072b2",
    "usual": "#707070",
    "discretax_0_3": "#d55e00",
    "memax_0_1": "#008060",
}
DRAWN = {  # op, features and batch of each column of the figure
    "LRU": ("LRU", 256, 1),
    "S5": ("S5", 256, 1),
    "S4D": ("S4D", 256, None),
    "Mamba's scan": ("selective_scan", 256, None),
}
# Up to each threshold this library goes the first way, beyond it the second.
WAYS = {
    "WHOLE": ("the whole sequence", "chunks of 1024"),
    "HEAVY": ("chunks in place", "chunks copied"),
    "STEPS": ("sample by sample", "chunks as matrices"),
    "LARGE_BEYOND": ("chunks of 32", "chunks of 64"),
    "LONG": ("all features at once", "16 features after the other"),
}
SIZE = "| op | time | features | state | batch "
COLUMNS = {
    "mixers": f"{SIZE}| | ms (quartiles) | takes | temporary MB | takes | x floor |",
    "oscillators": f"{SIZE}| | ms (quartiles) | takes | temporary MB | takes | x floor |",
    "matrix": f"{SIZE}| | ms (quartiles) | takes | temporary MB | takes | x floor |",
    "mamba3": f"{SIZE}| | ms (quartiles) | takes | temporary MB | takes | x floor |",
    "choices": f"{SIZE}| way | ms (quartiles) | takes | temporary MB | takes |",
    "steps": "| op | features = state | | us per step (quartiles) | takes | x floor |",
    "generation": "| model | batch | | ms per token (quartiles) | tokens/s | takes | x floor | temporary MB |",
    "published": "| model | | batch | | ms per token (quartiles) | tokens/s | takes | x floor | temporary MB |",
    "training": "| model | blocks | | build s | compile s | step ms (quartiles) | takes | temporary MB | peak MB |",
    "growth": "| model | blocks | samples | compile s | step ms (quartiles) | us per sample and block | temporary MB | KB per sample and block |",
    "first_use": "| model | | all s (quartiles) | JAX | library | build | trace | lower | compile | run |",
    "long": f"{SIZE}| | s | temporary MB | x floor | error |",
    "accuracy": "| op | time | transition | | error |",
}
SUMMARISED = ("mixers", "oscillators", "matrix", "mamba3")
FOLDED_BEYOND = 20  # rows
STAGES = ("others", "library", "build", "trace", "lower", "compile", "run")


def table_head(name: str) -> str:
    return f"{COLUMNS[name]}\n|{'---|' * (COLUMNS[name].count('|') - 1)}"


def rows(name: str, outcome: dict) -> list[str]:
    """One row for each subject: how many times as long, and as much, as this library it takes."""
    ours = outcome["subjects"]["ours"]
    return [
        "| " + " | ".join(_cells(name, outcome, subject, result, ours)) + " |"
        for subject, result in outcome["subjects"].items()
    ]


def _cells(name: str, outcome: dict, subject: str, result: dict, ours: dict) -> list[str]:
    case = outcome["case"]
    sizes = [case["op"], *(str(case[key]) for key in ("time", "features", "state"))]
    sizes.append("none" if case["batch"] is None else str(case["batch"]))
    who = NAMES[subject]
    slower = f"{result['median'] / ours['median']:.2f}x"
    memory = result.get("temporary_bytes", math.nan)  # XLA's plan, which torch has none of
    floors = f"{result['median'] / outcome['floor']:.1f}" if outcome["floor"] else ""
    match name:
        case "mixers" | "oscillators" | "matrix" | "mamba3" | "choices":
            larger = f"{memory / max(ours['temporary_bytes'], 1):.1f}x"
            cells = [quartiles(result, 1e3), slower, _megabytes(memory), larger]
            if name == "choices":
                return [*sizes, _way(case, subject), *cells]
            return [*sizes, who, *cells, floors]
        case "generation":
            spread = quartiles(result, 1e3 / case["time"])
            rate = f"{case['batch'] * case['time'] / result['median']:.1f}"
            model = case["op"].removeprefix("generate ")
            cells = [spread, rate, slower, floors, _megabytes(memory)]
            return [model, str(case["batch"]), who, *cells]
        case "published":
            what, model = case["op"].split(" ", 1)
            tokens, verb = (READ, "reads") if what == "read" else (case["time"], "writes")
            spread = quartiles(result, 1e3 / tokens)
            rate = f"{case['batch'] * tokens / result['median']:.1f}"
            cells = [spread, rate, slower, floors, _megabytes(memory)]
            return [model, f"{verb} {tokens}", str(case["batch"]), who, *cells]
        case "steps":
            spread = quartiles(result, 1e6 / case["time"])
            return [case["op"], str(case["features"]), who, spread, slower, floors]
        case "training":
            model, blocks = case["op"].removeprefix("train "), str(case["blocks"])
            seconds = [
                _seconds(result.get(f"{key}_seconds", math.nan)) for key in ("build", "compile")
            ]
            peak = result.get("peak_bytes", math.nan)
            memories = [_megabytes(memory), _megabytes(peak)]
            return [model, blocks, who, *seconds, quartiles(result, 1e3), slower, *memories]
        case "growth":
            sizes = [case["op"].removeprefix("grow "), str(case["blocks"])]
            samples = case["time"] * (case["batch"] or 1)
            each = samples * case["blocks"]
            step = [_seconds(result["compile_seconds"]), quartiles(result, 1e3)]
            step.append(f"{1e6 * result['median'] / each:.2f}")
            memories = [_megabytes(memory), f"{memory / each / 2**10:.2f}"]
            return [*sizes, str(samples), *step, *memories]
        case "first_use":
            stages = [f"{result[stage]:.2f}" for stage in STAGES]
            return [case["op"].removeprefix("start "), who, quartiles(result, 1), *stages]
        case "long":
            error = f"{result['error']:.0e}"
            return [*sizes, who, f"{result['median']:.1f}", _megabytes(memory), floors, error]
        case _:
            decay = str(case["decay"])
            return [case["op"], str(case["time"]), decay, who, f"{result['error']:.0e}"]


def _way(case: dict, subject: str) -> str:
    threshold, size = case["other"]
    if threshold == "CHUNK":  # how many numbers a chunk of states has
        chosen, other = (f"chunks of {numbers // case['features']}" for numbers in (CHUNK, size))
    else:
        first, second = WAYS[threshold]
        # With a threshold of zero, the other way is the one beyond it.
        chosen, other = (first, second) if size == 0 else (second, first)
    return f"{chosen} (chosen)" if subject == "ours" else other


def quartiles(result: dict, scale: float) -> str:
    low, median, high = (scale * result[key] for key in ("low", "median", "high"))
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _seconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds:.1f}"


def _megabytes(count: float) -> str:
    return "" if math.isnan(count) else f"{count / 2**20:.3g}"


def heading(about: dict) -> str:
    rates = about["rates"]
    versions = "; ".join(
        f"{NAMES[name]}: " + ", ".join(f"{package} {version}" for package, version in has.items())
        for name, has in about["versions"].items()
    )
    return (
        f"{about['date']}, {about['machine']}, {versions}. Measured in the same run: matrix products "
        f"at {rates['products'] / 1e9:.0f} GFLOP/s, {rates['exponentials'] / 1e9:.2f} billion "
        f"exponentials a second, copies at {rates['bytes'] / 1e9:.1f} GB/s, reading at "
        f"{rates['read'] / 1e9:.1f} GB/s."
    )


def notes(table: dict) -> list[str]:
    """Who did not run, and why."""
    refused = {reason for outcome in table["cases"] for reason in outcome["refused"].values()}
    reasons = sorted({*table["about"]["left_out"], *refused})
    return [f"\nNot run: {'; '.join(reasons)}."] if reasons else []


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def check_page(names: Iterable[str]) -> None:
    """That there is a place for each table, before an hour is spent on measuring it."""
    text = PAGE.read_text()
    for name in names:
        count = len(_marked(name).findall(text))
        if count != 1:
            raise ValueError(f"{PAGE} must have one pair of markers for {name!r}; it has {count}.")


def page(name: str, table: dict) -> str:
    lines = [row for outcome in table["cases"] for row in rows(name, outcome)]
    body = [table_head(name), *lines]
    if len(lines) > FOLDED_BEYOND:
        shown = f"<summary>All {len(lines)} rows</summary>"
        body = ["<details markdown>", shown, "", *body, "", "</details>"]
    return "\n".join([heading(table["about"]), "", *body, *notes(table), ""])


def summary(tables: dict[str, dict]) -> str:
    """One row for each operation: its longest sequence, not in a batch, beside the best of the others."""
    longest: dict[str, dict] = {}
    for outcome in (outcome for name in SUMMARISED for outcome in tables[name]["cases"]):
        case, best = outcome["case"], longest.get(outcome["case"]["op"])
        if best is None or _length(case) > _length(best["case"]):
            longest[case["op"]] = outcome
    head = "| op | faster than | less memory than | samples | features | ms | temporary MB |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|---|", *map(_summary_row, longest.values()), ""]
    )


def _length(case: dict) -> tuple[int, int, int]:
    return case["time"], -(case["batch"] or 1), case["features"]


def _summary_row(outcome: dict) -> str:
    case, subjects = outcome["case"], dict(outcome["subjects"])
    ours = subjects.pop("ours")
    compared = []
    for key in ("median", "temporary_bytes"):
        best = min(subjects, key=lambda name, key=key: subjects[name].get(key, math.inf))
        ratio = subjects[best][key] / ours[key]
        compared.append(f"{ratio:.{'1f' if ratio < 10 else '0f'}}x ({NAMES[best]})")
    time, memory = f"{1e3 * ours['median']:.3g}", _megabytes(ours["temporary_bytes"])
    cells = [case["op"], *compared, str(case["time"]), str(case["features"]), time, memory]
    return f"| {' | '.join(cells)} |"


def write(tables: dict[str, dict], pages: dict[str, str]) -> None:
    """Puts tables in the place of those in `docs/performance.md`, by its markers.

    A table that this machine cannot measure takes no place of one that another has measured.
    """
    text = PAGE.read_text()
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    measured = lambda table: bool(table and table["cases"])
    tables = {k: table for k, table in tables.items() if measured(table) >= measured(kept.get(k))}
    for name in tables:
        new = pages[name]
        text = _marked(name).sub(lambda match, new=new: match[1] + new + match[2], text)
    tables = kept | tables
    short = summary(tables)
    text = _marked("summary").sub(lambda match: match[1] + short + match[2], text)
    PAGE.write_text(text)
    RECORD.write_text(json.dumps(tables, indent=1) + "\n")
    if "mixers" in pages:
        draw(tables["mixers"]["cases"], FIGURE)


def _marked(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)


def draw(cases: list[dict], path: pathlib.Path) -> None:
    """Time and temporary memory of one sequence against its length, all axes logarithmic."""
    from matplotlib.figure import Figure  # which a machine that measures may lack

    figure = Figure(figsize=(7.5, 4.4), layout="constrained", facecolor="white")
    top, bottom = axes = figure.subplots(2, len(DRAWN), sharex=True, sharey="row")
    for (title, (op, features, batch)), time, memory in zip(DRAWN.items(), *axes, strict=True):
        points: dict[str, list] = {}
        for outcome in cases:
            case = outcome["case"]
            if (case["op"], case["features"], case["batch"]) == (op, features, batch):
                for name, result in outcome["subjects"].items():
                    sizes = result["median"] * 1e3, result["temporary_bytes"] / 2**20
                    points.setdefault(name, []).append((case["time"], *sizes))
        lines = {name: np.transpose(sorted(line)) for name, line in points.items()}
        _draw_lines(time, {name: line[[0, 1]] for name, line in lines.items()}, "faster")
        _draw_lines(memory, {name: line[[0, 2]] for name, line in lines.items()}, "less")
        time.set(title=title)
        memory.set(xlabel="samples")
        memory.set_xticks([2**10, 2**12, 2**14], ["1024", "4096", "16384"])
        memory.minorticks_off()
    top[0].set(ylabel="forward and\nbackward, ms")
    bottom[0].set(ylabel="temporary\nmemory, MB")
    figure.legend(handles=top[0].lines, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=180)


def _draw_lines(axes: "Axes", lines: dict[str, np.ndarray], better: str) -> None:
    """One line for each subject; at the longest, how far this library is below the lowest other."""
    for name, (times, sizes) in lines.items():
        wide = {"linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.2}
        label = "this library" if name == "ours" else NAMES[name]
        options = {"color": COLORS[name], "label": label, "markersize": 4, **wide}
        axes.loglog(times, sizes, "o-", **options)
    longest, ours = lines["ours"][:, -1]
    other = min(line[1, -1] for name, line in lines.items() if name != "ours")
    axes.vlines(longest, ours, other, color="0.6", linestyle=":")
    text = f"{other / ours:.{'1f' if other / ours < 10 else '0f'}}x {better}"
    label = axes.text(0.98, 0.05, text, transform=axes.transAxes, ha="right")
    label.set(color=COLORS["ours"], weight="bold")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def redraw() -> None:
    """The tables and the figure once more, of what has been measured."""
    record = json.loads(RECORD.read_text())
    record = {name: record[name] for name in COLUMNS if name in record}
    write(record, {name: page(name, table) for name, table in record.items()})


if __name__ == "__main__":
    redraw()
