"""The benchmark of the kernels runs where there are none, with XLA's form on both sides."""

import argparse
import pathlib

import pytest

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
