"""What is prepared for a machine with a GPU: every step of it, at tiny sizes or lowered."""

import json
import math
import pathlib
import sys
import time

import jax
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent)


def test_the_page_has_what_was_measured():
    from benchmarks import on_a_gpu, report

    record, text = json.loads(report.RECORD.read_text()), report.PAGE.read_text()
    for name, page in on_a_gpu.PAGES.items():
        assert section(name, text) == page(record.get(name, {"about": {}, "cases": []}))


def section(name, text):
    return text.split(f"<!-- begin {name} -->\n")[1].split(f"<!-- end {name} -->")[0]


JOBS = """
import os, pathlib, sys, time
from benchmarks import jobs

def differs():
    raise AssertionError("off by one")

run = {
    "one": os.getpid,
    "differs": differs,
    "two": os.getpid,
    "fails": lambda: 1 / 0,
    "three": os.getpid,
    "stands still": lambda: time.sleep(60),
    "ends all": lambda: os._exit(9),
    "four": os.getpid,
    "late": lambda: time.sleep(60),
}
sys.exit(jobs.work(run, sys.argv[2:], pathlib.Path(sys.argv[1]), 0.5 if "late" != sys.argv[2] else 60))
"""


def test_what_one_job_does_leaves_the_others(tmp_path):
    from benchmarks import jobs

    results, log = tmp_path / "results.jsonl", tmp_path / "log.txt"
    command = [sys.executable, "-c", JOBS, str(results)]
    names = ["one", "differs", "two", "fails", "three", "stands still", "ends all", "four"]
    with log.open("w") as file:
        jobs.supervise(command, names, results, file, time.monotonic() + 60)
        jobs.supervise(command, ["late", "after"], results, file, time.monotonic() + 1)
    found = jobs.read(results)
    assert list(found) == [*names, "late"]
    processes = [found[name]["result"] for name in ("one", "two", "three", "four")]
    assert processes[0] == processes[1] and len(set(processes)) == 3
    assert found["differs"] == {"failed": "off by one"}
    assert found["fails"] == {"failed": "ZeroDivisionError: division by zero"}
    assert found["stands still"]["failed"].startswith("its process ended, with status 1")
    assert found["ends all"]["failed"].startswith("its process ended, with status 9")
    assert found["late"] == {}
    assert "in <lambda>" in log.read_text()  # where it stood


def test_a_run_on_a_gpu_tiny(monkeypatch, tmp_path, capfd):
    """Every step, in this process; the figures are those of the record, and of the page."""
    from benchmarks import gpu_training, jobs, on_a_gpu, report

    def here(command, log, deadline, **environment):
        if "pytest" in command:
            log.write("tests/test_x.py::test_y[a b] PASSED    [ 50%]\n")
            log.write("[gw0] [100%] FAILED tests/test_x.py::test_z[a b] \n")
            return 1
        return on_a_gpu.main(command[3:])

    monkeypatch.setattr(jobs, "call", here)
    monkeypatch.setattr(gpu_training, "FORMS", {"Mamba": ("chosen", "xla")})  # to compile less
    with jax.numpy_dtype_promotion("standard"):  # for optax
        assert on_a_gpu.main(["--tiny", "--out", str(tmp_path)]) == 1
    printed = capfd.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    measured, training = (record["tables"][name] for name in ("kernels", "training_on_a_gpu"))
    assert measured["about"]["tests"] == 1
    assert measured["failed"] == {"tests/test_x.py::test_z[a b]": "see tests.txt"}
    assert (training["failed"], measured["not_reached"], training["not_reached"]) == ({}, 0, 0)
    assert [outcome["backward"] for outcome in measured["cases"]] == [False, True]
    assert all(0 < outcome["error"] < 1e-5 for outcome in measured["cases"])

    chosen, xla = training["cases"]
    assert gpu_training.difference(chosen, xla) < 1e-6
    for outcome in (chosen, xla):
        assert outcome["form"] == "xla" and len(outcome["losses"]) == 4
        # No token is likelier than another, until it is learned.
        assert abs(outcome["losses"][0] - math.log(64)) < 0.1
        assert sorted(outcome["losses"], reverse=True) == outcome["losses"]
        assert f"| {2 * 9 / outcome['median']:.0f} |" in printed

    with pytest.raises(SystemExit, match="figures say nothing"):
        on_a_gpu.main(["--read", str(tmp_path)])
    record["tiny"] = False
    worse = {**xla, "losses": [1.03 * loss for loss in xla["losses"]]}
    assert gpu_training.differing({"Mamba chosen": chosen, "Mamba xla": worse}) == {
        "Mamba chosen": "its forms differ by 2.9e-02"
    }
    (tmp_path / "record.json").write_text(json.dumps(record))
    for name in ("PAGE", "RECORD"):
        copy = tmp_path / getattr(report, name).name
        copy.write_bytes(getattr(report, name).read_bytes())
        monkeypatch.setattr(report, name, copy)
    before = json.loads(report.RECORD.read_text())
    assert on_a_gpu.main(["--read", str(tmp_path)]) == 0
    assert json.loads(report.RECORD.read_text()) == before | record["tables"]
    for name, page in on_a_gpu.PAGES.items():
        assert section(name, report.PAGE.read_text()) == page(record["tables"][name])
    assert "test_z[a b]: see tests.txt" in section("kernels", report.PAGE.read_text())


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("Mamba chosen", 2),
        *(
            pytest.param(step, 0, marks=pytest.mark.thorough)
            for step in ("Mamba xla", "Mamba-2 chosen", "Gated DeltaNet chosen")
        ),
    ],
)
def test_training_steps_lower_for_a_gpu(step, calls):
    """At their widths: two kernels, forward and backward, in the loop over Mamba's blocks alone."""
    from benchmarks import gpu_training, on_a_gpu

    case = {str(case): case for case in gpu_training.cases()}[step]
    case = case._replace(blocks=2)  # a loop as long as any
    with on_a_gpu.as_on_a_gpu(), jax.numpy_dtype_promotion("standard"):
        lowered = gpu_training.lower(case, *gpu_training.shapes(case), "cuda")
    assert lowered.as_text().count("custom_call @mosaic_gpu") == calls
