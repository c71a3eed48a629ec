"""All that a machine with an NVIDIA GPU is wanted for, in eight minutes: one command, no network.

    python -m benchmarks.on_a_gpu --lower             # before, anywhere: does all of it lower for CUDA?
    python -m benchmarks.on_a_gpu --tiny              # before, anywhere: every step, on tiny sizes
    python -m benchmarks.on_a_gpu --out runs/gpu      # there
    python -m benchmarks.on_a_gpu --read runs/gpu     # after, where docs/ is to be written

It says what the machine is, runs the tests of the kernels on it, measures the kernels and training
steps of language models, and writes docs/performance.md and .json. What fails or takes too long is
written down, and the rest goes on. The folder holds `record.json`, which `--read` wants,
`results.jsonl`, of which it is made, `tests.txt` and `log.txt`.
"""

import argparse
import contextlib
import functools as ft
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from benchmarks import gpu_training, jobs, kernels, report

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "jaxtyping", "numpy", "pytest", "matplotlib")
TESTS = ("tests/test_recurrence_gpu.py", "tests/test_selective_scan_gpu.py")
# When each step has to be done, of 8 minutes, and the seconds that one job of it may take.
STEPS = {"machine": (0.75, 60), "tests": (2.25, None), "kernels": (4.75, 60), "training": (8, 150)}
FILES = ("record.json", "results.jsonl", "tests.txt", "log.txt")
PAGES = {"kernels": kernels.page, "training_on_a_gpu": gpu_training.page}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.read is not None:
        return read(options.read)
    if options.lower:
        return lower()
    folder = options.out.resolve()
    if options.step:
        _, seconds = STEPS[options.step]
        step = jobs_of(options.step, options.tiny, folder)
        return jobs.work(step, options.names, folder / "results.jsonl", seconds)
    return run(folder, options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu"), help="default: runs/gpu")
    add("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    add("--tiny", action="store_true", help="tiny sizes, on any machine; docs/ stays as it is")
    add("--lower", action="store_true", help="lower all for CUDA at full size, computing nothing")
    add("--read", type=pathlib.Path, metavar="FOLDER", help="write what is in it into docs/")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    add("names", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes}.")
    if options.names and not options.step:
        parser.error(f"unrecognized arguments: {' '.join(options.names)}")
    return options


def run(folder: pathlib.Path, options: argparse.Namespace) -> int:
    """The steps one after the other, each with what those before it have left of its time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    results, start = folder / "results.jsonl", time.monotonic()
    this = [sys.executable, "-m", "benchmarks.on_a_gpu", "--out", str(folder)]
    this += ["--tiny"] * options.tiny
    with (folder / "log.txt").open("w") as log:
        for step, (minutes, _) in STEPS.items():
            deadline = start + 60 * minutes * options.minutes / 8
            begun = time.monotonic()
            if step == "tests":
                run_tests(folder, deadline, options.tiny)
            else:
                command = [*this, "--step", step]
                together = 1 if step == "training" else None  # for the peak of memory of each
                names = names_of(step, options.tiny)
                jobs.supervise(command, names, results, log, deadline, together)
            written = record(folder, options.tiny)
            print(
                f"\n## {step}, {time.monotonic() - begun:.0f} s\n\n{said(step, written)}",
                flush=True,
            )
            if step == "machine" and not on_hand(written["machine"], options.tiny):
                return 1
    if not options.tiny:
        read(folder)
    return int(any(table["failed"] for table in written["tables"].values()))


def on_hand(machine: dict | None, tiny: bool) -> bool:
    platform = (machine or {}).get("result", {}).get("platform")
    if platform == "gpu" or (tiny and platform):
        return True
    here = f"JAX finds {platform}" if platform else "what there is, log.txt may say"
    print(f"This needs an NVIDIA GPU; {here}. --tiny tries all of it without one.")
    return False


def kernel_runs(tiny: bool) -> dict[str, tuple[kernels.Case, bool]]:
    cases = kernels.cases()
    if tiny:
        cases = [kernels.Case("selective_scan", 2, 9, 8, "float32")]
    ways = {False: "forward", True: "both"}
    return {f"{case}, {ways[back]}": (case, back) for case in cases for back in ways}


def names_of(step: str, tiny: bool) -> list[str]:
    """The jobs of a step, in the order of what they tell: the time may end before they do."""
    if step == "machine":
        return ["machine"]
    if step == "training":
        return [str(case) for case in gpu_training.cases(tiny)]

    def order(run):
        case, backward = run[1]
        scan = case.op == "selective_scan"
        return scan and case.time > 2048, not backward, not scan  # XLA walks through long ones

    return [name for name, _ in sorted(kernel_runs(tiny).items(), key=order)]


def jobs_of(step: str, tiny: bool, folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    if step == "machine":
        return {"machine": machine}
    if step == "training":
        many = {"repeats": 3 if tiny else 10, "seconds": 20}
        cases = gpu_training.cases(tiny)
        return {str(case): ft.partial(gpu_training.measure, case, **many) for case in cases}
    found = jobs.read(folder / "results.jsonl")["machine"]["result"]
    given = found["bytes"], argparse.Namespace(repeats=3 if tiny else 5), found["platform"]
    runs = kernel_runs(tiny)
    return {name: ft.partial(kernels.compare, *case, *given) for name, case in runs.items()}


def machine() -> dict[str, Any]:
    """What it is, and how fast its memory."""
    device = jax.devices()[0]
    found = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    copied = 2**30 if device.platform == "gpu" else 2**12
    return {
        **kernels.about_device(),
        "platform": device.platform,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "nvidia_smi": _nvidia_smi(),
        "packages": {n: importlib.metadata.version(n) if found[n] else None for n in PACKAGES},
        "bytes": kernels.copying_rate(copied, 5),
    }


def _nvidia_smi() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()


def run_tests(folder: pathlib.Path, deadline: float, tiny: bool) -> None:
    """On the GPU the tests of the kernels run those themselves, and not in the interpreter."""
    with (folder / "tests.txt").open("w") as output:
        if importlib.util.find_spec("pytest") is None:
            output.write("not run: pytest is not installed\n")
            return
        command = [sys.executable, "-m", "pytest", "-v", "-rN", "--tb=short", *TESTS]
        # Those of this project ask for a plugin, and stop at any warning of a newer JAX.
        command += ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "1" if tiny else "4"]
        command += ["-k", "few_channels"] * tiny
        status = jobs.call(command, output, deadline, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if status is None:
            output.write("\nnot run: the others, for want of time\n")
        elif status not in (0, 1):  # neither all passed nor some failed
            output.write(f"\nnot run: pytest ended with status {status}, see tests.txt\n")


OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR) (\S+::.*?)|(\S+::.*?) (PASSED|FAILED|ERROR)\b.*)\s*$",
    re.MULTILINE,
)


def tests_of(folder: pathlib.Path) -> tuple[int, dict[str, str]]:
    """How many have passed, and those that have not."""
    output = folder / "tests.txt"
    text = output.read_text() if output.exists() else ""
    outcomes = [(a or d, b or c) for a, b, c, d in OUTCOME.findall(text)]
    failed = {name: "see tests.txt" for what, name in outcomes if what != "PASSED"}
    for reason in re.findall(r"^not run: (.*)", text, re.MULTILINE):
        failed["tests"] = reason
    return sum(what == "PASSED" for what, _ in outcomes), failed


def record(folder: pathlib.Path, tiny: bool) -> dict[str, Any]:
    """What has been found so far, which is also written down."""
    found = jobs.read(folder / "results.jsonl")
    passed, failed_tests = tests_of(folder)
    about = {**found.get("machine", {}).get("result", {}), "tests": passed}
    steps = {"kernels": list(kernel_runs(tiny)), "training_on_a_gpu": names_of("training", tiny)}
    tables = {}
    for name, step in steps.items():
        given = {
            what: {job: found[job][what] for job in step if what in found.get(job, {})}
            for what in ("result", "failed")
        }
        tables[name] = {
            "about": about,
            "cases": list(given["result"].values()),
            "failed": given["failed"],
            "not_reached": len(step) - sum(map(len, given.values())),
        }
    tables["kernels"]["failed"] |= failed_tests
    training = {
        str(gpu_training.Case(**o["case"])): o for o in tables["training_on_a_gpu"]["cases"]
    }
    tables["training_on_a_gpu"]["failed"] |= gpu_training.differing(training)
    written = {"tiny": tiny, "machine": found.get("machine"), "tables": tables}
    (folder / "record.json").write_text(json.dumps(written, indent=1) + "\n")
    return written


def said(step: str, written: dict[str, Any]) -> str:
    """What there is to print when a step is done."""
    tables = written["tables"]
    if step == "machine":
        return json.dumps(written["machine"], indent=1)
    if step == "tests":
        failed = [name for name in tables["kernels"]["failed"] if "::" in name]
        return "\n".join([f"{tables['kernels']['about']['tests']} passed, failed:", *failed])
    name = {"kernels": "kernels", "training": "training_on_a_gpu"}[step]
    return PAGES[name](tables[name])


def read(folder: pathlib.Path) -> int:
    """Writes what a run has left in `folder` into docs/."""
    path = folder / "record.json"
    if not path.exists():
        raise SystemExit(f"{folder} has no record.json: give the folder that --out named.")
    written = json.loads(path.read_text())
    if written["tiny"]:
        raise SystemExit(f"{path} is of --tiny, whose figures say nothing: docs/ stays as it is.")
    tables = written["tables"]
    report.check_page(tables)
    report.write(tables, {name: PAGES[name](table) for name, table in tables.items()})
    print(f"{folder} is in {report.PAGE} and {report.RECORD}.")
    return 0


def lower() -> int:
    """Lowers every program at its size for a GPU of this kind, wherever this runs."""
    programs: dict[str, Callable[[], Any]] = {
        name: ft.partial(kernels.lower, *run, "cuda") for name, run in kernel_runs(False).items()
    }
    for case in gpu_training.cases():
        programs[str(case)] = ft.partial(_lowered_training, case)
    with as_on_a_gpu():
        for name, program in programs.items():
            start = time.monotonic()
            text = program().as_text()
            calls = text.count("custom_call @mosaic_gpu")
            print(f"{name}: {calls} kernels, {time.monotonic() - start:.1f} s", flush=True)
    return 0


def _lowered_training(case: gpu_training.Case) -> Any:
    return gpu_training.lower(case, *gpu_training.shapes(case), "cuda")


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What is traced within chooses its sizes as on a Hopper GPU."""
    device = types.SimpleNamespace(compute_capability="9.0", platform="gpu")
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(jax, "devices", lambda *args: [device]),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
