"""ejkernel 0.0.78 of the package index: its gated delta rule in plain XLA."""

import importlib.util
import pathlib
from types import ModuleType

import jax.numpy as jnp
from job import Job
from measuring import training_job, versions

__all__ = ["prepare", "versions"]


def load() -> ModuleType:
    """The file alone: the package asks for what does not go with this version of JAX."""
    package = importlib.util.find_spec("ejkernel")
    assert package is not None and package.origin is not None
    folder = pathlib.Path(package.origin).parent / "kernels" / "_xla" / "gated_delta_rule"
    spec = importlib.util.spec_from_file_location("gdr", folder / "_xla_impl_fwd.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(case: dict, arrays: dict) -> Job:
    rule = load()._chunk_gdr_fwd

    def run(_, inputs):
        q, k, v, beta, log_decay = (jnp.moveaxis(array, 0, 1)[None] for array in inputs)
        q = q * case["state"] ** 0.5  # it divides by this
        y, _ = rule(q, k, v, beta, log_decay, chunk_size=64, use_qk_l2norm=False)
        return jnp.moveaxis(y[0], 0, 1)

    return training_job(run, None, arrays, case)
