"""Measures this library against its peers, in turns, and prints a table for each kind of question.

    python -m benchmarks                        # everything, about an hour on two cores
    python -m benchmarks --table mixers --only "LRU 1024"
    python -m benchmarks --write                # also into docs/performance.md, .json and figures

Every subject runs in a process of its own, those of the package index in environments of their own,
which are made on first use below `benchmarks/.environments`. Run it on an otherwise idle machine.
"""

import argparse
import datetime
import pathlib
import platform

from benchmarks import report
from benchmarks.cases import TABLES
from benchmarks.comparing import compare
from benchmarks.processes import Subject, UnavailableError, scratch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each subject per case")
    parser.add_argument("--seconds", type=float, default=20, help="fewer runs if they need more")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats must be at least 3, for quartiles; got {options.repeats}.")
    tables = {
        name: [case for case in TABLES[name]() if options.only in str(case)]
        for name in options.table or TABLES
    }
    if not any(tables.values()):
        parser.error(f"--only {options.only!r} leaves no case of {', '.join(tables)}.")

    subjects = {}
    for name in {name for cases in tables.values() for case in cases for name in case.subjects}:
        try:
            subjects[name] = Subject(name)
        except UnavailableError as reason:
            print(f"left out: {reason}")
    rates = subjects["ours"].ask("rates")
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {report.processor()}",
        "rates": rates,
        "versions": {name: subject.ask("versions") for name, subject in sorted(subjects.items())},
    }
    print(report.heading(about))
    results = {}
    with scratch() as folder:
        for name, cases in tables.items():
            print(f"\n## {name}\n\n{report.table_head(name)}", flush=True)
            results[name] = []
            for case in cases:
                outcome = compare(
                    case,
                    subjects,
                    pathlib.Path(folder),
                    rates,
                    repeats=options.repeats,
                    seconds=options.seconds,
                )
                results[name].append(outcome)
                print("\n".join(report.rows(name, outcome)), flush=True)
                for reason in outcome["refused"].values():
                    print(f"not run: {reason}", flush=True)
    for subject in subjects.values():
        subject.close()
    if options.write:
        report.write(about, results)


if __name__ == "__main__":
    main()
