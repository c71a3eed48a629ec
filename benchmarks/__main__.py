"""Measures this library against its peers, in turns, and prints a table for each kind of question.

    python -m benchmarks                        # everything, more than an hour on two cores
    python -m benchmarks --table mixers --only "LRU 1024"
    python -m benchmarks --write                # also into docs/performance.md, .json and figures

Every subject runs in a process of its own, those of the package index in environments of their own,
which are made on first use below `benchmarks/.environments`. Run it on an otherwise idle machine.
"""

import argparse
import contextlib
import datetime
import pathlib
import platform

from benchmarks import first_use, kernels, report
from benchmarks.cases import TABLES, Case
from benchmarks.comparing import compare
from benchmarks.processes import Subject, UnavailableError, scratch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    all_cases = {**TABLES, "kernels": kernels.cases}
    parser.add_argument("--table", choices=all_cases, action="append", help="default: all")
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each subject per case")
    parser.add_argument("--seconds", type=float, default=20, help="fewer runs if they need more")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats must be at least 3, for quartiles; got {options.repeats}.")
    if options.write and options.only:
        parser.error("--write takes no --only: the figures of a table come from one run.")
    tables = {
        name: [case for case in all_cases[name]() if options.only in str(case)]
        for name in options.table or all_cases
    }
    tables = {name: cases for name, cases in tables.items() if cases}
    if not tables:
        parser.error(f"--only {options.only!r} leaves no case.")
    if options.write:
        report.check_page(tables)
    results, pages = {}, {}
    for name, cases in tables.items():
        if name == "kernels":
            results[name] = kernels.measure(cases, options)
            pages[name] = kernels.page(results[name])
        else:
            results[name] = measure(name, cases, options)
            pages[name] = report.page(name, results[name])
    if options.write:
        report.write(results, pages)


def measure(name: str, cases: list[Case], options: argparse.Namespace) -> dict:
    """One table: its outcomes, and what there is to say about them."""
    subjects: dict[str, Subject] = {}
    versions, left_out, outcomes = {}, [], []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(scratch()))
        for who in dict.fromkeys(who for case in cases for who in case.subjects):
            try:
                subject = stack.enter_context(contextlib.closing(Subject(who)))
                versions[who] = subject.ask("versions")
                subjects[who] = subject
            except UnavailableError as reason:
                left_out.append(str(reason))
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {report.processor()}",
            "rates": subjects["ours"].ask("rates"),
            "versions": versions,
            "left_out": left_out,
        }
        print(f"\n## {name}\n\n{report.heading(about)}\n\n{report.table_head(name)}", flush=True)
        for case in cases:
            if name == "first_use":
                outcome = first_use.compare(case, list(subjects))
            else:
                outcome = compare(
                    case,
                    subjects,
                    folder,
                    about["rates"],
                    repeats=options.repeats,
                    seconds=options.seconds,
                )
            outcomes.append(outcome)
            print("\n".join(report.rows(name, outcome)), flush=True)
    table = {"about": about, "cases": outcomes}
    print(*report.notes(table), flush=True)
    return table


if __name__ == "__main__":
    main()
