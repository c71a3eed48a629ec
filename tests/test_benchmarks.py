"""The benchmark of the kernels, run where there are none with XLA's form on both sides; and the others' figures."""

import argparse
import importlib
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from discretax import Sequential
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead

pytestmark = pytest.mark.slow


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent)
    from benchmarks import kernels

    return kernels


OPTIONS = argparse.Namespace(repeats=3)


def test_kernels_are_compared(kernels):
    sizes = 2, 9, 8
    cases = [
        kernels.Case("linear_recurrence", *sizes, "complex64", "constant"),
        kernels.Case("linear_recurrence", *sizes, "bfloat16", few=True),
        kernels.Case("selective_scan", *sizes, "float32"),
    ]
    table = kernels.measure(cases, OPTIONS, on=("cpu",), copied=2**10)
    assert [outcome["form"] for outcome in table["cases"]] == ["xla"] * 6
    for outcome in table["cases"]:
        dtype = outcome["case"]["dtype"]
        assert 0 < outcome["error"] < kernels.TOLERANCE[dtype]
        assert outcome["floor"] == outcome["bytes"] / table["about"]["bytes"]
    rows = kernels.page(table).splitlines()
    assert len({row.count("|") for row in rows[2:]}) == 1
    assert len(rows[2:]) == 2 + len(table["cases"])


def test_what_differs_is_refused(kernels, monkeypatch):
    case = kernels.Case("linear_recurrence", 1, 5, 2, "float32")
    monkeypatch.setitem(kernels.TOLERANCE, "float32", 0)
    with pytest.raises(AssertionError, match="the forms disagree by"):
        kernels.measure([case], OPTIONS, on=("cpu",), copied=2**10)


def test_without_an_accelerator_nothing_is_measured(kernels):
    table = kernels.measure(kernels.cases(), OPTIONS, on=())
    assert table["cases"] == []
    assert kernels.page(table) == f"{kernels.NOT_MEASURED}\n"


@pytest.mark.parametrize(
    ("a", "few", "arrays"),
    [
        ("varying", False, (3, 8)),
        ("constant", False, (2, 5)),
        ("varying", True, (5, 12)),
        ("constant", True, (3, 7)),
    ],
)
def test_floors(kernels, a, few, arrays):
    """In arrays: forward; forward and backward."""
    case = kernels.Case("linear_recurrence", 2, 64, 8, "float32", a, few)
    array = 2 * 64 * 8 * 4
    assert tuple(kernels.floor_bytes(case, b, "gpu") // array for b in (False, True)) == arrays
    once = case._replace(few=False)
    assert kernels.floor_bytes(case, True, "tpu") == kernels.floor_bytes(once, True, "gpu")


def test_the_page_has_what_was_measured(kernels, monkeypatch, tmp_path):
    """Drawn once more, of the record, it is the same."""
    from benchmarks import report

    for name in ("PAGE", "RECORD", "FIGURE"):
        copy = tmp_path / getattr(report, name).name
        copy.write_bytes(getattr(report, name).read_bytes())
        monkeypatch.setattr(report, name, copy)
    before = report.PAGE.read_text()
    report.redraw()
    assert report.PAGE.read_text() == before


@pytest.fixture
def worker(kernels, monkeypatch):
    """By name, a module of those that run the subjects."""
    monkeypatch.syspath_prepend(pathlib.Path(kernels.__file__).parent / "workers")
    return importlib.import_module


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux tells it")
def test_the_peak_is_what_a_process_grows_by(worker):
    """Freed again and taken again, it counts again; what was there before does not."""
    peak_bytes = worker("job").peak_bytes
    numbers = 2**23
    before = np.ones(4 * numbers)
    for _ in range(2):
        peak = peak_bytes(lambda: np.ones(numbers).sum())["peak_bytes"]
        assert abs(peak - 8 * numbers) < 2**20
    assert before.sum() == 4 * numbers


def test_a_first_step_in_its_stages(worker, monkeypatch, capsys):
    from benchmarks import first_use, report

    stages = dict.fromkeys(report.STAGES, 1.0) | {"compile": 4.0}
    turns = [{name: turn * seconds for name, seconds in stages.items()} for turn in (1, 3, 2)]
    assert first_use._medians(turns) == {
        **{name: 2 * seconds for name, seconds in stages.items()},
        "low": 10.0,
        "median": 20.0,
        "high": 30.0,
    }

    def model(case, key):
        keys = jax.random.split(key)
        encoder = LinearEncoder(3, keys[0], out_features=case["features"])
        return Sequential([encoder, ClassificationHead(case["features"], 10, keys[1])])

    monkeypatch.setitem(sys.modules, "tiny", types.SimpleNamespace(model=model))
    case = json.dumps({"features": 2, "batch": 3, "time": 5})
    monkeypatch.setattr(sys, "argv", ["first_use.py", "tiny", case])
    with jax.numpy_dtype_promotion("standard"):  # for optax
        worker("first_use").main()
    seconds = json.loads(capsys.readouterr().out)
    assert {*seconds} == {*report.STAGES}
    assert min(seconds.values()) > 0


def test_growth_is_told_per_sample_and_block(kernels):
    from benchmarks import report
    from benchmarks.cases import Case

    case = Case("grow LRU scan", 1024, 64, 64, 2, blocks=3)
    ours = {"compile_seconds": 4.04, "low": 0.5, "median": 0.6144, "high": 0.75}
    ours["temporary_bytes"] = 3 * 2**21
    outcome = {"case": vars(case), "floor": None, "subjects": {"ours": ours}}
    cells = "LRU scan | 3 | 2048 | 4.0 | 614 (500-750) | 100.00 | 6 | 1.00"
    assert report.rows("growth", outcome) == [f"| {cells} |"]
