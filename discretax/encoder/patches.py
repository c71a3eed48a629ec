from typing import Any

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import check_size
from discretax._timeseries import Timeseries
from discretax.encoder.base import AbstractEncoder
from discretax.rates import Downsample


class PatchEncoder(AbstractEncoder):
    r"""$W\,[x_{pk}; \dots; x_{pk + p - 1}] + b$ for each patch of $p$ samples of a raw signal.

    What follows has $p$ times fewer samples. It is a [`discretax.rates.Downsample`][] with
    `how="linear"`, and treats length, timesteps, resets and streams as that one does.

    !!! example

        ```python
        encoder = PatchEncoder(1, 64, key, patch_size=16)
        y, state = encoder(x, eqx.nn.State(encoder))  # (time, 1) -> (ceil(time / 16), 64)
        ```

    ??? cite

        Patches of samples: Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv:2010.11929).
    """

    downsample: Downsample

    @keyed
    def __init__(self, in_features: int, out_features: int, key: PRNGKeyArray, *, patch_size: int):
        """**Arguments:** `in_features`, width of the samples; `out_features`, width of the model;
        `key`; `patch_size`, how many samples make a patch.

        **Raises:** `ValueError` for sizes below one.
        """
        patch_size = check_size("patch_size", patch_size)
        self.downsample = Downsample(
            in_features, patch_size, key, how="linear", out_features=out_features
        )

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]:
        return self.downsample(x, state, key)
