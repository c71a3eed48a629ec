"""What a worker prepares."""

import ctypes
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STATUS = pathlib.Path("/proc/self/status")
FORGET_THE_PEAK = "5"


class Job(NamedTuple):
    run: Callable[[], Any]  # once, until the results are there
    outcome: Callable[[], dict[str, np.ndarray]]  # what all subjects must agree on
    facts: dict[str, float]


def peak_bytes(run: Callable[[], Any]) -> dict[str, float]:
    """By how much this process is larger at its largest, while it runs this, than before; on Linux.

    What has been freed before is given back first, so that it is counted when it is taken again.
    """
    if not STATUS.exists():
        return {}
    ctypes.CDLL(None).malloc_trim(0)
    STATUS.with_name("clear_refs").write_text(FORGET_THE_PEAK)
    before = _largest_resident()
    run()
    return {"peak_bytes": _largest_resident() - before}


def _largest_resident() -> int:
    kilobytes = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
    assert kilobytes is not None
    return 1024 * int(kilobytes[1])
