"""Reading the numbers of the original implementations (`golden/README.md`)."""

import pathlib

import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


class Golden:
    """One file: `x`, `y`, `w` and parameters and gradients by the original's names, as `dtype`."""

    def __init__(self, name: str, dtype: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: jnp.asarray(file[key], dtype) for key in file}

    def __getitem__(self, name: str):
        return self.arrays[name]

    def fields(self, kind: str, prefix: str = "") -> dict:
        """All arrays of a kind, `"p"` or `"g.p"`, below a prefix, by the rest of their names."""
        start = f"{kind}.{prefix}"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}
