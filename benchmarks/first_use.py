"""How long it takes from the import to the end of a first training step, and what takes it."""

import statistics

from benchmarks.cases import Case
from benchmarks.processes import UnavailableError, ask_anew


def compare(case: Case, names: list[str], *, turns: int = 3) -> dict:
    """Medians of the seconds of each stage, and of all together, with their quartiles.

    Each turn is a process of its own; those of the subjects take turns.
    """
    seconds: dict[str, list[dict]] = {name: [] for name in case.subjects if name in names}
    refused: dict[str, str] = {}
    for _ in range(turns):
        for name in seconds:
            if name not in refused:
                try:
                    seconds[name].append(ask_anew(name, "first_use.py", **vars(case)))
                except UnavailableError as reason:
                    refused[name] = str(reason)
    if "ours" in refused:
        raise RuntimeError(f"{case}: {refused}")
    results = {
        name: _medians(of_turns) for name, of_turns in seconds.items() if name not in refused
    }
    return {"case": vars(case), "floor": None, "subjects": results, "refused": refused}


def _medians(turns: list[dict]) -> dict[str, float]:
    low, median, high = statistics.quantiles([sum(turn.values()) for turn in turns], n=4)
    stages = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return {**stages, "low": low, "median": median, "high": high}
