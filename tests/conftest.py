import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tests compile much and compute little: this halves their time.
jax.config.update("jax_disable_most_optimizations", True)

_count = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    """Thousands of compiled functions would take gigabytes, and more mappings than Linux grants."""
    yield
    if next(_count) % 60 == 0:
        jax.clear_caches()
