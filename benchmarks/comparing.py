"""One case, all its subjects, in turns."""

import pathlib
import statistics
import time

import jax.random as jr
import numpy as np

from benchmarks.cases import Case, draw, floor_seconds
from benchmarks.processes import Subject, UnavailableError


def compare(
    case: Case,
    subjects: dict[str, Subject],
    folder: pathlib.Path,
    rates: dict[str, float],
    *,
    repeats: int,
    seconds: float,
) -> dict:
    """Median and quartiles, compile time and temporary memory of each subject that can run.

    Subjects take turns, `repeats` times, or fewer if they would need more than `seconds`, but three
    times at least. All must agree with the first, to 1e-4 of the largest entry, whole numbers
    exactly, or this raises; where the case asks for the error against double precision, that says
    how far each is off.
    """
    arrays = folder / "arrays.npz"
    np.savez(arrays, allow_pickle=False, **draw(case, jr.key(0), folder))
    results: dict[str, dict] = {}
    refused: dict[str, str] = {}
    for name in case.subjects:
        if name in subjects:
            try:
                request = {"case": vars(case), "arrays": str(arrays)}
                results[name] = subjects[name].ask("prepare", **request)
            except UnavailableError as reason:
                refused[name] = str(reason)
    for name in results:
        subjects[name].ask("outcome", to=str(folder / f"{name}.npz"))
    if "ours" not in results:
        raise RuntimeError(f"{case}: {refused}")
    expected, *others = ({**np.load(folder / f"{name}.npz")} for name in results)
    disagreement = max((_distance(expected, other) for other in others), default=0.0)
    if not case.exact and not disagreement < 1e-4:
        raise AssertionError(f"{case}: disagree by {disagreement:.1e} of the largest entry")

    start = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in results}
    for count in range(repeats):
        if count >= 3 and time.perf_counter() - start > seconds:
            break
        for name in results:
            times[name].append(subjects[name].ask("run")["seconds"])
    for name, result in results.items():
        subjects[name].ask("forget")
        quartiles = statistics.quantiles(times[name], n=4)
        result["low"], result["median"], result["high"] = quartiles
    return {
        "case": vars(case),
        "floor": floor_seconds(case, rates),
        "disagreement": disagreement,
        "subjects": results,
        "refused": refused,
    }


def _distance(expected: dict, actual: dict) -> float:
    def one(expected: np.ndarray, actual: np.ndarray) -> float:
        if np.issubdtype(expected.dtype, np.integer):
            return float((actual != expected).mean())
        return float(np.abs(actual - expected).max() / np.abs(expected).max())

    return max((one(value, actual[name]) for name, value in expected.items()), default=0.0)
