"""Jobs in processes of their own, each with so many seconds: whatever one does, the others run.

A kernel that has never run on the hardware can stand still, end its process, or leave a device behind
on which nothing else runs.
"""

import faulthandler
import json
import os
import pathlib
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

ROOT = pathlib.Path(__file__).parent.parent
AGAIN = 3  # the exit status of a process that has written a failure down; another one does the rest


def work(
    jobs: Mapping[str, Callable[[], Any]],
    names: Iterable[str],
    results: pathlib.Path,
    seconds: float,
) -> int:
    """Runs them in turn and appends what each gives to `results`. Returns the exit status.

    A job of more than `seconds` ends the process, wherever it stands. After an error other than an
    `AssertionError`, which says that numbers differ, the device is not trusted any longer.
    """
    for name in names:
        _note(results, name)
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            _note(results, name, result=jobs[name]())
        except AssertionError as error:
            _note(results, name, failed=str(error))
        except Exception as error:
            traceback.print_exc()
            _note(results, name, failed=f"{type(error).__name__}: {error}")
            return AGAIN
        finally:
            faulthandler.cancel_dump_traceback_later()
    return 0


def supervise(
    command: Sequence[str],
    names: Iterable[str],
    results: pathlib.Path,
    log: IO[str],
    deadline: float,
    together: int | None = None,
) -> None:
    """Has `command`, followed by names of jobs, `work` until all are done or the deadline is there.

    `together` at most share a process.
    """
    left = list(names)
    while left and time.monotonic() < deadline:
        status = call([*command, *left[:together]], log, deadline)
        found = read(results)
        left = [name for name in left if not found.get(name)]
        if status is None:
            return
        if status not in (0, AGAIN):
            # Whatever ended the process, it was the first of those that are left.
            name = left.pop(0)
            _note(results, name, failed=f"its process ended, with status {status}: see the log")
            if name not in found:  # none was begun, and none will be
                return


def call(command: Sequence[str], log: IO[str], deadline: float, **environment: str) -> int | None:
    """The exit status of a command; None if it had to be ended at the deadline."""
    log.flush()
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read(results: pathlib.Path) -> dict[str, dict]:
    """Of each job that was begun, its `result` or why it has `failed`, or neither."""
    found: dict[str, dict] = {}
    if results.exists():
        for line in results.read_text().splitlines():
            note = json.loads(line)
            found.setdefault(note.pop("job"), {}).update(note)
    return found


def _note(results: pathlib.Path, name: str, **note: Any) -> None:
    if "failed" in note:
        note["failed"] = " ".join(note["failed"].split())[:300]
    with results.open("a") as file:
        file.write(json.dumps({"job": name, **note}) + "\n")
