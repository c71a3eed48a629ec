from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, PyTree

from discretax._ensembles import check_one_member
from discretax._features import check_instance
from discretax._types import Timesteps
from discretax.sequence_mixers.base import AbstractLTIMixer


class Discretized(AbstractLTIMixer[Any]):
    """An LTI mixer whose discrete system is computed once, for fast stepping.

    Usually made for a whole model at once, by [`discretax.discretized`][]. It is for inference:
    training it would move the system and leave the parameters behind. Where parameters are to be in
    bfloat16 or float16, cast them first: of a slow decay, such a type's rounding would leave none.

    !!! example

        ```python
        mixer = Discretized(S5SequenceMixer(64, state_dim=32, key=key))
        y, cache = mixer.step(sample, mixer.allocate_inference_cache())  # sample, y: (64,)
        ```
    """

    mixer: AbstractLTIMixer
    system: PyTree[Array]
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("system",)

    def __init__(self, mixer: AbstractLTIMixer):
        """**Arguments:** `mixer`: the mixer whose parameters will not change any more.

        **Raises:** `TypeError` for what is no time-invariant mixer; `ValueError` for an ensemble of
        mixers.
        """
        check_instance("mixer", mixer, AbstractLTIMixer)
        check_one_member(mixer, "eqx.filter_vmap(discretax.discretized)(ensemble)")
        self.mixer = mixer
        self.system = mixer.discretize()
        self.in_features = mixer.in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree[Array]:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def discretize(self, integration_timesteps: Timesteps | None = None) -> Any:
        if integration_timesteps is not None:
            return self.mixer.discretize(integration_timesteps)
        return self.system

    def compute_kernel(self, length: int) -> Array:
        return self.mixer.compute_kernel(length)
