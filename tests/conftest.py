import gc
import importlib.metadata
import os
import re

import pytest

# Tests compile much and compute little: without fusion emitters and optimisations they take a quarter
# of the time, and a program in one piece compiles in three quarters of what is left.
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one refuses the first flag
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Of the many small objects that tracing makes, few are cycles.
gc.set_threshold(200_000, 20, 50)

_since_cleared = 0


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also the tests marked so")


def pytest_collection_modifyitems(config, items):
    """The tests of a group stand one after the other, and share what they compile."""
    if not config.option.thorough:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
    order = {}
    items.sort(key=lambda item: order.setdefault(_group(item), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process runs a function's parameters, and all of a mixer's laws: it compiles them once.

    The groups of pytest-xdist 3.8 do not reach its scheduler under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            function, *parameters = re.split(r"[\[\]-]", nodeid)
            if "test_docs.py" in function:  # pages have little in common
                return nodeid
            return parameters[0] if "test_laws.py" in function else function

    return Scheduling(config, log)


def pytest_runtest_teardown(item, nextitem):
    """Forgets what was compiled after each file, and each group of tests within one.

    Thousands of compiled functions would take gigabytes, and more mappings than Linux grants.
    """
    global _since_cleared
    _since_cleared += 1
    if nextitem is None or _group(item) != _group(nextitem) or _since_cleared >= 60:
        jax.clear_caches()
        _since_cleared = 0


def _group(item):
    marker = item.get_closest_marker("xdist_group")
    return item.path, marker and marker.args
