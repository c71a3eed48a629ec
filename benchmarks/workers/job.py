"""What a worker prepares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    run: Callable[[], Any]  # once, until the results are there
    outcome: Callable[[], dict[str, np.ndarray]]  # what all subjects must agree on
    facts: dict[str, float]
