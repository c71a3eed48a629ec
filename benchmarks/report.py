"""Tables, the page of the documentation, and figures."""

import json
import os
import pathlib
import platform
import re

from matplotlib.figure import Figure

from benchmarks.cases import TABLES

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NAMES = {
    "ours": "discretax",
    "usual": "the usual way",
    "discretax_0_3": "discretax 0.3.0",
    "memax_0_1": "memax 0.1.1",
}
SIZE = "| op | time | features | state | batch "
COLUMNS = {
    "mixers": f"{SIZE}| | ms (quartiles) | takes | temporary MB | takes | x floor |",
    "steps": "| op | features = state | | us per step (quartiles) | takes | x floor |",
    "training": "| model | blocks | | build s | compile s | step ms (quartiles) | temporary MB |",
    "long": f"{SIZE}| | s | temporary MB | x floor | error |",
    "accuracy": "| op | time | transition | | error |",
}


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
    memory = result["temporary_bytes"]
    floors = f"{result['median'] / outcome['floor']:.1f}" if outcome["floor"] else ""
    match name:
        case "mixers":
            larger = f"{memory / max(ours['temporary_bytes'], 1):.1f}x"
            return [*sizes, who, _spread(result, 1e3), slower, _megabytes(memory), larger, floors]
        case "steps":
            spread = _spread(result, 1e6 / case["time"])
            return [case["op"], str(case["features"]), who, spread, slower, floors]
        case "training":
            seconds = [f"{result[key]:.1f}" for key in ("build_seconds", "compile_seconds")]
            model = case["op"].removeprefix("train ")
            spread = _spread(result, 1e3)
            return [model, str(case["blocks"]), who, *seconds, spread, _megabytes(memory)]
        case "long":
            error = f"{result['error']:.0e}"
            return [*sizes, who, f"{result['median']:.1f}", _megabytes(memory), floors, error]
        case _:
            decay = str(case["decay"])
            return [case["op"], str(case["time"]), decay, who, f"{result['error']:.0e}"]


def _spread(result: dict, scale: float) -> str:
    low, median, high = (scale * result[key] for key in ("low", "median", "high"))
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _megabytes(count: float) -> str:
    return f"{count / 2**20:.3g}"


def heading(about: dict) -> str:
    rates = about["rates"]
    versions = "; ".join(
        f"{NAMES[name]}: Python {v['python']}, jax {v['jax']}"
        for name, v in about["versions"].items()
    )
    return (
        f"{about['date']}, {about['machine']}, {versions}. Measured in the same run: matrix products "
        f"at {rates['products'] / 1e9:.0f} GFLOP/s, {rates['exponentials'] / 1e9:.2f} billion "
        f"exponentials a second, copies at {rates['bytes'] / 1e9:.1f} GB/s."
    )


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def write(about: dict, results: dict) -> None:
    """Puts the cases that were measured into the tables of `docs/performance.md`, by its markers."""
    page, record = DOCS / "performance.md", DOCS / "performance.json"
    text = page.read_text()
    kept = json.loads(record.read_text() or "{}") if record.exists() else {}
    for name, outcomes in results.items():
        outcomes = _merged(name, kept.get(name, {"cases": []})["cases"], outcomes)
        kept[name] = {"about": about, "cases": outcomes}
        lines = [row for outcome in outcomes for row in rows(name, outcome)]
        refused = {reason for outcome in outcomes for reason in outcome["refused"].values()}
        notes = [f"\nNot run: {'; '.join(sorted(refused))}."] if refused else []
        table = "\n".join([heading(about), "", table_head(name), *lines, *notes, ""])
        marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = marked.subn(lambda match, new=table: match[1] + new + match[2], text)
        if count != 1:
            raise ValueError(f"{page} must have one pair of markers for {name!r}; it has {count}.")
    page.write_text(text)
    record.write_text(json.dumps(kept, indent=1) + "\n")
    if "mixers" in results:
        _draw(kept["mixers"]["cases"], DOCS / "figures" / "performance.svg")


def _merged(name: str, old: list[dict], new: list[dict]) -> list[dict]:
    """In the order of the table, the newer of two outcomes of a case, and none that it has no more."""
    outcomes = {json.dumps(outcome["case"]): outcome for outcome in [*old, *new]}
    order = [json.dumps(vars(case)) for case in TABLES[name]()]
    return [outcomes[case] for case in order if case in outcomes]


def _draw(outcomes: list[dict], path: pathlib.Path) -> None:
    """Time and temporary memory against the length, both axes logarithmic."""
    panels = {"LRU": 64, "S5": 64, "S4D": 256, "selective_scan": 256}
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True)
    for column, (op, features) in enumerate(panels.items()):
        lines: dict[str, list] = {}
        for outcome in outcomes:
            case = outcome["case"]
            if (case["op"], case["features"], case["batch"]) == (op, features, 1):
                for name, result in outcome["subjects"].items():
                    point = case["time"], result["median"] * 1e3, result["temporary_bytes"] / 2**20
                    lines.setdefault(name, []).append(point)
        for name, points in lines.items():
            time, milliseconds, megabytes = zip(*sorted(points), strict=True)
            axes[0, column].loglog(time, milliseconds, "o-", label=NAMES[name])
            axes[1, column].loglog(time, megabytes, "o-")
        axes[0, column].set(title=f"{op}, {features} features")
        axes[0, column].legend(fontsize="small")
        axes[1, column].set(xlabel="samples")
    axes[0, 0].set(ylabel="forward and backward, ms")
    axes[1, 0].set(ylabel="temporary memory, MB")
    figure.savefig(path)
