"""This library, made to take the other way where it chooses from the shapes."""

import jax
import ours
from job import Job
from measuring import versions

from discretax.ops._depthwise_ssm import depthwise_ssm
from discretax.ops._recurrence import projections
from discretax.ops._running import chunks
from discretax.sequence_mixers.ltv import rglru

__all__ = ["prepare", "versions"]

MODULES = {
    "WHOLE": projections,
    "HEAVY": chunks,
    "STEPS": depthwise_ssm,
    "LARGE_BEYOND": depthwise_ssm,
    "LONG": depthwise_ssm,
    "CHUNK": rglru,
}
CHOSEN = {name: getattr(module, name) for name, module in MODULES.items()}


def prepare(case: dict, arrays: dict) -> Job:
    name, threshold = case["other"]
    jax.clear_caches()  # of what was traced with other thresholds
    for other, module in MODULES.items():
        setattr(module, other, threshold if other == name else CHOSEN[other])
    return ours.prepare(case, arrays)
