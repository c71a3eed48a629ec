import importlib.metadata
import os
import re

import pytest

# Tests compile much and compute little: each of the two settings about optimising halves their time.
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one refuses the flag
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

import jax

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_since_cleared = 0


def pytest_collection_modifyitems(items):
    """The tests of a group stand one after the other, and share what they compile."""
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
