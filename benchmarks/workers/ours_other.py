"""This library, made to take the other way where it chooses from the shapes."""

import jax
import ours
from job import Job
from measuring import versions

from discretax.ops import _chunks, _depthwise_ssm, _diagonal_ssm
from discretax.sequence_mixers import rglru

__all__ = ["prepare", "versions"]

MODULES = {
    "WHOLE": _diagonal_ssm,
    "HEAVY": _chunks,
    "STEPS": _depthwise_ssm,
    "LARGE_BEYOND": _depthwise_ssm,
    "LONG": _depthwise_ssm,
    "CHUNK": rglru,
}
CHOSEN = {name: getattr(module, name) for name, module in MODULES.items()}


def prepare(case: dict, arrays: dict) -> Job:
    name, threshold = case["other"]
    jax.clear_caches()  # of what was traced with other thresholds
    for other, module in MODULES.items():
        setattr(module, other, threshold if other == name else CHOSEN[other])
    return ours.prepare(case, arrays)
